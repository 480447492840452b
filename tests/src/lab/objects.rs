//! Kubernetes objects for scenarios, and the manifest file the agent watches.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::addresses::{Dual, Family, NODE_A, NODE_B};
use super::topology::{NodeName, Pod};

/// A Service of the default namespace with the EndpointSlices that belong to it.
#[derive(Debug, Clone)]
pub struct Service {
    name: String,
    cluster_ips: Dual,
    ports: Vec<Port>,
    external_ips: Vec<String>,
    /// `status.loadBalancer.ingress`
    ingress: Vec<Value>,
    /// Labels of the Service and of its slices.
    labels: Map<String, Value>,
    /// Fields of `spec` that are set as they are.
    spec: Map<String, Value>,
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone)]
struct Port {
    name: String,
    protocol: Protocol,
    number: u16,
    target: u16,
    on_nodes: Option<u16>,
}

/// Transport of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

#[derive(Debug, Clone)]
struct Endpoint {
    addr: Dual,
    node: Option<NodeName>,
    /// ready, serving, terminating
    conditions: [bool; 3],
}

impl Service {
    /// A service of both families without ports or endpoints.
    #[must_use]
    pub fn new(name: &str, cluster_ips: Dual) -> Self {
        Self {
            name: name.to_owned(),
            cluster_ips,
            ports: Vec::new(),
            external_ips: Vec::new(),
            ingress: Vec::new(),
            labels: Map::new(),
            spec: Map::new(),
            endpoints: Vec::new(),
        }
    }

    /// Adds a port of this name that leads to `target` on the endpoints.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: Protocol, port: u16, target: u16) -> Self {
        self.ports.push(Port {
            name: name.to_owned(),
            protocol,
            number: port,
            target,
            on_nodes: None,
        });
        self
    }

    /// Gives the port added last a port of every node.
    #[must_use]
    pub fn node_port(mut self, node_port: u16) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.on_nodes = Some(node_port);
        }
        self
    }

    /// Gives it the addresses of a load balancer.
    #[must_use]
    pub fn load_balancer(self, vips: Dual) -> Self {
        let ingress = vips.both().map(|ip| json!({"ip": ip}));
        self.ingress(ingress)
    }

    /// Gives it entries of `status.loadBalancer.ingress` as they are.
    #[must_use]
    pub fn ingress(mut self, entries: impl IntoIterator<Item = Value>) -> Self {
        self.ingress.extend(entries);
        self
    }

    /// Gives it and its slices a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.into());
        self
    }

    /// Gives it external addresses.
    #[must_use]
    pub fn external_ips(mut self, ips: Dual) -> Self {
        self.external_ips
            .extend(ips.both().map(|ip| ip.to_string()));
        self
    }

    /// Sets a field of `spec`, for example `("externalTrafficPolicy", json!("Local"))`.
    #[must_use]
    pub fn spec(mut self, field: &str, value: Value) -> Self {
        self.spec.insert(field.to_owned(), value);
        self
    }

    /// Adds pods as ready endpoints.
    #[must_use]
    pub fn pods<'a>(mut self, pods: impl IntoIterator<Item = &'a Pod>) -> Self {
        for pod in pods {
            self.endpoints.push(Endpoint {
                addr: pod.addr(),
                node: Some(pod.node()),
                conditions: [true, true, false],
            });
        }
        self
    }

    /// Adds a pod as an endpoint that is being deleted but still serves.
    #[must_use]
    pub fn terminating(self, pod: &Pod) -> Self {
        self.with_conditions(pod, [false, true, true])
    }

    /// Adds a pod as an endpoint that is ready, serving, terminating.
    #[must_use]
    pub fn with_conditions(mut self, pod: &Pod, conditions: [bool; 3]) -> Self {
        self.endpoints.push(Endpoint {
            addr: pod.addr(),
            node: Some(pod.node()),
            conditions,
        });
        self
    }

    /// Adds a pod of the host's network as an endpoint: its address is the node's.
    #[must_use]
    pub fn host_network(mut self, node: NodeName) -> Self {
        self.endpoints.push(Endpoint {
            addr: node.addr(),
            node: Some(node),
            conditions: [true, true, false],
        });
        self
    }

    /// Adds something that is no pod as an endpoint.
    #[must_use]
    pub fn elsewhere(mut self, addr: Dual) -> Self {
        self.endpoints.push(Endpoint {
            addr,
            node: None,
            conditions: [true, true, false],
        });
        self
    }

    /// Its ClusterIPs.
    #[must_use]
    pub fn cluster_ips(&self) -> Dual {
        self.cluster_ips
    }

    /// The objects: the Service and a slice for each family.
    #[must_use]
    pub fn objects(&self) -> Vec<Value> {
        let mut objects = vec![self.service()];
        objects.extend(Family::BOTH.map(|family| self.slice(family)));
        objects
    }

    fn service(&self) -> Value {
        let on_nodes = self.ports.iter().any(|port| port.on_nodes.is_some());
        let kind = if !self.ingress.is_empty() {
            "LoadBalancer"
        } else if on_nodes {
            "NodePort"
        } else {
            "ClusterIP"
        };
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                let mut object = json!({
                    "name": port.name,
                    "protocol": port.protocol.as_str(),
                    "port": port.number,
                    "targetPort": port.target,
                });
                if let (Some(node_port), Value::Object(fields)) = (port.on_nodes, &mut object) {
                    fields.insert("nodePort".to_owned(), json!(node_port));
                }
                object
            })
            .collect();
        let ips = self.cluster_ips.both();
        let mut spec = json!({
            "type": kind,
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "ports": ports,
            "externalIPs": self.external_ips,
        });
        if let Value::Object(fields) = &mut spec {
            fields.extend(self.spec.clone());
        }
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": "default", "labels": self.labels},
            "spec": spec,
            "status": {"loadBalancer": {"ingress": self.ingress}},
        })
    }

    fn slice(&self, family: Family) -> Value {
        let endpoints: Vec<Value> = self
            .endpoints
            .iter()
            .map(|endpoint| {
                let [ready, serving, terminating] = endpoint.conditions;
                json!({
                    "addresses": [endpoint.addr.of(family)],
                    "nodeName": endpoint.node.map(NodeName::as_str),
                    "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
                })
            })
            .collect();
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                json!({
                    "name": port.name,
                    "protocol": port.protocol.as_str(),
                    "port": port.target,
                })
            })
            .collect();
        let suffix = family.to_string().to_lowercase();
        let mut labels = self.labels.clone();
        labels.insert(
            "kubernetes.io/service-name".to_owned(),
            self.name.as_str().into(),
        );
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{suffix}", self.name),
                "namespace": "default",
                "labels": labels,
            },
            "addressType": family.to_string(),
            "endpoints": endpoints,
            "ports": ports,
        })
    }
}

impl Protocol {
    /// The name in Kubernetes objects.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// The two nodes.
#[must_use]
pub fn nodes() -> Vec<Value> {
    [(NodeName::A, NODE_A), (NodeName::B, NODE_B)]
        .map(|(name, addr)| {
            let addresses = addr
                .both()
                .map(|ip| json!({"type": "InternalIP", "address": ip}));
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name.as_str()},
                "status": {"addresses": addresses},
            })
        })
        .into()
}

/// The file the agent watches, replaced as a whole.
#[derive(Debug)]
pub struct Manifests {
    file: PathBuf,
}

impl Manifests {
    /// A file in `dir` with the nodes and the services given.
    pub fn create(dir: &Path, services: &[Service]) -> Result<Self> {
        let manifests = Self {
            file: dir.join("manifests.json"),
        };
        manifests.write(services)?;
        Ok(manifests)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// Replaces the services.
    pub fn write(&self, services: &[Service]) -> Result<()> {
        let mut items = nodes();
        items.extend(services.iter().flat_map(Service::objects));
        self.write_items(&items)
    }

    /// Replaces everything, nodes and all.
    pub fn write_items(&self, items: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        // Renamed into place: the agent never sees half of it.
        let fresh = self.file.with_extension("new");
        fs::write(&fresh, list.to_string())
            .with_context(|| format!("write {}", fresh.display()))?;
        fs::rename(&fresh, &self.file).with_context(|| format!("rename to {}", self.file.display()))
    }
}
