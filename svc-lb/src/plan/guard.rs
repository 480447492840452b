//! How many addresses and ports stand behind each guard bit.

use std::collections::{BTreeMap, BTreeSet};

use svc_lb_common::Protocol;

use crate::dataplane::GuardBit;

/// In the order in which `guard_port` holds them.
const PORT_TABLES: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Counts behind the bits, and what is known about the bits themselves.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    addresses: Vec<u64>,
    ports: Vec<u64>,
    counts: BTreeMap<GuardBit, u32>,
    /// Counted, but perhaps not set.
    to_set: BTreeSet<GuardBit>,
    /// Not counted, but perhaps set: to be cleared when no flow needs it.
    to_clear: BTreeSet<GuardBit>,
}

impl Guard {
    /// Nothing counted; the bits as they are.
    pub(super) const fn new(addresses: Vec<u64>, ports: Vec<u64>) -> Self {
        Self {
            addresses,
            ports,
            counts: BTreeMap::new(),
            to_set: BTreeSet::new(),
            to_clear: BTreeSet::new(),
        }
    }

    /// Counts one more behind a bit.
    pub(super) fn hold(&mut self, bit: GuardBit) {
        let count = self.counts.entry(bit).or_insert(0);
        *count += 1;
        if *count == 1 {
            self.to_clear.remove(&bit);
            if !self.is_set(bit) {
                self.to_set.insert(bit);
            }
        }
    }

    /// Counts one less behind a bit.
    pub(super) fn release(&mut self, bit: GuardBit) {
        let Some(count) = self.counts.get_mut(&bit) else {
            debug_assert!(false, "{bit:?} is released more often than held");
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.counts.remove(&bit);
            self.to_set.remove(&bit);
            self.to_clear.insert(bit);
        }
    }

    /// Bits to be set now.
    pub(super) const fn to_set(&self) -> &BTreeSet<GuardBit> {
        &self.to_set
    }

    /// Bits to be cleared once no flow needs them.
    pub(super) const fn to_clear(&self) -> &BTreeSet<GuardBit> {
        &self.to_clear
    }

    /// A bit was set.
    pub(super) fn was_set(&mut self, bit: GuardBit) {
        self.write(bit, true);
        self.to_set.remove(&bit);
    }

    /// A bit was cleared, or perhaps was: then it stays to be cleared, and is set again if needed.
    pub(super) fn was_cleared(&mut self, bit: GuardBit, certain: bool) {
        self.write(bit, false);
        if self.counts.contains_key(&bit) {
            self.to_set.insert(bit);
        } else if certain {
            self.to_clear.remove(&bit);
        }
    }

    /// Finds the bits that are set and stand for nothing.
    pub(super) fn find_unheld(&mut self) {
        let unheld: Vec<_> = bits(&self.addresses, &self.ports)
            .filter(|bit| !self.counts.contains_key(bit))
            .collect();
        self.to_clear.extend(unheld);
    }

    /// Counted bits that tables do not have, and bits that they have and that stand for nothing.
    pub(super) fn differences(
        &self,
        addresses: &[u64],
        ports: &[u64],
    ) -> (Vec<GuardBit>, Vec<GuardBit>) {
        let missing = |bit: &&GuardBit| {
            let (word, mask) = bit.position();
            let table = match bit {
                GuardBit::Address { .. } => addresses,
                GuardBit::Port { .. } => ports,
            };
            table.get(word as usize).is_none_or(|word| word & mask == 0)
        };
        let missing = self.counts.keys().filter(missing).copied().collect();
        let strays = bits(addresses, ports)
            .filter(|bit| !self.counts.contains_key(bit) && !self.to_clear.contains(bit))
            .collect();
        (missing, strays)
    }

    /// These bits stand for nothing: to be cleared when no flow needs them.
    pub(super) fn clear_later(&mut self, bits: impl IntoIterator<Item = GuardBit>) {
        let unheld = bits
            .into_iter()
            .filter(|bit| !self.counts.contains_key(bit));
        self.to_clear.extend(unheld);
    }

    fn is_set(&self, bit: GuardBit) -> bool {
        let (word, mask) = bit.position();
        self.table(bit)
            .get(word as usize)
            .is_some_and(|word| word & mask != 0)
    }

    fn write(&mut self, bit: GuardBit, value: bool) {
        let (word, mask) = bit.position();
        let table = match bit {
            GuardBit::Address { .. } => &mut self.addresses,
            GuardBit::Port { .. } => &mut self.ports,
        };
        if let Some(word) = table.get_mut(word as usize) {
            *word = if value { *word | mask } else { *word & !mask };
        }
    }

    const fn table(&self, bit: GuardBit) -> &Vec<u64> {
        match bit {
            GuardBit::Address { .. } => &self.addresses,
            GuardBit::Port { .. } => &self.ports,
        }
    }
}

/// The bits that are set in both tables.
fn bits(addresses: &[u64], ports: &[u64]) -> impl Iterator<Item = GuardBit> {
    let addresses = set_bits(addresses).filter_map(|position| {
        let nibble = u32::try_from(position / 4).ok()?;
        let bit = 1 << (position % 4);
        Some(GuardBit::Address { nibble, bit })
    });
    let ports = set_bits(ports).filter_map(|position| {
        let protocol = *PORT_TABLES.get(position >> 16)?;
        let port = u16::try_from(position & 0xffff).ok()?;
        Some(GuardBit::Port { protocol, port })
    });
    addresses.chain(ports)
}

/// Positions of the bits that are set, counted over all words.
fn set_bits(words: &[u64]) -> impl Iterator<Item = usize> {
    words
        .iter()
        .enumerate()
        .filter(|(_, word)| **word != 0)
        .flat_map(|(index, word)| {
            (0..64)
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| index * 64 + bit)
        })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use svc_lb_common::guard::{BACKEND, FRONTEND, PORT_WORDS};

    use super::*;

    const WORDS: u32 = 64;

    fn guard() -> Guard {
        Guard::new(vec![0; WORDS as usize], vec![0; PORT_WORDS as usize])
    }

    fn bit(address: &str, bit: u8) -> GuardBit {
        GuardBit::address(address.parse::<IpAddr>().unwrap(), bit, WORDS)
    }

    #[test]
    fn a_bit_is_set_for_the_first_and_cleared_after_the_last() {
        let mut guard = guard();
        let bit = bit("10.0.0.1", FRONTEND);
        guard.hold(bit);
        guard.hold(bit);
        assert_eq!(guard.to_set().iter().collect::<Vec<_>>(), [&bit]);
        guard.was_set(bit);
        assert!(guard.to_set().is_empty());
        guard.release(bit);
        assert!(guard.to_clear().is_empty());
        guard.release(bit);
        assert!(guard.to_clear().contains(&bit));
        guard.was_cleared(bit, true);
        assert!(guard.to_clear().is_empty());
    }

    #[test]
    fn a_bit_that_was_perhaps_cleared_is_set_again_when_needed() {
        let mut guard = guard();
        let bit = bit("10.0.0.1", FRONTEND);
        guard.hold(bit);
        guard.was_set(bit);
        guard.release(bit);
        guard.was_cleared(bit, false);
        assert!(guard.to_clear().contains(&bit));
        guard.hold(bit);
        assert!(guard.to_set().contains(&bit));
        assert!(guard.to_clear().is_empty());
    }

    #[test]
    fn a_bit_whose_setting_was_never_confirmed_is_cleared_too() {
        let mut guard = guard();
        let bit = bit("10.0.0.1", FRONTEND);
        guard.hold(bit);
        guard.release(bit);
        assert!(guard.to_set().is_empty());
        assert!(guard.to_clear().contains(&bit));
    }

    #[test]
    fn bits_that_stand_for_nothing_are_found_at_their_positions() {
        let bits = [
            bit("10.0.0.1", FRONTEND),
            bit("fd00::1", BACKEND),
            GuardBit::Port {
                protocol: Protocol::Tcp,
                port: 30_000,
            },
            GuardBit::Port {
                protocol: Protocol::Sctp,
                port: 65_535,
            },
        ];
        let mut guard = guard();
        for bit in bits {
            guard.was_set(bit);
        }
        let held = bits[0];
        guard.hold(held);
        guard.find_unheld();
        let expected: BTreeSet<_> = bits.into_iter().filter(|bit| *bit != held).collect();
        assert_eq!(*guard.to_clear(), expected);
    }
}
