//! The pure functions that both sides compute, against definitions written another way.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use svc_lb_common::conntrack::{Flow, FlowKey, INBOUND, OUTBOUND};
use svc_lb_common::crc32c;
use svc_lb_common::outcome::{COUNTERS, Event, Hook, Lru, Outcome, Tally, counter};
use svc_lb_common::service::{Frontend, FrontendKey, Range, Service, kind, slot};
use svc_lb_common::{
    Addr4, Addr6, Be16, Family, HostAddress as _, Protocol, checksum, guard, hash,
};

/// The Internet checksum by its definition: RFC 1071, big-endian words, end-around carry.
fn by_definition(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    for pair in bytes.chunks(2) {
        let word = match pair {
            [high, low] => [*high, *low],
            [high] => [*high, 0],
            _ => unreachable!("chunks of one or two"),
        };
        sum += u64::from(u16::from_be_bytes(word));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

/// RFC 1071 section 3's example: the words 0001 f203 f4f5 f6f7 sum to ddf2.
#[test]
fn rfc_1071_example() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(
        checksum::fold(checksum::sum(0, &bytes)).to_ne_bytes(),
        [0xdd, 0xf2]
    );
    assert_eq!(by_definition(&bytes), !0xddf2);
}

/// RFC 1624 section 4's example: checksum dd2f, a word 5555 becomes 3285, the result is 0000.
#[test]
fn rfc_1624_example() {
    let word = |host: u16| host.to_be();
    let difference = checksum::difference(u32::from(word(0x5555)), u32::from(word(0x3285)));
    assert_eq!(checksum::update(word(0xdd2f), difference), word(0x0000));
}

/// RFC 768: no checksum stays none, and a computed 0 is sent as all ones.
#[test]
fn udp_zero() {
    assert_eq!(checksum::update_udp(0, 0x1234), 0);
    let difference =
        checksum::difference(u32::from(0x5555_u16.to_be()), u32::from(0x3285_u16.to_be()));
    assert_eq!(checksum::update_udp(0xdd2f_u16.to_be(), difference), 0xffff);
}

/// Outcomes and events each have their own counter and their own name.
#[test]
fn counters_and_names_are_unique() {
    let mut counters = BTreeSet::new();
    for hook in Hook::ALL {
        for outcome in Outcome::ALL {
            assert!(counters.insert(counter(*hook, *outcome)));
        }
    }
    for event in Event::ALL {
        assert!(counters.insert(event.index()));
    }
    for tally in Tally::ALL {
        for (map, family) in Lru::ALL
            .iter()
            .flat_map(|map| [(*map, Family::V4), (*map, Family::V6)])
        {
            assert!(counters.insert(tally.index(map, family)));
        }
    }
    assert_eq!(counters.len(), COUNTERS as usize);
    assert_eq!(counters.last(), Some(&(COUNTERS - 1)));
    let names: BTreeSet<_> = Outcome::ALL.iter().map(|outcome| outcome.name()).collect();
    assert_eq!(names.len(), Outcome::ALL.len());
    assert!(
        Outcome::ALL
            .iter()
            .all(|outcome| outcome.explanation().ends_with('.'))
    );
}

/// Every port of every protocol has its own bit inside the table.
#[test]
fn port_positions_are_distinct() {
    let mut seen = vec![0u64; guard::PORT_WORDS as usize];
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        for port in 0..=u16::MAX {
            let (word, bit) = guard::port_position(protocol, port);
            assert_eq!(seen[word as usize] >> bit & 1, 0);
            seen[word as usize] |= 1 << bit;
        }
    }
    assert!(seen.iter().all(|word| *word == u64::MAX));
}

fn flow() -> impl Strategy<Value = (FlowKey<Addr6>, Flow<Addr6>)> {
    (
        any::<[u128; 4]>(),
        any::<[u16; 6]>(),
        any::<[u32; 2]>(),
        any::<bool>(),
    )
        .prop_map(
            |([a, b, c, d], [p, q, r, s, generation, traits], [backend, service], inbound)| {
                let address = |bits: u128| Addr6::from(Ipv6Addr::from(bits));
                let direction = if inbound { INBOUND } else { OUTBOUND };
                let key = FlowKey::new(address(a), address(b), Be16(p), Be16(q), 6, direction);
                let flow = Flow {
                    check: 0,
                    source: address(c),
                    destination: address(d),
                    source_port: Be16(r),
                    destination_port: Be16(s),
                    backend,
                    service,
                    generation,
                    traits,
                    state: 0,
                    seen: 0,
                    proof: 0,
                };
                (key, flow)
            },
        )
}

/// CRC32c as RFC 9260 defines it, bit by bit.
fn crc32c_by_definition(bytes: &[u8]) -> u32 {
    let mut register = u32::MAX;
    for byte in bytes {
        register ^= u32::from(*byte);
        for _ in 0..8 {
            let out = register & 1;
            register = (register >> 1) ^ (out * 0x82f6_3b78);
        }
    }
    !register
}

/// The check value of CRC-32/ISCSI, as catalogues of CRCs give it.
#[test]
fn crc32c_check_value() {
    assert_eq!(crc32c_by_definition(b"123456789"), 0xe306_9283);
}

proptest! {
    /// A5: an SCTP checksum changed for new ports is the one computed anew, for any length.
    #[test]
    fn crc32c_update_is_recomputation(
        mut packet in prop::collection::vec(any::<u8>(), 12..3_000),
        ports in any::<[u8; 4]>(),
    ) {
        packet[8..12].fill(0);
        let before = crc32c_by_definition(&packet).to_le();
        let old = u32::from_ne_bytes(packet[..4].try_into().unwrap());
        let length = u32::try_from(packet.len()).unwrap();
        packet[..4].copy_from_slice(&ports);
        let new = u32::from_ne_bytes(ports);
        let after = crc32c::update(before, old, new, length, &crc32c::TABLE);
        prop_assert_eq!(after, crc32c_by_definition(&packet).to_le());
    }

    /// The longest packets there are.
    #[test]
    fn crc32c_shift_adds_up(register in any::<u32>(), first in 0..=65_535_u32, second in 0..=65_535_u32) {
        prop_assume!(first + second <= 65_535);
        let step = |register, bytes| crc32c::shift(register, bytes, &crc32c::TABLE);
        prop_assert_eq!(step(step(register, first), second), step(register, first + second));
    }

    /// Updating a checksum for changed words gives what computing it anew gives.
    #[test]
    fn update_is_recomputation(
        mut bytes in prop::collection::vec(any::<u8>(), 4..200),
        at in any::<prop::sample::Index>(),
        new in any::<[u8; 4]>(),
    ) {
        // The checksum's own word is apart; a real one never covers nothing but zeros.
        bytes[0] |= 0x40;
        let at = at.index((bytes.len() - 2) / 2) * 2;
        let before = by_definition(&bytes).to_be();
        let width = 4.min(bytes.len() - at) / 2 * 2;
        let old = bytes[at..at + width].to_vec();
        bytes[at..at + width].copy_from_slice(&new[..width]);
        prop_assume!(bytes.iter().any(|byte| *byte != 0));
        let difference = checksum::difference(checksum::sum(0, &old), checksum::sum(0, &new[..width]));
        prop_assert_eq!(checksum::update(before, difference), by_definition(&bytes).to_be());
    }

    /// A scaled hash lies inside the range, and every position can be reached.
    #[test]
    fn scale_stays_inside(hash in any::<u32>(), length in 1..=65_535_u32, position in any::<u32>()) {
        prop_assert!(hash::scale(hash, length) < length);
        let position = position % length;
        let lowest = (u64::from(position) << 32).div_ceil(u64::from(length));
        prop_assert_eq!(hash::scale(u32::try_from(lowest).unwrap(), length), position);
    }

    /// Packed words give back what went in.
    #[test]
    fn packing_round_trips(start in any::<u32>(), length in any::<u16>(), sequence in any::<u16>(), flags in any::<u32>(), seconds in any::<u32>(), ids in any::<[u32; 2]>()) {
        let range = Range::new(start, length, sequence);
        prop_assert_eq!((range.start(), range.length(), range.sequence()), (start, u32::from(length), sequence));
        let service = Service::new(range, Range::default(), flags, seconds);
        prop_assert_eq!((service.flags(), service.affinity_seconds()), (flags, seconds));
        let word = u64::from(ids[0]) | u64::from(ids[1]) << 32;
        prop_assert_eq!((slot(word, start & !1), slot(word, start | 1)), (ids[0], ids[1]));
    }

    /// Addresses survive the way into a record and out again.
    #[test]
    fn addresses_round_trip(v4 in any::<u32>(), v6 in any::<u128>()) {
        let (v4, v6) = (Ipv4Addr::from(v4), Ipv6Addr::from(v6));
        prop_assert_eq!(Addr4::from(v4).to_ip(), v4);
        prop_assert_eq!(Addr6::from(v6).to_ip(), v6);
    }

    /// A frontend's value belongs to its own key only.
    #[test]
    fn frontends_know_their_key(a in any::<u32>(), b in any::<u32>(), port in any::<u16>(), index in any::<u32>()) {
        prop_assume!(a != b);
        let key = |address: u32| FrontendKey::new(Addr4(address), Be16(port), 6);
        let value = Frontend::new(&key(a), index, kind::CLUSTER_IP);
        prop_assert!(value.belongs_to(&key(a)));
        prop_assert!(!value.belongs_to(&key(b)));
    }

    /// A flow's value belongs to its key; half of it beside half of another's does not.
    #[test]
    fn torn_flows_are_noticed((key, value) in flow(), (other_key, other) in flow()) {
        prop_assume!(value.source != other.source && value.destination != other.destination);
        let (mine, theirs) = (value.sealed(&key), other.sealed(&other_key));
        prop_assert!(mine.belongs_to(&key));
        prop_assert!(!theirs.belongs_to(&key));
        for torn in [
            Flow { source: theirs.source, ..mine },
            Flow { destination: theirs.destination, ..mine },
            Flow { check: mine.check, ..theirs },
        ] {
            prop_assert!(!torn.belongs_to(&key));
        }
    }
}
