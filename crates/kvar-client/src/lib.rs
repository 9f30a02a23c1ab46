//! The client: batches of lookups, gets and puts against a node, with deadlines that hold.
//!
//! ```text
//!   any thread            the client's own thread
//!   ──────────            ───────────────────────
//!   Client ── call ──────> Session ── units of work ──> links ──> node
//!     │   (checks of put     │  window: the node's limits
//!     │    made here)        │  deadlines, breaker, reconnect
//!   Pending <── answer ──────┘  (checks of get verified here)
//! ```
//!
//! [`Client`] is for engines and tools: cheap to clone, safe from any thread, blocking calls and
//! calls that return a [`Pending`]. [`Session`] is what it drives; benchmarks drive one directly on
//! their own thread.
//!
//! What must always be true:
//! * every call ends by its deadline with an outcome for each item, whatever the node does;
//! * when a call has ended, its buffers are free: nothing reads or writes them any more (a staging buffer that
//!   the node may still write is not given back, and is told as `Filled::Held`);
//! * no byte is called a hit that did not pass the writer's content check;
//! * a lease that the node may hold and nobody was told of is given back;
//! * a node that cannot be reached costs nothing after the first failure (the breaker);
//! * what the operator last said of the namespace's mode is known while a link stands, and asked for
//!   again when it breaks, unless it was the usual one. The client does in every mode what it is told:
//!   whoever drives it obeys ([`Client::mode`]).
//!
//! What is absent: which node owns a block (one node for now), retries of reads and writes (a miss
//! is a normal answer), renewing of leases, and `unsafe`.
//!
//! ```no_run
//! use kvar_client::{Client, ClientConfig, GetItem, PutItem};
//! use kvar_base::{BlockId, NamespaceKey};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let key: NamespaceKey = std::fs::read_to_string("namespace-key")?.parse()?;
//! let client = Client::connect(ClientConfig::new("127.0.0.1:7411", key.clone()))?;
//! let id = BlockId::from_name(&key, "greeting");
//! client.put(vec![PutItem::of_bytes(id, b"hello".to_vec())]);
//! let results = client.get(vec![GetItem::to_vec(id)]);
//! assert_eq!(results[0].bytes(), Some(&b"hello"[..]));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod answer;
mod breaker;
mod call;
mod check;
mod client;
mod config;
mod connection;
mod items;
mod layer_put;
mod layers;
mod pending;
mod session;
mod staging;
mod stats;
mod worker;

pub use breaker::BreakerState;
pub use client::{CallOptions, Client};
pub use config::{ClientConfig, ClientError, LINKS_MAX, LinkChoice};
pub use items::{
    Answer, Destination, Filled, GetItem, GetOutcome, GetResult, Lease, Leased, Lookup,
    PreparedPut, PutItem, PutSource, Request,
};
pub use kvar_base::Mode;
pub use kvar_transport::shared::Lender;
pub use kvar_transport::{Sink, Source};
pub use kvar_wire::{BlockStat, Lengths, Limits, PutHints, VERSIONS, VersionRange};
pub use layer_put::{
    ANNOUNCED_SHARE, LayerPut, LayerPutItem, LayerPutRequest, SectionPart, SectionRefused,
};
pub use layers::{LayerGet, LayerItem, LayerRequest};
pub use pending::Pending;
pub use session::{Completion, Session, Ticket};
pub use staging::Staging;
pub use stats::ClientStats;
