//! Readers watched at every single write, in random histories with faults, crashes and restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::prelude::*;
use proptest::sample::select;
use svc_lb_common::backend::{GONE, IN_CLUSTER, IN_LOCAL};
use svc_lb_common::guard::{BACKEND, FRONTEND, NODE};
use svc_lb_common::service::flag;

use super::frontends::rank;
use super::view::Tables;
use super::*;
use crate::compile::desired::{Backend, Selection};
use crate::dataplane::Snapshot;
use crate::dataplane::faulty::Faulty;
use crate::dataplane::memory::Memory;

// What is desired, made small enough to collide.

fn sizes() -> Sizes {
    Sizes {
        guard_words: 1 << 10,
        frontends: PerFamily { v4: 128, v6: 128 },
        services: 64,
        slots: 2_048,
        backends: PerFamily { v4: 256, v6: 256 },
        source_ranges: PerFamily { v4: 64, v6: 64 },
    }
}

fn name(service: u8) -> ObjectName {
    ObjectName::new("ns", format!("s{service}"))
}

fn key(service: u8, port: &str, family: Family) -> PortKey {
    PortKey {
        namespace: "ns".into(),
        service: format!("s{service}"),
        port_name: port.into(),
        protocol: Protocol::Tcp,
        family,
    }
}

fn ip(family: Family, net: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, net, 0, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, net.into(), 0, 0, 0, 0, 0, host.into()).into(),
    }
}

fn cluster_ip(key: &PortKey, host: u8) -> Frontend {
    Frontend {
        address: FrontendAddress::Ip(ip(key.family, 0, host)),
        port: if key.port_name.is_empty() { 80 } else { 81 },
        kind: FrontendKind::ClusterIp,
    }
}

fn external(family: Family, host: u8) -> Frontend {
    Frontend {
        address: FrontendAddress::Ip(ip(family, 9, host)),
        port: 80,
        kind: FrontendKind::ExternalIp,
    }
}

/// An external IP that is the ClusterIP of service 1.
fn others_cluster_ip(family: Family) -> Frontend {
    Frontend {
        address: FrontendAddress::Ip(ip(family, 0, 2)),
        ..external(family, 0)
    }
}

fn balanced(family: Family, host: u8) -> Frontend {
    Frontend {
        kind: FrontendKind::LoadBalancer,
        ..external(family, host)
    }
}

/// Clients that source ranges may hold or not, and the networks of eight of them each.
const CLIENTS: u8 = 24;

fn client(family: Family, host: u8) -> IpAddr {
    ip(family, 7, host)
}

fn clients_net(family: Family, number: u8) -> IpNet {
    let prefix = if family == Family::V4 { 29 } else { 125 };
    IpNet::new(client(family, number * 8), prefix).unwrap()
}

fn node_port(port: u16) -> Frontend {
    Frontend {
        address: FrontendAddress::Node,
        port,
        kind: FrontendKind::NodePort,
    }
}

fn backend(family: Family, host: u8) -> Backend {
    Backend {
        address: SocketAddr::new(ip(family, 1, host), 8080),
        in_cluster: true,
        in_local: false,
        serving: true,
        local: false,
        weight: 1,
    }
}

/// A port with a ClusterIP and these backends, all in the Cluster set.
fn port(service: u8, hosts: &[u8]) -> DesiredPort {
    let key = key(service, "", Family::V4);
    DesiredPort {
        frontends: vec![cluster_ip(&key, service + 1)],
        backends: hosts
            .iter()
            .map(|host| backend(Family::V4, *host))
            .collect(),
        internal_local: false,
        external_local: false,
        has_any: !hosts.is_empty(),
        selection: Selection::Random,
        affinity_seconds: None,
        source_ranges: None,
        key,
    }
}

fn at(key: &PortKey, frontend: &Frontend) -> FrontendAt {
    claim_of(key, frontend).0
}

// The kernel's lookup, as a model.

/// What one kind of client finds.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Found {
    /// Index and flags of the service.
    service: (u32, u32),
    /// For clients that the policies let pick from the Local set, and for the others.
    sets: Vec<BTreeSet<SocketAddr>>,
    /// Which [`CLIENTS`] it admits.
    admitted: BTreeSet<IpAddr>,
}

/// Looks up every frontend as the programs do, and fails on whatever they would stumble over.
fn read(memory: &Memory) -> BTreeMap<FrontendAt, Found> {
    let sizes = memory.sizes();
    let snapshot = memory.snapshot().unwrap();
    let mut owners: BTreeMap<u32, u32> = BTreeMap::new();
    for (index, words) in &snapshot.services {
        for range in [words.cluster, words.local] {
            let end = range.start() + range.length();
            assert!(end <= sizes.slots, "range beyond the table: {range:?}");
            for position in range.start()..end {
                let other = owners.insert(position, *index);
                assert_eq!(other, None, "slot {position} belongs to two ranges");
            }
        }
    }
    memory
        .frontends()
        .iter()
        .filter(|(at, _)| !at.is_address())
        .map(|(at, value)| (*at, read_one(memory, at, value.service, value.kind)))
        .collect()
}

fn read_one(memory: &Memory, at: &FrontendAt, index: u32, kind: u8) -> Found {
    assert!(
        index > 0 && index < memory.sizes().services,
        "{at:?} leads nowhere"
    );
    let service = memory.service(index);
    let flags = service.flags();
    let words = memory.sizes().guard_words;
    let bit = if at.address.is_unspecified() {
        GuardBit::Port {
            protocol: Protocol::from_number(at.protocol).unwrap(),
            port: at.port,
        }
    } else {
        GuardBit::address(at.address, FRONTEND, words)
    };
    assert!(memory.guarded(bit), "the guard hides {at:?}");
    let set = |range: Range, member: u32| -> BTreeSet<SocketAddr> {
        (range.start()..range.start() + range.length())
            .map(|position| {
                let id = memory.slot(position);
                let backend = memory.backend(at.family(), id);
                let backend = backend.unwrap_or_else(|| panic!("{at:?} names unset id {id}"));
                assert_eq!(backend.bits & GONE, 0, "{at:?} names gone id {id}");
                assert_ne!(
                    backend.bits & member,
                    0,
                    "{at:?}: id {id} is not in the set"
                );
                assert_eq!(
                    backend.service, index,
                    "{at:?} names another service's id {id}"
                );
                let bit = GuardBit::address(backend.address.ip(), BACKEND, words);
                assert!(memory.guarded(bit), "the guard hides {}", backend.address);
                backend.address
            })
            .collect()
    };
    let cluster = set(service.cluster, IN_CLUSTER);
    let local = set(service.local, IN_LOCAL);
    let policy = if kind == kind::CLUSTER_IP {
        flag::INTERNAL_LOCAL
    } else {
        flag::EXTERNAL_LOCAL
    };
    let chosen = if flags & policy == 0 {
        &cluster
    } else {
        &local
    };
    // Pods use the Cluster set of outside frontends whatever the policy.
    let sets = if kind == kind::CLUSTER_IP {
        vec![chosen.clone()]
    } else {
        vec![chosen.clone(), cluster]
    };
    let restricted = kind == kind::LOAD_BALANCER && flags & flag::SOURCE_RANGES != 0;
    Found {
        service: (index, flags),
        sets,
        admitted: (0..CLIENTS)
            .map(|host| client(at.family(), host))
            .filter(|client| !restricted || memory.admits(index, *client))
            .collect(),
    }
}

/// Watches every single write of a plan.
#[derive(Default)]
struct Watch {
    /// Numbers that left and whose grace period is not over.
    ids: BTreeSet<(Family, u32)>,
    slots: BTreeSet<u32>,
    /// Who had an id with which generation.
    generations: BTreeMap<(Family, u32, u16), SocketAddr>,
}

impl Watch {
    fn before(&mut self, op: &Op, memory: &Memory) {
        match op {
            Op::PutBackend { family, id, record } => {
                assert!(
                    !self.ids.contains(&(*family, *id)),
                    "id {id} reused before grace"
                );
                if let Some(old) = memory.backend(*family, *id)
                    && old.bits & GONE == 0
                {
                    assert_eq!(old.address, record.address, "live id {id} overwritten");
                    assert_eq!(old.service, record.service, "live id {id} overwritten");
                }
            }
            Op::Retire { family, id, .. } => {
                self.ids.insert((*family, *id));
            }
            Op::FillSlots { start, ids, .. } => {
                for position in (*start..).take(ids.len()) {
                    let reused = self.slots.contains(&position);
                    assert!(!reused, "slot {position} reused before grace");
                }
            }
            Op::StoreService { service, word, .. } => {
                let words = memory.service(*service);
                let range = match word {
                    ServiceWord::Cluster => words.cluster,
                    ServiceWord::Local => words.local,
                    ServiceWord::Options => return,
                };
                self.slots
                    .extend(range.start()..range.start() + range.length());
            }
            Op::SetGuard(_)
            | Op::SetBits { .. }
            | Op::PutSourceRange(_)
            | Op::DeleteSourceRange(_)
            | Op::PutFrontend { .. }
            | Op::DeleteFrontend(_) => {}
        }
    }

    /// Nothing that a flow may remember is given to another endpoint.
    fn after(&mut self, op: &Op, memory: &Memory) {
        if let Op::PutBackend { family, id, .. } = op
            && let Some(record) = memory.backend(*family, *id)
            && record.bits & GONE == 0
        {
            let identity = (*family, *id, record.generation);
            let owner = *self.generations.entry(identity).or_insert(record.address);
            assert_eq!(owner, record.address, "id {id} reused with its generation");
        }
    }

    fn grace(&mut self) {
        self.ids.clear();
        self.slots.clear();
    }
}

use crate::dataplane::ServiceWord;

/// Does a plan write by write and looks at the tables after each. `limit` writes, then it stops as
/// if the agent had been killed.
fn apply_watched(
    planner: &mut Planner,
    dataplane: &mut Faulty<Memory>,
    watch: &mut Watch,
    limit: usize,
) -> bool {
    let before = read(dataplane.inner());
    let plan = planner.plan();
    let after = {
        let mut memory = dataplane.inner().clone();
        for batch in &plan.batches {
            execute(batch, &mut memory).unwrap();
        }
        read(&memory)
    };
    let mut left = limit;
    for batch in &plan.batches {
        for op in &batch.ops {
            if left == 0 {
                return false;
            }
            left -= 1;
            watch.before(op, dataplane.inner());
            let single = Batch {
                phase: batch.phase,
                ops: vec![op.clone()],
            };
            let result = execute(&single, dataplane);
            watch.after(op, dataplane.inner());
            check_step(&before, &read(dataplane.inner()), &after, op);
            if result.is_err() {
                planner.fail(batch);
                return false;
            }
        }
        planner.commit(batch);
    }
    planner.finish();
    true
}

/// Whoever finds backends before and after a change finds some all the while, and no others; whoever
/// is admitted before and after is all the while, and whoever is neither never is.
fn check_step(
    before: &BTreeMap<FrontendAt, Found>,
    now: &BTreeMap<FrontendAt, Found>,
    after: &BTreeMap<FrontendAt, Found>,
    op: &Op,
) {
    for (at, old) in before {
        let Some(new) = after.get(at) else {
            continue;
        };
        let found = now
            .get(at)
            .unwrap_or_else(|| panic!("{at:?} vanished at {op:?}"));
        // One that changes hands while its old service switches policy may be without for a while, and
        // meet either service's old or new ranges.
        let moves = old.service.0 != new.service.0;
        if moves && found.service.0 == old.service.0 && found.service != old.service {
            continue;
        }
        for client in old.admitted.intersection(&new.admitted) {
            let admitted = found.admitted.contains(client);
            assert!(admitted, "{at:?} turns {client} away at {op:?}");
        }
        for client in &found.admitted {
            let expected = old.admitted.contains(client) || new.admitted.contains(client);
            assert!(expected || moves, "{at:?} lets {client} in at {op:?}");
        }
        for ((old, found), new) in old.sets.iter().zip(&found.sets).zip(&new.sets) {
            if !old.is_empty() && !new.is_empty() {
                assert!(!found.is_empty(), "{at:?} empty at {op:?}");
            }
        }
    }
}

// What the tables should hold, from what is desired alone.

type Wanted = BTreeMap<PortKey, DesiredPort>;

fn check_tables(wanted: &Wanted, nodes: &BTreeSet<IpAddr>, planner: &Planner, memory: &Memory) {
    let snapshot = memory.snapshot().unwrap();
    let tables = Tables::new(&snapshot, &planner.names());
    let mut winners: BTreeMap<FrontendAt, (&PortKey, u8)> = BTreeMap::new();
    for (key, port) in wanted {
        for frontend in &port.frontends {
            let (at, kind) = claim_of(key, frontend);
            let winner = winners.entry(at).or_insert((key, kind));
            if rank(kind, key) < rank(winner.1, winner.0) {
                *winner = (key, kind);
            }
        }
    }
    let names: Vec<_> = tables
        .services
        .iter()
        .map(|service| service.name.as_ref())
        .collect();
    let expected: Vec<_> = wanted.keys().map(Some).collect();
    // A port without frontends of its own, backends and sets shows nothing, but has its index.
    for name in &names {
        assert!(expected.contains(name), "unexpected service {name:?}");
    }
    let mut seen = BTreeMap::new();
    for service in &tables.services {
        let key = service.name.as_ref().unwrap();
        let port = &wanted[key];
        let addresses = |pick: fn(&Backend) -> bool| -> Vec<_> {
            let picked = port.backends.iter().filter(|backend| pick(backend));
            picked.map(|backend| Some(backend.address)).collect()
        };
        let members = |members: &[view::Member]| -> Vec<_> {
            members.iter().map(|member| member.address).collect()
        };
        assert_eq!(
            members(&service.cluster),
            addresses(|backend| backend.in_cluster),
            "{key:?}"
        );
        assert_eq!(
            members(&service.local),
            addresses(|backend| backend.in_local),
            "{key:?}"
        );
        let bits: Vec<_> = service
            .backends
            .iter()
            .map(|view| Backend {
                address: view.address,
                in_cluster: view.in_cluster,
                in_local: view.in_local,
                serving: view.serving,
                local: view.local,
                // What it comes to is seen in the slots.
                weight: port
                    .backends
                    .iter()
                    .find(|backend| backend.address == view.address)
                    .map_or(0, |backend| backend.weight),
            })
            .collect();
        assert_eq!(bits, port.backends, "{key:?}");
        assert_eq!(service.internal_local, port.internal_local);
        assert_eq!(service.external_local, port.external_local);
        assert_eq!(service.has_any, port.has_any);
        let maglev = port.selection != Selection::Random;
        assert_eq!(service.maglev, maglev);
        assert_eq!(service.affinity_seconds, port.affinity_seconds);
        assert_eq!(service.source_ranges, port.source_ranges, "{key:?}");
        seen.insert(service.index, key);
    }
    let mut expected: BTreeMap<FrontendAt, u8> = BTreeMap::new();
    for (at, (key, kind)) in &winners {
        let value = memory
            .frontend(at)
            .unwrap_or_else(|| panic!("{at:?} is missing"));
        assert_eq!(planner.names().get(&value.service), Some(*key), "{at:?}");
        expected.insert(*at, *kind);
        if let Some(address) = address_entry(at) {
            let priority = [kind::CLUSTER_IP, kind::LOAD_BALANCER, kind::EXTERNAL_IP];
            let rank = |kind: &u8| priority.iter().position(|other| other == kind);
            let entry = expected.entry(address).or_insert(*kind);
            if rank(kind) < rank(entry) {
                *entry = *kind;
            }
        }
    }
    for address in nodes {
        expected.insert(FrontendAt::address(*address), kind::NODE_PORT);
    }
    let found: BTreeMap<_, _> = memory
        .frontends()
        .iter()
        .map(|(at, value)| (*at, value.kind))
        .collect();
    assert_eq!(found, expected);
}

/// After everything was swept: exactly the bits of what is wanted.
fn check_guard(wanted: &Wanted, nodes: &BTreeSet<IpAddr>, memory: &Memory) {
    let words = memory.sizes().guard_words;
    let mut expected = Memory::new(memory.sizes());
    let mut set = |bit| expected.set_guard(&[bit]).unwrap();
    for (key, port) in wanted {
        for frontend in &port.frontends {
            let at = at(key, frontend);
            if at.address.is_unspecified() {
                set(GuardBit::Port {
                    protocol: key.protocol,
                    port: at.port,
                });
            } else {
                set(GuardBit::address(at.address, FRONTEND, words));
            }
        }
        for backend in &port.backends {
            set(GuardBit::address(backend.address.ip(), BACKEND, words));
        }
    }
    for address in nodes {
        set(GuardBit::address(*address, NODE, words));
    }
    let (found, expected) = (memory.snapshot().unwrap(), expected.snapshot().unwrap());
    assert!(found.guard == expected.guard, "addresses");
    assert!(found.guard_port == expected.guard_port, "ports");
}

const CLOCK: FlowClock = FlowClock {
    jiffies: 1_000_000,
    hz: 100,
};

/// Applies until nothing is pending, then checks everything, then restarts and finds nothing to do.
fn settle(
    planner: &mut Planner,
    dataplane: &mut Memory,
    wanted: &Wanted,
    nodes: &BTreeSet<IpAddr>,
) {
    for _ in 0..4 {
        apply(planner, dataplane).unwrap();
        reclaim(planner, dataplane).unwrap();
    }
    assert!(!planner.is_pending());
    assert_eq!(planner.plan(), Plan::default());
    planner.finish();
    sweep(planner, dataplane, CLOCK, &Timeouts::default()).unwrap();
    check_tables(wanted, nodes, planner, dataplane);
    check_guard(wanted, nodes, dataplane);
    let snapshot = dataplane.snapshot().unwrap();
    let mut restarted = restart(&snapshot, wanted, nodes);
    assert!(restarted.damage().is_none(), "{:?}", restarted.damage());
    assert_eq!(
        restarted.plan(),
        Plan::default(),
        "a restart changes nothing"
    );
    restarted.finish();
    assert_eq!(restarted.names(), planner.names());
    assert_eq!(restarted.refusals(), planner.refusals());
    assert_eq!(
        restarted.table_uses(),
        planner.table_uses(),
        "nothing leaks"
    );
}

fn restart(snapshot: &Snapshot, wanted: &Wanted, nodes: &BTreeSet<IpAddr>) -> Planner {
    let mut planner = Planner::restore(snapshot);
    set_all(&mut planner, wanted, nodes);
    planner.remove_unclaimed();
    planner
}

fn set_all(planner: &mut Planner, wanted: &Wanted, nodes: &BTreeSet<IpAddr>) {
    let mut services: BTreeMap<ObjectName, Vec<DesiredPort>> = BTreeMap::new();
    for (key, port) in wanted {
        let name = ObjectName::new(key.namespace.clone(), key.service.clone());
        services.entry(name).or_default().push(port.clone());
    }
    for (name, ports) in services {
        planner.set_service(&name, ports);
    }
    planner.set_node_addresses(nodes.iter().copied());
}

#[derive(Clone, Debug)]
enum Action {
    Set(u8, Vec<DesiredPort>),
    Nodes(Vec<IpAddr>),
    Apply,
    Reclaim,
    Sweep,
    /// Does this many writes of the pending plan, then starts again from the maps.
    Crash(usize),
}

fn any_backends(family: Family) -> impl Strategy<Value = Vec<Backend>> {
    let weight = select(vec![1, 1, 1, 2, 3]);
    let one = (0..6u8, any::<[bool; 4]>(), weight).prop_map(move |(host, bits, weight)| {
        let [in_cluster, in_local, serving, local] = bits;
        Backend {
            in_cluster,
            in_local,
            serving,
            local,
            weight,
            ..backend(family, host)
        }
    });
    proptest::collection::vec(one, 0..6).prop_map(|mut backends| {
        backends.sort_unstable();
        backends.dedup_by_key(|backend| backend.address);
        backends
    })
}

/// Everyone, nobody, or the clients of some networks.
fn any_ranges(family: Family) -> impl Strategy<Value = Option<Vec<IpNet>>> {
    let some = proptest::collection::btree_set(0..CLIENTS / 8, 0..3);
    let nets = some.prop_map(move |numbers| {
        let net = |number| clients_net(family, number);
        numbers.into_iter().map(net).collect()
    });
    proptest::option::of(nets)
}

/// Tables that are small, but hold every backend there is.
fn any_selection() -> impl Strategy<Value = Selection> {
    let maglev = |slots| Selection::Maglev { seed: 7, slots };
    select(vec![
        Selection::Random,
        Selection::Random,
        maglev(7),
        maglev(13),
    ])
}

fn any_port(service: u8, port: &'static str, family: Family) -> impl Strategy<Value = DesiredPort> {
    let key = key(service, port, family);
    let extras = proptest::collection::btree_set(0..7u8, 0..3);
    (
        any_backends(family),
        extras,
        any::<[bool; 3]>(),
        select(vec![None, Some(10), Some(10_800)]),
        any_ranges(family),
        any_selection(),
    )
        .prop_map(
            move |(backends, extras, bits, affinity_seconds, source_ranges, selection)| {
                let [internal_local, external_local, has_any] = bits;
                let mut frontends = vec![cluster_ip(&key, service + 1)];
                frontends.extend(extras.into_iter().map(|extra| match extra {
                    0..2 => node_port(30_000 + u16::from(extra)),
                    2..4 => balanced(family, extra),
                    4..6 => external(family, extra),
                    _ => others_cluster_ip(family),
                }));
                frontends.sort_unstable();
                DesiredPort {
                    key: key.clone(),
                    frontends,
                    backends,
                    internal_local,
                    external_local,
                    has_any,
                    selection,
                    affinity_seconds,
                    source_ranges,
                }
            },
        )
}

fn any_service(service: u8) -> impl Strategy<Value = Vec<DesiredPort>> {
    (
        any_port(service, "", Family::V4),
        any_port(service, "b", Family::V4),
        any_port(service, "", Family::V6),
        0..5usize,
    )
        .prop_map(|(a, b, c, shape)| match shape {
            0 => vec![],
            1 => vec![a],
            2 => vec![a, b],
            3 => vec![a, c],
            _ => vec![a, b, c],
        })
}

fn any_action() -> impl Strategy<Value = Action> {
    let nodes = proptest::collection::vec((any::<bool>(), 1..5u8), 0..3).prop_map(|hosts| {
        let family = |v6: bool| if v6 { Family::V6 } else { Family::V4 };
        // Some are external addresses too.
        hosts
            .into_iter()
            .map(|(v6, host)| ip(family(v6), 9, host))
            .collect()
    });
    prop_oneof![
        6 => (0..4u8).prop_flat_map(|service| {
            any_service(service).prop_map(move |ports| Action::Set(service, ports))
        }),
        1 => nodes.prop_map(Action::Nodes),
        4 => Just(Action::Apply),
        2 => Just(Action::Reclaim),
        1 => Just(Action::Sweep),
        1 => (0..40usize).prop_map(Action::Crash),
    ]
}

struct World {
    planner: Planner,
    dataplane: Faulty<Memory>,
    rate: u32,
    watch: Watch,
    wanted: Wanted,
    nodes: BTreeSet<IpAddr>,
}

impl World {
    fn new(seed: u64, rate: u32) -> Self {
        Self {
            planner: Planner::new(sizes()),
            dataplane: Faulty::new(Memory::new(sizes()), seed, rate),
            rate,
            watch: Watch::default(),
            wanted: Wanted::new(),
            nodes: BTreeSet::new(),
        }
    }

    fn apply(&mut self, limit: usize) -> bool {
        apply_watched(
            &mut self.planner,
            &mut self.dataplane,
            &mut self.watch,
            limit,
        )
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Set(service, ports) => {
                let object = name(service);
                self.wanted.retain(|key, _| key.service != object.name);
                self.wanted
                    .extend(ports.iter().map(|port| (port.key.clone(), port.clone())));
                self.planner.set_service(&object, ports);
            }
            Action::Nodes(addresses) => {
                self.nodes = addresses.iter().copied().collect();
                self.planner.set_node_addresses(addresses);
            }
            Action::Apply => {
                self.apply(usize::MAX);
            }
            Action::Reclaim => {
                let epoch = self.planner.seal();
                if self.dataplane.grace().is_ok() {
                    self.watch.grace();
                    if let Some(epoch) = epoch {
                        self.planner.reclaim(epoch);
                    }
                }
            }
            Action::Sweep => {
                let _ignored = sweep(
                    &mut self.planner,
                    &mut self.dataplane,
                    CLOCK,
                    &Timeouts::default(),
                );
                read(self.dataplane.inner());
            }
            Action::Crash(writes) => {
                self.apply(writes);
                let snapshot = self.dataplane.snapshot().unwrap();
                self.watch.grace();
                self.planner = restart(&snapshot, &self.wanted, &self.nodes);
                // A failed write may leave two ids of one endpoint, and nothing else.
                let damage = self.planner.damage();
                assert_eq!((damage.frontends, damage.services), (0, 0));
                assert_eq!(damage.source_ranges, 0);
                assert!(self.rate > 0 || damage.backends == 0);
            }
        }
    }

    fn settle(mut self) {
        self.dataplane.set_rate(0);
        self.apply(usize::MAX);
        let mut memory = self.dataplane.into_inner();
        settle(&mut self.planner, &mut memory, &self.wanted, &self.nodes);
    }
}

mod scenarios;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn tables_converge_and_readers_are_never_betrayed(
        actions in proptest::collection::vec(any_action(), 1..24),
    ) {
        let mut world = World::new(0, 0);
        for action in actions {
            world.act(action);
        }
        world.settle();
    }

    #[test]
    fn tables_converge_however_often_a_write_fails(
        actions in proptest::collection::vec(any_action(), 1..24),
        seed in any::<u64>(),
        rate in select(vec![20u32, 100, 400]),
    ) {
        let mut world = World::new(seed, rate);
        for action in actions {
            world.act(action);
        }
        world.settle();
    }

    #[test]
    fn a_crash_between_any_two_phases_ends_in_the_same_numbers(
        before in proptest::collection::vec(any_action(), 1..12),
        change in proptest::collection::vec((0..4u8).prop_flat_map(|service| {
            any_service(service).prop_map(move |ports| Action::Set(service, ports))
        }), 1..4),
    ) {
        let mut world = World::new(0, 0);
        for action in before {
            world.act(action);
        }
        world.apply(usize::MAX);
        for action in change {
            world.act(action);
        }
        let start = world.dataplane.inner().clone();
        // The same numbers are free whether the agent was restarted before or not.
        let mut planner = restart(&start.snapshot().unwrap(), &world.wanted, &world.nodes);
        let plan = planner.plan();
        let mut whole = start.clone();
        for batch in &plan.batches {
            execute(batch, &mut whole).unwrap();
        }
        for done in 0..=plan.batches.len() {
            let mut memory = start.clone();
            for batch in plan.batches.iter().take(done) {
                execute(batch, &mut memory).unwrap();
            }
            let mut planner = restart(&memory.snapshot().unwrap(), &world.wanted, &world.nodes);
            apply(&mut planner, &mut memory).unwrap();
            let (found, expected) = (memory.snapshot().unwrap(), whole.snapshot().unwrap());
            prop_assert_eq!(found.frontends, expected.frontends, "after {} phases", done);
            prop_assert_eq!(found.services, expected.services, "after {} phases", done);
            prop_assert_eq!(found.slots, expected.slots, "after {} phases", done);
            prop_assert_eq!(found.backends, expected.backends, "after {} phases", done);
            let (ranges, whole) = (found.source_ranges, expected.source_ranges);
            prop_assert_eq!(ranges, whole, "after {} phases", done);
            prop_assert!(found.guard == expected.guard, "guard after {} phases", done);
        }
    }
}
