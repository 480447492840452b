//! What `svc-lb status` prints: one record, over the admin socket.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::dataplane::FlowState;
use crate::dataplane::attach::EdgeStatus;
use crate::dataplane::edges::Refused;
use crate::dataplane::sockets::SocketsStatus;
use crate::health::proxy::ProxyStatus;
use crate::health::services::ServiceHealthStatus;
use crate::observe::programming::Programming;

/// The whole agent at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Version of the layout of the pinned maps.
    pub layout: u32,
    /// Release of the kernel.
    pub kernel: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// Every source's list was complete once, is programmed, and the edges are attached.
    pub ready: bool,
    /// What readiness waits for.
    pub waiting_for: Vec<String>,
    /// What this version leaves to a later one.
    pub limits: Vec<String>,
    /// This node.
    pub node: NodeStatus,
    /// In the order of the command line.
    pub sources: Vec<SourceStatus>,
    /// Services.
    pub services: ServicesStatus,
    /// What load balancers and probes are told.
    pub health: HealthStatus,
    /// Interfaces with programs.
    pub edges: Vec<EdgeStatus>,
    /// Interfaces that were asked for and cannot be edges.
    pub refused: Vec<Refused>,
    /// Socket hooks.
    pub sockets: SocketsStatus,
    /// Programs as they were loaded.
    pub programs: Vec<ProgramStatus>,
    /// Flows, and the maps that evict.
    pub flows: FlowsStatus,
    /// Maps.
    pub maps: Vec<MapStatus>,
}

/// This node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Name that endpoints use for it.
    pub name: String,
    /// Its zone, where a Node object told.
    pub zone: Option<String>,
    /// Addresses that serve NodePorts.
    pub addresses: Vec<std::net::IpAddr>,
}

/// One source.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SourceStatus {
    /// As on the command line.
    pub name: String,
    /// Its current list is complete.
    pub listed: bool,
    /// Changes sent since the start.
    pub changes: u64,
    /// Values that could not be read since the start.
    pub malformed: u64,
    /// Problems that stand.
    pub problems: Vec<String>,
}

/// Services as they are programmed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ServicesStatus {
    /// Services known.
    pub known: usize,
    /// Services of which something is programmed.
    pub programmed: usize,
    /// Service ports programmed, both families.
    pub ports: usize,
    /// Services of which nothing is programmed, and why.
    pub not_programmed: Vec<ServiceNotes>,
    /// Services that are programmed in part, or not as somebody may expect.
    pub notes: Vec<ServiceNotes>,
    /// What found no room, or lost to another service.
    pub refusals: Vec<String>,
    /// What the control plane of `--manifests` and `--stream` could not give.
    pub control_plane: Vec<String>,
    /// How long changes of endpoints took from the cluster to the maps.
    #[serde(default)]
    pub programming: Programming,
    /// Something waits to be written.
    pub pending: bool,
    /// Writes to the maps since the start.
    pub writes: u64,
    /// Attempts to write that failed since the start.
    pub failures: u64,
    /// Why the latest attempt failed, if it did.
    pub last_error: Option<String>,
    /// Entries of the maps that were found damaged at start and repaired.
    pub damaged_at_start: Option<String>,
    /// What the auditor did.
    pub audit: AuditStatus,
}

/// The auditor compares the maps with what was written to them, every minute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AuditStatus {
    /// Comparisons since the start.
    pub passes: u64,
    /// Elements that differed and were written again, by map.
    pub repaired: BTreeMap<String, u64>,
}

/// What load balancers and probes are told.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HealthStatus {
    /// The proxy's own health.
    #[serde(flatten)]
    pub proxy: ProxyStatus,
    /// Where `/healthz` and `/livez` are served, unless they are off.
    pub healthz_address: Option<SocketAddr>,
    /// Why that is not so; tried again.
    pub healthz_failures: Vec<String>,
    /// Services with a healthCheckNodePort, by namespace/name.
    pub services: BTreeMap<String, ServiceHealthStatus>,
}

/// Flows and pins: as of the latest pass over them, which begins every ten seconds and, in full
/// maps, takes half a minute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FlowsStatus {
    /// Seconds without a packet after which a flow is over, by its state.
    pub timeouts: BTreeMap<FlowState, u32>,
    /// Complete passes since the start.
    pub passes: u64,
    /// The maps that evict when they are full.
    pub maps: Vec<LruStatus>,
}

/// One map that evicts when it is full.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LruStatus {
    /// Its name.
    pub name: String,
    /// Entries in it; a flow has two.
    pub entries: u64,
    /// Entries it has room for.
    pub limit: u32,
    /// Entries that the kernel evicted since the first pass: an estimate, for the kernel tells nobody.
    /// It is what the programs inserted less what they removed, what was collected and what is still
    /// there, so it is off by what came and went while the pass walked. It never goes down.
    pub evicted: u64,
    /// Flows or pins collected since the start, by the state in which they timed out.
    pub collected: BTreeMap<String, u64>,
}

/// What there is to say about one Service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceNotes {
    /// namespace/name
    pub service: String,
    /// Sentences.
    pub notes: Vec<String>,
}

/// One program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Its name.
    pub name: String,
    /// The kernel's id.
    pub id: u32,
    /// Instructions that the verifier walked through; kernels before 5.16 do not tell.
    pub verified_instructions: Option<u32>,
}

/// One map.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapStatus {
    /// Its name.
    pub name: String,
    /// Entries in use, where that can be told.
    pub entries: Option<u64>,
    /// Entries it has room for.
    pub limit: u32,
    /// Kernel memory; kernels before 6.4 tell an estimate.
    pub bytes: Option<u64>,
}
