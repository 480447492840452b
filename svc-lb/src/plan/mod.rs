//! Diffs what is desired against what is programmed, and gives ids.
//!
//! Pure and deterministic: knows neither aya nor kube, and writes through [`Dataplane`] only. Per
//! service port the [`Planner`] keeps the service index, the backends' ids, the slot ranges, and
//! what is known to be in the maps. [`apply`] makes a [`Plan`] of what changed, does its phases
//! and tells the planner after each; a phase that fails leaves the rest pending, and what it may
//! have done is known to be unknown, so that the next plan makes it certain. [`reclaim`] waits out
//! a grace period and gives the numbers back that left. [`sweep`] clears guard bits behind which
//! nothing lives any more.
//!
//! The cost of a plan follows the change: a service that nothing was said about is not looked at.

mod audit;
mod delta;
mod frontends;
mod guard;
mod ids;
mod phases;
mod refusal;
mod restore;
mod slots;
mod source_ranges;
pub mod view;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;
use svc_lb_common::service::{Range, Service, kind};
use svc_lb_common::{Family, Protocol, guard as guard_bits};

pub use self::audit::{AUDITED, Audit, Drift, repair};
pub use self::phases::{ApplyError, Batch, Op, Phase, Plan, Set, execute};
pub use self::refusal::{Refusal, Table};
pub use self::restore::Damage;

use self::delta::{Element, Held, Port, clear_options, footprint, set_of};
use self::frontends::{Difference, Frontends};
use self::guard::Guard;
use self::ids::{IdPool, RunPool};
use self::phases::Draft;
use self::refusal::Shortage;
use self::restore::Restored;
use self::slots::{Member, slots_of};
use self::source_ranges::SourceRanges;
use crate::compile::desired::{DesiredPort, Frontend, FrontendAddress, FrontendKind, PortKey};
use crate::dataplane::{
    Dataplane, FAMILIES, FlowClock, FrontendAt, GuardBit, PerFamily, Result, Sizes, Timeouts,
};
use crate::model::ObjectName;

/// What is desired of one service port, and what it has.
#[derive(Clone, Debug, Default)]
struct Named {
    desired: Option<Arc<DesiredPort>>,
    index: Option<u32>,
    /// What it has claimed, sorted.
    claims: Vec<(FrontendAt, u8)>,
    refusal: Option<Box<Refusal>>,
}

/// What becomes free when a grace period is over.
#[derive(Clone, Debug, Default)]
struct Retired {
    indexes: Vec<u32>,
    backends: PerFamily<Vec<u32>>,
    ranges: Vec<Range>,
    guard: Vec<GuardBit>,
    /// The maps hold nothing unclaimed any more, so a guard bit that stands for nothing is left
    /// over from before the restart.
    find_unheld: bool,
}

/// How full a table is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct TableUse {
    /// The map's name.
    pub table: &'static str,
    /// Elements in use, those that wait for a grace period included.
    pub used: u32,
    /// Elements it has.
    pub limit: u32,
}

/// A grace period that somebody has to wait for; see [`Planner::seal`].
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Epoch(u64);

/// Knows what is desired and what is programmed, and plans the way from one to the other.
#[derive(Clone, Debug)]
pub struct Planner {
    sizes: Sizes,
    indexes: IdPool,
    backends: PerFamily<IdPool>,
    /// Of the ids that are free, by id; 0 beyond the end.
    generations: PerFamily<Vec<u16>>,
    slots: RunPool,
    guard: Guard,
    frontends: Frontends,
    source_ranges: SourceRanges,
    named: BTreeMap<Arc<PortKey>, Named>,
    ports: BTreeMap<u32, Port>,
    /// Words of free indexes that are not all zero.
    idle: BTreeMap<u32, Service>,
    sources: BTreeSet<IpAddr>,
    node: BTreeSet<IpAddr>,
    node_claimed: BTreeSet<IpAddr>,
    node_dirty: bool,
    /// Ports to be looked at.
    dirty: BTreeSet<Arc<PortKey>>,
    /// Ports in the plan that is being done.
    planned: BTreeSet<Arc<PortKey>>,
    /// Indexes that are free once that plan is done.
    removing: BTreeSet<u32>,
    refused: BTreeSet<Arc<PortKey>>,
    /// Something became free since refused ports were last looked at.
    room: bool,
    restored: Option<Restored>,
    damage: Damage,
    epoch: u64,
    retired: BTreeMap<u64, Retired>,
}

/// What a port needs that it does not have, taken for it.
struct Admission {
    new: Vec<Held>,
    /// For the Cluster and the Local set.
    aims: [Aim; 2],
}

/// What a set is to hold, and where the fresh range for it starts, if it needs one.
struct Aim {
    ids: Vec<u32>,
    start: Option<u32>,
}

impl Planner {
    /// A planner for empty maps.
    #[must_use]
    pub fn new(sizes: Sizes) -> Self {
        let words = vec![0; sizes.guard_words as usize];
        let ports = vec![0; svc_lb_common::guard::PORT_WORDS as usize];
        Self {
            sizes,
            indexes: IdPool::new(sizes.services),
            backends: PerFamily::from_fn(|family| IdPool::new(*sizes.backends.of(family))),
            generations: PerFamily::default(),
            slots: RunPool::new(sizes.slots),
            guard: Guard::new(words, ports),
            frontends: Frontends::new(sizes.guard_words),
            source_ranges: SourceRanges::default(),
            named: BTreeMap::new(),
            ports: BTreeMap::new(),
            idle: BTreeMap::new(),
            sources: BTreeSet::new(),
            node: BTreeSet::new(),
            node_claimed: BTreeSet::new(),
            node_dirty: false,
            dirty: BTreeSet::new(),
            planned: BTreeSet::new(),
            removing: BTreeSet::new(),
            refused: BTreeSet::new(),
            room: false,
            restored: None,
            damage: Damage::default(),
            epoch: 0,
            retired: BTreeMap::new(),
        }
    }

    /// Says what one Service wants: all of its ports, in both families. Ports of the service that
    /// are not among them go.
    pub fn set_service(&mut self, service: &ObjectName, ports: Vec<DesiredPort>) {
        let mut gone: BTreeSet<_> = self.keys_of(service);
        for mut port in ports {
            normalize(&mut port);
            gone.remove(&port.key);
            let key = Arc::new(port.key.clone());
            let named = self.named.entry(Arc::clone(&key)).or_default();
            if named.desired.as_deref() != Some(&port) {
                named.desired = Some(Arc::new(port));
                self.dirty.insert(key);
            }
        }
        for key in gone {
            self.forget(key);
        }
    }

    /// Says that a Service is gone.
    pub fn remove_service(&mut self, service: &ObjectName) {
        self.set_service(service, Vec::new());
    }

    /// Says which of the node's addresses serve NodePorts. After a restart, those that were
    /// programmed stay until this is said.
    pub fn set_node_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.node = addresses
            .into_iter()
            .filter(|address| !address.is_unspecified())
            .collect();
        self.node_dirty = true;
        self.frontends.node_is_known();
    }

    /// Says which addresses translated sources may have: answers to them must get past the guard.
    pub fn set_sources(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let sources: BTreeSet<IpAddr> = addresses.into_iter().collect();
        let words = self.sizes.guard_words;
        let bit = |address: &IpAddr| GuardBit::address(*address, guard_bits::NODE, words);
        for new in sources.difference(&self.sources) {
            self.guard.hold(bit(new));
        }
        for gone in self.sources.difference(&sources) {
            self.guard.release(bit(gone));
        }
        self.sources = sources;
    }

    /// Says that the initial lists are complete: what is programmed and was not claimed until now
    /// goes with the next plan. Without a restart there is nothing of the kind.
    pub fn remove_unclaimed(&mut self) {
        if let Some(restored) = &mut self.restored {
            restored.remove_unclaimed = true;
        }
    }

    /// Whether a plan would not be empty, as far as can be told without making it.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        !self.dirty.is_empty()
            || !self.planned.is_empty()
            || !self.guard.to_set().is_empty()
            || self.frontends.is_dirty()
            || self.source_ranges.is_dirty()
            || self.node_dirty
            || self.room && !(self.refused.is_empty() && self.node == self.node_claimed)
            || self
                .restored
                .as_ref()
                .is_some_and(|restored| restored.removes(self.frontends.knows_node()))
    }

    /// Plans everything that is pending. Numbers are given here and kept, so a plan that is not
    /// done, or not in full, is made again from the same numbers.
    pub fn plan(&mut self) -> Plan {
        self.dirty.append(&mut self.planned);
        self.removing.clear();
        if std::mem::take(&mut self.room) {
            self.dirty.extend(self.refused.iter().cloned());
            self.node_dirty = true;
        }
        let mut draft = Draft::default();
        if std::mem::take(&mut self.node_dirty) {
            self.plan_node_addresses();
        }
        self.planned = std::mem::take(&mut self.dirty);
        let keys: Vec<_> = self.planned.iter().cloned().collect();
        self.collect_bids(&keys);
        for key in &keys {
            self.plan_named(key, &mut draft);
        }
        self.plan_unclaimed(&mut draft);
        self.plan_source_ranges(&mut draft);
        self.plan_frontends(&mut draft);
        let bits: Vec<_> = self.guard.to_set().iter().copied().collect();
        if !bits.is_empty() {
            draft.push(Phase::Guard, Op::SetGuard(bits));
        }
        draft.finish()
    }

    /// A phase was done.
    pub fn commit(&mut self, batch: &Batch) {
        for op in &batch.ops {
            self.commit_op(op);
        }
    }

    /// A phase was not done, or only in part: what it wrote is unknown until it is written again.
    pub fn fail(&mut self, batch: &Batch) {
        for op in &batch.ops {
            self.fail_op(op);
        }
    }

    /// All phases of the latest plan were done.
    pub fn finish(&mut self) {
        self.planned.clear();
        for index in std::mem::take(&mut self.removing) {
            self.drop_port(index);
        }
        self.source_ranges.settled();
        let bits = self.frontends.settled();
        let removed = self
            .restored
            .take_if(|restored| restored.removal_planned)
            .is_some();
        let find_unheld = removed && self.frontends.knows_node();
        if removed && !find_unheld {
            self.restored = Some(Restored::only_nodes());
        }
        let retired = self.retire();
        retired.guard.extend(bits);
        retired.find_unheld |= find_unheld;
        self.drop_empty_epoch();
    }

    /// Starts a grace period: what was retired until now is free when the programs that run now
    /// have ended, and [`Planner::reclaim`] was told so. `None` if nothing was.
    pub fn seal(&mut self) -> Option<Epoch> {
        self.retired.last_key_value()?;
        self.epoch += 1;
        Some(Epoch(self.epoch - 1))
    }

    /// A grace period is over.
    pub fn reclaim(&mut self, Epoch(epoch): Epoch) {
        let later = self.retired.split_off(&(epoch + 1));
        for retired in std::mem::replace(&mut self.retired, later).into_values() {
            let Retired {
                indexes,
                backends,
                ranges,
                guard,
                find_unheld,
            } = retired;
            self.room |= !indexes.is_empty()
                || !backends.v4.is_empty()
                || !backends.v6.is_empty()
                || !ranges.is_empty()
                || !guard.is_empty();
            for index in indexes {
                self.indexes.give_back(index);
            }
            for family in FAMILIES {
                for id in backends.of(family) {
                    self.backends.of_mut(family).give_back(*id);
                }
            }
            for range in ranges {
                self.slots
                    .give_back(range.start(), footprint(range.length()));
            }
            for bit in guard {
                self.guard.release(bit);
            }
            if find_unheld {
                self.guard.find_unheld();
            }
        }
    }

    /// Guard bits behind which nothing is any more, but flows may be.
    #[must_use]
    pub const fn pending_clears(&self) -> &BTreeSet<GuardBit> {
        self.guard.to_clear()
    }

    /// Guard bits were cleared; or perhaps were, unless `certain`.
    pub fn cleared(&mut self, bits: &[GuardBit], certain: bool) {
        for bit in bits {
            self.guard.was_cleared(*bit, certain);
        }
    }

    /// What could not be programmed, or not as desired, sorted.
    #[must_use]
    pub fn refusals(&self) -> Vec<Refusal> {
        let nodes = self.node.difference(&self.node_claimed).map(|address| {
            let family = Family::of(*address);
            Refusal::NodeAddress {
                address: *address,
                table: Table::Frontends(family),
                limit: *self.sizes.frontends.of(family),
            }
        });
        let ports = self
            .refused
            .iter()
            .filter_map(|key| self.named.get(key)?.refusal.as_deref().cloned());
        let mut refusals: Vec<_> = ports
            .chain(self.frontends.conflicts())
            .chain(nodes)
            .collect();
        refusals.sort();
        refusals
    }

    /// Which service port has which index.
    #[must_use]
    pub fn names(&self) -> BTreeMap<u32, PortKey> {
        self.ports
            .iter()
            .filter_map(|(index, port)| Some((*index, PortKey::clone(port.key.as_ref()?))))
            .collect()
    }

    /// What was wrong with the maps at start.
    #[must_use]
    pub const fn damage(&self) -> Damage {
        self.damage
    }

    /// How full the tables are.
    #[must_use]
    pub fn table_uses(&self) -> Vec<TableUse> {
        let ids = |table: Table, pool: &IdPool, limit: u32| TableUse {
            table: table.name(),
            used: limit
                .saturating_sub(1)
                .saturating_sub(u32::try_from(pool.available()).unwrap_or(u32::MAX)),
            limit,
        };
        let mut uses = vec![
            ids(Table::Services, &self.indexes, self.sizes.services),
            TableUse {
                table: Table::Slots.name(),
                used: self.sizes.slots - self.slots.available(),
                limit: self.sizes.slots,
            },
        ];
        for family in FAMILIES {
            uses.push(TableUse {
                table: Table::Frontends(family).name(),
                used: self.frontends.used(family),
                limit: *self.sizes.frontends.of(family),
            });
            let pool = self.backends.of(family);
            let limit = *self.sizes.backends.of(family);
            uses.push(ids(Table::Backends(family), pool, limit));
            uses.push(TableUse {
                table: Table::SourceRanges(family).name(),
                used: self.source_ranges.used(family),
                limit: *self.sizes.source_ranges.of(family),
            });
        }
        uses
    }

    fn keys_of(&self, service: &ObjectName) -> BTreeSet<Arc<PortKey>> {
        let first = PortKey {
            namespace: service.namespace.clone(),
            service: service.name.clone(),
            port_name: String::new(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        };
        self.named
            .range::<PortKey, _>(first..)
            .map(|(key, _)| key)
            .take_while(|key| key.namespace == service.namespace && key.service == service.name)
            .cloned()
            .collect()
    }

    fn forget(&mut self, key: Arc<PortKey>) {
        if let Some(named) = self.named.get_mut(&key) {
            named.desired = None;
            self.dirty.insert(key);
        }
    }

    fn plan_node_addresses(&mut self) {
        let gone: Vec<_> = self.node_claimed.difference(&self.node).copied().collect();
        for address in gone {
            self.node_claimed.remove(&address);
            self.frontends.unclaim_node(address);
        }
        let new: Vec<_> = self.node.difference(&self.node_claimed).copied().collect();
        for address in new {
            let family = Family::of(address);
            let full = self.frontends.used(family) >= *self.sizes.frontends.of(family);
            if full && !self.frontends.is_used(&FrontendAt::address(address)) {
                continue;
            }
            self.node_claimed.insert(address);
            self.frontends.claim_node(address, &mut self.guard);
        }
    }

    fn plan_named(&mut self, key: &Arc<PortKey>, draft: &mut Draft) {
        let Some(named) = self.named.get(key) else {
            return;
        };
        let index = named.index;
        let Some(desired) = named.desired.clone() else {
            self.refused.remove(key);
            self.set_claims(key, Vec::new());
            match index {
                Some(index) => self.plan_removal(index, draft),
                None => {
                    self.named.remove(key);
                }
            }
            return;
        };
        let index = index.or_else(|| self.adopt(key, &desired));
        let refusal = match self.admit(key, index, &desired) {
            Ok((index, admission)) => {
                self.plan_port(key, index, &desired, admission, draft);
                None
            }
            Err(shortage) => {
                if let Some(index) = index {
                    self.plan_rest(key, index, &desired, draft);
                }
                Some(Box::new(shortage.of(key)))
            }
        };
        if refusal.is_some() {
            self.refused.insert(Arc::clone(key));
        } else {
            self.refused.remove(key);
        }
        if let Some(named) = self.named.get_mut(key) {
            named.refusal = refusal;
        }
    }

    /// What has no room to grow still shrinks: backends, frontends and source ranges that left go. It
    /// may end up admitting nobody, but never everybody.
    fn plan_rest(
        &mut self,
        key: &Arc<PortKey>,
        index: u32,
        desired: &DesiredPort,
        draft: &mut Draft,
    ) {
        let mut rest = desired.clone();
        if let Some(port) = self.ports.get(&index) {
            rest.backends
                .retain(|backend| port.find(backend.address).is_some());
        }
        if let Some(nets) = &mut rest.source_ranges {
            nets.retain(|net| self.source_ranges.is_used(index, *net));
        }
        let family = key.family;
        rest.frontends.retain(|frontend| {
            let (at, _) = claim_of(key, frontend);
            let address = FrontendAt::address(at.address);
            self.frontends.is_used(&at)
                && (at.address.is_unspecified() || self.frontends.is_used(&address))
                && at.family() == family
        });
        if let Ok((index, admission)) = self.admit(key, Some(index), &rest) {
            self.plan_port(key, index, &rest, admission, draft);
        }
    }

    /// Takes everything that `desired` needs and does not have, or nothing.
    fn admit(
        &mut self,
        key: &Arc<PortKey>,
        index: Option<u32>,
        desired: &DesiredPort,
    ) -> Result<(u32, Admission), Shortage> {
        let full = |table: Table, needed: usize, free: usize, limit: u32| Shortage::Table {
            table,
            needed: needed as u64,
            free: free as u64,
            limit,
        };
        let family = key.family;
        let places: BTreeSet<FrontendAt> = desired
            .frontends
            .iter()
            .map(|frontend| claim_of(key, frontend).0)
            .flat_map(|at| [Some(at), address_entry(&at)])
            .flatten()
            .filter(|at| !self.frontends.is_used(at))
            .collect();
        let limit = *self.sizes.frontends.of(family);
        let free = limit.saturating_sub(self.frontends.used(family)) as usize;
        if places.len() > free {
            return Err(full(Table::Frontends(family), places.len(), free, limit));
        }
        let known =
            |net: &IpNet| index.is_some_and(|index| self.source_ranges.is_used(index, *net));
        let nets = desired.source_ranges.iter().flatten();
        let needed = nets.filter(|net| !known(net)).count();
        let limit = *self.sizes.source_ranges.of(family);
        let free = limit.saturating_sub(self.source_ranges.used(family)) as usize;
        if needed > free {
            return Err(full(Table::SourceRanges(family), needed, free, limit));
        }
        let port = index.and_then(|index| self.ports.get(&index));
        let new: Vec<SocketAddr> = desired
            .backends
            .iter()
            .map(|backend| backend.address)
            .filter(|address| port.is_none_or(|port| port.find(*address).is_none()))
            .collect();
        let limit = *self.sizes.backends.of(family);
        let pool = self.backends.of_mut(family);
        if new.len() > pool.available() {
            let free = pool.available();
            return Err(full(Table::Backends(family), new.len(), free, limit));
        }
        let (index, fresh) = match index {
            Some(index) => (index, false),
            None => match self.indexes.take() {
                Some(index) => (index, true),
                None => return Err(full(Table::Services, 1, 0, self.sizes.services)),
            },
        };
        let generations = self.generations.of(family);
        let new: Vec<Held> = new
            .into_iter()
            .zip(std::iter::from_fn(|| pool.take()))
            .map(|(address, id)| Held {
                address,
                id,
                generation: generations.get(id as usize).copied().unwrap_or(0),
                element: Element::Unwritten,
            })
            .collect();
        match self.admit_slots(index, desired, &new) {
            Ok(aims) => {
                if fresh {
                    self.open_port(key, index);
                }
                Ok((index, Admission { new, aims }))
            }
            Err(shortage) => {
                let pool = self.backends.of_mut(family);
                for held in &new {
                    pool.give_back(held.id);
                }
                if fresh {
                    self.indexes.give_back(index);
                }
                Err(shortage)
            }
        }
    }

    fn admit_slots(
        &mut self,
        index: u32,
        desired: &DesiredPort,
        new: &[Held],
    ) -> Result<[Aim; 2], Shortage> {
        let port = self.ports.get(&index);
        let id_of = |address: SocketAddr| {
            let held = port.and_then(|port| port.find(address));
            let fresh = || {
                let position = new.binary_search_by(|held| held.address.cmp(&address));
                new.get(position.ok()?)
            };
            held.or_else(fresh).map(|held| held.id)
        };
        let ids = Set::ALL.map(|set| {
            let members = desired.backends.iter().filter(|backend| match set {
                Set::Cluster => backend.in_cluster,
                Set::Local => backend.in_local,
            });
            let members: Vec<Member> = members
                .filter_map(|backend| {
                    Some(Member {
                        address: backend.address,
                        weight: backend.weight,
                        id: id_of(backend.address)?,
                    })
                })
                .collect();
            slots_of(&members, desired.selection)
        });
        let needs = |set: Set, ids: &[u32]| match port {
            Some(port) => port.set(set).needs_room(ids),
            None => !ids.is_empty(),
        };
        let [cluster, local] = &ids;
        let needs = [needs(Set::Cluster, cluster), needs(Set::Local, local)];
        let mut taken: Vec<(u32, u32)> = Vec::new();
        let mut starts = [None; 2];
        for ((ids, needs), start) in ids.iter().zip(needs).zip(&mut starts) {
            if !needs {
                continue;
            }
            let length = u16::try_from(ids.len()).map(|length| footprint(length.into()));
            let found = match length {
                Ok(length) => self.slots.take(length).map(|start| (start, length)),
                Err(_) => None,
            };
            let Some((position, length)) = found else {
                for (start, length) in taken {
                    self.slots.give_back(start, length);
                }
                return Err(self.short_of_slots(ids.len()));
            };
            taken.push((position, length));
            *start = Some(position);
        }
        let [cluster, local] = ids;
        let [cluster_start, local_start] = starts;
        Ok([
            Aim {
                ids: cluster,
                start: cluster_start,
            },
            Aim {
                ids: local,
                start: local_start,
            },
        ])
    }

    fn short_of_slots(&self, needed: usize) -> Shortage {
        let endpoints = needed as u64;
        if u16::try_from(needed).is_err() {
            return Shortage::Endpoints(endpoints);
        }
        Shortage::Table {
            table: Table::Slots,
            needed: endpoints,
            free: self.slots.available().into(),
            limit: self.sizes.slots,
        }
    }

    fn open_port(&mut self, key: &Arc<PortKey>, index: u32) {
        let empty = Service::new(Range(0), Range(0), 0, 0);
        let words = self.idle.remove(&index).unwrap_or(empty);
        let port = Port::new(Some(Arc::clone(key)), key.family, words);
        self.ports.insert(index, port);
        if let Some(named) = self.named.get_mut(key) {
            named.index = Some(index);
        }
    }

    fn plan_port(
        &mut self,
        key: &Arc<PortKey>,
        index: u32,
        desired: &DesiredPort,
        admission: Admission,
        draft: &mut Draft,
    ) {
        let mut claims: Vec<_> = desired
            .frontends
            .iter()
            .map(|frontend| claim_of(key, frontend))
            .collect();
        claims.sort_unstable();
        self.set_claims(key, claims);
        let nets = desired.source_ranges.as_deref().unwrap_or_default();
        self.source_ranges.set(index, nets);
        let Some(port) = self.ports.get_mut(&index) else {
            return;
        };
        for held in &admission.new {
            self.guard
                .hold(backend_bit(held.address, self.sizes.guard_words));
        }
        port.hold(admission.new);
        let mut unused = Vec::new();
        for (set, Aim { ids, start }) in Set::ALL.into_iter().zip(admission.aims) {
            let set = port.set_mut(set);
            set.aim(&ids, start);
            unused.extend(set.take_unpublished());
        }
        port.draft(index, desired, draft);
        if !unused.is_empty() {
            self.retire().ranges.extend(unused);
        }
    }

    fn plan_removal(&mut self, index: u32, draft: &mut Draft) {
        if let Some(restored) = &self.restored {
            // What still leads here must not when the index belongs to somebody else.
            for at in restored.leading_to(index) {
                self.frontends.touch(at);
            }
        }
        self.source_ranges.set(index, &[]);
        let Some(port) = self.ports.get_mut(&index) else {
            return;
        };
        self.removing.insert(index);
        let mut unused = Vec::new();
        for set in Set::ALL {
            let set = port.set_mut(set);
            set.aim(&[], None);
            unused.extend(set.take_unpublished());
        }
        port.draft_removal(index, draft);
        if !unused.is_empty() {
            self.retire().ranges.extend(unused);
        }
    }

    fn plan_unclaimed(&mut self, draft: &mut Draft) {
        match &mut self.restored {
            Some(restored) if restored.removes(self.frontends.knows_node()) => {
                restored.removal_planned = true;
            }
            _ => return,
        }
        self.frontends.touch_unclaimed();
        self.source_ranges.touch_unwanted();
        let unclaimed: Vec<_> = self
            .ports
            .iter()
            .filter(|(_, port)| port.key.is_none())
            .map(|(index, _)| *index)
            .collect();
        for index in unclaimed {
            self.plan_removal(index, draft);
        }
        for (index, words) in &self.idle {
            if words.options != 0 {
                draft.push(Phase::ServiceRemovals, clear_options(*index));
            }
        }
    }

    /// Ranges that a published flag makes readers look for go after the flag; others can go at once.
    fn plan_source_ranges(&self, draft: &mut Draft) {
        for (range, difference) in self.source_ranges.differences() {
            match difference {
                source_ranges::Difference::Put => {
                    draft.push(Phase::SourceRanges, Op::PutSourceRange(range));
                }
                source_ranges::Difference::Delete => {
                    let port = self.ports.get(&range.service);
                    let phase = if port.is_some_and(Port::may_be_restricted) {
                        Phase::SourceRangeRemovals
                    } else {
                        Phase::SourceRanges
                    };
                    draft.push(phase, Op::DeleteSourceRange(range));
                }
            }
        }
    }

    fn plan_frontends(&mut self, draft: &mut Draft) {
        let index_of = |key: &PortKey| self.named.get(key)?.index;
        for (at, difference) in self.frontends.differences(index_of) {
            match difference {
                Difference::Put(value) => {
                    draft.push(Phase::Frontends, Op::PutFrontend { at, value });
                }
                Difference::Delete => {
                    draft.push(Phase::FrontendRemovals, Op::DeleteFrontend(at));
                }
            }
        }
    }

    fn set_claims(&mut self, key: &Arc<PortKey>, claims: Vec<(FrontendAt, u8)>) {
        let Some(named) = self.named.get_mut(key) else {
            return;
        };
        let old = std::mem::replace(&mut named.claims, claims);
        for (at, kind) in &old {
            if named.claims.binary_search(&(*at, *kind)).is_err() {
                self.frontends.unclaim(*at, key, *kind);
            }
        }
        for (at, kind) in &named.claims {
            if old.binary_search(&(*at, *kind)).is_err() {
                self.frontends.claim(*at, key, *kind, &mut self.guard);
            }
        }
    }

    fn commit_op(&mut self, op: &Op) {
        match op {
            Op::SetGuard(bits) => {
                for bit in bits {
                    self.guard.was_set(*bit);
                }
            }
            Op::PutBackend { record, .. } | Op::SetBits { record, .. } => {
                if let Some(held) = self.held_mut(record.service, record.address) {
                    held.element = Element::Bits(record.bits);
                }
            }
            Op::Retire { family, id, record } => {
                if let Some(port) = self.ports.get_mut(&record.service) {
                    port.condemn(record.address, *id);
                    let same = |condemned: &delta::Condemned| {
                        condemned.id == *id && condemned.family == *family
                    };
                    port.condemned.retain(|condemned| !same(condemned));
                }
                self.set_generation(*family, *id, record.generation);
                let bit = backend_bit(record.address, self.sizes.guard_words);
                let retired = self.retire();
                // Only damage can have put an element at id 0, which nobody gets.
                if *id != 0 {
                    retired.backends.of_mut(*family).push(*id);
                }
                retired.guard.push(bit);
            }
            Op::FillSlots { service, set, .. } => {
                if let Some(port) = self.ports.get_mut(service) {
                    port.set_mut(*set).was_filled();
                }
            }
            Op::StoreService {
                service,
                word,
                value,
            } => {
                let Some(port) = self.ports.get_mut(service) else {
                    if let Some(words) = self.idle.get_mut(service) {
                        words.options = *value;
                    }
                    return;
                };
                match set_of(*word) {
                    Some(set) => {
                        let free = port.set_mut(set).was_published(Range(*value));
                        if !free.is_empty() {
                            self.retire().ranges.extend(free);
                        }
                    }
                    None => port.options = Some(*value),
                }
            }
            Op::PutSourceRange(range) => self.source_ranges.was_written(*range, true),
            Op::DeleteSourceRange(range) => {
                self.source_ranges.was_written(*range, false);
                self.room = true;
            }
            Op::PutFrontend { at, value } => self.frontends.was_written(*at, Some(*value)),
            Op::DeleteFrontend(at) => {
                self.frontends.was_written(*at, None);
                self.room = true;
            }
        }
    }

    fn fail_op(&mut self, op: &Op) {
        match op {
            // Nothing depends on any of them yet: they are simply written again.
            Op::SetGuard(_) | Op::PutBackend { .. } | Op::FillSlots { .. } => {}
            Op::SetBits { record, .. } => {
                if let Some(held) = self.held_mut(record.service, record.address) {
                    held.element = match held.element {
                        Element::Unwritten => Element::Unwritten,
                        Element::Bits(bits) | Element::AtMost(bits) => {
                            Element::AtMost(bits | record.bits)
                        }
                    };
                }
            }
            Op::Retire { id, record, .. } => {
                if let Some(port) = self.ports.get_mut(&record.service) {
                    port.condemn(record.address, *id);
                }
            }
            Op::StoreService { service, word, .. } => {
                if let Some(port) = self.ports.get_mut(service) {
                    match set_of(*word) {
                        Some(set) => port.set_mut(set).is_unknown(),
                        None => port.options = None,
                    }
                }
            }
            Op::PutSourceRange(range) | Op::DeleteSourceRange(range) => {
                self.source_ranges.is_unknown(*range);
            }
            Op::PutFrontend { at, .. } | Op::DeleteFrontend(at) => self.frontends.is_unknown(*at),
        }
    }

    fn held_mut(&mut self, index: u32, address: SocketAddr) -> Option<&mut Held> {
        self.ports.get_mut(&index)?.find_mut(address)
    }

    fn set_generation(&mut self, family: Family, id: u32, generation: u16) {
        let generations = self.generations.of_mut(family);
        if generations.len() <= id as usize {
            generations.resize(id as usize + 1, 0);
        }
        if let Some(slot) = generations.get_mut(id as usize) {
            *slot = generation;
        }
    }

    /// The removal of a port is done: its index is free after a grace period.
    fn drop_port(&mut self, index: u32) {
        let Some(port) = self.ports.remove(&index) else {
            return;
        };
        debug_assert!(port.is_empty(), "all of a removed port's backends went");
        if index == restore::STRAYS {
            return;
        }
        self.idle.insert(index, port.words());
        self.retire().indexes.push(index);
        let Some(key) = port.key else {
            return;
        };
        if let Some(named) = self.named.get_mut(&key) {
            named.index = None;
            if named.desired.is_none() {
                self.named.remove(&key);
            }
        }
    }

    fn retire(&mut self) -> &mut Retired {
        self.retired.entry(self.epoch).or_default()
    }

    fn drop_empty_epoch(&mut self) {
        if self.retired.get(&self.epoch).is_some_and(Retired::is_empty) {
            self.retired.remove(&self.epoch);
        }
    }
}

impl Retired {
    const fn is_empty(&self) -> bool {
        let Self {
            indexes,
            backends,
            ranges,
            guard,
            find_unheld,
        } = self;
        indexes.is_empty()
            && backends.v4.is_empty()
            && backends.v6.is_empty()
            && ranges.is_empty()
            && guard.is_empty()
            && !*find_unheld
    }
}

/// Plans what is pending and does it, phase by phase.
///
/// # Errors
/// The first phase that failed. It and the rest are pending: call again, after a while.
pub fn apply(planner: &mut Planner, dataplane: &mut impl Dataplane) -> Result<usize, ApplyError> {
    let plan = planner.plan();
    for batch in &plan.batches {
        if let Err(source) = execute(batch, dataplane) {
            planner.fail(batch);
            return Err(ApplyError {
                phase: batch.phase,
                writes: batch.len(),
                source,
            });
        }
        planner.commit(batch);
    }
    planner.finish();
    Ok(plan.len())
}

/// Waits out a grace period, if there is anything to wait for, and gives back what was retired.
/// Refused ports may have room afterwards: [`Planner::is_pending`] tells.
///
/// The wait takes as long as the kernel's RCU, some milliseconds, or one second where the kernel
/// offers none. To wait elsewhere, use [`Planner::seal`] and [`Planner::reclaim`].
///
/// # Errors
/// If waiting fails; what was retired stays so and is part of the next call.
pub fn reclaim(planner: &mut Planner, dataplane: &impl Dataplane) -> Result<()> {
    if let Some(epoch) = planner.seal() {
        dataplane.grace()?;
        planner.reclaim(epoch);
    }
    Ok(())
}

/// Clears the guard bits behind which neither an object nor a live flow is any more; to be called
/// every now and then, as it reads all flows if there is such a bit. Returns how many it cleared.
///
/// # Errors
/// If the flows cannot be read or a bit cannot be cleared; the rest stays pending.
pub fn sweep(
    planner: &mut Planner,
    dataplane: &mut impl Dataplane,
    clock: FlowClock,
    timeouts: &Timeouts,
) -> Result<usize> {
    if planner.pending_clears().is_empty() {
        return Ok(0);
    }
    let used = dataplane.flows_in_use(planner.pending_clears(), clock, timeouts)?;
    let unused: Vec<_> = planner
        .pending_clears()
        .difference(&used)
        .copied()
        .collect();
    let result = dataplane.clear_guard(&unused);
    planner.cleared(&unused, result.is_ok());
    result.map(|()| unused.len())
}

/// Drops what cannot be programmed at all, and sorts the rest.
fn normalize(port: &mut DesiredPort) {
    let family = port.key.family;
    port.backends
        .retain(|backend| Family::of(backend.address.ip()) == family);
    port.backends.sort_unstable();
    port.backends.dedup_by_key(|backend| backend.address);
    port.frontends.retain(|frontend| match frontend.address {
        FrontendAddress::Node => true,
        FrontendAddress::Ip(address) => Family::of(address) == family && !address.is_unspecified(),
    });
    if let Some(nets) = &mut port.source_ranges {
        nets.retain(|net| Family::of(net.addr()) == family);
        for net in nets.iter_mut() {
            *net = net.trunc();
        }
        nets.sort_unstable();
        nets.dedup();
    }
    port.frontends.sort_unstable();
    port.frontends
        .dedup_by_key(|frontend| (frontend.address, frontend.port));
}

/// Where a frontend is in the map, and its kind there.
fn claim_of(key: &PortKey, frontend: &Frontend) -> (FrontendAt, u8) {
    let at = match frontend.address {
        FrontendAddress::Node => FrontendAt::node_port(key.family, frontend.port, key.protocol),
        FrontendAddress::Ip(address) => FrontendAt {
            address,
            port: frontend.port,
            protocol: key.protocol as u8,
        },
    };
    let kind = match frontend.kind {
        FrontendKind::ClusterIp => kind::CLUSTER_IP,
        FrontendKind::NodePort => kind::NODE_PORT,
        FrontendKind::LoadBalancer => kind::LOAD_BALANCER,
        FrontendKind::ExternalIp => kind::EXTERNAL_IP,
    };
    (at, kind)
}

/// The address entry that goes with a frontend.
fn address_entry(at: &FrontendAt) -> Option<FrontendAt> {
    (!at.address.is_unspecified()).then(|| FrontendAt::address(at.address))
}

fn backend_bit(address: SocketAddr, words: u32) -> GuardBit {
    GuardBit::address(address.ip(), guard_bits::BACKEND, words)
}
