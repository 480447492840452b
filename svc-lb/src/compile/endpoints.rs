//! Which endpoints may serve which clients (SEMANTICS 1.1).

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
};

use svc_lb_common::Family;

use super::{
    CompileOptions,
    desired::Backend,
    notes::{Notes, PortNotes, Reason, TopologyMode},
};
use crate::model::{
    Annotated, Conditions, Endpoint, EndpointSlice, Hints, NodeFacts, Service, ServicePort,
    family_of, protocol_name,
};

/// Which sets the frontends of a port need.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    pub(super) cluster: bool,
    pub(super) local: bool,
}

/// The backends of one port in one family.
#[derive(Debug)]
pub(super) struct BackendSet {
    /// Sorted by address.
    pub(super) backends: Vec<Backend>,
    /// Some endpoint in the cluster is ready, or serving while it terminates.
    pub(super) has_any: bool,
}

/// The slices that may be used at all, by name.
pub(super) fn usable<'a>(
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    options: &CompileOptions,
    notes: &mut Notes,
) -> Vec<&'a EndpointSlice> {
    let mut usable = Vec::new();
    for slice in slices {
        let name = || slice.name.clone();
        if slice.proxy_name != options.proxy_name {
            let label = slice.proxy_name.clone();
            notes.service(Reason::ForeignSlice {
                slice: name(),
                label,
            });
        } else if slice.headless {
            notes.service(Reason::HeadlessSlice { slice: name() });
        } else if slice.family.is_none() {
            notes.service(Reason::HostNameSlice { slice: name() });
        } else {
            usable.push(slice);
        }
    }
    usable.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    usable
}

/// Says which endpoints and which ports of slices are not used as they stand.
pub(super) fn note_unused(slices: &[&EndpointSlice], notes: &mut Notes) {
    for slice in slices {
        if let Annotated::Unreadable(value) = &slice.weight {
            notes.service(Reason::UnreadableWeight {
                slice: slice.name.clone(),
                value: value.clone(),
            });
        }
        for port in &slice.ports {
            if port.name.is_none() {
                notes.service(Reason::UnnamedSlicePort {
                    slice: slice.name.clone(),
                });
            }
            if port.port.is_none() {
                notes.service(Reason::UnnumberedSlicePort {
                    slice: slice.name.clone(),
                });
            }
        }
        for endpoint in &slice.endpoints {
            let ip = endpoint.address;
            let Conditions {
                ready,
                serving,
                terminating,
            } = endpoint.conditions;
            if slice.weight.value() == Some(0) {
                notes.service(Reason::EndpointQuarantined { ip });
                continue;
            }
            if ready {
                continue;
            }
            notes.service(if terminating {
                Reason::EndpointTerminating { ip, serving }
            } else {
                Reason::EndpointNotReady { ip }
            });
        }
    }
}

/// Merges the slices' endpoints for one port and sorts them into the sets.
pub(super) fn categorize(
    port: &ServicePort,
    family: Family,
    slices: &[&EndpointSlice],
    node: &NodeFacts,
    usage: Usage,
    notes: &mut PortNotes<'_>,
) -> BackendSet {
    let candidates = merge(port, family, slices, node);
    if candidates.is_empty() {
        notes.add(why_empty(family, slices));
        return BackendSet {
            backends: Vec::new(),
            has_any: false,
        };
    }
    let has_any = candidates.iter().any(|c| c.ready() || c.drains());
    let in_cluster = Selector::cluster(&candidates, node, usage.cluster);
    let in_local = Selector::local(&candidates, usage.local);
    let backends: Vec<Backend> = candidates
        .iter()
        .map(|candidate| Backend {
            address: candidate.address,
            in_cluster: in_cluster.picks(candidate, node),
            in_local: in_local.picks(candidate, node),
            serving: candidate.conditions.serving || candidate.conditions.ready,
            local: candidate.local,
            weight: candidate.weight,
        })
        .collect();
    if has_any {
        note_sets(&candidates, &backends, in_cluster, usage, notes);
    } else {
        notes.add(Reason::NoneUsable);
    }
    BackendSet { backends, has_any }
}

/// How many endpoints of this node are ready for any port of a Service. Endpoints that serve
/// while they terminate are not: clients are to be kept away from them in time (SEMANTICS D3).
pub(super) fn ready_here(
    service: &Service,
    family: Family,
    slices: &[&EndpointSlice],
    node: &NodeFacts,
) -> u32 {
    let ready: BTreeSet<IpAddr> = service
        .ports
        .iter()
        .flat_map(|port| merge(port, family, slices, node))
        .filter(|candidate| candidate.local && candidate.ready())
        .map(|candidate| candidate.address.ip())
        .collect();
    u32::try_from(ready.len()).unwrap_or(u32::MAX)
}

/// One endpoint as a backend of the port at hand.
#[derive(Clone, Copy, Debug)]
struct Candidate<'a> {
    address: SocketAddr,
    conditions: Conditions,
    local: bool,
    hints: Option<&'a Hints>,
    weight: u16,
}

impl Candidate<'_> {
    fn new<'a>(
        endpoint: &'a Endpoint,
        port: NonZeroU16,
        weight: u16,
        node: &NodeFacts,
    ) -> Candidate<'a> {
        Candidate {
            weight,
            address: SocketAddr::new(endpoint.address, port.get()),
            conditions: endpoint.conditions,
            local: endpoint.node.as_deref() == Some(node.name.as_str()),
            hints: endpoint.hints.as_deref(),
        }
    }

    /// Takes new flows. One in quarantine does not, whatever its condition (SEMANTICS D9).
    fn ready(&self) -> bool {
        self.conditions.ready && self.weight > 0
    }

    /// Serves on while it terminates.
    fn drains(&self) -> bool {
        self.conditions.serving && self.conditions.terminating && self.weight > 0
    }

    /// Which of two entries for one address stands: the local one (SEMANTICS A7), then the more
    /// usable one; the first where they are equal.
    fn preference(&self) -> (bool, bool, bool) {
        (self.local, self.ready(), self.drains())
    }

    fn meant_for_node(&self, node: &NodeFacts) -> bool {
        self.hints
            .is_some_and(|hints| hints.nodes.iter().any(|name| **name == *node.name))
    }

    fn meant_for_zone(&self, node: &NodeFacts) -> bool {
        let Some(zone) = &node.zone else { return false };
        self.hints
            .is_some_and(|hints| hints.zones.iter().any(|name| **name == **zone))
    }
}

/// Endpoints of all slices whose port has the name and protocol, unique by address and port.
fn merge<'a>(
    port: &ServicePort,
    family: Family,
    slices: &[&'a EndpointSlice],
    node: &NodeFacts,
) -> Vec<Candidate<'a>> {
    let mut merged: BTreeMap<SocketAddr, Candidate<'a>> = BTreeMap::new();
    for slice in slices {
        let weight = slice.weight.value().unwrap_or(1);
        // The number may differ from slice to slice (SEMANTICS A6).
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name.as_ref() == Some(&port.name) && p.protocol == port.protocol)
            .filter_map(|p| p.port);
        for number in numbers {
            for endpoint in slice
                .endpoints
                .iter()
                .filter(|e| family_of(e.address) == family)
            {
                let candidate = Candidate::new(endpoint, number, weight, node);
                match merged.entry(candidate.address) {
                    Entry::Vacant(entry) => {
                        entry.insert(candidate);
                    }
                    Entry::Occupied(mut entry) => {
                        if candidate.preference() > entry.get().preference() {
                            entry.insert(candidate);
                        }
                    }
                }
            }
        }
    }
    merged.into_values().collect()
}

/// Which candidates are in one set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Selector {
    /// The set is not used.
    None,
    /// Ready ones, everywhere or where hints say.
    Ready(Option<TopologyMode>),
    /// Ready ones on this node.
    LocalReady,
    /// Those that drain, hints ignored.
    Draining,
    /// Those that drain on this node.
    LocalDraining,
}

impl Selector {
    fn cluster(candidates: &[Candidate<'_>], node: &NodeFacts, used: bool) -> Self {
        if !used {
            return Self::None;
        }
        if candidates.iter().any(Candidate::ready) {
            return Self::Ready(topology_mode(candidates, node));
        }
        Self::Draining
    }

    fn local(candidates: &[Candidate<'_>], used: bool) -> Self {
        if !used {
            return Self::None;
        }
        if candidates.iter().any(|c| c.local && c.ready()) {
            return Self::LocalReady;
        }
        Self::LocalDraining
    }

    fn picks(self, candidate: &Candidate<'_>, node: &NodeFacts) -> bool {
        let ready = candidate.ready();
        match self {
            Self::None => false,
            Self::Ready(None) => ready,
            Self::Ready(Some(TopologyMode::Node)) => ready && candidate.meant_for_node(node),
            Self::Ready(Some(TopologyMode::Zone)) => ready && candidate.meant_for_zone(node),
            Self::LocalReady => ready && candidate.local,
            Self::Draining => candidate.drains(),
            Self::LocalDraining => candidate.drains() && candidate.local,
        }
    }
}

/// Hints count only where every ready endpoint has them and one names this node (SEMANTICS D5).
fn topology_mode(candidates: &[Candidate<'_>], node: &NodeFacts) -> Option<TopologyMode> {
    let ready = || candidates.iter().filter(|c| c.ready());
    if ready().all(|c| c.hints.is_some_and(|h| !h.nodes.is_empty()))
        && ready().any(|c| c.meant_for_node(node))
    {
        return Some(TopologyMode::Node);
    }
    if ready().all(|c| c.hints.is_some_and(|h| !h.zones.is_empty()))
        && ready().any(|c| c.meant_for_zone(node))
    {
        return Some(TopologyMode::Zone);
    }
    None
}

/// Says where the sets are not simply "all that are ready".
fn note_sets(
    candidates: &[Candidate<'_>],
    backends: &[Backend],
    in_cluster: Selector,
    usage: Usage,
    notes: &mut PortNotes<'_>,
) {
    let ready = candidates.iter().filter(|c| c.ready()).count();
    if ready == 0 {
        notes.add(Reason::TerminatingFallback);
    }
    if usage.local && !backends.iter().any(|backend| backend.in_local) {
        notes.add(Reason::NoLocalEndpoints);
    }
    let used = backends.iter().filter(|backend| backend.in_cluster).count();
    if let Selector::Ready(Some(mode)) = in_cluster
        && used < ready
    {
        notes.add(Reason::Topology { mode, used, ready });
    }
}

/// Says why a port has no candidates: none at all, or none with this port.
fn why_empty(family: Family, slices: &[&EndpointSlice]) -> Reason {
    let of_family = || {
        slices
            .iter()
            .filter(|s| s.endpoints.iter().any(|e| family_of(e.address) == family))
    };
    if of_family().next().is_none() {
        return Reason::NoEndpoints;
    }
    let offered: BTreeSet<String> = of_family()
        .flat_map(|slice| &slice.ports)
        .map(|port| {
            let name = port.name.as_deref().unwrap_or("(no name)");
            let name = if name.is_empty() {
                "(empty name)"
            } else {
                name
            };
            format!("{name}/{}", protocol_name(port.protocol))
        })
        .collect();
    Reason::NoSuchPort {
        offered: offered.into_iter().collect(),
    }
}
