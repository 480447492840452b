//! TCP and UDP.

use core::mem::offset_of;

use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;
use svc_lb_common::outcome::Outcome;
use svc_lb_common::{Be16, Protocol};

use super::{Payload, Transport};
use crate::packet::{Packet, Step};

/// Reads ports and flags. [`Outcome::OtherProtocol`] for what is not TCP or UDP.
#[inline(always)]
pub(crate) fn transport<P: Packet>(packet: &P, payload: &Payload) -> Step<Transport> {
    let l4 = payload.l4;
    match Protocol::from_number(payload.protocol) {
        Some(Protocol::Tcp) => {
            // All of it up to the options: no more than that is changed.
            packet.ensure(l4 + TcpHdr::LEN)?;
            let [_, flags, ..] = packet.load::<[u8; 8]>(l4 + offset_of!(TcpHdr, _bitfield_1))?;
            ports(packet, Protocol::Tcp, l4, flags)
        }
        Some(Protocol::Udp) => {
            packet.ensure(l4 + UdpHdr::LEN)?;
            packet.load::<u16>(l4 + offset_of!(UdpHdr, check))?;
            ports(packet, Protocol::Udp, l4, 0)
        }
        Some(Protocol::Sctp) | None => Err(Outcome::OtherProtocol),
    }
}

/// The ports lie at the same place in both headers.
#[inline(always)]
fn ports<P: Packet>(packet: &P, protocol: Protocol, l4: usize, flags: u8) -> Step<Transport> {
    Ok(Transport {
        protocol,
        source_port: packet.load::<Be16>(l4 + offset_of!(UdpHdr, src))?,
        destination_port: packet.load::<Be16>(l4 + offset_of!(UdpHdr, dst))?,
        flags,
        l4,
    })
}
