//! Sharing memory with a node of the same host: asked for once a link stands, before anything else is
//! sent on it.
//!
//! ```text
//!   Welcome ── not wanted, not possible ────────────────────────────────────> Open over TCP
//!      └── Attach ──> Attaching ── Attached, memory taken ──> Open over shared memory
//!                         ├── Declined ─────────────────────> Open over TCP   (shm: the link fails)
//!                         └── memory cannot be taken ───────> link fails; the next, at once, does not ask
//! ```
//!
//! Why links stay on TCP is in the stats, in words.
//!
//! ```text
//!   Open over shared memory ── Stage, if wanted ──> Staged, region taken ──> staging memory is shared
//!                                  └── Declined, not to be taken ──────────> it is private, nothing else changes
//! ```

use super::Session;
use crate::config::{ClientError, LinkChoice};
use crate::connection::{Connection, Phase};
use crate::session::exchange::said;
use crate::session::links::Slot;
use crate::stats::add;
use kvar_transport::Link as _;
use kvar_transport::shared::{Meeting, PLACE_BYTES, SECRET_BYTES};
use kvar_wire::{
    Attach, AttachAnswer, AttachDeclined, Limits, MESSAGE_BYTES_MAX, Message, PAYLOAD_BYTES_MAX,
    Stage, StageAnswer, VERSION_WITH_SHARED_MEMORY, VERSION_WITH_STAGING,
};
use mio::Token;
use std::sync::Arc;

impl Session {
    /// A link has been let in: asks to share memory where that is wanted and may be had.
    pub(super) fn attach(&mut self, index: usize, limits: Limits) {
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return;
        };
        let why = why_not(connection, self.config.link, self.unshareable.as_deref());
        let asked = why.map_or_else(|| ask(connection), Err);
        match asked {
            Ok(meeting) => connection.phase = Phase::Attaching(limits, Some(meeting)),
            Err(why) => self.stay_on_tcp(index, limits, &why, false),
        }
    }

    /// The node has answered.
    pub(super) fn on_attach_answer(
        &mut self,
        index: usize,
        message: Message,
    ) -> Result<(), String> {
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return Ok(());
        };
        let Phase::Attaching(limits, meeting) = &mut connection.phase else {
            return Ok(());
        };
        let (limits, meeting) = (*limits, meeting.take());
        match message {
            Message::AttachAnswer(AttachAnswer::Declined { why, text }) => {
                add(&self.counters.attach_declined, 1);
                self.stay_on_tcp(index, limits, &text, why == AttachDeclined::Full);
                Ok(())
            }
            Message::AttachAnswer(AttachAnswer::Attached { .. }) => {
                let meeting = meeting.ok_or("the node answers twice")?;
                let registry = self.poll.registry();
                let shared = meeting.take().map_err(|error| error.to_string());
                let shared = shared.and_then(|end| {
                    let shared = connection.link.share(end, registry, Token(index));
                    shared.map_err(|error| format!("cannot watch the node's bell: {error}"))
                });
                if let Err(why) = shared {
                    // The node has gone over already, so this link is of no use any more.
                    add(&self.counters.attach_declined, 1);
                    connection.goes_plain = self.config.link != LinkChoice::Shm;
                    let text = format!("{}: {why}", self.config.endpoint);
                    connection.fail(ClientError::Unreachable(text));
                    self.unshareable = Some(why);
                } else {
                    self.opened(index, limits);
                }
                Ok(())
            }
            Message::Failure(failure) => {
                connection.fail(said(&self.config.endpoint, &failure));
                Ok(())
            }
            other => Err(format!(
                "the node answers with {:?} when asked to share memory",
                other.kind()
            )),
        }
    }

    /// Memory is not shared, and here is why.
    fn stay_on_tcp(&mut self, index: usize, limits: Limits, why: &str, may_pass: bool) {
        self.counters.say_not_shared(Some(why.to_owned()));
        if self.config.link != LinkChoice::Shm {
            return self.opened(index, limits);
        }
        let text = format!(
            "{}: no shared memory, which link = shm demands: {why}; link = auto goes on over TCP",
            self.config.endpoint,
        );
        let error = if may_pass {
            ClientError::Busy(text)
        } else {
            ClientError::Config(text)
        };
        if let Slot::Linked(connection) = &mut self.slots[index] {
            connection.fail(error);
        }
    }

    /// A link stands, and requests may be sent on it.
    fn opened(&mut self, index: usize, limits: Limits) {
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return;
        };
        connection.phase = Phase::Open(limits);
        connection
            .link
            .set_bounds(MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX);
        add(&self.counters.connects, 1);
        self.counters.link_opened(connection.is_shared());
        self.board.last_error = None;
        self.note_mode();
        self.node_lives();
        self.stage(index);
    }

    /// Asks for a region to read into, where one is wanted and there is none. Everything else goes on
    /// meanwhile, and without.
    fn stage(&mut self, index: usize) {
        let mut links = self.slots.iter().filter_map(Slot::connection);
        let has_one = links.any(|link| link.region.is_some() || link.staging.is_some());
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return;
        };
        if self.config.staging == 0 || has_one {
            return;
        }
        let why = why_not_staged(connection).or_else(|| self.counters.stock.why_not());
        let number = self.next_number;
        let asked = why.map_or_else(
            || ask_for_places(connection, number, self.config.staging),
            Err,
        );
        match asked {
            Ok(meeting) => {
                self.next_number += 1;
                connection.staging = Some((number, meeting));
            }
            Err(why) => self.counters.say_not_staged(Some(why)),
        }
    }

    /// The node has answered that.
    pub(super) fn on_stage_answer(
        &mut self,
        index: usize,
        request: u64,
        answer: StageAnswer,
    ) -> Result<(), String> {
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return Ok(());
        };
        let asked = connection.staging.take_if(|(number, _)| *number == request);
        let Some((_, meeting)) = asked else {
            return Err("the node brings a staging region that nobody asked for".to_owned());
        };
        let why = match answer {
            StageAnswer::Declined { text, .. } => text,
            StageAnswer::Staged { bytes } if bytes != self.config.staging => {
                return Err(format!(
                    "a staging region of {bytes} bytes where {} were asked for",
                    self.config.staging
                ));
            }
            StageAnswer::Staged { bytes } => match meeting.take_places(bytes) {
                Ok(region) => {
                    connection.region = Some(Arc::clone(&region));
                    self.counters.stock.open(region);
                    self.counters.say_not_staged(None);
                    return Ok(());
                }
                Err(error) => error.to_string(),
            },
        };
        add(&self.counters.stage_declined, 1);
        self.counters.say_not_staged(Some(why));
        Ok(())
    }

    /// Whether the node has not yet answered to that.
    pub(super) fn is_staging(&self) -> bool {
        let mut links = self.slots.iter().filter_map(Slot::connection);
        links.any(|link| link.staging.is_some() && link.is_open())
    }
}

/// Why the node is not even asked, if so.
fn why_not(
    connection: &Connection,
    choice: LinkChoice,
    unshareable: Option<&str>,
) -> Option<String> {
    match choice {
        LinkChoice::Tcp => Some("link = tcp".to_owned()),
        _ if connection.version < VERSION_WITH_SHARED_MEMORY => Some(format!(
            "the node speaks protocol version {}, which knows no shared memory; update it",
            connection.version,
        )),
        LinkChoice::Auto if unshareable.is_some() => unshareable.map(str::to_owned),
        LinkChoice::Auto if !connection.link.is_same_host() => {
            Some("the node is on another host, by its address".to_owned())
        }
        LinkChoice::Auto | LinkChoice::Shm => None,
    }
}

/// Why the node is not asked for a staging region, if so.
fn why_not_staged(connection: &Connection) -> Option<String> {
    match connection.version {
        _ if !connection.is_shared() => Some("the link shares no memory with the node".to_owned()),
        version if version < VERSION_WITH_STAGING => Some(format!(
            "the node speaks protocol version {version}, which knows no staging regions; update it"
        )),
        _ => None,
    }
}

/// A place to meet at.
fn meet() -> Result<([u8; PLACE_BYTES], [u8; SECRET_BYTES], Meeting), String> {
    let (mut place, mut secret) = ([0; PLACE_BYTES], [0; SECRET_BYTES]);
    for random in [&mut place, &mut secret] {
        getrandom::fill(random)
            .map_err(|error| format!("the operating system gives no randomness: {error}"))?;
    }
    let meeting = Meeting::open(&place, secret).map_err(|error| error.to_string())?;
    Ok((place, secret, meeting))
}

fn ask_for_places(
    connection: &mut Connection,
    request: u64,
    bytes: u64,
) -> Result<Meeting, String> {
    let (place, secret, meeting) = meet()?;
    let stage = Stage {
        place,
        secret,
        bytes,
    };
    let sent = connection.send(request, &stage);
    sent.map_err(|error| error.to_string())?;
    Ok(meeting)
}

/// Listens for the node, and tells it where.
fn ask(connection: &mut Connection) -> Result<Meeting, String> {
    let (place, secret, meeting) = meet()?;
    let attach = Attach { place, secret };
    let sent = connection.send(kvar_wire::LINK_REQUEST, &attach);
    sent.map_err(|error| error.to_string())?;
    Ok(meeting)
}
