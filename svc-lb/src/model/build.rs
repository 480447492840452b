//! Short ways to write objects in tests.

use std::{net::IpAddr, num::NonZeroU16, sync::Arc};

use svc_lb_common::{Family, Protocol};

use super::{
    Annotated, Conditions, ContainerPort, Endpoint, EndpointPort, EndpointSlice, Labels, Object,
    ObjectName, Pod, Service, ServicePort, ServiceType, TargetPort, TrafficPolicy, family_of,
};

/// `default/name`.
pub(crate) fn named(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

/// Parses an address.
pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A port that is not 0.
pub(crate) fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).expect("not 0")
}

/// A Service of type ClusterIP with one TCP port, 80 to 8080, without name.
pub(crate) fn service(name: &str, cluster_ips: &[&str]) -> Service {
    Service {
        name: named(name),
        service_type: ServiceType::ClusterIP,
        headless: false,
        cluster_ips: cluster_ips.iter().map(|text| ip(text)).collect(),
        external_ips: Vec::new(),
        load_balancer: Vec::new(),
        load_balancer_hostname: false,
        ports: vec![service_port("", Protocol::Tcp, 80)],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        algorithm: Annotated::Absent,
        health_check_node_port: None,
        source_ranges: Vec::new(),
        proxy_name: None,
        selector: Labels::default(),
        publish_not_ready: false,
        ip_families: Vec::new(),
        ip_family_policy: None,
        allocate_node_ports: true,
        requested_load_balancer_ip: None,
    }
}

/// A port whose target is 8080.
pub(crate) fn service_port(name: &str, protocol: Protocol, number: u16) -> ServicePort {
    ServicePort {
        name: name.to_owned(),
        protocol,
        port: port(number),
        node_port: None,
        target_port: TargetPort::Number(port(8080)),
    }
}

/// A slice of the Service with one TCP port, 8080, without name.
pub(crate) fn slice(name: &str, service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: named(name),
        service: Some(service.to_owned()),
        family: Some(
            endpoints
                .first()
                .map_or(Family::V4, |e| family_of(e.address)),
        ),
        headless: false,
        proxy_name: None,
        weight: Annotated::Absent,
        ports: vec![endpoint_port("", Protocol::Tcp, 8080)],
        endpoints,
    }
}

/// A port of a slice.
pub(crate) fn endpoint_port(name: &str, protocol: Protocol, number: u16) -> EndpointPort {
    EndpointPort {
        name: Some(name.to_owned()),
        protocol,
        port: NonZeroU16::new(number),
    }
}

/// A ready endpoint on a node.
pub(crate) fn endpoint(address: &str, node: &str) -> Endpoint {
    Endpoint {
        address: ip(address),
        conditions: Conditions::READY,
        node: Some(Arc::from(node)),
        hints: None,
    }
}

/// A ready Pod of `node-a` with label `app`, that listens on 8080.
pub(crate) fn pod(name: &str, app: &str, addresses: &[&str]) -> Pod {
    Pod {
        name: named(name),
        labels: Labels::from_iter([("app", app)]),
        node: Some(Arc::from("node-a")),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        ready: true,
        terminating: false,
        finished: false,
        ports: vec![ContainerPort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: port(8080),
        }],
    }
}

/// Wraps a Service.
pub(crate) fn object(service: Service) -> Object {
    Object::Service(Arc::new(service))
}
