//! What is known of the packet on its walk.
//!
//! Lives in a per-CPU element: the stack has 512 bytes for all frames together, and what the
//! verifier reads back from a map it does not track, which keeps the number of paths small. One
//! packet at a time is on a CPU: the hooks run with softirqs off, and redirects happen after the
//! program.

use core::arch::asm;

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use svc_lb_common::conntrack::{Flow, FlowKey};
use svc_lb_common::fragment::FragmentKey;
use svc_lb_common::outcome::Outcome;
use svc_lb_common::{Address, Be16, Family, Protocol};

use crate::guard::Concern;
use crate::packet::MAX_QUOTED_WORDS;
use crate::parse::{Fragment, Payload, Transport};
use crate::reject::Complaint;
use crate::service::Target;

/// A packet whose headers have been read, and the flow it belongs to.
#[repr(C)]
pub(crate) struct Met<A: Address> {
    /// Its tuple as it was met, and the direction.
    pub(crate) key: FlowKey<A>,
    /// The flow: found, or being opened.
    pub(crate) flow: Flow<A>,
    /// Key of the flow's other entry.
    pub(crate) peer_key: FlowKey<A>,
    /// The other entry, as it must be.
    pub(crate) peer: Flow<A>,
    /// An entry that is in the way of it.
    pub(crate) other: Flow<A>,
    /// What it has in common with other fragments of its datagram, if it is one.
    pub(crate) fragment_key: FragmentKey<A>,
    /// The service that a packet without a flow is for.
    pub(crate) target: Target,
    /// The kernel's answer to where a packet goes on to.
    pub(crate) route: FibLookup,
    /// What it quotes, if it is an ICMP error about a flow's packet.
    pub(crate) related: Related<A>,
    /// The ICMP error that it is answered with.
    pub(crate) complaint: Complaint<A>,
    /// The part of the packet that an ICMP error quotes.
    pub(crate) quoted: [u32; MAX_QUOTED_WORDS],
    /// The hash that a new flow's decisions start from.
    pub(crate) hash: u32,
    /// Offset of the network header.
    pub(crate) l3: u32,
    /// Offset of the transport header.
    pub(crate) l4: u32,
    /// State bits that the packet sets.
    pub(crate) gained: u32,
    /// State bits that the packet clears.
    pub(crate) lost: u32,
    /// TCP flags; of SCTP what is like them, 0 for UDP.
    pub(crate) flags: u8,
    /// Why it may concern us.
    pub(crate) concern: Concern,
    /// What became of it so far.
    pub(crate) outcome: Outcome,
    /// Non-zero: the backend, a pod of this node, has vanished, and the client is to be told.
    pub(crate) vanished: u8,
    /// Which part of a datagram it is. A later one has no transport header: nothing that is read or
    /// written at `l4`, no flags, and the ports of its first one.
    pub(crate) fragment: Fragment,
    /// Non-zero: the flow being opened must have a translated source port.
    pub(crate) translate_port: u8,
}

/// An ICMP error about a flow's packet. The tuple of [`Met::key`] is then what an answer to the quoted
/// packet would have, and [`Met::peer`] says what that is on the other side.
#[repr(C)]
pub(crate) struct Related<A: Address> {
    /// Who sent the error.
    pub(crate) from: A,
    /// Offset of the quoted network header.
    pub(crate) l3: u32,
    /// Offset of the quoted transport header.
    pub(crate) l4: u32,
    /// Where the error ends: a frame may be longer.
    pub(crate) end: u32,
}

/// FIN of [`Met::flags`].
pub(crate) const FIN: u8 = 1;
/// SYN.
pub(crate) const SYN: u8 = 1 << 1;
/// RST.
pub(crate) const RST: u8 = 1 << 2;
/// ACK.
pub(crate) const ACK: u8 = 1 << 4;

impl<A: Address> Met<A> {
    /// Notes what has been read.
    #[inline(always)]
    pub(crate) fn set(
        &mut self,
        (source, destination): (A, A),
        l3: usize,
        transport: &Transport,
        direction: u8,
    ) {
        self.key = FlowKey::new(
            source,
            destination,
            transport.source_port,
            transport.destination_port,
            transport.protocol as u8,
            direction,
        );
        self.l3 = l3 as u32;
        self.l4 = transport.l4 as u32;
        self.flags = transport.flags;
        self.vanished = 0;
    }

    /// Notes what a later fragment has in place of a transport header.
    #[inline(always)]
    pub(crate) fn set_later(
        &mut self,
        addresses @ (source, destination): (A, A),
        l3: usize,
        payload: &Payload,
        direction: u8,
    ) {
        self.set_fragment(addresses, payload, direction);
        let none = Be16::new(0);
        self.key = FlowKey::new(source, destination, none, none, 0, direction);
        self.l3 = l3 as u32;
        self.l4 = payload.l4 as u32;
        self.flags = 0;
        self.vanished = 0;
    }

    /// Notes which part of which datagram it is.
    #[inline(always)]
    pub(crate) fn set_fragment(
        &mut self,
        (source, destination): (A, A),
        payload: &Payload,
        direction: u8,
    ) {
        self.fragment = payload.fragment;
        let protocol = match A::FAMILY {
            Family::V4 => payload.protocol,
            Family::V6 => 0,
        };
        self.fragment_key = FragmentKey::new(source, destination, payload.id, protocol, direction);
    }

    /// Makes everything about the packet unknown: what follows is verified once, not once for each
    /// way through the parser. Older kernels (before 6.4) compare every scalar they know when a
    /// program has functions, so a constant that is still in a register makes another path.
    #[inline(always)]
    pub(crate) fn settle(&mut self) -> &mut Self {
        let mut met = core::ptr::from_mut(self);
        // SAFETY: a move of the register to itself. It is said to change any memory, so fields are
        // read from memory again.
        unsafe { asm!("{0} = {0}", inout(reg) met, options(preserves_flags, nostack)) };
        // SAFETY: the same reference, reborrowed.
        unsafe { &mut *met }
    }

    /// Whether it is SCTP.
    #[inline(always)]
    pub(crate) fn is_sctp(&self) -> bool {
        self.key.protocol == Protocol::Sctp as u8
    }

    /// Whether it is TCP.
    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        self.key.protocol == Protocol::Tcp as u8
    }

    /// Whether it is UDP; else it has connections, TCP's or SCTP's.
    #[inline(always)]
    pub(crate) fn is_udp(&self) -> bool {
        self.key.protocol == Protocol::Udp as u8
    }

    /// Whether it is a fragment without a transport header.
    #[inline(always)]
    pub(crate) fn is_later(&self) -> bool {
        self.fragment == Fragment::Later
    }

    /// The flow's state after the packet.
    #[inline(always)]
    pub(crate) fn state(&self) -> u32 {
        self.flow.state & !self.lost | self.gained
    }

    /// A SYN that opens a connection.
    #[inline(always)]
    pub(crate) fn is_bare_syn(&self) -> bool {
        is_bare_syn(self.flags)
    }
}

/// Whether these TCP flags are a SYN's that opens a connection.
#[inline(always)]
pub(crate) fn is_bare_syn(flags: u8) -> bool {
    flags & (SYN | ACK | RST | FIN) == SYN
}
