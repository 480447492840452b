//! TTL and hop limit, as a router's.

use core::mem::offset_of;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use svc_lb_common::checksum::difference;
use svc_lb_common::outcome::Outcome;

use crate::family::{V4, V6};
use crate::packet::{Packet, Step};

/// A header with a hop count.
pub(crate) trait TimeToLive {
    /// Whether none would be left after this hop, at the network header `l3`.
    fn expires<P: Packet>(packet: &P, l3: usize) -> Step<bool>;
    /// Takes one off at the network header `l3`; ends the packet where none would be left (RFC
    /// 1812 5.3.1).
    fn decrement<P: Packet>(packet: &P, l3: usize) -> Step<()>;
}

impl TimeToLive for V4 {
    #[inline(always)]
    fn expires<P: Packet>(packet: &P, l3: usize) -> Step<bool> {
        let [ttl, _] = packet.load::<[u8; 2]>(l3 + offset_of!(Ipv4Hdr, ttl))?;
        Ok(ttl <= 1)
    }

    #[inline(always)]
    fn decrement<P: Packet>(packet: &P, l3: usize) -> Step<()> {
        let [ttl, protocol] = packet.load::<[u8; 2]>(l3 + offset_of!(Ipv4Hdr, ttl))?;
        if ttl <= 1 {
            return Err(Outcome::TtlExceeded);
        }
        let word = |ttl: u8| u16::from_ne_bytes([ttl, protocol]) as u32;
        let change = difference(word(ttl), word(ttl - 1));
        packet.update_ip_checksum(l3 + offset_of!(Ipv4Hdr, check), change)?;
        packet.store(l3 + offset_of!(Ipv4Hdr, ttl), &[ttl - 1, protocol])
    }
}

impl TimeToLive for V6 {
    #[inline(always)]
    fn expires<P: Packet>(packet: &P, l3: usize) -> Step<bool> {
        let [_, limit] = packet.load::<[u8; 2]>(l3 + offset_of!(Ipv6Hdr, next_hdr))?;
        Ok(limit <= 1)
    }

    #[inline(always)]
    fn decrement<P: Packet>(packet: &P, l3: usize) -> Step<()> {
        let [next, limit] = packet.load::<[u8; 2]>(l3 + offset_of!(Ipv6Hdr, next_hdr))?;
        if limit <= 1 {
            return Err(Outcome::TtlExceeded);
        }
        packet.store(l3 + offset_of!(Ipv6Hdr, next_hdr), &[next, limit - 1])
    }
}
