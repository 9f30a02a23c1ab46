//! Keeping links: when to connect, when to give up, when to try again.

use super::Session;
use crate::config::{ClientConfig, ClientError};
use crate::connection::Connection;
use crate::stats::add;
use kvar_base::{Mode, Moment};
use kvar_wire::{ClientHandshake, LINK_REQUEST, Ping};
use mio::{Token, Waker};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

/// A second link that cannot be had is tried again this often; the first one serves meanwhile.
const SECOND_LINK_PAUSE: Duration = Duration::from_secs(1);

/// The place of one link.
#[allow(clippy::large_enum_variant)] // there are two of them in a session
pub(super) enum Slot {
    Empty {
        retry_at: Moment,
    },
    /// The node's name is being looked up.
    Naming {
        begun: Moment,
    },
    Linked(Connection),
}

impl Slot {
    pub(super) fn empty() -> Self {
        Self::Empty {
            retry_at: Moment(0),
        }
    }

    pub(super) fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Linked(connection) => Some(connection),
            _ => None,
        }
    }

    fn begun(&self) -> Option<Moment> {
        match self {
            Self::Naming { begun } => Some(*begun),
            Self::Linked(connection) if !connection.is_open() => Some(connection.begun),
            _ => None,
        }
    }
}

/// Where the node is. Looking up a name can take long and cannot be stopped, so that is done on a
/// thread of its own, one at a time.
pub(super) struct Addresses {
    endpoint: String,
    literal: Option<SocketAddr>,
    asked: Option<Receiver<io::Result<Vec<SocketAddr>>>>,
    /// Which of a name's addresses comes next.
    turn: usize,
}

impl Addresses {
    pub(super) fn of(endpoint: &str) -> Self {
        let literal = endpoint.parse().ok();
        Self {
            endpoint: endpoint.to_owned(),
            literal,
            asked: None,
            turn: 0,
        }
    }

    /// The address, an error, or `None`: ask again when woken.
    fn get(&mut self, waker: &Arc<Waker>) -> Option<Result<SocketAddr, String>> {
        if let Some(address) = self.literal {
            return Some(Ok(address));
        }
        let asked = self.asked.get_or_insert_with(|| {
            let (answer, asked) = channel();
            let (endpoint, waker) = (self.endpoint.clone(), Arc::clone(waker));
            std::thread::spawn(move || {
                // Whoever asked may be gone; then nobody wants to know.
                let _ = answer.send(endpoint.to_socket_addrs().map(Iterator::collect));
                let _ = waker.wake();
            });
            asked
        });
        let result = match asked.try_recv() {
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err("the look-up of the name died".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Ok(Ok(addresses)) if addresses.is_empty() => Err("the name has no address".to_owned()),
            Ok(Ok(addresses)) => Ok(addresses[self.turn % addresses.len()]),
        };
        self.asked = None;
        Some(result)
    }
}

impl Session {
    /// Connects where that is due, and gives up what takes too long.
    pub(super) fn keep_links(&mut self, now: Moment) {
        for index in 0..self.slots.len() {
            if let Slot::Naming { .. } = self.slots[index] {
                self.connect_slot(index, now);
            }
            let begun = self.slots[index].begun();
            if begun.is_some_and(|begun| now >= begun.after(self.config.connect_timeout)) {
                let error = self.no_answer();
                match &mut self.slots[index] {
                    // What the link owns comes back by its events; then `link_down` is told.
                    Slot::Linked(connection) => connection.fail(error),
                    _ => self.connect_failed(index, now, error),
                }
            }
        }
        if self.breaker.begin_probe(now, self.config.connect_timeout) {
            self.counters.set_breaker(self.breaker.state());
            self.probe(now);
            return;
        }
        if !self.breaker.is_closed() {
            return;
        }
        let waiting = !self.queues.are_empty()
            || !self.board.owed.is_empty()
            // Who was told to ask less, or nothing, would not learn that this has changed.
            || self.counters.mode.get() != Mode::default();
        let open = self.limits().is_some();
        let under_way = self.slots.iter().any(|slot| slot.begun().is_some());
        if open {
            for index in 0..self.slots.len() {
                if matches!(self.slots[index], Slot::Empty { retry_at } if now >= retry_at) {
                    self.connect_slot(index, now);
                }
            }
        } else if (waiting || self.eager) && !under_way {
            self.connect_any(now);
        }
    }

    /// Tries a node that failed: over its link, or over a new one when that has been silent for
    /// too long.
    fn probe(&mut self, now: Moment) {
        if self.slots.iter().any(|slot| slot.begun().is_some()) {
            return; // a connect is under way already and will tell
        }
        let silent = ClientError::Unreachable(format!(
            "{} has stopped answering; its link was given up",
            self.config.endpoint,
        ));
        let mut asked = false;
        for slot in &mut self.slots {
            let Slot::Linked(connection) = slot else {
                continue;
            };
            if now < connection.heard.after(self.config.connect_timeout) {
                // A link of a node that is only slow is worth keeping: its next word heals all.
                let _ = connection.send(LINK_REQUEST, &Ping {});
                asked = true;
            } else {
                connection.fail(silent.clone());
            }
        }
        if !asked {
            self.drive(now);
            self.connect_any(now);
        }
    }

    fn connect_any(&mut self, now: Moment) {
        if let Some(index) = self
            .slots
            .iter()
            .position(|slot| matches!(slot, Slot::Empty { .. }))
        {
            self.connect_slot(index, now);
        }
    }

    fn connect_slot(&mut self, index: usize, now: Moment) {
        let begun = self.slots[index].begun().unwrap_or(now);
        let address = match self.addresses.get(&self.waker) {
            None => {
                self.slots[index] = Slot::Naming { begun };
                return;
            }
            Some(Err(why)) => {
                let text = format!("cannot find {}: {why}", self.config.endpoint);
                return self.connect_failed(index, now, ClientError::Unreachable(text));
            }
            Some(Ok(address)) => address,
        };
        let mut nonce = [0; 32];
        if let Err(error) = getrandom::fill(&mut nonce) {
            let text = format!("the operating system gives no randomness: {error}");
            return self.connect_failed(index, now, ClientError::Unreachable(text));
        }
        let ClientConfig {
            namespace,
            key,
            name,
            versions,
            ..
        } = &self.config;
        let handshake = ClientHandshake::new(namespace, key.clone(), name, nonce);
        let handshake = handshake.speaking(*versions);
        let token = Token(index);
        match Connection::begin(address, handshake, self.poll.registry(), token, begun) {
            Ok(mut connection) => {
                connection.serial = self.next_number;
                self.next_number += 1;
                self.slots[index] = Slot::Linked(connection);
            }
            Err(error) => {
                let text = format!("cannot connect to {}: {error}", self.config.endpoint);
                self.connect_failed(index, now, ClientError::Unreachable(text));
            }
        }
    }

    /// A link did not come about.
    pub(super) fn connect_failed(&mut self, index: usize, now: Moment, error: ClientError) {
        add(&self.counters.connect_failures, 1);
        self.addresses.turn = self.addresses.turn.wrapping_add(1);
        self.slots[index] = Slot::Empty {
            retry_at: now.after(SECOND_LINK_PAUSE),
        };
        if self.limits().is_none() {
            let for_good = error.is_for_good();
            self.board.last_error = Some(error);
            self.trip(now, for_good);
        }
    }

    /// A call ended by its deadline and the node has not said a word meanwhile.
    pub(super) fn fell_silent(&mut self, now: Moment) {
        if !self.breaker.is_closed() {
            return;
        }
        self.board.last_error = Some(ClientError::Unreachable(format!(
            "{} does not answer: is the node stopped, or the network cut?",
            self.config.endpoint,
        )));
        // Any answer, to this or to what is under way, closes the breaker at once.
        for slot in &mut self.slots {
            if let Slot::Linked(connection) = slot
                && connection.is_open()
            {
                let _ = connection.send(LINK_REQUEST, &Ping {});
            }
        }
        self.trip(now, false);
    }

    pub(super) fn links_timer(&self) -> Option<Moment> {
        let give_up = |slot: &Slot| Some(slot.begun()?.after(self.config.connect_timeout));
        self.slots.iter().filter_map(give_up).min()
    }
}
