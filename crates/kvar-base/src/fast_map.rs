//! Maps of the hot path, hashed in two or three nanoseconds instead of twenty.
//!
//! The standard map's SipHash withstands an attacker who sees much of its output; here nobody sees
//! any. Keys are block ids and numbers. Whoever holds a namespace's key may send any 32 bytes as an
//! id, so that an identity hash of the id would let one tenant pile up its ids in one place of the
//! map, and every call behind it would wait. foldhash mixes the key with seeds that each map draws
//! for itself at start; they never leave the process, neither does the order of the map, and a
//! restart draws others.

use std::collections::HashMap;

/// A map whose hash outsiders cannot predict, and which costs next to nothing.
pub type FastMap<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
