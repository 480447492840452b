//! Addresses, slices, and what an agent makes of the examples.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use proptest::prelude::*;
use svc_lb_common::{Family, Protocol};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Config, Error, Standalone};
use crate::{
    compile::{CompileOptions, compile},
    model::{
        Conditions, ContainerPort, Edit, EndpointAddress, EndpointSlice, EndpointSubset, Endpoints,
        Intake, IpFamilyPolicy, IpMode, Kind, Labels, LoadBalancerIngress, Model, Object,
        ObjectKey, ObjectName, Pod, Service, ServiceType, SourceId, TargetPort, TrafficPolicy,
        build::{
            endpoint, endpoint_port, ip, named, object, pod, port, service, service_port, slice,
        },
        family_of,
    },
    source,
};

fn config(service_cidrs: &[&str], lb_pools: &[&str]) -> Config {
    let nets = |texts: &[&str]| texts.iter().map(|t| t.parse().expect("a range")).collect();
    Config {
        service_cidrs: nets(service_cidrs),
        lb_pools: nets(lb_pools),
        ..Config::default()
    }
}

fn dual() -> Config {
    config(
        &["10.96.0.0/16", "fd00:10:96::/112"],
        &["198.51.100.0/24", "2001:db8:100::/112"],
    )
}

/// A stand-in and the model behind it.
struct Cluster {
    standalone: Standalone,
    model: Model,
}

impl Cluster {
    fn new(config: &Config) -> Self {
        let standalone = Standalone::open(config).expect("usable");
        Self {
            standalone,
            model: Model::new("node-a"),
        }
    }

    fn apply(&mut self, edits: Vec<Edit>) -> BTreeSet<ObjectName> {
        let edits = self.standalone.apply(edits);
        self.model.apply(edits)
    }

    fn put(&mut self, services: impl IntoIterator<Item = Service>) {
        self.apply(
            services
                .into_iter()
                .map(|s| Edit::Upsert(object(s)))
                .collect(),
        );
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        self.apply(vec![Edit::Delete(ObjectKey {
            kind,
            name: named(name),
        })]);
    }

    fn service(&self, name: &str) -> &Service {
        self.model.service(&named(name)).expect("known")
    }

    fn cluster_ips(&self, name: &str) -> Vec<IpAddr> {
        self.service(name).cluster_ips.clone()
    }

    fn problems(&self) -> Vec<String> {
        self.standalone
            .problems()
            .map(ToString::to_string)
            .collect()
    }

    /// Endpoints as `address:port ready serving terminating`.
    fn endpoints(&self, name: &str) -> Vec<String> {
        let mut found = Vec::new();
        for slice in self.model.slices(&named(name)) {
            for endpoint in &slice.endpoints {
                for port in &slice.ports {
                    let Conditions {
                        ready,
                        serving,
                        terminating,
                    } = endpoint.conditions;
                    let flag = |set: bool, letter: &'static str| if set { letter } else { "" };
                    found.push(format!(
                        "{} {}:{} {}{}{}",
                        port.name.as_deref().expect("named"),
                        endpoint.address,
                        port.port.expect("numbered"),
                        flag(ready, "r"),
                        flag(serving, "s"),
                        flag(terminating, "t"),
                    ));
                }
            }
        }
        found.sort_unstable();
        found
    }
}

fn typed(name: &str, service_type: ServiceType) -> Service {
    Service {
        service_type,
        ..service(name, &[])
    }
}

fn selecting(name: &str, app: &str) -> Service {
    let selector = Labels::from_iter([("app", app)]);
    Service {
        selector,
        ..service(name, &["10.96.0.1", "fd00:10:96::1"])
    }
}

/// Values come from their ranges and from the Service's name alone.
#[test]
fn values_come_from_the_name() {
    let mut one = Cluster::new(&dual());
    let mut two = Cluster::new(&dual());
    one.put([
        typed("a", ServiceType::LoadBalancer),
        typed("b", ServiceType::NodePort),
    ]);
    two.put([typed("b", ServiceType::NodePort)]);
    two.put([typed("a", ServiceType::LoadBalancer)]);
    for cluster in [&one, &two] {
        let a = cluster.service("a");
        assert!(
            "10.96.0.0/16"
                .parse::<ipnet::IpNet>()
                .expect("range")
                .contains(&a.cluster_ips[0])
        );
        assert_eq!(a.cluster_ips.len(), 1, "one family unless asked for two");
        assert_eq!(a.load_balancer.len(), 1);
        assert!((30_000..=32_767).contains(&a.ports[0].node_port.expect("given").get()));
        assert!(cluster.service("b").load_balancer.is_empty());
        assert_eq!(cluster.problems(), [""; 0]);
    }
    for name in ["a", "b"] {
        assert_eq!(
            one.service(name),
            two.service(name),
            "the same on every node"
        );
    }
    // Values are part of what users see across versions: they must not change.
    assert_eq!(one.cluster_ips("a"), [ip("10.96.197.45")]);
}

/// A Service that has all it needs passes as it is.
#[test]
fn complete_services_are_left_alone() {
    let mut complete = service("a", &["10.96.0.10"]);
    complete.service_type = ServiceType::LoadBalancer;
    complete.ip_families = vec![Family::V4];
    complete.ip_family_policy = Some(IpFamilyPolicy::PreferDualStack);
    complete.ports[0].node_port = Some(port(30123));
    complete.load_balancer = vec![LoadBalancerIngress {
        ip: ip("192.0.2.77"),
        mode: IpMode::Proxy,
    }];
    let headless = Service {
        headless: true,
        ..service("b", &[])
    };
    let alias = typed("c", ServiceType::ExternalName);
    let mut host = typed("d", ServiceType::LoadBalancer);
    host.load_balancer_hostname = true;
    host.allocate_node_ports = false;
    host.cluster_ips = vec![ip("10.96.0.11")];
    for config in [dual(), Config::default()] {
        let mut cluster = Cluster::new(&config);
        for service in [&complete, &headless, &alias, &host] {
            cluster.put([service.clone()]);
            assert_eq!(cluster.service(&service.name.name), service);
        }
        assert_eq!(cluster.problems(), [""; 0]);
    }
}

/// Ranges, written addresses, policy, ipFamilies; families or a problem.
type Case<'a> = (
    &'a [&'a str],
    &'a [&'a str],
    Option<IpFamilyPolicy>,
    &'a [Family],
    Result<&'a [Family], &'a str>,
);

/// ipFamilyPolicy and ipFamilies, against the ranges there are.
#[test]
fn families() {
    use IpFamilyPolicy::{PreferDualStack, RequireDualStack, SingleStack};
    let (v4, v6) = (Family::V4, Family::V6);
    let both = ["10.96.0.0/16", "fd00:10:96::/112"];
    let six_first = ["fd00:10:96::/112", "10.96.0.0/16"];
    let cases: [Case<'_>; 16] = [
        (&both, &[], None, &[], Ok(&[v4])),
        (&six_first, &[], None, &[], Ok(&[v6])),
        (&both, &[], None, &[v6], Ok(&[v6])),
        (&both, &[], None, &[v6, v4], Ok(&[v6, v4])),
        (&both, &[], Some(SingleStack), &[v6], Ok(&[v6])),
        (&both, &[], Some(PreferDualStack), &[], Ok(&[v4, v6])),
        (&both, &[], Some(PreferDualStack), &[v6], Ok(&[v6, v4])),
        (&both[..1], &[], Some(PreferDualStack), &[], Ok(&[v4])),
        (&both, &[], Some(RequireDualStack), &[], Ok(&[v4, v6])),
        (
            &both[..1],
            &[],
            Some(RequireDualStack),
            &[],
            Err("RequireDualStack needs a range of each family"),
        ),
        (
            &both[..1],
            &[],
            None,
            &[v6],
            Err("no range of IPv6 is given"),
        ),
        (
            &[],
            &[],
            None,
            &[],
            Err("no range is given to take an address from"),
        ),
        (&both, &["fd00:10:96::9"], None, &[], Ok(&[v6])),
        (
            &both,
            &["10.96.0.9"],
            Some(PreferDualStack),
            &[],
            Ok(&[v4, v6]),
        ),
        (
            &both,
            &["fd00:10:96::9"],
            Some(RequireDualStack),
            &[v6, v4],
            Ok(&[v6, v4]),
        ),
        (&[], &["10.96.0.9"], Some(PreferDualStack), &[], Ok(&[v4])),
    ];
    for (ranges, written, policy, wished, expected) in cases {
        let mut cluster = Cluster::new(&config(ranges, &[]));
        let context = format!("{ranges:?} {written:?} {policy:?} {wished:?}");
        let mut web = service("web", written);
        web.ip_family_policy = policy;
        web.ip_families = wished.to_vec();
        cluster.put([web]);
        let got: Vec<Family> = cluster
            .cluster_ips("web")
            .iter()
            .map(|a| family_of(*a))
            .collect();
        match expected {
            Ok(families) => {
                assert_eq!(got, families, "{context}");
                assert_eq!(cluster.problems(), [""; 0], "{context}");
            }
            Err(message) => {
                assert!(got.is_empty(), "{context}");
                let problems = cluster.problems();
                assert!(
                    problems.len() == 1 && problems[0].ends_with(message),
                    "{context}: {problems:?}"
                );
            }
        }
    }
}

/// Explicit values come first, also before what was handed out earlier.
#[test]
fn explicit_values_come_first() {
    let mut cluster = Cluster::new(&dual());
    cluster.put([typed("a", ServiceType::NodePort)]);
    let (taken, node_port) = (
        cluster.cluster_ips("a")[0],
        cluster.service("a").ports[0].node_port,
    );
    let mut explicit = typed("z", ServiceType::NodePort);
    explicit.cluster_ips = vec![taken];
    explicit.ports[0].node_port = node_port;
    cluster.put([explicit.clone()]);
    assert_eq!(cluster.service("z"), &explicit);
    assert_ne!(cluster.cluster_ips("a"), [taken]);
    assert_ne!(cluster.service("a").ports[0].node_port, node_port);
    let moved = cluster.cluster_ips("a");
    cluster.remove(Kind::Service, "z");
    cluster.put([Service {
        publish_not_ready: true,
        ..typed("a", ServiceType::NodePort)
    }]);
    assert_eq!(
        cluster.cluster_ips("a"),
        moved,
        "what was given stays given"
    );
}

/// Two Services that wrote the same value are both named.
#[test]
fn rivals_are_named() {
    let mut cluster = Cluster::new(&dual());
    cluster.put([service("a", &["10.96.0.10"]), service("b", &["10.96.0.10"])]);
    assert_eq!(
        cluster.problems(),
        [
            "--service-cidr 10.96.0.0/16: Service default/a: spec.clusterIPs: \
             10.96.0.10 is also Service default/b's",
            "--service-cidr 10.96.0.0/16: Service default/b: spec.clusterIPs: \
             10.96.0.10 is also Service default/a's",
        ]
    );
    cluster.put([service("b", &["10.96.0.11"])]);
    // The other one is looked at again when anything changes.
    assert_eq!(cluster.problems(), [""; 0]);
}

/// An exhausted pool names Service and pool; others are unaffected; what is freed is handed on.
#[test]
fn an_exhausted_pool() {
    let mut settings = config(&["10.96.0.0/16"], &["198.51.100.0/30"]);
    settings.node_ports = 30_000..=30_001;
    let mut cluster = Cluster::new(&settings);
    cluster.put(["a", "b", "c"].map(|name| typed(name, ServiceType::LoadBalancer)));
    assert_eq!(
        cluster.problems(),
        [
            "--node-port-range 30000-30001: Service default/c: spec.ports.nodePort: \
             all 2 are in use: enlarge the pool",
            "--lb-pool 198.51.100.0/30: Service default/c: status.loadBalancer: \
             all 2 are in use: enlarge the pool",
        ]
    );
    assert!(cluster.service("c").load_balancer.is_empty());
    assert_eq!(
        cluster.cluster_ips("c").len(),
        1,
        "its other values are given"
    );
    let before: Vec<Service> = ["a", "b"].map(|n| cluster.service(n).clone()).to_vec();
    cluster.put([service("d", &[])]);
    assert_eq!(
        ["a", "b"].map(|n| cluster.service(n).clone()).to_vec(),
        before
    );
    cluster.remove(Kind::Service, "a");
    assert_eq!(cluster.problems(), [""; 0]);
    assert_eq!(cluster.service("c").load_balancer, before[0].load_balancer);
}

/// Load balancer addresses: of the Service's families, the wished one where it can be had, none
/// without a pool.
#[test]
fn load_balancer_addresses() {
    let mut cluster = Cluster::new(&dual());
    let mut web = typed("web", ServiceType::LoadBalancer);
    web.ip_family_policy = Some(IpFamilyPolicy::RequireDualStack);
    cluster.put([web.clone()]);
    let families: Vec<Family> = cluster
        .service("web")
        .load_balancer
        .iter()
        .map(|i| family_of(i.ip))
        .collect();
    assert_eq!(families, [Family::V4, Family::V6]);

    web.requested_load_balancer_ip = Some(ip("198.51.100.7"));
    cluster.put([web.clone()]);
    assert_eq!(
        cluster.service("web").load_balancer[0].ip,
        ip("198.51.100.7")
    );
    web.requested_load_balancer_ip = Some(ip("192.0.2.1"));
    cluster.put([web.clone()]);
    assert_eq!(
        cluster.problems(),
        [
            "--lb-pool 198.51.100.0/24: Service default/web: spec.loadBalancerIP: \
          192.0.2.1 is taken, or not in the pool"
        ]
    );

    let mut poolless = Cluster::new(&config(&["10.96.0.0/16"], &[]));
    poolless.put([typed("web", ServiceType::LoadBalancer)]);
    assert!(poolless.service("web").load_balancer.is_empty());
    assert_eq!(poolless.problems(), [""; 0]);
}

/// SEMANTICS G6: a load balancer with a Local policy gets a port to ask at, out of the node ports;
/// written ones stand, and one that is no longer needed is given back.
#[test]
fn health_check_node_ports() {
    let mut cluster = Cluster::new(&dual());
    let mut web = typed("web", ServiceType::LoadBalancer);
    cluster.put([web.clone()]);
    assert_eq!(cluster.service("web").health_check_node_port, None);
    web.external_policy = TrafficPolicy::Local;
    cluster.put([web.clone()]);
    let given = cluster.service("web").clone();
    let port_given = given.health_check_node_port.expect("given");
    assert!((30_000..=32_767).contains(&port_given.get()));
    assert_ne!(given.ports[0].node_port, Some(port_given));

    // Another Service writes the same number: it has it, web gets another.
    let mut rival = typed("rival", ServiceType::LoadBalancer);
    rival.external_policy = TrafficPolicy::Local;
    rival.health_check_node_port = Some(port_given);
    cluster.put([rival]);
    assert_eq!(
        cluster.service("rival").health_check_node_port,
        Some(port_given)
    );
    let second = cluster.service("web").health_check_node_port;
    assert!(second.is_some() && second != Some(port_given));

    web.external_policy = TrafficPolicy::Cluster;
    cluster.put([web]);
    assert_eq!(cluster.service("web").health_check_node_port, None);
    assert_eq!(cluster.problems(), [""; 0]);
}

/// SEMANTICS A10: no node ports where the Service does not want them; one for each port where it
/// does; given back when the type changes.
#[test]
fn node_ports() {
    let mut cluster = Cluster::new(&dual());
    let mut web = typed("web", ServiceType::NodePort);
    web.ports = vec![
        service_port("dns", Protocol::Udp, 53),
        service_port("dns-tcp", Protocol::Tcp, 53),
    ];
    cluster.put([web.clone()]);
    let given: BTreeSet<_> = cluster
        .service("web")
        .ports
        .iter()
        .map(|p| p.node_port)
        .collect();
    assert!(given.len() == 2 && !given.contains(&None));
    for change in [ServiceType::ClusterIP, ServiceType::LoadBalancer] {
        web.service_type = change;
        web.allocate_node_ports = false;
        cluster.put([web.clone()]);
        assert!(
            cluster
                .service("web")
                .ports
                .iter()
                .all(|p| p.node_port.is_none())
        );
    }
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// A restart gives the same values, also those that an order of events brought about; what is no
/// longer there is forgotten.
#[test]
fn values_survive_a_restart() {
    let dir = directory();
    let mut settings = config(&["10.96.0.0/29"], &[]);
    settings.state_dir = Some(dir.path().join("state"));
    let mut cluster = Cluster::new(&settings);
    // Five addresses, so that hashes collide, in an order against the names.
    for name in ["e", "d", "c", "b", "a"] {
        cluster.put([service(name, &[])]);
    }
    let values = |c: &Cluster| ["a", "b", "c", "d"].map(|name| c.cluster_ips(name));
    let before = values(&cluster);
    let mut restarted = Cluster::new(&settings);
    restarted.put(["a", "b", "c", "d"].map(|name| service(name, &[])));
    assert_eq!(values(&restarted), before);
    let text = std::fs::read_to_string(dir.path().join("state/allocations.json")).expect("kept");
    assert!(
        text.contains("default/d") && !text.contains("default/e"),
        "{text}"
    );

    // Another range: what lies outside it is handed out anew.
    settings.service_cidrs = vec!["10.97.0.0/16".parse().expect("a range")];
    let mut moved = Cluster::new(&settings);
    moved.put([service("a", &[])]);
    assert!(moved.cluster_ips("a")[0].to_string().starts_with("10.97."));
}

/// A damaged state file is an error that says what to do, not a reason to hand out anew.
#[test]
fn a_damaged_state_file_is_refused() {
    let dir = directory();
    let mut settings = dual();
    settings.state_dir = Some(dir.path().to_owned());
    let file = dir.path().join("allocations.json");
    std::fs::write(&file, "{\"version\": 1, \"allocations\": {").expect("written");
    let error = Standalone::open(&settings).expect_err("damaged");
    assert!(matches!(error, Error::Damaged { .. }) && error.to_string().contains("remove it"));
    std::fs::write(&file, "{\"version\": 2}").expect("written");
    assert!(matches!(
        Standalone::open(&settings),
        Err(Error::Version { found: 2, .. })
    ));
}

/// Values that cannot be kept are still handed out, and the trouble is said until it is over.
#[test]
fn a_full_disk_is_said() {
    let dir = directory();
    let mut settings = dual();
    settings.state_dir = Some(dir.path().join("state"));
    let mut cluster = Cluster::new(&settings);
    std::fs::remove_dir_all(dir.path().join("state")).expect("removed");
    cluster.put([service("a", &[])]);
    assert_eq!(cluster.cluster_ips("a").len(), 1);
    assert_eq!(cluster.problems().len(), 1);
    std::fs::create_dir(dir.path().join("state")).expect("made");
    cluster.put([service("b", &["10.96.0.1"])]);
    assert_eq!(cluster.problems(), [""; 0]);
    assert!(dir.path().join("state/allocations.json").exists());
}

/// SEMANTICS A13 and the conditions that Kubernetes gives endpoints of Pods.
#[test]
fn conditions_of_pods() {
    let address = "10.244.1.5";
    let base = || pod("p", "web", &[address]);
    let cases = [
        (base(), false, "rs"),
        (
            Pod {
                ready: false,
                ..base()
            },
            false,
            "",
        ),
        (
            Pod {
                ready: false,
                ..base()
            },
            true,
            "r",
        ),
        (
            Pod {
                terminating: true,
                ..base()
            },
            false,
            "st",
        ),
        (
            Pod {
                terminating: true,
                ..base()
            },
            true,
            "rst",
        ),
        (
            Pod {
                terminating: true,
                ready: false,
                ..base()
            },
            false,
            "t",
        ),
    ];
    for (pod, publish_not_ready, expected) in cases {
        let mut cluster = Cluster::new(&dual());
        let service = Service {
            publish_not_ready,
            ..selecting("web", "web")
        };
        cluster.apply(vec![
            Edit::Upsert(object(service)),
            Edit::Upsert(Object::Pod(Box::new(pod.clone()))),
        ]);
        let expected = [format!(" {address}:8080 {expected}")];
        assert_eq!(
            cluster.endpoints("web"),
            expected,
            "{pod:?} {publish_not_ready}"
        );
    }
    for left_out in [
        Pod {
            finished: true,
            ..base()
        },
        Pod {
            addresses: vec![],
            ..base()
        },
        Pod {
            labels: Labels::default(),
            ..base()
        },
        Pod {
            name: ObjectName::new("other", "p"),
            ..base()
        },
    ] {
        let mut cluster = Cluster::new(&dual());
        cluster.put([selecting("web", "web")]);
        cluster.apply(vec![Edit::Upsert(Object::Pod(Box::new(left_out.clone())))]);
        assert_eq!(cluster.endpoints("web"), [""; 0], "{left_out:?}");
    }
}

/// SEMANTICS A6, A9: named ports may have other numbers on other Pods, or none; each family has
/// its own slices.
#[test]
fn named_ports_and_families_of_pods() {
    let mut cluster = Cluster::new(&dual());
    let mut web = selecting("web", "web");
    web.ports = vec![
        service_port("http", Protocol::Tcp, 80),
        service_port("admin", Protocol::Tcp, 81),
    ];
    web.ports[0].target_port = TargetPort::Name("http".into());
    web.ports[1].target_port = TargetPort::Name("admin".into());
    let http = |number| ContainerPort {
        name: "http".into(),
        protocol: Protocol::Tcp,
        port: port(number),
    };
    let one = pod("one", "web", &["10.244.1.1", "fd00:10:244:1::1"]);
    let mut two = pod("two", "web", &["10.244.1.2"]);
    two.ports = vec![
        ContainerPort {
            protocol: Protocol::Udp,
            ..http(1)
        },
        http(9999),
        ContainerPort {
            name: "admin".into(),
            protocol: Protocol::Tcp,
            port: port(7000),
        },
    ];
    let pods = [one, two].map(|pod| Edit::Upsert(Object::Pod(Box::new(pod))));
    cluster.put([web]);
    cluster.apply(pods.to_vec());
    assert_eq!(
        cluster.endpoints("web"),
        [
            "admin 10.244.1.2:7000 rs",
            "http 10.244.1.1:8080 rs",
            "http 10.244.1.2:9999 rs",
            "http fd00:10:244:1::1:8080 rs",
        ]
    );
}

/// A Pod concerns the Services that select it, before and after, and no others.
#[test]
fn a_pod_concerns_those_that_select_it() {
    let mut cluster = Cluster::new(&dual());
    cluster.put((0..20).map(|i| selecting(&format!("s{i}"), &format!("app{i}"))));
    let upsert = |pod: Pod| vec![Edit::Upsert(Object::Pod(Box::new(pod)))];
    let p = || pod("p", "app3", &["10.244.1.5"]);
    assert_eq!(cluster.apply(upsert(p())), BTreeSet::from([named("s3")]));
    assert_eq!(
        cluster.apply(upsert(p())),
        BTreeSet::new(),
        "nothing changed"
    );
    let moved = pod("p", "app4", &["10.244.1.5"]);
    assert_eq!(
        cluster.apply(upsert(moved)),
        BTreeSet::from([named("s3"), named("s4")])
    );
    assert_eq!(cluster.endpoints("s3"), [""; 0]);
    cluster.remove(Kind::Pod, "p");
    assert_eq!(cluster.endpoints("s4"), [""; 0]);
    assert_eq!(
        cluster.model.slices(&named("s4")).count(),
        0,
        "nothing is left over"
    );
}

fn endpoints_object(name: &str, addresses: &[(&str, bool)]) -> Endpoints {
    let address = |(text, ready): &(&str, bool)| EndpointAddress {
        ip: ip(text),
        node: Some("node-b".into()),
        ready: *ready,
    };
    Endpoints {
        name: named(name),
        skip_mirror: false,
        subsets: vec![EndpointSubset {
            addresses: addresses.iter().map(address).collect(),
            ports: vec![endpoint_port("", Protocol::Tcp, 5432)],
        }],
    }
}

/// SEMANTICS A8: v1 Endpoints of a Service without selector become its slices; not where it has a
/// selector or slices of its own, nor against their author's will.
#[test]
fn endpoints_are_mirrored() {
    let addresses = [
        ("192.0.2.50", true),
        ("2001:db8::50", true),
        ("192.0.2.51", false),
    ];
    let object = || endpoints_object("db", &addresses);
    let upsert = |endpoints| vec![Edit::Upsert(Object::Endpoints(endpoints))];
    let mut cluster = Cluster::new(&dual());
    cluster.apply(upsert(object()));
    assert_eq!(
        cluster.model.slices(&named("db")).count(),
        0,
        "no Service yet"
    );
    cluster.put([service("db", &["10.96.0.1"])]);
    let mirrored = [
        " 192.0.2.50:5432 rs",
        " 192.0.2.51:5432 ",
        " 2001:db8::50:5432 rs",
    ];
    assert_eq!(cluster.endpoints("db"), mirrored);

    let own = slice("db-x", "db", vec![endpoint("192.0.2.60", "node-b")]);
    cluster.apply(vec![Edit::Upsert(Object::EndpointSlice(own))]);
    assert_eq!(cluster.endpoints("db"), [" 192.0.2.60:8080 rs"]);
    cluster.remove(Kind::EndpointSlice, "db-x");
    assert_eq!(cluster.endpoints("db"), mirrored);

    cluster.apply(upsert(Endpoints {
        skip_mirror: true,
        ..object()
    }));
    assert_eq!(cluster.endpoints("db"), [""; 0]);
    cluster.apply(upsert(object()));
    cluster.put([selecting("db", "db")]);
    assert_eq!(cluster.endpoints("db"), [""; 0]);
    cluster.put([service("db", &["10.96.0.1"])]);
    cluster.remove(Kind::Endpoints, "db");
    assert_eq!(cluster.endpoints("db"), [""; 0]);
}

/// A Service with a selector whose slices somebody else makes gets none from here.
#[test]
fn foreign_slices_stand_alone() {
    let mut cluster = Cluster::new(&dual());
    cluster.put([selecting("web", "web")]);
    cluster.apply(vec![Edit::Upsert(Object::Pod(Box::new(pod(
        "p",
        "web",
        &["10.244.1.5"],
    ))))]);
    let mut foreign: EndpointSlice = slice("web-x", "web", vec![endpoint("10.244.1.9", "node-a")]);
    cluster.apply(vec![Edit::Upsert(Object::EndpointSlice(foreign.clone()))]);
    assert_eq!(cluster.endpoints("web"), [" 10.244.1.9:8080 rs"]);
    foreign.service = Some("other".into());
    cluster.apply(vec![Edit::Upsert(Object::EndpointSlice(foreign))]);
    assert_eq!(cluster.endpoints("web"), [" 10.244.1.5:8080 rs"]);
}

#[derive(Clone, Debug)]
enum Step {
    /// Name, type, explicit address, explicit node port.
    Put(u8, ServiceType, Option<u8>, Option<u16>),
    Remove(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let types = vec![
        ServiceType::ClusterIP,
        ServiceType::NodePort,
        ServiceType::LoadBalancer,
    ];
    let put = (
        0..12u8,
        prop::sample::select(types),
        prop::option::weighted(0.2, 1..15u8),
        prop::option::weighted(0.2, 30_000..30_010u16),
    );
    prop_oneof![
        3 => put.prop_map(|(name, kind, ip, port)| Step::Put(name, kind, ip, port)),
        1 => (0..12u8).prop_map(Step::Remove),
    ]
}

fn service_of(name: u8, kind: ServiceType, host: Option<u8>, node_port: Option<u16>) -> Service {
    let mut service = typed(&format!("s{name}"), kind);
    service.cluster_ips = host
        .map(|host| IpAddr::from([10, 96, 0, host]))
        .into_iter()
        .collect();
    if kind != ServiceType::ClusterIP {
        service.ports[0].node_port = node_port.map(port);
    }
    service
}

/// Small enough that everything collides.
fn tight() -> Config {
    let mut settings = config(&["10.96.0.0/28"], &["198.51.100.0/29"]);
    settings.node_ports = 30_000..=30_009;
    settings
}

/// Each value that was handed out, with who has it; explicit ones apart.
fn handed_out(cluster: &Cluster, written: &BTreeMap<ObjectName, Service>) -> Vec<(String, String)> {
    let mut values = Vec::new();
    for (name, original) in written {
        let Some(now) = cluster.model.service(name) else {
            continue;
        };
        let mut add = |given: String, explicit: bool| {
            values.push((
                given,
                if explicit {
                    "explicit".to_owned()
                } else {
                    name.to_string()
                },
            ));
        };
        for ip in &now.cluster_ips {
            add(ip.to_string(), original.cluster_ips.contains(ip));
        }
        for ingress in &now.load_balancer {
            add(ingress.ip.to_string(), false);
        }
        for (port, before) in now.ports.iter().zip(&original.ports) {
            if let Some(number) = port.node_port {
                add(number.to_string(), before.node_port.is_some());
            }
        }
    }
    values.sort_unstable();
    values
}

proptest! {
    // Each step writes the state file and waits for the disk.
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever happens: no value is handed out twice or beside an explicit one; what has a value
    /// keeps it unless a user writes it elsewhere; a restart changes nothing.
    #[test]
    fn allocation_holds(steps in prop::collection::vec(step(), 1..40)) {
        let dir = directory();
        let mut settings = tight();
        settings.state_dir = Some(dir.path().to_owned());
        let mut cluster = Cluster::new(&settings);
        let mut written: BTreeMap<ObjectName, Service> = BTreeMap::new();
        for step in steps {
            let before = handed_out(&cluster, &written);
            let untouched: BTreeMap<ObjectName, Service> = match &step {
                Step::Put(name, kind, host, node_port) => {
                    let service = service_of(*name, *kind, *host, *node_port);
                    let mut rest = written.clone();
                    rest.remove(&service.name);
                    written.insert(service.name.clone(), service.clone());
                    cluster.put([service]);
                    rest
                }
                Step::Remove(name) => {
                    let name = format!("s{name}");
                    cluster.remove(Kind::Service, &name);
                    written.remove(&named(&name));
                    written.clone()
                }
            };
            let after = handed_out(&cluster, &written);
            let mut seen = BTreeMap::new();
            for (value, owner) in &after {
                if let Some(other) = seen.insert(value, owner) {
                    prop_assert!(owner == "explicit" && other == "explicit", "{value} twice");
                }
            }
            for (value, owner) in &before {
                let stays = untouched.keys().any(|name| name.to_string() == *owner);
                if stays && seen.get(value) != Some(&&"explicit".to_owned()) {
                    prop_assert_eq!(seen.get(value), Some(&owner), "{} moved", value);
                }
            }
        }
        let mut restarted = Cluster::new(&settings);
        restarted.put(written.values().cloned());
        prop_assert_eq!(handed_out(&restarted, &written), handed_out(&cluster, &written));
    }
}

proptest! {
    /// Nodes that start with the same objects hand out the same values.
    #[test]
    fn every_node_hands_out_the_same(steps in prop::collection::vec(step(), 1..20)) {
        let mut written = BTreeMap::new();
        for step in steps {
            if let Step::Put(name, kind, host, node_port) = step {
                let service = service_of(name, kind, host, node_port);
                written.insert(service.name.clone(), service);
            }
        }
        let (mut one, mut two) = (Cluster::new(&tight()), Cluster::new(&tight()));
        one.put(written.values().cloned());
        two.put(written.values().rev().cloned());
        prop_assert_eq!(handed_out(&one, &written), handed_out(&two, &written));
    }

    /// The Pods of each Service are always those that a search finds.
    #[test]
    fn members_equal_a_search(
        steps in prop::collection::vec((any::<bool>(), 0..5u8, prop::option::of(0..4u8)), 0..60),
    ) {
        let labels = |n: u8| -> Labels {
            let pairs = [("app", n & 1), ("tier", n >> 1)];
            pairs.iter().map(|(k, v)| (*k, v.to_string())).collect()
        };
        let mut cluster = Cluster::new(&dual());
        let (mut pods, mut services) = (BTreeMap::new(), BTreeMap::new());
        for (is_pod, id, state) in steps {
            match (is_pod, state) {
                (true, Some(n)) => {
                    let mut pod = pod(&format!("p{id}"), "", &[&format!("10.244.1.{}", id + 1)]);
                    pod.labels = labels(n);
                    pods.insert(id, pod.clone());
                    cluster.apply(vec![Edit::Upsert(Object::Pod(Box::new(pod)))]);
                }
                (true, None) => {
                    pods.remove(&id);
                    cluster.remove(Kind::Pod, &format!("p{id}"));
                }
                (false, Some(n)) => {
                    let mut service = selecting(&format!("s{id}"), "");
                    service.selector = labels(n);
                    if n == 3 {
                        service.selector = Labels::from_iter([("tier", "1")]);
                    }
                    services.insert(id, service.clone());
                    cluster.put([service]);
                }
                (false, None) => {
                    services.remove(&id);
                    cluster.remove(Kind::Service, &format!("s{id}"));
                }
            }
            for (id, service) in &services {
                let expected: Vec<String> = pods
                    .values()
                    .filter(|p| service.selector.iter().all(|(k, v)| p.labels.get(k) == Some(v)))
                    .map(|p| format!(" {}:8080 rs", p.addresses[0]))
                    .collect();
                prop_assert_eq!(cluster.endpoints(&format!("s{id}")), expected);
            }
        }
    }
}

/// What a whole agent makes of the examples: from files to what would be programmed on `node-a`.
#[tokio::test]
async fn the_examples_end_to_end() {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples"));
    let id = SourceId(0);
    let (sender, mut batches) = mpsc::channel(4);
    let cancel = CancellationToken::new();
    let running = source::spawn(id, source::Spec::Manifests(path), sender, cancel.clone()).await;
    let running = running.expect("there");
    let mut intake = Intake::new([id]);
    let edits = intake.apply(batches.recv().await.expect("a list"));
    cancel.cancel();
    running.task.await.expect("no panic");
    assert!(running.health.borrow().listed);

    let mut cluster = Cluster::new(&dual());
    let affected = cluster.apply(edits);
    assert_eq!(cluster.problems(), [""; 0]);
    let summary = |namespace: &str, name: &str| -> Vec<String> {
        let name = ObjectName::new(namespace, name);
        let service = cluster.model.service(&name).expect("known");
        let compiled = compile(
            service,
            cluster.model.slices(&name),
            cluster.model.node(),
            &CompileOptions::default(),
        );
        compiled
            .ports
            .iter()
            .map(|port| {
                let set = |pick: fn(&crate::compile::desired::Backend) -> bool| {
                    let picked = port.backends.iter().filter(|b| pick(b));
                    picked
                        .map(|b| b.address.to_string())
                        .collect::<Vec<_>>()
                        .join(" ")
                };
                format!(
                    "{}: {} | {}",
                    port.key.port_name,
                    set(|b| b.in_cluster),
                    set(|b| b.in_local)
                )
            })
            .collect()
    };
    let all = "10.244.1.11:8080 10.244.1.12:8080 10.244.2.11:8080";
    assert_eq!(summary("default", "kubia"), [format!(": {all} | ")]);
    assert_eq!(
        summary("default", "kubia-ports"),
        [
            format!("http: {all} | "),
            "https: 10.244.1.11:8443 10.244.1.12:8443 10.244.2.11:8443 | ".to_owned()
        ]
    );
    assert_eq!(
        summary("default", "kubia-local"),
        [format!(": {all} | 10.244.1.11:8080 10.244.1.12:8080")]
    );
    assert_eq!(summary("default", "legacy"), [": 192.0.2.50:8080 | "]);
    assert_eq!(
        summary("default", "kubia-readiness"),
        [": 10.244.1.21:8080 | "]
    );
    assert_eq!(summary("default", "api"), [""; 0]);
    assert_eq!(summary("default", "kubia-headless"), [""; 0]);
    assert_eq!(
        summary("kube-system", "kube-dns"),
        ["dns: 10.244.1.31:53 | ", "dns-tcp: 10.244.1.31:53 | "]
    );
    assert_eq!(
        summary("default", "kubia-dual"),
        [
            format!(": {all} | "),
            ": [fd00:10:244:1::11]:8080 [fd00:10:244:1::12]:8080 [fd00:10:244:2::11]:8080 | "
                .to_owned()
        ]
    );
    assert_eq!(summary("ingress-nginx", "ingress-nginx").len(), 2);
    assert_eq!(affected.len(), cluster.model.services().count());
}
