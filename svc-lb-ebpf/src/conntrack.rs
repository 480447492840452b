//! Flows: finding them, following their state, opening them to the established map, forgetting them.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_ebpf::maps::LruHashMap;
use svc_lb_common::Address;
use svc_lb_common::affinity::{Affinity, AffinityKey};
use svc_lb_common::conntrack::{Flow, FlowKey, INBOUND, OUTBOUND, flow, state};
use svc_lb_common::outcome::Event;

use crate::config::config;
use crate::family::Family;
use crate::maps::snapshot;
use crate::met::{FIN, Met, RST, SYN};
use crate::stats;

/// Where the entry that matches a packet lies.
pub(crate) struct Entry<A: Address> {
    /// The element, for what changes in place; may be another key's by the time it is written,
    /// which then only looks used or answered a little too early.
    element: *mut Flow<A>,
    /// It lies in `opening`.
    pub(crate) opening: bool,
}

/// Finds a key's entry and copies it to `flow`: an established flow costs one lookup.
#[inline(always)]
pub(crate) fn find<F: Family>(
    key: &FlowKey<F::Addr>,
    flow: &mut Flow<F::Addr>,
) -> Option<Entry<F::Addr>> {
    if let Some(element) = lookup(F::established(), key, flow) {
        return Some(Entry {
            element,
            opening: false,
        });
    }
    let element = lookup(F::opening(), key, flow)?;
    Some(Entry {
        element,
        opening: true,
    })
}

/// Copies the value and makes sure that the copy is this key's.
#[inline(always)]
fn lookup<A: Address>(
    map: &LruHashMap<FlowKey<A>, Flow<A>>,
    key: &FlowKey<A>,
    flow: &mut Flow<A>,
) -> Option<*mut Flow<A>> {
    let element = map.get_ptr_mut(key)?;
    // SAFETY: the element stays mapped while the program runs; that its content may change
    // under us is what the check word is for.
    *flow = unsafe { snapshot(element) };
    if !flow.belongs_to(key) {
        stats::event(Event::CheckMismatch);
        return None;
    }
    Some(element)
}

/// The key of the other entry of the pair.
#[inline(always)]
fn peer_key<A: Address>(protocol: u8, flow: &Flow<A>) -> FlowKey<A> {
    let direction = match flow.traits & (flow::REVERSE | flow::HAIRPIN) {
        0 => OUTBOUND,
        _ => INBOUND,
    };
    FlowKey::new(
        flow.destination,
        flow.source,
        flow.destination_port,
        flow.source_port,
        protocol,
        direction,
    )
}

/// Sets the reverse entry that belongs to the flow.
#[inline(always)]
pub(crate) fn set_reverse<A: Address>(met: &mut Met<A>) {
    let Met {
        key,
        flow,
        reverse_key,
        reverse,
        ..
    } = met;
    *reverse_key = peer_key(key.protocol, flow);
    *reverse = *flow;
    reverse.source = key.destination;
    reverse.destination = key.source;
    reverse.source_port = key.destination_port;
    reverse.destination_port = key.source_port;
    reverse.traits |= flow::REVERSE;
    reverse.check = reverse.expected_check(reverse_key);
}

/// Now, as flow entries hold it.
#[inline(always)]
pub(crate) fn now() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// Notes that a packet matched: when, and what its flags and direction say about the state.
#[inline(always)]
pub(crate) fn follow<F: Family>(met: &mut Met<F::Addr>, entry: &Entry<F::Addr>) {
    let now = now();
    // A second coarse: the entry's cache line is not dirtied by every packet.
    if now.wrapping_sub(met.flow.seen) >= config!(hz) {
        // SAFETY: see `Entry::element`; an aligned u32.
        unsafe { (&raw mut (*entry.element).seen).write_volatile(now) };
    }
    let reverse = met.flow.traits & flow::REVERSE != 0;
    let mut bits = 0;
    if reverse {
        bits |= state::ANSWERED;
    }
    if met.flags & FIN != 0 {
        bits |= if reverse {
            state::BACKEND_FIN
        } else {
            state::CLIENT_FIN
        };
    }
    if met.flags & RST != 0 {
        bits |= state::RESET;
    }
    if met.flow.state & bits == bits {
        return;
    }
    met.flow.state |= bits;
    set_state(entry.element, bits);
    met.reverse_key = peer_key(met.key.protocol, &met.flow);
    let map = if entry.opening {
        F::opening()
    } else {
        F::established()
    };
    if let Some(peer) = lookup(map, &met.reverse_key, &mut met.other) {
        set_state(peer, bits);
    }
}

#[inline(always)]
fn set_state<A: Address>(element: *mut Flow<A>, bits: u32) {
    // SAFETY: see `Entry::element`; an aligned u32. Two CPUs may lose one another's bit, which the
    // next packet with it sets again.
    unsafe {
        let state = &raw mut (*element).state;
        state.write_volatile(state.read_volatile() | bits);
    }
}

/// Whether a client's packet along an opening flow confirms it: the backend has answered, and
/// here is the client again. Nobody gets here with a forged source address.
#[inline(always)]
pub(crate) fn confirms<A: Address>(flow: &Flow<A>, entry: &Entry<A>) -> bool {
    entry.opening && flow.traits & flow::REVERSE == 0 && flow.state & state::ANSWERED != 0
}

/// Moves a confirmed flow to the established map, and pins the client where the service asks so.
#[inline(never)]
pub(crate) fn promote<F: Family>(met: &mut Met<F::Addr>) {
    set_reverse(met);
    let Met {
        key,
        flow,
        reverse_key,
        reverse,
        ..
    } = &*met;
    // The reverse entry first, as at open: an answer must never miss.
    if F::established().insert(reverse_key, reverse, 0).is_err()
        || F::established().insert(key, flow, 0).is_err()
    {
        return;
    }
    // Gone already if another CPU was quicker: fine.
    let _ = F::opening().remove(key);
    let _ = F::opening().remove(reverse_key);
    stats::event(Event::Promoted);
    if flow.traits & flow::AFFINE != 0 {
        let pin = Affinity {
            backend: flow.backend,
            generation: flow.generation,
            reserved: 0,
            // SAFETY: a helper without arguments.
            seen: unsafe { bpf_jiffies64() },
        };
        // A full map evicts; no memory leaves the client unpinned, and its hash picks the same
        // backend while the table stands.
        let _ = F::affinity().insert(AffinityKey::new(key.source, flow.service), pin, 0);
    }
}

/// Removes a flow and its peer, so that a new one can take their place.
#[inline(never)]
pub(crate) fn forget<F: Family>(
    key: &FlowKey<F::Addr>,
    flow: &Flow<F::Addr>,
    peer: &mut FlowKey<F::Addr>,
) {
    *peer = peer_key(key.protocol, flow);
    // Any of them may be missing.
    let _ = F::established().remove(key);
    let _ = F::established().remove(&*peer);
    let _ = F::opening().remove(key);
    let _ = F::opening().remove(&*peer);
}

/// Whether the first answer along an opening flow cannot be its own: the flow began with a SYN,
/// so a backend says SYN+ACK or RST. Anything else belongs to a direct connection with the same
/// tuple that was there before; its packets must stay as they are.
#[inline(always)]
pub(crate) fn is_foreign<A: Address>(met: &Met<A>, entry: &Entry<A>) -> bool {
    entry.opening
        && met.flow.traits & flow::SYN != 0
        && met.flow.state & state::ANSWERED == 0
        && !met.is_udp()
        && met.flags & (SYN | RST) == 0
}
