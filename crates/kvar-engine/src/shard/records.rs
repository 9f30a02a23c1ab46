//! Which records a segment has: of its footer, or where that is not whole, of its directory pages.
//!
//! What must always be true: a page counts only if it is of this segment and of its present
//! generation; a footer counts as a whole or not at all, directory pages each by itself.

use crate::layout::{PAGE, PageKind, Record, Superblock, decode_page};
use crate::mutation::{Check, is_disabled};

/// Whether a page is of this segment and of its present generation.
fn is_wanted(found: (u32, u32), wanted: (u32, u32)) -> bool {
    found.0 == wanted.0 && (found.1 == wanted.1 || is_disabled(Check::Generation))
}

/// The records of a footer, if it is whole.
pub(crate) fn footer_records(
    pages: &[u8],
    superblock: &Superblock,
    offset: u64,
    wanted: (u32, u32),
) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    let mut count = 1;
    for (number, page) in pages.chunks_exact(PAGE).enumerate() {
        if number >= count {
            return Some(records);
        }
        let (head, found) = decode_page(page, superblock, offset + (number * PAGE) as u64)?;
        let mine = head.kind == PageKind::Footer
            && is_wanted((head.segment, head.generation), wanted)
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
    wanted: (u32, u32),
) -> Vec<Record> {
    pages
        .chunks_exact(PAGE)
        .enumerate()
        .filter_map(|(number, page)| decode_page(page, superblock, offset + (number * PAGE) as u64))
        .filter(|(head, _)| {
            head.kind == PageKind::Directory && is_wanted((head.segment, head.generation), wanted)
        })
        .flat_map(|(_, records)| records)
        .collect()
}
