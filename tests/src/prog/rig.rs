//! The programs and their maps, on the bench.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{ProgramError, ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use svc_lb::compile::desired::DesiredPort;
use svc_lb::dataplane::clock::jiffies_per_second;
use svc_lb::dataplane::collect::Collector;
use svc_lb::dataplane::kernel::{Kernel, MapSet};
use svc_lb::dataplane::{
    Dataplane as _, FAMILIES, FlowEntry, FlowTable, PerFamily, Sizes, Timeouts,
};
use svc_lb::model::ObjectName;
use svc_lb::plan::{self, Planner};
use svc_lb_common::affinity::{Affinity, AffinityKey};
use svc_lb_common::config::Config;
use svc_lb_common::conntrack::{Flow, FlowKey, INBOUND, OUTBOUND, PROOF_SECONDS};
use svc_lb_common::edge::{self, Edge};
use svc_lb_common::fragment::{FirstFragment, FragmentKey, REASSEMBLY_SECONDS};
use svc_lb_common::limits::name;
use svc_lb_common::link::{self, Link};
use svc_lb_common::outcome::{Event, Hook, Outcome, Tally, counter};
use svc_lb_common::service::SLOTS_PER_WORD;
use svc_lb_common::{Addr4, Addr6, Be16, Family, HostAddress, Protocol};

use super::network::{self, Network};
use super::reference::{Tuple, Way};

/// Jiffies per second as the programs are told: seconds are then long, so that nothing times out that a test does
/// not age itself.
const HZ: u32 = 100_000;
/// Generated packets a CPU may send before it must wait for longer than a test lasts.
pub const BURST: u32 = 100;
/// Longer than any frame that comes back.
const OUTPUT: usize = 4_096;

/// What a program decided about a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Onwards: XDP_PASS, or TC_ACT_UNSPEC, which leaves it to the next program.
    On,
    /// Out again: through the same interface, or, at tc, which does not say so, through another.
    Back,
    /// Out through another interface, at XDP.
    Away,
    /// Dropped.
    Dropped,
}

/// How the programs are loaded.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The object.
    pub object: PathBuf,
    /// The frozen settings.
    pub config: Config,
    /// Sizes of maps, where others than `SIZES` are wanted.
    pub sizes: Vec<(&'static str, u32)>,
}

/// Small enough to load quickly and read back whole, large enough that nothing is evicted.
const SIZES: [(&str, u32); 19] = [
    (name::SOCKET_HITS[0], 512),
    (name::SOCKET_HITS[1], 512),
    (name::GUARD, 256),
    (name::SERVICES, 64),
    (name::SLOTS, 4_096),
    (name::EDGES, 16),
    (name::LINKS, 16),
    (name::FRONTENDS[0], 256),
    (name::FRONTENDS[1], 256),
    (name::BACKENDS[0], 512),
    (name::BACKENDS[1], 512),
    (name::OPENING[0], 32_768),
    (name::OPENING[1], 32_768),
    (name::ESTABLISHED[0], 32_768),
    (name::ESTABLISHED[1], 32_768),
    (name::STREAMS[0], 32_768),
    (name::STREAMS[1], 32_768),
    (name::FRAGMENTS[0], 32_768),
    (name::FRAGMENTS[1], 32_768),
];

/// The object that `cargo xtask build` leaves.
#[must_use]
pub fn object() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/svc-lb")
}

/// Sizes for maps that only the agent writes.
const MAP_SIZES: [(&str, u32); 16] = [
    (name::SOCKET_HITS[0], 64),
    (name::SOCKET_HITS[1], 64),
    (name::GUARD, 1_024),
    (name::SERVICES, 64),
    (name::SLOTS, 4_096),
    (name::EDGES, 16),
    (name::FRONTENDS[0], 64),
    (name::FRONTENDS[1], 64),
    (name::BACKENDS[0], 64),
    (name::BACKENDS[1], 64),
    (name::OPENING[0], 64),
    (name::OPENING[1], 64),
    (name::ESTABLISHED[0], 64),
    (name::ESTABLISHED[1], 64),
    (name::STREAMS[0], 64),
    (name::STREAMS[1], 64),
];

/// How large [`maps`] are.
#[must_use]
pub fn map_sizes() -> Sizes {
    let size = |name| {
        let of_map = MAP_SIZES.iter().find(|(map, _)| *map == name);
        of_map
            .map(|(_, entries)| *entries)
            .expect("the map has a size")
    };
    let [frontends4, frontends6] = name::FRONTENDS.map(size);
    let [backends4, backends6] = name::BACKENDS.map(size);
    Sizes {
        guard_words: size(name::GUARD),
        frontends: PerFamily {
            v4: frontends4,
            v6: frontends6,
        },
        services: size(name::SERVICES),
        slots: size(name::SLOTS) * SLOTS_PER_WORD,
        backends: PerFamily {
            v4: backends4,
            v6: backends6,
        },
        ..Sizes::default()
    }
}

/// The object's maps, without its programs.
#[must_use]
pub fn maps() -> Kernel {
    let mut loader = EbpfLoader::new();
    for (name, entries) in MAP_SIZES {
        loader.map_max_entries(name, entries);
    }
    let ebpf = loader.load(&bytes(&object())).expect("maps are created");
    Kernel::new(map_set(&ebpf)).expect("the maps are the agent's")
}

fn bytes(object: &Path) -> Vec<u8> {
    std::fs::read(object)
        .unwrap_or_else(|error| panic!("{}: {error}; run cargo xtask build", object.display()))
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            object: object(),
            config: Config {
                seed: 0x5eed,
                service_net4: Addr4::from(std::net::Ipv4Addr::new(10, 96, 0, 0)),
                service_mask4: Addr4::from(std::net::Ipv4Addr::new(255, 255, 0, 0)),
                service_net6: Addr6::from(std::net::Ipv6Addr::new(
                    0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0,
                )),
                service_mask6: Addr6::from(std::net::Ipv6Addr::new(
                    0xffff, 0xffff, 0xffff, 0, 0, 0, 0, 0,
                )),
                hz: HZ,
                generate_rate: 0,
                generate_burst: BURST,
                ..Config::DEFAULT
            },
            sizes: Vec::new(),
        }
    }
}

/// Loaded programs, their maps, and the planner that fills them.
pub struct Rig {
    ebpf: Ebpf,
    /// The maps that the agent writes.
    pub kernel: Kernel,
    /// What fills them.
    pub planner: Planner,
    /// The settings as loaded.
    pub config: Config,
    /// Flow entries that the rig removed, by map.
    removed: BTreeMap<&'static str, u64>,
}

impl fmt::Debug for Rig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rig").finish_non_exhaustive()
    }
}

impl Rig {
    /// The programs with the default setup, and the network's edges.
    #[must_use]
    pub fn new(network: &Network) -> Self {
        Self::with(network, &Setup::default())
    }

    /// The programs as `setup` says, and the network's edges.
    #[must_use]
    pub fn with(network: &Network, setup: &Setup) -> Self {
        let bytes = bytes(&setup.object);
        let sizes: BTreeMap<&str, u32> = SIZES
            .into_iter()
            .chain(setup.sizes.iter().copied())
            .collect();
        let config = Config {
            guard_words: sizes[name::GUARD],
            ..setup.config
        };
        let mut loader = EbpfLoader::new();
        loader
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global("CONFIG", &config, true);
        for (name, entries) in &sizes {
            loader.map_max_entries(name, *entries);
        }
        let mut ebpf = loader.load(&bytes).expect("maps are created");
        for hook in Hook::ALL {
            load(&mut ebpf, *hook).unwrap_or_else(|error| panic!("{}: {error}", hook.name()));
        }
        let kernel = Kernel::new(map_set(&ebpf)).expect("the maps are the agent's");
        let planner = Planner::new(kernel.sizes());
        let mut rig = Self {
            ebpf,
            kernel,
            planner,
            config,
            removed: BTreeMap::new(),
        };
        for (index, edge) in edges(network) {
            rig.kernel.put_edge(index, &edge).expect("an edge is put");
        }
        let map = rig.ebpf.map_mut(name::LINKS).expect("the map is there");
        let mut map: aya::maps::HashMap<_, u32, Link> = map.try_into().expect("a hash");
        for (index, link) in links(network) {
            map.insert(index, link, 0).expect("a link is put");
        }
        rig
    }

    /// Programs what one Service wants.
    pub fn set(&mut self, service: &str, ports: Vec<DesiredPort>) {
        self.planner
            .set_service(&ObjectName::new("test", service), ports);
        self.apply();
    }

    /// Says which pods of this node have vanished.
    pub fn set_vanished(&mut self, pods: &BTreeSet<IpAddr>) {
        let [v4, v6] = name::VANISHED;
        replace::<Addr4>(self.map(v4), pods);
        replace::<Addr6>(self.map(v6), pods);
    }

    /// Writes what is pending.
    pub fn apply(&mut self) {
        plan::apply(&mut self.planner, &mut self.kernel).expect("the maps are written");
        let refusals = self.planner.refusals();
        assert!(refusals.is_empty(), "refused: {refusals:?}");
    }

    /// Runs a hook's program on a frame at an interface; the frame as it came out.
    #[must_use]
    pub fn run(&self, hook: Hook, interface: u32, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let mut out = vec![0; OUTPUT];
        let program = self
            .ebpf
            .program(hook.name())
            .expect("the program is there");
        let result = match hook {
            Hook::XdpIngress => {
                let context = xdp_context(interface, frame.len());
                let program: &Xdp = program.try_into().expect("an XDP program");
                program.test_run(options(frame, &mut out, &context))
            }
            Hook::TcIngress | Hook::TcEgress => {
                let context = skb_context(interface);
                let program: &SchedClassifier = program.try_into().expect("a classifier");
                program.test_run(options(frame, &mut out, &context))
            }
        };
        let result = result.unwrap_or_else(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            panic!(
                "run {} on {} bytes: {error}: {cause:?}",
                hook.name(),
                frame.len()
            )
        });
        out.truncate(usize::try_from(result.data_size_out).expect("a length"));
        (verdict(hook, result.return_value), out)
    }

    /// A hook's program, for who runs it by another way.
    #[must_use]
    pub fn program_fd(&self, hook: Hook) -> ProgramFd {
        let program = self.ebpf.program(hook.name()).expect("it is there");
        let fd = program.fd().expect("it is loaded");
        fd.try_clone().expect("a descriptor is cloned")
    }

    /// All counters that are not 0.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let values = self.kernel.counters().expect("counters are read");
        let value = |index: u32| values[index as usize];
        let mut counters = Counters::default();
        for hook in Hook::ALL {
            for outcome in Outcome::ALL {
                counters.add(
                    Count::Outcome(*hook, *outcome),
                    value(counter(*hook, *outcome)),
                );
            }
        }
        for event in Event::ALL {
            counters.add(Count::Event(*event), value(event.index()));
        }
        counters
    }

    /// Compares the tallies of the flow maps with the entries there are; nothing may have been evicted.
    ///
    /// # Errors
    /// The map whose entries are not those that came and did not leave.
    pub fn check_tallies(&self) -> Result<(), String> {
        let counters = self.kernel.counters().expect("counters are read");
        let tally = |tally: Tally, map, family| counters[tally.index(map, family) as usize];
        let flows = self.flows();
        for table in FlowTable::ALL {
            for family in FAMILIES {
                let map = table.lru().name(family);
                let here = |flow: &&FlowEntry| {
                    flow.table == table && Family::of(flow.source.ip()) == family
                };
                let present = flows.iter().filter(here).count() as u64;
                let inserted = tally(Tally::Inserted, table.lru(), family);
                let removed = tally(Tally::Removed, table.lru(), family);
                let by_rig = self.removed.get(map).copied().unwrap_or(0);
                if inserted != present + removed + by_rig {
                    return Err(format!(
                        "{map}: {inserted} entries inserted, {removed} removed, {by_rig} by the test, {present} present"
                    ));
                }
            }
        }
        Ok(())
    }

    /// All flow entries.
    #[must_use]
    pub fn flows(&self) -> Vec<FlowEntry> {
        let mut flows = Vec::new();
        self.kernel
            .visit_flows(&mut |entry| flows.push(*entry))
            .expect("flows are read");
        flows
    }

    /// Removes all flow entries.
    pub fn clear_flows(&mut self) {
        self.remove(&|_, _| true);
    }

    fn remove_from<K: aya::Pod, V: aya::Pod>(
        &mut self,
        name: &'static str,
        which: &dyn Fn(&V) -> bool,
    ) {
        let map = self.ebpf.map_mut(name).expect("the map is there");
        let mut map: aya::maps::HashMap<_, K, V> = map.try_into().expect("a hash");
        let entries = map.iter().map(|entry| entry.expect("an entry"));
        let gone = entries.filter(|(_, value)| which(value));
        let keys: Vec<K> = gone.map(|(key, _)| key).collect();
        *self.removed.entry(name).or_default() += keys.len() as u64;
        for key in keys {
            map.remove(&key).expect("an entry is removed");
        }
    }

    /// Makes every UDP flow that is opening old enough for a client's datagram to confirm it.
    pub fn age_datagrams(&mut self) {
        let age = PROOF_SECONDS * self.config.hz;
        let age_one = |protocol: u8, proof: &mut u32| {
            if protocol == Protocol::Udp as u8 {
                *proof = proof.wrapping_sub(age);
            }
        };
        let [v4, v6] = name::OPENING;
        change_all::<FlowKey<Addr4>, Flow<Addr4>>(self.map(v4), &|key, flow| {
            age_one(key.protocol, &mut flow.proof);
        });
        change_all::<FlowKey<Addr6>, Flow<Addr6>>(self.map(v6), &|key, flow| {
            age_one(key.protocol, &mut flow.proof);
        });
    }

    /// Makes every fragmented datagram too old to be put together, by so many seconds more than it must be.
    pub fn age_fragments(&mut self, seconds: u32) {
        let age = (REASSEMBLY_SECONDS + seconds) * self.config.hz;
        let [v4, v6] = name::FRAGMENTS;
        age_fragments_in::<Addr4>(self.map(v4), age);
        age_fragments_in::<Addr6>(self.map(v6), age);
    }

    /// What collects flows and pins that are over.
    ///
    /// # Panics
    /// If it does not take the programs' maps.
    #[must_use]
    pub fn collector(&self, timeouts: Timeouts) -> Collector {
        Collector::new(&mut map_set(&self.ebpf), timeouts).expect("the maps are the agent's")
    }

    /// Makes flow entries look as if no packet had matched for so many seconds longer, by the kernel's clock: those of
    /// which `which` says so by their map and traits.
    pub fn age(&mut self, seconds: u32, which: &dyn Fn(FlowTable, u16) -> bool) {
        let age = seconds * jiffies_per_second().expect("the clock is known");
        for table in FlowTable::ALL {
            let v4 = self.map(table.lru().name(Family::V4));
            change_all::<FlowKey<Addr4>, Flow<Addr4>>(v4, &|_, flow| {
                let age = if which(table, flow.traits) { age } else { 0 };
                flow.seen = flow.seen.wrapping_sub(age);
            });
            let v6 = self.map(table.lru().name(Family::V6));
            change_all::<FlowKey<Addr6>, Flow<Addr6>>(v6, &|_, flow| {
                let age = if which(table, flow.traits) { age } else { 0 };
                flow.seen = flow.seen.wrapping_sub(age);
            });
        }
    }

    /// Removes flow entries of which `which` says so by their map and traits.
    pub fn remove(&mut self, which: &dyn Fn(FlowTable, u16) -> bool) {
        for table in FlowTable::ALL {
            let [v4, v6] = FAMILIES.map(|family| table.lru().name(family));
            self.remove_from::<FlowKey<Addr4>, Flow<Addr4>>(v4, &|flow| which(table, flow.traits));
            self.remove_from::<FlowKey<Addr6>, Flow<Addr6>>(v6, &|flow| which(table, flow.traits));
        }
    }

    /// Positions of `guard_direct` that are set.
    #[must_use]
    pub fn direct_positions(&self) -> Vec<u32> {
        let map = self.ebpf.map(name::GUARD_DIRECT).expect("the map is there");
        let map: aya::maps::Array<_, u64> = map.try_into().expect("an array");
        let set = (0..map.len()).filter(|index| map.get(index, 0).expect("a position") != 0);
        set.collect()
    }

    /// Makes direct flows look as if the latest had been opened so many seconds earlier.
    pub fn age_direct(&mut self, seconds: u32) {
        let age = u64::from(seconds * jiffies_per_second().expect("the clock is known"));
        let positions = self.direct_positions();
        let map = self.map(name::GUARD_DIRECT);
        let mut map: aya::maps::Array<_, u64> = map.try_into().expect("an array");
        for index in positions {
            let opened = map.get(&index, 0).expect("a position");
            map.set(index, opened - age, 0)
                .expect("a position is written");
        }
    }

    /// Removes one entry of a flow, and makes the other one look as if no packet had matched for long.
    pub fn evict(&mut self, lost: &Tuple, kept: &Tuple) {
        match lost.source.ip() {
            IpAddr::V4(_) => self.evict_in::<Addr4>(0, lost, kept),
            IpAddr::V6(_) => self.evict_in::<Addr6>(1, lost, kept),
        }
    }

    fn evict_in<A: HostAddress>(&mut self, family: usize, lost: &Tuple, kept: &Tuple)
    where
        FlowKey<A>: aya::Pod,
        Flow<A>: aya::Pod,
    {
        let (lost, kept) = (key::<A>(lost), key::<A>(kept));
        let second = self.config.hz;
        let mut removed = Vec::new();
        for names in [name::OPENING, name::ESTABLISHED, name::STREAMS] {
            let map = self.map(names[family]);
            let mut map: aya::maps::HashMap<_, FlowKey<A>, Flow<A>> =
                map.try_into().expect("a hash");
            if map.remove(&lost).is_ok() {
                removed.push(names[family]);
            }
            if let Ok(mut flow) = map.get(&kept, 0) {
                flow.seen = flow.seen.wrapping_sub(second);
                map.insert(kept, flow, 0).expect("an entry is written");
            }
        }
        assert_eq!(removed.len(), 1, "the flow has its entries");
        for name in removed {
            *self.removed.entry(name).or_default() += 1;
        }
    }

    fn map(&mut self, name: &str) -> &mut Map {
        self.ebpf.map_mut(name).expect("the map is there")
    }

    /// Sets the tokens in the CPUs' buckets of generated packets.
    ///
    /// False, and nothing is changed, while no packet was generated yet: what was never used counts as idle for long,
    /// so as full.
    pub fn set_tokens(&mut self, tokens: u32) -> bool {
        let map = self.ebpf.map_mut(name::BUCKET).expect("the map is there");
        let mut buckets: PerCpuArray<_, [u64; 2]> = map.try_into().expect("a per-CPU array");
        let mut values = buckets.get(&0, 0).expect("buckets are read").to_vec();
        let latest = values.iter().map(|[filled, _]| *filled).max().unwrap_or(0);
        if latest == 0 {
            return false;
        }
        for value in &mut values {
            *value = [latest, u64::from(tokens) * u64::from(self.config.hz)];
        }
        let values = PerCpuValues::try_from(values).expect("as many as CPUs");
        buckets.set(0, values, 0).expect("buckets are written");
        true
    }

    /// Changes all pins of a family's clients by `change`.
    pub fn change_pins(&mut self, change: impl Fn(&mut Affinity)) {
        for (index, name) in name::AFFINITY.into_iter().enumerate() {
            let map = self.ebpf.map_mut(name).expect("the map is there");
            if index == 0 {
                change_all::<AffinityKey<Addr4>, _>(map, &|_, pin| change(pin));
            } else {
                change_all::<AffinityKey<Addr6>, _>(map, &|_, pin| change(pin));
            }
        }
    }
}

/// Makes a map hold one family's addresses, and nothing else.
fn replace<A: HostAddress>(map: &mut Map, addresses: &BTreeSet<IpAddr>) {
    let mut map: aya::maps::HashMap<_, A, u64> = map.try_into().expect("a hash");
    let there: Vec<A> = map.keys().map(|key| key.expect("a key")).collect();
    for key in there {
        map.remove(&key).expect("an entry is removed");
    }
    for address in addresses.iter().filter_map(|at| A::from_ip(*at)) {
        map.insert(address, 0, 0).expect("an entry is put");
    }
}

fn age_fragments_in<A: HostAddress>(map: &mut Map, age: u32)
where
    FragmentKey<A>: aya::Pod,
{
    change_all::<FragmentKey<A>, FirstFragment>(map, &|key, first| {
        first.seen = first.seen.wrapping_sub(age);
        *first = first.sealed(key);
    });
}

fn change_all<K: aya::Pod, V: aya::Pod>(map: &mut Map, change: &dyn Fn(&K, &mut V)) {
    let mut map: aya::maps::HashMap<_, K, V> = map.try_into().expect("a hash");
    let entries: Vec<_> = map.iter().map(|entry| entry.expect("an entry")).collect();
    for (key, mut value) in entries {
        change(&key, &mut value);
        map.insert(key, value, 0).expect("an entry is written");
    }
}

fn key<A: HostAddress>(tuple: &Tuple) -> FlowKey<A> {
    let at = |end: SocketAddr| {
        let address = A::from_ip(end.ip()).expect("of the family");
        (address, Be16::new(end.port()))
    };
    let ((source, source_port), (destination, destination_port)) =
        (at(tuple.source), at(tuple.destination));
    let direction = match tuple.way {
        Way::In => INBOUND,
        Way::Out => OUTBOUND,
    };
    FlowKey::new(
        source,
        destination,
        source_port,
        destination_port,
        tuple.protocol,
        direction,
    )
}

/// Loads one program and returns how many instructions the verifier walked through.
///
/// # Errors
/// The verifier's refusal.
pub fn load(ebpf: &mut Ebpf, hook: Hook) -> Result<u32, ProgramError> {
    let program = ebpf
        .program_mut(hook.name())
        .expect("the object has the program");
    match hook {
        Hook::XdpIngress => <&mut Xdp>::try_from(&mut *program)?.load()?,
        Hook::TcIngress | Hook::TcEgress => {
            <&mut SchedClassifier>::try_from(&mut *program)?.load()?;
        }
    }
    Ok(program.info()?.verified_instruction_count().unwrap_or(0))
}

/// The network's edges as the agent would enter them.
#[must_use]
pub fn edges(network: &Network) -> [(u32, Edge); 5] {
    let edge = |bits, bridge| Edge {
        bits,
        bridge,
        mac: [0; 6],
        reserved: [0; 2],
    };
    [
        (network.uplink, edge(edge::UPLINK, 0)),
        (network.xdp_uplink, edge(edge::UPLINK | edge::XDP, 0)),
        (network.pod, edge(edge::POD, 0)),
        (network.other_pod, edge(edge::POD, 0)),
        (network.bridged_pod, edge(edge::POD, network.bridge)),
    ]
}

/// The interfaces that packets may leave through, as the agent would enter them.
#[must_use]
pub fn links(network: &Network) -> [(u32, Link); 4] {
    let link = |sources: [IpAddr; 2], bits| {
        let [IpAddr::V4(v4), IpAddr::V6(v6)] = sources else {
            panic!("IPv4 comes first: {sources:?}")
        };
        Link {
            v4: v4.into(),
            v6: v6.into(),
            bits,
            reserved: 0,
        }
    };
    [
        (network.uplink, link(network::UPLINK.sources, 0)),
        (
            network.xdp_uplink,
            link(network::XDP_UPLINK.sources, link::XDP),
        ),
        (network.stranger, link(network::STRANGER.sources, link::XDP)),
        (network.bridge, link(network::BRIDGE_SOURCES, 0)),
    ]
}

fn map_set(ebpf: &Ebpf) -> MapSet {
    let fds = name::PINNED.into_iter().map(|name| {
        let map = ebpf.map(name).expect("the object has the map");
        (name, descriptor(map))
    });
    MapSet { fds: fds.collect() }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kinds we do not use are many"
)]
fn descriptor(map: &Map) -> OwnedFd {
    let data: &MapData = match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data) => data,
        other => panic!("not one of our kinds: {other:?}"),
    };
    data.fd()
        .as_fd()
        .try_clone_to_owned()
        .expect("a descriptor is cloned")
}

fn options<'a>(frame: &'a [u8], out: &'a mut [u8], context: &'a [u8]) -> TestRunOptions<'a> {
    TestRunOptions {
        data_in: Some(frame),
        data_out: Some(out),
        ctx_in: Some(context),
        ..TestRunOptions::default()
    }
}

/// `struct xdp_md` of a frame that came in at an interface.
pub(super) fn xdp_context(interface: u32, length: usize) -> Vec<u8> {
    // data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
    let length = u32::try_from(length).expect("a frame's length");
    [0, length, 0, interface, 0, 0]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect()
}

/// `struct __sk_buff` of an skb at an interface; the fields in front of it must be 0.
pub(super) fn skb_context(interface: u32) -> Vec<u8> {
    const BEFORE_IFINDEX: usize = 10;
    let mut context = vec![0; BEFORE_IFINDEX * 4];
    context.extend(interface.to_ne_bytes());
    context
}

fn verdict(hook: Hook, code: u32) -> Verdict {
    match (hook, code.cast_signed()) {
        (Hook::XdpIngress, 2) | (Hook::TcIngress | Hook::TcEgress, -1) => Verdict::On,
        (Hook::XdpIngress, 4) => Verdict::Away,
        (Hook::XdpIngress, 3) | (Hook::TcIngress | Hook::TcEgress, 7) => Verdict::Back,
        (Hook::XdpIngress, 1) | (Hook::TcIngress | Hook::TcEgress, 2) => Verdict::Dropped,
        (hook, code) => panic!("{} returned {code}", hook.name()),
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Count {
    /// A packet's outcome at a hook.
    Outcome(Hook, Outcome),
    /// An event.
    Event(Event),
}

/// Counters that are not 0.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Counters(BTreeMap<Count, u64>);

impl Counters {
    /// Adds to one.
    pub fn add(&mut self, count: Count, number: u64) {
        if number != 0 {
            *self.0.entry(count).or_default() += number;
        }
    }

    /// One counter.
    #[must_use]
    pub fn get(&self, count: Count) -> u64 {
        self.0.get(&count).copied().unwrap_or(0)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Count, u64)> {
        self.0.iter().map(|(count, number)| (*count, *number))
    }

    /// What was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let mut difference = Self::default();
        for (count, number) in self.iter() {
            difference.add(count, number - before.get(count));
        }
        difference
    }
}
