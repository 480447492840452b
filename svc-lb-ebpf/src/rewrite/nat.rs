//! Addresses and ports, with their checksums.

use core::mem::offset_of;

use network_types::ip::Ipv4Hdr;
use network_types::sctp::SctpHdr;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;
use svc_lb_common::checksum::difference;
use svc_lb_common::conntrack::{Flow, FlowKey};
use svc_lb_common::{Address, Be16, Family as Af, crc32c};

use crate::forward::Route;
use crate::met::Met;
use crate::packet::{Packet, Step, Sum, TransportChecksum, Wire};

/// Offset of the header checksum in an IPv4 header.
pub(super) const IP_CHECK: usize = offset_of!(Ipv4Hdr, check);
/// Offset of the destination port; the source's is 0, in TCP, UDP and SCTP alike.
const DESTINATION_PORT: usize = offset_of!(UdpHdr, dst);

/// Rewrites a packet's addresses and ports to its flow's.
///
/// Checksums go first: a kernel that refuses to change one leaves the packet as it was.
#[inline(always)]
pub(crate) fn translate<P: Packet, F: Route<Addr: Wire>>(
    packet: &P,
    met: &Met<F::Addr>,
) -> Step<()> {
    let Met { key, flow, .. } = met;
    let (l3, l4) = (met.l3 as usize, met.l4 as usize);
    let addresses = difference(
        key.source.word_sum() + key.destination.word_sum(),
        flow.source.word_sum() + flow.destination.word_sum(),
    );
    let v6 = F::Addr::FAMILY == Af::V6;
    if met.is_later() {
        if !v6 {
            packet.update_ip_checksum(l3 + IP_CHECK, addresses)?;
        }
        return store_addresses::<P, F>(packet, met);
    }
    let check = if met.is_udp() {
        offset_of!(UdpHdr, check)
    } else {
        offset_of!(TcpHdr, check)
    };
    let kind = TransportChecksum {
        zero_is_none: met.is_udp(),
        v6,
    };
    if met.is_sctp() {
        update_sctp::<P, F>(packet, met)?;
    } else {
        packet.update_transport_checksum(
            l4 + check,
            kind,
            addresses,
            port_difference(key, flow),
        )?;
    }
    if !v6 {
        packet.update_ip_checksum(l3 + IP_CHECK, addresses)?;
    }
    store_addresses::<P, F>(packet, met)?;
    if flow.source_port != key.source_port {
        packet.store(l4, &flow.source_port)?;
    }
    if flow.destination_port != key.destination_port {
        packet.store(l4 + DESTINATION_PORT, &flow.destination_port)?;
    }
    Ok(())
}

/// Writes the flow's addresses where they are others than the packet's.
#[inline(always)]
fn store_addresses<P: Packet, F: Route<Addr: Wire>>(packet: &P, met: &Met<F::Addr>) -> Step<()> {
    let Met { key, flow, .. } = met;
    // Nothing in a later fragment of IPv6 makes up for them.
    let kind = if F::Addr::FAMILY == Af::V6 && met.is_later() {
        Sum::Changes
    } else {
        Sum::Stays
    };
    let at = met.l3 as usize + F::SOURCE;
    if flow.source != key.source {
        packet.store_as(at, &flow.source, kind)?;
    }
    if flow.destination != key.destination {
        packet.store_as(at + size_of::<F::Addr>(), &flow.destination, kind)?;
    }
    Ok(())
}

/// Changes an SCTP packet's checksum to that of its flow's ports; it covers no addresses.
#[inline(never)]
fn update_sctp<P: Packet, F: Route<Addr: Wire>>(packet: &P, met: &Met<F::Addr>) -> Step<()> {
    let Met { key, flow, .. } = met;
    let (l3, l4) = (met.l3 as usize, met.l4 as usize);
    let ports = |source: Be16, destination: Be16| source.0 as u32 | (destination.0 as u32) << 16;
    let old = ports(key.source_port, key.destination_port);
    let new = ports(flow.source_port, flow.destination_port);
    if old == new {
        return Ok(());
    }
    // A header that says less than there is has no right checksum anyway.
    let length = (F::length(packet, l3)? as usize)
        .saturating_sub(l4 - l3)
        .max(SctpHdr::LEN);
    let at = l4 + offset_of!(SctpHdr, checksum);
    let check = packet.load::<u32>(at)?;
    // Not computed yet: the kernel does so when the packet leaves, over a field that must be 0. (Of packets
    // with a checksum one in 2^32 has 0; it is lost, and sent again with other numbers.)
    if check == 0 {
        return Ok(());
    }
    packet.store(at, &crc32c::update(check, old, new, length as u32, &CRC32C))
}

/// A copy of the programs' own.
static CRC32C: [u32; crc32c::TABLE_SIZE] = crc32c::TABLE;

/// The ports' part of the checksum's change; 0 where they stay.
#[inline(always)]
fn port_difference<A: Address>(key: &FlowKey<A>, flow: &Flow<A>) -> u32 {
    let old = key.source_port.0 as u32 + key.destination_port.0 as u32;
    let new = flow.source_port.0 as u32 + flow.destination_port.0 as u32;
    if old == new {
        return 0;
    }
    difference(old, new)
}
