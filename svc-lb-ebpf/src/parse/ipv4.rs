//! IPv4, with options.

use network_types::ip::Ipv4Hdr;
use svc_lb_common::outcome::Outcome;

use super::{Fragment, Ip, Payload};
use crate::family::V4;
use crate::packet::{Packet, Step};

/// "More fragments" of the flags and offset word.
const MORE_FRAGMENTS: u16 = 0x2000;
/// The offset in that word.
const OFFSET: u16 = 0x1fff;

/// Finds the transport header.
#[inline(always)]
pub(crate) fn payload<P: Packet>(packet: &P, ip: &Ip<V4>) -> Step<Payload> {
    let header = packet.load::<Ipv4Hdr>(ip.l3)?;
    let length = (header.vihl & 0xf) as usize * 4;
    if header.vihl >> 4 != 4 || length < Ipv4Hdr::LEN {
        return Err(Outcome::Malformed);
    }
    let word = u16::from_be_bytes(header.frags);
    let fragment = if word & OFFSET != 0 {
        Fragment::Later
    } else if word & MORE_FRAGMENTS != 0 {
        Fragment::First
    } else {
        Fragment::Whole
    };
    Ok(Payload {
        l4: ip.l3 + length,
        protocol: header.proto,
        fragment,
        id: u16::from_ne_bytes(header.id) as u32,
    })
}
