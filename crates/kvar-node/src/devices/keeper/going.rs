//! A device goes: because it failed, because it could not be loaded, because somebody said so.
//!
//! ```text
//!   a run of failures ── reads: probe, twice ── no answer ──┐
//!                     └─ writes ────────────────────────────┴─> fence ──> routes around ──> close
//! ```
//!
//! What must always be true: routes that lead around an engine are in every mailbox before its close is; the
//! last device in service stays.

use super::{Event, Keeper, PROBE_AGAIN, Stage};
use crate::devices::watch::{Kind, Verdict};
use crate::mail::{EngineKey, Mail};
use crate::storage::is_alive;
use kvar_base::Clock as _;

impl Keeper {
    pub(super) fn on_failed(&mut self, device: u32, kind: Kind, is_hard: bool, text: &str) {
        let now = self.clock.now();
        let Some(at) = self.lives.iter().position(|it| it.number == device) else {
            return;
        };
        let live = &mut self.lives[at];
        if !matches!(live.stage, Stage::Online) {
            return;
        }
        if kind == Kind::Write && !std::mem::replace(&mut live.is_refusing, true) {
            tracing::warn!(
                uuid = %live.uuid,
                path = %live.path.display(),
                "the device takes no writes: {text}; blocks stay in memory, and it is tried again"
            );
        }
        if !is_hard {
            return;
        }
        let succeeded = live.watches.iter().map(|watch| watch.succeeded(kind)).sum();
        match live.runs[kind as usize].failed(kind, now, succeeded) {
            Verdict::Wait => {}
            Verdict::Probe => self.probe(at, text),
            Verdict::Fence => self.fence(at, &format!("it takes no writes: {text}")),
        }
    }

    pub(super) fn on_writes_again(&mut self, device: u32) {
        let Some(live) = self.lives.iter_mut().find(|it| it.number == device) else {
            return;
        };
        if std::mem::replace(&mut live.is_refusing, false) {
            let (uuid, path) = (live.uuid, live.path.display());
            tracing::info!(%uuid, %path, "the device takes writes again");
            (live.trouble, live.is_hopeless) = (None, false);
            self.publish_view();
        }
    }

    pub(super) fn on_stream_refused(&mut self, device: u32) {
        let Some(live) = self.lives.iter_mut().find(|it| it.number == device) else {
            return;
        };
        if std::mem::replace(&mut live.is_stream_refused, true) {
            return;
        }
        let (uuid, path) = (live.uuid, live.path.display());
        tracing::warn!(
            %uuid, %path,
            "the device refuses write streams although the kernel reports them: writes go without from now on; \
             nothing is lost, but the drive may have to copy more (see its FDP configuration)"
        );
        self.publish_view();
    }

    /// Asks the device itself, on a thread of its own: a device that hangs must not take the keeper
    /// with it.
    pub(super) fn probe(&mut self, at: usize, text: &str) {
        let live = &mut self.lives[at];
        if std::mem::replace(&mut live.is_probed, true) {
            return;
        }
        tracing::warn!(uuid = %live.uuid, path = %live.path.display(), "device in doubt: {text}");
        live.trouble = Some(text.to_owned());
        let (device, target, uuid) = (live.number, live.target.clone(), live.uuid);
        let sender = self.sender.clone();
        let body = move || {
            let alive = is_alive(&target, uuid) || {
                std::thread::sleep(PROBE_AGAIN);
                is_alive(&target, uuid)
            };
            let _ = sender.send(Event::Probed { device, alive });
        };
        let spawn = std::thread::Builder::new().name("kvar-probe".to_owned());
        if spawn.spawn(body).is_err() {
            self.lives[at].is_probed = false;
        }
    }

    pub(super) fn on_probed(&mut self, device: u32, alive: bool) {
        let Some(at) = self.lives.iter().position(|it| it.number == device) else {
            return;
        };
        let now = self.clock.now();
        let live = &mut self.lives[at];
        live.is_probed = false;
        live.runs[Kind::Read as usize].end(now);
        if alive {
            (live.trouble, live.is_hopeless) = (None, false);
            return;
        }
        let text = live.trouble.clone().unwrap_or_default();
        self.fence(at, &format!("it does not answer: {text}"));
    }

    /// A device is lost.
    pub(super) fn fence(&mut self, at: usize, reason: &str) {
        let live = &mut self.lives[at];
        if !matches!(live.stage, Stage::Online) {
            return;
        }
        live.trouble = Some(reason.to_owned());
        let (uuid, path) = (live.uuid, live.path.display().to_string());
        if self.routed_beside(at) == 0 {
            // Said once; it is tried again and again.
            if !std::mem::replace(&mut self.lives[at].is_hopeless, true) {
                tracing::error!(
                    %uuid, path, reason,
                    "the last device in service fails: memory serves on, nothing is stored for good"
                );
            }
            return self.publish_view();
        }
        self.take_out(at, "failed", reason);
    }

    pub(super) fn routed_beside(&self, at: usize) -> usize {
        let others = self.lives.iter().enumerate();
        others
            .filter(|(other, it)| *other != at && it.is_routed)
            .count()
    }

    /// Devices that blocks can move to: in service, and not about to leave.
    pub(super) fn staying_beside(&self, at: usize) -> usize {
        let others = self.lives.iter().enumerate();
        others
            .filter(|(other, it)| *other != at && it.is_routed && it.leaving.is_none())
            .count()
    }

    /// Takes a device out of service without asking.
    pub(super) fn take_out(&mut self, at: usize, state: &'static str, reason: &str) {
        let live = &mut self.lives[at];
        tracing::error!(
            uuid = %live.uuid,
            path = %live.path.display(),
            reason,
            "device out of service: its blocks are misses"
        );
        let (uuid, reply) = (live.uuid.to_string(), live.reply.take());
        self.away.insert(uuid, (state, reason.to_owned()));
        self.close(at);
        if let Some(reply) = reply {
            let _ = reply.send(Err(reason.to_owned()));
        }
    }

    /// Ends a device's engines. Routes around it must be published at once by the caller, before
    /// any thread takes its mail: the close is behind them in every mailbox.
    pub(super) fn close(&mut self, at: usize) {
        self.close_as(at, false);
    }

    /// As [`close`](Self::close); `has_moved`: its blocks are elsewhere, none are lost.
    pub(super) fn close_as(&mut self, at: usize, has_moved: bool) {
        self.stop_leaving(at);
        self.lives[at].is_routed = false;
        self.publish();
        let live = &mut self.lives[at];
        live.stage = Stage::Closing(live.engines.len());
        for engine in &live.engines {
            self.post
                .send(engine.thread, Mail::Close(*engine, has_moved));
        }
    }

    pub(super) fn on_closed(&mut self, key: EngineKey) {
        let Some(at) = self.position(key) else { return };
        let Stage::Closing(left) = self.lives[at].stage else {
            return;
        };
        self.lives[at].stage = Stage::Closing(left - 1);
        if left > 1 {
            return;
        }
        let mut live = self.lives.remove(at);
        let reply = live.reply.take();
        // Its lock goes with its last descriptor.
        drop(live.target);
        self.publish_view();
        if let Some(reply) = reply {
            let view = self.view_of(live.uuid);
            let _ = reply.send(view.ok_or_else(|| "it is gone".to_owned()));
        }
    }
}
