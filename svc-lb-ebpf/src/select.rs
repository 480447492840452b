//! Which endpoint set applies, and which backend of it a new flow gets.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use svc_lb_common::affinity::AffinityKey;
use svc_lb_common::backend::{Backend, GONE, IN_CLUSTER, IN_LOCAL, SERVING};
use svc_lb_common::config::REJECT_NO_LOCAL;
use svc_lb_common::conntrack::FlowKey;
use svc_lb_common::hash::{flow_hash, scale};
use svc_lb_common::outcome::Outcome;
use svc_lb_common::service::{Range, SLOTS_PER_WORD, flag, kind, slot};
use svc_lb_common::{Address, Be16};

use crate::config::{config, enabled};
use crate::family::Family;
use crate::maps::{SLOTS, read, snapshot};
use crate::packet::Step;
use crate::service::Target;

/// A backend and its id.
pub(crate) struct Choice<A: Address> {
    /// Id.
    pub(crate) id: u32,
    /// A copy.
    pub(crate) backend: Backend<A>,
}

/// The endpoint set of a new flow, and the bit its backends carry (SEMANTICS 1.2).
#[inline(always)]
fn set(target: &Target, inside: bool) -> (Range, u32) {
    let flags = target.service.flags();
    let local = if target.kind == kind::CLUSTER_IP as u32 {
        flags & flag::INTERNAL_LOCAL != 0
    } else {
        // Neither a pod nor the node is outside, whichever address it uses: it gets the Cluster set.
        !inside && flags & flag::EXTERNAL_LOCAL != 0
    };
    if local {
        (target.service.local, IN_LOCAL)
    } else {
        (target.service.cluster, IN_CLUSTER)
    }
}

/// The 32-bit hash that a new flow's decisions start from.
#[inline(always)]
pub(crate) fn hash<A: Address>(key: &FlowKey<A>) -> u32 {
    seeded(config!(seed), key)
}

#[inline(always)]
fn seeded<A: Address>(seed: u64, key: &FlowKey<A>) -> u32 {
    flow_hash(
        seed,
        key.source,
        key.destination,
        key.source_port,
        key.destination_port,
        key.protocol,
    )
}

/// Picks a backend; `None` where the set is empty.
///
/// A pure function of the tuple, a seed and the set: a flow entry that is lost and made again names
/// the same backend while the table stands. With Maglev the seed is the cluster's, so that every
/// node names the same one (SEMANTICS F9).
#[inline(always)]
pub(crate) fn backend<F: Family>(
    inside: bool,
    key: &FlowKey<F::Addr>,
    target: &Target,
    mut hash: u32,
) -> Step<Option<Choice<F::Addr>>> {
    let (range, bit) = set(target, inside);
    if range.length() == 0 {
        return Ok(None);
    }
    let maglev = target.service.flags() & flag::MAGLEV != 0;
    if target.service.affinity_seconds() != 0 {
        let client = key.source;
        if let Some(choice) = pinned::<F>(target, client, bit) {
            return Ok(Some(choice));
        }
        // Whichever frontend and source port: the client alone decides (SEMANTICS F2, F5).
        let none = Be16(0);
        let seed = if maglev {
            config!(maglev_seed)
        } else {
            config!(seed) ^ target.index as u64
        };
        hash = flow_hash(seed, client, client, none, none, 0);
    } else if maglev {
        hash = seeded(config!(maglev_seed), key);
    }
    let position = range.start() + scale(hash, range.length());
    let word = read(&SLOTS, position / SLOTS_PER_WORD).ok_or(Outcome::BadBackend)?;
    let id = slot(word, position);
    let backend = read(F::backends(), id).ok_or(Outcome::BadBackend)?;
    if id == 0 || backend.bits() & GONE != 0 {
        return Err(Outcome::BadBackend);
    }
    Ok(Some(Choice { id, backend }))
}

/// The backend the client is pinned to, if it still is one of the set.
#[inline(always)]
fn pinned<F: Family>(target: &Target, client: F::Addr, bit: u32) -> Option<Choice<F::Addr>> {
    let pin = F::affinity().get_ptr(AffinityKey::new(client, target.index))?;
    // SAFETY: the element stays mapped while the program runs. Should it be given to another
    // client meanwhile, the backend's service and generation below tell.
    let pin = unsafe { snapshot(pin) };
    // SAFETY: a helper without arguments.
    let idle = unsafe { bpf_jiffies64() }.wrapping_sub(pin.seen);
    if idle > target.service.affinity_seconds() as u64 * config!(hz) as u64 {
        return None;
    }
    let backend = read(F::backends(), pin.backend)?;
    let eligible = backend.bits() & (bit | GONE) == bit
        && backend.generation() == pin.generation
        && backend.service == target.index;
    eligible.then_some(Choice {
        id: pin.backend,
        backend,
    })
}

/// Whether a flow's backend still is an endpoint of its service, willing or not.
#[inline(always)]
pub(crate) fn is_endpoint<F: Family>(id: u32, generation: u16) -> bool {
    read(F::backends(), id)
        .is_some_and(|backend| backend.generation() == generation && backend.bits() & GONE == 0)
}

/// What becomes of a client for whom there is no backend: it is rejected, or met with silence while
/// other nodes have some (SEMANTICS 1.2).
#[inline(always)]
pub(crate) fn nobody(target: &Target) -> Outcome {
    if target.service.flags() & flag::HAS_ANY != 0 && !enabled(REJECT_NO_LOCAL) {
        return Outcome::NoLocalEndpoint;
    }
    Outcome::Rejected
}

/// Whether a flow's backend still serves the service the flow was opened for (SEMANTICS G1:
/// policy and topology aside).
#[inline(always)]
pub(crate) fn still_serves<F: Family>(id: u32, generation: u16) -> bool {
    read(F::backends(), id).is_some_and(|backend| {
        backend.generation() == generation && backend.bits() & (SERVING | GONE) == SERVING
    })
}
