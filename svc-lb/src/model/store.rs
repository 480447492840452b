//! The cluster's state, indexed by what a change concerns.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    change::{Edit, Kind, Object, ObjectKey},
    object::{Endpoint, EndpointSlice, NodeFacts, ObjectName, Service},
};

/// Services, their endpoints and this node.
///
/// `apply` says which Services a change concerns; only these need compiling again.
#[derive(Debug)]
pub struct Model {
    node: NodeFacts,
    node_leaves: bool,
    node_object_addresses: BTreeSet<IpAddr>,
    services: BTreeMap<ObjectName, Arc<Service>>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    /// Names of the slices of each Service, known or not.
    slices_of: BTreeMap<ObjectName, BTreeSet<String>>,
    /// Addresses of endpoints on this node, and how many endpoints have each.
    here: BTreeMap<IpAddr, usize>,
}

impl Model {
    /// An empty cluster, seen from the node called `node_name`.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            node: NodeFacts {
                name: node_name.into(),
                zone: None,
                addresses: BTreeSet::new(),
            },
            node_leaves: false,
            node_object_addresses: BTreeSet::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_of: BTreeMap::new(),
            here: BTreeMap::new(),
        }
    }

    /// Applies edits; returns the Services that must be compiled again, known, unknown or gone.
    ///
    /// Objects that are as they were concern nobody. Pods and v1 Endpoints are for the standalone
    /// control plane and are ignored here.
    pub fn apply(&mut self, edits: impl IntoIterator<Item = Edit>) -> BTreeSet<ObjectName> {
        let mut affected = BTreeSet::new();
        for edit in edits {
            match edit {
                Edit::Upsert(Object::Service(service)) => {
                    self.upsert_service(service, &mut affected);
                }
                Edit::Upsert(Object::EndpointSlice(slice)) => {
                    self.upsert_slice(slice, &mut affected);
                }
                Edit::Upsert(Object::Node(node)) if node.name == self.node.name => {
                    self.node_leaves = node.leaves;
                    self.node_object_addresses = node.addresses;
                    self.set_zone(node.zone, &mut affected);
                }
                Edit::Upsert(Object::Node(_) | Object::Pod(_) | Object::Endpoints(_)) => {}
                Edit::Delete(key) => self.delete(key, &mut affected),
            }
        }
        affected
    }

    /// Says which addresses the node has; returns the Services that must be compiled again: whether
    /// a source range holds one of them matters (SEMANTICS B7).
    pub fn set_node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> BTreeSet<ObjectName> {
        if self.node.addresses == *addresses {
            return BTreeSet::new();
        }
        self.node.addresses.clone_from(addresses);
        let restricted = |service: &&Service| !service.source_ranges.is_empty();
        let services = self.services().filter(restricted);
        services.map(|service| service.name.clone()).collect()
    }

    /// The node's facts.
    #[must_use]
    pub fn node(&self) -> &NodeFacts {
        &self.node
    }

    /// The node is about to be deleted, as its Node object said last (SEMANTICS G7).
    #[must_use]
    pub fn node_leaves(&self) -> bool {
        self.node_leaves
    }

    /// What the cluster knows the node by, as its Node object said last; empty without one.
    #[must_use]
    pub fn node_object_addresses(&self) -> &BTreeSet<IpAddr> {
        &self.node_object_addresses
    }

    /// The Service of that name.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(|service| &**service)
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(|service| &**service)
    }

    /// The slices of a Service, by name; also of a Service that is not known.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        let names = self.slices_of.get(service).into_iter().flatten();
        let namespace = service.namespace.clone();
        names.filter_map(move |name| {
            self.slices
                .get(&ObjectName::new(namespace.clone(), name.clone()))
        })
    }

    /// Addresses of endpoints on this node, whatever their condition.
    pub fn endpoints_here(&self) -> impl Iterator<Item = IpAddr> {
        self.here.keys().copied()
    }

    fn count_endpoints(&mut self, slice: &EndpointSlice, leaves: bool) {
        let local = |endpoint: &&Endpoint| endpoint.node.as_deref() == Some(&*self.node.name);
        for endpoint in slice.endpoints.iter().filter(local) {
            let count = self.here.entry(endpoint.address).or_default();
            if leaves {
                *count -= 1;
            } else {
                *count += 1;
            }
            if *count == 0 {
                self.here.remove(&endpoint.address);
            }
        }
    }

    fn upsert_service(&mut self, service: Arc<Service>, affected: &mut BTreeSet<ObjectName>) {
        if self.services.get(&service.name) == Some(&service) {
            return;
        }
        affected.insert(service.name.clone());
        self.services.insert(service.name.clone(), service);
    }

    fn upsert_slice(&mut self, slice: EndpointSlice, affected: &mut BTreeSet<ObjectName>) {
        if self.slices.get(&slice.name) == Some(&slice) {
            return;
        }
        self.remove_slice(&slice.name, affected);
        // Without a Service's name nobody can look it up (SEMANTICS A7).
        let Some(owner) = slice.owner() else { return };
        affected.insert(owner.clone());
        self.slices_of
            .entry(owner)
            .or_default()
            .insert(slice.name.name.clone());
        self.count_endpoints(&slice, false);
        self.slices.insert(slice.name.clone(), slice);
    }

    fn remove_slice(&mut self, name: &ObjectName, affected: &mut BTreeSet<ObjectName>) {
        let Some(slice) = self.slices.remove(name) else {
            return;
        };
        self.count_endpoints(&slice, true);
        let Some(owner) = slice.owner() else { return };
        if let Some(names) = self.slices_of.get_mut(&owner) {
            names.remove(&name.name);
            if names.is_empty() {
                self.slices_of.remove(&owner);
            }
        }
        affected.insert(owner);
    }

    /// A zone decides only where there are hints (SEMANTICS D8).
    fn set_zone(&mut self, zone: Option<String>, affected: &mut BTreeSet<ObjectName>) {
        if self.node.zone == zone {
            return;
        }
        self.node.zone = zone;
        let hinted = |slice: &&EndpointSlice| slice.endpoints.iter().any(|e| e.hints.is_some());
        affected.extend(
            self.slices
                .values()
                .filter(hinted)
                .filter_map(EndpointSlice::owner),
        );
    }

    fn delete(&mut self, key: ObjectKey, affected: &mut BTreeSet<ObjectName>) {
        let ObjectKey { kind, name } = key;
        match kind {
            Kind::Service => {
                if self.services.remove(&name).is_some() {
                    affected.insert(name);
                }
            }
            Kind::EndpointSlice => self.remove_slice(&name, affected),
            Kind::Node if name.name == self.node.name => {
                self.node_object_addresses.clear();
                self.set_zone(None, affected);
            }
            Kind::Node | Kind::Pod | Kind::Endpoints => {}
        }
    }
}
