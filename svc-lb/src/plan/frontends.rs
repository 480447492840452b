//! Who claims which frontend, and what the map holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use svc_lb_common::service::kind;
use svc_lb_common::{Family, guard};

use super::guard::Guard;
use super::refusal::Refusal;
use crate::compile::desired::PortKey;
use crate::dataplane::{FrontendAt, FrontendValue, GuardBit, PerFamily};

/// What is known about one key of the map.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Programmed {
    /// It is not there.
    #[default]
    Absent,
    /// It holds this.
    Value(FrontendValue),
    /// A write failed, or the entry is damaged: there or not, with whatever value.
    Unknown,
}

/// How many frontends of each kind an address has, and whether it is the node's.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Uses {
    node: bool,
    cluster_ip: u32,
    load_balancer: u32,
    external_ip: u32,
}

impl Uses {
    fn count(&mut self, kind: u8) -> &mut u32 {
        match kind {
            kind::CLUSTER_IP => &mut self.cluster_ip,
            kind::LOAD_BALANCER => &mut self.load_balancer,
            _ => &mut self.external_ip,
        }
    }

    const fn is_frontend(self) -> bool {
        self.cluster_ip + self.load_balancer + self.external_ip > 0
    }

    /// What the address is when no port matches. A node's own address stays one, whoever else uses
    /// it: its other ports are the node's.
    const fn kind(self) -> Option<u8> {
        if self.node {
            Some(kind::NODE_PORT)
        } else if self.cluster_ip > 0 {
            Some(kind::CLUSTER_IP)
        } else if self.load_balancer > 0 {
            Some(kind::LOAD_BALANCER)
        } else if self.external_ip > 0 {
            Some(kind::EXTERNAL_IP)
        } else {
            None
        }
    }
}

/// One key of the map that is wanted, or there, or both.
#[derive(Clone, Debug, Default)]
struct Entry {
    /// Sorted by [`rank`]; the first one has it.
    claimants: Vec<(Arc<PortKey>, u8)>,
    uses: Uses,
    programmed: Programmed,
}

impl Entry {
    const fn is_unused(&self) -> bool {
        self.claimants.is_empty()
            && self.uses.kind().is_none()
            && matches!(self.programmed, Programmed::Absent)
    }

    /// Whether the map says that this is an address of the node.
    fn is_node(&self, at: &FrontendAt) -> bool {
        let node = |value: FrontendValue| value.kind == kind::NODE_PORT;
        at.is_address() && matches!(self.programmed, Programmed::Value(value) if node(value))
    }

    const fn is_wanted(&self) -> bool {
        !self.claimants.is_empty() || self.uses.kind().is_some()
    }
}

/// All keys of both frontend maps.
#[derive(Clone, Debug, Default)]
pub(super) struct Frontends {
    entries: BTreeMap<FrontendAt, Entry>,
    used: PerFamily<u32>,
    /// Keys with more than one claimant.
    contested: BTreeSet<FrontendAt>,
    /// Keys that may differ from what is wanted.
    dirty: BTreeSet<FrontendAt>,
    guard_words: u32,
    /// Somebody has said which addresses are the node's.
    node_known: bool,
    /// Guard bits of what left, released when it is out of the map.
    leaving: Vec<GuardBit>,
}

/// What the map should hold at one key, and does not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Difference {
    Put(FrontendValue),
    Delete,
}

impl Frontends {
    pub(super) fn new(guard_words: u32) -> Self {
        Self {
            guard_words,
            ..Self::default()
        }
    }

    /// Keys in use in one family: wanted, or not yet known to be deleted.
    pub(super) const fn used(&self, family: Family) -> u32 {
        *self.used.of(family)
    }

    /// Whether a key is in use: then claiming it takes no room.
    pub(super) fn is_used(&self, at: &FrontendAt) -> bool {
        self.entries.contains_key(at)
    }

    /// Enters what a map held at start. Damaged values are known to be there, and nothing else.
    pub(super) fn restore(&mut self, at: FrontendAt, value: Option<FrontendValue>) {
        let entry = Self::entry(&mut self.entries, &mut self.used, at);
        entry.programmed = value.map_or(Programmed::Unknown, Programmed::Value);
    }

    /// Adds a claim of a port, of a `kind` at a frontend.
    pub(super) fn claim(
        &mut self,
        at: FrontendAt,
        port: &Arc<PortKey>,
        kind: u8,
        guard: &mut Guard,
    ) {
        let entry = Self::entry(&mut self.entries, &mut self.used, at);
        let before =
            |(other, other_kind): &(Arc<PortKey>, u8)| rank(*other_kind, other) < rank(kind, port);
        let position = entry.claimants.partition_point(before);
        entry.claimants.insert(position, (Arc::clone(port), kind));
        if entry.claimants.len() > 1 {
            self.contested.insert(at);
        }
        self.dirty.insert(at);
        if at.address.is_unspecified() {
            if let Some(bit) = port_bit(&at).filter(|_| entry.claimants.len() == 1) {
                guard.hold(bit);
            }
            return;
        }
        let address = FrontendAt::address(at.address);
        let entry = Self::entry(&mut self.entries, &mut self.used, address);
        if !entry.uses.is_frontend() {
            guard.hold(GuardBit::address(
                at.address,
                guard::FRONTEND,
                self.guard_words,
            ));
        }
        *entry.uses.count(kind) += 1;
        self.dirty.insert(address);
    }

    /// Takes a claim of a port back.
    pub(super) fn unclaim(&mut self, at: FrontendAt, port: &PortKey, kind: u8) {
        if let Some(entry) = self.entries.get_mut(&at) {
            entry.claimants.retain(|(other, _)| **other != *port);
            if entry.claimants.len() < 2 {
                self.contested.remove(&at);
            }
            if entry.claimants.is_empty() && at.address.is_unspecified() {
                self.leaving.extend(port_bit(&at));
            }
            self.dirty.insert(at);
        }
        if at.address.is_unspecified() {
            return;
        }
        let address = FrontendAt::address(at.address);
        if let Some(entry) = self.entries.get_mut(&address) {
            *entry.uses.count(kind) -= 1;
            if !entry.uses.is_frontend() {
                self.leaving.push(GuardBit::address(
                    at.address,
                    guard::FRONTEND,
                    self.guard_words,
                ));
            }
            self.dirty.insert(address);
        }
    }

    /// Makes an address one of the node's that serve NodePorts.
    pub(super) fn claim_node(&mut self, address: IpAddr, guard: &mut Guard) {
        let at = FrontendAt::address(address);
        let entry = Self::entry(&mut self.entries, &mut self.used, at);
        entry.uses.node = true;
        guard.hold(GuardBit::address(address, guard::NODE, self.guard_words));
        self.dirty.insert(at);
    }

    /// Takes that back.
    pub(super) fn unclaim_node(&mut self, address: IpAddr) {
        let at = FrontendAt::address(address);
        if let Some(entry) = self.entries.get_mut(&at) {
            entry.uses.node = false;
            self.leaving
                .push(GuardBit::address(address, guard::NODE, self.guard_words));
            self.dirty.insert(at);
        }
    }

    /// Looks at a key again.
    pub(super) fn touch(&mut self, at: FrontendAt) {
        self.dirty.insert(at);
    }

    /// Looks again at everything that is there and nobody wants.
    pub(super) fn touch_unclaimed(&mut self) {
        let unclaimed = self
            .entries
            .iter()
            .filter(|(_, entry)| !entry.is_wanted())
            .map(|(at, _)| *at);
        self.dirty.extend(unclaimed);
    }

    /// From now on the claims tell which addresses are the node's; until then the map does.
    pub(super) fn node_is_known(&mut self) {
        if !std::mem::replace(&mut self.node_known, true) {
            let nodes = self.entries.iter().filter(|(at, entry)| entry.is_node(at));
            self.dirty.extend(nodes.map(|(at, _)| *at));
        }
    }

    /// Whether somebody has said which addresses are the node's.
    pub(super) const fn knows_node(&self) -> bool {
        self.node_known
    }

    /// Whether something may differ.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || !self.leaving.is_empty()
    }

    /// What has to change in the map; address entries come before the frontends of their address.
    pub(super) fn differences(
        &self,
        index_of: impl Fn(&PortKey) -> Option<u32>,
    ) -> Vec<(FrontendAt, Difference)> {
        let difference = |at: &FrontendAt| {
            let entry = self.entries.get(at)?;
            let wanted = self.wanted(at, entry, &index_of);
            let difference = match (wanted, entry.programmed) {
                (Some(wanted), Programmed::Value(value)) if wanted == value => return None,
                (None, Programmed::Absent) => return None,
                (Some(wanted), _) => Difference::Put(wanted),
                (None, _) => Difference::Delete,
            };
            Some((*at, difference))
        };
        self.dirty.iter().filter_map(difference).collect()
    }

    /// What the maps should hold, by key.
    pub(super) fn all_wanted(
        &self,
        index_of: impl Fn(&PortKey) -> Option<u32>,
    ) -> impl Iterator<Item = (FrontendAt, FrontendValue)> {
        let entries = self.entries.iter();
        entries.filter_map(move |(at, entry)| Some((*at, self.wanted(at, entry, &index_of)?)))
    }

    fn wanted(
        &self,
        at: &FrontendAt,
        entry: &Entry,
        index_of: impl Fn(&PortKey) -> Option<u32>,
    ) -> Option<FrontendValue> {
        if at.is_address() {
            let node = (!self.node_known && entry.is_node(at)).then_some(kind::NODE_PORT);
            let kind = node.or(entry.uses.kind())?;
            return Some(FrontendValue { service: 0, kind });
        }
        let (port, kind) = entry.claimants.first()?;
        Some(FrontendValue {
            service: index_of(port)?,
            kind: *kind,
        })
    }

    /// A key was written: it holds `value` or, with `None`, nothing.
    pub(super) fn was_written(&mut self, at: FrontendAt, value: Option<FrontendValue>) {
        let entry = Self::entry(&mut self.entries, &mut self.used, at);
        entry.programmed = value.map_or(Programmed::Absent, Programmed::Value);
        self.drop_unused(at);
    }

    /// A write to a key failed.
    pub(super) fn is_unknown(&mut self, at: FrontendAt) {
        let entry = Self::entry(&mut self.entries, &mut self.used, at);
        entry.programmed = Programmed::Unknown;
        self.dirty.insert(at);
    }

    /// All differences are gone; gives back the guard bits that nothing in the map needs now.
    pub(super) fn settled(&mut self) -> Vec<GuardBit> {
        for at in std::mem::take(&mut self.dirty) {
            self.drop_unused(at);
        }
        std::mem::take(&mut self.leaving)
    }

    /// Claims that lose against another.
    pub(super) fn conflicts(&self) -> impl Iterator<Item = Refusal> {
        self.contested.iter().flat_map(|at| {
            let claimants = self
                .entries
                .get(at)
                .map_or(&[][..], |entry| &entry.claimants);
            let winner = claimants.first();
            claimants.iter().skip(1).filter_map(move |(port, _)| {
                Some(Refusal::Conflict {
                    port: PortKey::clone(port),
                    winner: PortKey::clone(&winner?.0),
                    at: *at,
                })
            })
        })
    }

    fn entry<'a>(
        entries: &'a mut BTreeMap<FrontendAt, Entry>,
        used: &mut PerFamily<u32>,
        at: FrontendAt,
    ) -> &'a mut Entry {
        entries.entry(at).or_insert_with(|| {
            *used.of_mut(at.family()) += 1;
            Entry::default()
        })
    }

    fn drop_unused(&mut self, at: FrontendAt) {
        if self.entries.get(&at).is_some_and(Entry::is_unused) {
            self.entries.remove(&at);
            *self.used.of_mut(at.family()) -= 1;
        }
    }
}

/// Who comes first where several claim one key. Nobody who merely writes an address into a Service
/// gets one that was allocated to another: ClusterIPs come before load balancers' addresses, and
/// external IPs come last.
pub(super) const fn rank(kind: u8, port: &PortKey) -> (u8, &PortKey) {
    let order = match kind {
        kind::CLUSTER_IP => 0,
        kind::NODE_PORT => 1,
        kind::LOAD_BALANCER => 2,
        _ => 3,
    };
    (order, port)
}

fn port_bit(at: &FrontendAt) -> Option<GuardBit> {
    Some(GuardBit::Port {
        protocol: svc_lb_common::Protocol::from_number(at.protocol)?,
        port: at.port,
    })
}
