//! Ethernet, 802.1Q and 802.1ad.

use network_types::eth::{EthHdr, EtherType};
use network_types::vlan::VlanHdr;
use svc_lb_common::outcome::Outcome;

use crate::packet::{Packet, Step};

/// The network protocol of a frame and where its header lies.
#[derive(Clone, Copy)]
pub(crate) enum Network {
    /// IPv4 at this offset.
    V4(usize),
    /// IPv6 at this offset.
    V6(usize),
}

const IPV4: u16 = EtherType::Ipv4 as u16;
const IPV6: u16 = EtherType::Ipv6 as u16;
const VLAN: u16 = EtherType::Ieee8021q as u16;
const QINQ: u16 = EtherType::Ieee8021ad as u16;

/// Finds the network header behind at most two VLAN tags.
///
/// An skb whose tag the kernel has taken off belongs to a VLAN interface above this one: it looks
/// untagged, so its protocol alone would mislead.
#[inline(always)]
pub(crate) fn network<P: Packet>(packet: &P) -> Step<Network> {
    if packet.vlan_taken_off() {
        return Err(Outcome::Vlan);
    }
    let mut ether_type = packet.load::<EthHdr>(0)?.ether_type;
    let mut offset = EthHdr::LEN;
    let mut tags = 0;
    while tags < 2 && (ether_type == VLAN || ether_type == QINQ) {
        ether_type = packet.load::<VlanHdr>(offset)?.ether_type;
        offset += VlanHdr::LEN;
        tags += 1;
    }
    match ether_type {
        IPV4 => Ok(Network::V4(offset)),
        IPV6 => Ok(Network::V6(offset)),
        VLAN | QINQ => Err(Outcome::Vlan),
        _ => Err(Outcome::NotIp),
    }
}
