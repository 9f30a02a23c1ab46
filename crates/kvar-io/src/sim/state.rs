//! What the simulated disk does with an operation: takes it at the kick, executes it when it is due.

use super::disk::{SimCounters, SimOptions};
use super::faults::{Fault, FaultKind, FaultOn, FaultStruck, LATE_POLLS_MAX};
use super::image::{Image, PAGE, Page, pick_bits};
use super::log::{Content, Event, Survived, Write, WriteLog};
use super::random::Random;
use crate::check::{check_op, op_len, short};
use crate::{Completion, DeviceError, Op};
use kvar_base::PAGE_BYTES;
use std::ops::Range;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct State {
    pub(super) options: SimOptions,
    pub(super) random: Random,
    pub(super) current: Image,
    pub(super) durable: Image,
    /// Stored and not durable yet, in order of completion.
    pub(super) unflushed: Vec<Write>,
    /// Writes stored since the start, and how many of them are durable.
    pub(super) stored: u64,
    pub(super) flushed: u64,
    pub(super) under_way: Vec<UnderWay>,
    pub(super) polls: u64,
    pub(super) devices: u64,
    pub(super) numbers: u64,
    pub(super) faults: Vec<Fault>,
    pub(super) struck: Vec<FaultStruck>,
    pub(super) log: Option<WriteLog>,
    pub(super) counters: SimCounters,
    pub(super) survived: Survived,
}

#[derive(Debug)]
pub(super) struct UnderWay {
    pub(super) device: u64,
    pub(super) number: u64,
    pub(super) token: u64,
    pub(super) op: Op,
    pub(super) stage: Stage,
    /// The bytes of a write (or discard) as the disk took them at the kick.
    pub(super) write: Option<Write>,
    /// For a flush: how many writes were stored when it was submitted.
    pub(super) covers: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Queued,
    Due(u64),
    Stuck,
    /// Was stuck once; faults leave it alone now.
    Released,
}

impl State {
    pub(super) fn new(image: Image, options: SimOptions) -> Self {
        Self {
            random: Random::new(options.seed),
            durable: image.clone(),
            log: options.log.then(|| WriteLog::new(image.clone())),
            current: image,
            options,
            unflushed: Vec::new(),
            stored: 0,
            flushed: 0,
            under_way: Vec::new(),
            polls: 0,
            devices: 0,
            numbers: 0,
            faults: Vec::new(),
            struck: Vec::new(),
            counters: SimCounters::default(),
            survived: Survived::default(),
        }
    }

    /// The process is gone: of what the disk had taken, any part is still done.
    pub(super) fn kill(&mut self) {
        let mut gone = std::mem::take(&mut self.under_way);
        self.random.shuffle(&mut gone);
        for mut op in gone {
            let Some(mut write) = op.write.take() else {
                continue;
            };
            match self.random.below(3) {
                0 => self.store(op.number, None),
                1 => self.store(op.number, Some(write)),
                _ => {
                    self.tear(&mut write);
                    self.store(op.number, Some(write));
                }
            }
        }
    }

    /// Makes a write one that arrived in part.
    fn tear(&mut self, write: &mut Write) {
        let mut torn = self.current.clone();
        let bytes = write.bytes();
        write.apply_torn(&mut torn, &mut self.random);
        let pages = bytes.start / PAGE_BYTES..bytes.end / PAGE_BYTES;
        let zero = Arc::new([0; PAGE]);
        let pages = pages.map(|page| Arc::clone(torn.page(page).unwrap_or(&zero)));
        write.content = Content::Pages(pages.collect());
    }

    pub(super) fn kick(&mut self, device: u64) {
        let queued = |op: &UnderWay| op.device == device && op.stage == Stage::Queued;
        for at in 0..self.under_way.len() {
            if !queued(&self.under_way[at]) {
                continue;
            }
            let mut delay = 1 + self.random.below(u64::from(self.options.polls_max.max(1)));
            let late_ppm = u64::from(self.options.rates.late_ppm);
            if late_ppm > 0 && self.random.below(1_000_000) < late_ppm {
                delay += self.random.below(LATE_POLLS_MAX);
                if let Some((on, bytes)) = aim(&self.under_way[at].op) {
                    self.struck.push(FaultStruck {
                        kind: FaultKind::Late,
                        on,
                        bytes,
                        instead: None,
                    });
                }
            }
            let op = &mut self.under_way[at];
            op.stage = Stage::Due(self.polls + delay);
            op.write = if check_op(&op.op, self.current.bytes()).is_ok() {
                taken(&op.op)
            } else {
                None
            };
            if let (Some(log), Some(write)) = (&mut self.log, &op.write) {
                log.push(Event::Submitted {
                    number: op.number,
                    write: write.clone(),
                });
            }
        }
    }

    pub(super) fn poll(&mut self, device: u64, out: &mut Vec<Completion>) {
        self.polls += 1;
        let polls = self.polls;
        let is_due = |op: &UnderWay| {
            let due = matches!(op.stage, Stage::Due(due) if due <= polls);
            op.device == device && (due || op.stage == Stage::Released)
        };
        let mut due: Vec<UnderWay> = self.under_way.extract_if(.., |op| is_due(op)).collect();
        self.random.shuffle(&mut due);
        for mut op in due {
            let fault = self.fault(&op);
            if fault == Some(FaultKind::Stuck) {
                op.stage = Stage::Stuck;
                self.under_way.push(op);
                continue;
            }
            let result = self.execute(&mut op, fault);
            out.push(Completion {
                token: op.token,
                op: op.op,
                result,
            });
        }
    }

    /// The fault that strikes this operation: one laid in wait, or one by seed.
    fn fault(&mut self, op: &UnderWay) -> Option<FaultKind> {
        if op.stage == Stage::Released || check_op(&op.op, self.current.bytes()).is_err() {
            return None;
        }
        let (on, bytes) = aim(&op.op)?;
        let kind = match self.faults.iter().position(|fault| fault.meets(on, &bytes)) {
            Some(at) => {
                let fault = &mut self.faults[at];
                let kind = fault.kind;
                fault.times = fault.times.map(|times| times.saturating_sub(1));
                if fault.times == Some(0) {
                    self.faults.remove(at);
                }
                kind
            }
            None => self.options.rates.roll(on, &mut self.random)?,
        };
        self.struck.push(FaultStruck {
            kind,
            on,
            bytes,
            instead: None,
        });
        Some(kind)
    }

    fn execute(&mut self, op: &mut UnderWay, fault: Option<FaultKind>) -> Result<(), DeviceError> {
        check_op(&op.op, self.current.bytes())?;
        let len = op_len(&op.op);
        match &mut op.op {
            Op::Read { offset, buffer } => {
                let from = match fault {
                    Some(FaultKind::Misdirect) => self.elsewhere(*offset, len),
                    _ => *offset,
                };
                self.current.read(from, buffer.padded_mut());
                match fault {
                    Some(FaultKind::Error) => return Err(broken()),
                    Some(FaultKind::Short) => return Err(self.shortened(len)),
                    Some(FaultKind::FlipBits(bits)) => {
                        for bit in pick_bits(&(0..len), bits, &mut self.random) {
                            buffer.padded_mut()[(bit / 8) as usize] ^= 1 << (bit % 8);
                        }
                    }
                    _ => {}
                }
                self.counters.reads += 1;
                self.counters.read_bytes += len;
            }
            Op::Write { .. } => {
                let write = op.write.take().ok_or_else(broken)?;
                self.execute_write(op.number, write, fault)?;
                self.counters.writes += 1;
                self.counters.write_bytes += len;
            }
            Op::Flush => {
                match fault {
                    Some(FaultKind::Error) => return Err(broken()),
                    Some(FaultKind::Lost) => {}
                    _ => self.flush(op.covers),
                }
                self.counters.flushes += 1;
            }
            Op::Discard { .. } => {
                // Content after a discard is undefined: here the old bytes, or zeros.
                let zeros = op.write.take().filter(|_| self.random.coin());
                self.store(op.number, zeros);
                self.counters.discards += 1;
            }
        }
        Ok(())
    }

    fn execute_write(
        &mut self,
        number: u64,
        mut write: Write,
        fault: Option<FaultKind>,
    ) -> Result<(), DeviceError> {
        let bytes = write.bytes();
        let len = bytes.end - bytes.start;
        let mut result = Ok(());
        match fault {
            Some(FaultKind::Misdirect) => write.offset = self.elsewhere(write.offset, len),
            Some(FaultKind::FlipBits(bits)) => {
                for bit in pick_bits(&(0..len), bits, &mut self.random) {
                    if let Content::Pages(pages) = &mut write.content {
                        let byte = (bit / 8) as usize;
                        Arc::make_mut(&mut pages[byte / PAGE])[byte % PAGE] ^= 1 << (bit % 8);
                    }
                }
            }
            Some(FaultKind::Lost) => {
                self.store(number, None);
                return Ok(());
            }
            Some(FaultKind::NoSpace) => {
                self.store(number, None);
                return Err(DeviceError::NoSpace);
            }
            Some(FaultKind::Error | FaultKind::Short) => {
                result = Err(if fault == Some(FaultKind::Error) {
                    broken()
                } else {
                    self.shortened(len)
                });
                self.tear(&mut write);
            }
            _ => {}
        }
        self.store(number, Some(write));
        result
    }

    /// Makes a write visible to reads; durable comes with a flush.
    fn store(&mut self, number: u64, write: Option<Write>) {
        if let Some(log) = &mut self.log {
            log.push(Event::Completed {
                number,
                stored: write.clone(),
            });
        }
        if let Some(write) = write {
            write.apply(&mut self.current);
            self.unflushed.push(write);
            self.stored += 1;
        }
    }

    fn flush(&mut self, covers: u64) {
        let count = covers.saturating_sub(self.flushed) as usize;
        for write in self.unflushed.drain(..count.min(self.unflushed.len())) {
            write.apply(&mut self.durable);
        }
        self.flushed = self.flushed.max(covers);
        if let Some(log) = &mut self.log {
            log.push(Event::Flushed { covers });
        }
    }

    /// Another place of the same length, and a note of it beside the fault.
    fn elsewhere(&mut self, offset: u64, len: u64) -> u64 {
        let places = (self.current.bytes() - len) / PAGE_BYTES;
        let mut place = self.random.below(places) * PAGE_BYTES;
        if place >= offset && places > 0 {
            place += PAGE_BYTES;
        }
        if let Some(struck) = self.struck.last_mut() {
            struck.instead = Some(place..place + len);
        }
        place
    }

    fn shortened(&mut self, len: u64) -> DeviceError {
        short(self.random.below(len), len)
    }
}

/// What a fault of an operation is on, and at which bytes; a discard meets none.
fn aim(op: &Op) -> Option<(FaultOn, Range<u64>)> {
    match op {
        Op::Read { offset, .. } => Some((FaultOn::Read, *offset..*offset + op_len(op))),
        Op::Write { offset, .. } => Some((FaultOn::Write, *offset..*offset + op_len(op))),
        Op::Flush => Some((FaultOn::Flush, 0..0)),
        Op::Discard { .. } => None,
    }
}

/// The bytes of a write as the disk takes them.
fn taken(op: &Op) -> Option<Write> {
    match op {
        Op::Write {
            offset, buffers, ..
        } => {
            let pages: Vec<Arc<Page>> = buffers
                .iter()
                .flat_map(|buffer| buffer.padded().as_chunks::<PAGE>().0)
                .map(|page| Arc::new(*page))
                .collect();
            Some(Write {
                offset: *offset,
                content: Content::Pages(pages),
            })
        }
        Op::Discard { offset, len } => Some(Write {
            offset: *offset,
            content: Content::Zeros(len / PAGE_BYTES),
        }),
        _ => None,
    }
}

fn broken() -> DeviceError {
    DeviceError::Io {
        code: Some(libc::EIO),
        message: "input/output error (simulated)".to_owned(),
    }
}
