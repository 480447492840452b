//! Who has which number: ids from a table, and runs of slots.
//!
//! Both always give the lowest or best-fitting free numbers, whatever happened before: an agent
//! that is restarted between two steps makes the same choices again.

use std::collections::{BTreeMap, BTreeSet};

/// The free ids of one table. Id 0 is never given.
#[derive(Clone, Debug)]
pub(super) struct IdPool {
    size: u32,
    /// Ids from here on were never given.
    fresh: u32,
    returned: BTreeSet<u32>,
}

impl IdPool {
    /// All of `1..size` is free.
    pub(super) fn new(size: u32) -> Self {
        Self::with_used(size, &BTreeSet::new())
    }

    /// All of `1..size` but `used` is free.
    pub(super) fn with_used(size: u32, used: &BTreeSet<u32>) -> Self {
        let fresh = used.last().map_or(1, |last| last + 1);
        Self {
            size,
            fresh,
            returned: (1..fresh).filter(|id| !used.contains(id)).collect(),
        }
    }

    /// How many ids are free.
    pub(super) fn available(&self) -> usize {
        self.returned.len() + self.size.saturating_sub(self.fresh) as usize
    }

    /// Gives the lowest free id.
    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.returned.pop_first() {
            return Some(id);
        }
        if self.fresh >= self.size {
            return None;
        }
        self.fresh += 1;
        Some(self.fresh - 1)
    }

    /// Takes an id back.
    pub(super) fn give_back(&mut self, id: u32) {
        debug_assert!(id < self.fresh, "an id that was never given");
        let new = self.returned.insert(id);
        debug_assert!(new, "an id that came back twice");
    }
}

/// The free runs of a flat table.
#[derive(Clone, Debug)]
pub(super) struct RunPool {
    /// Length by start; neighbours are always merged.
    by_start: BTreeMap<u32, u32>,
    /// The same, by length: the smallest run that is long enough is found first.
    by_length: BTreeSet<(u32, u32)>,
    available: u32,
}

impl RunPool {
    /// All of `0..size` is free.
    pub(super) fn new(size: u32) -> Self {
        let mut pool = Self {
            by_start: BTreeMap::new(),
            by_length: BTreeSet::new(),
            available: 0,
        };
        pool.give_back(0, size);
        pool
    }

    /// How many elements are free, in however many runs.
    pub(super) const fn available(&self) -> u32 {
        self.available
    }

    /// Takes a run of `length` from the shortest free run that holds it.
    pub(super) fn take(&mut self, length: u32) -> Option<u32> {
        let (_, start) = *self.by_length.range((length, 0)..).next()?;
        self.take_at(start, length).then_some(start)
    }

    /// Takes exactly this run; false if it is not all free.
    pub(super) fn take_at(&mut self, start: u32, length: u32) -> bool {
        let Some(end) = start.checked_add(length) else {
            return false;
        };
        let Some((free_start, free_length)) = self.run_before(start) else {
            return false;
        };
        let free_end = free_start + free_length;
        if length == 0 || end > free_end {
            return false;
        }
        self.remove(free_start, free_length);
        self.insert(free_start, start - free_start);
        self.insert(end, free_end - end);
        self.available -= length;
        true
    }

    /// Takes a run back.
    pub(super) fn give_back(&mut self, start: u32, length: u32) {
        let (mut start, mut end) = (start, start + length);
        self.available += length;
        if let Some((free_start, free_length)) = self.run_before(start)
            && free_start + free_length == start
        {
            self.remove(free_start, free_length);
            start = free_start;
        }
        if let Some(free_length) = self.by_start.get(&end).copied() {
            self.remove(end, free_length);
            end += free_length;
        }
        self.insert(start, end - start);
    }

    /// The free run that starts at or before `position`.
    fn run_before(&self, position: u32) -> Option<(u32, u32)> {
        let (start, length) = self.by_start.range(..=position).next_back()?;
        Some((*start, *length))
    }

    fn insert(&mut self, start: u32, length: u32) {
        if length > 0 {
            self.by_start.insert(start, length);
            self.by_length.insert((length, start));
        }
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_start_at_one_and_the_lowest_comes_back_first() {
        let mut pool = IdPool::new(4);
        assert_eq!(
            [pool.take(), pool.take(), pool.take()],
            [Some(1), Some(2), Some(3)]
        );
        assert_eq!(pool.take(), None);
        pool.give_back(3);
        pool.give_back(1);
        assert_eq!(pool.available(), 2);
        assert_eq!(
            [pool.take(), pool.take(), pool.take()],
            [Some(1), Some(3), None]
        );
    }

    #[test]
    fn restored_ids_leave_their_gaps_free() {
        let mut pool = IdPool::with_used(7, &BTreeSet::from([2, 4]));
        assert_eq!(pool.available(), 4);
        let given: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(given, [1, 3, 5, 6]);
    }

    #[test]
    fn the_shortest_run_that_fits_is_taken() {
        let mut pool = RunPool::new(20);
        assert!(pool.take_at(4, 2));
        assert!(pool.take_at(9, 1));
        // Free now: 0..4, 6..9, 10..20.
        assert_eq!(pool.take(3), Some(6));
        assert_eq!(pool.take(3), Some(0));
        assert_eq!(pool.take(11), None);
        assert_eq!(pool.available(), 11);
    }

    #[test]
    fn runs_merge_with_both_neighbours() {
        let mut pool = RunPool::new(12);
        assert_eq!(
            [pool.take(4), pool.take(4), pool.take(4)],
            [Some(0), Some(4), Some(8)]
        );
        pool.give_back(0, 4);
        pool.give_back(8, 4);
        assert_eq!(pool.take(5), None);
        pool.give_back(4, 4);
        assert_eq!(pool.take(12), Some(0));
    }

    #[test]
    fn a_run_that_is_not_free_is_not_taken() {
        let mut pool = RunPool::new(10);
        assert!(pool.take_at(2, 3));
        assert!(!pool.take_at(4, 1));
        assert!(!pool.take_at(0, 3));
        assert!(!pool.take_at(8, 3));
        assert!(!pool.take_at(u32::MAX, 2));
        assert_eq!(pool.available(), 7);
    }
}
