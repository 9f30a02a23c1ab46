//! What an operator asks for: a device comes in, goes, is replaced.
//!
//! What must always be true: an answer is given once it is over, or refused at once with the reason.

use super::{Command, Keeper, NewDevice, Reply, Stage};
use crate::devices::Entry;
use crate::devices::admit::{self, Admitted};
use kvar_base::{Clock as _, DeviceUuid};
use std::path::PathBuf;

impl Keeper {
    pub(super) fn on_command(&mut self, command: Command, reply: Reply) {
        if self.started.is_some() {
            let text = "the node is still loading; try again when it is ready";
            let _ = reply.send(Err(text.to_owned()));
            return;
        }
        match command {
            Command::Add(new) => self.add(&new, None, reply),
            Command::Retire { device, now, rate } => self.retire(&device, now, rate, reply),
            Command::Replace { device, new } => match self.named(&device) {
                Ok(old) => self.add(&new, Some(old), reply),
                Err(text) => drop(reply.send(Err(text))),
            },
        }
    }

    /// The device in use that is meant.
    pub(super) fn named(&self, text: &str) -> Result<DeviceUuid, String> {
        let fits = |entry: &&Entry| {
            entry.slot.is_some_and(|slot| slot.to_string() == text)
                || entry.uuid.0.to_string() == text
                || entry.path.as_os_str() == text
        };
        let found = self.table.in_use().find(fits).map(|entry| entry.uuid.0);
        found.ok_or_else(|| {
            format!("no device {text:?} in use: name a slot, uuid or path of kvar device list")
        })
    }

    pub(super) fn add(&mut self, new: &NewDevice, replaces: Option<DeviceUuid>, reply: Reply) {
        let open: Vec<PathBuf> = self.lives.iter().map(|it| it.path.clone()).collect();
        // A replacement takes over what the old one was for.
        let tier_of = |uuid| self.table.find(uuid).map(|entry: &Entry| entry.tier);
        let new = &NewDevice {
            tier: replaces.map_or(new.tier, tier_of),
            ..new.clone()
        };
        let rules = admit::Rules {
            config: &self.config,
            open: &open,
            shards: self.post.threads(),
            block_bytes_max: self.block_bytes_max,
            created_unix: self.clock.unix_seconds(),
            must_be_new: replaces.is_some(),
        };
        match admit::admit(new, &rules, &mut self.table) {
            Ok(Admitted { device, is_back }) => {
                tracing::info!(
                    uuid = %device.superblock.uuid,
                    path = %device.path.display(),
                    is_back,
                    "taking a device in"
                );
                let live = self.open(device, false);
                live.reply = Some(reply);
                live.replaces = replaces;
                self.publish_view();
            }
            Err(text) => drop(reply.send(Err(text))),
        }
    }

    pub(super) fn retire(&mut self, device: &str, now: bool, rate: Option<u64>, reply: Reply) {
        let uuid = match self.named(device) {
            Ok(uuid) => uuid,
            Err(text) => return drop(reply.send(Err(text))),
        };
        let live = self.lives.iter().position(|it| it.uuid == uuid);
        if live.is_some_and(|at| self.staying_beside(at) == 0) {
            let text = "it is the last device in service that is not leaving: add another first, or \
                        stop the node";
            return drop(reply.send(Err(text.to_owned())));
        }
        // One that is not there, or has nothing yet, has nothing to move.
        if let Some(at) = live.filter(|at| !now && self.lives[*at].stage == Stage::Online) {
            let left = self.leave(at, rate);
            return drop(reply.send(left));
        }
        let before = self.table.clone();
        self.table.retire(uuid);
        if let Err(text) = self.save() {
            self.table = before;
            return drop(reply.send(Err(text)));
        }
        self.away.remove(&uuid.to_string());
        match live {
            // Whoever waited for it to come in hears that it went.
            Some(at) => {
                if let Some(waiting) = self.lives[at].reply.replace(reply) {
                    let _ = waiting.send(Err("it was retired meanwhile".to_owned()));
                }
                if !matches!(self.lives[at].stage, Stage::Closing(_)) {
                    self.close(at);
                }
            }
            None => {
                self.publish();
                let view = self.view_of(uuid).ok_or_else(|| "it is gone".to_owned());
                let _ = reply.send(view);
            }
        }
    }
}
