//! Sending a translated packet on: up the stack, across the client's bridge, or back to the pod.

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use svc_lb_common::conntrack::flow;
use svc_lb_common::edge::Edge;
use svc_lb_common::outcome::{Hook, Outcome};

use crate::family::Family;
use crate::maps::{EDGES, snapshot};
use crate::met::Met;
use crate::outcome::Verdict;
use crate::packet::{Packet, Step};
use crate::rewrite::{self, TimeToLive};

/// BPF_FIB_LKUP_RET_SUCCESS.
const FIB_SUCCESS: i64 = 0;

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
    met: &Met<F::Addr>,
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
fn stay_on_bridge<P: Packet, F: Family + Route>(packet: &P, met: &Met<F::Addr>) -> Step<()> {
    let Some(edge) = edge(packet.interface()) else {
        return Ok(());
    };
    // SAFETY: plain integers and unions of them; zero is a value of each.
    let mut route: FibLookup = unsafe { core::mem::zeroed() };
    route.family = F::AF;
    route.ifindex = edge.bridge;
    F::set_route(packet, &mut route, met)?;
    // SAFETY: `route` is the helper's own type and lives through the call.
    let status = unsafe {
        bpf_fib_lookup(
            packet.context(),
            &raw mut route,
            size_of::<FibLookup>() as i32,
            0,
        )
    };
    if status == FIB_SUCCESS && route.ifindex == edge.bridge {
        rewrite::set_destination(packet, &route.dmac)?;
    }
    Ok(())
}

/// A family that can ask the kernel for a route.
pub(crate) trait Route: Family {
    /// Fills in the addresses of a translated packet.
    fn set_route<P: Packet>(packet: &P, route: &mut FibLookup, met: &Met<Self::Addr>) -> Step<()>;
}

impl Route for crate::family::V4 {
    #[inline(always)]
    fn set_route<P: Packet>(packet: &P, route: &mut FibLookup, met: &Met<Self::Addr>) -> Step<()> {
        let [_, tos] = packet.load::<[u8; 2]>(met.l3 as usize)?;
        route.__bindgen_anon_2.tos = tos;
        route.__bindgen_anon_3.ipv4_src = met.flow.source.0;
        route.__bindgen_anon_4.ipv4_dst = met.flow.destination.0;
        Ok(())
    }
}

impl Route for crate::family::V6 {
    #[inline(always)]
    fn set_route<P: Packet>(packet: &P, route: &mut FibLookup, met: &Met<Self::Addr>) -> Step<()> {
        // Traffic class and flow label, without the version.
        let label = packet.load::<u32>(met.l3 as usize)? & 0x0fff_ffff_u32.to_be();
        route.__bindgen_anon_2.flowinfo = label;
        route.__bindgen_anon_3.ipv6_src = met.flow.source.0;
        route.__bindgen_anon_4.ipv6_dst = met.flow.destination.0;
        Ok(())
    }
}
