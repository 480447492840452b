//! SEMANTICS section 1 and the rows of 2.A to 2.F that the compile step decides.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use proptest::prelude::*;
use svc_lb_common::{Family, Protocol};

use super::{
    CompileOptions, Compiled, MaglevOptions, Reason, TopologyMode, compile,
    desired::{DesiredPort, Frontend, FrontendAddress, FrontendKind, Selection},
};
use crate::model::{
    Algorithm, Annotated, Conditions, Endpoint, EndpointSlice, Hints, IpMode, LoadBalancerIngress,
    NodeFacts, Service, ServiceType, TrafficPolicy,
    build::{endpoint, endpoint_port, ip, port, service, service_port, slice},
};

const NOT_READY: Conditions = Conditions {
    ready: false,
    serving: false,
    terminating: false,
};
const DRAINING: Conditions = Conditions {
    ready: false,
    serving: true,
    terminating: true,
};
const DYING: Conditions = Conditions {
    ready: false,
    serving: false,
    terminating: true,
};

fn node() -> NodeFacts {
    NodeFacts {
        name: "node-a".to_owned(),
        zone: Some("z1".to_owned()),
        addresses: [ip("192.0.2.1"), ip("2001:db8:2::1")].into(),
    }
}

fn compiled(service: &Service, slices: &[EndpointSlice]) -> Compiled {
    compile(service, slices, &node(), &CompileOptions::default())
}

fn only_port(service: &Service, slices: &[EndpointSlice]) -> DesiredPort {
    let mut ports = compiled(service, slices).ports;
    assert_eq!(ports.len(), 1, "{ports:?}");
    ports.remove(0)
}

fn reasons(compiled: &Compiled) -> Vec<Reason> {
    compiled
        .notes
        .iter()
        .map(|note| note.reason.clone())
        .collect()
}

fn with(address: &str, node: &str, conditions: Conditions) -> Endpoint {
    Endpoint {
        conditions,
        ..endpoint(address, node)
    }
}

fn hinted(mut endpoint: Endpoint, nodes: &[&str], zones: &[&str]) -> Endpoint {
    let names = |list: &[&str]| list.iter().map(|name| Arc::from(*name)).collect();
    endpoint.hints = Some(Box::new(Hints {
        nodes: names(nodes),
        zones: names(zones),
    }));
    endpoint
}

/// Addresses of the cluster set and of the local set.
fn sets(port: &DesiredPort) -> (Vec<String>, Vec<String>) {
    let of = |pick: fn(&super::desired::Backend) -> bool| {
        port.backends
            .iter()
            .filter(|b| pick(b))
            .map(|b| b.address.to_string())
            .collect()
    };
    (of(|b| b.in_cluster), of(|b| b.in_local))
}

fn vip(text: &str) -> LoadBalancerIngress {
    LoadBalancerIngress {
        ip: ip(text),
        mode: IpMode::Vip,
    }
}

/// SEMANTICS A1: one frontend, its backends by address and target port.
#[test]
fn a1_cluster_ip() {
    let slices = [slice(
        "web-1",
        "web",
        vec![
            endpoint("10.244.2.5", "node-b"),
            endpoint("10.244.1.5", "node-a"),
        ],
    )];
    let port = only_port(&service("web", &["10.96.0.10"]), &slices);
    assert_eq!(
        port.frontends,
        [Frontend {
            address: FrontendAddress::Ip(ip("10.96.0.10")),
            port: 80,
            kind: FrontendKind::ClusterIp
        }]
    );
    assert_eq!(sets(&port).0, ["10.244.1.5:8080", "10.244.2.5:8080"]);
    assert_eq!(sets(&port).1, [""; 0], "no Local policy, no local set");
    assert_eq!(
        port.backends.iter().map(|b| b.local).collect::<Vec<_>>(),
        [true, false]
    );
    assert!(port.has_any && !port.internal_local && !port.external_local);
}

/// SEMANTICS A2, A3, A4 and unfinished objects: nothing programmed, and the reason said.
#[test]
fn a2_a3_a4_skipped_services() {
    let base = || service("web", &["10.96.0.10"]);
    let foreign = "other".to_owned();
    let cases = [
        (
            Service {
                headless: true,
                cluster_ips: vec![],
                ..base()
            },
            Reason::Headless,
        ),
        (
            Service {
                service_type: ServiceType::ExternalName,
                ..base()
            },
            Reason::ExternalName,
        ),
        (
            Service {
                proxy_name: Some(foreign.clone()),
                ..base()
            },
            Reason::ForeignProxy {
                label: Some(foreign),
            },
        ),
        (
            Service {
                cluster_ips: vec![],
                ..base()
            },
            Reason::NoClusterIp,
        ),
        (
            Service {
                ports: vec![],
                ..base()
            },
            Reason::NoPorts,
        ),
    ];
    for (service, reason) in cases {
        let compiled = compiled(
            &service,
            &[slice("x", "web", vec![endpoint("10.0.0.1", "n")])],
        );
        assert!(compiled.ports.is_empty(), "{reason:?}");
        assert_eq!(reasons(&compiled), [reason]);
    }
}

/// SEMANTICS A4: with a proxy name configured only what carries it is ours.
#[test]
fn a4_proxy_name_configured() {
    let options = CompileOptions {
        proxy_name: Some("mine".into()),
        ..Default::default()
    };
    let mut ours = service("web", &["10.96.0.10"]);
    ours.proxy_name = Some("mine".into());
    let unlabelled = slice("web-1", "web", vec![endpoint("10.244.1.5", "node-a")]);
    let mut labelled = slice("web-2", "web", vec![endpoint("10.244.1.6", "node-a")]);
    labelled.proxy_name = Some("mine".into());
    let compiled = compile(&ours, [&unlabelled, &labelled], &node(), &options);
    assert_eq!(sets(&compiled.ports[0]).0, ["10.244.1.6:8080"]);
    let slice = unlabelled.name.clone();
    assert_eq!(
        reasons(&compiled),
        [Reason::ForeignSlice { slice, label: None }]
    );
    let other = compile(&service("web", &["10.96.0.10"]), [], &node(), &options);
    assert_eq!(reasons(&other), [Reason::ForeignProxy { label: None }]);
}

/// SEMANTICS A5: the protocol is part of the key; backends are its own.
#[test]
fn a5_protocols_are_separate() {
    let mut dns = service("dns", &["10.96.0.10"]);
    dns.ports = vec![
        service_port("dns", Protocol::Udp, 53),
        service_port("dns", Protocol::Tcp, 53),
        service_port("sig", Protocol::Sctp, 53),
    ];
    let mut slice = slice("dns-1", "dns", vec![endpoint("10.244.1.5", "node-a")]);
    slice.ports = vec![
        endpoint_port("dns", Protocol::Udp, 5353),
        endpoint_port("dns", Protocol::Tcp, 5354),
        endpoint_port("sig", Protocol::Sctp, 5355),
    ];
    let compiled = compiled(&dns, &[slice]);
    let targets: Vec<_> = compiled
        .ports
        .iter()
        .map(|p| (p.key.protocol, p.backends[0].address.port()))
        .collect();
    assert_eq!(
        targets,
        [
            (Protocol::Tcp, 5354),
            (Protocol::Udp, 5353),
            (Protocol::Sctp, 5355)
        ],
        "sorted by key"
    );
    assert_eq!(reasons(&compiled), []);
}

/// SEMANTICS A6: name and protocol match; the number may differ by slice; nil is ignored.
#[test]
fn a6_named_ports() {
    let mut web = service("web", &["10.96.0.10"]);
    web.ports = vec![service_port("http", Protocol::Tcp, 80)];
    let mut one = slice("web-1", "web", vec![endpoint("10.244.1.5", "node-a")]);
    one.ports = vec![
        endpoint_port("http", Protocol::Tcp, 8080),
        endpoint_port("http", Protocol::Udp, 8081),
        endpoint_port("metrics", Protocol::Tcp, 9090),
    ];
    let mut two = slice("web-2", "web", vec![endpoint("10.244.1.6", "node-a")]);
    two.ports = vec![endpoint_port("http", Protocol::Tcp, 9999)];
    let mut unnamed = slice("web-3", "web", vec![endpoint("10.244.1.7", "node-a")]);
    unnamed.ports = vec![endpoint_port("", Protocol::Tcp, 1)];
    unnamed.ports[0].name = None;
    let mut unnumbered = slice("web-4", "web", vec![endpoint("10.244.1.8", "node-a")]);
    unnumbered.ports = vec![endpoint_port("http", Protocol::Tcp, 0)];
    let compiled = compiled(&web, &[two, unnumbered.clone(), one, unnamed.clone()]);
    assert_eq!(
        sets(&compiled.ports[0]).0,
        ["10.244.1.5:8080", "10.244.1.6:9999"]
    );
    assert_eq!(
        reasons(&compiled),
        [
            Reason::UnnamedSlicePort {
                slice: unnamed.name
            },
            Reason::UnnumberedSlicePort {
                slice: unnumbered.name
            },
        ]
    );
}

/// SEMANTICS A6: a Service's unnamed port does not match a slice's port that has no name at all.
#[test]
fn a6_nil_is_not_empty() {
    let mut nil = slice("web-1", "web", vec![endpoint("10.244.1.5", "node-a")]);
    nil.ports[0].name = None;
    let compiled = compiled(&service("web", &["10.96.0.10"]), &[nil]);
    assert!(compiled.ports[0].backends.is_empty());
    let offered = vec!["(no name)/TCP".to_owned()];
    assert!(reasons(&compiled).contains(&Reason::NoSuchPort { offered }));
}

/// SEMANTICS A7: slices are merged, duplicates resolved in favour of the local entry, then the
/// usable one, whatever the order.
#[test]
fn a7_slices_are_merged() {
    let address = "10.244.1.5";
    let cases = [
        (
            endpoint(address, "node-b"),
            with(address, "node-a", NOT_READY),
            NOT_READY,
            true,
        ),
        (
            with(address, "node-b", DRAINING),
            endpoint(address, "node-b"),
            Conditions::READY,
            false,
        ),
        (
            with(address, "node-b", NOT_READY),
            with(address, "node-b", DRAINING),
            DRAINING,
            false,
        ),
    ];
    for (first, second, conditions, local) in cases {
        for pair in [[first.clone(), second.clone()], [second, first]] {
            let slices =
                pair.map(|e| slice(&format!("web-{}", e.conditions.ready), "web", vec![e]));
            let port = only_port(&service("web", &["10.96.0.10"]), &slices);
            assert_eq!(port.backends.len(), 1);
            let usable = conditions.ready || conditions == DRAINING;
            assert_eq!((port.has_any, port.backends[0].local), (usable, local));
            assert_eq!(port.backends[0].in_cluster, usable);
        }
    }
}

/// SEMANTICS A7: the same pod may serve two ports of a Service by one number each.
#[test]
fn a7_one_address_two_ports() {
    let mut web = service("web", &["10.96.0.10"]);
    web.ports = vec![
        service_port("a", Protocol::Tcp, 80),
        service_port("b", Protocol::Tcp, 81),
    ];
    let mut slice = slice("web-1", "web", vec![endpoint("10.244.1.5", "node-a")]);
    slice.ports = vec![
        endpoint_port("a", Protocol::Tcp, 8080),
        endpoint_port("b", Protocol::Tcp, 8080),
    ];
    let compiled = compiled(&web, &[slice]);
    assert_eq!(sets(&compiled.ports[0]).0, sets(&compiled.ports[1]).0);
}

/// SEMANTICS A8: an endpoint off the cluster is a backend like any other and never local.
#[test]
fn a8_endpoints_without_node() {
    let mut web = service("web", &["10.96.0.10"]);
    web.internal_policy = TrafficPolicy::Local;
    let mut outside = endpoint("203.0.113.7", "node-a");
    outside.node = None;
    let compiled = compiled(&web, &[slice("web-1", "web", vec![outside])]);
    let port = &compiled.ports[0];
    assert!(port.has_any && !port.backends[0].local && !port.backends[0].in_local);
    assert_eq!(reasons(&compiled), [Reason::NoLocalEndpoints]);
}

/// SEMANTICS A9: one independent state per family, none without a ClusterIP of the family.
#[test]
fn a9_dual_stack() {
    let mut web = service("web", &["fd00:10:96::10", "10.96.0.10"]);
    web.external_ips = vec![ip("192.0.2.1"), ip("2001:db8::1")];
    let four = slice("web-4", "web", vec![endpoint("10.244.1.5", "node-a")]);
    let six = slice("web-6", "web", vec![endpoint("fd00:10:244:1::5", "node-a")]);
    let both = compiled(&web, &[four.clone(), six.clone()]);
    let families: Vec<_> = both.ports.iter().map(|p| p.key.family).collect();
    assert_eq!(families, [Family::V4, Family::V6]);
    assert_eq!(sets(&both.ports[0]).0, ["10.244.1.5:8080"]);
    assert_eq!(sets(&both.ports[1]).0, ["[fd00:10:244:1::5]:8080"]);
    for port in &both.ports {
        let is_family = |address: FrontendAddress| match address {
            FrontendAddress::Node => true,
            FrontendAddress::Ip(ip) => ip.is_ipv4() == (port.key.family == Family::V4),
        };
        assert!(port.frontends.iter().all(|f| is_family(f.address)));
        assert_eq!(port.frontends.len(), 2);
    }

    web.cluster_ips = vec![ip("10.96.0.10")];
    let single = compiled(&web, &[four, six]);
    assert_eq!(single.ports.len(), 1);
    assert_eq!(
        reasons(&single),
        [Reason::NoClusterIpInFamily {
            ip: ip("2001:db8::1")
        }]
    );
}

/// SEMANTICS A9: endpoints of the other family only are no endpoints.
#[test]
fn a9_no_translation_between_families() {
    let six = slice("web-6", "web", vec![endpoint("fd00:10:244:1::5", "node-a")]);
    let compiled = compiled(&service("web", &["10.96.0.10"]), &[six]);
    assert!(compiled.ports[0].backends.is_empty() && !compiled.ports[0].has_any);
    assert_eq!(reasons(&compiled), [Reason::NoEndpoints]);
}

/// SEMANTICS A10, A11, B1, B4, B5, B6: which addresses become frontends.
#[test]
fn b_external_frontends() {
    let mut web = service("web", &["10.96.0.10"]);
    web.service_type = ServiceType::LoadBalancer;
    web.external_ips = vec![ip("192.0.2.9"), ip("198.51.100.1")];
    web.load_balancer = vec![
        vip("198.51.100.1"),
        LoadBalancerIngress {
            ip: ip("198.51.100.2"),
            mode: IpMode::Proxy,
        },
    ];
    web.requested_load_balancer_ip = Some(ip("198.51.100.77"));
    let kinds = |service: &Service| -> Vec<(String, u16, FrontendKind)> {
        only_port(service, &[])
            .frontends
            .iter()
            .map(|f| match f.address {
                FrontendAddress::Node => ("node".to_owned(), f.port, f.kind),
                FrontendAddress::Ip(ip) => (ip.to_string(), f.port, f.kind),
            })
            .collect()
    };
    let addresses = [
        ("10.96.0.10".to_owned(), 80, FrontendKind::ClusterIp),
        ("192.0.2.9".to_owned(), 80, FrontendKind::ExternalIp),
        ("198.51.100.1".to_owned(), 80, FrontendKind::LoadBalancer),
    ];
    assert_eq!(kinds(&web), addresses, "no node port was allocated (A10)");
    assert!(
        reasons(&compiled(&web, &[])).contains(&Reason::ProxiedLoadBalancer {
            ip: ip("198.51.100.2")
        })
    );
    web.ports[0].node_port = Some(port(30123));
    let mut all = vec![("node".to_owned(), 30123, FrontendKind::NodePort)];
    all.extend(addresses);
    assert_eq!(kinds(&web), all);
}

/// SEMANTICS B4: externalIPs can be switched off, against CVE-2020-8554; then nothing of the Service is
/// external because of them, and that is said.
#[test]
fn b4_external_ips_off() {
    let mut web = service("web", &["10.96.0.10"]);
    web.external_ips = vec![ip("192.0.2.9"), ip("2001:db8::9")];
    web.external_policy = TrafficPolicy::Local;
    let slices = [slice(
        "web-1",
        "web",
        vec![endpoint("10.244.1.5", "node-a")],
    )];
    let options = CompileOptions {
        ignore_external_ips: true,
        ..CompileOptions::default()
    };
    let compiled = compile(&web, &slices, &node(), &options);
    let kinds: Vec<_> = compiled.ports[0].frontends.iter().map(|f| f.kind).collect();
    assert_eq!(kinds, [FrontendKind::ClusterIp]);
    assert!(!compiled.ports[0].external_local);
    let left_out = ip("192.0.2.9");
    assert!(reasons(&compiled).contains(&Reason::ExternalIpsOff { ip: left_out }));
    assert_eq!(only_port(&web, &slices).frontends.len(), 2, "but for that");
}

/// SEMANTICS A11: ingress with a host name only, and none yet, are said.
#[test]
fn a11_ingress_without_address() {
    let mut web = service("web", &["10.96.0.10", "fd00:10:96::10"]);
    web.service_type = ServiceType::LoadBalancer;
    assert!(reasons(&compiled(&web, &[])).contains(&Reason::LoadBalancerPending));
    web.load_balancer_hostname = true;
    let said = reasons(&compiled(&web, &[]));
    assert!(said.contains(&Reason::HostNameLoadBalancer));
    assert!(!said.contains(&Reason::LoadBalancerPending));
}

/// SEMANTICS G6, D3 and trap 7: load balancers are told of ready endpoints on this node, unique by
/// address; one with two ports or two families counts once.
#[test]
fn g6_d3_health_check_counts_local_ready_addresses() {
    let mut web = service("web", &["10.96.0.10", "fd00:10:96::10"]);
    web.service_type = ServiceType::LoadBalancer;
    web.external_policy = TrafficPolicy::Local;
    web.load_balancer = vec![vip("198.51.100.1")];
    web.health_check_node_port = Some(port(31000));
    web.ports = vec![
        service_port("http", Protocol::Tcp, 80),
        service_port("https", Protocol::Tcp, 443),
    ];
    let ports = vec![
        endpoint_port("http", Protocol::Tcp, 8080),
        endpoint_port("https", Protocol::Tcp, 8443),
    ];
    let of = |name, endpoints| EndpointSlice {
        ports: ports.clone(),
        ..slice(name, "web", endpoints)
    };
    let mut slices = vec![
        of(
            "web-4",
            vec![
                endpoint("10.244.1.5", "node-a"),
                endpoint("10.244.1.6", "node-a"),
                with("10.244.1.7", "node-a", NOT_READY),
                with("10.244.1.8", "node-a", DRAINING),
                endpoint("10.244.2.5", "node-b"),
            ],
        ),
        of(
            "web-6",
            vec![
                endpoint("fd00:10:244:1::5", "node-a"),
                endpoint("fd00:10:244:1::6", "node-a"),
            ],
        ),
        // The same endpoint in a second slice.
        of("web-4b", vec![endpoint("10.244.1.5", "node-a")]),
    ];
    let count = |web: &Service, slices: &[EndpointSlice]| {
        let check = compiled(web, slices).health_check?;
        assert_eq!(check.port, port(31000));
        Some(check.local_endpoints)
    };
    assert_eq!(count(&web, &slices), Some(2));
    slices.truncate(1);
    slices[0]
        .endpoints
        .retain(|e| !e.conditions.ready || e.address == ip("10.244.2.5"));
    assert_eq!(
        count(&web, &slices),
        Some(0),
        "draining and remote ones do not count"
    );
    assert!(
        compiled(&web, &slices).ports[0]
            .backends
            .iter()
            .any(|b| b.in_local),
        "although the draining one serves"
    );

    let mut other = web.clone();
    other.external_policy = TrafficPolicy::Cluster;
    assert_eq!(count(&other, &slices), None);
    other = web.clone();
    other.service_type = ServiceType::NodePort;
    assert_eq!(count(&other, &slices), None);
    other = web.clone();
    other.proxy_name = Some("another".to_owned());
    assert_eq!(count(&other, &slices), None);
    web.health_check_node_port = None;
    assert_eq!(count(&web, &slices), None);
    assert!(reasons(&compiled(&web, &slices)).contains(&Reason::NoHealthCheckNodePort));
}

/// SEMANTICS F10: the annotation decides, the setting where there is none; live.
#[test]
fn f10_algorithm() {
    let slices = [slice(
        "web-1",
        "web",
        vec![endpoint("10.244.1.5", "node-a")],
    )];
    let maglev = MaglevOptions {
        seed: 9,
        slots: 4_093,
    };
    let with = |algorithm| CompileOptions {
        algorithm,
        maglev,
        ..Default::default()
    };
    let table = Selection::Maglev {
        seed: 9,
        slots: 4_093,
    };
    let mut web = service("web", &["10.96.0.10"]);
    for (annotation, setting, expected) in [
        (Annotated::Absent, Algorithm::Random, Selection::Random),
        (Annotated::Absent, Algorithm::Maglev, table),
        (
            Annotated::Value(Algorithm::Maglev),
            Algorithm::Random,
            table,
        ),
        (
            Annotated::Value(Algorithm::Random),
            Algorithm::Maglev,
            Selection::Random,
        ),
        (
            Annotated::Unreadable("magleff".to_owned()),
            Algorithm::Maglev,
            table,
        ),
    ] {
        let unreadable = matches!(annotation, Annotated::Unreadable(_));
        web.algorithm = annotation;
        let compiled = compile(&web, &slices, &node(), &with(setting));
        assert_eq!(compiled.ports[0].selection, expected);
        let value = "magleff".to_owned();
        let said = reasons(&compiled).contains(&Reason::UnknownAlgorithm { value });
        assert_eq!(said, unreadable);
    }
}

/// SEMANTICS F9: tables have more than a hundred slots for each endpoint, ready or not, while a
/// range can hold them, and the size of the setting at least.
#[test]
fn f9_table_sizes() {
    let options = |slots| CompileOptions {
        algorithm: Algorithm::Maglev,
        maglev: MaglevOptions { seed: 0, slots },
        ..Default::default()
    };
    for (least, endpoints, expected) in [
        (1_021, 1, 1_021),
        (1_021, 10, 1_021),
        (1_021, 11, 4_093),
        (1_021, 40, 4_093),
        (4_093, 41, 16_381),
        (16_381, 164, 65_521),
        (65_521, 2, 65_521),
        (1_021, 700, 65_521),
    ] {
        let address = |n: u16| format!("10.244.{}.{}", n / 250, n % 250 + 1);
        let all = (0..endpoints).map(|n| {
            let conditions = if n % 2 == 0 {
                Conditions::READY
            } else {
                NOT_READY
            };
            with(&address(n), "node-a", conditions)
        });
        let slices = [slice("web-1", "web", all.collect())];
        let web = service("web", &["10.96.0.10"]);
        let compiled = compile(&web, &slices, &node(), &options(least));
        let Selection::Maglev { slots, .. } = compiled.ports[0].selection else {
            panic!("{endpoints} endpoints");
        };
        assert_eq!(slots, expected, "{endpoints} endpoints");
    }
}

/// SEMANTICS D9, F11: an endpoint's weight is its slice's; with 0 it serves what it has and nothing
/// new, as if it were not there.
#[test]
fn d9_f11_weights() {
    let weighted = |name, weight, endpoints| EndpointSlice {
        weight,
        ..slice(name, "web", endpoints)
    };
    let mut slices = vec![
        weighted(
            "web-1",
            Annotated::Value(3),
            vec![endpoint("10.244.1.5", "node-a")],
        ),
        weighted(
            "web-2",
            Annotated::Value(0),
            vec![
                endpoint("10.244.1.6", "node-a"),
                with("10.244.1.7", "node-a", DRAINING),
            ],
        ),
        weighted(
            "web-3",
            Annotated::Unreadable("heavy".to_owned()),
            vec![endpoint("10.244.2.5", "node-b")],
        ),
    ];
    let mut web = service("web", &["10.96.0.10"]);
    web.internal_policy = TrafficPolicy::Local;
    web.external_ips = vec![ip("192.0.2.9")];
    let both = compiled(&web, &slices);
    let weights = |compiled: &Compiled| -> Vec<(u16, bool, bool)> {
        let backends = compiled.ports[0].backends.iter();
        backends
            .map(|b| (b.weight, b.in_cluster || b.in_local, b.serving))
            .collect()
    };
    assert_eq!(
        weights(&both),
        [
            (3, true, true),
            (0, false, true),
            (0, false, true),
            (1, true, true)
        ]
    );
    assert!(reasons(&both).contains(&Reason::EndpointQuarantined {
        ip: ip("10.244.1.6")
    }));
    assert!(reasons(&both).contains(&Reason::UnreadableWeight {
        slice: slices[2].name.clone(),
        value: "heavy".to_owned(),
    }));

    // The only one of this node in quarantine: others have some, so silence.
    slices.remove(0);
    let elsewhere = compiled(&web, &slices);
    assert_eq!(sets(&elsewhere.ports[0]).1, [""; 0]);
    assert!(elsewhere.ports[0].has_any);
    // All in quarantine: nobody.
    slices.pop();
    let nobody = compiled(&web, &slices);
    assert!(!nobody.ports[0].has_any);
    assert_eq!(weights(&nobody), [(0, false, true), (0, false, true)]);
    // An address of two slices is used where one of them says so.
    slices.push(weighted(
        "web-9",
        Annotated::Absent,
        vec![endpoint("10.244.1.6", "node-a")],
    ));
    assert_eq!(
        sets(&compiled(&web, &slices).ports[0]).1,
        ["10.244.1.6:8080"]
    );
}

/// SEMANTICS A13: an unready endpoint published as ready is used, and keeps its UDP flows.
#[test]
fn a13_published_not_ready() {
    for terminating in [false, true] {
        let conditions = Conditions {
            ready: true,
            serving: false,
            terminating,
        };
        let slices = [slice(
            "web-1",
            "web",
            vec![with("10.244.1.5", "node-a", conditions)],
        )];
        let port = only_port(&service("web", &["10.96.0.10"]), &slices);
        assert!(port.backends[0].in_cluster && port.backends[0].serving);
    }
}

fn admitted(port: &DesiredPort) -> Vec<String> {
    let ranges = port.source_ranges.iter().flatten();
    ranges.map(ToString::to_string).collect()
}

/// SEMANTICS B7: where a range holds an address of the node, the load balancer's own addresses are
/// admitted too; and ranges without a load balancer's address are for nobody.
#[test]
fn b7_the_node_reaches_its_own_load_balancers() {
    let mut web = service("web", &["10.96.0.10", "fd00:10:96::10"]);
    web.source_ranges = ["192.0.2.0/24", "2001:db8:3::/48"]
        .map(|range| range.parse().expect("a range"))
        .to_vec();
    web.external_ips = vec![ip("198.51.100.9")];
    assert_eq!(compiled(&web, &[]).ports[0].source_ranges, None);
    web.load_balancer = vec![vip("198.51.100.1"), vip("198.51.100.2"), vip("2001:db8::1")];
    let compiled = compiled(&web, &[]);
    assert_eq!(
        admitted(&compiled.ports[0]),
        ["192.0.2.0/24", "198.51.100.1/32", "198.51.100.2/32"]
    );
    // The node's IPv6 address is in none of the ranges.
    assert_eq!(admitted(&compiled.ports[1]), ["2001:db8:3::/48"]);
}

/// SEMANTICS B7: ranges go by family; a family without any admits everyone, and that is said.
#[test]
fn b7_source_ranges() {
    let mut web = service("web", &["10.96.0.10", "fd00:10:96::10"]);
    web.load_balancer = vec![vip("198.51.100.1"), vip("2001:db8::1")];
    let ranges = ["203.0.113.9/24", "10.0.0.0/8", "203.0.113.0/24"];
    web.source_ranges = ranges.iter().map(|r| r.parse().expect("a range")).collect();
    let compiled = compiled(&web, &[]);
    assert_eq!(
        admitted(&compiled.ports[0]),
        ["10.0.0.0/8", "203.0.113.0/24"]
    );
    assert_eq!(compiled.ports[1].source_ranges, None);
    let open: Vec<_> = compiled
        .notes
        .iter()
        .filter(|n| n.reason == Reason::SourceRangesOfOtherFamily)
        .map(|n| n.family)
        .collect();
    assert_eq!(open, [Some(Family::V6)]);
}

/// SEMANTICS C6, C7: the two policies are independent; 2 x 2, and not accessible from outside.
#[test]
fn c7_policies_are_independent() {
    use TrafficPolicy::{Cluster, Local};
    let slices = [slice(
        "web-1",
        "web",
        vec![
            endpoint("10.244.1.5", "node-a"),
            endpoint("10.244.2.5", "node-b"),
        ],
    )];
    let cases = [
        // internal, external, accessible: cluster set used, local set used, external_local
        (Cluster, Cluster, true, true, false, false),
        (Cluster, Local, true, true, true, true),
        (Local, Cluster, true, true, true, false),
        (Local, Local, true, true, true, true),
        (Cluster, Local, false, true, false, false),
        (Local, Cluster, false, false, true, false),
    ];
    for (internal, external, accessible, cluster, local, external_local) in cases {
        let mut web = service("web", &["10.96.0.10"]);
        web.internal_policy = internal;
        web.external_policy = external;
        web.ports[0].node_port = accessible.then(|| port(30123));
        let desired = only_port(&web, &slices);
        let expected = |used: bool, all: &[&'static str]| if used { all.to_vec() } else { vec![] };
        let context = format!("{internal:?} {external:?} {accessible}");
        let (in_cluster, in_local) = sets(&desired);
        assert_eq!(
            in_cluster,
            expected(cluster, &["10.244.1.5:8080", "10.244.2.5:8080"]),
            "{context}"
        );
        assert_eq!(in_local, expected(local, &["10.244.1.5:8080"]), "{context}");
        assert_eq!(desired.internal_local, internal == Local, "{context}");
        assert_eq!(desired.external_local, external_local, "{context}");
    }
}

/// SEMANTICS D2 and traps 8: the sets fall back to draining endpoints independently; one that is
/// neither ready nor draining is never used, and all are known to the dataplane.
#[test]
fn d2_terminating_fallback() {
    type Case = ([Conditions; 4], &'static [usize], &'static [usize], bool);
    let all = [
        "10.244.1.1:8080",
        "10.244.1.2:8080",
        "10.244.1.3:8080",
        "10.244.2.1:8080",
    ];
    let cases: [Case; 6] = [
        (
            [Conditions::READY, DRAINING, NOT_READY, Conditions::READY],
            &[0, 3],
            &[0],
            true,
        ),
        (
            [DRAINING, DRAINING, NOT_READY, Conditions::READY],
            &[3],
            &[0, 1],
            true,
        ),
        ([DRAINING, DYING, NOT_READY, DRAINING], &[0, 3], &[0], true),
        ([DYING, DYING, NOT_READY, DRAINING], &[3], &[], true),
        (
            [NOT_READY, NOT_READY, NOT_READY, Conditions::READY],
            &[3],
            &[],
            true,
        ),
        ([DYING, NOT_READY, NOT_READY, DYING], &[], &[], false),
    ];
    for (conditions, cluster, local, has_any) in cases {
        let addresses = ["10.244.1.1", "10.244.1.2", "10.244.1.3", "10.244.2.1"];
        let endpoints = addresses
            .iter()
            .zip(conditions)
            .map(|(a, c)| {
                with(
                    a,
                    if a.starts_with("10.244.1") {
                        "node-a"
                    } else {
                        "node-b"
                    },
                    c,
                )
            })
            .collect();
        let mut web = service("web", &["10.96.0.10"]);
        web.ports[0].node_port = Some(port(30123));
        web.external_policy = TrafficPolicy::Local;
        let port = only_port(&web, &[slice("web-1", "web", endpoints)]);
        let pick = |indexes: &[usize]| indexes.iter().map(|i| all[*i]).collect::<Vec<_>>();
        assert_eq!(
            sets(&port),
            (
                pick(cluster).into_iter().map(str::to_owned).collect(),
                pick(local).into_iter().map(str::to_owned).collect(),
            )
        );
        assert_eq!(port.has_any, has_any);
        assert_eq!(port.backends.len(), 4);
        let serving: Vec<bool> = port.backends.iter().map(|b| b.serving).collect();
        assert_eq!(serving, conditions.map(|c| c.serving));
    }
}

/// SEMANTICS D5, D6, D7: node hints win over zone hints; either is all or nothing; draining
/// endpoints and the local set ignore them.
#[test]
fn d5_d6_d7_topology() {
    let a = || endpoint("10.244.1.1", "node-a");
    let b = || endpoint("10.244.2.1", "node-b");
    let gone = || with("10.244.2.2", "node-b", DRAINING);
    let cases: [(Vec<Endpoint>, &[&str], Option<TopologyMode>); 8] = [
        (vec![a(), b()], &["10.244.1.1", "10.244.2.1"], None),
        (
            vec![
                hinted(a(), &["node-b"], &["z2"]),
                hinted(b(), &["node-a"], &["z1"]),
            ],
            &["10.244.2.1"],
            Some(TopologyMode::Node),
        ),
        (
            vec![
                hinted(a(), &["node-a"], &["z2"]),
                hinted(b(), &["node-b"], &["z1"]),
            ],
            &["10.244.1.1"],
            Some(TopologyMode::Node),
        ),
        (
            vec![
                hinted(a(), &["node-x"], &["z2"]),
                hinted(b(), &["node-b"], &["z1", "z3"]),
            ],
            &["10.244.2.1"],
            Some(TopologyMode::Zone),
        ),
        (
            vec![hinted(a(), &[], &["z1"]), b()],
            &["10.244.1.1", "10.244.2.1"],
            None,
        ),
        (
            vec![hinted(a(), &[], &["z2"]), hinted(b(), &[], &["z3"])],
            &["10.244.1.1", "10.244.2.1"],
            None,
        ),
        (
            vec![hinted(a(), &[], &["z1"]), hinted(b(), &[], &["z2"]), gone()],
            &["10.244.1.1"],
            Some(TopologyMode::Zone),
        ),
        (
            vec![hinted(a(), &[], &["z1"]), hinted(b(), &[], &["z1"])],
            &["10.244.1.1", "10.244.2.1"],
            None,
        ),
    ];
    for (endpoints, expected, mode) in cases {
        let context = format!("{endpoints:?}");
        let compiled = compiled(
            &service("web", &["10.96.0.10"]),
            &[slice("web-1", "web", endpoints)],
        );
        let expected: Vec<String> = expected.iter().map(|a| format!("{a}:8080")).collect();
        assert_eq!(sets(&compiled.ports[0]).0, expected, "{context}");
        let said = reasons(&compiled).into_iter().find_map(|reason| {
            let Reason::Topology {
                mode,
                used: 1,
                ready: 2,
            } = reason
            else {
                return None;
            };
            Some(mode)
        });
        assert_eq!(said, mode, "{context}");
    }
}

/// SEMANTICS D8: without a zone label there is no zone to prefer.
#[test]
fn d8_node_without_zone() {
    let web = service("web", &["10.96.0.10"]);
    let endpoints = vec![
        hinted(endpoint("10.244.1.1", "node-a"), &[], &["z1"]),
        hinted(endpoint("10.244.2.1", "node-b"), &[], &["z2"]),
    ];
    let nowhere = NodeFacts {
        zone: None,
        ..node()
    };
    let slices = [slice("web-1", "web", endpoints)];
    let compiled = compile(&web, &slices, &nowhere, &CompileOptions::default());
    assert_eq!(sets(&compiled.ports[0]).0.len(), 2);
}

/// SEMANTICS F1, F2: the timeout belongs to every port alike; each port has its own key.
#[test]
fn f1_affinity() {
    let mut web = service("web", &["10.96.0.10"]);
    web.ports = vec![
        service_port("a", Protocol::Tcp, 80),
        service_port("b", Protocol::Tcp, 81),
    ];
    web.affinity_seconds = Some(10800);
    let compiled = compiled(&web, &[]);
    assert!(
        compiled
            .ports
            .iter()
            .all(|port| port.affinity_seconds == Some(10800))
    );
    assert_ne!(compiled.ports[0].key, compiled.ports[1].key);
}

/// SEMANTICS 1.2: no endpoints, none with the port, none usable: each is told apart.
#[test]
fn empty_sets_are_explained() {
    let web = service("web", &["10.96.0.10"]);
    assert_eq!(reasons(&compiled(&web, &[])), [Reason::NoEndpoints]);
    let mut other = slice("web-1", "web", vec![endpoint("10.244.1.5", "node-a")]);
    other.ports = vec![endpoint_port("http", Protocol::Tcp, 8080)];
    let offered = vec!["http/TCP".to_owned()];
    assert_eq!(
        reasons(&compiled(&web, &[other])),
        [Reason::NoSuchPort { offered }]
    );
    let sleeping = slice(
        "web-1",
        "web",
        vec![with("10.244.1.5", "node-a", NOT_READY)],
    );
    let said = compiled(&web, &[sleeping]);
    let not_ready = Reason::EndpointNotReady {
        ip: ip("10.244.1.5"),
    };
    assert_eq!(reasons(&said), [not_ready, Reason::NoneUsable]);
    assert_eq!(
        said.notes
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>(),
        [
            "endpoint 10.244.1.5 is not ready",
            "port 80/TCP: IPv4: no endpoint is ready: clients are rejected"
        ]
    );
}

/// SEMANTICS A2: slices labelled headless and slices of host names are left out, and that is said.
#[test]
fn unusable_slices() {
    let mut headless = slice("web-1", "web", vec![endpoint("10.244.1.5", "node-a")]);
    headless.headless = true;
    let mut names = slice("web-2", "web", vec![]);
    names.family = None;
    let compiled = compiled(
        &service("web", &["10.96.0.10"]),
        &[names.clone(), headless.clone()],
    );
    assert!(compiled.ports[0].backends.is_empty());
    let said = reasons(&compiled);
    assert!(said.contains(&Reason::HeadlessSlice {
        slice: headless.name
    }));
    assert!(said.contains(&Reason::HostNameSlice { slice: names.name }));
}

/// What SEMANTICS 1.1 says, written down as it stands there.
struct Oracle {
    cluster: Vec<SocketAddr>,
    local: Vec<SocketAddr>,
    has_any: bool,
}

fn oracle(endpoints: &[Endpoint], service: &Service, node: &NodeFacts) -> Oracle {
    let accessible = service.ports[0].node_port.is_some()
        || !service.load_balancer.is_empty()
        || !service.external_ips.is_empty();
    let internal_local = service.internal_policy == TrafficPolicy::Local;
    let uses_cluster = !internal_local || accessible;
    let uses_local =
        internal_local || (service.external_policy == TrafficPolicy::Local && accessible);
    let is_local = |e: &Endpoint| e.node.as_deref() == Some(&*node.name);
    let ready: Vec<&Endpoint> = endpoints.iter().filter(|e| e.conditions.ready).collect();
    let draining: Vec<&Endpoint> = endpoints
        .iter()
        .filter(|e| e.conditions.serving && e.conditions.terminating)
        .collect();
    let nodes = |e: &Endpoint| e.hints.as_ref().map_or(vec![], |h| h.nodes.clone());
    let zones = |e: &Endpoint| e.hints.as_ref().map_or(vec![], |h| h.zones.clone());
    let names_node = |e: &Endpoint| nodes(e).iter().any(|n| **n == *node.name);
    let names_zone = |e: &Endpoint| zones(e).iter().any(|z| Some(&**z) == node.zone.as_deref());

    let mut cluster = Vec::new();
    if uses_cluster {
        let all_nodes = ready.iter().all(|e| !nodes(e).is_empty());
        let all_zones = ready.iter().all(|e| !zones(e).is_empty());
        cluster = if all_nodes && ready.iter().any(|e| names_node(e)) {
            ready.iter().copied().filter(|e| names_node(e)).collect()
        } else if all_zones && ready.iter().any(|e| names_zone(e)) {
            ready.iter().copied().filter(|e| names_zone(e)).collect()
        } else {
            ready.clone()
        };
        if cluster.is_empty() {
            cluster.clone_from(&draining);
        }
    }
    let mut local = Vec::new();
    if uses_local {
        local = ready.iter().copied().filter(|e| is_local(e)).collect();
        if local.is_empty() {
            local = draining.iter().copied().filter(|e| is_local(e)).collect();
        }
    }
    let addresses = |set: Vec<&Endpoint>| {
        let mut list: Vec<_> = set
            .iter()
            .map(|e| SocketAddr::new(e.address, 8080))
            .collect();
        list.sort_unstable();
        list
    };
    Oracle {
        cluster: addresses(cluster),
        local: addresses(local),
        has_any: !ready.is_empty() || !draining.is_empty(),
    }
}

fn any_conditions() -> impl Strategy<Value = Conditions> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(ready, serving, terminating)| {
        Conditions {
            ready,
            serving,
            terminating,
        }
    })
}

fn any_hints() -> impl Strategy<Value = Option<Box<Hints>>> {
    let nodes = prop::sample::subsequence(vec!["node-a", "node-b"], 0..=2);
    let zones = prop::sample::subsequence(vec!["z1", "z2"], 0..=2);
    prop::option::weighted(
        0.8,
        (nodes, zones).prop_map(|(nodes, zones)| {
            Box::new(Hints {
                nodes: nodes.into_iter().map(Arc::from).collect(),
                zones: zones.into_iter().map(Arc::from).collect(),
            })
        }),
    )
}

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let node = prop::option::of(prop::sample::select(vec!["node-a", "node-b"]));
    (1..40u8, any_conditions(), node, any_hints()).prop_map(|(host, conditions, node, hints)| {
        Endpoint {
            address: ip(&format!("10.244.1.{host}")),
            conditions,
            node: node.map(Arc::from),
            hints,
        }
    })
}

fn any_policy() -> impl Strategy<Value = TrafficPolicy> {
    prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// SEMANTICS 1.1: the sets are those of the pseudo code for any endpoints, however these are
    /// spread over slices and in whatever order the slices come.
    #[test]
    fn sets_are_those_of_section_1_1(
        endpoints in prop::collection::vec((any_endpoint(), 0..4usize), 0..8),
        internal in any_policy(),
        external in any_policy(),
        accessible in any::<bool>(),
        zone in prop::option::of(Just("z1")),
        rotate in 0..4usize,
    ) {
        let unique: BTreeMap<_, _> =
            endpoints.into_iter().map(|(e, slot)| (e.address, (e, slot))).collect();
        let mut spread = vec![Vec::new(); 4];
        for (endpoint, slot) in unique.values() {
            spread[*slot].push(endpoint.clone());
        }
        let mut slices: Vec<EndpointSlice> = spread
            .into_iter()
            .enumerate()
            .map(|(i, endpoints)| slice(&format!("web-{i}"), "web", endpoints))
            .collect();
        slices.rotate_left(rotate);
        let mut web = service("web", &["10.96.0.10"]);
        web.internal_policy = internal;
        web.external_policy = external;
        web.ports[0].node_port = accessible.then(|| port(30123));
        let node = NodeFacts { zone: zone.map(str::to_owned), ..node() };

        let endpoints: Vec<Endpoint> = unique.into_values().map(|(e, _)| e).collect();
        let expected = oracle(&endpoints, &web, &node);
        let compiled = compile(&web, &slices, &node, &CompileOptions::default());
        let port = &compiled.ports[0];
        let of = |pick: fn(&super::desired::Backend) -> bool| -> Vec<SocketAddr> {
            port.backends.iter().filter(|b| pick(b)).map(|b| b.address).collect()
        };
        prop_assert_eq!(of(|b| b.in_cluster), expected.cluster);
        prop_assert_eq!(of(|b| b.in_local), expected.local);
        prop_assert_eq!(port.has_any, expected.has_any);
        prop_assert_eq!(port.backends.len(), endpoints.len());
    }
}
