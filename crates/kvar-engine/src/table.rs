//! The memory of the index: zeroed cache lines on huge pages where the system has them.
//!
//! A lookup touches one or two lines somewhere in hundreds of megabytes. On pages of 4 KiB it then
//! waits for the address as well as for the line; on pages of 2 MiB the addresses stay cached.
//! Memory is taken from the system when first touched.

use memmap2::{Advice, MmapMut};
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A fixed number of items, all zero at first.
pub(crate) struct Table<T> {
    map: MmapMut,
    len: usize,
    items: PhantomData<T>,
}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout> Table<T> {
    /// # Panics
    /// When the system has not that much address space.
    pub(crate) fn zeroed(len: usize) -> Self {
        let map = MmapMut::map_anon(len * size_of::<T>()).expect("address space for the index");
        // A system without huge pages says no, which costs speed and nothing else.
        let _ = map.advise(Advice::HugePage);
        let items = PhantomData;
        Self { map, len, items }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn items(&self) -> &[T] {
        <[T]>::ref_from_bytes(&self.map)
            .expect("a mapping is aligned to pages and holds whole items")
    }

    fn items_mut(&mut self) -> &mut [T] {
        <[T]>::mut_from_bytes(&mut self.map)
            .expect("a mapping is aligned to pages and holds whole items")
    }

    pub(crate) fn clear(&mut self) {
        self.map.fill(0);
    }
}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout> Index<usize> for Table<T> {
    type Output = T;
    #[inline]
    fn index(&self, at: usize) -> &T {
        &self.items()[at]
    }
}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout> IndexMut<usize> for Table<T> {
    #[inline]
    fn index_mut(&mut self, at: usize) -> &mut T {
        &mut self.items_mut()[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_zero_until_they_are_set_and_after_a_clear() {
        let mut table: Table<[u64; 8]> = Table::zeroed(1000);
        assert_eq!((table.len(), table[999]), (1000, [0; 8]));
        table[999][7] = 5;
        table[0] = [1; 8];
        assert_eq!((table[999][7], table[998], table[0]), (5, [0; 8], [1; 8]));
        table.clear();
        assert_eq!((table[999], table[0]), ([0; 8], [0; 8]));
    }
}
