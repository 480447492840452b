//! Hashes that kernel and agent must agree on: guard positions, selection, check words.
//!
//! All are multiply-and-xor mixers in the manner of wyhash and splitmix64: a few multiplications,
//! no table, no loop. None is a defence by itself: selection and the port search mix in a secret
//! seed of the node, so that an outsider cannot choose a backend or make ports collide.

use crate::{Address, Be16};

/// The 64-bit golden ratio, splitmix64's increment.
pub const M1: u64 = 0x9e37_79b9_7f4a_7c15;
/// First multiplier of splitmix64's finaliser.
pub const M2: u64 = 0xbf58_476d_1ce4_e5b9;
/// Second multiplier of splitmix64's finaliser.
pub const M3: u64 = 0x94d0_49bb_1331_11eb;

/// splitmix64's finaliser: a bijection in which every input bit reaches every output bit.
#[must_use]
#[inline(always)]
pub const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(M2);
    x = (x ^ (x >> 27)).wrapping_mul(M3);
    x ^ (x >> 31)
}

/// The 32-bit hash of a client's tuple that selection and the source-port search start from.
///
/// `source_port` is 0 for services with ClientIP affinity: their clients then pick the same
/// backend from every port (SEMANTICS F5) while the table stands.
#[must_use]
#[inline(always)]
pub fn flow_hash<A: Address>(
    seed: u64,
    source: A,
    destination: A,
    source_port: Be16,
    destination_port: Be16,
    protocol: u8,
) -> u32 {
    let ports = (source_port.0 as u64) << 32 | (destination_port.0 as u64) << 16 | protocol as u64;
    let addresses = source
        .fold()
        .wrapping_mul(M1)
        .wrapping_add(destination.fold())
        .wrapping_mul(M3);
    (mix(addresses ^ ports ^ seed) >> 32) as u32
}

/// Maps a 32-bit hash onto `0..length` without a division (multiply-shift); 0 for length 0.
#[must_use]
#[inline(always)]
pub const fn scale(hash: u32, length: u32) -> u32 {
    ((hash as u64 * length as u64) >> 32) as u32
}

/// Folds an address for [`crate::guard`]; the caller masks it to the table's size.
#[must_use]
#[inline(always)]
pub fn address_hash<A: Address>(address: A) -> u32 {
    (address.fold().wrapping_mul(M1) >> 32) as u32
}

/// Hashes a text: FNV-1a, mixed. The same on every machine and in every version.
#[must_use]
pub const fn text_hash(text: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut bytes = text.as_bytes();
    while let [first, rest @ ..] = bytes {
        hash = (hash ^ *first as u64).wrapping_mul(0x0100_0000_01b3);
        bytes = rest;
    }
    mix(hash)
}
