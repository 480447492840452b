//! Sending a translated packet on: up the stack, across the client's bridge, back to the pod, or away
//! by a route of its own.

use core::mem::offset_of;

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use network_types::udp::UdpHdr;
use svc_lb_common::conntrack::flow;
use svc_lb_common::edge::Edge;
use svc_lb_common::link::{self, Link};
use svc_lb_common::outcome::{Hook, Outcome};
use svc_lb_common::{Address, Be16};

use crate::family::Family;
use crate::maps::{EDGES, LINKS, snapshot};
use crate::met::Met;
use crate::outcome::Verdict;
use crate::packet::{Leaves, Packet, Step, Wire};
use crate::parse::TCP_DATA_OFFSET;
use crate::rewrite::{self, TimeToLive};

/// BPF_FIB_LKUP_RET_SUCCESS.
const FIB_SUCCESS: i64 = 0;
/// BPF_FIB_LKUP_RET_NOT_FWDED.
const FIB_NOT_FORWARDED: i64 = 4;
/// BPF_FIB_LKUP_RET_NO_NEIGH.
const FIB_NO_NEIGHBOUR: i64 = 7;
/// BPF_FIB_LKUP_RET_FRAG_NEEDED.
const FIB_TOO_BIG: i64 = 8;

/// What the agent says about the interface.
#[inline(always)]
pub(crate) fn edge(interface: u32) -> Option<Edge> {
    let edge = EDGES.get_ptr(interface)?;
    // SAFETY: the element stays mapped while the program runs. Interfaces come and go rarely; a
    // packet that sees its neighbour's entry for once is met as one of that kind.
    Some(unsafe { snapshot(edge) })
}

/// Sends a packet on that came in at an edge and has been translated.
#[inline(always)]
pub(crate) fn inbound<P: Packet, F: Family + TimeToLive + Route>(
    packet: &P,
    met: &mut Met<F::Addr>,
    outcome: Outcome,
) -> Step<Verdict> {
    let flow = &met.flow;
    if flow.traits & flow::HAIRPIN != 0 {
        F::decrement(packet, met.l3 as usize)?;
        rewrite::swap(packet)?;
        let reverse = flow.traits & flow::REVERSE != 0;
        let outcome = if reverse {
            Outcome::HairpinReverse
        } else {
            Outcome::Hairpin
        };
        return Ok(Verdict::Back(outcome));
    }
    if flow.traits & flow::BRIDGED != 0 && packet.hook() == Hook::TcIngress {
        stay_on_bridge::<P, F>(packet, met)?;
    }
    Ok(Verdict::On(outcome))
}

/// Where the backend is behind the client's own bridge, addresses the frame to the backend: both
/// directions then stay at layer 2, and netfilter sees neither, instead of one.
///
/// Where it is not, or the neighbour is unknown yet, the frame goes up the stack as it is.
#[inline(never)]
fn stay_on_bridge<P: Packet, F: Family + Route>(packet: &P, met: &mut Met<F::Addr>) -> Step<()> {
    let Some(edge) = edge(packet.interface()) else {
        return Ok(());
    };
    let route = &mut met.route;
    route.family = F::AF;
    route.l4_protocol = 0;
    route.sport = 0;
    route.dport = 0;
    route.__bindgen_anon_1.tot_len = 0;
    route.ifindex = edge.bridge;
    F::set_route(packet, met)?;
    let route = &raw mut met.route;
    // SAFETY: `route` is the helper's own type and lies in the per-CPU element.
    let status =
        unsafe { bpf_fib_lookup(packet.context(), route, size_of::<FibLookup>() as i32, 0) };
    let route = &met.route;
    if status == FIB_SUCCESS && route.ifindex == edge.bridge {
        rewrite::set_destination(packet, &route.dmac)?;
    }
    Ok(())
}

/// Where a translated packet goes, as the kernel's routes say. As wide as [`Outcome`]: undefined bytes
/// in what is returned beside it would be whatever a register held.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum Way {
    /// To a neighbour whose address is known.
    Known,
    /// To a neighbour that must be resolved.
    Unresolved,
    /// It is for this node itself.
    Here,
    /// Nowhere in this size.
    TooBig,
}

/// Asks the kernel for the way from `met.flow.source` to `met.flow.destination`; what it answers
/// lies in `met.route`.
#[inline(never)]
pub(crate) fn way<P: Packet, F: Family + Route>(packet: &P, met: &mut Met<F::Addr>) -> Step<Way> {
    let length = length::<P, F>(packet, met)?;
    let route = &mut met.route;
    route.family = F::AF;
    route.l4_protocol = 0;
    route.sport = 0;
    route.dport = 0;
    route.__bindgen_anon_1.tot_len = length;
    route.ifindex = packet.interface();
    F::set_route(packet, met)?;
    let route = &raw mut met.route;
    // SAFETY: `route` is the helper's own type and lies in the per-CPU element.
    let status =
        unsafe { bpf_fib_lookup(packet.context(), route, size_of::<FibLookup>() as i32, 0) };
    match status {
        FIB_SUCCESS => Ok(Way::Known),
        FIB_NO_NEIGHBOUR => Ok(Way::Unresolved),
        FIB_NOT_FORWARDED => Ok(Way::Here),
        FIB_TOO_BIG => Ok(Way::TooBig),
        _ => Err(Outcome::NoRoute),
    }
}

/// Length of the packet on the wire from its network header on: of one segment, where the kernel
/// will cut it into several. 0, which asks for no comparison, where it fits into no u16.
#[inline(always)]
fn length<P: Packet, F: Route>(packet: &P, met: &Met<F::Addr>) -> Step<u16> {
    let segment = packet.segment();
    // (SCTP's segments are not of one size.)
    if segment == 0 || met.is_sctp() {
        return F::length(packet, met.l3 as usize);
    }
    let header = if met.is_udp() {
        UdpHdr::LEN as u32
    } else {
        let [offset, _] = packet.load::<[u8; 2]>(met.l4 as usize + TCP_DATA_OFFSET)?;
        (offset as u32 >> 4) * 4
    };
    Ok((segment + header + met.l4 - met.l3) as u16)
}

/// The address that a translated source gets on the interface that [`way`] has found.
#[inline(always)]
pub(crate) fn source<F: Family>(met: &Met<F::Addr>) -> Option<F::Addr> {
    address_on::<F>(met.route.ifindex)
}

/// This node's address on an interface.
#[inline(always)]
pub(crate) fn address_on<F: Family>(interface: u32) -> Option<F::Addr> {
    let address = F::source_of(&link(interface)?);
    (address != F::Addr::UNSPECIFIED).then_some(address)
}

/// What the agent says about an interface that packets leave through.
#[inline(always)]
fn link(interface: u32) -> Option<Link> {
    let link = LINKS.get_ptr(interface)?;
    // SAFETY: the element stays mapped while the program runs. Interfaces come and go rarely; a
    // flow that gets its neighbour's address for once has answers go there.
    Some(unsafe { snapshot(link) })
}

/// Sends a packet on along a flow with a translated source: not by way of the stack, to which it
/// would look forged.
#[inline(never)]
pub(crate) fn away<P: Packet, F: Family<Addr: Wire> + TimeToLive + Route>(
    packet: &P,
    met: &mut Met<F::Addr>,
) -> Step<Verdict> {
    let l3 = met.l3 as usize;
    let way = way::<P, F>(packet, met)?;
    match way {
        Way::TooBig => return Err(Outcome::TooBig),
        Way::Here => return Err(Outcome::NoRoute),
        Way::Known | Way::Unresolved => {}
    }
    if packet.hook() == Hook::XdpIngress && (way == Way::Unresolved || !xdp_sends(packet, met)) {
        return Err(Outcome::LeftToTc);
    }
    if F::expires(packet, l3)? {
        return Err(Outcome::TimeExceeded);
    }
    rewrite::translate::<P, F>(packet, met)?;
    F::decrement(packet, l3)?;
    match packet.leave(&met.route)? {
        Leaves::Back => Ok(Verdict::Back(met.outcome)),
        Leaves::Away => Ok(Verdict::Away(met.outcome)),
    }
}

/// Sends an ICMP error on that has been translated: as the packets it belongs to.
#[inline(always)]
pub(crate) fn related<P: Packet, F: Family + TimeToLive>(
    packet: &P,
    met: &Met<F::Addr>,
) -> Step<Verdict> {
    if met.flow.traits & flow::HAIRPIN == 0 {
        return Ok(Verdict::On(met.outcome));
    }
    F::decrement(packet, met.l3 as usize)?;
    rewrite::swap(packet)?;
    Ok(Verdict::Back(met.outcome))
}

/// Translates an ICMP error about a flow with a translated source and sends it on. Nobody is told of one that
/// cannot go on (RFC 1122 3.2.2).
#[inline(always)]
pub(crate) fn related_away<P: Packet, F: Family<Addr: Wire> + TimeToLive + Route>(
    packet: &P,
    met: &mut Met<F::Addr>,
) -> Step<Verdict> {
    match way::<P, F>(packet, met)? {
        Way::Known | Way::Unresolved => {}
        Way::TooBig | Way::Here => return Err(Outcome::NoRoute),
    }
    rewrite::relate::<P, F>(packet, met)?;
    F::decrement(packet, met.l3 as usize)?;
    match packet.leave(&met.route)? {
        Leaves::Back => Ok(Verdict::Back(met.outcome)),
        Leaves::Away => Ok(Verdict::Away(met.outcome)),
    }
}

/// Whether XDP can send the packet where its route leads: a driver takes frames there.
#[inline(always)]
fn xdp_sends<P: Packet, A: Address>(packet: &P, met: &Met<A>) -> bool {
    let interface = met.route.ifindex;
    let takes = || link(interface).is_some_and(|link| link.bits & link::XDP != 0);
    interface == packet.interface() || takes()
}

/// A family that can ask the kernel for a route.
pub(crate) trait Route: Family {
    /// Fills in the addresses of a translated packet.
    fn set_route<P: Packet>(packet: &P, met: &mut Met<Self::Addr>) -> Step<()>;
    /// Length of the packet from its network header at `l3` on.
    fn length<P: Packet>(packet: &P, l3: usize) -> Step<u16>;
}

impl Route for crate::family::V4 {
    #[inline(always)]
    fn set_route<P: Packet>(packet: &P, met: &mut Met<Self::Addr>) -> Step<()> {
        let [_, tos] = packet.load::<[u8; 2]>(met.l3 as usize)?;
        let route = &mut met.route;
        route.__bindgen_anon_2.tos = tos;
        route.__bindgen_anon_3.ipv4_src = met.flow.source.0;
        route.__bindgen_anon_4.ipv4_dst = met.flow.destination.0;
        Ok(())
    }

    #[inline(always)]
    fn length<P: Packet>(packet: &P, l3: usize) -> Step<u16> {
        Ok(packet
            .load::<Be16>(l3 + offset_of!(Ipv4Hdr, tot_len))?
            .get())
    }
}

impl Route for crate::family::V6 {
    #[inline(always)]
    fn set_route<P: Packet>(packet: &P, met: &mut Met<Self::Addr>) -> Step<()> {
        // Traffic class and flow label, without the version.
        let label = packet.load::<u32>(met.l3 as usize)? & 0x0fff_ffff_u32.to_be();
        let route = &mut met.route;
        route.__bindgen_anon_2.flowinfo = label;
        route.__bindgen_anon_3.ipv6_src = met.flow.source.0;
        route.__bindgen_anon_4.ipv6_dst = met.flow.destination.0;
        Ok(())
    }

    #[inline(always)]
    fn length<P: Packet>(packet: &P, l3: usize) -> Step<u16> {
        let payload = packet.load::<Be16>(l3 + offset_of!(Ipv6Hdr, payload_len))?;
        Ok(payload.get().saturating_add(Ipv6Hdr::LEN as u16))
    }
}
