//! The bytes of a disk, page by page; a page never written is zero and costs nothing. A clone
//! shares its pages.

use super::random::Random;
use kvar_base::PAGE_BYTES;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub(crate) const PAGE: usize = PAGE_BYTES as usize;
pub(crate) const SECTOR: usize = 512;
pub(crate) type Page = [u8; PAGE];

/// The content of a simulated disk at one moment.
#[derive(Clone)]
pub struct Image {
    bytes: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Image {
    /// All zero, of `bytes` rounded down to whole pages.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes: bytes / PAGE_BYTES * PAGE_BYTES,
            pages: BTreeMap::new(),
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages that were ever written.
    #[must_use]
    pub fn pages_stored(&self) -> usize {
        self.pages.len()
    }

    /// Copies bytes out, from any offset; zero beyond the end.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (page, within, part) in parts(offset, into.len()) {
            let into = &mut into[part];
            match self.pages.get(&page) {
                Some(page) => into.copy_from_slice(&page[within..within + into.len()]),
                None => into.fill(0),
            }
        }
    }

    /// Copies bytes in, at any offset; what lies beyond the end is dropped.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        let inside = self.bytes.saturating_sub(offset).min(from.len() as u64) as usize;
        for (page, within, part) in parts(offset, inside) {
            let from = &from[part];
            let page = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[within..within + from.len()].copy_from_slice(from);
        }
    }

    /// Turns one bit over: bit 0 is the lowest of byte 0.
    pub fn flip_bit(&mut self, bit: u64) {
        let mut byte = [0];
        self.read(bit / 8, &mut byte);
        self.write(bit / 8, &[byte[0] ^ (1 << (bit % 8))]);
    }

    /// Turns `bits` bits over, somewhere in a range of bytes.
    pub fn flip_bits(&mut self, range: Range<u64>, bits: u32, seed: u64) {
        let mut random = Random::new(seed);
        for bit in pick_bits(&range, bits, &mut random) {
            self.flip_bit(bit);
        }
    }

    pub(crate) fn page(&self, page: u64) -> Option<&Arc<Page>> {
        self.pages.get(&page)
    }

    pub(crate) fn put_page(&mut self, page: u64, content: Arc<Page>) {
        if (page + 1) * PAGE_BYTES <= self.bytes {
            self.pages.insert(page, content);
        }
    }

    pub(crate) fn clear_pages(&mut self, pages: Range<u64>) {
        let mut rest = self.pages.split_off(&pages.start);
        self.pages.append(&mut rest.split_off(&pages.end));
    }
}

/// Distinct bits in a range of bytes.
pub(crate) fn pick_bits(range: &Range<u64>, bits: u32, random: &mut Random) -> Vec<u64> {
    let there = range.end.saturating_sub(range.start) * 8;
    let mut picked: Vec<u64> = Vec::new();
    while (picked.len() as u64) < u64::from(bits).min(there) {
        let bit = range.start * 8 + random.below(there);
        if !picked.contains(&bit) {
            picked.push(bit);
        }
    }
    picked
}

/// Cuts `len` bytes from `offset` at page borders: page, offset within it, range of the bytes.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = (at % PAGE_BYTES) as usize;
        let part = done..len.min(done + PAGE - within);
        done = part.end;
        (!part.is_empty()).then_some((at / PAGE_BYTES, within, part))
    })
}

impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        let zero = Arc::new([0; PAGE]);
        let pages = self.pages.keys().chain(other.pages.keys());
        self.bytes == other.bytes
            && pages.into_iter().all(|page| {
                let of = |image: &Self| Arc::clone(image.page(*page).unwrap_or(&zero));
                of(self) == of(other)
            })
    }
}

impl Eq for Image {}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Image({} bytes, {} pages stored)",
            self.bytes,
            self.pages.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_over_page_borders_and_the_end_is_kept() {
        let mut image = Image::new(3 * PAGE_BYTES + 100);
        let text: Vec<u8> = (0..6000_u32).map(|byte| byte as u8 | 1).collect();
        image.write(PAGE_BYTES - 10, &text);
        let mut back = vec![0; 6000];
        image.read(PAGE_BYTES - 10, &mut back);
        assert_eq!(back, text);
        image.write(3 * PAGE_BYTES - 1, &[7, 8, 9]);
        assert_eq!(image.pages_stored(), 3, "nothing is stored beyond the end");
        let before = image.clone();
        image.flip_bits(0..2 * PAGE_BYTES, 5, 1);
        assert_ne!(image, before);
        image.flip_bits(0..2 * PAGE_BYTES, 5, 1);
        assert_eq!(image, before, "the same seed turns the same bits back");
        image.clear_pages(1..2);
        image.read(PAGE_BYTES, &mut back[..PAGE]);
        assert!(back[..PAGE].iter().all(|byte| *byte == 0));
    }
}
