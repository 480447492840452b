//! The guard: one array read that tells whether an address may concern us at all.
//!
//! An array of u64 words, each with 16 nibbles; an address hashes to one nibble. A clear bit
//! is a promise; a set bit only a hint, settled by the exact maps. The agent counts the addresses
//! behind each bit and clears it only after the last flow through them is gone.

use crate::Address;
use crate::hash::address_hash;

/// The address may be a frontend: ClusterIP, external IP or load balancer address.
pub const FRONTEND: u8 = 1;
/// The address may be one of this node's that serve NodePorts; [`port_position`]
/// then decides about the port.
pub const NODE: u8 = 2;
/// The address may be a backend's.
pub const BACKEND: u8 = 4;

/// Nibbles in one word.
pub const NIBBLES: u32 = 16;

/// Where an address's nibble lies: word index and shift inside the word.
///
/// `words` is the table's size in words and a power of two.
#[must_use]
#[inline(always)]
pub fn address_position<A: Address>(address: A, words: u32) -> (u32, u32) {
    let hash = address_hash(address);
    let nibble = hash & (words * NIBBLES - 1);
    (nibble >> 4, (nibble & 15) * 4)
}

/// Where an address lies in `guard_direct`: jiffies64 when a direct flow with a translated source
/// port to such an address was last opened; 0 where there is none.
#[must_use]
#[inline(always)]
pub fn direct_position<A: Address>(address: A) -> u32 {
    address_hash(address) & (crate::limits::GUARD_DIRECT - 1)
}

/// Words of the port bitmap: 65,536 ports for each of TCP, UDP and SCTP.
pub const PORT_WORDS: u32 = 3 * 65_536 / 64;

/// Where a port's bit lies: word index and bit. `port` is in host byte order.
#[must_use]
#[inline(always)]
pub const fn port_position(protocol: crate::Protocol, port: u16) -> (u32, u32) {
    let table = match protocol {
        crate::Protocol::Tcp => 0,
        crate::Protocol::Udp => 1,
        crate::Protocol::Sctp => 2,
    };
    (table * (65_536 / 64) + (port as u32 >> 6), port as u32 & 63)
}
