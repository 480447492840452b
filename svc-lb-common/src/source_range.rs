//! loadBalancerSourceRanges: who may open flows through a service's load balancer addresses.

use crate::Address;
use crate::layout::record;

/// Bits of the service's index, which come before those of the range.
const SERVICE_BITS: u32 = u32::BITS;

/// The value of every key: that the key is there is what counts.
pub const ADMITTED: u32 = 1;

record! {
    /// What the kernel's trie compares, from the first byte on.
    pub struct Source<A> = (8, 20) {
        /// Index of the service: always compared whole, so that its byte order does not matter.
        pub service: u32,
        /// The client, or the first address of a range.
        pub address: A,
    }
}

record! {
    /// Key of `source_ranges`: the trie wants the number of bits that count in front.
    pub struct SourceRangeKey<A> = (12, 24) {
        /// The bits of [`Source`] that count: the service's and those of the range's prefix.
        pub bits: u32,
        /// Whose range, and which.
        pub source: Source<A>,
    }
}

impl<A: Address> Source<A> {
    /// All bits: what a client is looked up with.
    pub const BITS: u32 = size_of::<Self>() as u32 * 8;

    /// A client of a service.
    #[must_use]
    #[inline(always)]
    pub const fn new(service: u32, address: A) -> Self {
        Self { service, address }
    }
}

impl<A: Address> SourceRangeKey<A> {
    /// The key of a range with a prefix of `prefix` bits.
    #[must_use]
    pub const fn new(service: u32, address: A, prefix: u8) -> Self {
        Self {
            bits: SERVICE_BITS + prefix as u32,
            source: Source::new(service, address),
        }
    }

    /// Bits of the range's prefix; `None` where not even the service counts.
    #[must_use]
    pub const fn prefix(&self) -> Option<u8> {
        match self.bits.checked_sub(SERVICE_BITS) {
            Some(prefix) => Some(prefix as u8),
            None => None,
        }
    }
}
