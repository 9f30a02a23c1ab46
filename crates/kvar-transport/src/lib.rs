//! Links: they move frames and payload, and own every buffer while they do.
//!
//! ```text
//!   push(head, source) ─> outbox ─┐                        ┌─ inbox ─> Frame{header, message}
//!   send(head)         ─> outbox ─┤── bytes of a stream ──>│             pull(sink) | discard()
//!   fence_*(token)                │   (TCP, simulated)     │          ─> Received{sink}
//!            Sent{source} <───────┘                        └─ late payload ─> scratch
//! ```
//!
//! A frame is a header of [`HEADER_BYTES`], a message and a payload. A link learns the two lengths
//! from the caller's [`Framing`] and parses nothing. Payload is sent from the pieces of a
//! [`Source`] in one call with its header, and received straight into the pieces of a [`Sink`].
//!
//! What must always be true:
//! * a source or sink belongs to the link from `push` or `pull` until it comes back, by an event or
//!   by a fence, and a buffer that came back is never read or written again;
//! * when a link goes down, everything it owned comes back before [`Event::Down`];
//! * what a link holds is bounded by [`LinkOptions`], whatever the peer does;
//! * nothing here blocks.
//!
//! What is absent: messages, retries, deadlines, threads. TCP and shared memory are two insides of
//! [`Link`] (`docs/internals/links.md`); RDMA can be another.
//!
//! # How a node's thread uses it
//!
//! One reactor (`kvar_io::Reactor`, here a `mio::Poll`) for listener, links, mailbox and device. Readiness is edge-triggered and kept
//! by the link, so the loop is: note what is ready, poll what can move, sleep when nothing can.
//!
//! ```
//! use kvar_transport::{Armed, Event, FrameLengths, Link, LinkOptions, Listener, TcpLink, TURN_BYTES};
//! use mio::{Events, Poll, Token};
//!
//! # fn framing(header: &[u8; 40]) -> Result<FrameLengths, String> {
//! #     Ok(FrameLengths { message: usize::from(header[0]), payload: usize::from(header[1]) })
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! type NodeLink = TcpLink<kvar_io::Shared, kvar_io::Buffer>;
//! let arena = kvar_io::Arena::new(1 << 20)?;
//! let mut poll = Poll::new()?;
//! let mut listener = Listener::bind("127.0.0.1:0".parse()?)?;
//! listener.register(poll.registry(), Token(0))?;
//! let mut links: Vec<NodeLink> = Vec::new();
//! # let mut client = std::net::TcpStream::connect(listener.local_addr())?;
//! # let mut frame = [0; 40]; frame[0] = 2; frame[1] = 5;
//! # std::io::Write::write_all(&mut client, &[&frame[..], b"hihello"].concat())?;
//! # let mut received = false;
//!
//! let mut events = Events::with_capacity(256);
//! # while !received {
//! // Sleep only if no link has something left to do.
//! let busy = links.iter_mut().any(|link| link.arm() == Armed::Ready);
//! let timeout = busy.then_some(std::time::Duration::ZERO); // else: until the next timer
//! poll.poll(&mut events, timeout)?;
//! for event in &events {
//!     if event.token() == Token(0) {
//!         while let Some((stream, _peer)) = listener.accept()? {
//!             let mut link = NodeLink::accepted(stream, framing, LinkOptions::default());
//!             link.register(poll.registry(), Token(1 + links.len()))?;
//!             links.push(link);
//!         }
//!     } else {
//!         links[event.token().0 - 1].on_event(event);
//!     }
//! }
//! for link in &mut links {
//!     let mut budget = TURN_BYTES; // fairness: no link moves more in one turn
//!     loop {
//!         match link.poll(&mut budget) {
//!             Event::Frame { header: _, message, payload_bytes } => {
//!                 assert_eq!((message, payload_bytes), (&b"hi"[..], 5));
//!                 // Parse the message; then say where its payload goes, at once or turns later.
//!                 let buffer = arena.allocate(payload_bytes).ok_or("no memory: discard()")?;
//!                 link.pull(7, buffer).map_err(|_| "sink and payload differ in length")?;
//!             }
//!             Event::Received { token, sink } => {
//!                 assert_eq!((token, sink.as_slice()), (7, &b"hello"[..]));
//! #               received = true;
//!                 // Verify, store; answer with link.send(head) or link.push(head, token, shared).
//!             }
//!             Event::Sent { .. } => {}         // a source is free again; dropping it is all
//!             Event::Returned { .. } => {}     // the link goes down: abort what waited for it
//!             Event::Down(_reason) => {}       // drop the link
//!             Event::Up => {}                  // only for links made by connect
//!             Event::Idle | Event::Yield => break,
//!         }
//!     }
//! }
//! # }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod any;
mod inbox;
mod link;
mod outbox;
mod pieces;
pub mod ring;
pub mod shared;
pub mod sim;
mod stream;
mod tcp;

pub use any::{AnyLink, AnyStream, LinkKind};
pub use link::{
    Armed, DownReason, Event, FrameLengths, Framing, HEADER_BYTES, Link, LinkOptions, Owned,
    PullRefused, PushRefused, Readiness, SendRefused, TURN_BYTES,
};
pub use pieces::{SharedPieces, Sink, Source};
pub use stream::{Stream, StreamLink, Watched};
pub use tcp::{BindError, Listener, TcpLink, TcpOptions, TcpStream};
