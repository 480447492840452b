//! Ethernet addresses.

use crate::packet::{Packet, Step};

/// Offset of the destination address in an Ethernet header; the source follows.
const DESTINATION: usize = 0;

/// Sends the frame back to where it came from.
#[inline(always)]
pub(crate) fn swap<P: Packet>(packet: &P) -> Step<()> {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = packet.load::<[u8; 12]>(DESTINATION)?;
    packet.store(
        DESTINATION,
        &[s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5],
    )
}

/// Writes both addresses.
#[inline(always)]
pub(crate) fn set_both<P: Packet>(packet: &P, destination: [u8; 6], source: [u8; 6]) -> Step<()> {
    let [d0, d1, d2, d3, d4, d5] = destination;
    let [s0, s1, s2, s3, s4, s5] = source;
    packet.store(
        DESTINATION,
        &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5],
    )
}

/// Addresses the frame to a neighbour.
#[inline(always)]
pub(crate) fn set_destination<P: Packet>(packet: &P, mac: &[u8; 6]) -> Step<()> {
    packet.store(DESTINATION, mac)
}
