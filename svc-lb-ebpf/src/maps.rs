//! Every map, with who writes it. Sizes are defaults; the agent sets them when it creates the maps.
//!
//! | map | kind | key -> value | written by | when full |
//! | --- | --- | --- | --- | --- |
//! | guard | array, mmapped | address hash -> 16 nibbles of hint bits | agent | - |
//! | guard_port | array, mmapped | protocol and port -> bit | agent | - |
//! | guard_direct | array, mmapped | address hash -> jiffies64 when a direct flow there was last opened, or 0 | programs, agent clears | - |
//! | frontends4/6 | hash | address, port, protocol -> service, kind | agent | object refused |
//! | services | array, mmapped | index -> ranges, flags, affinity timeout | agent | object refused |
//! | slots | array, mmapped | position -> two backend ids | agent | object refused |
//! | backends4/6 | array, mmapped | id -> address, port, generation, bits | agent | object refused |
//! | opening4/6 | LRU hash | tuple, direction -> translation | programs, agent deletes | evicts |
//! | established4/6 | LRU hash | the same, TCP | as above | evicts |
//! | streams4/6 | LRU hash | the same, UDP | as above | evicts |
//! | affinity4/6 | LRU hash | client, service -> backend, time | as above | evicts |
//! | fragments4/6 | LRU hash | id, addresses, protocol -> ports, time | programs, agent deletes | evicts |
//! | source_ranges4/6 | LPM trie | service, prefix of client -> admitted | agent | object refused |
//! | sockets4/6 | LRU hash | socket, address -> address it stands for | programs | evicts |
//! | socket_hits4/6 | array, mmapped | backend id -> sockets given it | programs, agent clears | - |
//! | edges | hash | interface index -> kind, bridge, MAC | agent | interface refused |
//! | links | hash | interface index -> source addresses, XDP | agent | no translated source there |
//! | vanished4/6 | hash | address of a pod of this node that is gone -> when | agent | the one longest gone leaves |
//! | counters | per-CPU array | hook and outcome, or event -> packets | programs | - |
//! | bucket | per-CPU array | token bucket of generated packets | programs | - |
//! | met4/6 | per-CPU array | what is known of the packet; nothing outlives it | programs | - |

use core::arch::asm;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use svc_lb_common::affinity::{Affinity, AffinityKey};
use svc_lb_common::backend::Backend;
use svc_lb_common::conntrack::{Flow, FlowKey};
use svc_lb_common::edge::Edge;
use svc_lb_common::fragment::{FirstFragment, FragmentKey};
use svc_lb_common::guard::PORT_WORDS;
use svc_lb_common::limits;
use svc_lb_common::link::Link;
use svc_lb_common::outcome;
use svc_lb_common::service::{Frontend, FrontendKey, Service};
use svc_lb_common::socket::{SocketEntry, SocketKey};
use svc_lb_common::source_range::Source;
use svc_lb_common::{Addr4, Addr6};

use crate::met::Met;

#[map(name = "guard")]
pub(crate) static GUARD: Array<u64> = Array::with_max_entries(limits::GUARD_WORDS, BPF_F_MMAPABLE);
#[map(name = "guard_port")]
pub(crate) static GUARD_PORT: Array<u64> = Array::with_max_entries(PORT_WORDS, BPF_F_MMAPABLE);
#[map(name = "guard_direct")]
pub(crate) static GUARD_DIRECT: Array<u64> =
    Array::with_max_entries(limits::GUARD_DIRECT, BPF_F_MMAPABLE);
#[map(name = "frontends4")]
pub(crate) static FRONTENDS4: HashMap<FrontendKey<Addr4>, Frontend> =
    HashMap::with_max_entries(limits::FRONTENDS, 0);
#[map(name = "frontends6")]
pub(crate) static FRONTENDS6: HashMap<FrontendKey<Addr6>, Frontend> =
    HashMap::with_max_entries(limits::FRONTENDS, 0);
#[map(name = "services")]
pub(crate) static SERVICES: Array<Service> =
    Array::with_max_entries(limits::SERVICES, BPF_F_MMAPABLE);
#[map(name = "slots")]
pub(crate) static SLOTS: Array<u64> = Array::with_max_entries(limits::SLOT_WORDS, BPF_F_MMAPABLE);
#[map(name = "backends4")]
pub(crate) static BACKENDS4: Array<Backend<Addr4>> =
    Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map(name = "backends6")]
pub(crate) static BACKENDS6: Array<Backend<Addr6>> =
    Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map(name = "opening4")]
pub(crate) static OPENING4: LruHashMap<FlowKey<Addr4>, Flow<Addr4>> =
    LruHashMap::with_max_entries(limits::OPENING, 0);
#[map(name = "opening6")]
pub(crate) static OPENING6: LruHashMap<FlowKey<Addr6>, Flow<Addr6>> =
    LruHashMap::with_max_entries(limits::OPENING, 0);
#[map(name = "established4")]
pub(crate) static ESTABLISHED4: LruHashMap<FlowKey<Addr4>, Flow<Addr4>> =
    LruHashMap::with_max_entries(limits::ESTABLISHED, 0);
#[map(name = "established6")]
pub(crate) static ESTABLISHED6: LruHashMap<FlowKey<Addr6>, Flow<Addr6>> =
    LruHashMap::with_max_entries(limits::ESTABLISHED, 0);
#[map(name = "streams4")]
pub(crate) static STREAMS4: LruHashMap<FlowKey<Addr4>, Flow<Addr4>> =
    LruHashMap::with_max_entries(limits::STREAMS, 0);
#[map(name = "streams6")]
pub(crate) static STREAMS6: LruHashMap<FlowKey<Addr6>, Flow<Addr6>> =
    LruHashMap::with_max_entries(limits::STREAMS, 0);
#[map(name = "affinity4")]
pub(crate) static AFFINITY4: LruHashMap<AffinityKey<Addr4>, Affinity> =
    LruHashMap::with_max_entries(limits::AFFINITY, 0);
#[map(name = "affinity6")]
pub(crate) static AFFINITY6: LruHashMap<AffinityKey<Addr6>, Affinity> =
    LruHashMap::with_max_entries(limits::AFFINITY, 0);
#[map(name = "fragments4")]
pub(crate) static FRAGMENTS4: LruHashMap<FragmentKey<Addr4>, FirstFragment> =
    LruHashMap::with_max_entries(limits::FRAGMENTS, 0);
#[map(name = "fragments6")]
pub(crate) static FRAGMENTS6: LruHashMap<FragmentKey<Addr6>, FirstFragment> =
    LruHashMap::with_max_entries(limits::FRAGMENTS, 0);
#[map(name = "source_ranges4")]
pub(crate) static SOURCE_RANGES4: LpmTrie<Source<Addr4>, u32> =
    LpmTrie::with_max_entries(limits::SOURCE_RANGES, 0);
#[map(name = "source_ranges6")]
pub(crate) static SOURCE_RANGES6: LpmTrie<Source<Addr6>, u32> =
    LpmTrie::with_max_entries(limits::SOURCE_RANGES, 0);
#[map(name = "sockets4")]
pub(crate) static SOCKETS4: LruHashMap<SocketKey<Addr4>, SocketEntry<Addr4>> =
    LruHashMap::with_max_entries(limits::SOCKETS, 0);
#[map(name = "sockets6")]
pub(crate) static SOCKETS6: LruHashMap<SocketKey<Addr6>, SocketEntry<Addr6>> =
    LruHashMap::with_max_entries(limits::SOCKETS, 0);
#[map(name = "socket_hits4")]
pub(crate) static SOCKET_HITS4: Array<u64> =
    Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map(name = "socket_hits6")]
pub(crate) static SOCKET_HITS6: Array<u64> =
    Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map(name = "edges")]
pub(crate) static EDGES: HashMap<u32, Edge> = HashMap::with_max_entries(limits::EDGES, 0);
#[map(name = "links")]
pub(crate) static LINKS: HashMap<u32, Link> = HashMap::with_max_entries(limits::LINKS, 0);
#[map(name = "vanished4")]
pub(crate) static VANISHED4: HashMap<Addr4, u64> =
    HashMap::with_max_entries(limits::VANISHED, BPF_F_NO_PREALLOC);
#[map(name = "vanished6")]
pub(crate) static VANISHED6: HashMap<Addr6, u64> =
    HashMap::with_max_entries(limits::VANISHED, BPF_F_NO_PREALLOC);
#[map(name = "counters")]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(outcome::COUNTERS, 0);
#[map(name = "bucket")]
pub(crate) static BUCKET: PerCpuArray<Bucket> = PerCpuArray::with_max_entries(1, 0);

#[map(name = "met4")]
pub(crate) static MET4: PerCpuArray<Met<Addr4>> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "met6")]
pub(crate) static MET6: PerCpuArray<Met<Addr6>> = PerCpuArray::with_max_entries(1, 0);

/// A CPU's token bucket for generated packets.
#[repr(C)]
pub(crate) struct Bucket {
    /// Jiffies64 of the latest refill.
    pub(crate) filled: u64,
    /// Tokens left, in packets times jiffies per second, so that no refill rounds to nothing.
    pub(crate) tokens: u64,
}

/// Copies an array's element.
#[inline(always)]
pub(crate) fn read<T: Copy>(array: &Array<T>, index: u32) -> Option<T> {
    let value = array.get_ptr(index)?;
    // SAFETY: array elements live as long as the map.
    Some(unsafe { snapshot(value) })
}

/// Copies a map value once: what is decided afterwards is decided on the copy, whatever becomes
/// of the element. The agent changes array elements one aligned u64 at a time; values of hash
/// maps carry a check word.
///
/// (A volatile read would do the same by way of the stack, which has no room for it.)
///
/// # Safety
/// `value` points at a map value that stays mapped while the program runs.
#[inline(always)]
pub(crate) unsafe fn snapshot<T: Copy>(value: *const T) -> T {
    // SAFETY: the caller's promise.
    let copy = unsafe { *value };
    // SAFETY: a move of a register to itself. It is said to change any memory, so nothing is read
    // from the element again. (LLVM has no fences for BPF.)
    unsafe { asm!("{0} = {0}", inout(reg) value => _, options(preserves_flags, nostack)) };
    copy
}
