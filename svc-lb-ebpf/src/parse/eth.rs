//! Ethernet.

use network_types::eth::{EthHdr, EtherType};
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

/// Finds the network header.
///
/// A tagged frame belongs to a VLAN interface above this one, which is an edge of its own or none of ours; its
/// tag may have been taken off already, so that its protocol alone would mislead.
#[inline(always)]
pub(crate) fn network<P: Packet>(packet: &P) -> Step<Network> {
    if packet.vlan_taken_off() {
        return Err(Outcome::Vlan);
    }
    match packet.load::<EthHdr>(0)?.ether_type {
        IPV4 => Ok(Network::V4(EthHdr::LEN)),
        IPV6 => Ok(Network::V6(EthHdr::LEN)),
        VLAN | QINQ => Err(Outcome::Vlan),
        _ => Err(Outcome::NotIp),
    }
}
