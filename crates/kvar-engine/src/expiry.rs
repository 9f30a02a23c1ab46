//! When blocks on the device expire: a list a segment, beside the index.
//!
//! ```text
//!  record on the device     expiry, seconds since 1970     exact, survives the process
//!  resident in memory       the same                       exact
//!  index entry              nothing: it has no room
//!  here                     segment -> [(page, expiry), ...] in order of pages      8 bytes each
//! ```
//!
//! Only blocks with a time to live stand here, so a store that uses none pays an empty list a
//! segment, and a segment that is written anew drops its list whole. Nothing is ordered by time:
//! whether a block is over is asked when somebody wants it, and when its segment is reclaimed.
//!
//! What must always be true: for every index entry whose record names an expiry, the expiry is
//! here. Recovery reads it from the records again: of the segments it replays, and of those whose
//! state in the checkpoint says that they hold such records.

/// A page of a segment, and when what begins there expires.
type Expiry = (u32, u32);

/// All expiries of a shard's segments.
pub(crate) struct Expiries {
    segments: Vec<Vec<Expiry>>,
    blocks: u64,
}

impl Expiries {
    pub(crate) fn new(segments: usize) -> Self {
        Self {
            segments: vec![Vec::new(); segments],
            blocks: 0,
        }
    }

    /// Notes when the block at a page of a segment expires (0: never, and nothing is noted).
    pub(crate) fn add(&mut self, segment: u32, page: u32, expires_unix_s: u32) {
        if expires_unix_s == 0 {
            return;
        }
        let list = &mut self.segments[segment as usize];
        // Writes complete nearly in order: the place is nearly always the end.
        let at = list.partition_point(|(known, _)| *known < page);
        match list.get_mut(at) {
            Some(known) if known.0 == page => known.1 = expires_unix_s,
            _ => {
                list.insert(at, (page, expires_unix_s));
                self.blocks += 1;
            }
        }
    }

    /// When the block at a page of a segment expires; 0: never.
    pub(crate) fn of(&self, segment: u32, page: u32) -> u32 {
        let list = &self.segments[segment as usize];
        list.binary_search_by_key(&page, |(page, _)| *page)
            .map_or(0, |at| list[at].1)
    }

    /// How many blocks of a segment expire.
    pub(crate) fn count(&self, segment: u32) -> u32 {
        self.segments[segment as usize].len() as u32
    }

    /// A segment takes nothing more: its list keeps no room to grow.
    pub(crate) fn seal(&mut self, segment: u32) {
        self.segments[segment as usize].shrink_to_fit();
    }

    /// A segment begins anew.
    pub(crate) fn clear(&mut self, segment: u32) {
        let gone = std::mem::take(&mut self.segments[segment as usize]);
        self.blocks -= gone.len() as u64;
    }

    /// Blocks on the device that expire, live or not.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Memory of the lists.
    pub(crate) fn bytes(&self) -> u64 {
        let expiries: usize = self.segments.iter().map(Vec::capacity).sum();
        (expiries * size_of::<Expiry>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_found_in_whatever_order_it_came() {
        let mut expiries = Expiries::new(2);
        for page in [9, 3, 27, 18, 9] {
            expiries.add(1, page, 1000 + page);
        }
        expiries.add(1, 40, 0);
        for page in 0..50 {
            let expected = if [3, 9, 18, 27].contains(&page) {
                1000 + page
            } else {
                0
            };
            assert_eq!(expiries.of(1, page), expected, "{page}");
            assert_eq!(expiries.of(0, page), 0);
        }
        assert_eq!((expiries.blocks(), expiries.count(1)), (4, 4));
        expiries.seal(1);
        assert_eq!(expiries.bytes(), 32);
        expiries.clear(1);
        assert_eq!((expiries.blocks(), expiries.of(1, 9)), (0, 0));
    }
}
