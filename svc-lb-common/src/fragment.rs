//! Fragmented datagrams: what their first fragments said, for those that follow.

use crate::hash::{M1, M2, M3};
use crate::layout::record;
use crate::{Address, Be16};

record! {
    /// Key: what the fragments of one datagram have in common (RFC 791 3.2, RFC 8200 4.5), and where
    /// they are met.
    pub struct FragmentKey<A> = (16, 40) {
        /// Source address before translation.
        pub source: A,
        /// Destination address before translation.
        pub destination: A,
        /// Identification, as it lies in the packet; IPv4's has 16 bits.
        pub id: u32,
        /// IANA protocol number; 0 for IPv6, whose later fragments need not say the same as the
        /// first.
        pub protocol: u8,
        /// Of the flow's entry: [`conntrack::INBOUND`](crate::conntrack::INBOUND) or
        /// [`conntrack::OUTBOUND`](crate::conntrack::OUTBOUND).
        pub direction: u8,
        /// Zero.
        pub reserved: [u8; 2],
    }
}

record! {
    /// The rest of the key of the flow that the datagram belongs to.
    pub struct FirstFragment = 16 {
        /// [`FirstFragment::expected_check`] of the key and of the other fields.
        pub check: u32,
        /// Low 32 bits of jiffies when the first fragment came.
        pub seen: u32,
        /// Source port before translation.
        pub source_port: Be16,
        /// Destination port before translation.
        pub destination_port: Be16,
        /// IANA protocol number.
        pub protocol: u8,
        /// Zero.
        pub reserved: [u8; 3],
    }
}

/// How long after the first fragment others belong to the same datagram: Linux puts together
/// IPv4's for so long (`net.ipv4.ipfrag_time`). IPv6 has twice that; ids are then reused.
pub const REASSEMBLY_SECONDS: u32 = 30;

impl<A: Address> FragmentKey<A> {
    /// A key.
    #[must_use]
    #[inline(always)]
    pub const fn new(source: A, destination: A, id: u32, protocol: u8, direction: u8) -> Self {
        Self {
            source,
            destination,
            id,
            protocol,
            direction,
            reserved: [0; 2],
        }
    }
}

impl FirstFragment {
    /// A value.
    #[must_use]
    #[inline(always)]
    pub const fn new(seen: u32, source_port: Be16, destination_port: Be16, protocol: u8) -> Self {
        Self {
            check: 0,
            seen,
            source_port,
            destination_port,
            protocol,
            reserved: [0; 3],
        }
    }

    /// The check word that belongs to `key` and this value; see
    /// [`Flow::expected_check`](crate::conntrack::Flow::expected_check).
    #[must_use]
    #[inline(always)]
    pub fn expected_check<A: Address>(&self, key: &FragmentKey<A>) -> u32 {
        let identity = key.id as u64 | (key.protocol as u64) << 32 | (key.direction as u64) << 40;
        let ports = self.source_port.0 as u64
            | (self.destination_port.0 as u64) << 16
            | (self.seen as u64) << 32;
        let sum = (key.source.fold().wrapping_mul(M1))
            .wrapping_add(key.destination.fold().wrapping_mul(M2))
            .wrapping_add(identity.wrapping_mul(M3))
            .wrapping_add(ports.wrapping_mul((M1 ^ M2) | 1))
            .wrapping_add((self.protocol as u64).wrapping_mul((M2 ^ M3) | 1));
        (sum >> 32) as u32 ^ sum as u32
    }

    /// The value with its check word set for `key`.
    #[must_use]
    #[inline(always)]
    pub fn sealed<A: Address>(mut self, key: &FragmentKey<A>) -> Self {
        self.check = self.expected_check(key);
        self
    }

    /// Whether this copy really is `key`'s value.
    #[must_use]
    #[inline(always)]
    pub fn belongs_to<A: Address>(&self, key: &FragmentKey<A>) -> bool {
        self.check == self.expected_check(key)
    }
}
