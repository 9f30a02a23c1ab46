//! Whether a link may share memory with its client, and how it comes to.
//!
//! `docs/internals/links.md` tells it from both sides. The answer leaves through TCP, and when it has
//! left the stream changes: so nothing else may be under way. A client that is turned away keeps its
//! link.

use super::conversation::Conversation;
use super::desk::Desk;
use kvar_transport::shared::{self, MeetingRefused, SharedEnd};
use kvar_transport::{Link as _, LinkKind};
use kvar_wire::{Attach, AttachAnswer, AttachDeclined};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// With whom a node shares memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// With clients that come over loopback.
    Auto,
    /// With every client of its host, whichever address it comes from.
    On,
    /// With nobody.
    Off,
}

impl FromStr for Sharing {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(format!("{text:?} is not one of auto, on, off")),
        }
    }
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// What all threads of a node know about sharing.
#[derive(Clone, Debug)]
pub(crate) struct SharingSettings {
    pub(crate) with: Sharing,
    /// Bytes of one ring.
    pub(crate) ring_bytes: usize,
    /// Links that may share memory at once, over all threads.
    pub(crate) links_max: usize,
    /// Links that do.
    pub(crate) links: Arc<AtomicUsize>,
}

/// One of the links that may share memory; given back when dropped.
pub(super) struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(settings: &SharingSettings) -> Option<Self> {
        let links = &settings.links;
        let more = |taken: usize| (taken < settings.links_max).then_some(taken + 1);
        links
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()?;
        Some(Self(Arc::clone(links)))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Conversation {
    /// Answers a client that asks to share memory, and goes over to it.
    pub(super) fn on_attach(&mut self, desk: &mut Desk, request: u64, attach: &Attach) {
        match self.try_attach(desk, attach) {
            Ok((end, seat)) => {
                let ring_bytes = desk.settings.sharing.ring_bytes as u32;
                // First the answer, through TCP: the stream changes when all that is queued has left.
                self.send(desk, request, &AttachAnswer::Attached { ring_bytes });
                let token = desk.token(self.key);
                if let Err(error) = self.link.share(end, &*desk.watcher, token) {
                    tracing::warn!(peer = %self.peer, %error, "cannot watch a client's bell; closing its link");
                    return self.link.close();
                }
                desk.counters.links_attached += 1;
                self.seat = Some(seat);
            }
            Err((why, text)) => {
                desk.counters.attach_declined.add(why);
                tracing::debug!(peer = %self.peer, why = why.word(), "no shared memory: {text}");
                self.send(desk, request, &AttachAnswer::declined(why, &text));
            }
        }
    }

    fn try_attach(
        &mut self,
        desk: &Desk,
        attach: &Attach,
    ) -> Result<(SharedEnd, Seat), (AttachDeclined, String)> {
        let settings = &desk.settings.sharing;
        let declined = |why, text: &str| Err((why, text.to_owned()));
        if self.link.kind() == LinkKind::SharedMemory || self.seat.is_some() {
            return declined(AttachDeclined::Late, "this link shares memory already");
        }
        if !self.open.is_empty() || self.link.outgoing_bytes() > 0 {
            let text = "requests are open; ask to share memory before anything else";
            return declined(AttachDeclined::Late, text);
        }
        match settings.with {
            Sharing::Off => {
                let text = "the node shares memory with nobody (shared_memory = off)";
                return declined(AttachDeclined::Off, text);
            }
            Sharing::Auto if !self.peer.ip().is_loopback() => {
                let text = "the node shares memory with clients that come over loopback; connect to \
                            127.0.0.1, or set shared_memory = on there";
                return declined(AttachDeclined::Remote, text);
            }
            Sharing::Auto | Sharing::On => {}
        }
        let Some(seat) = Seat::take(settings) else {
            let text = format!(
                "{} links share memory with the node, as many as may (shared_memory_links)",
                settings.links_max
            );
            return Err((AttachDeclined::Full, text));
        };
        match shared::offer(&attach.place, &attach.secret, settings.ring_bytes) {
            Ok(end) => Ok((end, seat)),
            Err(error @ MeetingRefused::Reach(_)) => {
                Err((AttachDeclined::Remote, error.to_string()))
            }
            Err(error) => {
                tracing::warn!(peer = %self.peer, %error, "cannot share memory with a client");
                Err((AttachDeclined::Failed, error.to_string()))
            }
        }
    }
}
