//! From bytes to one value: addresses, ports, flags, offsets. Parsed once, handed on by value.

mod eth;
pub(crate) mod icmp;
mod ipv4;
mod ipv6;
mod l4;

use svc_lb_common::{Be16, Protocol};

pub(crate) use self::eth::{Network, network};
pub(crate) use self::l4::{TCP_DATA_OFFSET, transport};
use crate::family::{Family, V4, V6};
use crate::packet::{Packet, Step, Wire};

/// The network header: enough for the guard.
#[derive(Clone, Copy)]
pub(crate) struct Ip<F: Family> {
    /// Source address.
    pub(crate) source: F::Addr,
    /// Destination address.
    pub(crate) destination: F::Addr,
    /// Offset of the network header.
    pub(crate) l3: usize,
}

/// Reads the addresses of the network header at `l3`.
#[inline(always)]
pub(crate) fn ip<P: Packet, F: Family<Addr: Wire>>(packet: &P, l3: usize) -> Step<Ip<F>> {
    packet.ensure(l3 + F::HEADER)?;
    let source = packet.load::<F::Addr>(l3 + F::SOURCE)?;
    let destination = packet.load::<F::Addr>(l3 + F::SOURCE + size_of::<F::Addr>())?;
    Ok(Ip {
        source,
        destination,
        l3,
    })
}

/// Where the transport header lies, and what it is.
#[derive(Clone, Copy)]
pub(crate) struct Payload {
    /// Offset of the transport header.
    pub(crate) l4: usize,
    /// IANA protocol number.
    pub(crate) protocol: u8,
    /// Which part of a datagram.
    pub(crate) fragment: Fragment,
    /// Which datagram, as it lies in the packet; not set if it is a whole one.
    pub(crate) id: u32,
}

/// Which part of a datagram a packet carries.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Fragment {
    /// All of it.
    Whole,
    /// The start, with the transport header.
    First,
    /// What follows; there is no transport header.
    Later,
}

/// A family whose headers can be walked to the transport header.
pub(crate) trait Walk: Family<Addr: Wire> {
    /// Finds the transport header.
    fn payload<P: Packet>(packet: &P, ip: &Ip<Self>) -> Step<Payload>;
}

impl Walk for V4 {
    #[inline(always)]
    fn payload<P: Packet>(packet: &P, ip: &Ip<Self>) -> Step<Payload> {
        ipv4::payload(packet, ip)
    }
}

impl Walk for V6 {
    #[inline(always)]
    fn payload<P: Packet>(packet: &P, ip: &Ip<Self>) -> Step<Payload> {
        ipv6::payload(packet, ip)
    }
}

/// Ports and flags of a transport header we translate.
#[derive(Clone, Copy)]
pub(crate) struct Transport {
    /// TCP or UDP.
    pub(crate) protocol: Protocol,
    /// Source port.
    pub(crate) source_port: Be16,
    /// Destination port.
    pub(crate) destination_port: Be16,
    /// TCP flags; 0 for other protocols.
    pub(crate) flags: u8,
    /// Offset of the transport header.
    pub(crate) l4: usize,
}
