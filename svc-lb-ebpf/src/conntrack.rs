//! Flows: finding them, following their state, confirming them, forgetting them.
//!
//! A flow has two entries, which always lie in the same map: `opening` until the client has proved
//! that it gets the backend's answers, then `established` (TCP) or `streams` (UDP).

use core::mem::offset_of;

use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_ebpf::maps::LruHashMap;
use network_types::sctp::SctpHdr;
use network_types::tcp::TcpHdr;
use svc_lb_common::affinity::{Affinity, AffinityKey};
use svc_lb_common::conntrack::{Flow, FlowKey, PROOF_SECONDS, PROOF_WINDOW, flow, state};
use svc_lb_common::outcome::{Event, Lru, Tally};
use svc_lb_common::{Address, Protocol};

use crate::config::config;
use crate::family::Family;
use crate::maps::snapshot;
use crate::met::{ACK, FIN, Met, RST, SYN};
use crate::packet::Packet;
use crate::stats;

/// BPF_NOEXIST of bpf_map_update_elem.
pub(crate) const NOEXIST: u64 = 1;

/// Where the entry that matches a packet lies.
pub(crate) struct Entry<A: Address> {
    /// The element, for what changes in place; may be another key's by the time it is written,
    /// which then only looks used or answered a little too early.
    element: *mut Flow<A>,
    /// It lies in `opening`.
    pub(crate) opening: bool,
}

/// Finds a key's entry and copies it to `flow`: a confirmed flow costs one lookup.
#[inline(always)]
pub(crate) fn find<F: Family>(
    key: &FlowKey<F::Addr>,
    flow: &mut Flow<F::Addr>,
) -> Option<Entry<F::Addr>> {
    let confirmed = if is_udp(key) {
        F::streams().get_ptr_mut(key)
    } else {
        F::established().get_ptr_mut(key)
    };
    let entry = match confirmed {
        Some(element) => Entry {
            element,
            opening: false,
        },
        None => Entry {
            element: F::opening().get_ptr_mut(key)?,
            opening: true,
        },
    };
    // SAFETY: the element stays mapped while the program runs; that its content may change
    // under us is what the check word is for.
    *flow = unsafe { snapshot(entry.element) };
    if !flow.belongs_to(key) {
        stats::event(Event::CheckMismatch);
        return None;
    }
    Some(entry)
}

/// A key's entry as it lies in its map: what it says may change under us.
#[inline(always)]
pub(crate) fn peek<F: Family>(key: &FlowKey<F::Addr>) -> Option<*const Flow<F::Addr>> {
    let confirmed = if is_udp(key) {
        F::streams().get_ptr(key)
    } else {
        F::established().get_ptr(key)
    };
    confirmed.or_else(|| F::opening().get_ptr(key))
}

#[inline(always)]
fn is_udp<A: Address>(key: &FlowKey<A>) -> bool {
    key.protocol == Protocol::Udp as u8
}

/// Sets the other entry of the pair: the reverse one of a forward flow, and the other way round.
#[inline(always)]
pub(crate) fn set_peer<A: Address>(met: &mut Met<A>) {
    let Met {
        key,
        flow,
        peer_key: to,
        peer,
        ..
    } = met;
    *to = flow.peer_key(key.protocol);
    *peer = *flow;
    peer.source = key.destination;
    peer.destination = key.source;
    peer.source_port = key.destination_port;
    peer.destination_port = key.source_port;
    peer.traits ^= flow::REVERSE;
    peer.check = peer.expected_check(to);
}

/// Whether an entry found at the peer's key is the peer, and not another flow's that took the
/// tuple after the peer was evicted.
#[inline(always)]
pub(crate) fn same_translation<A: Address>(found: &Flow<A>, peer: &Flow<A>) -> bool {
    let ports = |flow: &Flow<A>| {
        flow.source_port.0 as u64
            | (flow.destination_port.0 as u64) << 16
            | ((flow.traits & flow::DIRECT) as u64) << 32
    };
    // One comparison: each would be another way through the port search to verify.
    let differs = (found.source.fold() ^ peer.source.fold())
        | (found.destination.fold() ^ peer.destination.fold())
        | (ports(found) ^ ports(peer));
    differs == 0
}

/// Now, as flow entries hold it.
#[inline(always)]
pub(crate) fn now() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// Notes that a packet matched: when, and what its flags and direction say about the state.
#[inline(always)]
pub(crate) fn follow<P: Packet, F: Family>(
    packet: &P,
    met: &mut Met<F::Addr>,
    entry: &Entry<F::Addr>,
) {
    let reverse = met.flow.traits & flow::REVERSE != 0;
    let mut gained = 0;
    // Who goes on after a RST was not reset: an outsider may have sent it.
    let mut lost = state::RESET;
    if met.flags & RST != 0 || met.vanished != 0 {
        (gained, lost) = (state::RESET, 0);
    } else if reverse {
        gained |= state::ANSWERED;
    }
    if met.flags & FIN != 0 {
        gained |= if reverse {
            state::BACKEND_FIN
        } else {
            state::CLIENT_FIN
        };
    }
    if !reverse && met.is_bare_syn() {
        // The next connection from the same port: nothing of it has ended yet.
        lost |= state::CLIENT_FIN | state::BACKEND_FIN;
    }
    if met.is_later() {
        // It says nothing that the first fragment has not said.
        (gained, lost) = (0, 0);
    }
    met.gained = gained;
    met.lost = lost;
    let met = met.settle();
    // A second coarse: the entries' cache lines are not dirtied by every packet.
    let stale = now().wrapping_sub(met.flow.seen) >= config!(hz);
    let changed = met.state() != met.flow.state;
    if stale || changed || tells_proof(met, entry) {
        note::<P, F>(packet, met, entry);
    }
}

/// Whether the packet is one whose sequence number the client must acknowledge: what the backend
/// of a TCP flow that is still opening says.
#[inline(always)]
fn tells_proof<A: Address>(met: &Met<A>, entry: &Entry<A>) -> bool {
    entry.opening && !met.is_udp() && met.gained & state::ANSWERED != 0
}

/// Notes what the client must show: the acknowledgement of what the backend said, or, of SCTP, the
/// verification tag that it asks for in its INIT ACK (RFC 9260 3.3.3, 8.5).
#[inline(always)]
fn tell_proof<P: Packet, A: Address>(packet: &P, met: &mut Met<A>) {
    let syn = met.flags & SYN != 0;
    if met.is_sctp() {
        if syn && let Ok(tag) = packet.load::<u32>(met.l4 as usize + INITIATE_TAG) {
            met.flow.proof = tag;
        }
        return;
    }
    if let Ok(sequence) = packet.load::<u32>(met.l4 as usize + offset_of!(TcpHdr, seq)) {
        met.flow.proof = u32::from_be(sequence).wrapping_add(syn as u32);
    }
}

/// Offset of the initiate tag of an INIT ACK that is an SCTP packet's first chunk.
const INITIATE_TAG: usize = SctpHdr::LEN + 4;

/// Writes what a packet changed to both entries, and makes the other one again if it was evicted:
/// without it the flow's packets one way would pass as they are.
///
/// So both are refreshed at least once a second while packets flow, whichever way: they age
/// together for who evicts and for who collects.
#[inline(never)]
fn note<P: Packet, F: Family>(packet: &P, met: &mut Met<F::Addr>, entry: &Entry<F::Addr>) {
    met.flow.seen = now();
    met.flow.state = met.state();
    if tells_proof(met, entry) {
        tell_proof(packet, met);
    }
    write(entry.element, met);
    set_peer(met);
    if let Some(peer) = find::<F>(&met.peer_key, &mut met.other) {
        if same_translation(&met.other, &met.peer) {
            write(peer.element, met);
        }
        return;
    }
    let (map, lru) = if entry.opening {
        (F::opening(), Lru::Opening)
    } else {
        confirmed::<F>(&met.key)
    };
    if insert(map, lru, &met.peer_key, &met.peer) {
        stats::event(Event::Mended);
    }
}

/// Writes what changes in place.
#[inline(always)]
fn write<A: Address>(element: *mut Flow<A>, met: &Met<A>) {
    // SAFETY: see `Entry::element`; aligned u32. Two CPUs may lose one another's state bit, which
    // the next packet with it sets again.
    unsafe {
        // First what an answer is to prove, then that there was one.
        (&raw mut (*element).proof).write_volatile(met.flow.proof);
        let state = &raw mut (*element).state;
        state.write_volatile(state.read_volatile() & !met.lost | met.gained);
        (&raw mut (*element).seen).write_volatile(met.flow.seen);
    }
}

/// The map that a flow's entries lie in once it is confirmed.
#[inline(always)]
pub(crate) fn confirmed<F: Family>(key: &FlowKey<F::Addr>) -> (&'static Flows<F::Addr>, Lru) {
    if is_udp(key) {
        (F::streams(), Lru::Streams)
    } else {
        (F::established(), Lru::Established)
    }
}

/// Whether a client's packet along an opening flow confirms it: it shows that the client gets the
/// backend's answers, or as good as shows it. Nobody with a forged source gets here: TCP must
/// acknowledge what the backend said, and a datagram's flow must have lived for a while, which under
/// a flood it does not.
#[inline(always)]
pub(crate) fn confirms<P: Packet, A: Address>(packet: &P, met: &Met<A>, entry: &Entry<A>) -> bool {
    let flow = &met.flow;
    let answered = flow.traits & flow::REVERSE == 0 && flow.state & state::ANSWERED != 0;
    if !entry.opening || !answered || state::closed(flow.state) || met.is_later() {
        return false;
    }
    if met.is_udp() {
        return now().wrapping_sub(flow.proof) >= PROOF_SECONDS * config!(hz);
    }
    if met.flags & ACK == 0 {
        return false;
    }
    if met.is_sctp() {
        let tag = packet.load::<u32>(met.l4 as usize + offset_of!(SctpHdr, verification_tag));
        return tag.is_ok_and(|tag| tag == flow.proof && tag != 0);
    }
    let acknowledged = packet.load::<u32>(met.l4 as usize + offset_of!(TcpHdr, ack_seq));
    acknowledged.is_ok_and(|number| {
        let ahead = u32::from_be(number).wrapping_sub(flow.proof);
        ahead.wrapping_add(PROOF_WINDOW) < 2 * PROOF_WINDOW
    })
}

/// Moves a confirmed flow out of `opening`, and pins the client where the service asks so.
#[inline(never)]
pub(crate) fn promote<F: Family>(met: &mut Met<F::Addr>) {
    set_peer(met);
    let Met {
        key,
        flow,
        peer_key,
        peer,
        other,
        ..
    } = met;
    if find::<F>(peer_key, other).is_some() && !same_translation(other, peer) {
        // Another flow took the tuple after the reverse entry had been evicted.
        return;
    }
    let (map, lru) = confirmed::<F>(key);
    // The reverse entry first, as at open: an answer must never miss.
    if !put(map, lru, peer_key, peer) || !put(map, lru, key, flow) {
        return;
    }
    // Gone already if another CPU was quicker: fine.
    remove(F::opening(), Lru::Opening, key);
    remove(F::opening(), Lru::Opening, peer_key);
    stats::event(Event::Promoted);
    if flow.traits & flow::AFFINE != 0 {
        pin::<F>(met);
    }
}

/// Pins the client to the flow's backend, or again if it was.
#[inline(always)]
fn pin<F: Family>(met: &Met<F::Addr>) {
    let Met { key, flow, .. } = met;
    let pin = Affinity {
        backend: flow.backend,
        generation: flow.generation,
        reserved: 0,
        // SAFETY: a helper without arguments.
        seen: unsafe { bpf_jiffies64() },
    };
    let client = AffinityKey::new(key.source, flow.service);
    if F::affinity().insert(client, pin, NOEXIST).is_ok() {
        stats::tally::<F::Addr>(Tally::Inserted, Lru::Affinity);
        return;
    }
    // A full map evicts; no memory leaves the client unpinned, and its hash picks the same
    // backend while the table stands.
    let _ = F::affinity().insert(client, pin, 0);
}

/// Removes a flow and its peer, so that a new one can take their place.
#[inline(never)]
pub(crate) fn forget<F: Family>(
    key: &FlowKey<F::Addr>,
    flow: &Flow<F::Addr>,
    peer: &mut FlowKey<F::Addr>,
) {
    *peer = flow.peer_key(key.protocol);
    let (map, lru) = confirmed::<F>(key);
    // Any of them may be missing.
    remove(map, lru, key);
    remove_peer(map, lru, key, peer);
    remove(F::opening(), Lru::Opening, key);
    remove_peer(F::opening(), Lru::Opening, key, peer);
}

/// Removes the entry at `peer` if it is that of `key`, and not another flow's that took the tuple.
#[inline(always)]
fn remove_peer<A: Address>(map: &Flows<A>, lru: Lru, key: &FlowKey<A>, peer: &FlowKey<A>) {
    let Some(found) = map.get_ptr(peer) else {
        return;
    };
    // SAFETY: the element stays mapped while the program runs. Should it be given to another key
    // meanwhile, what is removed is not ours, and is made again by its flow's next packet.
    if unsafe { &*found }.answers(key) {
        remove(map, lru, peer);
    }
}

/// One of the maps that flows lie in.
pub(crate) type Flows<A> = LruHashMap<FlowKey<A>, Flow<A>>;

/// Enters an entry where there is none.
#[inline(always)]
pub(crate) fn insert<A: Address>(
    map: &Flows<A>,
    lru: Lru,
    key: &FlowKey<A>,
    flow: &Flow<A>,
) -> bool {
    let inserted = map.insert(key, flow, NOEXIST).is_ok();
    if inserted {
        stats::tally::<A>(Tally::Inserted, lru);
    }
    inserted
}

/// Enters an entry, whatever was there.
#[inline(always)]
pub(crate) fn put<A: Address>(map: &Flows<A>, lru: Lru, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    insert(map, lru, key, flow) || map.insert(key, flow, 0).is_ok()
}

#[inline(always)]
fn remove<A: Address>(map: &Flows<A>, lru: Lru, key: &FlowKey<A>) {
    if map.remove(key).is_ok() {
        stats::tally::<A>(Tally::Removed, lru);
    }
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
        && !met.is_later()
        && met.flags & (SYN | RST) == 0
}
