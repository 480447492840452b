//! Defaults and bounds of the API, field by field.

use serde_json::{Value, json};
use svc_lb_common::{Family, Protocol};

use super::{Author, Failure, Meaning, meaning, object};
use crate::model::{
    Algorithm, Annotated, Conditions, ContainerPort, EndpointSlice, Endpoints, IpMode, Kind,
    Object, Pod, Service, ServiceType, TargetPort, TrafficPolicy,
    build::{ip, port},
};

fn read(kind: Kind, value: Value) -> Result<Object, String> {
    object(kind, Author::ApiServer, value).map_err(|failure| match failure {
        Failure::Shape(error) => error.to_string(),
        Failure::Field(invalid) => invalid.to_string(),
    })
}

fn service(spec: &Value, status: &Value) -> Result<Service, String> {
    let value = json!({
        "metadata": {"name": "web", "namespace": "shop", "labels": {"a": "b"}},
        "spec": spec, "status": status,
    });
    let Object::Service(service) = read(Kind::Service, value)? else {
        panic!("a Service")
    };
    Ok(Service::clone(&service))
}

fn spec(extra: Value) -> Value {
    let mut spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
    let (Value::Object(fields), Value::Object(extra)) = (&mut spec, extra) else {
        panic!("objects");
    };
    fields.extend(extra);
    spec
}

fn slice(value: &Value) -> EndpointSlice {
    let mut whole = json!({
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "endpoints": [],
    });
    let (Value::Object(fields), Value::Object(extra)) = (&mut whole, value) else {
        panic!("objects");
    };
    fields.extend(extra.clone());
    match read(Kind::EndpointSlice, whole) {
        Ok(Object::EndpointSlice(slice)) => slice,
        other => panic!("{other:?}"),
    }
}

fn pod(spec: &Value, status: &Value, deleted: bool) -> Result<Pod, String> {
    let deleted = deleted.then_some("2026-01-01T00:00:00Z");
    let value = json!({
        "metadata": {"name": "p", "labels": {"app": "web"}, "deletionTimestamp": deleted},
        "spec": spec, "status": status,
    });
    let Object::Pod(pod) = read(Kind::Pod, value)? else {
        panic!("a Pod")
    };
    Ok(*pod)
}

/// A Service that says only what it must.
#[test]
fn defaults_of_a_service() {
    let service = service(&spec(json!({})), &Value::Null).expect("valid");
    assert_eq!(service.name.to_string(), "shop/web");
    assert_eq!(service.service_type, ServiceType::ClusterIP);
    assert_eq!(service.cluster_ips, [ip("10.96.0.1")]);
    let only = &service.ports[0];
    assert_eq!((only.protocol, only.node_port), (Protocol::Tcp, None));
    assert_eq!(
        only.target_port,
        TargetPort::Number(port(80)),
        "the port itself"
    );
    assert_eq!(service.internal_policy, TrafficPolicy::Cluster);
    assert_eq!(service.external_policy, TrafficPolicy::Cluster);
    assert_eq!(service.affinity_seconds, None);
    assert!(service.allocate_node_ports && !service.headless && !service.publish_not_ready);
    assert_eq!(service.proxy_name, None);
}

/// SEMANTICS A2, A9: where addresses are written, and what "None" means.
#[test]
fn cluster_ips() {
    let both = json!(["10.96.0.1", "fd00::1"]);
    let dual = service(&spec(json!({"clusterIPs": both})), &Value::Null).expect("valid");
    assert_eq!(dual.cluster_ips, [ip("10.96.0.1"), ip("fd00::1")]);
    for headless in [
        json!({"clusterIP": "None"}),
        json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": null}),
    ] {
        let service = service(&spec(headless), &Value::Null).expect("valid");
        assert!(service.headless && service.cluster_ips.is_empty());
    }
    for unset in [json!({"clusterIP": ""}), json!({"clusterIP": null})] {
        let service = service(&spec(unset), &Value::Null).expect("valid");
        assert!(!service.headless && service.cluster_ips.is_empty());
    }
    let mapped = service(
        &spec(json!({"clusterIP": "::ffff:10.96.0.1"})),
        &Value::Null,
    );
    assert_eq!(mapped.expect("valid").cluster_ips, [ip("10.96.0.1")]);
}

/// SEMANTICS F1: the default timeout and its bounds.
#[test]
fn f1_affinity() {
    let with = |config: Value| {
        let extra = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config});
        service(&spec(extra), &Value::Null).map(|service| service.affinity_seconds)
    };
    let seconds = |n: i64| json!({"clientIP": {"timeoutSeconds": n}});
    assert_eq!(with(Value::Null), Ok(Some(10_800)));
    assert_eq!(with(seconds(1)), Ok(Some(1)));
    assert_eq!(with(seconds(86_400)), Ok(Some(86_400)));
    for wrong in [0, -1, 86_401] {
        let error = with(seconds(wrong)).expect_err("out of bounds");
        assert!(error.starts_with("spec.sessionAffinityConfig.clientIP.timeoutSeconds: "));
    }
    let none = json!({"sessionAffinity": "None", "sessionAffinityConfig": seconds(9)});
    assert_eq!(
        service(&spec(none), &Value::Null)
            .expect("valid")
            .affinity_seconds,
        None
    );
}

/// SEMANTICS A10, A11, B4 to B7, C6, C7: what of the outside is taken in.
#[test]
fn the_outside_of_a_service() {
    let extra = json!({
        "type": "LoadBalancer", "loadBalancerClass": "x", "loadBalancerIP": "198.51.100.9",
        "allocateLoadBalancerNodePorts": false, "externalIPs": ["192.0.2.9"],
        "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": [" 203.0.113.0/24 ", "2001:db8::/32"],
        "ports": [{"port": 80, "nodePort": 30080, "appProtocol": "h2c"}],
    });
    let status = json!({"loadBalancer": {"ingress": [
        {"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "Proxy"},
        {"ip": "198.51.100.3", "ipMode": "VIP"}, {"hostname": "lb.example.com"},
    ]}});
    let service = service(&spec(extra), &status).expect("valid");
    assert_eq!(service.service_type, ServiceType::LoadBalancer);
    let modes: Vec<IpMode> = service
        .load_balancer
        .iter()
        .map(|ingress| ingress.mode)
        .collect();
    assert_eq!(modes, [IpMode::Vip, IpMode::Proxy, IpMode::Vip]);
    assert!(service.load_balancer_hostname && !service.allocate_node_ports);
    assert_eq!(service.requested_load_balancer_ip, Some(ip("198.51.100.9")));
    assert_eq!(service.external_ips, [ip("192.0.2.9")]);
    assert_eq!(service.source_ranges.len(), 2);
    assert_eq!(service.ports[0].node_port, Some(port(30080)));
    assert_eq!(service.external_policy, TrafficPolicy::Local);
    assert_eq!(service.internal_policy, TrafficPolicy::Local);
}

/// What the API server would refuse is refused here, by field.
#[test]
fn services_that_are_refused() {
    let two = |first: Value, second: Value| json!({"ports": [first, second]});
    let cases = [
        (
            json!({"ports": []}),
            "spec.ports: required: at least one port",
        ),
        (
            json!({"type": "Nodeport"}),
            "spec.type: \"Nodeport\" is not one of ClusterIP, NodePort, LoadBalancer, ExternalName",
        ),
        (
            json!({"clusterIPs": ["10.96.0.2"]}),
            "spec.clusterIPs[0]: must equal spec.clusterIP, \"10.96.0.1\"",
        ),
        (
            json!({"clusterIPs": ["10.96.0.1", "10.96.0.2"]}),
            "spec.clusterIPs: at most one address of each family",
        ),
        (
            two(
                json!({"port": 80, "name": "a"}),
                json!({"port": 81, "name": "a"}),
            ),
            "spec.ports[1].name: \"a\" is another port's name already",
        ),
        (
            two(
                json!({"port": 80, "name": "a"}),
                json!({"port": 80, "name": "b"}),
            ),
            "spec.ports[1].port: 80/TCP is another port's already",
        ),
        (
            two(
                json!({"port": 80, "name": "a", "nodePort": 30000}),
                json!({"port": 81, "name": "b", "nodePort": 30000}),
            ),
            "spec.ports[1].nodePort: 30000/TCP is another port's already",
        ),
        (
            json!({"sessionAffinity": "clientIP"}),
            "spec.sessionAffinity: \"clientIP\" is not one of None, ClientIP",
        ),
        (
            json!({"loadBalancerSourceRanges": ["192.0.2.1"]}),
            "spec.loadBalancerSourceRanges[0]: \"192.0.2.1\" is not a range such as 192.0.2.0/24",
        ),
        (
            json!({"ipFamilies": ["IPv4", "IPv4"]}),
            "spec.ipFamilies: each family at most once",
        ),
        (
            json!({"ipFamilies": ["v4"]}),
            "spec.ipFamilies[0]: \"v4\" is not one of IPv4, IPv6",
        ),
        (
            json!({"ipFamilyPolicy": "Dual"}),
            "spec.ipFamilyPolicy: \"Dual\" is not one of SingleStack, PreferDualStack, RequireDualStack",
        ),
        (
            json!({"externalIPs": ["169.254.1.1"]}),
            "spec.externalIPs[0]: 169.254.1.1 is a link-local address, which other machines cannot reach",
        ),
    ];
    for (extra, expected) in cases {
        assert_eq!(
            service(&spec(extra), &Value::Null).expect_err(expected),
            expected
        );
    }
    let same_number = two(
        json!({"port": 53, "name": "a", "protocol": "UDP", "nodePort": 30053}),
        json!({"port": 53, "name": "b", "protocol": "TCP", "nodePort": 30053}),
    );
    assert!(
        service(&spec(same_number), &Value::Null).is_ok(),
        "SEMANTICS A5"
    );
    let status = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "vip"}]}});
    assert_eq!(
        service(&spec(json!({})), &status).expect_err("refused"),
        "status.loadBalancer.ingress[0].ipMode: \"vip\" is not one of VIP, Proxy"
    );
}

/// SEMANTICS D1: what is not said counts as ready, serving and not terminating.
#[test]
fn d1_conditions() {
    let unsaid = json!([
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["10.0.0.2"], "conditions": {}},
        {"addresses": ["10.0.0.3"], "conditions": {"ready": null, "serving": null, "terminating": null}},
        {"addresses": ["10.0.0.4"], "conditions": {"ready": false, "serving": true, "terminating": true}},
    ]);
    let slice = slice(&json!({"endpoints": unsaid}));
    let conditions: Vec<Conditions> = slice.endpoints.iter().map(|e| e.conditions).collect();
    let draining = Conditions {
        ready: false,
        serving: true,
        terminating: true,
    };
    assert_eq!(
        conditions,
        [
            Conditions::READY,
            Conditions::READY,
            Conditions::READY,
            draining
        ]
    );
}

/// SEMANTICS A4, A6, A7, D5, D6: what of a slice is taken in.
#[test]
fn slices() {
    let slice = slice(&json!({
        "metadata": {"name": "web-1", "labels": {
            "kubernetes.io/service-name": "web", "service.kubernetes.io/headless": "",
            "service.kubernetes.io/service-proxy-name": "other"}},
        "endpoints": [{
            "addresses": ["10.0.0.1", "10.0.0.2"], "nodeName": "n",
            "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "n"}, {"name": "m"}]}},
            {"addresses": ["10.0.0.3"], "hints": {"forZones": []}}],
        "ports": [{"name": "", "port": 80}, {"port": 81, "protocol": "UDP"}, {"name": "x", "port": null}],
    }));
    assert_eq!(slice.owner().expect("named").to_string(), "default/web");
    assert!(slice.headless);
    assert_eq!(slice.proxy_name.as_deref(), Some("other"));
    assert_eq!(slice.endpoints.len(), 2, "the first address of each");
    let first = &slice.endpoints[0];
    assert_eq!(
        (first.address, first.node.as_deref()),
        (ip("10.0.0.1"), Some("n"))
    );
    let hints = first.hints.as_ref().expect("hints");
    assert_eq!((hints.zones.len(), hints.nodes.len()), (1, 2));
    assert!(
        slice.endpoints[1].hints.is_none(),
        "an empty list is no hint"
    );
    let names: Vec<Option<&str>> = slice.ports.iter().map(|p| p.name.as_deref()).collect();
    assert_eq!(names, [Some(""), None, Some("x")], "none is not empty");
    assert_eq!(slice.ports[2].port, None);
}

/// Slices whose addresses are not what they say, and slices of host names.
#[test]
fn address_types() {
    let with = |kind: &str, address: &str| {
        let value = json!({
            "metadata": {"name": "web-1"}, "addressType": kind, "endpoints": [{"addresses": [address]}],
        });
        read(Kind::EndpointSlice, value).map(|object| {
            let Object::EndpointSlice(slice) = object else {
                panic!("a slice")
            };
            (slice.family, slice.endpoints.len())
        })
    };
    assert_eq!(with("IPv6", "fd00::1"), Ok((Some(Family::V6), 1)));
    assert_eq!(with("FQDN", "db.example.com"), Ok((None, 0)));
    assert_eq!(
        with("IPv4", "fd00::1"),
        Err("endpoints[0].addresses[0]: fd00::1 is not of the slice's addressType".to_owned())
    );
    assert!(with("IPv4", "127.0.0.1").is_err() && with("IPv4", "x").is_err());
    assert!(with("ipv4", "10.0.0.1").is_err() && with("", "10.0.0.1").is_err());
}

/// Pods: conditions, addresses of both families or the single one, ports of containers and of
/// sidecars.
#[test]
fn pods() {
    let spec = json!({
        "nodeName": "n",
        "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}],
        "initContainers": [
            {"name": "i", "ports": [{"name": "no", "containerPort": 1}]},
            {"name": "s", "restartPolicy": "Always", "ports": [{"name": "proxy", "containerPort": 15001, "protocol": "UDP"}]},
        ],
    });
    let status = json!({
        "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
    });
    let full = pod(&spec, &status, true).expect("valid");
    assert_eq!(full.addresses, [ip("10.0.0.1"), ip("fd00::1")]);
    assert!(full.ready && full.terminating && !full.finished);
    assert_eq!(
        (full.node.as_deref(), full.labels.get("app")),
        (Some("n"), Some("web"))
    );
    let http = ContainerPort {
        name: "http".into(),
        protocol: Protocol::Tcp,
        port: port(8080),
    };
    let proxy = ContainerPort {
        name: "proxy".into(),
        protocol: Protocol::Udp,
        port: port(15001),
    };
    assert_eq!(full.ports, [http, proxy]);

    let single = pod(
        &json!({"containers": []}),
        &json!({"podIP": "10.0.0.1"}),
        false,
    );
    let single = single.expect("valid");
    assert_eq!(single.addresses, [ip("10.0.0.1")]);
    assert!(!single.ready && !single.terminating && single.node.is_none());
    for (phase, finished) in [("Pending", false), ("Succeeded", true), ("Failed", true)] {
        let pod = pod(&Value::Null, &json!({"phase": phase}), false).expect("valid");
        assert_eq!(pod.finished, finished, "{phase}");
    }
    assert!(pod(&Value::Null, &json!({"podIPs": [{"ip": "x"}]}), false).is_err());
}

/// v1 Endpoints and Nodes.
#[test]
fn endpoints_and_nodes() {
    let value = json!({
        "metadata": {"name": "db", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{
            "addresses": [{"ip": "10.0.0.1", "nodeName": "n"}],
            "notReadyAddresses": [{"ip": "10.0.0.2"}],
            "ports": [{"port": 5432}],
        }],
    });
    let Ok(Object::Endpoints(Endpoints {
        skip_mirror,
        subsets,
        ..
    })) = read(Kind::Endpoints, value)
    else {
        panic!("Endpoints");
    };
    assert!(skip_mirror);
    let ready: Vec<bool> = subsets[0].addresses.iter().map(|a| a.ready).collect();
    assert_eq!(ready, [true, false]);
    assert_eq!(subsets[0].ports[0].name.as_deref(), Some(""));

    let labels = json!({"topology.kubernetes.io/zone": "z"});
    let node = read(
        Kind::Node,
        json!({"metadata": {"name": "n", "labels": labels}}),
    );
    let Ok(Object::Node(node)) = node else {
        panic!("{node:?}")
    };
    assert_eq!((node.name.as_str(), node.zone.as_deref()), ("n", Some("z")));
}

#[test]
fn meanings() {
    for (version, kind, expected) in [
        ("v1", "Service", Meaning::One(Kind::Service)),
        ("v1", "ServiceList", Meaning::List(Some(Kind::Service))),
        ("v1", "List", Meaning::List(None)),
        (
            "discovery.k8s.io/v1",
            "EndpointSliceList",
            Meaning::List(Some(Kind::EndpointSlice)),
        ),
        (
            "discovery.k8s.io/v1beta1",
            "EndpointSlice",
            Meaning::OtherVersion("discovery.k8s.io/v1"),
        ),
        ("v2", "Pod", Meaning::OtherVersion("v1")),
        ("serving.knative.dev/v1", "Service", Meaning::Foreign),
        ("apps/v1", "Deployment", Meaning::Foreign),
        ("", "", Meaning::Foreign),
    ] {
        assert_eq!(meaning(version, kind), expected, "{version} {kind}");
    }
}

/// SEMANTICS G6: where load balancers ask.
#[test]
fn health_check_node_port() {
    let read = |port: Value| service(&spec(json!({"healthCheckNodePort": port})), &json!({}));
    assert_eq!(
        read(json!(31000)).map(|s| s.health_check_node_port),
        Ok(Some(port(31000)))
    );
    assert_eq!(read(json!(0)).map(|s| s.health_check_node_port), Ok(None));
    let error = read(json!(70000)).unwrap_err();
    assert!(error.starts_with("spec.healthCheckNodePort: "), "{error}");
}

/// SEMANTICS G7: a node leaves when it is being deleted or when the autoscaler says it will.
#[test]
fn nodes_that_leave() {
    let leaves = |metadata: Value, taints: Value| {
        let mut whole = json!({"metadata": {"name": "a"}, "spec": {"taints": taints}});
        let (Some(Value::Object(fields)), Value::Object(extra)) =
            (whole.get_mut("metadata"), metadata)
        else {
            panic!("objects");
        };
        fields.extend(extra);
        match read(Kind::Node, whole) {
            Ok(Object::Node(node)) => node.leaves,
            other => panic!("{other:?}"),
        }
    };
    let taint = |key: &str| json!([{"key": key, "effect": "NoSchedule"}]);
    assert!(!leaves(json!({}), json!(null)));
    assert!(!leaves(
        json!({}),
        taint("node.kubernetes.io/unschedulable")
    ));
    assert!(leaves(json!({}), taint("ToBeDeletedByClusterAutoscaler")));
    assert!(leaves(
        json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}),
        json!([])
    ));
}

/// B2: what `primary` means, as a Node object says it.
#[test]
fn node_addresses() {
    let addresses = |list: Value| {
        let whole = json!({"metadata": {"name": "a"}, "status": {"addresses": list}});
        match read(Kind::Node, whole) {
            Ok(Object::Node(node)) => {
                let texts = node.addresses.iter().map(ToString::to_string);
                Ok(texts.collect::<Vec<_>>().join(" "))
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        }
    };
    let entry = |kind: &str, address: &str| json!({"type": kind, "address": address});
    let list = json!([
        entry("Hostname", "a"),
        entry("ExternalIP", "198.51.100.1"),
        entry("InternalIP", "192.0.2.1"),
        entry("InternalIP", "192.0.2.2"),
        entry("ExternalIP", "2001:db8::1"),
    ]);
    assert_eq!(addresses(list), Ok("192.0.2.1 2001:db8::1".to_owned()));
    assert_eq!(addresses(json!(null)), Ok(String::new()));
    let error = addresses(json!([entry("Hostname", "a"), entry("InternalIP", "a")])).unwrap_err();
    assert!(error.contains("status.addresses[1].address"), "{error}");
}

/// SEMANTICS F10, F11: annotations of ours, read where they can be.
#[test]
fn annotations() {
    let algorithm = |annotations: Value| {
        let value = json!({
            "metadata": {"name": "web", "annotations": annotations},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        });
        match read(Kind::Service, value) {
            Ok(Object::Service(service)) => service.algorithm.clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(algorithm(json!({"other": "maglev"})), Annotated::Absent);
    let key = "svc-lb.io/lb-algorithm";
    assert_eq!(
        algorithm(json!({key: "maglev"})),
        Annotated::Value(Algorithm::Maglev)
    );
    assert_eq!(
        algorithm(json!({key: " random"})),
        Annotated::Value(Algorithm::Random)
    );
    assert_eq!(
        algorithm(json!({key: "Maglev"})),
        Annotated::Unreadable("Maglev".to_owned())
    );

    let weight = |text: &str| {
        let metadata = json!({
            "name": "web-1",
            "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"svc-lb.io/weight": text},
        });
        slice(&json!({"metadata": metadata})).weight
    };
    assert_eq!(weight("0"), Annotated::Value(0));
    assert_eq!(weight("65535"), Annotated::Value(65_535));
    for wrong in ["65536", "-1", "1.5", ""] {
        assert_eq!(weight(wrong), Annotated::Unreadable(wrong.to_owned()));
    }
    assert_eq!(slice(&json!({})).weight, Annotated::Absent);
}
