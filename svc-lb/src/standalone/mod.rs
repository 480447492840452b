//! The part of a control plane that manifests need where there is none: for the sources
//! `manifests` and `stream` only.
//!
//! Sits between the lists and the model: Pods and v1 Endpoints become `EndpointSlices`, Services
//! without addresses get them. Whatever an object already says is left alone, so that objects of
//! a real cluster pass unchanged.

mod allocate;
mod members;
mod pool;
mod slices;
mod state;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
};

use ipnet::IpNet;
use tracing::warn;

pub use self::state::Error;
use self::{allocate::Allocator, members::Members, state::StateFile};
use crate::{
    model::{
        Edit, EndpointSlice, Endpoints, Kind, Object, ObjectKey, ObjectName, Pod, Service,
        ServiceType,
    },
    source::{Problem, Severity},
};

/// Where values come from and where they are kept.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--service-cidr`: ranges for ClusterIPs; the first one's family is the preferred one.
    pub service_cidrs: Vec<IpNet>,
    /// `--node-port-range`.
    pub node_ports: RangeInclusive<u16>,
    /// `--lb-pool`: ranges for load balancer addresses; without any, none is handed out.
    pub lb_pools: Vec<IpNet>,
    /// `--state-dir`: where handed out values are kept; without it they are found again by hash
    /// alone, which differs only where two Services hash alike.
    pub state_dir: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            service_cidrs: Vec::new(),
            node_ports: 30_000..=32_767,
            lb_pools: Vec::new(),
            state_dir: None,
        }
    }
}

/// Stands in for the control plane of a cluster.
#[derive(Debug)]
pub struct Standalone {
    allocator: Allocator,
    state: Option<StateFile>,
    /// Values could not be kept.
    unkept: Option<Problem>,
    started: bool,
    /// As their authors wrote them.
    services: BTreeMap<ObjectName, Arc<Service>>,
    pods: BTreeMap<ObjectName, Pod>,
    members: Members,
    endpoints: BTreeMap<ObjectName, Endpoints>,
    /// Which Service each slice that somebody else made belongs to.
    foreign_slices: BTreeMap<ObjectName, ObjectName>,
    /// How many such slices a Service has.
    foreign_count: BTreeMap<ObjectName, usize>,
    /// Slices made here, by Service.
    made: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
}

/// What a batch of edits touches.
#[derive(Debug, Default)]
struct Touched {
    /// Services that are other Services now.
    services: BTreeSet<ObjectName>,
    /// Services whose endpoints may be others.
    endpoints: BTreeSet<ObjectName>,
}

impl Standalone {
    /// Reads what an earlier run handed out.
    ///
    /// # Errors
    /// When the state directory cannot be used, or its file is damaged.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let state = config
            .state_dir
            .as_deref()
            .map(StateFile::open)
            .transpose()?;
        let kept = state
            .as_ref()
            .map(StateFile::load)
            .transpose()?
            .unwrap_or_default();
        Ok(Self {
            allocator: Allocator::new(config, kept),
            state,
            unkept: None,
            started: false,
            services: BTreeMap::new(),
            pods: BTreeMap::new(),
            members: Members::default(),
            endpoints: BTreeMap::new(),
            foreign_slices: BTreeMap::new(),
            foreign_count: BTreeMap::new(),
            made: BTreeMap::new(),
        })
    }

    /// Turns edits of what users wrote into edits of what the model takes.
    ///
    /// The first edits must be all of the complete lists: values of Services that are not among
    /// them are given up. Writes the state file when values change, before they take effect.
    pub fn apply(&mut self, edits: Vec<Edit>) -> Vec<Edit> {
        if edits.is_empty() {
            return edits;
        }
        let mut touched = Touched::default();
        let mut out = Vec::new();
        for edit in edits {
            match edit {
                Edit::Upsert(object) => self.upsert(object, &mut touched, &mut out),
                Edit::Delete(key) => self.delete(key, &mut touched, &mut out),
            }
        }
        let valued = self.allocate(&touched.services);
        touched.endpoints.extend(touched.services);
        touched.endpoints.extend(valued.iter().cloned());
        for name in valued {
            if let Some(service) = self.services.get(&name) {
                let complete = self.allocator.complete(service);
                out.push(Edit::Upsert(Object::Service(complete)));
            }
        }
        for name in touched.endpoints {
            self.make_slices(name, &mut out);
        }
        out
    }

    /// Values that could not be handed out or kept.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.allocator.problems().chain(&self.unkept)
    }

    fn upsert(&mut self, object: Object, touched: &mut Touched, out: &mut Vec<Edit>) {
        match object {
            Object::Service(service) => {
                let name = service.name.clone();
                if self.services.get(&name) == Some(&service) {
                    return;
                }
                self.members.set_service(&service, &self.pods);
                self.services.insert(name.clone(), service);
                touched.services.insert(name);
            }
            Object::Pod(pod) => {
                if self.pods.get(&pod.name) == Some(&*pod) {
                    return;
                }
                let name = pod.name.clone();
                let old = self.pods.insert(name.clone(), *pod);
                let new = self.pods.get(&name);
                self.members
                    .change_pod(old.as_ref(), new, &mut touched.endpoints);
            }
            Object::Endpoints(endpoints) => {
                touched.endpoints.insert(endpoints.name.clone());
                self.endpoints.insert(endpoints.name.clone(), endpoints);
            }
            Object::EndpointSlice(slice) => {
                self.set_foreign(&slice.name, slice.owner(), touched);
                out.push(Edit::Upsert(Object::EndpointSlice(slice)));
            }
            Object::Node(node) => out.push(Edit::Upsert(Object::Node(node))),
        }
    }

    fn delete(&mut self, key: ObjectKey, touched: &mut Touched, out: &mut Vec<Edit>) {
        match key.kind {
            Kind::Service => {
                self.services.remove(&key.name);
                self.members.remove_service(&key.name);
                touched.services.insert(key.name.clone());
                out.push(Edit::Delete(key));
            }
            Kind::Pod => {
                let old = self.pods.remove(&key.name);
                self.members
                    .change_pod(old.as_ref(), None, &mut touched.endpoints);
            }
            Kind::Endpoints => {
                self.endpoints.remove(&key.name);
                touched.endpoints.insert(key.name);
            }
            Kind::EndpointSlice => {
                self.set_foreign(&key.name, None, touched);
                out.push(Edit::Delete(key));
            }
            Kind::Node => out.push(Edit::Delete(key)),
        }
    }

    /// Counts the slices of each Service that others made; where there are any, none is made here.
    fn set_foreign(
        &mut self,
        slice: &ObjectName,
        owner: Option<ObjectName>,
        touched: &mut Touched,
    ) {
        let previous = match owner.clone() {
            Some(owner) => self.foreign_slices.insert(slice.clone(), owner),
            None => self.foreign_slices.remove(slice),
        };
        if previous == owner {
            return;
        }
        if let Some(previous) = previous
            && let Some(count) = self.foreign_count.get_mut(&previous)
        {
            *count -= 1;
            if *count == 0 {
                self.foreign_count.remove(&previous);
                touched.endpoints.insert(previous);
            }
        }
        if let Some(owner) = owner {
            *self.foreign_count.entry(owner.clone()).or_default() += 1;
            touched.endpoints.insert(owner);
        }
    }

    fn allocate(&mut self, changed: &BTreeSet<ObjectName>) -> BTreeSet<ObjectName> {
        if !self.started {
            self.started = true;
            self.allocator.forget_all_but(changed);
        }
        if changed.is_empty() && self.unkept.is_none() {
            return BTreeSet::new();
        }
        let services = &self.services;
        let valued = self
            .allocator
            .update(changed, |name| services.get(name).map(|service| &**service));
        self.keep();
        valued
    }

    fn keep(&mut self) {
        let Some(state) = &self.state else { return };
        let Some(kept) = self.allocator.take_changed() else {
            return;
        };
        self.unkept = state.save(kept).err().map(|error| {
            self.allocator.keep_again();
            warn!(%error, "handed out addresses and ports are not kept");
            Problem {
                severity: Severity::Error,
                place: state.path().display().to_string(),
                object: None,
                field: None,
                message: error.to_string(),
            }
        });
    }

    /// Makes the slices of a Service anew and takes away those that it no longer has.
    fn make_slices(&mut self, name: ObjectName, out: &mut Vec<Edit>) {
        let slices = self.slices_of(&name);
        let names: BTreeSet<ObjectName> = slices.iter().map(|slice| slice.name.clone()).collect();
        out.extend(
            slices
                .into_iter()
                .map(|slice| Edit::Upsert(Object::EndpointSlice(slice))),
        );
        let previous = if names.is_empty() {
            self.made.remove(&name)
        } else {
            self.made.insert(name, names.clone())
        };
        for gone in previous
            .into_iter()
            .flatten()
            .filter(|slice| !names.contains(slice))
        {
            out.push(Edit::Delete(ObjectKey {
                kind: Kind::EndpointSlice,
                name: gone,
            }));
        }
    }

    fn slices_of(&self, name: &ObjectName) -> Vec<EndpointSlice> {
        let Some(service) = self.services.get(name) else {
            return Vec::new();
        };
        let ignored = service.headless
            || service.service_type == ServiceType::ExternalName
            || self.foreign_count.contains_key(name);
        if ignored {
            return Vec::new();
        }
        if service.selector.is_empty() {
            let endpoints = self
                .endpoints
                .get(name)
                .filter(|endpoints| !endpoints.skip_mirror);
            return endpoints
                .map(|e| slices::mirrored(service, e))
                .unwrap_or_default();
        }
        let pods = self.members.of(name).filter_map(|pod| self.pods.get(pod));
        slices::selected(service, pods)
    }
}
