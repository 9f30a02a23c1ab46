//! The stored image of one block.
//!
//! ```text
//!  one section        its bytes
//!  several sections   section directory, whole pages | section 0, padded to pages | section 1 ...
//!
//!  directory page     head 64 | up to 84 entries of 48
//! ```
//!
//! What must always be true: sections lie behind one another in their order and nowhere else, so
//! that lengths alone say where each is; a directory that says otherwise is none.
//!
//! Left to others: whether the bytes are what their writer said (`shard`, through `kvar_base`'s
//! checks).

use super::PAGE;
use kvar_base::{BlockId, ContentCheck, SECTIONS_MAX, page_round_up};
use smallvec::SmallVec;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const SECTION_MAGIC: u32 = u32::from_le_bytes(*b"KVSD");

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SectionHead {
    magic: U32,
    sections: U16,
    pages: U16,
    id: [u8; 32],
    reserved: [u8; 24],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SectionEntry {
    len: U32,
    page: U32,
    check: U64,
    nonce: [u8; 12],
    tag: [u8; 16],
    reserved: [u8; 4],
}

const SECTIONS_PER_PAGE: usize = 84;
const _: () = assert!(size_of::<SectionHead>() == 64 && size_of::<SectionEntry>() == 48);
const _: () = assert!(64 + SECTIONS_PER_PAGE * 48 == PAGE);
const _: () = assert!(SECTIONS_PER_PAGE * 12 == SECTIONS_MAX);

/// One section of a block: what the writer said, and where it lies in the stored image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Exact length in bytes.
    pub len: u32,
    /// The writer's check.
    pub check: ContentCheck,
    /// Bytes from the start of the image.
    pub offset: u32,
}

/// The sections of a block; most have one, which then needs no memory of its own.
pub type Sections = SmallVec<[Section; 1]>;

/// How the sections of a block lie behind one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePlan {
    /// The sections.
    pub sections: Sections,
    /// Bytes of the image: exact for one section, whole pages for several.
    pub bytes: u64,
    /// Pages of section directory in front (0 for one section).
    pub directory_pages: usize,
}

impl ImagePlan {
    /// Lays sections out; the caller has checked that none is empty and that they are not too many.
    #[must_use]
    pub fn new(sections: &[(u32, ContentCheck)]) -> Self {
        if let [(len, check)] = *sections {
            let section = Section {
                len,
                check,
                offset: 0,
            };
            return Self {
                sections: Sections::from_buf([section]),
                bytes: u64::from(len),
                directory_pages: 0,
            };
        }
        let directory_pages = sections.len().div_ceil(SECTIONS_PER_PAGE);
        let mut at = (directory_pages * PAGE) as u64;
        let sections = sections
            .iter()
            .map(|&(len, check)| {
                let offset = at as u32;
                at += page_round_up(u64::from(len));
                Section { len, check, offset }
            })
            .collect();
        Self {
            sections,
            bytes: at,
            directory_pages,
        }
    }

    /// Whether a section directory is in front.
    #[must_use]
    pub fn is_sectioned(&self) -> bool {
        self.directory_pages > 0
    }

    /// Writes the section directory and zeroes the padding of every section.
    pub fn encode(&self, id: &BlockId, image: &mut [u8]) {
        for section in &self.sections {
            let end = section.offset as usize + section.len as usize;
            let padded = (end.div_ceil(PAGE) * PAGE).min(image.len());
            image[end..padded].fill(0);
        }
        let pages = self.sections.chunks(SECTIONS_PER_PAGE);
        for (page, sections) in image[..self.directory_pages * PAGE]
            .chunks_mut(PAGE)
            .zip(pages)
        {
            page.fill(0);
            let head = SectionHead {
                magic: SECTION_MAGIC.into(),
                sections: (self.sections.len() as u16).into(),
                pages: (self.directory_pages as u16).into(),
                id: *id.as_bytes(),
                reserved: [0; 24],
            };
            page[..64].copy_from_slice(head.as_bytes());
            for (number, section) in sections.iter().enumerate() {
                let entry = SectionEntry {
                    len: section.len.into(),
                    page: (section.offset / PAGE as u32).into(),
                    check: section.check.0.into(),
                    nonce: [0; 12],
                    tag: [0; 16],
                    reserved: [0; 4],
                };
                page[64 + number * 48..][..48].copy_from_slice(entry.as_bytes());
            }
        }
    }

    /// Reads the section directory in front of an image; `None` if there is none of this block.
    #[must_use]
    pub fn decode(id: &BlockId, image: &[u8]) -> Option<Self> {
        Self::decode_directory(id, image, image.len() as u64)
    }

    /// Reads the section directory of an image of `image_bytes` of which `front` is the beginning;
    /// `None` if there is none of this block, or not whole.
    #[must_use]
    pub fn decode_directory(id: &BlockId, front: &[u8], image_bytes: u64) -> Option<Self> {
        let pages = Self::pages_of_directory(id, front)?;
        let count = usize::from(SectionHead::ref_from_prefix(front).ok()?.0.sections.get());
        if front.len() < pages * PAGE {
            return None;
        }
        let entries: Vec<_> = front
            .chunks_exact(PAGE)
            .flat_map(|page| page[64..].chunks_exact(48))
            .take(count)
            .map(|entry| SectionEntry::read_from_bytes(entry).ok())
            .collect::<Option<_>>()?;
        let plan = Self::new(
            &entries
                .iter()
                .map(|entry| (entry.len.get(), ContentCheck(entry.check.get())))
                .collect::<Vec<_>>(),
        );
        let agrees = plan.sections.iter().zip(&entries).all(|(section, entry)| {
            section.len > 0 && section.offset / PAGE as u32 == entry.page.get()
        });
        (agrees && plan.bytes == image_bytes).then_some(plan)
    }

    /// How many pages the section directory takes whose first page this is; `None` if it is none
    /// of this block.
    #[must_use]
    pub fn pages_of_directory(id: &BlockId, front: &[u8]) -> Option<usize> {
        let (head, _) = SectionHead::ref_from_prefix(front).ok()?;
        let count = usize::from(head.sections.get());
        let valid = head.magic.get() == SECTION_MAGIC
            && head.id == *id.as_bytes()
            && (2..=SECTIONS_MAX).contains(&count);
        valid.then(|| count.div_ceil(SECTIONS_PER_PAGE))
    }
}
