//! The kernel side: object, pins, links, maps, and what the kernel can do.
//!
//! [`Dataplane`] is the seam: all above it (`plan`, the reconcile tests) runs without root against
//! [`memory::Memory`], and against [`faulty::Faulty`], which fails by seed.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::Serialize;
use svc_lb_common::backend::{self, Backend};
use svc_lb_common::conntrack::{self, Flow, FlowKey};
use svc_lb_common::guard;
use svc_lb_common::outcome::Lru;
use svc_lb_common::service::{Frontend, FrontendKey, Service};
use svc_lb_common::source_range::SourceRangeKey;
use svc_lb_common::{Addr4, Addr6, Be16, Family, HostAddress, Protocol};

pub mod attach;
pub mod clock;
pub mod clsact;
pub mod collect;
pub mod edges;
pub mod faulty;
pub mod kernel;
pub mod links;
pub mod loader;
pub mod memory;
pub mod pins;
pub mod probe;
pub mod reserve;
pub mod sizes;
pub mod sockets;
pub mod sys;
pub mod timeouts;
pub mod vanished;

pub use self::timeouts::{FlowState, Timeouts};

/// What can go wrong with a map, by operation and object.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The kernel refused an operation.
    #[error("cannot {operation} {object}")]
    Kernel {
        /// What was tried: "update", "read" and so on.
        operation: &'static str,
        /// On which map, and on which element where one is known.
        object: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A map that is needed was not handed over.
    #[error("map {map} is missing")]
    MissingMap {
        /// Its name.
        map: &'static str,
    },
    /// A map is not what this agent would have made.
    #[error("map {map} has {property} {found}, expected {expected}; it belongs to another layout")]
    WrongMap {
        /// Its name.
        map: &'static str,
        /// Type, key size, value size, entries or flags.
        property: &'static str,
        /// As the kernel says.
        found: u32,
        /// As the records say.
        expected: u32,
    },
    /// The element is not in the table.
    #[error("{table} has no element {index}: its size is {size}")]
    OutOfBounds {
        /// The table's map.
        table: &'static str,
        /// The element.
        index: u32,
        /// Elements of the table.
        size: u32,
    },
    /// A record of one family was given for a map of the other.
    #[error("{address} does not belong into an {family} map")]
    WrongFamily {
        /// The record's address.
        address: IpAddr,
        /// The map's family.
        family: Family,
    },
    /// [`faulty::Faulty`] decided so.
    #[error("cannot {operation} {object}: a fault was injected")]
    Injected {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: &'static str,
    },
}

/// Result of an operation on the maps.
pub type Result<T, E = DataplaneError> = std::result::Result<T, E>;

/// The two families, in the order of the maps' names.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// One of each family's.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct PerFamily<T> {
    /// IPv4's.
    pub v4: T,
    /// IPv6's.
    pub v6: T,
}

impl<T> PerFamily<T> {
    /// Makes one for each family.
    pub fn from_fn(mut make: impl FnMut(Family) -> T) -> Self {
        Self {
            v4: make(Family::V4),
            v6: make(Family::V6),
        }
    }

    /// One family's.
    pub const fn of(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// One family's, to change.
    pub const fn of_mut(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// The name of one family's map, from a pair of `limits::name`.
#[must_use]
pub const fn map_name(names: [&'static str; 2], family: Family) -> &'static str {
    let [v4, v6] = names;
    match family {
        Family::V4 => v4,
        Family::V6 => v6,
    }
}

/// How many elements each table holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Sizes {
    /// Words of `guard`; a power of two.
    pub guard_words: u32,
    /// Entries of `frontends4`, `frontends6`.
    pub frontends: PerFamily<u32>,
    /// Elements of `services`; index 0 is never used.
    pub services: u32,
    /// Positions of `slots`, a multiple of [`SLOTS_PER_WORD`](svc_lb_common::service::SLOTS_PER_WORD).
    pub slots: u32,
    /// Elements of `backends4`, `backends6`; id 0 is never used.
    pub backends: PerFamily<u32>,
    /// Entries of `source_ranges4`, `source_ranges6`.
    pub source_ranges: PerFamily<u32>,
}

/// Where clients send to: the key of a frontend or of an address entry, in `std`'s types.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct FrontendAt {
    /// Address; unspecified for "any NodePort address of this node".
    pub address: IpAddr,
    /// Port, host byte order; 0 in an address entry.
    pub port: u16,
    /// IANA protocol number; 0 in an address entry.
    pub protocol: u8,
}

impl FrontendAt {
    /// A NodePort of one family.
    #[must_use]
    pub const fn node_port(family: Family, port: u16, protocol: Protocol) -> Self {
        let address = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self {
            address,
            port,
            protocol: protocol as u8,
        }
    }

    /// The entry that tells what an address is.
    #[must_use]
    pub const fn address(address: IpAddr) -> Self {
        Self {
            address,
            port: 0,
            protocol: 0,
        }
    }

    /// Whether this is an address entry.
    #[must_use]
    pub const fn is_address(&self) -> bool {
        self.protocol == 0
    }

    /// The family of the map it belongs into.
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of(self.address)
    }

    /// The map's key; `None` for the other family.
    #[must_use]
    pub fn to_key<A: HostAddress>(&self) -> Option<FrontendKey<A>> {
        let address = A::from_ip(self.address)?;
        Some(FrontendKey::new(
            address,
            Be16::new(self.port),
            self.protocol,
        ))
    }

    /// From the map's key.
    #[must_use]
    pub fn from_key<A: HostAddress>(key: &FrontendKey<A>) -> Self {
        Self {
            address: key.address.to_ip(),
            port: key.port.get(),
            protocol: key.protocol,
        }
    }
}

/// What a frontend or an address entry is. The default is what a damaged entry reads as.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct FrontendValue {
    /// Index of the service; 0 in an address entry.
    pub service: u32,
    /// One of [`kind`](svc_lb_common::service::kind).
    pub kind: u8,
}

impl FrontendValue {
    /// The map's value for `key`.
    #[must_use]
    pub fn to_record<A: HostAddress>(&self, key: &FrontendKey<A>) -> Frontend {
        Frontend::new(key, self.service, self.kind)
    }

    /// From the map's value; the default if it is not `key`'s or its kind does not exist.
    #[must_use]
    pub fn from_record<A: HostAddress>(key: &FrontendKey<A>, record: &Frontend) -> Self {
        match u8::try_from(record.kind) {
            Ok(kind) if record.belongs_to(key) => Self {
                service: record.service,
                kind,
            },
            _ => Self::default(),
        }
    }
}

/// One element of `backends4` or `backends6`, in `std`'s types.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct BackendRecord {
    /// Address and port.
    pub address: SocketAddr,
    /// How often the id was given to another endpoint, modulo 2^16.
    pub generation: u16,
    /// Bits of [`svc_lb_common::backend`].
    pub bits: u32,
    /// Index of the service it belongs to.
    pub service: u32,
}

impl BackendRecord {
    /// The word that changes under traffic.
    #[must_use]
    pub const fn meta(&self) -> u64 {
        backend::meta(Be16::new(self.address.port()), self.generation, self.bits)
    }

    /// The map's value; `None` for the other family.
    #[must_use]
    pub fn to_record<A: HostAddress>(&self) -> Option<Backend<A>> {
        let address = A::from_ip(self.address.ip())?;
        let port = Be16::new(self.address.port());
        Some(Backend::new(
            address,
            port,
            self.generation,
            self.bits,
            self.service,
        ))
    }

    /// From the map's value.
    #[must_use]
    pub fn from_record<A: HostAddress>(record: &Backend<A>) -> Self {
        Self {
            address: SocketAddr::new(record.address.to_ip(), record.port().get()),
            generation: record.generation(),
            bits: record.bits(),
            service: record.service,
        }
    }

    /// This element after one store to its first word.
    #[must_use]
    pub fn with_meta(mut self, meta: u64) -> Self {
        let seen = Backend {
            meta,
            ..Backend::new(Addr4(0), Be16(0), 0, 0, 0)
        };
        self.address.set_port(seen.port().get());
        self.generation = seen.generation();
        self.bits = seen.bits();
        self
    }
}

/// Clients that a service admits at its load balancer addresses.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct SourceRange {
    /// Index of the service.
    pub service: u32,
    /// Their addresses; no bits are set behind the prefix.
    pub net: IpNet,
}

impl SourceRange {
    /// The family of the map it belongs into.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.net.addr())
    }

    /// The map's key; `None` for the other family.
    #[must_use]
    pub fn to_key<A: HostAddress>(&self) -> Option<SourceRangeKey<A>> {
        let address = A::from_ip(self.net.network())?;
        Some(SourceRangeKey::new(
            self.service,
            address,
            self.net.prefix_len(),
        ))
    }

    /// From the map's key; `None` for one that no agent writes, which leaves out bits of the
    /// service.
    #[must_use]
    pub fn from_key<A: HostAddress>(key: &SourceRangeKey<A>) -> Option<Self> {
        let net = IpNet::new(key.source.address.to_ip(), key.prefix()?).ok()?;
        Some(Self {
            service: key.source.service,
            net: net.trunc(),
        })
    }
}

/// One word of a [`Service`]: the unit in which user space can publish.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceWord {
    /// [`Service::cluster`].
    Cluster,
    /// [`Service::local`].
    Local,
    /// [`Service::options`].
    Options,
}

impl ServiceWord {
    /// Position in the record, in u64 words.
    #[must_use]
    pub const fn position(self) -> usize {
        match self {
            Self::Cluster => 0,
            Self::Local => 1,
            Self::Options => 2,
        }
    }
}

/// One bit of `guard` or `guard_port`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum GuardBit {
    /// A hint about all addresses that hash to one nibble.
    Address {
        /// Position of the nibble in the table.
        nibble: u32,
        /// [`guard::FRONTEND`], [`guard::NODE`] or [`guard::BACKEND`].
        bit: u8,
    },
    /// A NodePort.
    Port {
        /// Transport protocol.
        protocol: Protocol,
        /// Port, host byte order.
        port: u16,
    },
}

impl GuardBit {
    /// The bit `bit` of an address, in a table of `words` words.
    #[must_use]
    pub fn address(address: IpAddr, bit: u8, words: u32) -> Self {
        let (word, shift) = match address {
            IpAddr::V4(address) => guard::address_position(Addr4::from(address), words),
            IpAddr::V6(address) => guard::address_position(Addr6::from(address), words),
        };
        Self::Address {
            nibble: word * guard::NIBBLES + shift / 4,
            bit,
        }
    }

    /// Which word of its table, and the bit's mask in it.
    #[must_use]
    pub const fn position(self) -> (u32, u64) {
        match self {
            Self::Address { nibble, bit } => (
                nibble / guard::NIBBLES,
                (bit as u64) << (nibble % guard::NIBBLES * 4),
            ),
            Self::Port { protocol, port } => {
                let (word, bit) = guard::port_position(protocol, port);
                (word, 1 << bit)
            }
        }
    }
}

/// Everything the agent has programmed, read back. What was never written is left out.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Snapshot {
    /// Sizes of the tables.
    pub sizes: Sizes,
    /// `guard`, all words.
    #[serde(skip)]
    pub guard: Vec<u64>,
    /// `guard_port`, all words.
    #[serde(skip)]
    pub guard_port: Vec<u64>,
    /// Both families, sorted.
    pub frontends: Vec<(FrontendAt, FrontendValue)>,
    /// Elements that are not all zero, by index; index 0 included where it is damaged.
    #[serde(skip)]
    pub services: Vec<(u32, Service)>,
    /// Ids by position; positions beyond the end hold 0.
    pub slots: Vec<u32>,
    /// Elements that are not all zero, by family and id; id 0 included where it is damaged.
    pub backends: PerFamily<Vec<(u32, BackendRecord)>>,
    /// Both families, sorted.
    pub source_ranges: Vec<SourceRange>,
}

/// Which of the flow maps.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowTable {
    /// The client has not proved yet that it gets the backend's answers.
    Opening,
    /// TCP connections.
    Established,
    /// UDP streams.
    Streams,
}

impl FlowTable {
    /// All of them, in the order in which flows go through them.
    pub const ALL: [Self; 3] = [Self::Opening, Self::Established, Self::Streams];

    /// The kind of map.
    #[must_use]
    pub const fn lru(self) -> Lru {
        match self {
            Self::Opening => Lru::Opening,
            Self::Established => Lru::Established,
            Self::Streams => Lru::Streams,
        }
    }
}

/// One entry of `opening`, `established` or `streams`, in `std`'s types.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct FlowEntry {
    /// The map.
    pub table: FlowTable,
    /// Source before translation.
    pub source: SocketAddr,
    /// Destination before translation.
    pub destination: SocketAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// [`conntrack::INBOUND`] or [`conntrack::OUTBOUND`].
    pub direction: u8,
    /// Source after translation.
    pub to_source: SocketAddr,
    /// Destination after translation.
    pub to_destination: SocketAddr,
    /// Backend id.
    pub backend: u32,
    /// Generation of the backend.
    pub generation: u16,
    /// Index of the service.
    pub service: u32,
    /// Bits of [`conntrack::flow`].
    pub traits: u16,
    /// Bits of [`conntrack::state`].
    pub state: u32,
    /// Low 32 bits of jiffies when a packet last matched.
    pub seen: u32,
}

/// The kernel's coarse clock, against which flows age.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FlowClock {
    /// Low 32 bits of jiffies, now.
    pub jiffies: u32,
    /// Jiffies per second.
    pub hz: u32,
}

impl FlowClock {
    /// Seconds since `seen`, low 32 bits of jiffies.
    #[must_use]
    pub const fn seconds_since(self, seen: u32) -> u32 {
        let age = self.jiffies.wrapping_sub(seen);
        // A packet may match after the clock was read: then the difference is negative.
        if age.cast_signed() < 0 {
            return 0;
        }
        // At least 24 jiffies make a second.
        age / if self.hz == 0 { 1 } else { self.hz }
    }
}

impl FlowEntry {
    /// From the map's key and value.
    #[must_use]
    pub fn new<A: HostAddress>(table: FlowTable, key: &FlowKey<A>, flow: &Flow<A>) -> Self {
        let at = |address: A, port: Be16| SocketAddr::new(address.to_ip(), port.get());
        Self {
            table,
            source: at(key.source, key.source_port),
            destination: at(key.destination, key.destination_port),
            protocol: key.protocol,
            direction: key.direction,
            to_source: at(flow.source, flow.source_port),
            to_destination: at(flow.destination, flow.destination_port),
            backend: flow.backend,
            generation: flow.generation,
            service: flow.service,
            traits: flow.traits,
            state: flow.state,
            seen: flow.seen,
        }
    }

    /// The map's key; `None` for the other family.
    #[must_use]
    pub fn key<A: HostAddress>(&self) -> Option<FlowKey<A>> {
        Some(FlowKey::new(
            A::from_ip(self.source.ip())?,
            A::from_ip(self.destination.ip())?,
            Be16::new(self.source.port()),
            Be16::new(self.destination.port()),
            self.protocol,
            self.direction,
        ))
    }

    /// Seconds since a packet last matched.
    #[must_use]
    pub const fn idle_seconds(&self, clock: FlowClock) -> u32 {
        clock.seconds_since(self.seen)
    }

    /// What is known of its flow's life.
    #[must_use]
    pub const fn flow_state(&self) -> FlowState {
        FlowState::of(self.table, self.protocol, self.state)
    }

    /// Whether packets of this flow may still come.
    #[must_use]
    pub fn is_live(&self, clock: FlowClock, timeouts: &Timeouts) -> bool {
        self.idle_seconds(clock) < timeouts.of(self.flow_state())
    }

    /// The guard bits that let this entry's packets reach it, in a table of `words` words: those
    /// of the destination where it matches what comes in, of the source where it matches what
    /// leaves.
    #[must_use]
    pub fn guard_bits(&self, words: u32) -> [Option<GuardBit>; 4] {
        let inbound = self.direction == conntrack::INBOUND;
        let end = if inbound {
            self.destination
        } else {
            self.source
        };
        let bit = |bit| Some(GuardBit::address(end.ip(), bit, words));
        let port = Protocol::from_number(self.protocol)
            .filter(|_| inbound)
            .map(|protocol| GuardBit::Port {
                protocol,
                port: end.port(),
            });
        [
            bit(guard::FRONTEND),
            bit(guard::NODE),
            bit(guard::BACKEND),
            port,
        ]
    }
}

/// The maps that the agent writes, one method per record.
///
/// Every write is idempotent: repeating one that failed, or that may have been done, ends in the
/// same tables. The order that keeps readers whole is `plan`'s concern, not the store's.
pub trait Dataplane {
    /// Sizes of the tables.
    fn sizes(&self) -> Sizes;

    /// Sets bits of `guard` and `guard_port`.
    fn set_guard(&mut self, bits: &[GuardBit]) -> Result<()>;

    /// Clears bits of `guard` and `guard_port`.
    fn clear_guard(&mut self, bits: &[GuardBit]) -> Result<()>;

    /// Fills elements of a backend table by id. No reader may be able to reach them: more than
    /// one word is written.
    fn put_backends(&mut self, family: Family, backends: &[(u32, BackendRecord)]) -> Result<()>;

    /// Stores the first word of elements of a backend table by id: one store each, so under
    /// traffic too.
    fn put_backend_meta(&mut self, family: Family, metas: &[(u32, u64)]) -> Result<()>;

    /// Fills slots from `start` on with backend ids. `start` is a multiple of
    /// [`SLOTS_PER_WORD`](svc_lb_common::service::SLOTS_PER_WORD) and the rest of the last word is
    /// zeroed: a word never belongs to two ranges. No reader may be able to reach them.
    fn put_slots(&mut self, start: u32, ids: &[u32]) -> Result<()>;

    /// Stores one word of a service: what publishes.
    fn store_service(&mut self, index: u32, word: ServiceWord, value: u64) -> Result<()>;

    /// Inserts or replaces frontends and address entries; each changes at once for readers.
    fn put_frontends(
        &mut self,
        family: Family,
        frontends: &[(FrontendAt, FrontendValue)],
    ) -> Result<()>;

    /// Deletes frontends and address entries; absent ones are fine.
    fn delete_frontends(&mut self, family: Family, frontends: &[FrontendAt]) -> Result<()>;

    /// Inserts source ranges; each counts at once where its service's flags ask for them.
    fn put_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()>;

    /// Deletes source ranges; absent ones are fine.
    fn delete_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()>;

    /// Reads everything back.
    fn snapshot(&self) -> Result<Snapshot>;

    /// Returns when no program that ran at the time of the call runs any more: what was unreachable
    /// before the call is in nobody's hands after it.
    fn grace(&self) -> Result<()>;

    /// Shows every flow entry once; entries that come and go meanwhile may be missed.
    fn visit_flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<()>;

    /// Which of `bits` packets of live flows still need: one pass over all flows.
    fn flows_in_use(
        &self,
        bits: &BTreeSet<GuardBit>,
        clock: FlowClock,
        timeouts: &Timeouts,
    ) -> Result<BTreeSet<GuardBit>> {
        let words = self.sizes().guard_words;
        bits_in_use(words, bits, clock, timeouts, |visit| {
            self.visit_flows(visit)
        })
    }
}

/// Which of `bits`, in a guard of `words` words, packets of live flows still need; `visit_all`
/// shows every flow once.
pub fn bits_in_use(
    words: u32,
    bits: &BTreeSet<GuardBit>,
    clock: FlowClock,
    timeouts: &Timeouts,
    visit_all: impl FnOnce(&mut dyn FnMut(&FlowEntry)) -> Result<()>,
) -> Result<BTreeSet<GuardBit>> {
    let mut used = BTreeSet::new();
    visit_all(&mut |entry| {
        if entry.is_live(clock, timeouts) {
            let needs = entry.guard_bits(words).into_iter().flatten();
            used.extend(needs.filter(|bit| bits.contains(bit)));
        }
    })?;
    Ok(used)
}
