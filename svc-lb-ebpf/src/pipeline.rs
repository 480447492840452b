//! The packet's walk: one straight function per direction.
//!
//! entry -> guard -> parse -> conntrack hit?  -> rewrite -> forward -> outcome
//!                         `-> service -> admit -> select -> open -^

use svc_lb_common::Address as _;
use svc_lb_common::backend::LOCAL;
use svc_lb_common::config::{MASQUERADE_ALL, RESET_VANISHED, SNAT_ALWAYS};
use svc_lb_common::conntrack::{FlowKey, INBOUND, OUTBOUND, flow, state};
use svc_lb_common::edge::{POD, UPLINK, XDP};
use svc_lb_common::outcome::{Event, Hook, Outcome};
use svc_lb_common::service::{flag, kind};

use crate::admit;
use crate::config::enabled;
use crate::conntrack;
use crate::family::{V4, V6};
use crate::forward::{self, Route, Way};
use crate::fragment;
use crate::guard::{self, Concern};
use crate::met::{Met, RST, Related};
use crate::open;
use crate::outcome::Verdict;
use crate::packet::{Packet, Step, Wire};
use crate::parse::icmp::{self, Message, Messages};
use crate::parse::{self, Fragment, Ip, Network, Payload};
use crate::reject::{self, Unreachable};
use crate::reset;
use crate::rewrite::{self, TimeToLive};
use crate::select;
use crate::service::{self, Aim, Target};
use crate::stats;

/// What the pipeline asks of a family.
pub(crate) trait Stack: Messages<Addr: Wire> + Unreachable + TimeToLive + Route {}
impl Stack for V4 {}
impl Stack for V6 {}

/// A packet that comes in at an edge: a client's, or a hairpin's answer.
#[inline(always)]
pub(crate) fn ingress<P: Packet>(packet: &P) -> Step<Verdict> {
    match parse::network(packet)? {
        Network::V4(l3) => inbound::<P, V4>(packet, l3),
        Network::V6(l3) => inbound::<P, V6>(packet, l3),
    }
}

/// A packet that leaves through an edge: a backend's answer on its way to the client.
#[inline(always)]
pub(crate) fn egress<P: Packet>(packet: &P) -> Step<Verdict> {
    match parse::network(packet)? {
        Network::V4(l3) => outbound::<P, V4>(packet, l3),
        Network::V6(l3) => outbound::<P, V6>(packet, l3),
    }
}

#[inline(never)]
fn inbound<P: Packet, F: Stack>(packet: &P, l3: usize) -> Step<Verdict> {
    let ip = parse::ip::<P, F>(packet, l3)?;
    let concern = guard::inbound(&ip)?;
    let payload = F::payload(packet, &ip)?;
    if payload.protocol == F::ICMP {
        if packet.hook() == Hook::XdpIngress {
            // They are few.
            return Err(Outcome::LeftToTc);
        }
        return related::<P, F>(packet, &ip, &payload, INBOUND);
    }
    meet::<P, F>(packet, &ip, &payload, INBOUND, concern)?;
    let met = F::met().ok_or(Outcome::FlowInsert)?.settle();
    match carry::<P, F>(packet, met) {
        Err(outcome @ (Outcome::Rejected | Outcome::TooBig | Outcome::TimeExceeded)) => {
            reject::answer::<P, F>(packet, met, outcome)
        }
        Err(Outcome::Reset) => reset::answer::<P, F>(packet, met),
        result => result,
    }
}

/// Notes the packet's tuple, or that of its datagram.
///
/// A function of its own, for the sake of the stack of what follows.
#[inline(never)]
fn meet<P: Packet, F: Stack>(
    packet: &P,
    ip: &Ip<F>,
    payload: &Payload,
    direction: u8,
    concern: Concern,
) -> Step<()> {
    let met = F::met().ok_or(Outcome::FlowInsert)?;
    met.concern = concern;
    let addresses = (ip.source, ip.destination);
    if payload.fragment != Fragment::Later {
        let transport = parse::transport(packet, payload)?;
        if direction == INBOUND {
            guard::ports(concern, ip, &transport)?;
        }
        met.set(addresses, ip.l3, &transport, direction);
        met.set_fragment(addresses, payload, direction);
        return Ok(());
    }
    if direction == INBOUND {
        guard::later(concern, ip)?;
    }
    met.set_later(addresses, ip.l3, payload, direction);
    let met = met.settle();
    if fragment::recall::<F>(met) {
        return Ok(());
    }
    Err(fragment::stray::<P, F>(packet, met))
}

/// Finds or opens the packet's flow, and sends it on along it.
#[inline(always)]
fn carry<P: Packet, F: Stack>(packet: &P, met: &mut Met<F::Addr>) -> Step<Verdict> {
    let known = along::<P, F>(packet, met, false);
    if known == Along::Reset {
        return Err(Outcome::Reset);
    }
    if known != Along::Followed {
        if met.is_later() {
            return Err(fragment::stray::<P, F>(packet, met));
        }
        match decide::<P, F>(packet, met, known == Along::Ended)? {
            Decision::Open => met.outcome = open::enter::<F>(met)?,
            Decision::Keep => {
                if along::<P, F>(packet, met, true) != Along::Followed {
                    return Err(Outcome::NoFrontend);
                }
            }
        }
    }
    let met = met.settle();
    if met.fragment == Fragment::First {
        fragment::remember::<F>(met)?;
    }
    let met = met.settle();
    if met.flow.traits & flow::SNAT != 0 {
        return forward::away::<P, F>(packet, met);
    }
    rewrite::translate::<P, F>(packet, met)?;
    forward::inbound::<P, F>(packet, met, met.outcome)
}

/// Whether a packet that matches a forward entry nevertheless wants a new flow: a SYN after the
/// connection is over or the backend is gone, or a datagram whose backend no longer serves.
#[inline(always)]
fn ended<F: Stack>(met: &Met<F::Addr>) -> bool {
    let flow = &met.flow;
    let opens = met.is_udp() || met.is_bare_syn();
    if flow.traits & flow::REVERSE != 0 || !opens || met.is_later() {
        return false;
    }
    if state::closed(flow.state) {
        return true;
    }
    flow.traits & flow::DIRECT == 0 && !select::still_serves::<F>(flow.backend, flow.generation)
}

/// Whether a packet is a TCP client's to a pod of this node that has vanished (SEMANTICS G4): the
/// endpoint must be gone, and the pod's interface, which the agent sees. Never in answer to a RST.
#[inline(always)]
fn vanished<F: Stack>(met: &Met<F::Addr>) -> bool {
    let flow = &met.flow;
    enabled(RESET_VANISHED)
        && flow.traits & (flow::REVERSE | flow::DIRECT) == 0
        && met.is_tcp()
        && met.flags & RST == 0
        && !met.is_later()
        && !select::is_endpoint::<F>(flow.backend, flow.generation)
        && F::vanished().get_ptr(flow.destination).is_some()
}

/// What came of looking for a packet's flow. As wide as [`Outcome`]; see [`Decision`].
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(u32)]
enum Along {
    /// It went along its flow; [`Met::outcome`] says how.
    Followed,
    /// It has none.
    Unknown,
    /// It has one, in [`Met::flow`], that has ended.
    Ended,
    /// It has one to a pod that has vanished, and its client is to be told.
    Reset,
}

/// Sends a packet along its flow, even one that has ended if `keep` says so.
///
/// A function of its own, so that what is known of the element is forgotten at its end: each map
/// that it may lie in would have all decisions that follow verified once more.
#[inline(never)]
fn along<P: Packet, F: Stack>(packet: &P, met: &mut Met<F::Addr>, keep: bool) -> Along {
    let Some(entry) = conntrack::find::<F>(&met.key, &mut met.flow) else {
        return Along::Unknown;
    };
    if !keep && ended::<F>(met) {
        return Along::Ended;
    }
    met.vanished = vanished::<F>(met) as u8;
    conntrack::follow::<P, F>(packet, met, &entry);
    if met.vanished != 0 {
        return Along::Reset;
    }
    if conntrack::confirms(packet, met, &entry) {
        conntrack::promote::<F>(met);
    }
    met.outcome = match met.flow.traits & (flow::SNAT | flow::REVERSE) {
        SNAT_ANSWER => Outcome::ReverseRemote,
        flow::SNAT => Outcome::ForwardRemote,
        _ if entry.opening => Outcome::ForwardOpening,
        _ => Outcome::Forward,
    };
    Along::Followed
}

/// Traits of an answer to this node's address.
const SNAT_ANSWER: u16 = flow::SNAT | flow::REVERSE;

/// What to do with a packet that has no flow, or one that has ended. As wide as [`Outcome`]: undefined
/// bytes in what is returned beside it would be whatever a register held, pointers too, and the
/// verifier refuses arithmetic on those.
#[repr(u32)]
enum Decision {
    /// Open the flow in `met.flow`.
    Open,
    /// Stay on the flow that should have ended.
    Keep,
}

/// Decides about a packet without a flow, or with one that has ended and is then in `met.flow`.
#[inline(never)]
fn decide<P: Packet, F: Stack>(packet: &P, met: &mut Met<F::Addr>, ended: bool) -> Step<Decision> {
    let edge = forward::edge(packet.interface());
    let bits = edge.map_or(UPLINK, |edge| edge.bits);
    let at_pod = bits & POD != 0;
    let from_pod = at_pod || is_pods::<F>(met);
    let Met {
        key,
        concern,
        target,
        ..
    } = met;
    match service::find::<F>(key, *concern, from_pod, target) {
        Ok(Aim::Service) => {}
        Ok(Aim::UndefinedPort) => return Err(Outcome::Rejected),
        Err(Outcome::NoFrontend) => return direct::<F>(met, bits, packet.hook(), ended),
        Err(outcome) => return Err(outcome),
    }
    admit::client::<F>(met)?;
    met.hash = select::hash(&met.key);
    let Some(choice) = select::backend::<F>(from_pod, &met.key, &met.target, met.hash)? else {
        if ended && met.is_udp() {
            // Better an unwilling backend than none: the flow stays (SEMANTICS G1).
            return Ok(Decision::Keep);
        }
        return Err(select::nobody(&met.target));
    };
    if ended {
        conntrack::forget::<F>(&met.key, &met.flow, &mut met.peer_key);
        if met.is_udp() {
            stats::event(Event::Moved);
        }
    }
    let itself = choice.backend.address == met.key.source;
    let hairpin = at_pod && itself;
    let bridged = edge.is_some_and(|edge| edge.bridge != 0);
    met.flow.destination = choice.backend.address;
    let mut translated = false;
    let remote = !at_pod && (itself || choice.backend.bits() & LOCAL == 0);
    if !hairpin && (remote || wants_source(&met.target, from_pod)) {
        // Which address depends on the interface, and that on no source.
        met.flow.source = F::Addr::UNSPECIFIED;
        match forward::way::<P, F>(packet, met)? {
            Way::TooBig => return Err(Outcome::TooBig),
            // A backend on the node's own network: the stack takes it as it is.
            Way::Here => {}
            Way::Known | Way::Unresolved => translated = true,
        }
    }
    met.flow.source = if translated {
        forward::source::<F>(met).ok_or(Outcome::NoSource)?
    } else if hairpin {
        met.key.destination
    } else {
        met.key.source
    };
    met.flow.source_port = met.key.source_port;
    met.flow.destination_port = choice.backend.port();
    met.flow.backend = choice.id;
    met.flow.service = met.target.index;
    met.flow.generation = choice.backend.generation();
    met.flow.traits = traits(hairpin, bridged, met.is_bare_syn(), &met.target);
    if translated {
        met.flow.traits |= flow::SNAT;
    }
    // An answer to the node's address must get past the guard of the node's own ports.
    met.translate_port = (translated || hairpin && met.target.kind == kind::NODE_PORT as u32) as u8;
    Ok(Decision::Open)
}

/// Whether a client that came in elsewhere than at a pod's edge is a pod by its address: of another node, or behind
/// an interface that is no pod's (SEMANTICS C8).
#[inline(never)]
fn is_pods<F: Stack>(met: &Met<F::Addr>) -> bool {
    F::in_pod_nets(met.key.source)
}

/// Whether a flow needs this node's source, although its backend would answer by way of this node (SEMANTICS 1.2, C1).
///
/// One to a backend of another node always does, unless it came in at a pod's edge, pod or not: that node answers
/// straight to the client, who knows the frontend alone. That a source is a pod's by its range changes nothing there: its
/// own node would hand it an answer from an address that it never asked.
#[inline(always)]
fn wants_source(target: &Target, from_pod: bool) -> bool {
    let cluster_ip = target.kind == kind::CLUSTER_IP as u32;
    if from_pod {
        return cluster_ip && enabled(MASQUERADE_ALL);
    }
    // externalTrafficPolicy: Local keeps the client's address.
    let kept = !cluster_ip && target.service.flags() & flag::EXTERNAL_LOCAL != 0;
    !kept && enabled(SNAT_ALWAYS)
}

/// The traits of a new flow.
#[inline(always)]
fn traits(hairpin: bool, bridged: bool, syn: bool, target: &Target) -> u16 {
    let mut traits = 0;
    if hairpin {
        traits |= flow::HAIRPIN;
    }
    if bridged {
        traits |= flow::BRIDGED;
    }
    if syn {
        traits |= flow::SYN;
    }
    if target.service.affinity_seconds() != 0 {
        traits |= flow::AFFINE;
    }
    traits
}

/// A packet sent directly to a backend: where a flow through a frontend has the same tuple behind
/// it, the newcomer's source port is translated, so that their answers can be told apart.
#[inline(always)]
fn direct<F: Stack>(met: &mut Met<F::Addr>, edge: u32, hook: Hook, ended: bool) -> Step<Decision> {
    // What XDP has translated arrives here as if it had been sent directly.
    let seen_by_xdp = edge & XDP != 0 && hook != Hook::XdpIngress;
    if !met.concern.backend() || !met.is_bare_syn() || seen_by_xdp {
        return Err(Outcome::NoFrontend);
    }
    if ended {
        conntrack::forget::<F>(&met.key, &met.flow, &mut met.peer_key);
    }
    met.flow.source = met.key.source;
    met.flow.destination = met.key.destination;
    met.flow.source_port = met.key.source_port;
    met.flow.destination_port = met.key.destination_port;
    met.flow.backend = 0;
    met.flow.service = 0;
    met.flow.generation = 0;
    met.flow.traits = flow::DIRECT | flow::SYN;
    met.translate_port = 1;
    conntrack::set_peer(met);
    if conntrack::find::<F>(&met.peer_key, &mut met.other).is_none() {
        return Err(Outcome::NotOurs);
    }
    if state::closed(met.other.state) {
        // What is left of it would translate the newcomer's answers.
        let mut forward = met.peer_key;
        conntrack::forget::<F>(&met.peer_key, &met.other, &mut forward);
        return Err(Outcome::NotOurs);
    }
    met.hash = select::hash(&met.key);
    Ok(Decision::Open)
}

/// Translates an ICMP error about a packet of a flow for who sent that packet: the quote becomes what it sent, and the error comes
/// from the frontend where it came from the backend. A router's own address stays, so that path discovery shows
/// the path; towards a backend that sees this node as its client, it does not.
///
/// Nothing is learnt from errors about the flow: anybody can send them (RFC 5927).
#[inline(never)]
fn related<P: Packet, F: Stack>(
    packet: &P,
    ip: &Ip<F>,
    payload: &Payload,
    direction: u8,
) -> Step<Verdict> {
    let icmp = payload.l4;
    packet.ensure(icmp + icmp::HEADER)?;
    let [kind, _] = packet.load::<[u8; 2]>(icmp)?;
    let message = F::message(kind);
    if payload.fragment != Fragment::Whole || message == Message::Other {
        return Err(Outcome::OtherProtocol);
    }
    let Ok(quote) = icmp::quote::<P, F>(packet, icmp + icmp::HEADER) else {
        return Err(Outcome::OtherProtocol);
    };
    if quote.ip.source != ip.destination {
        return Err(Outcome::OtherProtocol);
    }
    let met = F::met().ok_or(Outcome::FlowInsert)?;
    met.key = FlowKey::new(
        quote.ip.destination,
        quote.ip.source,
        quote.destination_port,
        quote.source_port,
        quote.protocol,
        direction,
    );
    met.l3 = ip.l3 as u32;
    met.l4 = icmp as u32;
    met.flags = 0;
    met.fragment = Fragment::Whole;
    met.related = Related {
        from: ip.source,
        l3: quote.ip.l3 as u32,
        l4: quote.l4 as u32,
        end: (ip.l3 + F::length(packet, ip.l3)? as usize) as u32,
    };
    let met = met.settle();
    if conntrack::find::<F>(&met.key, &mut met.flow).is_none() {
        return Err(Outcome::OtherProtocol);
    }
    if message == Message::Redirect {
        return Err(Outcome::IcmpRedirect);
    }
    met.peer = met.flow;
    let masked = met.flow.traits & (flow::SNAT | flow::REVERSE) == flow::SNAT;
    if !masked && met.related.from != met.key.source {
        met.flow.source = met.related.from;
    }
    met.outcome = Outcome::IcmpError;
    let met = met.settle();
    if met.flow.traits & flow::SNAT != 0 {
        return forward::related_away::<P, F>(packet, met);
    }
    rewrite::relate::<P, F>(packet, met)?;
    forward::related::<P, F>(packet, met)
}

/// Whether a packet is ICMP, as far as its first header says.
#[inline(always)]
fn is_icmp<P: Packet, F: Stack>(packet: &P, ip: &Ip<F>) -> Step<bool> {
    let [_, protocol] = packet.load::<[u8; 2]>(ip.l3 + F::PROTOCOL - 1)?;
    Ok(protocol == F::ICMP)
}

#[inline(never)]
fn outbound<P: Packet, F: Stack>(packet: &P, l3: usize) -> Step<Verdict> {
    let ip = parse::ip::<P, F>(packet, l3)?;
    if guard::outbound_destination(&ip) {
        untranslated(packet, &ip)?;
    }
    let from_backend = guard::outbound_source(&ip);
    if !from_backend && !is_icmp(packet, &ip)? {
        return Err(Outcome::NotOurs);
    }
    let payload = F::payload(packet, &ip)?;
    if payload.protocol == F::ICMP {
        return match related::<P, F>(packet, &ip, &payload, OUTBOUND) {
            Err(Outcome::OtherProtocol) if !from_backend => Err(Outcome::NotOurs),
            result => result,
        };
    }
    meet::<P, F>(packet, &ip, &payload, OUTBOUND, Concern::NONE)?;
    let met = F::met().ok_or(Outcome::FlowInsert)?.settle();
    let Some(entry) = conntrack::find::<F>(&met.key, &mut met.flow) else {
        return Err(Outcome::NotOurs);
    };
    if conntrack::is_foreign(met, &entry) {
        stats::event(Event::Clash);
        return Err(Outcome::NotOurs);
    }
    if met.fragment == Fragment::First {
        fragment::remember::<F>(met)?;
    }
    conntrack::follow::<P, F>(packet, met, &entry);
    rewrite::translate::<P, F>(packet, met)?;
    Ok(Verdict::On(Outcome::Reverse))
}

/// A packet about to leave the node for a ClusterIP, which means nothing out there: dropped, never
/// leaked. Towards pods it may pass: a pod may hold any address.
#[inline(always)]
fn untranslated<P: Packet, F: Stack>(packet: &P, ip: &Ip<F>) -> Step<()> {
    let leaves = forward::edge(packet.interface()).is_some_and(|edge| edge.bits & UPLINK != 0);
    if !leaves || !service::is_cluster_ip::<F>(ip.destination) {
        return Ok(());
    }
    Err(Outcome::Untranslated)
}
