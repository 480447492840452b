//! Kubernetes' typed objects in, the model's trimmed ones out; what is invalid is named by field.

#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, fmt::Display, net::IpAddr, num::NonZeroU16, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use serde::{Deserialize, Deserializer};
use svc_lb_common::{Family, Protocol};

use crate::model::{
    Algorithm, Annotated, Conditions, ContainerPort, Endpoint, EndpointAddress, EndpointPort,
    EndpointSlice, EndpointSubset, Endpoints, Hints, IpFamilyPolicy, IpMode, Kind,
    LoadBalancerIngress, Node, Object, ObjectName, Pod, Service, ServicePort, ServiceType,
    TargetPort, TrafficPolicy, family_of, protocol_name,
};

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";
const LB_ALGORITHM: &str = "svc-lb.io/lb-algorithm";
const WEIGHT: &str = "svc-lb.io/weight";
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
const ZONE: &str = "topology.kubernetes.io/zone";
/// The cluster autoscaler's, on a node that it is about to take away.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// `sessionAffinityConfig.clientIP.timeoutSeconds` where it is not set (SEMANTICS F1).
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// Its upper bound.
const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// A field that does not hold what it must.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// Path from the object's root, as `spec.ports[0].port`.
    pub field: String,
    /// What is wrong and what to write instead.
    pub problem: String,
}

type Result<T> = std::result::Result<T, Invalid>;

fn invalid<T>(field: impl Display, problem: impl Display) -> Result<T> {
    Err(Invalid {
        field: field.to_string(),
        problem: problem.to_string(),
    })
}

/// Converts a v1 Service.
///
/// # Errors
/// The first field that the API server would not accept either.
pub fn service(object: &core::Service) -> Result<Service> {
    let name = namespaced(&object.metadata)?;
    let Some(spec) = &object.spec else {
        return invalid("spec", "required");
    };
    let service_type = service_type(spec)?;
    let (headless, cluster_ips) = cluster_ips(spec)?;
    let (load_balancer, load_balancer_hostname) = ingress(object.status.as_ref())?;
    let ports = service_ports(spec)?;
    if ports.is_empty() && !headless && service_type != ServiceType::ExternalName {
        return invalid("spec.ports", "required: at least one port");
    }
    let external_policy = policy(
        "spec.externalTrafficPolicy",
        spec.external_traffic_policy.as_deref(),
    )?;
    Ok(Service {
        name,
        service_type,
        headless,
        cluster_ips,
        external_ips: addresses(
            "spec.externalIPs",
            spec.external_ips.as_deref(),
            endpoint_ip,
        )?,
        load_balancer,
        load_balancer_hostname,
        ports,
        internal_policy: policy(
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
        )?,
        external_policy,
        affinity_seconds: affinity(spec)?,
        algorithm: annotated(&object.metadata, LB_ALGORITHM, |text| match text {
            "random" => Some(Algorithm::Random),
            "maglev" => Some(Algorithm::Maglev),
            _ => None,
        }),
        health_check_node_port: optional_port(
            "spec.healthCheckNodePort",
            spec.health_check_node_port,
        )?,
        source_ranges: source_ranges(spec)?,
        proxy_name: label(&object.metadata, SERVICE_PROXY_NAME),
        selector: spec.selector.clone().into_iter().flatten().collect(),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        ip_families: ip_families(spec)?,
        ip_family_policy: ip_family_policy(spec)?,
        allocate_node_ports: spec.allocate_load_balancer_node_ports.unwrap_or(true),
        requested_load_balancer_ip: requested_address(spec)?,
    })
}

/// Converts a discovery.k8s.io/v1 EndpointSlice.
///
/// # Errors
/// As for `service`.
pub fn endpoint_slice(object: &discovery::EndpointSlice) -> Result<EndpointSlice> {
    let name = namespaced(&object.metadata)?;
    let family = match object.address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        "FQDN" => None,
        "" => return invalid("addressType", "required: IPv4, IPv6 or FQDN"),
        other => return invalid("addressType", not_one_of(other, &["IPv4", "IPv6", "FQDN"])),
    };
    let ports = object.ports.iter().flatten().enumerate();
    let ports = ports
        .map(|(i, port)| slice_port(i, port))
        .collect::<Result<_>>()?;
    let endpoints = match family {
        // Nothing can be made of names, so they are not even read.
        None => Vec::new(),
        Some(family) => {
            // There are many of them, and no more come: the list is as long as it needs to be.
            let mut endpoints = Vec::with_capacity(object.endpoints.len());
            for (i, endpoint) in object.endpoints.iter().enumerate() {
                endpoints.push(slice_endpoint(i, endpoint, family)?);
            }
            endpoints
        }
    };
    Ok(EndpointSlice {
        name,
        service: label(&object.metadata, SERVICE_NAME),
        family,
        headless: label(&object.metadata, HEADLESS).is_some(),
        proxy_name: label(&object.metadata, SERVICE_PROXY_NAME),
        weight: annotated(&object.metadata, WEIGHT, |text| text.parse().ok()),
        ports,
        endpoints,
    })
}

/// Converts a v1 Endpoints.
///
/// # Errors
/// As for `service`.
pub fn endpoints(object: &core::Endpoints) -> Result<Endpoints> {
    let name = namespaced(&object.metadata)?;
    let subsets = object.subsets.iter().flatten().enumerate();
    Ok(Endpoints {
        name,
        skip_mirror: label(&object.metadata, SKIP_MIRROR).as_deref() == Some("true"),
        subsets: subsets
            .map(|(i, subset)| endpoint_subset(i, subset))
            .collect::<Result<_>>()?,
    })
}

/// Converts a v1 Pod.
///
/// # Errors
/// As for `service`.
pub fn pod(object: &core::Pod) -> Result<Pod> {
    let name = namespaced(&object.metadata)?;
    let spec = object.spec.as_ref();
    let status = object.status.as_ref();
    let conditions = status
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    let phase = status.and_then(|s| s.phase.as_deref());
    Ok(Pod {
        name,
        labels: object
            .metadata
            .labels
            .clone()
            .into_iter()
            .flatten()
            .collect(),
        node: spec.and_then(|s| node_name(s.node_name.as_deref())),
        addresses: pod_ips(status)?,
        ready: conditions
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "True"),
        terminating: object.metadata.deletion_timestamp.is_some(),
        finished: matches!(phase, Some("Succeeded" | "Failed")),
        ports: spec.map(container_ports).transpose()?.unwrap_or_default(),
    })
}

/// Converts a v1 Node.
///
/// # Errors
/// As for `service`.
pub fn node(object: &core::Node) -> Result<Node> {
    let taints = object.spec.as_ref().and_then(|spec| spec.taints.as_deref());
    let tainted = taints
        .unwrap_or_default()
        .iter()
        .any(|taint| taint.key == TO_BE_DELETED);
    Ok(Node {
        name: object_name(&object.metadata)?,
        zone: label(&object.metadata, ZONE),
        leaves: tainted || object.metadata.deletion_timestamp.is_some(),
        addresses: node_addresses(object.status.as_ref())?,
    })
}

/// Of each family the first InternalIP, else the first ExternalIP.
fn node_addresses(status: Option<&core::NodeStatus>) -> Result<BTreeSet<IpAddr>> {
    let list = status.and_then(|status| status.addresses.as_deref());
    let mut found = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        let list = list.unwrap_or_default().iter().enumerate();
        for (i, entry) in list.filter(|(_, entry)| entry.type_ == kind) {
            let ip = address(&format!("status.addresses[{i}].address"), &entry.address)?;
            if !found.iter().any(|other| family_of(*other) == family_of(ip)) {
                found.push(ip);
            }
        }
    }
    Ok(found.into_iter().collect())
}

fn object_name(metadata: &ObjectMeta) -> Result<String> {
    match metadata.name.as_deref() {
        None | Some("") => invalid("metadata.name", "required"),
        Some(name) => Ok(name.to_owned()),
    }
}

/// An object without namespace is in `default`, as when it is applied to a cluster.
fn namespaced(metadata: &ObjectMeta) -> Result<ObjectName> {
    let namespace = metadata
        .namespace
        .as_deref()
        .filter(|n| !n.is_empty())
        .unwrap_or("default");
    Ok(ObjectName::new(namespace, object_name(metadata)?))
}

fn label(metadata: &ObjectMeta, key: &str) -> Option<String> {
    metadata.labels.as_ref()?.get(key).cloned()
}

/// Annotations do not belong to the API: a wrong one is no reason to leave the object out.
fn annotated<T>(
    metadata: &ObjectMeta,
    key: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Annotated<T> {
    let text = metadata.annotations.as_ref().and_then(|all| all.get(key));
    let Some(text) = text.map(|text| text.trim()) else {
        return Annotated::Absent;
    };
    parse(text).map_or_else(|| Annotated::Unreadable(text.to_owned()), Annotated::Value)
}

fn node_name(name: Option<&str>) -> Option<Arc<str>> {
    name.filter(|name| !name.is_empty()).map(Arc::from)
}

fn not_one_of(found: &str, allowed: &[&str]) -> String {
    format!("{found:?} is not one of {}", allowed.join(", "))
}

fn service_type(spec: &core::ServiceSpec) -> Result<ServiceType> {
    Ok(match spec.type_.as_deref() {
        None | Some("" | "ClusterIP") => ServiceType::ClusterIP,
        Some("NodePort") => ServiceType::NodePort,
        Some("LoadBalancer") => ServiceType::LoadBalancer,
        Some("ExternalName") => ServiceType::ExternalName,
        Some(other) => {
            let allowed = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"];
            return invalid("spec.type", not_one_of(other, &allowed));
        }
    })
}

/// Whether the Service is headless, and its addresses: at most one of each family.
fn cluster_ips(spec: &core::ServiceSpec) -> Result<(bool, Vec<IpAddr>)> {
    let single = spec.cluster_ip.as_deref().unwrap_or_default();
    let list = spec.cluster_ips.as_deref().unwrap_or_default();
    if let Some(first) = list.first()
        && !single.is_empty()
        && first != single
    {
        return invalid(
            "spec.clusterIPs[0]",
            format!("must equal spec.clusterIP, {single:?}"),
        );
    }
    if single == "None" || list.iter().any(|text| text == "None") {
        return Ok((true, Vec::new()));
    }
    if list.is_empty() {
        let one = if single.is_empty() {
            Vec::new()
        } else {
            vec![address("spec.clusterIP", single)?]
        };
        return Ok((false, one));
    }
    let parsed = addresses("spec.clusterIPs", Some(list), address)?;
    one_of_each_family("spec.clusterIPs", &parsed)?;
    Ok((false, parsed))
}

fn one_of_each_family(field: &str, addresses: &[IpAddr]) -> Result<()> {
    let families: BTreeSet<Family> = addresses.iter().map(|ip| family_of(*ip)).collect();
    if families.len() < addresses.len() {
        return invalid(field, "at most one address of each family");
    }
    Ok(())
}

fn addresses(
    field: &str,
    list: Option<&[String]>,
    parse: impl Fn(&str, &str) -> Result<IpAddr>,
) -> Result<Vec<IpAddr>> {
    let list = list.unwrap_or_default().iter().enumerate();
    list.map(|(i, text)| parse(&format!("{field}[{i}]"), text))
        .collect()
}

fn address(field: &str, text: &str) -> Result<IpAddr> {
    match text.trim().parse::<IpAddr>() {
        // An IPv4 address in IPv6 notation is that IPv4 address, as in Kubernetes.
        Ok(ip) => Ok(ip.to_canonical()),
        Err(_) => invalid(field, format!("{text:?} is not an IP address")),
    }
}

/// An address that a packet from elsewhere can be sent to.
fn endpoint_ip(field: &str, text: &str) -> Result<IpAddr> {
    let ip = address(field, text)?;
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let problem = if ip.is_unspecified() {
        "unspecified"
    } else if ip.is_loopback() {
        "loopback"
    } else if ip.is_multicast() {
        "multicast"
    } else if link_local {
        "link-local"
    } else {
        return Ok(ip);
    };
    invalid(
        field,
        format!("{ip} is a {problem} address, which other machines cannot reach"),
    )
}

/// Load balancer addresses, and whether one is a host name only.
fn ingress(status: Option<&core::ServiceStatus>) -> Result<(Vec<LoadBalancerIngress>, bool)> {
    let list = status
        .and_then(|s| s.load_balancer.as_ref())
        .and_then(|l| l.ingress.as_deref());
    let mut found = Vec::new();
    let mut host_name = false;
    for (i, entry) in list.unwrap_or_default().iter().enumerate() {
        let field = format!("status.loadBalancer.ingress[{i}]");
        let Some(text) = entry.ip.as_deref().filter(|ip| !ip.is_empty()) else {
            host_name |= entry.hostname.is_some();
            continue;
        };
        let mode = match entry.ip_mode.as_deref() {
            None | Some("VIP") => IpMode::Vip,
            Some("Proxy") => IpMode::Proxy,
            Some(other) => {
                return invalid(
                    format!("{field}.ipMode"),
                    not_one_of(other, &["VIP", "Proxy"]),
                );
            }
        };
        found.push(LoadBalancerIngress {
            ip: address(&format!("{field}.ip"), text)?,
            mode,
        });
    }
    Ok((found, host_name))
}

fn service_ports(spec: &core::ServiceSpec) -> Result<Vec<ServicePort>> {
    let list = spec.ports.as_deref().unwrap_or_default();
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut node_ports = BTreeSet::new();
    let mut ports = Vec::with_capacity(list.len());
    for (i, port) in list.iter().enumerate() {
        let field = format!("spec.ports[{i}]");
        let port = service_port(&field, port)?;
        if port.name.is_empty() && list.len() > 1 {
            return invalid(
                format!("{field}.name"),
                "required where there is more than one port",
            );
        }
        if !names.insert(port.name.clone()) {
            let problem = format!("{:?} is another port's name already", port.name);
            return invalid(format!("{field}.name"), problem);
        }
        let protocol = protocol_name(port.protocol);
        if !numbers.insert((port.port, port.protocol)) {
            let problem = format!("{}/{protocol} is another port's already", port.port);
            return invalid(format!("{field}.port"), problem);
        }
        if let Some(node_port) = port.node_port
            && !node_ports.insert((node_port, port.protocol))
        {
            let problem = format!("{node_port}/{protocol} is another port's already");
            return invalid(format!("{field}.nodePort"), problem);
        }
        ports.push(port);
    }
    Ok(ports)
}

fn service_port(field: &str, port: &core::ServicePort) -> Result<ServicePort> {
    let number = required_port(format!("{field}.port"), port.port)?;
    Ok(ServicePort {
        name: port.name.clone().unwrap_or_default(),
        protocol: protocol(format!("{field}.protocol"), port.protocol.as_deref())?,
        port: number,
        node_port: optional_port(format!("{field}.nodePort"), port.node_port)?,
        target_port: target_port(&format!("{field}.targetPort"), port.target_port.as_ref())?
            .unwrap_or(TargetPort::Number(number)),
    })
}

fn target_port(field: &str, target: Option<&IntOrString>) -> Result<Option<TargetPort>> {
    Ok(match target {
        None => None,
        Some(IntOrString::Int(number)) => {
            optional_port(field, Some(*number))?.map(TargetPort::Number)
        }
        Some(IntOrString::String(name)) if name.is_empty() => None,
        Some(IntOrString::String(name)) => {
            if name.bytes().all(|b| b.is_ascii_digit()) {
                let problem = format!("{name:?} is text: write the number without quotes");
                return invalid(field, problem);
            }
            Some(TargetPort::Name(name.clone()))
        }
    })
}

fn required_port(field: impl Display, number: i32) -> Result<NonZeroU16> {
    match optional_port(&field, Some(number))? {
        Some(port) => Ok(port),
        None => invalid(field, "required: a number from 1 to 65535"),
    }
}

/// Kubernetes writes 0 for "none".
fn optional_port(field: impl Display, number: Option<i32>) -> Result<Option<NonZeroU16>> {
    match u16::try_from(number.unwrap_or(0)) {
        Ok(number) => Ok(NonZeroU16::new(number)),
        Err(_) => invalid(
            field,
            format!("{} is not from 1 to 65535", number.unwrap_or(0)),
        ),
    }
}

fn protocol(field: impl Display, text: Option<&str>) -> Result<Protocol> {
    Ok(match text {
        None | Some("" | "TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(other) => return invalid(field, not_one_of(other, &["TCP", "UDP", "SCTP"])),
    })
}

fn policy(field: &str, text: Option<&str>) -> Result<TrafficPolicy> {
    Ok(match text {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => return invalid(field, not_one_of(other, &["Cluster", "Local"])),
    })
}

fn affinity(spec: &core::ServiceSpec) -> Result<Option<u32>> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            return invalid(
                "spec.sessionAffinity",
                not_one_of(other, &["None", "ClientIP"]),
            );
        }
    }
    let config = spec
        .session_affinity_config
        .as_ref()
        .and_then(|c| c.client_ip.as_ref());
    let Some(seconds) = config.and_then(|c| c.timeout_seconds) else {
        return Ok(Some(DEFAULT_AFFINITY_SECONDS));
    };
    match u32::try_from(seconds) {
        Ok(seconds @ 1..=MAX_AFFINITY_SECONDS) => Ok(Some(seconds)),
        _ => invalid(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is not from 1 to {MAX_AFFINITY_SECONDS}"),
        ),
    }
}

fn source_ranges(spec: &core::ServiceSpec) -> Result<Vec<IpNet>> {
    let list = spec
        .load_balancer_source_ranges
        .as_deref()
        .unwrap_or_default();
    let parse = |(i, text): (usize, &String)| {
        text.trim().parse::<IpNet>().or_else(|_| {
            let problem = format!("{text:?} is not a range such as 192.0.2.0/24");
            invalid(format!("spec.loadBalancerSourceRanges[{i}]"), problem)
        })
    };
    list.iter().enumerate().map(parse).collect()
}

fn ip_families(spec: &core::ServiceSpec) -> Result<Vec<Family>> {
    let list = spec.ip_families.as_deref().unwrap_or_default();
    let parse = |(i, text): (usize, &String)| match text.as_str() {
        "IPv4" => Ok(Family::V4),
        "IPv6" => Ok(Family::V6),
        other => invalid(
            format!("spec.ipFamilies[{i}]"),
            not_one_of(other, &["IPv4", "IPv6"]),
        ),
    };
    let families: Vec<Family> = list.iter().enumerate().map(parse).collect::<Result<_>>()?;
    if families.len() > 2 || (families.len() == 2 && families.first() == families.last()) {
        return invalid("spec.ipFamilies", "each family at most once");
    }
    Ok(families)
}

fn ip_family_policy(spec: &core::ServiceSpec) -> Result<Option<IpFamilyPolicy>> {
    Ok(match spec.ip_family_policy.as_deref() {
        None | Some("") => None,
        Some("SingleStack") => Some(IpFamilyPolicy::SingleStack),
        Some("PreferDualStack") => Some(IpFamilyPolicy::PreferDualStack),
        Some("RequireDualStack") => Some(IpFamilyPolicy::RequireDualStack),
        Some(other) => {
            let allowed = ["SingleStack", "PreferDualStack", "RequireDualStack"];
            return invalid("spec.ipFamilyPolicy", not_one_of(other, &allowed));
        }
    })
}

fn requested_address(spec: &core::ServiceSpec) -> Result<Option<IpAddr>> {
    let text = spec
        .load_balancer_ip
        .as_deref()
        .filter(|text| !text.is_empty());
    text.map(|text| address("spec.loadBalancerIP", text))
        .transpose()
}

fn slice_port(index: usize, port: &discovery::EndpointPort) -> Result<EndpointPort> {
    let field = format!("ports[{index}]");
    Ok(EndpointPort {
        name: port.name.clone(),
        protocol: protocol(format!("{field}.protocol"), port.protocol.as_deref())?,
        port: optional_port(format!("{field}.port"), port.port)?,
    })
}

fn slice_endpoint(
    index: usize,
    endpoint: &discovery::Endpoint,
    family: Family,
) -> Result<Endpoint> {
    let field = format!("endpoints[{index}].addresses");
    let Some(text) = endpoint.addresses.first() else {
        return invalid(field, "required: at least one address");
    };
    let field = format!("{field}[0]");
    let address = endpoint_ip(&field, text)?;
    if family_of(address) != family {
        return invalid(
            field,
            format!("{address} is not of the slice's addressType"),
        );
    }
    let conditions = endpoint.conditions.as_ref();
    Ok(Endpoint {
        address,
        conditions: Conditions {
            ready: conditions.and_then(|c| c.ready).unwrap_or(true),
            serving: conditions.and_then(|c| c.serving).unwrap_or(true),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        },
        node: node_name(endpoint.node_name.as_deref()),
        hints: endpoint.hints.as_ref().and_then(hints),
    })
}

fn hints(hints: &discovery::EndpointHints) -> Option<Box<Hints>> {
    let nodes: Vec<Arc<str>> = hints
        .for_nodes
        .iter()
        .flatten()
        .map(|node| Arc::from(node.name.as_str()))
        .collect();
    let zones: Vec<Arc<str>> = hints
        .for_zones
        .iter()
        .flatten()
        .map(|zone| Arc::from(zone.name.as_str()))
        .collect();
    (!nodes.is_empty() || !zones.is_empty()).then(|| Box::new(Hints { nodes, zones }))
}

fn endpoint_subset(index: usize, subset: &core::EndpointSubset) -> Result<EndpointSubset> {
    let field = format!("subsets[{index}]");
    let mut addresses = Vec::new();
    let kinds = [
        ("addresses", &subset.addresses, true),
        ("notReadyAddresses", &subset.not_ready_addresses, false),
    ];
    for (kind, list, ready) in kinds {
        for (i, address) in list.iter().flatten().enumerate() {
            let ip = endpoint_ip(&format!("{field}.{kind}[{i}].ip"), &address.ip)?;
            let node = node_name(address.node_name.as_deref());
            addresses.push(EndpointAddress { ip, node, ready });
        }
    }
    let port = |(i, port): (usize, &core::EndpointPort)| {
        let field = format!("{field}.ports[{i}]");
        Ok(EndpointPort {
            name: Some(port.name.clone().unwrap_or_default()),
            protocol: protocol(format!("{field}.protocol"), port.protocol.as_deref())?,
            port: Some(required_port(format!("{field}.port"), port.port)?),
        })
    };
    let ports = subset
        .ports
        .iter()
        .flatten()
        .enumerate()
        .map(port)
        .collect::<Result<_>>()?;
    Ok(EndpointSubset { addresses, ports })
}

fn pod_ips(status: Option<&core::PodStatus>) -> Result<Vec<IpAddr>> {
    let Some(status) = status else {
        return Ok(Vec::new());
    };
    let list = status.pod_ips.as_deref().unwrap_or_default();
    let mut ips = Vec::with_capacity(list.len());
    for (i, entry) in list.iter().enumerate() {
        ips.push(endpoint_ip(&format!("status.podIPs[{i}].ip"), &entry.ip)?);
    }
    if ips.is_empty()
        && let Some(single) = status.pod_ip.as_deref().filter(|ip| !ip.is_empty())
    {
        ips.push(endpoint_ip("status.podIP", single)?);
    }
    one_of_each_family("status.podIPs", &ips)?;
    Ok(ips)
}

/// Ports of the containers, then of the init containers that go on running beside them.
fn container_ports(spec: &core::PodSpec) -> Result<Vec<ContainerPort>> {
    let main = spec
        .containers
        .iter()
        .enumerate()
        .map(|(i, c)| ("containers", i, c));
    let init = spec.init_containers.iter().flatten().enumerate();
    let sidecars = init
        .filter(|(_, c)| c.restart_policy.as_deref() == Some("Always"))
        .map(|(i, c)| ("initContainers", i, c));
    let mut ports = Vec::new();
    for (list, i, container) in main.chain(sidecars) {
        for (j, port) in container.ports.iter().flatten().enumerate() {
            let field = format!("spec.{list}[{i}].ports[{j}]");
            ports.push(ContainerPort {
                name: port.name.clone().unwrap_or_default(),
                protocol: protocol(format!("{field}.protocol"), port.protocol.as_deref())?,
                port: required_port(format!("{field}.containerPort"), port.container_port)?,
            });
        }
    }
    Ok(ports)
}

/// What an `apiVersion` and `kind` stand for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Meaning {
    /// One object.
    One(Kind),
    /// A list of objects; of one kind, or of any where each says its own.
    List(Option<Kind>),
    /// A kind of ours under another version than this one.
    OtherVersion(&'static str),
    /// Nothing a proxy looks at.
    Foreign,
}

const KINDS: [(&str, Kind, &str); 5] = [
    ("Service", Kind::Service, "v1"),
    ("Endpoints", Kind::Endpoints, "v1"),
    ("Pod", Kind::Pod, "v1"),
    ("Node", Kind::Node, "v1"),
    ("EndpointSlice", Kind::EndpointSlice, "discovery.k8s.io/v1"),
];

/// Names of the kinds that matter here.
pub(super) const KIND_NAMES: &[&str] = &[
    "Service",
    "Endpoints",
    "Pod",
    "Node",
    "EndpointSlice",
    "List",
];

pub(super) fn meaning(api_version: &str, kind: &str) -> Meaning {
    if kind == "List" && api_version == "v1" {
        return Meaning::List(None);
    }
    let item = kind.strip_suffix("List");
    let Some((_, known, version)) = KINDS
        .iter()
        .find(|(name, ..)| *name == item.unwrap_or(kind))
    else {
        return Meaning::Foreign;
    };
    let same_group = |a: &str, b: &str| {
        a.rsplit_once('/').map(|(group, _)| group) == b.rsplit_once('/').map(|(group, _)| group)
    };
    if api_version != *version {
        // Another group's Service is another thing altogether.
        let ours = same_group(api_version, version);
        return if ours {
            Meaning::OtherVersion(version)
        } else {
            Meaning::Foreign
        };
    }
    if item.is_some() {
        Meaning::List(Some(*known))
    } else {
        Meaning::One(*known)
    }
}

/// Why an object could not be had.
#[derive(Debug)]
pub(super) enum Failure<E> {
    /// It does not have its type's shape.
    Shape(E),
    /// It has, but a field does not hold what it must.
    Field(Invalid),
}

/// Who wrote an object.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Author {
    /// A person: the API server's defaults are still to be applied.
    Person,
    /// The API server: the object is complete.
    ApiServer,
}

/// Reads and converts an object of a known kind.
pub(super) fn object<'de, D: Deserializer<'de>>(
    kind: Kind,
    author: Author,
    deserializer: D,
) -> std::result::Result<Object, Failure<D::Error>> {
    fn read<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<T, Failure<D::Error>> {
        T::deserialize(deserializer).map_err(Failure::Shape)
    }
    let converted = match kind {
        Kind::Service => service(&read(deserializer)?).map(|o| Object::Service(Arc::new(o))),
        Kind::Endpoints => endpoints(&read(deserializer)?).map(Object::Endpoints),
        Kind::Pod => pod(&read(deserializer)?).map(|o| Object::Pod(Box::new(o))),
        Kind::Node => node(&read(deserializer)?).map(Object::Node),
        Kind::EndpointSlice => {
            let mut slice: discovery::EndpointSlice = read(deserializer)?;
            if author == Author::Person {
                default_port_names(&mut slice);
            }
            endpoint_slice(&slice).map(Object::EndpointSlice)
        }
    };
    converted.map_err(Failure::Field)
}

/// The API server writes an empty name where a slice's port has none.
fn default_port_names(slice: &mut discovery::EndpointSlice) {
    for port in slice.ports.iter_mut().flatten() {
        port.name.get_or_insert_default();
    }
}
