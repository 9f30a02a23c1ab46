//! The simulated disk, and the devices that shards open over it.
//!
//! ```text
//!   queued ──kick──> under way ──due──> executed (faults strike here) ──> Completion
//!      │                 │  └─ Stuck ─> stuck ──release──> executed
//!      └────── crash: gone, with whatever part of the writes under way arrived
//! ```

use super::faults::{Fault, FaultKind, FaultOn, FaultRates, FaultStruck};
use super::image::{Image, pick_bits};
use super::log::{Survival, Survived, Write, WriteLog, survive};
use super::state::{Stage, State, UnderWay};
use crate::{Completion, Device, DeviceError, Op};
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How a simulated disk behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    /// Decides order, delay and faults.
    pub seed: u64,
    /// Most polls that an operation takes, at least one. The default of 4 reorders well within the
    /// depths that tests use.
    pub polls_max: u32,
    /// Faults by seed; none by default.
    pub rates: FaultRates,
    /// Whether writes and flushes are kept for [`SimDisk::log`], which holds every page written.
    pub log: bool,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            polls_max: 4,
            rates: FaultRates::default(),
            log: false,
        }
    }
}

/// What went over the disk so far; refused operations do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimCounters {
    /// Reads completed.
    pub reads: u64,
    /// Bytes of these.
    pub read_bytes: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes of these.
    pub write_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards completed.
    pub discards: u64,
}

/// A handle to a simulated disk: for the test, beside the devices. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    /// A disk of `bytes` zeros.
    #[must_use]
    pub fn new(bytes: u64, options: SimOptions) -> Self {
        Self::with_image(Image::new(bytes), options)
    }

    /// A disk with this content, all of it durable.
    #[must_use]
    pub fn with_image(image: Image, options: SimOptions) -> Self {
        Self(Arc::new(Mutex::new(State::new(image, options))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens one more device over this disk.
    #[must_use]
    pub fn open(&self) -> SimDevice {
        let mut state = self.state();
        state.devices += 1;
        SimDevice {
            disk: self.clone(),
            number: state.devices,
        }
    }

    /// Lays a fault in wait. Of several that meet an operation, the oldest strikes.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Takes back every fault that was laid in wait; those by seed stay.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// Operations that are stuck.
    #[must_use]
    pub fn stuck(&self) -> usize {
        self.state()
            .under_way
            .iter()
            .filter(|op| op.stage == Stage::Stuck)
            .count()
    }

    /// Lets stuck operations go on.
    pub fn release_stuck(&self) {
        for op in &mut self.state().under_way {
            if op.stage == Stage::Stuck {
                op.stage = Stage::Released;
            }
        }
    }

    /// Turns bits of the stored bytes over: decay of the medium.
    pub fn corrupt(&self, bytes: Range<u64>, bits: u32) {
        let mut state = self.state();
        let bytes = bytes.start..bytes.end.min(state.current.bytes());
        let picked = pick_bits(&bytes, bits, &mut state.random);
        for bit in picked {
            state.current.flip_bit(bit);
            state.durable.flip_bit(bit);
        }
        let kind = FaultKind::FlipBits(bits);
        state.struck.push(FaultStruck {
            kind,
            on: FaultOn::Write,
            bytes,
            instead: None,
        });
    }

    /// Cuts the power (or kills the process): what is under way is gone, and of what was not
    /// flushed there is what `how` says. Devices and handle go on with the image that is left.
    pub fn crash(&self, how: Survival) -> Image {
        let mut state = self.state();
        let mut gone = std::mem::take(&mut state.under_way);
        gone.sort_by_key(|op| op.number);
        let in_flight: Vec<Write> = gone.iter_mut().filter_map(|op| op.write.take()).collect();
        let (image, survived) = survive(&state.durable, &state.unflushed, &in_flight, how);
        state.survived.add(&survived);
        state.unflushed.clear();
        (state.stored, state.flushed) = (0, 0);
        (state.current, state.durable) = (image.clone(), image.clone());
        if state.log.is_some() {
            state.log = Some(WriteLog::new(image.clone()));
        }
        image
    }

    /// Kills the process and leaves the drive its power: what is under way arrives whole, in part
    /// or not at all, and a later power cut may still take what is not flushed. The devices that
    /// were open have nothing under way any more.
    pub fn kill(&self) {
        self.state().kill();
    }

    /// Changes how often faults come by seed.
    pub fn set_rates(&self, rates: FaultRates) {
        self.state().options.rates = rates;
    }

    /// Changes how many polls an operation takes at most.
    pub fn set_polls_max(&self, polls_max: u32) {
        self.state().options.polls_max = polls_max;
    }

    /// What reads see now.
    #[must_use]
    pub fn image(&self) -> Image {
        self.state().current.clone()
    }

    /// Writes and flushes since the start or the last crash; empty unless asked for by the options.
    #[must_use]
    pub fn log(&self) -> WriteLog {
        let state = self.state();
        state
            .log
            .clone()
            .unwrap_or_else(|| WriteLog::new(state.durable.clone()))
    }

    /// Events in the log so far: the point to remember when something was acknowledged.
    #[must_use]
    pub fn log_len(&self) -> usize {
        self.state().log.as_ref().map_or(0, WriteLog::len)
    }

    /// Faults that have struck, in order.
    #[must_use]
    pub fn struck(&self) -> Vec<FaultStruck> {
        self.state().struck.clone()
    }

    /// Faults that have struck since there were so many of them.
    #[must_use]
    pub fn struck_since(&self, known: usize) -> Vec<FaultStruck> {
        self.state()
            .struck
            .get(known..)
            .unwrap_or_default()
            .to_vec()
    }

    /// What became, in crashes so far, of writes that were not flushed.
    #[must_use]
    pub fn survived(&self) -> Survived {
        self.state().survived
    }

    /// What went over the disk.
    #[must_use]
    pub fn counters(&self) -> SimCounters {
        self.state().counters
    }
}

/// A [`Device`] over a [`SimDisk`].
#[derive(Debug)]
pub struct SimDevice {
    disk: SimDisk,
    number: u64,
}

impl SimDevice {
    /// The disk behind it.
    #[must_use]
    pub fn disk(&self) -> &SimDisk {
        &self.disk
    }
}

impl Device for SimDevice {
    fn bytes(&self) -> u64 {
        self.disk.state().current.bytes()
    }

    fn submit(&mut self, token: u64, op: Op) {
        let mut state = self.disk.state();
        state.numbers += 1;
        let (number, covers) = (state.numbers, state.stored);
        let (device, stage) = (self.number, Stage::Queued);
        state.under_way.push(UnderWay {
            device,
            number,
            token,
            op,
            stage,
            write: None,
            covers,
        });
    }

    fn kick(&mut self) -> Result<(), DeviceError> {
        self.disk.state().kick(self.number);
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) {
        self.disk.state().poll(self.number, out);
    }

    fn wait(&mut self, _timeout: Duration) {
        let mut state = self.disk.state();
        state.kick(self.number);
        let own = state.under_way.iter().filter(|op| op.device == self.number);
        let next = own.filter_map(|op| {
            if let Stage::Due(due) = op.stage {
                Some(due)
            } else {
                None
            }
        });
        // The next poll counts one itself.
        let now = next
            .min()
            .map_or(state.polls, |due| state.polls.max(due.saturating_sub(1)));
        state.polls = now;
    }

    fn readiness(&self) -> Option<RawFd> {
        None
    }

    fn in_flight(&self) -> usize {
        self.disk
            .state()
            .under_way
            .iter()
            .filter(|op| op.device == self.number)
            .count()
    }

    fn engine(&self) -> &'static str {
        "sim"
    }
}

impl Drop for SimDevice {
    fn drop(&mut self) {
        let mut over = Vec::new();
        let mut moving = true;
        while moving {
            self.wait(Duration::MAX);
            self.poll(&mut over);
            let state = self.disk.state();
            let own = state.under_way.iter().filter(|op| op.device == self.number);
            moving = own.filter(|op| op.stage != Stage::Stuck).count() > 0;
        }
        // What is stuck now stays without effect.
        self.disk
            .state()
            .under_way
            .retain(|op| op.device != self.number);
    }
}
