//! Opening a flow: its translation, its two entries, and a source port where the tuple is taken.

use svc_lb_common::Be16;
use svc_lb_common::conntrack::{FlowKey, flow, state};
use svc_lb_common::hash::{M1, mix, scale};
use svc_lb_common::outcome::{Event, Lru, Outcome};

use crate::config::config;
use crate::conntrack::{self, Flows};
use crate::family::{Family, V4, V6};
use crate::guard;
use crate::met::Met;
use crate::packet::Step;
use crate::stats;

/// Source ports that are tried for one flow. Flows to one backend share the range where their tuples met, or all of them where
/// it sees this node as the client. With 90 % of it taken, 128 tries fail for one flow in 700,000, with 99 % for one in four.
const PORT_TRIES: u32 = 128;

/// Enters `met.flow`, as it is or with a translated source port, which is then in it too.
///
/// The reverse entry goes in first and only where there is none: what a client is told to use is
/// always what answers are translated with.
#[inline(never)]
pub(crate) fn enter<F: Family>(met: &mut Met<F::Addr>) -> Step<Outcome> {
    met.flow.seen = conntrack::now();
    met.flow.state = 0;
    met.flow.proof = if met.is_udp() { met.flow.seen } else { 0 };
    conntrack::set_peer(met);
    let translated = met.translate_port != 0 || !is_free::<F>(met);
    if translated {
        translate_port::<F>(met)?;
    }
    let claim = claim::<F>(met);
    if claim == Claim::Taken {
        return Err(Outcome::PortsExhausted);
    }
    if translated {
        stats::event(Event::PortTranslated);
        if met.flow.traits & flow::DIRECT != 0 {
            guard::set_direct(met.key.destination);
        }
    }
    insert_forward::<F>(met, claim)
}

/// Finds a source port with which the tuple behind the frontend is free.
#[inline(never)]
fn translate_port<F: Family>(met: &mut Met<F::Addr>) -> Step<()> {
    let first = config!(snat_first) as u32;
    let ports = config!(snat_last) as u32 - first + 1;
    let mut attempt = 0;
    while attempt < PORT_TRIES {
        let start = mix((met.hash as u64).wrapping_add((attempt as u64).wrapping_mul(M1)));
        let port = first + scale((start >> 32) as u32, ports);
        met.flow.source_port = Be16::new(port as u16);
        met.peer_key.destination_port = met.flow.source_port;
        if is_free::<F>(met) {
            conntrack::set_peer(met);
            return Ok(());
        }
        attempt += 1;
    }
    Err(Outcome::PortsExhausted)
}

/// Whether the tuple behind the frontend can be claimed, as `met` has it.
#[inline(always)]
fn is_free<F: Family>(met: &mut Met<F::Addr>) -> bool {
    // It looks for itself at what lies in memory.
    met.settle();
    F::tuple_is_free()
}

/// Whether the tuple in IPv4's `Met` can be claimed: 1 if so.
///
/// A function with a name that is visible outside: the verifier looks at it once, and forgets at each
/// call all but that a number comes back. Within the loop of the port search its ways would
/// multiply; eight tries were all that Linux 6.1 took.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn tuple_is_free4() -> u32 {
    tuple_is_free::<V4>() as u32
}

/// The same for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn tuple_is_free6() -> u32 {
    tuple_is_free::<V6>() as u32
}

/// Whether nobody has the tuple, or a connection that is over, or this flow.
#[inline(always)]
fn tuple_is_free<F: Family>() -> bool {
    let Some(met) = F::met() else {
        return false;
    };
    let Some(found) = conntrack::peek::<F>(&met.peer_key) else {
        return true;
    };
    // SAFETY: the element stays mapped while the program runs. Should it be given to another key
    // meanwhile, another port is tried, or the claim fails.
    let found = unsafe { &*found };
    state::closed(found.state) | conntrack::same_translation(found, &met.peer)
}

/// What came of a claim to the tuple behind the frontend. As wide as [`Outcome`]; see
/// `pipeline::Decision`.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(u32)]
enum Claim {
    /// It is another flow's.
    Taken,
    /// It is ours, in `opening`.
    Opening,
    /// It is ours and was confirmed: only the forward entry had been evicted.
    Confirmed,
}

/// Claims the tuple behind the frontend by its reverse entry. A live entry that names this client
/// and frontend is ours, with its state; a closed connection's is taken over.
#[inline(never)]
fn claim<F: Family>(met: &mut Met<F::Addr>) -> Claim {
    let syn = met.is_bare_syn();
    let Met {
        key,
        flow,
        peer_key,
        peer,
        other,
        ..
    } = met;
    let Some(found) = conntrack::find::<F>(peer_key, other) else {
        return enter_reverse::<F>(met);
    };
    if state::closed(other.state) {
        let mut other_forward = *peer_key;
        conntrack::forget::<F>(peer_key, other, &mut other_forward);
        return enter_reverse::<F>(met);
    }
    if !conntrack::same_translation(other, peer) {
        return Claim::Taken;
    }
    flow.state = other.state;
    if syn {
        // The next connection from the same port: nothing of it has ended yet.
        flow.state &= state::ANSWERED;
    }
    flow.proof = other.proof;
    peer.state = flow.state;
    peer.proof = flow.proof;
    let claim = if found.opening {
        Claim::Opening
    } else {
        Claim::Confirmed
    };
    // The pair is one flow's again: traits, backend and all.
    let (map, lru) = home::<F>(key, claim);
    if conntrack::put(map, lru, peer_key, peer) {
        claim
    } else {
        Claim::Taken
    }
}

#[inline(always)]
fn enter_reverse<F: Family>(met: &Met<F::Addr>) -> Claim {
    if conntrack::insert(F::opening(), Lru::Opening, &met.peer_key, &met.peer) {
        Claim::Opening
    } else {
        Claim::Taken
    }
}

/// Where a claimed flow's entries lie.
#[inline(always)]
fn home<F: Family>(key: &FlowKey<F::Addr>, claim: Claim) -> (&'static Flows<F::Addr>, Lru) {
    if claim == Claim::Confirmed {
        conntrack::confirmed::<F>(key)
    } else {
        (F::opening(), Lru::Opening)
    }
}

/// Enters the forward entry beside the reverse one.
#[inline(always)]
fn insert_forward<F: Family>(met: &mut Met<F::Addr>, claim: Claim) -> Step<Outcome> {
    met.flow.check = met.flow.expected_check(&met.key);
    let (map, lru) = home::<F>(&met.key, claim);
    if conntrack::put(map, lru, &met.key, &met.flow) {
        Ok(Outcome::Open)
    } else {
        Err(Outcome::FlowInsert)
    }
}
