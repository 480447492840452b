//! The trimmed, validated objects: only what selects, addresses or explains a backend.

use std::{collections::BTreeSet, fmt, net::IpAddr, num::NonZeroU16, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use svc_lb_common::{Family, Protocol};

use super::Labels;

/// Namespace and name of an object.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
pub struct ObjectName {
    /// Namespace; empty for a Node.
    pub namespace: String,
    /// Name, unique within namespace and kind.
    pub name: String,
}

impl ObjectName {
    /// Names an object.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The family of an address.
#[must_use]
pub fn family_of(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// Kubernetes' name of a protocol.
#[must_use]
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

/// Kubernetes' name of a family.
#[must_use]
pub fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// `spec.type` of a Service.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ServiceType {
    /// The default.
    #[default]
    ClusterIP,
    /// Also at a port of every node.
    NodePort,
    /// Also at an address of a load balancer.
    LoadBalancer,
    /// A DNS alias; nothing for a proxy to do.
    ExternalName,
}

/// `spec.internalTrafficPolicy` and `spec.externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TrafficPolicy {
    /// Backends anywhere.
    #[default]
    Cluster,
    /// Backends on this node only.
    Local,
}

/// `status.loadBalancer.ingress[].ipMode`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum IpMode {
    /// Packets arrive with the address still on them.
    #[default]
    Vip,
    /// The load balancer is a proxy: traffic to the address must reach it.
    Proxy,
}

/// One address of a load balancer; ingress without an address is left out (SEMANTICS A11).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LoadBalancerIngress {
    /// The address.
    pub ip: IpAddr,
    /// How packets for it arrive.
    pub mode: IpMode,
}

/// `spec.ports[].targetPort`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TargetPort {
    /// The same number on every pod.
    Number(NonZeroU16),
    /// The container port of that name.
    Name(String),
}

/// `spec.ports[]` of a Service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePort {
    /// Empty where a single port has none.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The port clients use.
    pub port: NonZeroU16,
    /// The port on every node.
    pub node_port: Option<NonZeroU16>,
    /// The port on the pods; used by the standalone control plane only.
    pub target_port: TargetPort,
}

/// `spec.ipFamilyPolicy`; used by the standalone control plane only.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum IpFamilyPolicy {
    /// One family.
    #[default]
    SingleStack,
    /// Two families where the cluster has them.
    PreferDualStack,
    /// Two families or none.
    RequireDualStack,
}

/// What an annotation of ours says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Annotated<T> {
    /// Nothing: it is not there.
    #[default]
    Absent,
    /// This.
    Value(T),
    /// Something that cannot be read. The object is used without it.
    Unreadable(String),
}

impl<T: Copy> Annotated<T> {
    /// What it says, if it says something.
    #[must_use]
    pub const fn value(&self) -> Option<T> {
        match self {
            Self::Value(value) => Some(*value),
            Self::Absent | Self::Unreadable(_) => None,
        }
    }
}

/// How a new flow finds its backend (SEMANTICS F10).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Algorithm {
    /// By a hash that differs from node to node.
    #[default]
    Random,
    /// By a table and a hash that all nodes share.
    Maglev,
}

/// A v1 Service.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent field of the API object"
)]
pub struct Service {
    /// Who.
    pub name: ObjectName,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `clusterIP: None`.
    pub headless: bool,
    /// `spec.clusterIPs`, at most one of each family; empty until allocated.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress` that has an address.
    pub load_balancer: Vec<LoadBalancerIngress>,
    /// `status.loadBalancer.ingress` has an entry with a host name only.
    pub load_balancer_hostname: bool,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// sessionAffinity `ClientIP`, with its timeout in seconds.
    pub affinity_seconds: Option<u32>,
    /// Annotation `svc-lb.io/lb-algorithm`.
    pub algorithm: Annotated<Algorithm>,
    /// `spec.healthCheckNodePort`.
    pub health_check_node_port: Option<NonZeroU16>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Vec<IpNet>,
    /// Label `service.kubernetes.io/service-proxy-name` (SEMANTICS A4).
    pub proxy_name: Option<String>,
    /// `spec.selector`; used by the standalone control plane only, as all below.
    pub selector: Labels,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.ipFamilies`, in order of preference.
    pub ip_families: Vec<Family>,
    /// `spec.ipFamilyPolicy`.
    pub ip_family_policy: Option<IpFamilyPolicy>,
    /// `spec.allocateLoadBalancerNodePorts`.
    pub allocate_node_ports: bool,
    /// `spec.loadBalancerIP`: a wish, not an address (SEMANTICS A11).
    pub requested_load_balancer_ip: Option<IpAddr>,
}

/// One port of an EndpointSlice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointPort {
    /// Matches `ServicePort::name`; a port without name is ignored (SEMANTICS A6).
    pub name: Option<String>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The port of the backends; a slice's port without number is ignored (SEMANTICS A6).
    pub port: Option<NonZeroU16>,
}

/// Where an endpoint would rather be used from.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Vec<Arc<str>>,
    /// Zone labels.
    pub zones: Vec<Arc<str>>,
}

/// The conditions of an endpoint, their defaults applied (SEMANTICS D1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Conditions {
    /// New flows may use it.
    pub ready: bool,
    /// It answers, whether or not it is on its way out.
    pub serving: bool,
    /// It is on its way out.
    pub terminating: bool,
}

impl Conditions {
    /// Ready and serving, not terminating.
    pub const READY: Self = Self {
        ready: true,
        serving: true,
        terminating: false,
    };
}

/// One endpoint of a slice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// `addresses[0]`: the others are not used (SEMANTICS A7).
    pub address: IpAddr,
    /// Its conditions.
    pub conditions: Conditions,
    /// Node it is on, where known.
    pub node: Option<Arc<str>>,
    /// Topology hints; boxed because most endpoints have none.
    pub hints: Option<Box<Hints>>,
}

/// A discovery.k8s.io/v1 EndpointSlice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointSlice {
    /// Who.
    pub name: ObjectName,
    /// Name of the Service in the same namespace, from label `kubernetes.io/service-name`.
    pub service: Option<String>,
    /// Family of the addresses; none for host names, which no proxy can use.
    pub family: Option<Family>,
    /// Label `service.kubernetes.io/headless` (SEMANTICS A2).
    pub headless: bool,
    /// Label `service.kubernetes.io/service-proxy-name` (SEMANTICS A4).
    pub proxy_name: Option<String>,
    /// Annotation `svc-lb.io/weight`: the part of new flows that each of its endpoints gets beside
    /// those of other slices; 0 for no new flows (SEMANTICS F11, D9).
    pub weight: Annotated<u16>,
    /// Ports that every endpoint of the slice has.
    pub ports: Vec<EndpointPort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

impl EndpointSlice {
    /// The Service the slice belongs to, if it names one.
    #[must_use]
    pub fn owner(&self) -> Option<ObjectName> {
        let service = self.service.as_ref()?;
        Some(ObjectName::new(
            self.name.namespace.clone(),
            service.clone(),
        ))
    }
}

/// One address of a v1 Endpoints subset.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointAddress {
    /// The address.
    pub ip: IpAddr,
    /// Node it is on, where known.
    pub node: Option<Arc<str>>,
    /// From `addresses`, not from `notReadyAddresses`.
    pub ready: bool,
}

/// One subset of a v1 Endpoints: every address has every port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointSubset {
    /// Its addresses.
    pub addresses: Vec<EndpointAddress>,
    /// Its ports.
    pub ports: Vec<EndpointPort>,
}

/// A v1 Endpoints; used by the standalone control plane only.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoints {
    /// Who; a Service of the same name is the one meant.
    pub name: ObjectName,
    /// Label `endpointslice.kubernetes.io/skip-mirror` is "true".
    pub skip_mirror: bool,
    /// Its subsets.
    pub subsets: Vec<EndpointSubset>,
}

/// One port of a container.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ContainerPort {
    /// Its name; empty where it has none.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: NonZeroU16,
}

/// A v1 Pod; used by the standalone control plane only.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pod {
    /// Who.
    pub name: ObjectName,
    /// What selectors look at.
    pub labels: Labels,
    /// Node it runs on, once scheduled.
    pub node: Option<Arc<str>>,
    /// `status.podIPs`, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Condition Ready is True.
    pub ready: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// Phase Succeeded or Failed: it will not answer again.
    pub finished: bool,
    /// Ports of its containers, in order.
    pub ports: Vec<ContainerPort>,
}

/// What Nodes say that selection, health and NodePorts depend on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// Name of the node.
    pub name: String,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// `metadata.deletionTimestamp` is set, or the cluster autoscaler's taint says that it will be
    /// (SEMANTICS G7).
    pub leaves: bool,
    /// What the cluster knows it by, one address of each family: `status.addresses`, the first
    /// InternalIP, else the first ExternalIP.
    pub addresses: BTreeSet<IpAddr>,
}

/// The node this agent runs on, as far as selection depends on it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct NodeFacts {
    /// Name that endpoints and hints use for it.
    pub name: String,
    /// Its zone, once its Node object told (SEMANTICS D8).
    pub zone: Option<String>,
    /// Its addresses, as far as others can use them.
    pub addresses: BTreeSet<IpAddr>,
}
