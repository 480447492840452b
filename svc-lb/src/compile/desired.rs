//! What one Service wants programmed: logical tables, free of ids and of map layouts.
//!
//! `compile` makes these, `plan` diffs them against what is programmed and gives them ids.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use svc_lb_common::{Family, Protocol};

/// Names one port of one Service in one address family: the unit of selection, of affinity
/// (SEMANTICS F2) and of counters, whichever frontend a client uses.
///
/// A port is known by its *name* as in kube-proxy, so that renumbering it keeps its identity.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
pub struct PortKey {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Name of the port; empty where a single port has none.
    pub port_name: String,
    /// Transport protocol of the port.
    pub protocol: Protocol,
    /// Address family of the frontends and of the backends.
    pub family: Family,
}

/// The address of a frontend.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FrontendAddress {
    /// Any address of this node that serves `NodePorts`.
    Node,
    /// One address.
    Ip(IpAddr),
}

/// What kind of address a client used; decides which policy and which endpoint set apply.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum FrontendKind {
    /// `spec.clusterIPs`: internalTrafficPolicy applies.
    ClusterIp,
    /// `spec.ports[].nodePort`: externalTrafficPolicy applies.
    NodePort,
    /// `status.loadBalancer.ingress[].ip`: externalTrafficPolicy and source ranges apply.
    LoadBalancer,
    /// `spec.externalIPs`: externalTrafficPolicy applies.
    ExternalIp,
}

/// An address, protocol (the port's own) and port that clients use.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Frontend {
    /// Where.
    pub address: FrontendAddress,
    /// Port, host byte order.
    pub port: u16,
    /// What it is.
    pub kind: FrontendKind,
}

/// One endpoint as a backend of one service port.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent bit of a backend"
)]
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Backend {
    /// Address and port of the endpoint.
    pub address: SocketAddr,
    /// New flows of the Cluster set may pick it.
    pub in_cluster: bool,
    /// New flows of the Local set may pick it.
    pub in_local: bool,
    /// Serving, in whichever set or none: a UDP flow may stay on it (SEMANTICS G1).
    pub serving: bool,
    /// On this node.
    pub local: bool,
    /// Its part of new flows beside the others of its set (SEMANTICS F11). One with 0 is in no set:
    /// it keeps the flows that it has (SEMANTICS D9).
    pub weight: u16,
}

/// How a new flow finds its backend in a set.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Selection {
    /// By a hash that only this node knows: as good as random (SEMANTICS F8).
    #[default]
    Random,
    /// By a table and a hash that all nodes share (SEMANTICS F9).
    Maglev {
        /// The cluster's seed, which is nobody else's business.
        #[serde(skip)]
        seed: u64,
        /// Size of the table, a prime.
        slots: u16,
    },
}

/// What load balancers are told about one Service at its healthCheckNodePort (SEMANTICS G6).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct HealthCheck {
    /// Where they ask.
    pub port: NonZeroU16,
    /// Ready endpoints on this node, unique by address; one that has an address of each family
    /// counts once.
    pub local_endpoints: u32,
}

/// Everything programmed for one service port in one family.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct DesiredPort {
    /// Whose.
    pub key: PortKey,
    /// Sorted, unique by address and port.
    pub frontends: Vec<Frontend>,
    /// Sorted by address, unique.
    pub backends: Vec<Backend>,
    /// ClusterIP clients pick from the Local set (internalTrafficPolicy: Local).
    pub internal_local: bool,
    /// Outside clients pick from the Local set (externalTrafficPolicy: Local).
    pub external_local: bool,
    /// Some endpoint in the cluster is ready or serving: an empty set then means silence, not
    /// rejection (SEMANTICS 1.1, `hasAny`).
    pub has_any: bool,
    /// How a backend of a set is picked.
    pub selection: Selection,
    /// sessionAffinity `ClientIP`, with its timeout in seconds.
    pub affinity_seconds: Option<u32>,
    /// Whom the load balancer's frontends admit, sorted; `None` for everyone, none for nobody.
    pub source_ranges: Option<Vec<IpNet>>,
}
