//! Answering a TCP packet with the reset of its connection, which it turns into and goes back as.

use network_types::tcp::TcpHdr;
use svc_lb_common::Address as _;
use svc_lb_common::Protocol;
use svc_lb_common::checksum::{fold, sum};
use svc_lb_common::outcome::Outcome;

use crate::forward::Route;
use crate::met::{ACK, FIN, Met, RST, SYN};
use crate::outcome::Verdict;
use crate::packet::{Packet, Step, TransportChecksum, Wire};
use crate::parse::TCP_DATA_OFFSET;
use crate::reject::{self, Unreachable};
use crate::rewrite;

/// Number of the checksum's byte in a TCP header.
const CHECK: usize = core::mem::offset_of!(TcpHdr, check);

/// Answers a packet of a connection that nobody knows any more, as its backend would (RFC 9293 3.10.7.1).
///
/// The limit of generated packets or RFC 1122 3.2.2 may forbid it.
#[inline(never)]
pub(crate) fn answer<P: Packet, F: Unreachable<Addr: Wire> + Route>(
    packet: &P,
    met: &mut Met<F::Addr>,
) -> Step<Verdict> {
    reject::may_answer::<P, F>(packet, met)?;
    let numbers = numbers::<P, F>(packet, met)?;
    let met = met.settle();
    let (l3, source, destination) = (met.l3 as usize, met.key.source, met.key.destination);
    let l4 = l3 + F::HEADER;
    packet.resize((l4 + TcpHdr::LEN) as u32)?;
    let [p0, p1] = met.key.destination_port.0.to_ne_bytes();
    let [p2, p3] = met.key.source_port.0.to_ne_bytes();
    let [s0, s1, s2, s3] = numbers.sequence.to_be_bytes();
    let [a0, a1, a2, a3] = numbers.acknowledged.to_be_bytes();
    let mut header = [
        p0,
        p1,
        p2,
        p3,
        s0,
        s1,
        s2,
        s3,
        a0,
        a1,
        a2,
        a3,
        0x50,
        numbers.flags,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    let pseudo = sum(
        source.word_sum() + destination.word_sum(),
        &[0, Protocol::Tcp as u8, 0, TcpHdr::LEN as u8],
    );
    let pseudo = fold(pseudo);
    // With CHECKSUM_PARTIAL the field holds the pseudo header's sum, and stays; else it is taken for a checksum, and
    // changed to that of everything.
    let everything = sum(2 * pseudo as u32, &header);
    [header[CHECK], header[CHECK + 1]] = pseudo.to_ne_bytes();
    packet.store(l4, &header)?;
    let kind = TransportChecksum {
        zero_is_none: false,
        v6: false,
    };
    packet.update_transport_checksum(l4 + CHECK, kind, 0, everything)?;
    F::write_header(
        packet,
        l3,
        (destination, source),
        Protocol::Tcp as u8,
        TcpHdr::LEN,
    )?;
    packet.store(l3 + F::SOURCE, &destination)?;
    packet.store(l3 + F::SOURCE + size_of::<F::Addr>(), &source)?;
    rewrite::swap(packet)?;
    Ok(Verdict::Back(Outcome::Reset))
}

/// What a reset says.
struct Numbers {
    sequence: u32,
    acknowledged: u32,
    flags: u8,
}

/// What the sender of a segment takes a reset for valid by: the number it acknowledged, or an acknowledgement of all that
/// it sent.
#[inline(always)]
fn numbers<P: Packet, F: Route>(packet: &P, met: &Met<F::Addr>) -> Step<Numbers> {
    let l4 = met.l4 as usize;
    let number = |offset: usize| Ok(u32::from_be(packet.load::<u32>(l4 + offset)?));
    if met.flags & ACK != 0 {
        return Ok(Numbers {
            sequence: number(core::mem::offset_of!(TcpHdr, ack_seq))?,
            acknowledged: 0,
            flags: RST,
        });
    }
    let [offset, _] = packet.load::<[u8; 2]>(l4 + TCP_DATA_OFFSET)?;
    let headers = met.l4 - met.l3 + (offset as u32 >> 4) * 4;
    let data = (F::length(packet, met.l3 as usize)? as u32).saturating_sub(headers);
    let ends = (met.flags & SYN != 0) as u32 + (met.flags & FIN != 0) as u32;
    let sequence = number(core::mem::offset_of!(TcpHdr, seq))?;
    Ok(Numbers {
        sequence: 0,
        acknowledged: sequence.wrapping_add(data).wrapping_add(ends),
        flags: RST | ACK,
    })
}
