//! TCP, UDP and SCTP.

use core::mem::offset_of;

use network_types::sctp::SctpHdr;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;
use svc_lb_common::outcome::Outcome;
use svc_lb_common::{Be16, Protocol};

use super::{Payload, Transport};
use crate::met::{ACK, FIN, RST, SYN};
use crate::packet::{Packet, Step};

/// Offset of the byte that holds a TCP header's length.
pub(crate) const TCP_DATA_OFFSET: usize = offset_of!(TcpHdr, _bitfield_1);

/// Reads ports and flags. [`Outcome::OtherProtocol`] for other protocols.
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
        Some(Protocol::Sctp) => {
            packet.ensure(l4 + SctpHdr::LEN + CHUNK)?;
            packet.load::<u32>(l4 + offset_of!(SctpHdr, checksum))?;
            let [chunk, ..] = packet.load::<[u8; CHUNK]>(l4 + SctpHdr::LEN)?;
            ports(packet, Protocol::Sctp, l4, sctp_flags(chunk))
        }
        None => Err(Outcome::OtherProtocol),
    }
}

/// Length of a chunk's header.
const CHUNK: usize = 4;

/// What the first chunk of an SCTP packet says about its association, in TCP's words (RFC 9260 3.2, 5.1 and
/// 9): whoever opens or ends one says so in a packet's first chunk.
#[inline(always)]
fn sctp_flags(chunk: u8) -> u8 {
    const INIT: u8 = 1;
    const INIT_ACK: u8 = 2;
    const ABORT: u8 = 6;
    const SHUTDOWN: u8 = 7;
    const SHUTDOWN_ACK: u8 = 8;
    match chunk {
        INIT => SYN,
        INIT_ACK => SYN | ACK,
        ABORT => RST | ACK,
        SHUTDOWN | SHUTDOWN_ACK => FIN | ACK,
        _ => ACK,
    }
}

/// The ports lie at the same place in all three headers.
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
