//! SCTP's checksum (RFC 9260 6.8 and appendix A), changed without reading what it covers.
//!
//! CRC32c is linear: what a change of some bits makes of the checksum depends on those bits and on how
//! far they are from the end alone, so that new ports cost the logarithm of the packet's length.

/// Castagnoli's polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Lengths have 16 bits.
const POWERS: usize = 16;
/// Nibbles of a register.
const NIBBLES: usize = 8;
/// Elements of [`TABLE`].
pub const TABLE_SIZE: usize = POWERS * NIBBLES * 16;

/// What becomes of each nibble of a register that 2^n zero bytes are shifted into: by n, then by the
/// nibble's position, then by its value.
pub const TABLE: [u32; TABLE_SIZE] = table();

/// The register after `bytes` zero bytes, at most 65,535.
#[must_use]
#[inline(always)]
pub fn shift(mut register: u32, bytes: u32, table: &[u32; TABLE_SIZE]) -> u32 {
    let mut power = 0;
    while power < POWERS {
        if bytes >> power & 1 != 0 {
            let mut shifted = 0;
            let mut nibble = 0;
            while nibble < NIBBLES {
                let value = (register >> (nibble * 4)) as usize & 15;
                shifted ^= table[((power * NIBBLES + nibble) * 16 + value) & (TABLE_SIZE - 1)];
                nibble += 1;
            }
            register = shifted;
        }
        power += 1;
    }
    register
}

/// The checksum field after the first four bytes of a packet of `length` bytes, the ports, changed from `old`
/// to `new`. All three as they lie in the packet, read in the machine's order on a little-endian
/// machine; SCTP's checksum is the one field that lies there in that order.
#[must_use]
#[inline(always)]
pub fn update(check: u32, old: u32, new: u32, length: u32, table: &[u32; TABLE_SIZE]) -> u32 {
    let change = shift(u32::from_le(old ^ new), length, table);
    check ^ change.to_le()
}

const fn table() -> [u32; TABLE_SIZE] {
    // By power and bit.
    let mut images = [[0_u32; 32]; POWERS];
    let mut bit = 0;
    while bit < 32 {
        let mut register = 1_u32 << bit;
        let mut step = 0;
        while step < 8 {
            let out = register & 1;
            register = (register >> 1) ^ (out * POLYNOMIAL);
            step += 1;
        }
        images[0][bit] = register;
        bit += 1;
    }
    let mut power = 1;
    while power < POWERS {
        bit = 0;
        while bit < 32 {
            images[power][bit] = apply(&images[power - 1], images[power - 1][bit]);
            bit += 1;
        }
        power += 1;
    }
    let mut table = [0; TABLE_SIZE];
    let mut index = 0;
    while index < TABLE_SIZE {
        let (power, rest) = (index / (NIBBLES * 16), index % (NIBBLES * 16));
        let (nibble, value) = (rest / 16, rest % 16);
        table[index] = apply(&images[power], (value as u32) << (nibble * 4));
        index += 1;
    }
    table
}

const fn apply(images: &[u32; 32], register: u32) -> u32 {
    let mut out = 0;
    let mut bit = 0;
    while bit < 32 {
        if register >> bit & 1 != 0 {
            out ^= images[bit];
        }
        bit += 1;
    }
    out
}
