//! The planner against the running kernel's maps, beside the same planner against the maps in
//! memory: whatever is desired in whatever order, with writes that fail by the same seed, both read
//! back alike after every step. What is proved about readers on the maps in memory (in `svc-lb`'s
//! own tests) so holds for the kernel's. Needs root.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use svc_lb::compile::desired::{
    Backend, DesiredPort, Frontend, FrontendAddress, FrontendKind, PortKey, Selection,
};
use svc_lb::dataplane::faulty::Faulty;
use svc_lb::dataplane::kernel::{Kernel, MapSet};
use svc_lb::dataplane::memory::Memory;
use svc_lb::dataplane::sys::map::{MapInfo, TypedMap, map_create};
use svc_lb::dataplane::{
    BackendRecord, Dataplane, FlowClock, FlowEntry, FrontendAt, FrontendValue, GuardBit, PerFamily,
    ServiceWord, Sizes, Snapshot, SourceRange, Timeouts,
};
use svc_lb::model::ObjectName;
use svc_lb::plan::{Planner, apply, reclaim, repair, sweep};
use svc_lb_common::backend::{Backend as BackendElement, GONE};
use svc_lb_common::conntrack::{Flow, FlowKey, INBOUND};
use svc_lb_common::edge::{Edge, POD};
use svc_lb_common::guard::{FRONTEND, PORT_WORDS};
use svc_lb_common::hash::{flow_hash, scale};
use svc_lb_common::limits::name;
use svc_lb_common::outcome::COUNTERS;
use svc_lb_common::service::{
    Frontend as FrontendRecord, FrontendKey, SLOTS_PER_WORD, Service, flag, kind,
};
use svc_lb_common::source_range::SourceRangeKey;
use svc_lb_common::{Addr4, Addr6, Be16, Family, Protocol};

const ARRAY: u32 = 2;
const HASH: u32 = 1;
const PERCPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;
const LPM_TRIE: u32 = 11;
const DEVMAP_HASH: u32 = 25;
const NO_PREALLOC: u32 = 1;
const MMAPABLE: u32 = 1 << 10;

fn sizes() -> Sizes {
    Sizes {
        guard_words: 1 << 10,
        frontends: PerFamily { v4: 128, v6: 128 },
        services: 61,
        slots: 2_050,
        backends: PerFamily { v4: 259, v6: 257 },
        source_ranges: PerFamily { v4: 63, v6: 65 },
    }
}

fn info<K, V>(kind: u32, max_entries: u32, flags: u32) -> MapInfo {
    let bytes = |size: usize| u32::try_from(size).unwrap();
    MapInfo {
        kind,
        key_size: bytes(size_of::<K>()),
        value_size: bytes(size_of::<V>()),
        max_entries,
        flags,
    }
}

fn map_infos(sizes: Sizes) -> BTreeMap<&'static str, MapInfo> {
    let [frontends4, frontends6] = name::FRONTENDS;
    let [backends4, backends6] = name::BACKENDS;
    let [ranges4, ranges6] = name::SOURCE_RANGES;
    let [hits4, hits6] = name::SOCKET_HITS;
    let [opening4, opening6] = name::OPENING;
    let [established4, established6] = name::ESTABLISHED;
    let [streams4, streams6] = name::STREAMS;
    let flows4 = info::<FlowKey<Addr4>, Flow<Addr4>>(LRU_HASH, 20_000, 0);
    let flows6 = info::<FlowKey<Addr6>, Flow<Addr6>>(LRU_HASH, 1_024, 0);
    BTreeMap::from([
        (
            name::GUARD,
            info::<u32, u64>(ARRAY, sizes.guard_words, MMAPABLE),
        ),
        (
            name::GUARD_PORT,
            info::<u32, u64>(ARRAY, PORT_WORDS, MMAPABLE),
        ),
        (
            frontends4,
            info::<FrontendKey<Addr4>, FrontendRecord>(HASH, sizes.frontends.v4, 0),
        ),
        (
            frontends6,
            info::<FrontendKey<Addr6>, FrontendRecord>(HASH, sizes.frontends.v6, 0),
        ),
        (
            name::SERVICES,
            info::<u32, Service>(ARRAY, sizes.services, MMAPABLE),
        ),
        (
            name::SLOTS,
            info::<u32, u64>(ARRAY, sizes.slots / SLOTS_PER_WORD, MMAPABLE),
        ),
        (
            backends4,
            info::<u32, BackendElement<Addr4>>(ARRAY, sizes.backends.v4, MMAPABLE),
        ),
        (
            backends6,
            info::<u32, BackendElement<Addr6>>(ARRAY, sizes.backends.v6, MMAPABLE),
        ),
        (
            ranges4,
            info::<SourceRangeKey<Addr4>, u32>(LPM_TRIE, sizes.source_ranges.v4, NO_PREALLOC),
        ),
        (
            ranges6,
            info::<SourceRangeKey<Addr6>, u32>(LPM_TRIE, sizes.source_ranges.v6, NO_PREALLOC),
        ),
        (hits4, info::<u32, u64>(ARRAY, sizes.backends.v4, MMAPABLE)),
        (hits6, info::<u32, u64>(ARRAY, sizes.backends.v6, MMAPABLE)),
        (opening4, flows4),
        (opening6, flows6),
        (established4, flows4),
        (established6, flows6),
        (streams4, flows4),
        (streams6, flows6),
        (name::EDGES, info::<u32, Edge>(HASH, 64, 0)),
        (name::COUNTERS, info::<u32, u64>(PERCPU_ARRAY, COUNTERS, 0)),
    ])
}

fn create(infos: &BTreeMap<&'static str, MapInfo>) -> Result<MapSet> {
    let mut maps = MapSet::default();
    for (name, info) in infos {
        let fd = map_create(*info).with_context(|| format!("make {name}; this needs root"))?;
        maps.fds.insert(name, fd);
    }
    Ok(maps)
}

fn kernel() -> Result<Kernel> {
    Ok(Kernel::new(create(&map_infos(sizes()))?)?)
}

// What is desired.

fn ip(family: Family, net: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, net, 0, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, net.into(), 0, 0, 0, 0, 0, host.into()).into(),
    }
}

fn any_backend(family: Family) -> impl Strategy<Value = Backend> {
    (0..8u8, any::<[bool; 4]>(), 1..4u16).prop_map(move |(host, bits, weight)| {
        let [in_cluster, in_local, serving, local] = bits;
        Backend {
            address: SocketAddr::new(ip(family, 1, host), 8080),
            in_cluster,
            in_local,
            serving,
            local,
            weight,
        }
    })
}

fn any_range(family: Family) -> impl Strategy<Value = IpNet> {
    let longest = if family == Family::V4 { 32 } else { 128 };
    (0..4u8, select(vec![0, 8, longest - 1, longest]))
        .prop_map(move |(host, prefix)| IpNet::new(ip(family, 7, host), prefix).unwrap().trunc())
}

fn any_port(service: u8, family: Family) -> impl Strategy<Value = DesiredPort> {
    let extra = prop_oneof![
        (30_000..30_003u16).prop_map(|port| (FrontendAddress::Node, port, FrontendKind::NodePort)),
        (0..3u8).prop_map(move |host| {
            let address = FrontendAddress::Ip(ip(family, 9, host));
            (address, 80, FrontendKind::LoadBalancer)
        }),
    ];
    let backends = proptest::collection::vec(any_backend(family), 0..8);
    let extras = proptest::collection::vec(extra, 0..3);
    let ranges = proptest::option::of(proptest::collection::vec(any_range(family), 0..4));
    let maglev = |slots| Selection::Maglev { seed: 7, slots };
    let selection = select(vec![Selection::Random, maglev(11), maglev(31)]);
    let parts = (backends, extras, any::<[bool; 3]>(), ranges, selection);
    parts.prop_map(move |(backends, extras, bits, source_ranges, selection)| {
        let [internal_local, external_local, has_any] = bits;
        let own = FrontendAddress::Ip(ip(family, 0, service));
        let frontends = extras
            .into_iter()
            .chain([(own, 80, FrontendKind::ClusterIp)]);
        DesiredPort {
            key: PortKey {
                namespace: "ns".into(),
                service: format!("s{service}"),
                port_name: String::new(),
                protocol: Protocol::Tcp,
                family,
            },
            frontends: frontends
                .map(|(address, port, kind)| Frontend {
                    address,
                    port,
                    kind,
                })
                .collect(),
            backends,
            internal_local,
            external_local,
            has_any,
            selection,
            affinity_seconds: None,
            source_ranges,
        }
    })
}

#[derive(Clone, Debug)]
enum Action {
    Set(u8, Vec<DesiredPort>),
    Nodes(Vec<IpAddr>),
    Apply,
    Reclaim,
    Sweep,
    Restart,
}

fn any_action() -> impl Strategy<Value = Action> {
    let set = (1..6u8).prop_flat_map(|service| {
        let ports = (
            any_port(service, Family::V4),
            any_port(service, Family::V6),
            0..4u8,
        );
        ports.prop_map(move |(v4, v6, shape)| {
            let ports = match shape {
                0 => vec![],
                1 => vec![v4],
                _ => vec![v4, v6],
            };
            Action::Set(service, ports)
        })
    });
    let nodes = proptest::collection::vec((select(vec![Family::V4, Family::V6]), 0..3u8), 0..3)
        .prop_map(|nodes| Action::Nodes(nodes.into_iter().map(|(f, n)| ip(f, 9, n)).collect()));
    prop_oneof![
        5 => set,
        1 => nodes,
        4 => Just(Action::Apply),
        1 => Just(Action::Reclaim),
        1 => Just(Action::Sweep),
        1 => Just(Action::Restart),
    ]
}

/// One planner and one dataplane.
struct World<D> {
    planner: Planner,
    dataplane: Faulty<D>,
    services: BTreeMap<u8, Vec<DesiredPort>>,
    nodes: Vec<IpAddr>,
}

const CLOCK: FlowClock = FlowClock {
    jiffies: 1_000_000,
    hz: 100,
};

impl<D: Dataplane> World<D> {
    fn new(dataplane: D, seed: u64, rate: u32) -> Self {
        Self {
            planner: Planner::new(dataplane.sizes()),
            dataplane: Faulty::new(dataplane, seed, rate),
            services: BTreeMap::new(),
            nodes: Vec::new(),
        }
    }

    fn set(planner: &mut Planner, service: u8, ports: &[DesiredPort]) {
        let name = ObjectName::new("ns", format!("s{service}"));
        planner.set_service(&name, ports.to_vec());
    }

    /// Failures are part of the game; the tables tell.
    fn act(&mut self, action: &Action) {
        match action {
            Action::Set(service, ports) => {
                Self::set(&mut self.planner, *service, ports);
                self.services.insert(*service, ports.clone());
            }
            Action::Nodes(addresses) => {
                self.planner.set_node_addresses(addresses.iter().copied());
                self.nodes.clone_from(addresses);
            }
            Action::Apply => drop(apply(&mut self.planner, &mut self.dataplane)),
            Action::Reclaim => drop(reclaim(&mut self.planner, &self.dataplane)),
            Action::Sweep => drop(sweep(
                &mut self.planner,
                &mut self.dataplane,
                CLOCK,
                &Timeouts::default(),
            )),
            Action::Restart => {
                self.planner = Planner::restore(&self.snapshot());
                for (service, ports) in &self.services {
                    Self::set(&mut self.planner, *service, ports);
                }
                self.planner.set_node_addresses(self.nodes.iter().copied());
                self.planner.remove_unclaimed();
            }
        }
    }

    fn settle(&mut self) {
        self.dataplane.set_rate(0);
        for _ in 0..4 {
            apply(&mut self.planner, &mut self.dataplane).unwrap();
            reclaim(&mut self.planner, &self.dataplane).unwrap();
        }
        sweep(
            &mut self.planner,
            &mut self.dataplane,
            CLOCK,
            &Timeouts::default(),
        )
        .unwrap();
        assert!(!self.planner.is_pending());
    }

    fn snapshot(&self) -> Snapshot {
        self.dataplane.snapshot().unwrap()
    }
}

/// Array elements that are all zero are left out of the kernel's snapshot.
fn written(mut snapshot: Snapshot) -> Snapshot {
    snapshot
        .services
        .retain(|(_, words)| words.cluster.0 != 0 || words.local.0 != 0 || words.options != 0);
    snapshot
}

fn same(memory: &World<Memory>, kernel: &World<Kernel>) -> Result<(), TestCaseError> {
    let (memory, kernel) = (written(memory.snapshot()), kernel.snapshot());
    prop_assert_eq!(&memory.frontends, &kernel.frontends);
    prop_assert_eq!(&memory.services, &kernel.services);
    prop_assert_eq!(&memory.slots, &kernel.slots);
    prop_assert_eq!(&memory.backends, &kernel.backends);
    prop_assert_eq!(&memory.source_ranges, &kernel.source_ranges);
    prop_assert!(memory.guard == kernel.guard, "guard");
    prop_assert!(memory.guard_port == kernel.guard_port, "guard_port");
    Ok(())
}

fn alike(rates: Vec<u32>, cases: u32) {
    let actions = proptest::collection::vec(any_action(), 1..20);
    let strategy = (actions, any::<u64>(), select(rates));
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::with_cases(cases)
    });
    runner
        .run(&strategy, |(actions, seed, rate)| {
            let mut memory = World::new(Memory::new(sizes()), seed, rate);
            let mut kernel = World::new(kernel().unwrap(), seed, rate);
            for action in &actions {
                memory.act(action);
                kernel.act(action);
                same(&memory, &kernel)?;
            }
            memory.settle();
            kernel.settle();
            same(&memory, &kernel)
        })
        .unwrap();
}

#[test]
fn the_kernels_maps_follow_the_planner_as_the_maps_in_memory_do() {
    alike(vec![0], 64);
}

#[test]
fn so_they_do_when_writes_fail() {
    alike(vec![30, 200], 64);
}

/// The kinds of damage that [`damage`] does.
const DAMAGES: usize = 13;

/// Writes to a map what nobody wanted; the map's name, or none where there is nothing to damage.
#[expect(
    clippy::indexing_slicing,
    reason = "one arm for each kind of damage, of which there are as many as the caller draws from"
)]
fn damage(kind: usize, maps: &mut impl Dataplane, before: &Snapshot) -> Option<&'static str> {
    let [frontends4, frontends6] = name::FRONTENDS;
    let [backends4, backends6] = name::BACKENDS;
    let frontend = |family| {
        before
            .frontends
            .iter()
            .find(|(at, _)| at.family() == family)
    };
    let bit = GuardBit::address(ip(Family::V4, 0, 1), FRONTEND, sizes().guard_words);
    let port = GuardBit::Port {
        protocol: Protocol::Udp,
        port: 40_000,
    };
    match kind {
        0 => {
            maps.clear_guard(&[bit]).unwrap();
            (maps.snapshot().unwrap().guard != before.guard).then_some(name::GUARD)
        }
        1 => {
            let words = before.sizes.guard_words;
            let stray = GuardBit::address(ip(Family::V6, 77, 77), FRONTEND, words);
            maps.set_guard(&[stray]).unwrap();
            (maps.snapshot().unwrap().guard != before.guard).then_some(name::GUARD)
        }
        2 => {
            maps.set_guard(&[port]).unwrap();
            Some(name::GUARD_PORT)
        }
        3 | 4 => {
            let family = [Family::V4, Family::V6][kind - 3];
            let (at, _) = frontend(family)?;
            maps.delete_frontends(family, &[*at]).unwrap();
            Some([frontends4, frontends6][kind - 3])
        }
        5 => {
            let (at, value) = before.frontends.first()?;
            let other = FrontendValue {
                service: value.service ^ 5,
                ..*value
            };
            maps.put_frontends(at.family(), &[(*at, other)]).unwrap();
            Some([frontends4, frontends6][usize::from(at.family() == Family::V6)])
        }
        6 => {
            let at = FrontendAt {
                address: ip(Family::V4, 200, 1),
                port: 81,
                protocol: 6,
            };
            let value = FrontendValue {
                service: 1,
                kind: kind::CLUSTER_IP,
            };
            maps.put_frontends(Family::V4, &[(at, value)]).unwrap();
            Some(frontends4)
        }
        7 => {
            let (index, words) = before.services.first()?;
            let value = words.options ^ u64::from(flag::INTERNAL_LOCAL);
            maps.store_service(*index, ServiceWord::Options, value)
                .unwrap();
            Some(name::SERVICES)
        }
        8 => {
            let index = before.sizes.services - 1;
            maps.store_service(index, ServiceWord::Cluster, 1 << 16)
                .unwrap();
            Some(name::SERVICES)
        }
        9 => {
            let used = before.services.iter().map(|(_, words)| words.cluster);
            let range = used.into_iter().find(|range| range.length() > 0)?;
            maps.put_slots(range.start(), &[201]).unwrap();
            Some(name::SLOTS)
        }
        10 | 11 => {
            let family = [Family::V4, Family::V6][kind - 10];
            let serves = |(_, record): &&(u32, BackendRecord)| record.bits & GONE == 0;
            let (id, record) = before.backends.of(family).iter().find(serves)?;
            let mut other = *record;
            other.address.set_ip(ip(family, 66, 6));
            maps.put_backends(family, &[(*id, other)]).unwrap();
            Some([backends4, backends6][kind - 10])
        }
        _ => {
            let range = if let Some(range) = before.source_ranges.first() {
                maps.delete_source_ranges(range.family(), &[*range])
                    .unwrap();
                *range
            } else {
                let net = IpNet::new(ip(Family::V6, 5, 5), 128).unwrap();
                let range = SourceRange { service: 3, net };
                maps.put_source_ranges(Family::V6, &[range]).unwrap();
                range
            };
            Some(name::SOURCE_RANGES[usize::from(range.family() == Family::V6)])
        }
    }
}

/// G13: whatever came before, an audit of maps that nobody touched finds nothing; what somebody else wrote to any map it
/// finds, by the map's name, and repairs.
#[test]
fn what_somebody_else_wrote_is_found_and_repaired() {
    let actions = proptest::collection::vec(any_action(), 4..20);
    let strategy = (actions, any::<u64>(), select(vec![0, 100]));
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::with_cases(48)
    });
    let met = std::cell::RefCell::new(BTreeSet::new());
    runner
        .run(&strategy, |(actions, seed, rate)| {
            let mut world = World::new(kernel().unwrap(), seed, rate);
            for action in &actions {
                world.act(action);
            }
            world.act(&Action::Restart);
            world.settle();
            let before = world.snapshot();
            let clean = world.planner.audit(&before).unwrap();
            prop_assert_eq!(&clean.drifts, &[]);
            for kind in 0..DAMAGES {
                let Some(map) = damage(kind, &mut world.dataplane, &before) else {
                    continue;
                };
                met.borrow_mut().insert(map);
                let audit = world.planner.audit(&world.snapshot()).unwrap();
                let maps: BTreeSet<&str> = audit.drifts.iter().map(|d| d.map.as_str()).collect();
                prop_assert_eq!(maps, BTreeSet::from([map]), "damage {}", kind);
                repair(&mut world.planner, &mut world.dataplane, audit).unwrap();
                // What stands for nothing goes with the next sweep.
                world.settle();
                let after = world.snapshot();
                prop_assert_eq!(world.planner.audit(&after).unwrap().drifts, vec![]);
                prop_assert_eq!(&after.frontends, &before.frontends);
                prop_assert_eq!(&after.services, &before.services);
                prop_assert_eq!(&after.slots, &before.slots);
                prop_assert_eq!(&after.backends, &before.backends);
                prop_assert_eq!(&after.source_ranges, &before.source_ranges);
                prop_assert!(after.guard == before.guard, "guard");
                prop_assert!(after.guard_port == before.guard_port, "guard_port");
            }
            Ok(())
        })
        .unwrap();
    let [frontends4, frontends6] = name::FRONTENDS;
    let [backends4, backends6] = name::BACKENDS;
    let written = [
        name::GUARD,
        name::GUARD_PORT,
        frontends4,
        frontends6,
        name::SERVICES,
        name::SLOTS,
        backends4,
        backends6,
    ];
    let met = met.into_inner();
    assert!(written.iter().all(|map| met.contains(map)), "{met:?}");
    assert!(
        name::SOURCE_RANGES.iter().any(|map| met.contains(map)),
        "{met:?}"
    );
}

#[test]
fn a_map_of_another_layout_is_refused_by_name() -> Result<()> {
    let good = map_infos(sizes());
    for (map, change, message) in [
        (
            name::GUARD,
            MapInfo {
                max_entries: 1000,
                ..good[name::GUARD]
            },
            "map guard has a number of entries that is no power of two, 1000, expected 1024",
        ),
        (
            name::SERVICES,
            MapInfo {
                value_size: 32,
                ..good[name::SERVICES]
            },
            "map services has value size 32, expected 24",
        ),
        (
            name::SLOTS,
            MapInfo {
                flags: 0,
                ..good[name::SLOTS]
            },
            "map slots has flags 0, expected 1024",
        ),
        (
            "frontends4",
            MapInfo {
                key_size: 12,
                ..good["frontends4"]
            },
            "map frontends4 has key size 12, expected 8",
        ),
        (
            "established6",
            MapInfo {
                kind: HASH,
                ..good["established6"]
            },
            "map established6 has type 1, expected 9",
        ),
        (
            name::COUNTERS,
            MapInfo {
                max_entries: COUNTERS + 1,
                ..good[name::COUNTERS]
            },
            "map counters has entries",
        ),
    ] {
        let mut infos = good.clone();
        infos.insert(map, change);
        let error = Kernel::new(create(&infos)?).unwrap_err().to_string();
        ensure!(error.starts_with(message), "{error}");
    }
    let mut maps = create(&good)?;
    maps.fds.remove(name::EDGES);
    let error = Kernel::new(maps).unwrap_err().to_string();
    ensure!(error == "map edges is missing", "{error}");
    Ok(())
}

#[test]
fn stores_stay_within_their_tables() -> Result<()> {
    let mut kernel = kernel()?;
    let sizes = kernel.sizes();
    let record = BackendRecord {
        address: SocketAddr::new(ip(Family::V4, 1, 1), 80),
        generation: 0,
        bits: 0,
        service: 1,
    };
    let last = sizes.backends.v4 - 1;
    kernel.put_backends(Family::V4, &[(last, record)])?;
    ensure!(
        kernel
            .put_backends(Family::V4, &[(last + 1, record)])
            .is_err()
    );
    ensure!(
        kernel.put_backends(Family::V6, &[(1, record)]).is_err(),
        "wrong family"
    );
    ensure!(
        kernel
            .put_backend_meta(Family::V4, &[(last + 1, 0)])
            .is_err()
    );
    kernel.put_slots(sizes.slots - 2, &[1, 2])?;
    ensure!(kernel.put_slots(sizes.slots - 2, &[1, 2, 3]).is_err());
    ensure!(
        kernel.put_slots(1, &[1]).is_err(),
        "in the middle of a word"
    );
    ensure!(kernel.put_slots(u32::MAX - 1, &[1, 2]).is_err());
    kernel.store_service(sizes.services - 1, ServiceWord::Options, 1)?;
    ensure!(
        kernel
            .store_service(sizes.services, ServiceWord::Cluster, 1)
            .is_err()
    );
    let beyond = GuardBit::Address {
        nibble: sizes.guard_words * 16,
        bit: FRONTEND,
    };
    ensure!(kernel.set_guard(&[beyond]).is_err());

    let snapshot = kernel.snapshot()?;
    ensure!(snapshot.backends.v4 == [(last, record)]);
    ensure!(snapshot.slots.len() == sizes.slots as usize);
    ensure!(snapshot.services.len() == 1);
    Ok(())
}

#[test]
fn a_full_map_says_which() -> Result<()> {
    let mut kernel = kernel()?;
    let at = |n: u32| FrontendAt {
        address: Ipv4Addr::from(n).into(),
        port: 1,
        protocol: 6,
    };
    let value = FrontendValue {
        service: 1,
        kind: kind::CLUSTER_IP,
    };
    let many: Vec<_> = (1..1_000).map(|n| (at(n), value)).collect();
    let error = kernel.put_frontends(Family::V4, &many).unwrap_err();
    ensure!(error.to_string() == "cannot update frontends4", "{error}");
    ensure!(kernel.snapshot()?.frontends.len() == 128);
    Ok(())
}

#[test]
fn deletes_skip_what_is_absent() -> Result<()> {
    let mut kernel = kernel()?;
    let at = |n: u8| FrontendAt::address(ip(Family::V6, 0, n));
    let value = FrontendValue {
        service: 0,
        kind: kind::CLUSTER_IP,
    };
    let present: Vec<_> = [1, 3, 4, 8].map(|n| (at(n), value)).into();
    kernel.put_frontends(Family::V6, &present)?;
    let all: Vec<_> = (0..8).map(at).collect();
    kernel.delete_frontends(Family::V6, &all)?;
    ensure!(kernel.snapshot()?.frontends == [(at(8), value)]);
    Ok(())
}

#[test]
fn all_flows_are_seen_once_in_batches() -> Result<()> {
    let maps = create(&map_infos(sizes()))?;
    let established = maps.fds[name::ESTABLISHED[0]].try_clone()?;
    let flows = TypedMap::<FlowKey<Addr4>, Flow<Addr4>>::new(established)?;
    let kernel = Kernel::new(maps)?;
    let frontend = Ipv4Addr::new(10, 96, 0, 1);
    let key = |n: u16| {
        let client = Ipv4Addr::new(192, 0, 2, 1).into();
        let port = Be16::new(n);
        FlowKey::new(
            client,
            Addr4::from(frontend),
            port,
            Be16::new(443),
            6,
            INBOUND,
        )
    };
    let value = |n: u16| Flow {
        check: 0,
        source: Addr4(1),
        destination: Addr4(2),
        source_port: Be16::new(n),
        destination_port: Be16::new(8443),
        backend: 7,
        service: 3,
        generation: 9,
        traits: 0,
        state: 0,
        seen: CLOCK.jiffies,
        proof: 0,
    };
    let count = 9_000;
    let keys: Vec<_> = (1..=count).map(key).collect();
    let values: Vec<_> = (1..=count).map(value).collect();
    flows.update_all(&keys, &values)?;

    let mut seen: Vec<FlowEntry> = Vec::new();
    kernel.visit_flows(&mut |entry| seen.push(*entry))?;
    let ports: BTreeSet<u16> = seen.iter().map(|entry| entry.source.port()).collect();
    ensure!((seen.len(), ports.len()) == (count.into(), count.into()));
    let first = &seen[0];
    ensure!(first.destination == SocketAddr::new(frontend.into(), 443));
    ensure!((first.backend, first.service, first.generation) == (7, 3, 9));

    let words = kernel.sizes().guard_words;
    let used = GuardBit::address(frontend.into(), FRONTEND, words);
    let unused = GuardBit::address(Ipv4Addr::new(10, 96, 0, 2).into(), FRONTEND, words);
    let found =
        kernel.flows_in_use(&BTreeSet::from([used, unused]), CLOCK, &Timeouts::default())?;
    ensure!(found == BTreeSet::from([used]));
    Ok(())
}

/// DEVMAP_HASH stands for every map in a kernel before 5.6.
#[test]
fn maps_without_batches_are_served_one_by_one() -> Result<()> {
    let map = TypedMap::<u32, u32>::new(map_create(info::<u32, u32>(DEVMAP_HASH, 16, 0))?)?;
    let loopback = 1;
    map.update_all(&[5, 6, 7], &[loopback; 3])?;
    map.delete_all(&[4, 6, 8])?;
    let mut found = BTreeMap::new();
    map.visit(&mut |key, value| {
        found.insert(*key, *value);
    })?;
    ensure!(found == BTreeMap::from([(5, loopback), (7, loopback)]));
    ensure!(map.get(&5)? == Some(loopback) && map.get(&6)?.is_none());
    ensure!(TypedMap::<u32, u64>::new(map_create(info::<u32, u32>(HASH, 16, 0))?).is_err());
    Ok(())
}

#[test]
fn edges_and_counters_are_read_back() -> Result<()> {
    let mut kernel = kernel()?;
    let edge = Edge {
        bits: POD,
        bridge: 3,
        mac: [2, 0, 0, 0, 0, 1],
        reserved: [0; 2],
    };
    kernel.put_edge(7, &edge)?;
    kernel.put_edge(8, &edge)?;
    kernel.delete_edge(8)?;
    kernel.delete_edge(9)?;
    ensure!(kernel.edges()? == BTreeMap::from([(7, edge)]));
    ensure!(kernel.counters()? == vec![0; COUNTERS as usize]);
    kernel.grace()?;
    Ok(())
}

/// The backend that a tuple gets in the Cluster set of the service with this ClusterIP, as the
/// programs pick it.
fn picked(snapshot: &Snapshot, frontend: FrontendAt, seed: u64, client: SocketAddr) -> SocketAddr {
    let SocketAddr::V4(client) = client else {
        panic!("IPv4 alone is enough here");
    };
    let IpAddr::V4(to) = frontend.address else {
        panic!("IPv4 alone is enough here");
    };
    let find = |at: &FrontendAt| snapshot.frontends.iter().find(|(other, _)| other == at);
    let (_, value) = find(&frontend).unwrap();
    let words = snapshot
        .services
        .iter()
        .find(|(index, _)| *index == value.service);
    let (_, service) = words.unwrap();
    assert_ne!(service.flags() & flag::MAGLEV, 0);
    let hash = flow_hash(
        seed,
        Addr4::from(*client.ip()),
        Addr4::from(to),
        Be16::new(client.port()),
        Be16::new(frontend.port),
        frontend.protocol,
    );
    let position = service.cluster.start() + scale(hash, service.cluster.length());
    let id = *snapshot.slots.get(position as usize).unwrap();
    let backends = &snapshot.backends.v4;
    backends
        .iter()
        .find(|(other, _)| *other == id)
        .unwrap()
        .1
        .address
}

/// F9: two nodes that got there by different ways, one over the kernel's maps and restarted in
/// between, pick the same backend for every tuple; and a backend that leaves moves its own flows
/// and hardly any other.
#[test]
fn f9_nodes_with_different_histories_agree() -> Result<()> {
    const SEED: u64 = 42;
    let large = Sizes {
        slots: 4 * 65_522,
        ..sizes()
    };
    let backend = |host: u8| Backend {
        address: SocketAddr::new(ip(Family::V4, 1, host), 8080),
        in_cluster: true,
        in_local: false,
        serving: true,
        local: false,
        weight: 1,
    };
    let web = |hosts: &[u8]| DesiredPort {
        key: PortKey {
            namespace: "ns".into(),
            service: "web".into(),
            port_name: String::new(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        },
        frontends: vec![Frontend {
            address: FrontendAddress::Ip(ip(Family::V4, 0, 9)),
            port: 80,
            kind: FrontendKind::ClusterIp,
        }],
        backends: hosts.iter().map(|host| backend(*host)).collect(),
        internal_local: false,
        external_local: false,
        has_any: true,
        selection: Selection::Maglev {
            seed: SEED,
            slots: 65_521,
        },
        affinity_seconds: None,
        source_ranges: None,
    };
    let name = ObjectName::new("ns", "web");
    let other = ObjectName::new("ns", "other");
    let all: Vec<u8> = (1..=8).collect();

    let mut here = World::new(Memory::new(large), 0, 0);
    here.planner.set_service(&name, vec![web(&all)]);
    here.settle();

    let maps = create(&map_infos(large))?;
    let mut there = World::new(Kernel::new(maps)?, 0, 0);
    let mut before = web(&[9, 8, 7]);
    before.key.service = "other".into();
    before.frontends[0].address = FrontendAddress::Ip(ip(Family::V4, 0, 8));
    there.planner.set_service(&other, vec![before]);
    there.planner.set_service(&name, vec![web(&[8, 3])]);
    there.settle();
    there.planner.remove_service(&other);
    there.planner.set_service(&name, vec![web(&[1, 9, 5])]);
    there.settle();
    there.planner = Planner::restore(&there.snapshot());
    let mut shuffled = all.clone();
    shuffled.reverse();
    there.planner.set_service(&name, vec![web(&shuffled)]);
    there.planner.set_node_addresses([]);
    there.planner.remove_unclaimed();
    there.settle();

    let (a, b) = (here.snapshot(), there.snapshot());
    ensure!(a.backends.v4 != b.backends.v4, "the ids are different ones");
    let frontend = FrontendAt {
        address: ip(Family::V4, 0, 9),
        port: 80,
        protocol: 6,
    };
    let client = |n: u16| SocketAddr::new(ip(Family::V4, 3, (n % 7) as u8), 10_000 + n);
    let pick = |snapshot: &Snapshot, n| picked(snapshot, frontend, SEED, client(n));
    let (mut moved, mut kept, mut gone) = (0, 0, 0);
    here.planner.set_service(&name, vec![web(&all[1..])]);
    here.settle();
    let after = here.snapshot();
    for n in 0..20_000 {
        let backend = pick(&a, n);
        ensure!(backend == pick(&b, n), "{}", client(n));
        if backend.ip() == ip(Family::V4, 1, 1) {
            gone += 1;
        } else {
            kept += 1;
            moved += u32::from(pick(&after, n) != backend);
        }
    }
    ensure!(
        (2_000..3_000).contains(&gone),
        "{gone} of 20,000 were the leaver's"
    );
    ensure!(moved * 100 <= kept, "{moved} of {kept} moved");
    Ok(())
}
