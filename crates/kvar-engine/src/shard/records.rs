//! Which records a segment has: of its footer, or where that is not whole, of its directory pages.
//!
//! What must always be true: a page counts only if it was written since this segment was opened
//! last; a footer counts as a whole or not at all, directory pages each by itself.
//!
//! The generation alone does not tell: where the device lost a header, the one before it is found
//! at the next start, and the segment is opened again under the generation that it had. The pages of
//! that life lie there still, and a whole footer among them would hide the directory of this one.
//! The sequence number of the opening is another.

use crate::layout::{PAGE, PageHead, PageKind, Record, Superblock, decode_page};
use crate::mutation::{Check, is_disabled};

/// One opening of a segment: what every page says that was written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    /// The segment's number over all shards.
    pub(crate) segment: u32,
    pub(crate) generation: u32,
    pub(crate) sequence: u64,
}

impl Opening {
    fn has(&self, page: &PageHead) -> bool {
        let is_since = (page.generation, page.opened_sequence) == (self.generation, self.sequence);
        page.segment == self.segment && (is_since || is_disabled(Check::Generation))
    }
}

/// The records of a footer, if it is whole.
pub(crate) fn footer_records(
    pages: &[u8],
    superblock: &Superblock,
    offset: u64,
    opening: &Opening,
) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    let mut count = 1;
    for (number, page) in pages.chunks_exact(PAGE).enumerate() {
        if number >= count {
            return Some(records);
        }
        let (head, found) = decode_page(page, superblock, offset + (number * PAGE) as u64)?;
        let mine = head.kind == PageKind::Footer
            && opening.has(&head)
            && usize::from(head.page_number) == number;
        if !mine {
            return None;
        }
        count = usize::from(head.page_count);
        records.extend(found);
    }
    (!pages.is_empty() && pages.len() / PAGE >= count).then_some(records)
}

/// The records of whatever pages of a directory area are whole.
pub(crate) fn directory_records(
    pages: &[u8],
    superblock: &Superblock,
    offset: u64,
    opening: &Opening,
) -> Vec<Record> {
    pages
        .chunks_exact(PAGE)
        .enumerate()
        .filter_map(|(number, page)| decode_page(page, superblock, offset + (number * PAGE) as u64))
        .filter(|(head, _)| head.kind == PageKind::Directory && opening.has(head))
        .flat_map(|(_, records)| records)
        .collect()
}
