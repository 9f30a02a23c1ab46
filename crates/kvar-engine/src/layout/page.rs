//! Pages of a segment: a head of 64 bytes, then up to 42 records of 96.
//!
//! ```text
//!  header      page 0: a generation has begun; no records
//!  directory   records of blocks in front of or behind it, tombstones, purges
//!  footer      all records of the segment, at the seal
//! ```
//!
//! What must always be true: a page is taken only at the place and on the device it was written
//! for; a record whose fields cannot be true on this device is left out, so that nothing beyond
//! here meets a place outside a segment.
//!
//! Left to others: whether segment and generation are the ones wanted, and what records mean
//! together (`recovery`, `shard`).

use super::superblock::Superblock;
use super::{NUMBERS_END, PAGE, page_fold};
use crate::mutation::{Check, is_disabled};
use kvar_base::check::crc64;
use kvar_base::{BlockId, PAGE_BYTES, SECTIONS_MAX};
use kvar_policy::Tenant;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Records a page of directory or footer holds.
pub const RECORDS_PER_PAGE: usize = 42;
const PAGE_MAGIC: u32 = u32::from_le_bytes(*b"KVPG");

/// What kind of page of a segment this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum PageKind {
    /// First page: this generation has begun.
    Header = 1,
    /// Records of blocks in front of or behind it.
    Directory = 2,
    /// All records, at the seal.
    Footer = 3,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPageHead {
    magic: U32,
    kind: U16,
    records: U16,
    check: U64,
    uuid: [u8; 16],
    segment: U32,
    generation: U32,
    page_number: U16,
    page_count: U16,
    used_pages: U32,
    opened_sequence: U64,
    reserved: U64,
}

const PAGE_HEAD: usize = size_of::<RawPageHead>();
const _: () = assert!(PAGE_HEAD == 64);
const _: () = assert!(size_of::<Record>() == 96);
const _: () = assert!(PAGE_HEAD + RECORDS_PER_PAGE * size_of::<Record>() == PAGE);

/// Block.
pub const RECORD_BLOCK: u8 = 1;
/// Tombstone of a remove.
pub const RECORD_TOMBSTONE: u8 = 2;
/// Everything recorded before is gone, whosever it was.
pub const RECORD_PURGE: u8 = 3;
/// Everything recorded before of one tenant is gone.
pub const RECORD_TENANT_PURGE: u8 = 4;
/// Flag: the stored bytes begin with a section directory.
pub const FLAG_SECTIONED: u8 = 1;
/// Hint flag: written to be read once, soon, by another engine.
const HINT_HANDOVER: u8 = 1;

/// What a writer said of a block that stays with it wherever it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordHints {
    /// Depth in the chain.
    pub depth: u32,
    /// When it expires, in seconds since 1970; 0 never.
    pub expires_unix_s: u32,
    /// The writer's number for what kind of traffic it is; 0 not said.
    pub class: u8,
    /// Written to be read once, soon, by another engine.
    pub handover: bool,
    /// What computing it again costs, in microseconds; 0 not known.
    pub recompute_us: u32,
    /// Whose it is.
    pub tenant: Tenant,
}

/// What is stored about one block, tombstone or purge.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Record {
    id: [u8; 32],
    sequence: U64,
    /// Check of the stored head; see [`kvar_base::check`].
    pub check64: U64,
    /// Version of the copy.
    pub version: U64,
    /// Pages from the start of the segment.
    pub place: U32,
    /// Exact bytes (one section) or whole pages (several).
    pub len: U32,
    /// One of `RECORD_*`.
    pub kind: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// Number of sections.
    pub sections: U16,
    expires_unix_s: U32,
    tenant: U32,
    depth: U32,
    class: u8,
    hint_flags: u8,
    reserved_short: [u8; 2],
    recompute_us: U32,
    reserved: [u8; 8],
}

impl Record {
    /// A record of a kind with no place.
    #[must_use]
    pub fn bare(kind: u8, id: &BlockId, sequence: u64) -> Self {
        let mut record = Self::new_zeroed();
        record.kind = kind;
        record.id = *id.as_bytes();
        record.sequence = sequence.into();
        record
    }

    /// The block it speaks of.
    #[must_use]
    pub fn id(&self) -> BlockId {
        BlockId::new(self.id)
    }

    /// Its place in the order of everything.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence.get()
    }

    /// What the writer said.
    #[must_use]
    pub fn hints(&self) -> RecordHints {
        RecordHints {
            depth: self.depth.get(),
            expires_unix_s: self.expires_unix_s.get(),
            class: self.class,
            handover: self.hint_flags & HINT_HANDOVER != 0,
            recompute_us: self.recompute_us.get(),
            tenant: self.tenant(),
        }
    }

    /// Whose block it is, or whose blocks are purged.
    #[must_use]
    pub fn tenant(&self) -> Tenant {
        // A number that cannot be was left out with its record.
        Tenant::new(self.tenant.get()).unwrap_or_default()
    }

    /// The same record, of this tenant.
    #[must_use]
    pub fn of_tenant(mut self, tenant: Tenant) -> Self {
        self.tenant = u32::from(tenant.number()).into();
        self
    }

    /// Notes what the writer said.
    pub fn set_hints(&mut self, hints: &RecordHints) {
        self.depth = hints.depth.into();
        self.expires_unix_s = hints.expires_unix_s.into();
        self.class = hints.class;
        self.hint_flags = if hints.handover { HINT_HANDOVER } else { 0 };
        self.recompute_us = hints.recompute_us.into();
        self.tenant = u32::from(hints.tenant.number()).into();
    }

    /// Whether the stored bytes begin with a section directory.
    #[must_use]
    pub fn is_sectioned(&self) -> bool {
        self.flags & FLAG_SECTIONED != 0
    }

    /// Whether its fields can be true on this device.
    fn is_sane(&self, superblock: &Superblock) -> bool {
        if self.sequence() >= NUMBERS_END || Tenant::new(self.tenant.get()).is_none() {
            return false;
        }
        match self.kind {
            RECORD_TOMBSTONE | RECORD_PURGE | RECORD_TENANT_PURGE => true,
            RECORD_BLOCK => {
                let pages = u64::from(self.len.get()).div_ceil(PAGE_BYTES);
                self.len.get() > 0
                    && self.place.get() > 0
                    && u64::from(self.place.get()) + pages <= u64::from(superblock.footer_page())
                    && (1..=SECTIONS_MAX).contains(&usize::from(self.sections.get()))
            }
            _ => false,
        }
    }
}

/// A page of a segment, apart from its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHead {
    /// What it is.
    pub kind: PageKind,
    /// Segment over all shards.
    pub segment: u32,
    /// Generation of that segment.
    pub generation: u32,
    /// Which page of the footer.
    pub page_number: u16,
    /// Of how many.
    pub page_count: u16,
    /// Pages of the segment used when this was written.
    pub used_pages: u32,
    /// Sequence number when the segment was opened.
    pub opened_sequence: u64,
}

/// Writes a segment page that will lie at byte `offset` of the device.
///
/// # Panics
/// When there are more records than fit, or the page is no page: a defect of the caller.
pub fn encode_page(
    page: &mut [u8],
    superblock: &Superblock,
    offset: u64,
    head: &PageHead,
    records: &[Record],
) {
    assert!(page.len() == PAGE && records.len() <= RECORDS_PER_PAGE);
    let mut raw = RawPageHead {
        magic: PAGE_MAGIC.into(),
        kind: (head.kind as u16).into(),
        records: (records.len() as u16).into(),
        check: U64::ZERO,
        uuid: *superblock.uuid.as_bytes(),
        segment: head.segment.into(),
        generation: head.generation.into(),
        page_number: head.page_number.into(),
        page_count: head.page_count.into(),
        used_pages: head.used_pages.into(),
        opened_sequence: head.opened_sequence.into(),
        reserved: U64::ZERO,
    };
    let body = records.as_bytes();
    page[PAGE_HEAD..PAGE_HEAD + body.len()].copy_from_slice(body);
    page[PAGE_HEAD + body.len()..].fill(0);
    page[..PAGE_HEAD].copy_from_slice(raw.as_bytes());
    raw.check = (crc64(page) ^ page_fold(&superblock.secret, offset)).into();
    page[..PAGE_HEAD].copy_from_slice(raw.as_bytes());
}

/// Reads a segment page found at byte `offset`; `None` if it is not one of this device and place.
#[must_use]
pub fn decode_page(
    page: &[u8],
    superblock: &Superblock,
    offset: u64,
) -> Option<(PageHead, Vec<Record>)> {
    let (raw, body) = RawPageHead::ref_from_prefix(page).ok()?;
    if page.len() != PAGE
        || raw.magic.get() != PAGE_MAGIC
        || raw.uuid != *superblock.uuid.as_bytes()
        || usize::from(raw.records.get()) > RECORDS_PER_PAGE
    {
        return None;
    }
    let mut clean = *raw;
    clean.check = U64::ZERO;
    let mut crc = kvar_base::Crc64::default();
    crc.update(clean.as_bytes());
    crc.update(body);
    if crc.finish() ^ page_fold(&superblock.secret, offset) != raw.check.get()
        && !is_disabled(Check::Page)
    {
        return None;
    }
    let kind = match raw.kind.get() {
        1 => PageKind::Header,
        2 => PageKind::Directory,
        3 => PageKind::Footer,
        _ => return None,
    };
    if !(1..u32::MAX).contains(&raw.generation.get()) || raw.opened_sequence.get() >= NUMBERS_END {
        return None;
    }
    let head = PageHead {
        kind,
        segment: raw.segment.get(),
        generation: raw.generation.get(),
        page_number: raw.page_number.get(),
        page_count: raw.page_count.get(),
        used_pages: raw.used_pages.get(),
        opened_sequence: raw.opened_sequence.get(),
    };
    let count = usize::from(raw.records.get());
    let (records, _) = <[Record]>::ref_from_prefix_with_elems(body, count).ok()?;
    let records = records
        .iter()
        .filter(|record| record.is_sane(superblock))
        .copied()
        .collect();
    Some((head, records))
}
