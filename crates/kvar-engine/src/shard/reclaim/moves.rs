//! How kept blocks get to the log's head: from memory, or read and verified, a window at a time.
//!
//! What must always be true: bytes that do not pass their check are not written again; a move that
//! cannot be made takes its block out of the index, and is counted as over.

use super::Stage;
use crate::dram::State;
use crate::index::Entry;
use crate::layout::{ImagePlan, RecordHints};
use crate::shard::read::{Brought, MoveRead};
use crate::shard::write::{Source, WriteItem, stored_bytes};
use crate::shard::{Displaced, Pending, Shard, head_crc};
use kvar_base::BlockId;
use kvar_io::{DeviceError, Op};

/// Bytes of kept blocks on their way from device to device at once; two of the largest fit.
const MOVING_BYTES_MAX: u64 = 8 << 20;

impl Shard {
    /// Brings kept blocks to the write queue, a window at a time.
    pub(super) fn start_moves(&mut self) {
        loop {
            let Some(reclaim) = &mut self.reclaim else {
                return;
            };
            if !matches!(reclaim.stage, Stage::Moving) || reclaim.moving_bytes >= MOVING_BYTES_MAX {
                return;
            }
            let Some((id, entry, hints)) = reclaim.kept.pop_front() else {
                return;
            };
            let bytes = stored_bytes(entry.len);
            if self
                .index
                .find(&id)
                .is_none_or(|(_, now)| now.position != entry.position)
            {
                reclaim.left(bytes);
                continue;
            }
            reclaim.moving_bytes += bytes;
            let resident = self
                .dram
                .get(&id)
                .filter(|resident| resident.state == State::Clean);
            if let Some(resident) = resident.cloned() {
                let plan = ImagePlan::new(
                    &resident
                        .sections
                        .iter()
                        .map(|section| (section.len, section.check))
                        .collect::<Vec<_>>(),
                );
                let crc = head_crc(&id, &plan, resident.image.as_slice());
                self.moved.push_back(WriteItem {
                    id,
                    len: plan.bytes as u32,
                    sectioned: plan.is_sectioned(),
                    sections: plan.sections.len() as u16,
                    crc,
                    version: resident.version,
                    hints,
                    image: resident.image,
                    source: Source::Moved {
                        from: entry.position,
                    },
                });
                continue;
            }
            if !self.read_to_move(id, entry, hints, false) {
                self.give_up_move(&id, &entry, &hints);
            }
        }
    }

    /// Reads a block that is to be written again, or offered to the tier below; whether there is memory
    /// for it.
    pub(in crate::shard) fn read_to_move(
        &mut self,
        id: BlockId,
        entry: Entry,
        hints: RecordHints,
        goes_down: bool,
    ) -> bool {
        let place = self.place_of(&entry);
        let (segment, _) = self.segments.locate(entry.position);
        let Some(buffer) = self.allocate_block(entry.len as usize) else {
            return false;
        };
        self.segments.get(segment).readers += 1;
        self.counters.device_read_bytes += stored_bytes(entry.len);
        let read = MoveRead {
            id,
            entry,
            place,
            segment,
            hints,
            goes_down,
            is_again: false,
        };
        let offset = place.offset;
        self.submit(Pending::MoveRead(read), Op::Read { offset, buffer });
        true
    }

    pub(in crate::shard) fn move_read_done(
        &mut self,
        read: MoveRead,
        op: Op,
        result: &Result<(), DeviceError>,
    ) {
        let Op::Read { buffer, offset } = op else {
            unreachable!("a read ends as a read")
        };
        let MoveRead {
            id,
            entry,
            place,
            segment,
            hints,
            goes_down,
            is_again,
        } = read;
        let plan = match self.brought(&id, &entry, &place, &buffer, result, is_again) {
            Brought::Block(plan) => plan,
            Brought::Again => {
                let is_again = true;
                let read = MoveRead { is_again, ..read };
                return self.submit(Pending::MoveRead(read), Op::Read { offset, buffer });
            }
            Brought::Nothing => {
                self.segments.get(segment).readers -= 1;
                if goes_down {
                    return self.read_to_offer(&read, buffer, None);
                }
                return self.give_up_move(&id, &entry, &hints);
            }
        };
        self.segments.get(segment).readers -= 1;
        if goes_down {
            return self.read_to_offer(&read, buffer, Some(&plan));
        }
        let crc = head_crc(&id, &plan, buffer.as_slice());
        let version = kvar_base::check::version(plan.sections.iter().map(|section| section.check));
        self.moved.push_back(WriteItem {
            id,
            len: entry.len,
            sectioned: entry.sectioned,
            sections: plan.sections.len() as u16,
            crc,
            version,
            hints,
            image: buffer.freeze(),
            source: Source::Moved {
                from: entry.position,
            },
        });
    }

    pub(in crate::shard) fn give_up_move(
        &mut self,
        id: &BlockId,
        entry: &Entry,
        hints: &RecordHints,
    ) {
        if let Some(reclaim) = &mut self.reclaim {
            reclaim.moved(stored_bytes(entry.len));
        }
        if self.index.remove_at(id, entry.position) {
            self.note_displaced(id, entry.position, Displaced::Reclaim);
            self.drop_flash_copy(id, entry, hints, State::Held);
        }
    }

    /// The open segment was given up (its device refused a write) and there is no other: what is
    /// kept has nowhere to go, and only letting it go frees the next segment.
    pub(super) fn give_up_moves(&mut self) {
        for item in std::mem::take(&mut self.moved) {
            if let Source::Moved { from } = item.source {
                self.give_up_item(&item, from);
            }
        }
        let Some(reclaim) = &mut self.reclaim else {
            return;
        };
        for (id, entry, hints) in std::mem::take(&mut reclaim.kept) {
            if self.index.remove_at(&id, entry.position) {
                self.note_displaced(&id, entry.position, Displaced::Reclaim);
                self.drop_flash_copy(&id, &entry, &hints, State::Held);
            }
        }
    }

    /// As [`give_up_move`](Self::give_up_move), of a block that is queued.
    pub(in crate::shard) fn give_up_item(&mut self, item: &WriteItem, from: u32) {
        match self.find(&item.id) {
            Some((_, entry)) if entry.position == from => {
                self.give_up_move(&item.id, &entry, &item.hints);
            }
            _ => {
                if let Some(reclaim) = &mut self.reclaim {
                    reclaim.moved(stored_bytes(item.len));
                }
            }
        }
    }
}
