//! `EndpointSlices` as Kubernetes' controllers make them: from Pods, and from v1 Endpoints.

use std::{collections::BTreeMap, num::NonZeroU16};

use svc_lb_common::{Family, Protocol};

use crate::model::{
    Annotated, Conditions, Endpoint, EndpointPort, EndpointSlice, EndpointSubset, Endpoints,
    ObjectName, Pod, Service, ServicePort, TargetPort, family_name, family_of,
};

/// Slices for the Pods that a Service selects: one for each family and set of port numbers.
pub(super) fn selected<'a>(
    service: &Service,
    pods: impl Iterator<Item = &'a Pod>,
) -> Vec<EndpointSlice> {
    let mut groups: BTreeMap<(Family, Vec<Option<NonZeroU16>>), Vec<Endpoint>> = BTreeMap::new();
    for pod in pods.filter(|pod| !pod.finished) {
        let numbers: Vec<Option<NonZeroU16>> = service
            .ports
            .iter()
            .map(|port| number_on(port, pod))
            .collect();
        for address in &pod.addresses {
            let endpoint = Endpoint {
                address: *address,
                conditions: Conditions {
                    ready: service.publish_not_ready || (pod.ready && !pod.terminating),
                    serving: pod.ready,
                    terminating: pod.terminating,
                },
                node: pod.node.clone(),
                hints: None,
            };
            groups
                .entry((family_of(*address), numbers.clone()))
                .or_default()
                .push(endpoint);
        }
    }
    groups
        .into_iter()
        .enumerate()
        .map(|(i, ((family, numbers), endpoints))| {
            let ports = service.ports.iter().zip(numbers);
            let ports = ports.filter_map(|(port, number)| {
                let name = Some(port.name.clone());
                Some(EndpointPort {
                    name,
                    protocol: port.protocol,
                    port: Some(number?),
                })
            });
            slice(service, "pods", i, family, ports.collect(), endpoints)
        })
        .collect()
}

/// Where a Service's port is on a Pod; nowhere if it is a name that the Pod does not have.
fn number_on(port: &ServicePort, pod: &Pod) -> Option<NonZeroU16> {
    match &port.target_port {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => {
            let same = |(n, p): (&str, Protocol)| n == name && p == port.protocol;
            let found = pod
                .ports
                .iter()
                .find(|port| same((&port.name, port.protocol)));
            found.map(|port| port.port)
        }
    }
}

/// Slices for the v1 Endpoints of a Service: one for each family and subset.
pub(super) fn mirrored(service: &Service, endpoints: &Endpoints) -> Vec<EndpointSlice> {
    let mut slices = Vec::new();
    for subset in &endpoints.subsets {
        for family in [Family::V4, Family::V6] {
            let of_family = addresses(subset, family);
            if !of_family.is_empty() {
                let (i, ports) = (slices.len(), subset.ports.clone());
                slices.push(slice(service, "endpoints", i, family, ports, of_family));
            }
        }
    }
    slices
}

fn addresses(subset: &EndpointSubset, family: Family) -> Vec<Endpoint> {
    let of_family = subset
        .addresses
        .iter()
        .filter(|address| family_of(address.ip) == family);
    let endpoint = |address: &crate::model::EndpointAddress| Endpoint {
        address: address.ip,
        conditions: Conditions {
            ready: address.ready,
            serving: address.ready,
            terminating: false,
        },
        node: address.node.clone(),
        hints: None,
    };
    of_family.map(endpoint).collect()
}

fn slice(
    service: &Service,
    from: &str,
    index: usize,
    family: Family,
    ports: Vec<EndpointPort>,
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let ObjectName { namespace, name } = &service.name;
    // Not a name that an object of the API could have.
    let name = format!("{name}#{from}-{}-{index}", family_name(family));
    EndpointSlice {
        name: ObjectName::new(namespace.clone(), name),
        service: Some(service.name.name.clone()),
        family: Some(family),
        headless: false,
        proxy_name: service.proxy_name.clone(),
        weight: Annotated::Absent,
        ports,
        endpoints,
    }
}
