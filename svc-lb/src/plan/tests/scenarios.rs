//! One situation each, by hand.

use svc_lb_common::conntrack::{INBOUND, OUTBOUND};
use svc_lb_common::service::kind;

use super::*;
use crate::dataplane::{BackendRecord, FlowEntry, FlowTable, FrontendValue, SourceRange};

fn planned(ports: &[DesiredPort]) -> (Planner, Memory) {
    let mut planner = Planner::new(sizes());
    let mut memory = Memory::new(sizes());
    set(&mut planner, ports);
    apply(&mut planner, &mut memory).unwrap();
    (planner, memory)
}

fn set(planner: &mut Planner, ports: &[DesiredPort]) {
    for port in ports {
        let name = ObjectName::new("ns", port.key.service.clone());
        planner.set_service(&name, vec![port.clone()]);
    }
}

fn step(planner: &mut Planner, memory: &mut Memory) {
    apply(planner, memory).unwrap();
    reclaim(planner, memory).unwrap();
}

/// Backends of the Cluster set that a port's clients find, as (last byte of address, id).
fn found(planner: &Planner, memory: &Memory, key: &PortKey) -> Vec<(u8, u32)> {
    let tables = Tables::new(&memory.snapshot().unwrap(), &planner.names());
    let service = tables
        .services
        .into_iter()
        .find(|service| service.name.as_ref() == Some(key));
    let members = service.map(|service| service.cluster).unwrap_or_default();
    let last = |address: SocketAddr| match address.ip() {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    };
    members
        .iter()
        .map(|member| (last(member.address.unwrap()), member.backend))
        .collect()
}

fn v4(service: u8) -> PortKey {
    key(service, "", Family::V4)
}

#[test]
fn the_phases_of_a_new_service_come_in_order() {
    let mut planner = Planner::new(sizes());
    set(&mut planner, &[port(0, &[1, 2])]);
    let plan = planner.plan();
    let phases: Vec<_> = plan.batches.iter().map(|batch| batch.phase).collect();
    assert_eq!(
        phases,
        [
            Phase::Guard,
            Phase::Backends,
            Phase::Slots,
            Phase::Services,
            Phase::Frontends
        ]
    );
    assert!(phases.is_sorted_by_key(|phase| Phase::ALL.iter().position(|other| other == phase)));
}

/// A port behind a load balancer's address too, which admits these networks of clients.
fn restricted(service: u8, numbers: &[u8]) -> DesiredPort {
    let mut port = port(service, &[1]);
    port.frontends.push(balanced(Family::V4, service));
    port.source_ranges = Some(
        numbers
            .iter()
            .map(|number| clients_net(Family::V4, *number))
            .collect(),
    );
    port
}

fn phases(plan: &Plan) -> Vec<Phase> {
    plan.batches.iter().map(|batch| batch.phase).collect()
}

/// B7: what the flag makes readers look for is there before it, and gone after it.
#[test]
fn source_ranges_come_before_their_flag_and_go_after_it() {
    let mut planner = Planner::new(sizes());
    let mut memory = Memory::new(sizes());
    set(&mut planner, &[restricted(0, &[0, 1])]);
    let order = phases(&planner.plan());
    assert_eq!(
        order[2..],
        [
            Phase::Slots,
            Phase::SourceRanges,
            Phase::Services,
            Phase::Frontends
        ]
    );
    step(&mut planner, &mut memory);
    let admits = |memory: &Memory| -> Vec<bool> {
        let net = |number: u8| memory.admits(1, client(Family::V4, number * 8));
        (0..3).map(net).collect()
    };
    assert_eq!(admits(&memory), [true, true, false]);

    // From one set to another: first those that come, then those that go.
    set(&mut planner, &[restricted(0, &[1, 2])]);
    let order = phases(&planner.plan());
    assert_eq!(order, [Phase::SourceRanges, Phase::SourceRangeRemovals]);
    step(&mut planner, &mut memory);
    assert_eq!(admits(&memory), [false, true, true]);

    let mut open = restricted(0, &[]);
    open.source_ranges = None;
    set(&mut planner, &[open]);
    let order = phases(&planner.plan());
    assert_eq!(order, [Phase::Services, Phase::SourceRangeRemovals]);
    step(&mut planner, &mut memory);
    assert_eq!(admits(&memory), [false; 3]);
    assert_eq!(memory.service(1).flags() & flag::SOURCE_RANGES, 0);
}

/// B7: ranges of an index that was never published do not become its next owner's.
#[test]
fn source_ranges_left_at_a_free_index_go_before_its_next_owner_is_published() {
    let mut memory = Memory::new(sizes());
    let left = SourceRange {
        service: 1,
        net: clients_net(Family::V4, 2),
    };
    memory.put_source_ranges(Family::V4, &[left]).unwrap();
    let wanted = Wanted::from([(v4(0), restricted(0, &[0]))]);
    let mut planner = restart(&memory.snapshot().unwrap(), &wanted, &BTreeSet::new());
    assert!(planner.damage().is_none());
    let plan = planner.plan();
    let removal = plan
        .batches
        .iter()
        .find(|batch| batch.ops.contains(&Op::DeleteSourceRange(left)))
        .map(|batch| batch.phase);
    assert_eq!(removal, Some(Phase::SourceRanges));
    assert!(Phase::SourceRanges < Phase::Services);
    step(&mut planner, &mut memory);
    assert_eq!(planner.names()[&1], v4(0), "the same index");
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

#[test]
fn source_ranges_of_no_service_are_removed() {
    let (_, mut memory) = planned(&[restricted(0, &[0])]);
    let wanted = Wanted::from([(v4(0), restricted(0, &[0]))]);
    let stray = |service| SourceRange {
        service,
        net: clients_net(Family::V4, 1),
    };
    let strays = [stray(0), stray(9), stray(sizes().services)];
    memory.put_source_ranges(Family::V4, &strays).unwrap();
    let mut planner = restart(&memory.snapshot().unwrap(), &wanted, &BTreeSet::new());
    let damage = Damage {
        source_ranges: 2,
        ..damage(0, 0, 0)
    };
    assert_eq!(planner.damage(), damage, "index 9 is merely free");
    step(&mut planner, &mut memory);
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

#[test]
fn one_endpoint_of_one_service_costs_that_service_alone() {
    let ports: Vec<_> = (0..40).map(|service| port(service, &[1, 2, 3])).collect();
    let (mut planner, _) = planned(&ports);
    set(&mut planner, &[port(7, &[1, 2, 3, 4])]);
    let plan = planner.plan();
    // Backend, four slots, range; and a guard bit, if no other address has it.
    assert!((6..=7).contains(&plan.len()), "{plan:?}");
}

#[test]
fn an_endpoint_that_leaves_frees_its_id_after_a_grace_period_only() {
    let (mut planner, mut memory) = planned(&[port(0, &[1, 2])]);
    assert_eq!(found(&planner, &memory, &v4(0)), [(1, 1), (2, 2)]);
    set(&mut planner, &[port(0, &[2])]);
    apply(&mut planner, &mut memory).unwrap();
    let gone = memory.backend(Family::V4, 1).unwrap();
    assert_eq!((gone.bits, gone.generation), (GONE, 1));

    set(&mut planner, &[port(0, &[2, 3])]);
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(found(&planner, &memory, &v4(0)), [(2, 2), (3, 3)]);
    reclaim(&mut planner, &memory).unwrap();
    set(&mut planner, &[port(0, &[2, 3, 4])]);
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(found(&planner, &memory, &v4(0)), [(2, 2), (3, 3), (4, 1)]);
    assert_eq!(memory.backend(Family::V4, 1).unwrap().generation, 1);
}

#[test]
fn numbers_retired_during_a_grace_period_wait_for_the_next() {
    let (mut planner, mut memory) = planned(&[port(0, &[1, 2])]);
    set(&mut planner, &[port(0, &[2])]);
    apply(&mut planner, &mut memory).unwrap();
    let first = planner.seal().unwrap();
    set(&mut planner, &[port(0, &[3])]);
    apply(&mut planner, &mut memory).unwrap();
    planner.reclaim(first);
    set(&mut planner, &[port(0, &[3, 4, 5])]);
    apply(&mut planner, &mut memory).unwrap();
    // 1 came back; 2 is in the second period.
    assert_eq!(found(&planner, &memory, &v4(0)), [(3, 3), (4, 1), (5, 4)]);
}

#[test]
fn a_change_back_before_it_was_planned_is_no_change() {
    let (mut planner, _) = planned(&[port(0, &[1, 2])]);
    set(&mut planner, &[port(0, &[1])]);
    set(&mut planner, &[port(0, &[1, 2])]);
    assert!(planner.plan().is_empty());
}

#[test]
fn ranges_are_replaced_and_never_changed_in_place() {
    let (mut planner, mut memory) = planned(&[port(0, &[1, 2])]);
    let old = memory.service(1).cluster;
    set(&mut planner, &[port(0, &[1, 3])]);
    apply(&mut planner, &mut memory).unwrap();
    let new = memory.service(1).cluster;
    assert_eq!(new.sequence(), old.sequence() + 1);
    assert_ne!(new.start(), old.start());
    let slots = (old.start()..old.start() + 2).map(|position| memory.slot(position));
    assert_eq!(slots.collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn the_same_set_gives_the_same_table_whatever_happened_before() {
    let (mut planner, mut memory) = planned(&[port(0, &[4, 1])]);
    for hosts in [&[1, 2, 3, 4][..], &[3], &[], &[1, 2, 3]] {
        set(&mut planner, &[port(0, hosts)]);
        step(&mut planner, &mut memory);
    }
    let hosts: Vec<_> = found(&planner, &memory, &v4(0))
        .into_iter()
        .map(|(host, _)| host)
        .collect();
    let range = memory.service(1).cluster;
    let table: Vec<_> = (range.start()..range.start() + 3)
        .map(|position| {
            memory
                .backend(Family::V4, memory.slot(position))
                .unwrap()
                .address
        })
        .collect();
    assert_eq!(hosts, [1, 2, 3]);
    assert!(table.is_sorted(), "{table:?}");
}

#[test]
fn a_policy_switch_publishes_the_new_set_before_it_empties_the_old() {
    let mut before = port(0, &[1]);
    let (mut planner, _) = planned(&[before.clone()]);
    before.internal_local = true;
    before.backends[0].in_cluster = false;
    before.backends[0].in_local = true;
    set(&mut planner, &[before]);
    let words: Vec<_> = planner
        .plan()
        .batches
        .into_iter()
        .flat_map(|batch| batch.ops)
        .filter_map(|op| {
            let Op::StoreService { word, .. } = op else {
                return None;
            };
            Some(word)
        })
        .collect();
    assert_eq!(
        words,
        [
            ServiceWord::Local,
            ServiceWord::Options,
            ServiceWord::Cluster
        ]
    );
}

// Conflicts.

#[test]
fn the_first_by_name_has_a_contested_frontend_and_the_next_takes_over() {
    let contested = |service, hosts: &[u8]| {
        let mut port = port(service, hosts);
        port.frontends.push(external(Family::V4, 1));
        port
    };
    // The later name comes first in time.
    let (mut planner, mut memory) = planned(&[contested(2, &[2])]);
    let at = at(&v4(1), &external(Family::V4, 1));
    let holder = |planner: &Planner, memory: &Memory| {
        planner.names()[&memory.frontend(&at).unwrap().service]
            .service
            .clone()
    };
    assert_eq!(holder(&planner, &memory), "s2");
    assert!(planner.refusals().is_empty());

    set(&mut planner, &[contested(1, &[1])]);
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(holder(&planner, &memory), "s1");
    let refusals = planner.refusals();
    assert_eq!(
        refusals[0].to_string(),
        "service ns/s2 (TCP, IPv4) does not get 10.9.0.1:80/TCP: service ns/s1 (TCP, IPv4) has it \
         and comes first (ClusterIPs do, then load balancers' addresses, then external IPs; among \
         equals the first by namespace and name); change one of them"
    );
    assert_eq!(refusals.len(), 1);

    planner.remove_service(&name(1));
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(holder(&planner, &memory), "s2");
    assert!(planner.refusals().is_empty());
}

/// B4: nobody takes another's ClusterIP or load balancer by writing its address into externalIPs,
/// whatever the names; not after a restart either, and not when the owner changes.
#[test]
fn an_address_that_was_allocated_is_not_lost_to_who_writes_it_down() {
    let mut thief = port(0, &[9]);
    thief.frontends.push(others_cluster_ip(Family::V4));
    thief.frontends.push(external(Family::V4, 4));
    let mut owner = port(1, &[1]);
    owner.frontends.push(balanced(Family::V4, 4));
    let wanted = Wanted::from([(v4(0), thief.clone()), (v4(1), owner.clone())]);
    let (mut planner, mut memory) = planned(&[thief]);
    set(&mut planner, std::slice::from_ref(&owner));
    step(&mut planner, &mut memory);
    let holders = |planner: &Planner, memory: &Memory| {
        [others_cluster_ip(Family::V4), external(Family::V4, 4)].map(|frontend| {
            let value = memory.frontend(&at(&v4(0), &frontend)).unwrap();
            planner.names()[&value.service].service.clone()
        })
    };
    assert_eq!(holders(&planner, &memory), ["s1", "s1"]);
    let lost = planner.refusals();
    assert_eq!(lost.len(), 2);
    let loses = "service ns/s0 (TCP, IPv4) does not get ";
    assert!(
        lost.iter()
            .all(|refusal| refusal.to_string().starts_with(loses))
    );

    owner.has_any = false;
    set(&mut planner, &[owner]);
    step(&mut planner, &mut memory);
    assert_eq!(holders(&planner, &memory), ["s1", "s1"]);
    let mut planner = restart(&memory.snapshot().unwrap(), &wanted, &BTreeSet::new());
    step(&mut planner, &mut memory);
    assert_eq!(holders(&planner, &memory), ["s1", "s1"]);
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

#[test]
fn an_address_is_what_its_frontends_say_and_the_nodes_own_stays_the_nodes() {
    let mut outside = port(0, &[1]);
    outside.frontends.push(external(Family::V4, 1));
    let (mut planner, mut memory) = planned(&[outside.clone()]);
    let address = FrontendAt::address(ip(Family::V4, 9, 1));
    let kind_of = |memory: &Memory| memory.frontend(&address).map(|value| value.kind);
    assert_eq!(kind_of(&memory), Some(kind::EXTERNAL_IP));

    planner.set_node_addresses([address.address]);
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(kind_of(&memory), Some(kind::NODE_PORT));

    outside.frontends.pop();
    set(&mut planner, &[outside]);
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(kind_of(&memory), Some(kind::NODE_PORT));

    planner.set_node_addresses([]);
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(kind_of(&memory), None);
}

#[test]
fn what_cannot_be_in_a_map_is_left_out() {
    let mut odd = port(0, &[1]);
    odd.backends.push(backend(Family::V6, 1));
    odd.frontends.push(external(Family::V6, 1));
    odd.frontends.push(Frontend {
        address: FrontendAddress::Ip(Ipv4Addr::UNSPECIFIED.into()),
        port: 80,
        kind: FrontendKind::ExternalIp,
    });
    let (planner, memory) = planned(&[odd]);
    assert_eq!(found(&planner, &memory, &v4(0)).len(), 1);
    // The ClusterIP and its address entry.
    assert_eq!(memory.frontends().len(), 2);
}

// Writes that were done and reported as failed.

/// Does all phases, the last of which seems to fail.
fn apply_but_fail_last(planner: &mut Planner, memory: &mut Memory) {
    let plan = planner.plan();
    for batch in &plan.batches {
        execute(batch, memory).unwrap();
    }
    let (last, rest) = plan.batches.split_last().unwrap();
    for batch in rest {
        planner.commit(batch);
    }
    planner.fail(last);
}

#[test]
fn a_backend_that_was_perhaps_marked_gone_comes_back_under_another_id() {
    let (mut planner, mut memory) = planned(&[port(0, &[1, 2])]);
    set(&mut planner, &[port(0, &[2])]);
    apply_but_fail_last(&mut planner, &mut memory);
    set(&mut planner, &[port(0, &[1, 2])]);
    step(&mut planner, &mut memory);
    assert_eq!(found(&planner, &memory, &v4(0)), [(1, 3), (2, 2)]);
    read(&memory);
    let wanted = Wanted::from([(v4(0), port(0, &[1, 2]))]);
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

#[test]
fn bits_that_were_perhaps_lost_are_set_again() {
    let (mut planner, mut memory) = planned(&[port(0, &[1, 2])]);
    let mut changed = port(0, &[1, 2]);
    changed.backends[0].serving = false;
    set(&mut planner, &[changed]);
    apply_but_fail_last(&mut planner, &mut memory);
    set(&mut planner, &[port(0, &[1, 2])]);
    let wanted = Wanted::from([(v4(0), port(0, &[1, 2]))]);
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

// Limits.

fn small(change: impl FnOnce(&mut Sizes)) -> (Planner, Memory) {
    let mut sizes = sizes();
    change(&mut sizes);
    (Planner::new(sizes), Memory::new(sizes))
}

/// Adds three services of two endpoints, of which the third has no room, then frees some.
fn fills(change: impl FnOnce(&mut Sizes), message: &str) {
    let (mut planner, mut memory) = small(change);
    let ports: Vec<_> = (0..3).map(|service| port(service, &[1, 2])).collect();
    set(&mut planner, &ports);
    step(&mut planner, &mut memory);
    let messages: Vec<_> = planner.refusals().iter().map(ToString::to_string).collect();
    assert_eq!(messages, [message]);
    assert!(!planner.is_pending(), "what has no room waits for room");
    for service in 0..2 {
        assert_eq!(found(&planner, &memory, &v4(service)).len(), 2);
    }
    assert!(found(&planner, &memory, &v4(2)).is_empty());
    read(&memory);

    planner.remove_service(&name(0));
    step(&mut planner, &mut memory);
    step(&mut planner, &mut memory);
    assert!(planner.refusals().is_empty());
    assert_eq!(found(&planner, &memory, &v4(2)).len(), 2);
}

#[test]
fn a_full_service_table_refuses_the_object_until_there_is_room() {
    fills(
        |sizes| sizes.services = 3,
        "service ns/s2 (TCP, IPv4) needs 1 more in table services, where 0 of 3 are free; raise it \
         with --map-size services=ENTRIES",
    );
}

#[test]
fn a_full_backend_table_refuses_the_object_until_there_is_room() {
    fills(
        |sizes| sizes.backends.v4 = 6,
        "service ns/s2 (TCP, IPv4) needs 2 more in table backends4, where 1 of 6 are free; raise \
         it with --map-size backends4=ENTRIES",
    );
}

#[test]
fn a_full_slot_table_refuses_the_object_until_there_is_room() {
    fills(
        |sizes| sizes.slots = 4,
        "service ns/s2 (TCP, IPv4) needs 2 more in table slots, where 0 of 4 are free; raise it \
         with --map-size slots=ENTRIES",
    );
}

#[test]
fn a_full_frontend_table_refuses_the_object_until_there_is_room() {
    fills(
        |sizes| sizes.frontends.v4 = 5,
        "service ns/s2 (TCP, IPv4) needs 2 more in table frontends4, where 1 of 5 are free; raise \
         it with --map-size frontends4=ENTRIES",
    );
}

#[test]
fn a_service_without_room_to_grow_still_loses_what_left() {
    let (mut planner, mut memory) = small(|sizes| sizes.backends.v4 = 4);
    set(&mut planner, &[port(0, &[1, 2, 3])]);
    step(&mut planner, &mut memory);
    set(&mut planner, &[port(0, &[2, 3, 4, 5])]);
    step(&mut planner, &mut memory);
    let hosts = |planner: &Planner, memory: &Memory| -> Vec<u8> {
        let found = found(planner, memory, &v4(0));
        found.into_iter().map(|(host, _)| host).collect()
    };
    assert_eq!(hosts(&planner, &memory), [2, 3]);
    assert_eq!(planner.refusals().len(), 1);
    // The id of the one that left is free now, but two are needed.
    step(&mut planner, &mut memory);
    assert_eq!(hosts(&planner, &memory), [2, 3]);
    set(&mut planner, &[port(0, &[3, 4, 5])]);
    step(&mut planner, &mut memory);
    step(&mut planner, &mut memory);
    assert_eq!(hosts(&planner, &memory), [3, 4, 5]);
    assert!(planner.refusals().is_empty());
}

/// B7: without room for its ranges a service is not programmed, and one that is there admits nobody
/// new; it never admits everybody.
#[test]
fn a_full_source_range_table_refuses_the_object_and_admits_nobody_new() {
    let (mut planner, mut memory) = small(|sizes| sizes.source_ranges.v4 = 3);
    let mut open = restricted(0, &[]);
    open.source_ranges = None;
    set(&mut planner, &[open, restricted(1, &[0, 1])]);
    step(&mut planner, &mut memory);
    assert!(planner.refusals().is_empty());

    set(
        &mut planner,
        &[restricted(0, &[0, 1]), restricted(2, &[0, 1])],
    );
    step(&mut planner, &mut memory);
    let messages: Vec<_> = planner.refusals().iter().map(ToString::to_string).collect();
    let message = |service| {
        format!(
            "service ns/s{service} (TCP, IPv4) needs 2 more in table source_ranges4, where 1 of 3 \
             are free; raise it with --map-size source_ranges4=ENTRIES"
        )
    };
    assert_eq!(messages, [message(0), message(2)]);
    assert!(found(&planner, &memory, &v4(2)).is_empty());
    assert_ne!(memory.service(1).flags() & flag::SOURCE_RANGES, 0);
    assert!(!memory.admits(1, client(Family::V4, 0)));
    assert!(!planner.is_pending(), "what has no room waits for room");

    planner.remove_service(&name(1));
    step(&mut planner, &mut memory);
    step(&mut planner, &mut memory);
    assert_eq!(planner.refusals().len(), 1, "room for one of them");
    assert!(memory.admits(1, client(Family::V4, 0)));
}

#[test]
fn a_node_address_without_room_is_refused_by_name() {
    let (mut planner, mut memory) = small(|sizes| sizes.frontends.v4 = 2);
    set(&mut planner, &[port(0, &[1])]);
    planner.set_node_addresses([ip(Family::V4, 9, 9)]);
    // Node addresses come first: the service has no room.
    step(&mut planner, &mut memory);
    assert_eq!(planner.refusals().len(), 1);
    planner.set_node_addresses([]);
    step(&mut planner, &mut memory);
    step(&mut planner, &mut memory);
    assert!(planner.refusals().is_empty());
    planner.set_node_addresses([ip(Family::V4, 9, 9)]);
    step(&mut planner, &mut memory);
    assert_eq!(
        planner.refusals()[0].to_string(),
        "node address 10.9.0.9 does not serve NodePorts: table frontends4 is full with 2; raise it \
         with --map-size frontends4=ENTRIES"
    );
    assert!(!planner.is_pending());
}

// Guard bits and flows.

fn flow(memory: &mut Memory, destination: SocketAddr, backend: SocketAddr, seen: u32) {
    let client: SocketAddr = "192.0.2.7:5000".parse().unwrap();
    let forward = FlowEntry {
        table: FlowTable::Established,
        source: client,
        destination,
        protocol: Protocol::Tcp as u8,
        direction: INBOUND,
        to_source: client,
        to_destination: backend,
        backend: 1,
        generation: 0,
        service: 1,
        traits: 0,
        state: 0,
        seen,
    };
    let reverse = FlowEntry {
        source: backend,
        destination: client,
        direction: OUTBOUND,
        to_source: destination,
        to_destination: client,
        ..forward
    };
    memory.flows = vec![forward, reverse];
}

#[test]
fn guard_bits_outlive_their_objects_as_long_as_flows_need_them() {
    let (mut planner, mut memory) = planned(&[port(0, &[1])]);
    let frontend = SocketAddr::new(ip(Family::V4, 0, 1), 80);
    let backend = SocketAddr::new(ip(Family::V4, 1, 1), 8080);
    let words = memory.sizes().guard_words;
    let bits = [
        GuardBit::address(frontend.ip(), FRONTEND, words),
        GuardBit::address(backend.ip(), BACKEND, words),
    ];
    flow(&mut memory, frontend, backend, CLOCK.jiffies);
    planner.remove_service(&name(0));
    apply(&mut planner, &mut memory).unwrap();
    assert_eq!(
        sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap(),
        0,
        "before grace"
    );
    reclaim(&mut planner, &memory).unwrap();
    assert_eq!(
        sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap(),
        0,
        "a flow is live"
    );
    assert!(bits.iter().all(|bit| memory.guarded(*bit)));
    assert_eq!(planner.pending_clears().len(), 2);

    memory.flows.pop();
    assert_eq!(
        sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap(),
        1,
        "the forward entry is left"
    );
    assert!(memory.guarded(bits[0]) && !memory.guarded(bits[1]));

    flow(
        &mut memory,
        frontend,
        backend,
        CLOCK.jiffies.wrapping_sub(500_000 * CLOCK.hz),
    );
    assert_eq!(
        sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap(),
        1,
        "the flow is old"
    );
    assert!(!bits.iter().any(|bit| memory.guarded(*bit)));
    assert!(planner.pending_clears().is_empty());
}

#[test]
fn a_bit_that_two_share_goes_with_the_second() {
    let (mut planner, mut memory) = planned(&[port(0, &[1]), port(1, &[1])]);
    let bit = GuardBit::address(ip(Family::V4, 1, 1), BACKEND, memory.sizes().guard_words);
    for service in 0..2 {
        assert!(memory.guarded(bit));
        planner.remove_service(&name(service));
        step(&mut planner, &mut memory);
        sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap();
    }
    assert!(!memory.guarded(bit));
}

// Restarts.

#[test]
fn nothing_is_removed_before_the_initial_lists_are_complete() {
    let ports = [port(0, &[1, 2]), port(1, &[3])];
    let (_, mut memory) = planned(&ports);
    let before = memory.snapshot().unwrap();
    let mut planner = Planner::restore(&before);
    step(&mut planner, &mut memory);
    set(&mut planner, &ports[..1]);
    step(&mut planner, &mut memory);
    assert!(memory.snapshot().unwrap() == before, "no write at all");

    planner.remove_unclaimed();
    planner.set_node_addresses([]);
    assert!(planner.is_pending());
    step(&mut planner, &mut memory);
    sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap();
    let wanted = Wanted::from([(v4(0), ports[0].clone())]);
    check_tables(&wanted, &BTreeSet::new(), &planner, &memory);
    check_guard(&wanted, &BTreeSet::new(), &memory);
    assert!(!planner.is_pending());
}

#[test]
fn node_addresses_stay_until_somebody_says_which_there_are() {
    let (mut planner, mut memory) = planned(&[port(0, &[1])]);
    let nodes = [1, 2].map(|host| ip(Family::V4, 9, host));
    planner.set_node_addresses(nodes);
    step(&mut planner, &mut memory);
    let mut planner = Planner::restore(&memory.snapshot().unwrap());
    planner.remove_unclaimed();
    step(&mut planner, &mut memory);
    sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap();
    assert!(!planner.is_pending());
    let left: Vec<_> = memory.frontends().keys().copied().collect();
    assert_eq!(left, nodes.map(FrontendAt::address));
    let bit = |host| GuardBit::address(ip(Family::V4, 9, host), NODE, memory.sizes().guard_words);
    let bits = [bit(1), bit(2)];
    assert!(bits.iter().all(|bit| memory.guarded(*bit)));

    planner.set_node_addresses([nodes[1]]);
    step(&mut planner, &mut memory);
    sweep(&mut planner, &mut memory, CLOCK, &Timeouts::default()).unwrap();
    let left: Vec<_> = memory.frontends().keys().copied().collect();
    assert_eq!(left, [FrontendAt::address(nodes[1])]);
    assert_eq!(bits.map(|bit| memory.guarded(bit)), [false, true]);
    check_guard(&Wanted::new(), &BTreeSet::from([nodes[1]]), &memory);
}

#[test]
fn a_node_address_that_is_also_a_load_balancers_stays_the_nodes_over_a_restart() {
    let mut outside = port(0, &[1]);
    outside.frontends.push(external(Family::V4, 1));
    let (mut planner, mut memory) = planned(std::slice::from_ref(&outside));
    let address = ip(Family::V4, 9, 1);
    planner.set_node_addresses([address]);
    step(&mut planner, &mut memory);
    let before = memory.snapshot().unwrap();
    let mut planner = Planner::restore(&before);
    set(&mut planner, &[outside]);
    planner.remove_unclaimed();
    step(&mut planner, &mut memory);
    planner.set_node_addresses([address]);
    step(&mut planner, &mut memory);
    assert!(memory.snapshot().unwrap() == before, "no write at all");

    planner.set_node_addresses([]);
    step(&mut planner, &mut memory);
    let value = memory.frontend(&FrontendAt::address(address)).unwrap();
    assert_eq!(value.kind, kind::EXTERNAL_IP);
}

#[test]
fn a_load_balancers_address_that_was_the_nodes_before_a_restart_is_put_right() {
    let mut outside = port(0, &[1]);
    outside.frontends.push(external(Family::V4, 1));
    let (mut planner, mut memory) = planned(std::slice::from_ref(&outside));
    let address = ip(Family::V4, 9, 1);
    planner.set_node_addresses([address]);
    step(&mut planner, &mut memory);
    let mut planner = Planner::restore(&memory.snapshot().unwrap());
    set(&mut planner, std::slice::from_ref(&outside));
    planner.remove_unclaimed();
    step(&mut planner, &mut memory);
    planner.set_node_addresses([]);
    let wanted = Wanted::from([(v4(0), outside)]);
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

#[test]
fn a_port_that_was_renamed_meanwhile_keeps_its_numbers() {
    let (planner, mut memory) = planned(&[port(0, &[1, 2])]);
    let before = found(&planner, &memory, &v4(0));
    let mut renamed = port(0, &[1, 2]);
    renamed.key.port_name = "http".into();
    let mut planner = Planner::restore(&memory.snapshot().unwrap());
    set(&mut planner, &[renamed.clone()]);
    planner.remove_unclaimed();
    assert!(planner.plan().is_empty());
    planner.finish();
    assert_eq!(found(&planner, &memory, &renamed.key), before);
    step(&mut planner, &mut memory);
}

#[test]
fn an_index_that_two_services_would_have_becomes_nobodys() {
    // s1 had both frontends; meanwhile the external one went to s0, which comes first.
    let mut both = port(1, &[1]);
    both.frontends.push(external(Family::V4, 1));
    let (_, mut memory) = planned(&[both]);
    let mut other = port(0, &[2]);
    other.frontends.push(external(Family::V4, 1));
    let wanted = Wanted::from([(v4(1), port(1, &[1])), (v4(0), other)]);
    let mut planner = restart(&memory.snapshot().unwrap(), &wanted, &BTreeSet::new());
    let plan = planner.plan();
    let own = at(&v4(1), &cluster_ip(&v4(1), 2));
    for batch in &plan.batches {
        for op in &batch.ops {
            let single = Batch {
                phase: batch.phase,
                ops: vec![op.clone()],
            };
            execute(&single, &mut memory).unwrap();
            let found = &read(&memory)[&own];
            assert_eq!(
                found.sets[0],
                BTreeSet::from([backend(Family::V4, 1).address])
            );
        }
        planner.commit(batch);
    }
    planner.finish();
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

#[test]
fn an_old_frontend_never_leads_to_the_next_owner_of_an_index() {
    let mut both = port(0, &[1]);
    both.frontends.push(external(Family::V4, 1));
    let (_, mut memory) = planned(&[both]);
    let mut planner = Planner::restore(&memory.snapshot().unwrap());
    set(&mut planner, &[port(0, &[1])]);
    step(&mut planner, &mut memory);
    planner.remove_service(&name(0));
    step(&mut planner, &mut memory);
    set(&mut planner, &[port(1, &[2])]);
    step(&mut planner, &mut memory);
    assert_eq!(planner.names().keys().collect::<Vec<_>>(), [&1]);
    assert_eq!(memory.frontend(&at(&v4(0), &external(Family::V4, 1))), None);
}

#[test]
fn of_two_ids_of_one_endpoint_the_one_in_use_stays() {
    let (_, mut memory) = planned(&[port(0, &[1, 2])]);
    let double = BackendRecord {
        bits: memory.backend(Family::V4, 1).unwrap().bits,
        ..stray(Family::V4, 1, 1)
    };
    memory.put_backends(Family::V4, &[(9, double)]).unwrap();
    let start = memory.service(1).cluster.start();
    memory.put_slots(start, &[9, 2]).unwrap();
    let wanted = Wanted::from([(v4(0), port(0, &[1, 2]))]);
    let mut planner = restart(&memory.snapshot().unwrap(), &wanted, &BTreeSet::new());
    assert_eq!(planner.damage(), damage(0, 0, 1));
    step(&mut planner, &mut memory);
    assert_eq!(found(&planner, &memory, &v4(0)), [(1, 9), (2, 2)]);
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

/// Damages the tables of two services, restarts, and expects them repaired and the damage counted.
fn repairs(damage: impl FnOnce(&mut Memory), expected: Damage) {
    let ports = [port(0, &[1, 2]), port(1, &[3, 4])];
    let (_, mut memory) = planned(&ports);
    damage(&mut memory);
    let wanted: Wanted = ports
        .iter()
        .map(|port| (port.key.clone(), port.clone()))
        .collect();
    let mut planner = restart(&memory.snapshot().unwrap(), &wanted, &BTreeSet::new());
    assert_eq!(planner.damage(), expected);
    step(&mut planner, &mut memory);
    settle(&mut planner, &mut memory, &wanted, &BTreeSet::new());
}

fn damage(frontends: u32, services: u32, backends: u32) -> Damage {
    Damage {
        frontends,
        services,
        backends,
        source_ranges: 0,
    }
}

#[test]
fn ranges_out_of_bounds_are_repaired() {
    let range = Range::new(u32::MAX - 1, 2, 9);
    repairs(
        |memory| {
            memory
                .store_service(1, ServiceWord::Cluster, range.0)
                .unwrap();
        },
        damage(0, 1, 0),
    );
}

#[test]
fn ranges_that_overlap_are_repaired() {
    repairs(
        |memory| {
            let other = memory.service(1).cluster;
            memory
                .store_service(2, ServiceWord::Cluster, other.0)
                .unwrap();
        },
        damage(0, 1, 0),
    );
}

#[test]
fn ranges_in_the_middle_of_a_word_are_repaired() {
    repairs(
        |memory| {
            let range = Range::new(1, 1, 0);
            memory
                .store_service(1, ServiceWord::Cluster, range.0)
                .unwrap();
        },
        damage(0, 1, 0),
    );
}

#[test]
fn slots_that_name_no_backend_or_anothers_are_repaired() {
    for id in [0, 3, 200, u32::MAX] {
        repairs(
            |memory| {
                let start = memory.service(1).cluster.start();
                memory.put_slots(start, &[1, id]).unwrap();
            },
            damage(0, 1, 0),
        );
    }
}

#[test]
fn frontends_that_lead_nowhere_are_repaired() {
    for service in [0, 64, u32::MAX] {
        repairs(
            |memory| {
                let at = at(&v4(0), &cluster_ip(&v4(0), 1));
                let value = FrontendValue {
                    service,
                    kind: kind::CLUSTER_IP,
                };
                memory.put_frontends(Family::V4, &[(at, value)]).unwrap();
            },
            damage(1, 0, 0),
        );
    }
}

#[test]
fn frontends_of_nobody_and_of_no_kind_are_removed() {
    repairs(
        |memory| {
            let at = |host| FrontendAt::address(ip(Family::V6, 7, host));
            let entries = [
                (at(1), FrontendValue::default()),
                (
                    at(2),
                    FrontendValue {
                        service: 0,
                        kind: 77,
                    },
                ),
            ];
            memory.put_frontends(Family::V6, &entries).unwrap();
        },
        damage(2, 0, 0),
    );
}

fn stray(family: Family, host: u8, service: u32) -> BackendRecord {
    BackendRecord {
        address: SocketAddr::new(ip(family, 1, host), 8080),
        generation: 5,
        bits: 0,
        service,
    }
}

#[test]
fn backends_of_no_service_the_wrong_family_and_twice_are_removed() {
    let v4 = Family::V4;
    for (family, id, record) in [
        (v4, 9, stray(v4, 9, 0)),
        (v4, 9, stray(v4, 9, u32::MAX)),
        (v4, 9, stray(v4, 1, 1)),
        (Family::V6, 9, stray(Family::V6, 9, 1)),
        (v4, 0, stray(v4, 9, 1)),
    ] {
        repairs(
            |memory| memory.put_backends(family, &[(id, record)]).unwrap(),
            damage(0, 0, 1),
        );
    }
}

#[test]
fn an_index_that_both_families_lead_to_becomes_nobodys() {
    repairs(
        |memory| {
            let at = at(&key(0, "", Family::V6), &external(Family::V6, 1));
            let value = FrontendValue {
                service: 1,
                kind: kind::EXTERNAL_IP,
            };
            memory.put_frontends(Family::V6, &[(at, value)]).unwrap();
        },
        damage(0, 1, 0),
    );
}

#[test]
fn missing_guard_bits_are_set_again() {
    repairs(
        |memory| {
            let bit = GuardBit::address(ip(Family::V4, 0, 1), FRONTEND, memory.sizes().guard_words);
            memory.clear_guard(&[bit]).unwrap();
        },
        damage(0, 0, 0),
    );
}

#[test]
fn tables_are_shown_without_an_agent() {
    let mut port = port(0, &[1, 2]);
    port.source_ranges = Some(vec![clients_net(Family::V4, 1)]);
    port.affinity_seconds = Some(60);
    port.frontends.push(node_port(30_001));
    let (_, memory) = planned(&[port]);
    let tables = Tables::new(&memory.snapshot().unwrap(), &BTreeMap::new());
    let [service] = &tables.services[..] else {
        panic!("one service: {tables:?}");
    };
    assert_eq!((service.index, &service.name), (1, &None));
    assert_eq!(service.affinity_seconds, Some(60));
    assert_eq!(
        service.source_ranges,
        Some(vec![clients_net(Family::V4, 1)])
    );
    assert_eq!(service.frontends.len(), 2);
    let shares: Vec<_> = service
        .cluster
        .iter()
        .map(|member| (member.slots, member.share))
        .collect();
    assert_eq!(shares, [(1, 0.5), (1, 0.5)]);
}
