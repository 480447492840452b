//! Service, endpoints and node facts in; logical tables out. Pure, synchronous, deterministic.
//!
//! Knows all of SEMANTICS section 1. Imports neither aya nor kube (`cargo xtask lint` checks).

pub mod desired;
mod endpoints;
mod frontends;
mod notes;

#[cfg(test)]
mod tests;

use serde::Serialize;
use svc_lb_common::Family;

pub use self::desired::HealthCheck;
pub use self::notes::{Note, Reason, TopologyMode};
use self::{
    desired::{DesiredPort, PortKey, Selection},
    endpoints::Usage,
    notes::Notes,
};
use crate::model::{
    Algorithm, Annotated, EndpointSlice, NodeFacts, Service, ServicePort, ServiceType,
    TrafficPolicy,
};

/// What an operator or the dataplane's abilities decide, for all Services alike.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CompileOptions {
    /// Handle the objects whose label `service.kubernetes.io/service-proxy-name` is this; those
    /// without the label where none (SEMANTICS A4).
    pub proxy_name: Option<String>,
    /// Nobody is served at `spec.externalIPs`.
    pub ignore_external_ips: bool,
    /// How flows of Services without an annotation find their backend (SEMANTICS F10).
    pub algorithm: Algorithm,
    /// The tables of those that use Maglev.
    pub maglev: MaglevOptions,
}

/// Maglev tables, the same on every node of a cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MaglevOptions {
    /// Decides the tables together with the endpoints' addresses.
    pub seed: u64,
    /// The least size of a table, one of [`MaglevOptions::SIZES`].
    pub slots: u16,
}

impl MaglevOptions {
    /// Sizes of tables: the largest prime below each second power of two. A range has 16 bits.
    pub const SIZES: [u16; 4] = [1_021, 4_093, 16_381, 65_521];
    /// Slots for each endpoint that are wanted at least.
    const SLOTS_FOR_EACH: usize = 100;

    /// The size for this many endpoints. A table of another size is another table altogether, so
    /// it depends on nothing that changes as lightly as readiness.
    fn size(self, endpoints: usize) -> u16 {
        let wanted = endpoints.saturating_mul(Self::SLOTS_FOR_EACH);
        let [.., largest] = Self::SIZES;
        let enough = |size: &u16| *size >= self.slots && usize::from(*size) > wanted;
        Self::SIZES.into_iter().find(enough).unwrap_or(largest)
    }
}

impl Default for MaglevOptions {
    fn default() -> Self {
        let [.., slots] = Self::SIZES;
        Self { seed: 0, slots }
    }
}

/// What is to be programmed for one Service, and why the rest is not.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Compiled {
    /// One for each port and family, sorted by key.
    pub ports: Vec<DesiredPort>,
    /// What load balancers are told, where they are to ask this node.
    pub health_check: Option<HealthCheck>,
    /// For people who ask.
    pub notes: Vec<Note>,
}

/// Decides what one node programs for one Service.
///
/// `slices` are those that name the Service; their order does not matter.
pub fn compile<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node: &NodeFacts,
    options: &CompileOptions,
) -> Compiled {
    if let Some(reason) = frontends::why_skipped(service, options) {
        return Compiled {
            ports: Vec::new(),
            health_check: None,
            notes: vec![Note::of_service(reason)],
        };
    }
    let mut notes = Notes::default();
    if let Annotated::Unreadable(value) = &service.algorithm {
        let value = value.clone();
        notes.service(Reason::UnknownAlgorithm { value });
    }
    let slices = endpoints::usable(slices, options, &mut notes);
    let mut ports = Vec::new();
    for family in [Family::V4, Family::V6] {
        if !frontends::serves(service, family) {
            frontends::note_unserved(service, family, &mut notes);
            continue;
        }
        frontends::note_family(service, family, options, &mut notes);
        for port in &service.ports {
            ports.push(compile_port(
                service, port, family, &slices, node, options, &mut notes,
            ));
        }
    }
    ports.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    endpoints::note_unused(&slices, &mut notes);
    Compiled {
        ports,
        health_check: health_check(service, &slices, node, &mut notes),
        notes: notes.into_vec(),
    }
}

/// A load balancer keeps away from nodes without endpoints where the policy is Local; otherwise
/// any node will do (SEMANTICS G6).
fn health_check(
    service: &Service,
    slices: &[&EndpointSlice],
    node: &NodeFacts,
    notes: &mut Notes,
) -> Option<HealthCheck> {
    let wanted = service.service_type == ServiceType::LoadBalancer
        && service.external_policy == TrafficPolicy::Local;
    if !wanted {
        return None;
    }
    let Some(port) = service.health_check_node_port else {
        notes.service(Reason::NoHealthCheckNodePort);
        return None;
    };
    let ready = |family| endpoints::ready_here(service, family, slices, node);
    let local_endpoints = [Family::V4, Family::V6]
        .into_iter()
        .filter(|family| frontends::serves(service, *family))
        .map(ready)
        .max()
        .unwrap_or(0);
    Some(HealthCheck {
        port,
        local_endpoints,
    })
}

fn compile_port(
    service: &Service,
    port: &ServicePort,
    family: Family,
    slices: &[&EndpointSlice],
    node: &NodeFacts,
    options: &CompileOptions,
    notes: &mut Notes,
) -> DesiredPort {
    let key = PortKey {
        namespace: service.name.namespace.clone(),
        service: service.name.name.clone(),
        port_name: port.name.clone(),
        protocol: port.protocol,
        family,
    };
    let frontends = frontends::of_port(service, port, family, options);
    let external = frontends::externally_accessible(&frontends);
    let internal_local = service.internal_policy == TrafficPolicy::Local;
    let external_local = external && service.external_policy == TrafficPolicy::Local;
    let usage = Usage {
        cluster: !internal_local || external,
        local: internal_local || external_local,
    };

    let mut notes = notes.port(port, family);
    let source_ranges = frontends::source_ranges(service, &frontends, family, node);
    let set = endpoints::categorize(port, family, slices, node, usage, &mut notes);
    let algorithm = service.algorithm.value().unwrap_or(options.algorithm);
    let selection = match algorithm {
        Algorithm::Random => Selection::Random,
        Algorithm::Maglev => Selection::Maglev {
            seed: options.maglev.seed,
            slots: options.maglev.size(set.backends.len()),
        },
    };
    DesiredPort {
        key,
        frontends,
        selection,
        backends: set.backends,
        internal_local,
        external_local,
        has_any: set.has_any,
        affinity_seconds: service.affinity_seconds,
        source_ranges,
    }
}
