//! Internet checksums (RFC 1071, RFC 1624), pure: used by the programs on XDP frames, by the tests
//! to check every emitted packet.
//!
//! Words are taken as they lie in memory; the sum is independent of byte order (RFC 1071 section
//! 2(B)), so nothing is swapped.

/// Folds a sum of 16-bit words to 16 bits with the carries added back in.
#[must_use]
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The difference that replacing words of sum `old` by words of sum `new` makes to a checksummed
/// sum; `old` is at most 0x000f_fff0 (16 words).
#[must_use]
#[inline(always)]
pub const fn difference(old: u32, new: u32) -> u32 {
    (!fold(old)) as u32 + fold(new) as u32
}

/// A checksum field after the summed words changed by `difference` (RFC 1624, equation 3).
#[must_use]
#[inline(always)]
pub const fn update(check: u16, difference: u32) -> u16 {
    !fold((!check) as u32 + fold(difference) as u32)
}

/// A UDP checksum field after such a change: 0 means "none" and stays; a result of 0 is sent as
/// 0xffff (RFC 768).
#[must_use]
#[inline(always)]
pub const fn update_udp(check: u16, difference: u32) -> u16 {
    if check == 0 {
        return 0;
    }
    match update(check, difference) {
        0 => 0xffff,
        check => check,
    }
}

/// Sums bytes as 16-bit words in memory order, an odd last byte padded with zero, onto `sum`.
///
/// At most 128 KiB may be summed before folding.
#[must_use]
pub fn sum(mut sum: u32, bytes: &[u8]) -> u32 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    for pair in pairs {
        sum += u16::from_ne_bytes(*pair) as u32;
    }
    if let [last] = rest {
        sum += u16::from_ne_bytes([*last, 0]) as u32;
    }
    sum
}
