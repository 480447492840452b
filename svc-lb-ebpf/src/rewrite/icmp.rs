//! An ICMP error about a translated packet, and the quote in it.

use core::mem::offset_of;

use network_types::icmp::Icmpv4Hdr;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;
use svc_lb_common::checksum::{self, difference};
use svc_lb_common::{Address as _, Family as Af, Protocol};

use super::nat::IP_CHECK;
use crate::family::Family;
use crate::met::Met;
use crate::packet::{Packet, Step, TransportChecksum, Wire};

/// Offset of the checksum in an ICMP header, both versions.
const CHECK: usize = offset_of!(Icmpv4Hdr, check);
/// Offset of the destination port; the source's is 0.
const DESTINATION_PORT: usize = offset_of!(UdpHdr, dst);

/// Makes an error about a packet that has been translated one about the packet that its sender sent.
///
/// The quote's addresses, ports and checksums become those of `met.peer`, turned around; the error's own addresses those of
/// `met.flow`. A quoted checksum that was right stays right as far as the quote holds it; SCTP's, which nobody
/// can check without the whole packet, stays as it is.
#[inline(never)]
pub(crate) fn relate<P: Packet, F: Family<Addr: Wire>>(packet: &P, met: &Met<F::Addr>) -> Step<()> {
    let Met {
        key,
        flow,
        peer,
        related,
        ..
    } = met;
    let (l3, icmp) = (met.l3 as usize, met.l4 as usize);
    let (quote, transport) = (related.l3 as usize, related.l4 as usize);
    let v6 = F::Addr::FAMILY == Af::V6;
    let quoted = difference(
        key.source.word_sum() + key.destination.word_sum(),
        peer.source.word_sum() + peer.destination.word_sum(),
    );
    let ports = difference(
        key.source_port.0 as u32 + key.destination_port.0 as u32,
        peer.source_port.0 as u32 + peer.destination_port.0 as u32,
    );
    // All that changes in the message.
    let mut changes = quoted + ports;
    if !v6 {
        let at = quote + IP_CHECK;
        let old = packet.load::<u16>(at)?;
        let new = checksum::update(old, quoted);
        changes += difference(old as u32, new as u32);
        packet.store(at, &new)?;
    }
    if let Some(offset) = check_of(key.protocol) {
        let at = transport + offset;
        let end = at + size_of::<u16>();
        // Often the quote ends before it.
        let _beyond = packet.ensure(end);
        if end <= related.end as usize
            && let Ok(old) = packet.load::<u16>(at)
        {
            let new = if key.protocol == Protocol::Udp as u8 {
                checksum::update_udp(old, quoted + ports)
            } else {
                checksum::update(old, quoted + ports)
            };
            changes += difference(old as u32, new as u32);
            packet.store(at, &new)?;
        }
    }
    let own = difference(
        related.from.word_sum() + key.destination.word_sum(),
        flow.source.word_sum() + flow.destination.word_sum(),
    );
    let kind = TransportChecksum {
        zero_is_none: false,
        v6,
    };
    // ICMP's checksum covers addresses only in IPv6's pseudo header.
    packet.update_transport_checksum(icmp + CHECK, kind, if v6 { own } else { 0 }, changes)?;
    if !v6 {
        packet.update_ip_checksum(l3 + IP_CHECK, own)?;
    }
    packet.store(l3 + F::SOURCE, &flow.source)?;
    packet.store(l3 + F::SOURCE + size_of::<F::Addr>(), &flow.destination)?;
    packet.store(quote + F::SOURCE, &peer.destination)?;
    packet.store(quote + F::SOURCE + size_of::<F::Addr>(), &peer.source)?;
    packet.store(transport, &peer.destination_port)?;
    packet.store(transport + DESTINATION_PORT, &peer.source_port)
}

/// Offset of a transport's checksum where addresses and ports are in it.
#[inline(always)]
fn check_of(protocol: u8) -> Option<usize> {
    match Protocol::from_number(protocol)? {
        Protocol::Tcp => Some(offset_of!(TcpHdr, check)),
        Protocol::Udp => Some(offset_of!(UdpHdr, check)),
        Protocol::Sctp => None,
    }
}
