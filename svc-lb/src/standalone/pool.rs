//! Numbers to hand out: addresses of a range, or ports.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use svc_lb_common::hash::text_hash;

use crate::model::ObjectName;

/// Values of one kind, those in use and whose they are.
#[derive(Debug)]
pub(super) struct Pool {
    /// What the operator calls it, for messages.
    pub(super) name: String,
    ranges: Vec<Range>,
    /// Written by users; a value may be claimed by several.
    explicit: BTreeMap<u128, Vec<ObjectName>>,
    /// Handed out from here.
    dynamic: BTreeMap<u128, ObjectName>,
}

/// Consecutive values.
#[derive(Clone, Copy, Debug)]
struct Range {
    first: u128,
    length: u128,
}

impl Range {
    fn of_net(net: IpNet) -> Self {
        let first = to_number(net.network());
        let last = to_number(net.broadcast());
        let (v4, bits) = (
            net.addr().is_ipv4(),
            net.max_prefix_len() - net.prefix_len(),
        );
        // Not the network's own address, and in IPv4 not the broadcast address; ranges too small
        // to have these are used as they are.
        let (skip_first, skip_last) = (bits >= 2, bits >= 2 && v4);
        let length = (last - first).saturating_add(1);
        Self {
            first: first + u128::from(skip_first),
            length: length - u128::from(skip_first) - u128::from(skip_last),
        }
    }
}

impl Pool {
    /// Addresses of `nets`, which are of one family.
    pub(super) fn of_addresses(name: String, nets: impl IntoIterator<Item = IpNet>) -> Self {
        Self::new(name, nets.into_iter().map(Range::of_net).collect())
    }

    /// The ports from `first` to `last`.
    pub(super) fn of_ports(name: String, first: u16, last: u16) -> Self {
        let length = u128::from(last.saturating_sub(first)) + 1;
        Self::new(
            name,
            vec![Range {
                first: first.into(),
                length,
            }],
        )
    }

    fn new(name: String, ranges: Vec<Range>) -> Self {
        Self {
            name,
            ranges,
            explicit: BTreeMap::new(),
            dynamic: BTreeMap::new(),
        }
    }

    /// How many values there are.
    pub(super) fn size(&self) -> u128 {
        self.ranges
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.length))
    }

    pub(super) fn contains(&self, value: u128) -> bool {
        self.ranges.iter().any(|range| {
            value
                .checked_sub(range.first)
                .is_some_and(|offset| offset < range.length)
        })
    }

    /// Reserves what a user wrote; returns who had been given the value and must get another.
    pub(super) fn reserve(&mut self, value: u128, owner: &ObjectName) -> Option<ObjectName> {
        let owners = self
            .explicit
            .entry(value)
            .or_insert_with(|| Vec::with_capacity(1));
        if !owners.contains(owner) {
            owners.push(owner.clone());
        }
        self.dynamic.remove(&value)
    }

    /// Another one who wrote the same value.
    pub(super) fn rival(&self, value: u128, owner: &ObjectName) -> Option<&ObjectName> {
        self.explicit
            .get(&value)?
            .iter()
            .find(|other| *other != owner)
    }

    /// `value` was handed out to `owner`.
    pub(super) fn gave(&self, value: u128, owner: &ObjectName) -> bool {
        self.dynamic.get(&value) == Some(owner)
    }

    /// Takes a value that was handed out earlier, if it still can be had.
    pub(super) fn retake(&mut self, value: u128, owner: &ObjectName) -> bool {
        let free = self.contains(value) && self.is_free(value);
        if free {
            self.dynamic.insert(value, owner.clone());
        }
        free
    }

    /// Hands out a value that depends on `seed` alone while nobody else has it.
    pub(super) fn allocate(&mut self, seed: &str, owner: &ObjectName) -> Option<u128> {
        let size = self.size();
        if self.in_use() >= size {
            return None;
        }
        let band = low_band(size);
        let upper = size - band;
        let start = band + u128::from(text_hash(seed)).checked_rem(upper)?;
        let mut offsets = (start..size).chain(band..start).chain(0..band);
        let value = offsets.find_map(|offset| self.nth(offset).filter(|v| self.is_free(*v)))?;
        self.dynamic.insert(value, owner.clone());
        Some(value)
    }

    /// Gives back what `owner` has of `value`.
    pub(super) fn release(&mut self, value: u128, owner: &ObjectName) {
        if self.gave(value, owner) {
            self.dynamic.remove(&value);
        }
        if let Some(owners) = self.explicit.get_mut(&value) {
            owners.retain(|other| other != owner);
            if owners.is_empty() {
                self.explicit.remove(&value);
            }
        }
    }

    /// Values of the pool that somebody has. What is handed out is in the pool and not explicit.
    fn in_use(&self) -> u128 {
        let explicit = self
            .explicit
            .keys()
            .filter(|value| self.contains(**value))
            .count();
        (explicit + self.dynamic.len()) as u128
    }

    fn is_free(&self, value: u128) -> bool {
        !self.explicit.contains_key(&value) && !self.dynamic.contains_key(&value)
    }

    fn nth(&self, mut offset: u128) -> Option<u128> {
        for range in &self.ranges {
            if offset < range.length {
                return Some(range.first + offset);
            }
            offset -= range.length;
        }
        None
    }
}

/// Low values are left to those who write them by hand, while others are free (as Kubernetes
/// does).
fn low_band(size: u128) -> u128 {
    let band = (size / 16).clamp(16, 256);
    if band < size { band } else { 0 }
}

/// An address as a number; those of different families never share a pool.
pub(super) fn to_number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}
