//! What every parser of bytes from outside must hold to, whatever the bytes: one function a parser.
//!
//! ```text
//!   fuzz/fuzz_targets/*.rs ── libFuzzer finds bytes ──┐
//!                                                    ├──> TARGETS: name, function ──> parser, asserted
//!   tests/corpus.rs ── fuzz/corpus, and mutations ───┘
//! ```
//!
//! | target | reads |
//! |---|---|
//! | `superblock` | a copy of the superblock |
//! | `page` | a header, directory or footer page |
//! | `chunk` | a chunk of a checkpoint |
//! | `section_directory` | the front of the image of a block in sections |
//! | `recovery` | a whole device, some of whose bytes, pages and chunks say something else |
//! | `frame` | header and message of the wire, whatever its checks say |
//! | `message` | the message of a frame whose checks hold |
//! | `handshake` | what a peer says before anybody knows it |
//!
//! What must always be true: a target is a function of its bytes alone, and panics if and only if
//! something is wrong. Checks are made right where they would hide what is behind them.
//!
//! Left to others: stores over damaged devices in bulk (`kvar-engine/tests/parsers.rs`), whole
//! nodes (`kvar-node/tests/bad_input.rs`).

mod disk;
mod mutate;
mod recovery;
mod seeds;
mod wire;

pub use mutate::mutate;
pub use seeds::seeds;

/// A parser, and what must hold of it for any bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// As in `fuzz/fuzz_targets` and `fuzz/corpus`.
    pub name: &'static str,
    /// Panics when something does not hold.
    pub run: fn(&[u8]),
    /// How many mutations of the corpus a plain test tries; by what one costs.
    pub mutations: u32,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("superblock", disk::superblock, 50_000),
    target("page", disk::page, 20_000),
    target("chunk", disk::chunk, 2_000),
    target("section_directory", disk::section_directory, 20_000),
    target("recovery", recovery::recovery, 1_000),
    target("frame", wire::frame, 100_000),
    target("message", wire::message, 100_000),
    target("handshake", wire::handshake, 50_000),
];

const fn target(name: &'static str, run: fn(&[u8]), mutations: u32) -> Target {
    Target {
        name,
        run,
        mutations,
    }
}

/// Runs the target of this name.
///
/// # Panics
/// When there is none, or something does not hold.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target of that name").run)(bytes);
}
