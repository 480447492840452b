//! What is programmed, as text: to be read, compared and reviewed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use svc_lb::compile::HealthCheck;
use svc_lb::compile::desired::{FrontendAddress, FrontendKind, PortKey};
use svc_lb::dataplane::{FAMILIES, FrontendAt, GuardBit, Snapshot};
use svc_lb::model::{ObjectName, family_name};
use svc_lb::observe::status::ServicesStatus;
use svc_lb::plan::view::{BackendView, FrontendView, Member, ServiceView, Tables};
use svc_lb_common::backend::{GONE, IN_CLUSTER, IN_LOCAL, LOCAL, SERVING};
use svc_lb_common::guard::{BACKEND, FRONTEND, NODE};
use svc_lb_common::service::{flag, kind};
use svc_lb_common::{Family, Protocol};

/// The logical tables: each service port with its frontends and backends, and why others have none.
pub(super) fn tables(
    tables: &Tables,
    status: &ServicesStatus,
    health: &BTreeMap<ObjectName, HealthCheck>,
) -> String {
    let mut text = String::new();
    for service in &tables.services {
        service_port(&mut text, service);
    }
    let node_ports = tables
        .services
        .iter()
        .flat_map(|service| &service.frontends);
    if node_ports
        .clone()
        .any(|frontend| frontend.address == FrontendAddress::Node)
    {
        line(
            &mut text,
            format_args!("node {}", list(&tables.node_addresses)),
        );
    }
    for (
        name,
        HealthCheck {
            port,
            local_endpoints,
        },
    ) in health
    {
        line(
            &mut text,
            format_args!("{name} health check {port}: {local_endpoints} ready here"),
        );
    }
    for service in &status.not_programmed {
        let why = list_by("; ", &service.notes);
        line(
            &mut text,
            format_args!("{} not programmed: {why}", service.service),
        );
    }
    for refusal in &status.refusals {
        line(&mut text, format_args!("refused: {refusal}"));
    }
    if text.is_empty() {
        text.push_str("nothing\n");
    }
    text
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Text does not fail to grow.
    let _ = writeln!(text, "{arguments}");
}

fn list<T: ToString>(items: &[T]) -> String {
    list_by(", ", items)
}

fn list_by<T: ToString>(separator: &str, items: &[T]) -> String {
    items
        .iter()
        .map(T::to_string)
        .collect::<Vec<_>>()
        .join(separator)
}

fn service_port(text: &mut String, service: &ServiceView) {
    let family = service.family.map_or("no family", family_name);
    line(text, format_args!("{} {family}", service_name(service)));
    for frontend in &service.frontends {
        line(text, format_args!("  at {}", frontend_text(frontend)));
    }
    if service.internal_local {
        line(text, format_args!("  internal policy Local"));
    }
    if service.external_local {
        line(text, format_args!("  external policy Local"));
    }
    if let Some(seconds) = service.affinity_seconds {
        line(text, format_args!("  affinity {seconds} s"));
    }
    if service.maglev {
        line(text, format_args!("  by Maglev"));
    }
    match service.source_ranges.as_deref() {
        Some([]) => line(text, format_args!("  admits nobody")),
        Some(ranges) => line(text, format_args!("  admits {}", list(ranges))),
        None => {}
    }
    for backend in &service.backends {
        line(
            text,
            format_args!("  to {}: {}", backend.address, backend_text(backend)),
        );
    }
    let local = service.internal_local || service.external_local;
    set(text, service, "cluster", &service.cluster, |backend| {
        backend.in_cluster
    });
    set(text, service, "local", &service.local, |backend| {
        backend.in_local
    });
    let outside = |frontend: &FrontendView| frontend.kind != Some(FrontendKind::ClusterIp);
    let cluster = !service.internal_local || service.frontends.iter().any(outside);
    for (used, name, set) in [
        (cluster, "cluster", &service.cluster),
        (local, "local", &service.local),
    ] {
        if used && set.is_empty() {
            let answer = if service.has_any {
                "silence"
            } else {
                "rejected"
            };
            line(text, format_args!("  {name} set empty: {answer}"));
        }
    }
}

fn service_name(service: &ServiceView) -> String {
    let Some(name) = &service.name else {
        return format!("service {} without a name", service.index);
    };
    let PortKey {
        namespace,
        service,
        port_name,
        protocol,
        family: _,
    } = name;
    let colon = if port_name.is_empty() { "" } else { ":" };
    format!(
        "{namespace}/{service}{colon}{port_name} {}",
        protocol_text(Some(*protocol))
    )
}

fn protocol_text(protocol: Option<Protocol>) -> String {
    protocol.map_or("no protocol".to_owned(), |protocol| protocol.to_string())
}

fn frontend_text(frontend: &FrontendView) -> String {
    let FrontendView {
        address,
        port,
        protocol: _,
        kind,
    } = *frontend;
    let kind = match kind {
        Some(FrontendKind::ClusterIp) => "ClusterIP",
        Some(FrontendKind::NodePort) => "NodePort",
        Some(FrontendKind::LoadBalancer) => "LoadBalancer",
        Some(FrontendKind::ExternalIp) => "externalIP",
        None => "DAMAGED",
    };
    match address {
        FrontendAddress::Node => format!("node:{port} {kind}"),
        FrontendAddress::Ip(ip) => format!("{} {kind}", SocketAddr::new(ip, port)),
    }
}

fn backend_text(backend: &BackendView) -> String {
    let BackendView {
        in_cluster,
        in_local,
        serving,
        local,
        ..
    } = *backend;
    let sets: Vec<&str> = [(in_cluster, "cluster"), (in_local, "local")]
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect();
    let mut text = match (sets.as_slice(), serving) {
        ([], true) => "no new flows; UDP flows stay".to_owned(),
        ([], false) => "no new flows".to_owned(),
        (sets, true) => sets.join(", "),
        (sets, false) => format!("{}, NOT SERVING", sets.join(", ")),
    };
    if local {
        text.push_str("; on this node");
    }
    text
}

/// What the slots of a set say must be what the backends' bits say; where their parts are not equal, they are written
/// down, in the order of the backends.
fn set(
    text: &mut String,
    service: &ServiceView,
    name: &str,
    members: &[Member],
    is_member: fn(&BackendView) -> bool,
) {
    let in_slots: Vec<_> = members.iter().map(|member| member.address).collect();
    let by_bits = service.backends.iter().filter(|backend| is_member(backend));
    let by_bits: Vec<_> = by_bits.map(|backend| Some(backend.address)).collect();
    let counts: BTreeSet<u32> = members.iter().map(|member| member.slots).collect();
    if in_slots != by_bits {
        line(text, format_args!("  DAMAGED {name} set: {members:?}"));
    }
    if counts.len() > 1 {
        let slots: Vec<u32> = members.iter().map(|member| member.slots).collect();
        line(text, format_args!("  {name} set's slots: {}", list(&slots)));
    }
}

/// The addresses that a snapshot speaks of.
pub(super) fn addresses(snapshot: &Snapshot) -> BTreeSet<IpAddr> {
    let frontends = snapshot.frontends.iter().map(|(at, _)| at.address);
    let backends = FAMILIES
        .iter()
        .flat_map(|family| snapshot.backends.of(*family));
    let backends = backends.map(|(_, record)| record.address.ip());
    frontends
        .chain(backends)
        .filter(|address| !address.is_unspecified())
        .collect()
}

/// The maps, element by element, as far as they are not zero; of `guard`, the bits of `addresses`.
pub(super) fn maps(snapshot: &Snapshot, addresses: &BTreeSet<IpAddr>) -> String {
    let mut text = String::new();
    guard(&mut text, snapshot, addresses);
    for (at, value) in &snapshot.frontends {
        let kind = kind_text(value.kind);
        let name = family_map("frontends", at.family());
        let at_text = at_text(at);
        if at.is_address() {
            line(&mut text, format_args!("{name} {at_text}: {kind}"));
        } else {
            line(
                &mut text,
                format_args!("{name} {at_text}: service {}, {kind}", value.service),
            );
        }
    }
    for (index, words) in &snapshot.services {
        let flags = bits(
            words.flags(),
            &[
                (flag::INTERNAL_LOCAL, "internal_local"),
                (flag::EXTERNAL_LOCAL, "external_local"),
                (flag::HAS_ANY, "has_any"),
                (flag::SOURCE_RANGES, "source_ranges"),
                (flag::MAGLEV, "maglev"),
            ],
        );
        let affinity = words.affinity_seconds();
        line(
            &mut text,
            format_args!("services {index}: flags [{flags}], affinity {affinity} s"),
        );
        for (name, range) in [("cluster", words.cluster), ("local", words.local)] {
            if range.0 == 0 {
                continue;
            }
            let first = range.start() as usize;
            let last = first + range.length() as usize;
            let ids = snapshot.slots.get(first..last).unwrap_or_default();
            let (start, sequence) = (range.start(), range.sequence());
            line(
                &mut text,
                format_args!("  {name} {sequence}. at slot {start}: [{}]", list(ids)),
            );
        }
    }
    for family in FAMILIES {
        for (id, record) in snapshot.backends.of(family) {
            let bits = bits(
                record.bits,
                &[
                    (IN_CLUSTER, "cluster"),
                    (IN_LOCAL, "local"),
                    (SERVING, "serving"),
                    (LOCAL, "here"),
                    (GONE, "gone"),
                ],
            );
            let name = family_map("backends", family);
            let (address, generation, service) =
                (record.address, record.generation, record.service);
            line(
                &mut text,
                format_args!(
                    "{name} {id}: {address}, service {service}, generation {generation}, [{bits}]"
                ),
            );
        }
    }
    for range in &snapshot.source_ranges {
        let name = family_map("source_ranges", range.family());
        line(
            &mut text,
            format_args!("{name} service {}: {}", range.service, range.net),
        );
    }
    if text.is_empty() {
        text.push_str("nothing\n");
    }
    text
}

fn guard(text: &mut String, snapshot: &Snapshot, addresses: &BTreeSet<IpAddr>) {
    let words = snapshot.sizes.guard_words;
    let mut known = BTreeSet::new();
    for address in addresses {
        let set: Vec<&str> = [(FRONTEND, "frontend"), (NODE, "node"), (BACKEND, "backend")]
            .into_iter()
            .filter_map(|(bit, name)| {
                let (word, mask) = GuardBit::address(*address, bit, words).position();
                let set = snapshot.guard.get(word as usize)? & mask != 0;
                known.extend(set.then_some((word, mask)));
                set.then_some(name)
            })
            .collect();
        if !set.is_empty() {
            line(text, format_args!("guard {address}: {}", list(&set)));
        }
    }
    let all: u32 = snapshot.guard.iter().map(|word| word.count_ones()).sum();
    let others = all as usize - known.len();
    if others > 0 {
        line(text, format_args!("guard: {others} bits that nobody needs"));
    }
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        for port in 0..=u16::MAX {
            let (word, mask) = GuardBit::Port { protocol, port }.position();
            if snapshot
                .guard_port
                .get(word as usize)
                .is_some_and(|bits| bits & mask != 0)
            {
                line(text, format_args!("guard_port {port} {protocol}"));
            }
        }
    }
}

fn family_map(name: &str, family: Family) -> String {
    let number = match family {
        Family::V4 => 4,
        Family::V6 => 6,
    };
    format!("{name}{number}")
}

fn at_text(at: &FrontendAt) -> String {
    if at.is_address() {
        return at.address.to_string();
    }
    let protocol = protocol_text(Protocol::from_number(at.protocol));
    if at.address.is_unspecified() {
        return format!("node:{} {protocol}", at.port);
    }
    format!("{} {protocol}", SocketAddr::new(at.address, at.port))
}

fn kind_text(value: u8) -> &'static str {
    match value {
        kind::CLUSTER_IP => "ClusterIP",
        kind::NODE_PORT => "NodePort",
        kind::LOAD_BALANCER => "LoadBalancer",
        kind::EXTERNAL_IP => "externalIP",
        _ => "DAMAGED",
    }
}

fn bits(value: u32, names: &[(u32, &str)]) -> String {
    let mut set: Vec<String> = names
        .iter()
        .filter(|(bit, _)| value & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect();
    let known = names.iter().fold(0, |known, (bit, _)| known | bit);
    if value & !known != 0 {
        set.push(format!("{:#x}", value & !known));
    }
    set.join(", ")
}
