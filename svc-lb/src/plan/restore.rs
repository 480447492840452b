//! What a restarted agent finds in the maps, and whose it is.
//!
//! A restart renumbers nothing. A service port is recognised by its frontends, which name its
//! index; a backend by its element, which names its service, address and port; a range by the
//! service's word. What nobody claims stays until the initial lists are complete.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use serde::Serialize;
use svc_lb_common::Family;
use svc_lb_common::backend::GONE;
use svc_lb_common::service::{Range, Service, kind};

use super::delta::{Condemned, Element, Held, Port, SlotSet, footprint};
use super::frontends::rank;
use super::guard::Guard;
use super::ids::{IdPool, RunPool};
use super::phases::Set;
use super::{Planner, backend_bit, claim_of};
use crate::compile::desired::{DesiredPort, PortKey};
use crate::dataplane::{BackendRecord, FAMILIES, FrontendAt, FrontendValue, PerFamily, Snapshot};

/// The index, never a service's, under which backends of no service wait to be removed.
pub(super) const STRAYS: u32 = 0;

/// What was wrong with the maps at start; all of it is repaired as what it belongs to is claimed
/// or removed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Damage {
    /// Frontends with a wrong check word or kind, or that lead to no service.
    pub frontends: u32,
    /// Services whose ranges are out of bounds, overlap another's, or hold ids of other services,
    /// gone ones or none; or that both families' frontends lead to.
    pub services: u32,
    /// Backends of no service or of the wrong family, second ids of one endpoint, and id 0.
    pub backends: u32,
    /// Source ranges of a service that cannot be.
    pub source_ranges: u32,
}

impl Damage {
    /// Whether nothing was wrong.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What was found and may still be claimed.
#[derive(Clone, Debug, Default)]
pub(super) struct Restored {
    /// The initial lists are complete: the rest goes.
    pub(super) remove_unclaimed: bool,
    /// The latest plan removes it.
    pub(super) removal_planned: bool,
    /// It is gone, but for node addresses: nobody has said yet which there are.
    pub(super) only_nodes_left: bool,
    index_at: BTreeMap<FrontendAt, u32>,
    frontends_of: BTreeMap<u32, Vec<FrontendAt>>,
    /// Indexes that no frontend leads to, by their backends: a service that was being added.
    index_with: BTreeMap<SocketAddr, BTreeSet<u32>>,
    /// Who wants the frontends that lead to an index.
    bids: BTreeMap<u32, BTreeSet<Arc<PortKey>>>,
}

impl Restored {
    /// When all is removed but node addresses.
    pub(super) fn only_nodes() -> Self {
        Self {
            remove_unclaimed: true,
            only_nodes_left: true,
            ..Self::default()
        }
    }

    /// Whether something is to be removed, given whether the node's addresses are known.
    pub(super) const fn removes(&self, node_known: bool) -> bool {
        self.remove_unclaimed && (node_known || !self.only_nodes_left)
    }

    /// The frontends that led to an index at start.
    pub(super) fn leading_to(&self, index: u32) -> impl Iterator<Item = FrontendAt> {
        self.frontends_of.get(&index).into_iter().flatten().copied()
    }
}

impl Planner {
    /// A planner for maps that hold what `snapshot` says.
    ///
    /// A grace period must have passed since the snapshot was made: numbers it shows unused are
    /// given out at once. Until [`Planner::remove_unclaimed`] nothing is removed but what a
    /// service that was set no longer wants; make the first plan when all services are set, so
    /// that each finds what is its own.
    #[must_use]
    pub fn restore(snapshot: &Snapshot) -> Self {
        let mut planner = Self::new(snapshot.sizes);
        planner.guard = Guard::new(snapshot.guard.clone(), snapshot.guard_port.clone());
        let mut found = Restored::default();
        planner.restore_frontends(snapshot, &mut found);
        planner.restore_backends(snapshot, &found);
        planner.restore_services(snapshot);
        planner.restore_source_ranges(snapshot);
        planner.restore_free(snapshot);
        for (index, port) in &planner.ports {
            if *index != STRAYS && !found.frontends_of.contains_key(index) {
                for held in &port.held {
                    let indexes = found.index_with.entry(held.address).or_default();
                    indexes.insert(*index);
                }
            }
        }
        planner.restored = Some(found);
        planner
    }

    fn restore_frontends(&mut self, snapshot: &Snapshot, found: &mut Restored) {
        for (at, value) in &snapshot.frontends {
            let valid = self.is_valid(at, *value);
            self.frontends.restore(*at, valid.then_some(*value));
            if !valid {
                self.damage.frontends += 1;
            } else if !at.is_address() {
                found.index_at.insert(*at, value.service);
                found
                    .frontends_of
                    .entry(value.service)
                    .or_default()
                    .push(*at);
            }
        }
        for (index, frontends) in &found.frontends_of {
            let mut families = frontends.iter().map(FrontendAt::family);
            let family = families.next().unwrap_or(Family::V4);
            if families.any(|other| other != family) {
                self.damage.services += 1;
            }
            self.port_at(*index, family);
        }
    }

    fn is_valid(&self, at: &FrontendAt, value: FrontendValue) -> bool {
        let kinds = [
            kind::CLUSTER_IP,
            kind::NODE_PORT,
            kind::LOAD_BALANCER,
            kind::EXTERNAL_IP,
        ];
        let service = if at.is_address() {
            value.service == 0
        } else {
            (1..self.sizes.services).contains(&value.service)
        };
        service && kinds.contains(&value.kind)
    }

    fn port_at(&mut self, index: u32, family: Family) -> &mut Port {
        let empty = Service::new(Range(0), Range(0), 0, 0);
        self.ports
            .entry(index)
            .or_insert_with(|| Port::new(None, family, empty))
    }

    fn restore_backends(&mut self, snapshot: &Snapshot, found: &Restored) {
        for family in FAMILIES {
            for (id, record) in snapshot.backends.of(family) {
                self.set_generation(family, *id, record.generation);
                if record.bits & GONE == 0 {
                    self.restore_backend(family, *id, record, found);
                }
            }
        }
    }

    fn restore_backend(
        &mut self,
        family: Family,
        id: u32,
        record: &BackendRecord,
        found: &Restored,
    ) {
        let BackendRecord {
            address,
            generation,
            bits,
            service,
        } = *record;
        self.guard
            .hold(backend_bit(address, self.sizes.guard_words));
        let stray = id == 0 || !(1..self.sizes.services).contains(&service);
        let led_to = found.frontends_of.contains_key(&service);
        let port = self.port_at(if stray { STRAYS } else { service }, family);
        let foreign = port.family != family && (led_to || !port.held.is_empty());
        if stray || foreign {
            port.condemned.push(Condemned {
                family,
                address,
                id,
                generation,
            });
            self.damage.backends += 1;
            return;
        }
        port.family = family;
        port.held.push(Held {
            address,
            id,
            generation,
            element: Element::Bits(bits),
        });
    }

    fn restore_services(&mut self, snapshot: &Snapshot) {
        let words: BTreeMap<u32, &Service> = snapshot
            .services
            .iter()
            .map(|(index, words)| (*index, words))
            .collect();
        for (index, port) in &mut self.ports {
            let ranges = words.get(index).map(|words| [words.cluster, words.local]);
            let named = ranges
                .into_iter()
                .flatten()
                .flat_map(|range| ids_in(snapshot, range));
            self.damage.backends += port.condemn_doubles(&named.collect());
        }
        for (index, words) in &snapshot.services {
            if *index == STRAYS {
                self.damage.services += 1;
                continue;
            }
            let ranges = words.cluster.length() > 0 || words.local.length() > 0;
            if !ranges && !self.ports.contains_key(index) {
                self.idle.insert(*index, *words);
                continue;
            }
            let port = self
                .ports
                .entry(*index)
                .or_insert_with(|| Port::new(None, Family::V4, *words));
            port.options = Some(words.options);
            for (set, range) in [(Set::Cluster, words.cluster), (Set::Local, words.local)] {
                let (restored, intact) = restore_set(port, range, snapshot, &mut self.slots);
                *port.set_mut(set) = restored;
                if !intact {
                    self.damage.services += 1;
                }
            }
        }
    }

    /// Those of an index that is free go with what nobody claims, or before the next owner's are
    /// published.
    fn restore_source_ranges(&mut self, snapshot: &Snapshot) {
        for range in &snapshot.source_ranges {
            self.source_ranges.restore(*range);
            if !(1..self.sizes.services).contains(&range.service) {
                self.damage.source_ranges += 1;
            }
        }
    }

    fn restore_free(&mut self, snapshot: &Snapshot) {
        let indexes = self.ports.keys().copied().filter(|index| *index != STRAYS);
        self.indexes = IdPool::with_used(snapshot.sizes.services, &indexes.collect());
        let mut used = PerFamily::<BTreeSet<u32>>::default();
        for port in self.ports.values() {
            let held = port.held.iter().map(|held| held.id);
            used.of_mut(port.family).extend(held);
            for condemned in &port.condemned {
                used.of_mut(condemned.family).insert(condemned.id);
            }
        }
        self.backends = PerFamily::from_fn(|family| {
            IdPool::with_used(*snapshot.sizes.backends.of(family), used.of(family))
        });
    }

    /// Notes who wants which of the frontends that were found: an index that several services
    /// would lead to is nobody's, as its backends can be only one's.
    pub(super) fn collect_bids(&mut self, keys: &[Arc<PortKey>]) {
        let Some(restored) = &mut self.restored else {
            return;
        };
        let mut first: BTreeMap<FrontendAt, (u8, &Arc<PortKey>)> = BTreeMap::new();
        for key in keys {
            let desired = self.named.get(key).and_then(|named| named.desired.as_ref());
            for frontend in desired.iter().flat_map(|desired| &desired.frontends) {
                let (at, kind) = claim_of(key, frontend);
                let holder = first.entry(at).or_insert((kind, key));
                if rank(kind, key) < rank(holder.0, holder.1) {
                    *holder = (kind, key);
                }
            }
        }
        for (at, (_, key)) in first {
            if let Some(index) = restored.index_at.get(&at) {
                let bids = restored.bids.entry(*index).or_default();
                bids.insert(Arc::clone(key));
            }
        }
    }

    /// Finds the index that a service port had before the restart.
    pub(super) fn adopt(&mut self, key: &Arc<PortKey>, desired: &DesiredPort) -> Option<u32> {
        let restored = self.restored.as_ref()?;
        let by_frontend = desired
            .frontends
            .iter()
            .filter_map(|frontend| restored.index_at.get(&claim_of(key, frontend).0))
            .find(|index| {
                let only = |bids: &BTreeSet<_>| bids.len() == 1 && bids.contains(key);
                self.is_free_for(**index, key) && restored.bids.get(index).is_some_and(only)
            });
        let by_backend = || {
            desired
                .backends
                .iter()
                .filter_map(|backend| restored.index_with.get(&backend.address))
                .flatten()
                .find(|index| self.is_free_for(**index, key))
        };
        let index = by_frontend.or_else(by_backend).copied()?;
        self.ports.get_mut(&index)?.key = Some(Arc::clone(key));
        self.named.get_mut(key)?.index = Some(index);
        Some(index)
    }

    fn is_free_for(&self, index: u32, key: &PortKey) -> bool {
        let free = |port: &Port| port.key.is_none() && port.family == key.family;
        self.ports.get(&index).is_some_and(free) && !self.removing.contains(&index)
    }
}

impl Port {
    /// Of several ids of one endpoint, keeps the one that the ranges name, else the lowest; returns
    /// how many it condemned. A write that failed before the restart may have left them.
    fn condemn_doubles(&mut self, named: &BTreeSet<u32>) -> u32 {
        self.held
            .sort_unstable_by_key(|held| (held.address, !named.contains(&held.id), held.id));
        let mut doubles = Vec::new();
        self.held.dedup_by(|second, first| {
            let double = second.address == first.address;
            if double {
                doubles.push(Condemned {
                    family: self.family,
                    address: second.address,
                    id: second.id,
                    generation: second.generation,
                });
            }
            double
        });
        let count = u32::try_from(doubles.len()).unwrap_or(u32::MAX);
        self.condemned.extend(doubles);
        count
    }
}

/// What the slots of a range hold; 0 beyond the table.
fn ids_in(snapshot: &Snapshot, range: Range) -> impl Iterator<Item = u32> {
    let first = range.start() as usize;
    (first..first.saturating_add(range.length() as usize))
        .map(|position| snapshot.slots.get(position).copied().unwrap_or(0))
}

/// Reads one set back, taking its slots; whether all was right with it.
fn restore_set(
    port: &Port,
    range: Range,
    snapshot: &Snapshot,
    slots: &mut RunPool,
) -> (SlotSet, bool) {
    if range.length() == 0 {
        return (SlotSet::restored(range, &[]), true);
    }
    let aligned = range.start() == footprint(range.start());
    if !aligned || !slots.take_at(range.start(), footprint(range.length())) {
        return (SlotSet::damaged(range, false), false);
    }
    let ids: Vec<u32> = ids_in(snapshot, range).collect();
    let held: BTreeSet<u32> = port.held.iter().map(|held| held.id).collect();
    if !ids.iter().all(|id| held.contains(id)) {
        return (SlotSet::damaged(range, true), false);
    }
    (SlotSet::restored(range, &ids), true)
}
