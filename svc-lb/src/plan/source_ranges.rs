//! Whom services admit at their load balancer addresses, and what the maps hold.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net};
use svc_lb_common::Family;

use crate::dataplane::{PerFamily, SourceRange};

/// What is known about one key of the map.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Programmed {
    /// It is not there.
    #[default]
    Absent,
    /// It is there.
    Present,
    /// A write failed: there or not.
    Unknown,
}

/// One key of the map that is wanted, or there, or both.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Entry {
    wanted: bool,
    programmed: Programmed,
}

/// All keys of both maps.
#[derive(Clone, Debug, Default)]
pub(super) struct SourceRanges {
    entries: BTreeMap<SourceRange, Entry>,
    used: PerFamily<u32>,
    /// Keys that may differ from what is wanted.
    dirty: BTreeSet<SourceRange>,
}

/// What the map should hold at one key, and does not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Difference {
    Put,
    Delete,
}

impl SourceRanges {
    /// Keys in use in one family: wanted, or not yet known to be deleted.
    pub(super) const fn used(&self, family: Family) -> u32 {
        *self.used.of(family)
    }

    /// Whether a service has a range already: then wanting it takes no room.
    pub(super) fn is_used(&self, service: u32, net: IpNet) -> bool {
        self.entries.contains_key(&SourceRange { service, net })
    }

    /// Enters what a map held at start.
    pub(super) fn restore(&mut self, range: SourceRange) {
        self.entry(range).programmed = Programmed::Present;
    }

    /// Says what a service wants.
    pub(super) fn set(&mut self, service: u32, nets: &[IpNet]) {
        let others = self.of(service).filter(|range| !nets.contains(&range.net));
        for range in others.collect::<Vec<_>>() {
            self.entry(range).wanted = false;
            self.dirty.insert(range);
        }
        for net in nets {
            let range = SourceRange { service, net: *net };
            self.entry(range).wanted = true;
            self.dirty.insert(range);
        }
    }

    /// Looks again at everything that is there and nobody wants.
    pub(super) fn touch_unwanted(&mut self) {
        let unwanted = self.entries.iter().filter(|(_, entry)| !entry.wanted);
        self.dirty.extend(unwanted.map(|(range, _)| *range));
    }

    /// Whether something may differ.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// What has to change in the maps.
    pub(super) fn differences(&self) -> impl Iterator<Item = (SourceRange, Difference)> {
        self.dirty.iter().filter_map(|range| {
            let entry = self.entries.get(range)?;
            let difference = match (entry.wanted, entry.programmed) {
                (true, Programmed::Present) | (false, Programmed::Absent) => return None,
                (true, _) => Difference::Put,
                (false, _) => Difference::Delete,
            };
            Some((*range, difference))
        })
    }

    /// What maps that hold `found`, sorted, lack, and what they should not hold.
    pub(super) fn compare(&self, found: &[SourceRange]) -> (Vec<SourceRange>, Vec<SourceRange>) {
        let wanted = self.entries.iter().filter(|(_, entry)| entry.wanted);
        let missing = wanted
            .map(|(range, _)| *range)
            .filter(|range| found.binary_search(range).is_err());
        let wanted = |range: &&SourceRange| {
            let entry = self.entries.get(range);
            entry.is_some_and(|entry| entry.wanted)
        };
        let extra = found.iter().filter(|range| !wanted(range));
        (missing.collect(), extra.copied().collect())
    }

    /// A key was written: it is there or not.
    pub(super) fn was_written(&mut self, range: SourceRange, present: bool) {
        self.entry(range).programmed = if present {
            Programmed::Present
        } else {
            Programmed::Absent
        };
        self.drop_unused(range);
    }

    /// A write to a key failed.
    pub(super) fn is_unknown(&mut self, range: SourceRange) {
        self.entry(range).programmed = Programmed::Unknown;
        self.dirty.insert(range);
    }

    /// All differences are gone.
    pub(super) fn settled(&mut self) {
        for range in std::mem::take(&mut self.dirty) {
            self.drop_unused(range);
        }
    }

    fn of(&self, service: u32) -> impl Iterator<Item = SourceRange> {
        // The first of all ranges: 0.0.0.0/0.
        let net = IpNet::V4(Ipv4Net::default());
        self.entries
            .range(SourceRange { service, net }..)
            .map(|(range, _)| *range)
            .take_while(move |range| range.service == service)
    }

    fn entry(&mut self, range: SourceRange) -> &mut Entry {
        self.entries.entry(range).or_insert_with(|| {
            *self.used.of_mut(range.family()) += 1;
            Entry::default()
        })
    }

    fn drop_unused(&mut self, range: SourceRange) {
        let unused = |entry: &Entry| !entry.wanted && entry.programmed == Programmed::Absent;
        if self.entries.get(&range).is_some_and(unused) {
            self.entries.remove(&range);
            *self.used.of_mut(range.family()) -= 1;
        }
    }
}
