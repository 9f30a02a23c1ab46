//! What the keeper tells others: routes to the threads, a view to whoever asks how the node is.

use super::{Keeper, Live, Stage};
use crate::devices::table::DeviceState;
use crate::devices::view::DeviceView;
use crate::devices::{Entry, RoutedDevice, Routes};
use crate::mail::{EngineKey, Mail};
use kvar_base::DeviceUuid;
use kvar_io::NoStreams;
use std::sync::Arc;

impl Keeper {
    pub(super) fn position(&self, key: EngineKey) -> Option<usize> {
        self.lives.iter().position(|it| it.engines.contains(&key))
    }

    /// New routes for everybody, and the view.
    pub(super) fn publish(&mut self) {
        self.stay_if_alone();
        let mut devices: Vec<RoutedDevice> = self
            .lives
            .iter()
            .filter(|it| it.is_routed)
            .filter_map(|it| {
                let entry = self.table.find(it.uuid)?;
                let has_left = it
                    .leaving
                    .as_ref()
                    .is_some_and(|leaving| leaving.has_left());
                Some(RoutedDevice {
                    slot: entry.slot?,
                    tier: entry.tier,
                    bytes: if has_left {
                        0
                    } else {
                        it.superblock.device_bytes
                    },
                    engines: it.engines.clone(),
                })
            })
            .collect();
        devices.sort_by_key(|device| device.slot);
        let leaves = self.lives.iter().any(|it| it.leaving.is_some());
        self.afterwards = leaves.then(|| self.routes_afterwards(&devices));
        // What is on its way from one device to another must not outlive its removal.
        let note_removals = leaves
            || self
                .table
                .in_use()
                .any(|entry| !self.is_routed(entry.uuid.0));
        let routes = Arc::new(Routes::new(devices, note_removals, &self.latest));
        self.post.send_all(|| Mail::Routes(routes.clone()));
        let shares = |slot: Option<u32>| slot.map_or(0.0, |slot| routes.share(slot));
        self.show(shares);
    }

    /// The view alone; shares stay as they were.
    pub(super) fn publish_view(&mut self) {
        let before = self.views.latest();
        self.show(|slot| {
            let same = before
                .devices
                .iter()
                .find(|it| it.slot == slot && slot.is_some());
            same.map_or(0.0, |device| device.share)
        });
    }

    pub(super) fn show(&self, share: impl Fn(Option<u32>) -> f64) {
        let devices: Vec<DeviceView> = self
            .table
            .devices
            .iter()
            .map(|entry| self.view_entry(entry, &share))
            .collect();
        let shards = |it: &Live| it.engines.len() as u32;
        let loading = |it: &Live| match it.stage {
            Stage::Loading(left) => left as u32,
            _ => 0,
        };
        let open = || {
            let lives = self.lives.iter();
            lives.filter(|it| !matches!(it.stage, Stage::Closing(_)))
        };
        self.views.change(|view| {
            view.shards = open().map(shards).sum();
            view.shards_loaded = view.shards - open().map(loading).sum::<u32>();
            view.memory_bytes = self.lives.iter().map(|it| it.memory_bytes).sum();
            view.devices = devices;
        });
    }

    pub(super) fn view_entry(
        &self,
        entry: &Entry,
        share: &impl Fn(Option<u32>) -> f64,
    ) -> DeviceView {
        let uuid = entry.uuid.0.to_string();
        let live = self.lives.iter().find(|it| it.uuid == entry.uuid.0);
        let away = self.away.get(&uuid);
        let (state, reason) = match (entry.state, live.map(|it| it.stage), away) {
            (DeviceState::Retired, ..) => ("retired", None),
            (_, _, Some((state, reason))) => (*state, Some(reason.clone())),
            (_, Some(Stage::Loading(_) | Stage::Emptying(_)), _) => ("loading", None),
            (_, Some(Stage::Online), _) if entry.leaving => {
                ("leaving", live.and_then(|it| it.trouble.clone()))
            }
            (_, Some(Stage::Online), _) => ("online", live.and_then(|it| it.trouble.clone())),
            (_, Some(Stage::Closing(_)) | None, _) => ("missing", None),
        };
        let streams = live.map(|it| it.target.write_streams().in_use());
        DeviceView {
            write_streams: streams.and_then(Result::ok).unwrap_or(0),
            write_streams_off: streams.and_then(Result::err).map(NoStreams::text),
            number: live.map(|it| it.number),
            online_since_s: live.and_then(|it| Some(it.online_since?.0 / 1_000_000)),
            slot: entry.slot,
            path: live.map_or_else(|| entry.path.clone(), |it| it.path.clone()),
            bytes: entry.bytes,
            tier: entry.tier,
            state,
            reason,
            share: share(entry.slot),
            stale: entry.stale,
            moved: live.and_then(|it| Some(it.leaving.as_ref()?.moved())),
            uuid,
        }
    }

    pub(super) fn view_of(&self, uuid: DeviceUuid) -> Option<DeviceView> {
        let uuid = uuid.to_string();
        let view = self.views.latest();
        view.devices
            .iter()
            .find(|device| device.uuid == uuid)
            .cloned()
    }
}
