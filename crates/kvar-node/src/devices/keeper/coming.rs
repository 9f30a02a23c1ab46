//! How a device comes in: its engines are opened and load, one that is stale is emptied, and then
//! blocks are routed to it.
//!
//! ```text
//!   Loading(n) ── all have ──> Online, routed
//!       │  stale: Emptying(n) ── all have, and the table says so ──> Online, routed
//!       └── one cannot: taken out; the only one at start: the node cannot go on
//! ```

use super::{Fatal, Keeper, Live, Stage};
use crate::config::{DRAM_BYTES_MIN, DeviceTier, WriteRate};
use crate::devices::view::Phase;
use crate::devices::watch::{Run, Watch};
use crate::loading::{LoadFailed, OpenShard, Progress};
use crate::mail::{Answer, Ask, EngineKey, KEEPER, Mail, Origin};
use crate::storage::OpenDevice;
use kvar_base::Clock as _;
use kvar_engine::{EngineConfig, WriteRates, memory_bytes};
use std::sync::Arc;

/// Bytes of a write limit that each shard may save up at least: a few of the largest blocks.
const LIMIT_BURST_BYTES_MIN: u64 = 64 << 20;

impl Keeper {
    pub(super) fn open(&mut self, device: OpenDevice, only: bool) -> &mut Live {
        let OpenDevice {
            path,
            target,
            superblock,
        } = device;
        let number = self.next_device;
        self.next_device += 1;
        let shards = u64::from(superblock.shards);
        let dram_bytes = if only {
            self.config.dram.0 / shards
        } else {
            let entry = self.table.find(superblock.uuid);
            let tier = entry.map_or(DeviceTier::Fast, |entry| entry.tier);
            let share = self.division.of(tier, superblock.device_bytes);
            (share / shards).max(DRAM_BYTES_MIN)
        };
        let each = |rate: WriteRate| {
            let bytes = rate.bytes_per_day(superblock.device_bytes);
            bytes.map(|bytes| bytes / shards)
        };
        let limit = each(self.config.flash_write_limit);
        let writes = WriteRates {
            budget_bytes_per_day: each(self.config.flash_write_budget),
            budget_burst_bytes: superblock.device_bytes / shards,
            limit_bytes_per_day: limit,
            limit_burst_bytes: limit.map_or(0, |limit| (limit / 24).max(LIMIT_BURST_BYTES_MIN)),
        };
        let config = EngineConfig {
            dram_bytes,
            writes,
            flush_after: self.config.flush_after,
            shutdown_flush: self.config.shutdown_flush,
            unix_at_start_s: self.unix_at_start_s,
            scrub_bytes_per_s: self.config.scrub.0,
            discard: self.config.discard,
            handover_wait: self.config.handover_wait,
            shares: self.shares.clone(),
        };
        let one = memory_bytes(&config, &superblock);
        let (mut engines, mut watches) = (Vec::new(), Vec::new());
        for shard in 0..superblock.shards {
            let key = EngineKey {
                thread: shard % self.post.threads(),
                serial: self.next_serial,
            };
            self.next_serial += 1;
            let watch = Arc::new(Watch::default());
            engines.push(key);
            watches.push(watch.clone());
            let open = OpenShard {
                key,
                device: number,
                number: shard,
                target: target.clone(),
                superblock: superblock.clone(),
                config: config.clone(),
                io_engine: self.config.io_engine,
                prefault: self.config.prefault,
                progress: Arc::new(Progress::default()),
                watch,
                keeper: self.sender.clone(),
                hook: self.hook.clone(),
            };
            self.post.send(key.thread, Mail::Open(Box::new(open)));
        }
        self.away.remove(&superblock.uuid.to_string());
        self.lives.push(Live {
            number,
            uuid: superblock.uuid,
            path,
            target,
            stage: Stage::Loading(engines.len()),
            memory_bytes: shards * one,
            superblock,
            engines,
            watches,
            is_routed: false,
            runs: [Run::default(); 2],
            is_probed: false,
            is_refusing: false,
            is_stream_refused: false,
            is_hopeless: false,
            trouble: None,
            reply: None,
            replaces: None,
            online_since: None,
            leaving: None,
        });
        let last = self.lives.len() - 1;
        &mut self.lives[last]
    }

    pub(super) fn on_loaded(&mut self, key: EngineKey, result: Result<(), LoadFailed>) {
        let Some(at) = self.position(key) else { return };
        let Stage::Loading(left) = self.lives[at].stage else {
            return;
        };
        if let Err(failure) = result {
            return self.on_load_failed(at, key, failure);
        }
        self.lives[at].stage = Stage::Loading(left - 1);
        if left > 1 {
            return self.publish_view();
        }
        if !self.is_stale(self.lives[at].uuid) {
            return self.come_online(at);
        }
        let live = &mut self.lives[at];
        tracing::warn!(
            uuid = %live.uuid,
            path = %live.path.display(),
            "blocks were removed while this device was away: it begins empty"
        );
        live.stage = Stage::Emptying(live.engines.len());
        for engine in &live.engines {
            let origin = Origin {
                thread: KEEPER,
                operation: u64::from(live.number),
            };
            self.post
                .send(engine.thread, Mail::Ask(origin, *engine, Ask::Purge(None)));
        }
    }

    pub(super) fn on_answered(&mut self, number: u64, answer: &Answer) {
        let found = self
            .lives
            .iter()
            .position(|it| u64::from(it.number) == number);
        let Some(at) = found else { return };
        let Stage::Emptying(left) = self.lives[at].stage else {
            return self.on_flushed(at);
        };
        match answer {
            Answer::Done(Ok(_)) => {}
            Answer::Done(Err(text)) => {
                let text = format!("it cannot be emptied: {text}");
                return self.take_out(at, "failed", &text);
            }
            _ => return,
        }
        self.lives[at].stage = Stage::Emptying(left - 1);
        if left > 1 {
            return;
        }
        let uuid = self.lives[at].uuid;
        if let Some(entry) = self.table.find_mut(uuid) {
            entry.stale = false;
        }
        match self.save() {
            Ok(()) => self.come_online(at),
            Err(text) => self.take_out(at, "failed", &text),
        }
    }

    fn come_online(&mut self, at: usize) {
        let now = self.clock.now();
        let live = &mut self.lives[at];
        live.online_since = Some(now);
        live.stage = Stage::Online;
        live.is_routed = true;
        let (uuid, replaces, reply) = (live.uuid, live.replaces.take(), live.reply.take());
        tracing::info!(%uuid, path = %live.path.display(), "device online");
        if let Some(old) = replaces {
            let mut table = self.table.clone();
            let slot = table.retire(old);
            if let (Some(slot), Some(entry)) = (slot, table.find_mut(uuid)) {
                entry.slot = Some(slot);
            }
            self.table = table;
            if let Err(text) = self.save() {
                // Still in force: what the table says on disk is the new device beside the old one.
                tracing::error!("{text}");
            }
            self.away.remove(&old.to_string());
            if let Some(old) = self.lives.iter().position(|it| it.uuid == old) {
                self.close(old);
            }
        }
        self.publish();
        if let Some(reply) = reply {
            let view = self
                .view_of(uuid)
                .ok_or_else(|| "it is gone again".to_owned());
            let _ = reply.send(view);
        }
        self.resume_leaving();
        self.say_started();
    }

    fn on_load_failed(&mut self, at: usize, key: EngineKey, failure: LoadFailed) {
        let live = &self.lives[at];
        let shard = live.engines.iter().position(|it| *it == key).unwrap_or(0) as u32;
        let others = self.lives.iter().filter(|it| it.is_routed).count();
        let is_alone = others <= usize::from(live.is_routed);
        if let (LoadFailed::Cancelled, _) | (_, true) = (&failure, is_alone)
            && let Some(started) = self.started.take()
        {
            let path = live.path.clone();
            let _ = started.send(Err(Fatal {
                shard,
                path,
                failure,
            }));
            return;
        }
        let text = format!("shard {shard} cannot be loaded: {failure}");
        self.take_out(at, "failed", &text);
        self.say_started();
    }

    /// Once nothing of what was there at start is being loaded any more.
    pub(super) fn say_started(&mut self) {
        let is_loading = |it: &Live| matches!(it.stage, Stage::Loading(_) | Stage::Emptying(_));
        if self.lives.iter().any(is_loading) {
            return;
        }
        if let Some(started) = self.started.take() {
            self.views.change(|view| view.phase = Phase::Serving);
            let _ = started.send(Ok(()));
        }
    }
}
