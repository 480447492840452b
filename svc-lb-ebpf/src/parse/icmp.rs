//! ICMP: which messages tell of other packets, and what they quote of them.

use svc_lb_common::Be16;
use svc_lb_common::outcome::Outcome;

use super::{Fragment, Ip, Walk, ip};
use crate::family::{V4, V6};
use crate::packet::{Packet, Step};

/// Length of an ICMP header, both versions; the quote follows.
pub(crate) const HEADER: usize = 8;
/// Bytes of the transport header that every quote holds (RFC 792).
const LEAST: usize = 8;

/// What a message says.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Message {
    /// What became of a packet, which it quotes.
    Error,
    /// That there is a shorter way for a packet, which it quotes.
    Redirect,
    /// Something else.
    Other,
}

/// A family's messages.
pub(crate) trait Messages: Walk {
    /// What a message of this type says.
    fn message(kind: u8) -> Message;
}

impl Messages for V4 {
    #[inline(always)]
    fn message(kind: u8) -> Message {
        match kind {
            // Unreachable, source quench, time exceeded, parameter problem.
            3 | 4 | 11 | 12 => Message::Error,
            5 => Message::Redirect,
            _ => Message::Other,
        }
    }
}

impl Messages for V6 {
    #[inline(always)]
    fn message(kind: u8) -> Message {
        match kind {
            // RFC 4443 2.1: below 128 are errors; of these we know unreachable, too big, time
            // exceeded and parameter problem. Redirects are between neighbours.
            1..=4 => Message::Error,
            _ => Message::Other,
        }
    }
}

/// What is quoted: a packet that went the other way.
pub(crate) struct Quote<F: Walk> {
    /// Its network header.
    pub(crate) ip: Ip<F>,
    /// Offset of its transport header.
    pub(crate) l4: usize,
    /// IANA number of its transport.
    pub(crate) protocol: u8,
    /// Its ports.
    pub(crate) source_port: Be16,
    /// See above.
    pub(crate) destination_port: Be16,
}

/// Reads the packet that is quoted at `l3`.
#[inline(always)]
pub(crate) fn quote<P: Packet, F: Messages>(packet: &P, l3: usize) -> Step<Quote<F>> {
    let ip = ip::<P, F>(packet, l3)?;
    let payload = F::payload(packet, &ip)?;
    // Later fragments have no ports.
    if payload.fragment == Fragment::Later {
        return Err(Outcome::OtherProtocol);
    }
    packet.ensure(payload.l4 + LEAST)?;
    Ok(Quote {
        ip,
        l4: payload.l4,
        protocol: payload.protocol,
        source_port: packet.load::<Be16>(payload.l4)?,
        destination_port: packet.load::<Be16>(payload.l4 + size_of::<Be16>())?,
    })
}
