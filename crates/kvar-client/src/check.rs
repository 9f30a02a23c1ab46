//! Content checks of bytes in pieces: pieces need not be cut where sections are.

use kvar_base::{BlockId, ContentCheck, Crc64};

/// Fed pieces in order, gives a check for each section.
pub(crate) struct SectionChecks<'a> {
    id: &'a BlockId,
    first_section: u16,
    lengths: &'a [u32],
    left: usize,
    crc: Crc64,
    checks: Vec<ContentCheck>,
}

impl<'a> SectionChecks<'a> {
    pub(crate) fn new(id: &'a BlockId, first_section: u16, lengths: &'a [u32]) -> Self {
        let left = lengths.first().map_or(0, |len| *len as usize);
        let checks = Vec::with_capacity(lengths.len());
        Self {
            id,
            first_section,
            lengths,
            left,
            crc: Crc64::default(),
            checks,
        }
    }

    pub(crate) fn feed(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() && self.checks.len() < self.lengths.len() {
            let (now, later) = piece.split_at(piece.len().min(self.left));
            self.crc.update(now);
            self.left -= now.len();
            piece = later;
            if self.left == 0 {
                self.close_section();
            }
        }
    }

    fn close_section(&mut self) {
        let number = self.checks.len();
        let crc = std::mem::take(&mut self.crc).finish();
        let section = self.first_section + number as u16;
        self.checks.push(ContentCheck::from_crc(
            crc,
            self.id,
            section,
            self.lengths[number],
        ));
        self.left = self.lengths.get(number + 1).map_or(0, |len| *len as usize);
    }

    /// The checks, one a section; fewer if bytes were missing.
    pub(crate) fn finish(mut self) -> Vec<ContentCheck> {
        // Sections of no bytes at the end are never closed by a byte.
        while self.checks.len() < self.lengths.len() && self.left == 0 {
            self.close_section();
        }
        self.checks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_cut_gives_the_checks_of_whole_sections(
            sections in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 1..8),
            cuts in prop::collection::vec(0_usize..30, 0..20),
            first in 0_u16..900,
        ) {
            let id = BlockId::new([3; 32]);
            let lengths: Vec<u32> = sections.iter().map(|bytes| bytes.len() as u32).collect();
            let whole = sections.concat();
            let mut checks = SectionChecks::new(&id, first, &lengths);
            let mut left = &whole[..];
            for cut in cuts {
                let (piece, rest) = left.split_at(cut.min(left.len()));
                checks.feed(piece);
                left = rest;
            }
            checks.feed(left);
            let expected: Vec<ContentCheck> = sections
                .iter()
                .enumerate()
                .map(|(n, bytes)| ContentCheck::of(bytes, &id, first + n as u16))
                .collect();
            prop_assert_eq!(checks.finish(), expected);
        }
    }

    #[test]
    fn missing_bytes_give_fewer_checks() {
        let id = BlockId::new([3; 32]);
        let mut checks = SectionChecks::new(&id, 0, &[2, 2]);
        checks.feed(b"abc");
        assert_eq!(checks.finish().len(), 1);
    }
}
