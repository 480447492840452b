//! Why something that was asked for is not programmed, or not as asked.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use serde::Serialize;
use svc_lb_common::Family;

use crate::model::{ObjectName, ServicePort, family_name, protocol_name};

/// Which hints decided.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum TopologyMode {
    /// Endpoints meant for this node.
    Node,
    /// Endpoints meant for this node's zone.
    Zone,
}

/// One reason; its `Display` is a sentence for people.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(
    tag = "reason",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub enum Reason {
    /// Another proxy's, by label (SEMANTICS A4).
    ForeignProxy {
        /// Value of the label, if there is one.
        label: Option<String>,
    },
    /// SEMANTICS A3.
    ExternalName,
    /// SEMANTICS A2.
    Headless,
    /// The ClusterIP is not allocated yet.
    NoClusterIp,
    /// `spec.ports` is empty.
    NoPorts,
    /// An address of a family the Service has no ClusterIP of (SEMANTICS A9).
    NoClusterIpInFamily {
        /// The address that is left out.
        ip: IpAddr,
    },
    /// externalIPs are switched off (SEMANTICS B4).
    ExternalIpsOff {
        /// The address that is left out.
        ip: IpAddr,
    },
    /// ipMode Proxy (SEMANTICS B6).
    ProxiedLoadBalancer {
        /// The address that is left out.
        ip: IpAddr,
    },
    /// Ingress without any address (SEMANTICS A11).
    HostNameLoadBalancer,
    /// type LoadBalancer without ingress.
    LoadBalancerPending,
    /// externalTrafficPolicy Local without healthCheckNodePort (SEMANTICS G6).
    NoHealthCheckNodePort,
    /// Source ranges of the other family only: this family admits everyone (SEMANTICS B7).
    SourceRangesOfOtherFamily,
    /// Another proxy's slice, by label (SEMANTICS A4).
    ForeignSlice {
        /// The slice.
        slice: ObjectName,
        /// Value of the label, if there is one.
        label: Option<String>,
    },
    /// A slice labelled headless (SEMANTICS A2).
    HeadlessSlice {
        /// The slice.
        slice: ObjectName,
    },
    /// A slice of host names.
    HostNameSlice {
        /// The slice.
        slice: ObjectName,
    },
    /// A slice's port without a name (SEMANTICS A6).
    UnnamedSlicePort {
        /// The slice.
        slice: ObjectName,
    },
    /// A slice's port without a number (SEMANTICS A6).
    UnnumberedSlicePort {
        /// The slice.
        slice: ObjectName,
    },
    /// No endpoints in this family: clients are rejected.
    NoEndpoints,
    /// Endpoints in this family, but none of their slices has this port (SEMANTICS A6).
    NoSuchPort {
        /// What the slices have, as name/protocol.
        offered: Vec<String>,
    },
    /// Endpoints, but none ready and none serving while it terminates: clients are rejected.
    NoneUsable,
    /// None ready: new flows go to endpoints that still serve while they terminate (SEMANTICS D2).
    TerminatingFallback,
    /// A Local policy and no endpoint on this node: clients get no answer.
    NoLocalEndpoints,
    /// Hints leave some ready endpoints out of the cluster set (SEMANTICS D5, D6).
    Topology {
        /// Which hints.
        mode: TopologyMode,
        /// Ready endpoints that are used.
        used: usize,
        /// All ready endpoints.
        ready: usize,
    },
    /// Annotation svc-lb.io/lb-algorithm names none (SEMANTICS F10).
    UnknownAlgorithm {
        /// What it says.
        value: String,
    },
    /// Annotation svc-lb.io/weight is no weight (SEMANTICS F11).
    UnreadableWeight {
        /// The slice.
        slice: ObjectName,
        /// What it says.
        value: String,
    },
    /// An endpoint has weight 0 (SEMANTICS D9).
    EndpointQuarantined {
        /// Its address.
        ip: IpAddr,
    },
    /// An endpoint is neither ready nor terminating.
    EndpointNotReady {
        /// Its address.
        ip: IpAddr,
    },
    /// An endpoint is terminating; it serves on if there is nothing better.
    EndpointTerminating {
        /// Its address.
        ip: IpAddr,
        /// It still answers.
        serving: bool,
    },
}

#[expect(clippy::too_many_lines, reason = "one sentence after the other")]
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ForeignProxy { label } => write!(
                f,
                "not ours: label service.kubernetes.io/service-proxy-name is {}",
                Label(label)
            ),
            Self::ExternalName => f.write_str("ExternalName is a DNS alias, nothing to balance"),
            Self::Headless => f.write_str("headless: clients get the endpoints' addresses by DNS"),
            Self::NoClusterIp => f.write_str("no ClusterIP allocated yet"),
            Self::NoPorts => f.write_str("spec.ports is empty"),
            Self::NoClusterIpInFamily { ip } => {
                write!(
                    f,
                    "{ip} is left out: the Service has no ClusterIP of its family"
                )
            }
            Self::ExternalIpsOff { ip } => {
                write!(f, "external IP {ip} is left out: --external-ips is off")
            }
            Self::ProxiedLoadBalancer { ip } => {
                write!(f, "{ip} is left to its load balancer: ipMode is Proxy")
            }
            Self::HostNameLoadBalancer => {
                f.write_str("the load balancer has a host name and no address to program")
            }
            Self::LoadBalancerPending => f.write_str("the load balancer has no address yet"),
            Self::NoHealthCheckNodePort => f.write_str(
                "no spec.healthCheckNodePort: load balancers cannot tell which nodes have endpoints",
            ),
            Self::SourceRangesOfOtherFamily => f.write_str(
                "loadBalancerSourceRanges has no range of this family: everyone is admitted",
            ),
            Self::ForeignSlice { slice, label } => write!(
                f,
                "slice {slice} is not ours: label service.kubernetes.io/service-proxy-name is {}",
                Label(label)
            ),
            Self::HeadlessSlice { slice } => {
                write!(
                    f,
                    "slice {slice} is labelled service.kubernetes.io/headless"
                )
            }
            Self::HostNameSlice { slice } => {
                write!(f, "slice {slice} holds host names, not addresses")
            }
            Self::UnnamedSlicePort { slice } => {
                write!(f, "a port of slice {slice} has no name and is ignored")
            }
            Self::UnnumberedSlicePort { slice } => {
                write!(f, "a port of slice {slice} has no number and is ignored")
            }
            Self::NoEndpoints => f.write_str("no endpoints: clients are rejected"),
            Self::NoSuchPort { offered } if offered.is_empty() => {
                f.write_str("the endpoints' slices have no ports: clients are rejected")
            }
            Self::NoSuchPort { offered } => write!(
                f,
                "the endpoints' slices have no port of this name and protocol, only {}: \
                 clients are rejected",
                offered.join(", ")
            ),
            Self::NoneUsable => f.write_str("no endpoint is ready: clients are rejected"),
            Self::TerminatingFallback => {
                f.write_str("no endpoint is ready: those that serve while terminating are used")
            }
            Self::NoLocalEndpoints => {
                f.write_str("no usable endpoint on this node: a Local policy gives no answer")
            }
            Self::Topology { mode, used, ready } => {
                let what = match mode {
                    TopologyMode::Node => "node",
                    TopologyMode::Zone => "zone",
                };
                write!(
                    f,
                    "topology hints keep {used} of {ready} ready endpoints for this {what}"
                )
            }
            Self::UnknownAlgorithm { value } => write!(
                f,
                "annotation svc-lb.io/lb-algorithm is {value:?} and is ignored: write random or maglev"
            ),
            Self::UnreadableWeight { slice, value } => write!(
                f,
                "annotation svc-lb.io/weight of slice {slice} is {value:?} and is ignored: write a \
                 number from 0 to 65535"
            ),
            Self::EndpointQuarantined { ip } => {
                write!(f, "endpoint {ip} takes no new flows: its weight is 0")
            }
            Self::EndpointNotReady { ip } => write!(f, "endpoint {ip} is not ready"),
            Self::EndpointTerminating { ip, serving: true } => {
                write!(
                    f,
                    "endpoint {ip} is terminating: used only where none is ready"
                )
            }
            Self::EndpointTerminating { ip, serving: false } => {
                write!(f, "endpoint {ip} is terminating and does not serve")
            }
        }
    }
}

struct Label<'a>(&'a Option<String>);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(label) => write!(f, "{label:?}"),
            None => f.write_str("absent"),
        }
    }
}

/// A reason and what it is about.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Note {
    /// The port, as name/protocol, or number/protocol where it has no name; none where it is the
    /// whole Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// The family, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// The reason.
    #[serde(flatten)]
    pub reason: Reason,
}

impl Note {
    /// Concerns the whole Service.
    pub(super) fn of_service(reason: Reason) -> Self {
        Self {
            port: None,
            family: None,
            reason,
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(port) = &self.port {
            write!(f, "port {port}: ")?;
        }
        if let Some(family) = self.family {
            write!(f, "{}: ", family_name(family))?;
        }
        self.reason.fmt(f)
    }
}

/// Notes as they come up, each said once.
#[derive(Debug, Default)]
pub(super) struct Notes(BTreeSet<Note>);

impl Notes {
    pub(super) fn service(&mut self, reason: Reason) {
        self.0.insert(Note::of_service(reason));
    }

    pub(super) fn family(&mut self, family: Family, reason: Reason) {
        self.0.insert(Note {
            port: None,
            family: Some(family),
            reason,
        });
    }

    pub(super) fn port(&mut self, port: &ServicePort, family: Family) -> PortNotes<'_> {
        let protocol = protocol_name(port.protocol);
        let port = if port.name.is_empty() {
            format!("{}/{protocol}", port.port)
        } else {
            format!("{}/{protocol}", port.name)
        };
        PortNotes {
            notes: self,
            port,
            family,
        }
    }

    pub(super) fn into_vec(self) -> Vec<Note> {
        self.0.into_iter().collect()
    }
}

/// Notes about one port in one family.
#[derive(Debug)]
pub(super) struct PortNotes<'a> {
    notes: &'a mut Notes,
    port: String,
    family: Family,
}

impl PortNotes<'_> {
    pub(super) fn add(&mut self, reason: Reason) {
        let note = Note {
            port: Some(self.port.clone()),
            family: Some(self.family),
            reason,
        };
        self.notes.0.insert(note);
    }
}
