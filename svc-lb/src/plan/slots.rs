//! Which backend each slot of a set names.
//!
//! Pure functions of the members and the settings: the same set gives the same table on every node
//! and after every restart, whatever happened before. Members come sorted by address, which is all
//! that decides; their ids, which differ from node to node, are only what the slots hold.

use std::net::{IpAddr, SocketAddr};

use svc_lb_common::hash::{M1, M2, M3, mix};

use crate::compile::desired::Selection;

/// A member of a set.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) address: SocketAddr,
    /// Its part of new flows, beside the others'; 0 counts as 1.
    pub(super) weight: u16,
    pub(super) id: u32,
}

impl Member {
    fn weight(&self) -> u64 {
        self.weight.max(1).into()
    }
}

/// Slots for each member where weights need them and nothing else does: shares are then right
/// within a hundredth of an even share.
const SHARES: usize = 100;

/// The ids that a set's slots hold; a longer list than a range can hold is not to be programmed.
pub(super) fn slots_of(members: &[Member], selection: Selection) -> Vec<u32> {
    match selection {
        Selection::Random => shares(members),
        Selection::Maglev { seed, slots } => maglev(members, seed, slots),
    }
}

/// A slot for each member, or as many as its weight says. Members keep their order when one
/// leaves, so a hash that picks by scaling moves to a neighbour at most.
fn shares(members: &[Member]) -> Vec<u32> {
    let divisor = members.iter().map(Member::weight).fold(0, gcd).max(1);
    let total: u64 = members.iter().map(|member| member.weight() / divisor).sum();
    let room = SHARES
        .saturating_mul(members.len())
        .min(usize::from(u16::MAX).saturating_sub(members.len())) as u64;
    let count = |member: &Member| {
        let weight = member.weight() / divisor;
        let count = if total <= room {
            weight
        } else {
            (weight * room / total).max(1)
        };
        // At most `room`, which fits.
        usize::try_from(count).unwrap_or(1)
    };
    let repeated = |member: &Member| std::iter::repeat_n(member.id, count(member));
    members.iter().flat_map(repeated).collect()
}

const fn gcd(a: u64, b: u64) -> u64 {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Eisenbud et al., "Maglev", section 3.4: the members take turns, each taking the first slot of
/// its own permutation that nobody has. With weights, one with half the weight of the heaviest
/// takes half as many turns. Each has one slot at least.
///
/// One member needs no table; more members than slots get one slot each.
fn maglev(members: &[Member], seed: u64, slots: u16) -> Vec<u32> {
    if members.len() <= 1 || members.len() > slots.into() {
        return members.iter().map(|member| member.id).collect();
    }
    let heaviest = members.iter().map(Member::weight).max().unwrap_or(1);
    let mut turns: Vec<Turn> = members
        .iter()
        .map(|member| Turn::new(member, seed, slots))
        .collect();
    // Id 0 is nobody's.
    let mut table = vec![0; slots.into()];
    let mut free = table.len();
    for round in 0.. {
        for turn in turns
            .iter_mut()
            .filter(|turn| turn.taken * heaviest <= round * turn.weight)
        {
            if free == 0 {
                return table;
            }
            let wanted = turn
                .permutation
                .find(|position| table.get(*position) == Some(&0));
            if let Some(slot) = wanted.and_then(|position| table.get_mut(position)) {
                *slot = turn.id;
            }
            turn.taken += 1;
            free -= 1;
        }
    }
    table
}

struct Turn {
    id: u32,
    weight: u64,
    taken: u64,
    permutation: Permutation,
}

impl Turn {
    fn new(member: &Member, seed: u64, slots: u16) -> Self {
        Self {
            id: member.id,
            weight: member.weight(),
            taken: 0,
            permutation: Permutation::new(member.address, seed, slots),
        }
    }
}

/// The positions `0..length` in an order that belongs to one address and port: a Feistel network
/// over the least square of a power of two that holds them all, positions beyond them left out.
///
/// The original steps through the table by a fixed skip. Two members whose skips are close to a
/// small multiple of each other then want the same slots all along, which sends most of a
/// leaver's flows to one of the others; with thousands of pairs some are always so.
struct Permutation {
    keys: [u64; ROUNDS],
    half: u32,
    length: u32,
    next: u32,
}

const ROUNDS: usize = 4;

impl Permutation {
    fn new(address: SocketAddr, seed: u64, length: u16) -> Self {
        let bits = u32::BITS - u32::from(length.saturating_sub(1)).leading_zeros();
        let mut key = mix(seed ^ identity(address));
        Self {
            keys: std::array::from_fn(|_| {
                key = mix(key.wrapping_add(M1));
                key
            }),
            half: bits.div_ceil(2),
            length: length.into(),
            next: 0,
        }
    }

    fn permuted(&self, position: u32) -> u32 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (position >> self.half, position & mask);
        for key in self.keys {
            let mixed = (key ^ u64::from(right)).wrapping_mul(M2) >> 40;
            // Only the low half of the bits counts.
            let mixed = u32::try_from(mixed).unwrap_or(0) & mask;
            (left, right) = (right, left ^ mixed);
        }
        left << self.half | right
    }
}

impl Iterator for Permutation {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        while self.next < 1 << (2 * self.half) {
            let position = self.permuted(self.next);
            self.next += 1;
            if position < self.length {
                return Some(position as usize);
            }
        }
        None
    }
}

/// A number for an address and port: nothing that only this node knows.
fn identity(address: SocketAddr) -> u64 {
    let (high, low) = match address.ip() {
        IpAddr::V4(ip) => (0, u64::from(ip.to_bits())),
        IpAddr::V6(ip) => {
            let [high, low] = [ip.to_bits() >> 64, ip.to_bits() & u128::from(u64::MAX)];
            (
                u64::try_from(high).unwrap_or(0),
                u64::try_from(low).unwrap_or(0),
            )
        }
    };
    let port = u64::from(address.port()) | u64::from(address.is_ipv6()) << 16;
    mix(mix(mix(high ^ M3) ^ low).wrapping_add(port))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;
    use proptest::sample::{select, subsequence};

    use super::*;

    const SEED: u64 = 7;
    const LARGEST: u16 = 65_521;

    fn address(n: u16, v6: bool) -> SocketAddr {
        let ip = if v6 {
            Ipv6Addr::from([0xfd00, 0x10, 0x244, 1, 0, 0, 0, n]).into()
        } else {
            Ipv4Addr::from(0x0af4_0100 + u32::from(n)).into()
        };
        SocketAddr::new(ip, 8080)
    }

    /// Members by address, ids as this node happened to give them.
    fn members(hosts: impl IntoIterator<Item = u16>, first_id: u32) -> Vec<Member> {
        hosts
            .into_iter()
            .zip(first_id..)
            .map(|(host, id)| Member {
                address: address(host, false),
                weight: 1,
                id,
            })
            .collect()
    }

    /// Whose each slot is.
    fn owners(members: &[Member], selection: Selection) -> Vec<SocketAddr> {
        let by_id: BTreeMap<u32, SocketAddr> = members.iter().map(|m| (m.id, m.address)).collect();
        let slots = slots_of(members, selection);
        slots.iter().map(|id| by_id[id]).collect()
    }

    fn counts(owners: &[SocketAddr]) -> BTreeMap<SocketAddr, u32> {
        let mut counts = BTreeMap::new();
        for owner in owners {
            *counts.entry(*owner).or_insert(0) += 1;
        }
        counts
    }

    fn maglev(slots: u16) -> Selection {
        Selection::Maglev { seed: SEED, slots }
    }

    /// What a leaver does to the others: the part of the survivors' slots that moved, and how far
    /// the survivor with the most or least of the leaver's slots is from an even share.
    fn leave(all: &[Member], leaver: usize, slots: u16) -> (f64, f64) {
        let before = owners(all, maglev(slots));
        let mut rest = all.to_vec();
        let gone = rest.remove(leaver).address;
        let after = owners(&rest, maglev(slots));
        assert_eq!(before.len(), after.len());
        let (mut moved, mut kept) = (0_u32, 0_u32);
        let mut heirs: BTreeMap<SocketAddr, u32> =
            rest.iter().map(|member| (member.address, 0)).collect();
        for (old, new) in before.iter().zip(&after) {
            if *old == gone {
                *heirs.get_mut(new).unwrap() += 1;
            } else {
                kept += 1;
                moved += u32::from(old != new);
            }
        }
        let left: u32 = heirs.values().sum();
        let even = f64::from(left) / f64::from(u32::try_from(heirs.len()).unwrap());
        let furthest = heirs
            .values()
            .map(|count| (f64::from(*count) / even - 1.0).abs())
            .fold(0.0, f64::max);
        (f64::from(moved) / f64::from(kept), furthest)
    }

    /// Every order is a permutation, whatever the length.
    #[test]
    fn permutations_name_each_position_once() {
        for length in [2, 3, 13, 31, 1_021, 4_093, 16_381, LARGEST, u16::MAX] {
            let permutation = Permutation::new(address(1, true), SEED, length);
            let positions: BTreeSet<usize> = permutation.collect();
            assert_eq!(positions.len(), usize::from(length));
            assert_eq!(positions.last(), Some(&usize::from(length - 1)));
        }
    }

    /// F9: with tables of the default size, a leaver moves at most one flow in a hundred of those
    /// that stay, from few members to the 250 of a large Service.
    #[test]
    fn f9_a_leaver_hardly_moves_the_others() {
        for (count, tries) in [
            (3, 6),
            (6, 6),
            (10, 6),
            (25, 4),
            (60, 2),
            (100, 2),
            (250, 1),
        ] {
            for first in 0..tries {
                let all = members(first * 1_000..first * 1_000 + count, 1);
                let leaver = usize::from(first * 5 % count);
                let (moved, _) = leave(&all, leaver, LARGEST);
                assert!(moved <= 0.01, "{count} members: {moved}");
            }
        }
    }

    /// F9: the leaver's flows spread over all that stay, within a fifth of even, as long as a pair
    /// of members shares enough slots for that.
    #[test]
    fn f9_a_leavers_flows_are_spread_evenly() {
        for count in [3, 4, 6, 8, 10, 12] {
            for first in 0..6 {
                let all = members(first * 1_000..first * 1_000 + count, 1);
                let leaver = usize::from(first * 5 % count);
                let (_, furthest) = leave(&all, leaver, LARGEST);
                assert!(furthest <= 0.2, "{count} members: {furthest}");
            }
        }
    }

    /// F9: every member has its share, to one slot.
    #[test]
    fn f9_shares_are_even() {
        for (count, slots) in [(3, 1_021), (40, 4_093), (163, 16_381), (250, LARGEST)] {
            let all = members(0..count, 1);
            let counts = counts(&owners(&all, maglev(slots)));
            assert_eq!(counts.len(), usize::from(count));
            let (least, most) = (
                counts.values().min().unwrap(),
                counts.values().max().unwrap(),
            );
            assert!(most - least <= 1, "{least} to {most}");
        }
    }

    /// F11: weights are respected within two percent, by both algorithms.
    #[test]
    fn f11_weights_are_respected() {
        let weights = [1, 2, 3, 10, 100, 64];
        let mut all = members(0..6, 1);
        for (member, weight) in all.iter_mut().zip(weights) {
            member.weight = weight;
        }
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        for selection in [Selection::Random, maglev(LARGEST), maglev(16_381)] {
            let owners = owners(&all, selection);
            let counts = counts(&owners);
            let slots = f64::from(u32::try_from(owners.len()).unwrap());
            for member in &all {
                let share = f64::from(counts[&member.address]) / slots;
                let fair = f64::from(member.weight) / total;
                let off = (share / fair - 1.0).abs();
                assert!(off < 0.02, "{selection:?}: weight {}: {off}", member.weight);
            }
        }
    }

    /// F11: far apart weights are approximated, and nobody is left without.
    #[test]
    fn f11_the_lightest_member_has_a_slot() {
        let mut all = members(0..4, 1);
        for (member, weight) in all.iter_mut().zip([1, u16::MAX, 1, 30_000]) {
            member.weight = weight;
        }
        for selection in [Selection::Random, maglev(LARGEST), maglev(1_021)] {
            let counts = counts(&owners(&all, selection));
            assert_eq!(counts.len(), 4, "{selection:?}");
            let heavy = counts[&all[1].address];
            assert!(heavy > 2 * counts[&all[3].address]);
        }
        // Equal weights, whatever they are, are one slot each.
        for member in &mut all {
            member.weight = 12;
        }
        assert_eq!(slots_of(&all, Selection::Random), [1, 2, 3, 4]);
    }

    /// F11: a change of one weight moves little else.
    #[test]
    fn f11_a_new_weight_moves_its_own_share_only() {
        let mut all = members(0..10, 1);
        let before = owners(&all, maglev(LARGEST));
        all[3].weight = 2;
        let after = owners(&all, maglev(LARGEST));
        let gained = all[3].address;
        let stray = before
            .iter()
            .zip(&after)
            .filter(|(old, new)| old != new && **new != gained)
            .count();
        assert!(stray * 100 <= before.len(), "{stray}");
    }

    #[test]
    fn one_member_needs_one_slot_and_too_many_get_one_each() {
        assert_eq!(slots_of(&members([9], 5), maglev(LARGEST)), [5]);
        assert_eq!(slots_of(&[], maglev(LARGEST)), [0; 0]);
        assert_eq!(slots_of(&members(0..3, 5), maglev(2)), [5, 6, 7]);
    }

    /// F9: the seed decides too: clients that know the addresses cannot tell the table.
    #[test]
    fn f9_seeds_give_other_tables() {
        let all = members(0..5, 1);
        let other = Selection::Maglev {
            seed: SEED + 1,
            slots: 1_021,
        };
        let same = owners(&all, maglev(1_021))
            .iter()
            .zip(owners(&all, other))
            .filter(|(a, b)| *a == b)
            .count();
        assert!((120..300).contains(&same), "{same}");
    }

    proptest! {
        /// F9: nodes that gave other ids, in another order, have the same table.
        #[test]
        fn f9_ids_do_not_matter(
            hosts in subsequence((0..40_u16).collect::<Vec<_>>(), 1..20),
            v6 in any::<bool>(),
            first in (1..1_000_u32, 1..1_000_u32),
            weights in proptest::collection::vec(1..20_u16, 20),
            slots in select(vec![31, 1_021]),
            random in any::<bool>(),
        ) {
            let selection = if random { Selection::Random } else { maglev(slots) };
            let node = |ids: &mut dyn Iterator<Item = u32>| -> Vec<Member> {
                hosts
                    .iter()
                    .zip(ids)
                    .zip(&weights)
                    .map(|((host, id), weight)| Member {
                        address: address(*host, v6),
                        weight: *weight,
                        id,
                    })
                    .collect()
            };
            let here = node(&mut (first.0..));
            let there = node(&mut (1..=first.1 + 40).rev());
            prop_assert_eq!(owners(&here, selection), owners(&there, selection));
        }
    }
}
