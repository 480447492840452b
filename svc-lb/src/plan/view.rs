//! The tables as people think of them: services with their frontends, backends and sets.
//!
//! Made from a [`Snapshot`] alone, so that `dump` works while no agent runs; the names of the
//! services come from a running one.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::Serialize;
use svc_lb_common::backend::{GONE, IN_CLUSTER, IN_LOCAL, LOCAL, SERVING};
use svc_lb_common::service::{Range, Service, flag, kind};
use svc_lb_common::{Family, Protocol};

use crate::compile::desired::{FrontendAddress, FrontendKind, PortKey};
use crate::dataplane::{BackendRecord, FAMILIES, FrontendAt, FrontendValue, Snapshot};

/// All that is programmed.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Tables {
    /// By name, then by index; those without a name last.
    pub services: Vec<ServiceView>,
    /// The node's addresses that serve NodePorts, sorted.
    pub node_addresses: Vec<IpAddr>,
}

/// One service port of one family.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent flag of a service"
)]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServiceView {
    /// Index in the map.
    pub index: u32,
    /// Whose it is, where an agent that runs could tell.
    pub name: Option<PortKey>,
    /// Family of its backends; `None` if it has neither frontends nor backends.
    pub family: Option<Family>,
    /// Sorted.
    pub frontends: Vec<FrontendView>,
    /// ClusterIP clients pick from the Local set.
    pub internal_local: bool,
    /// Outside clients pick from the Local set.
    pub external_local: bool,
    /// An empty set means silence, not rejection.
    pub has_any: bool,
    /// Every node picks the same backend for the same tuple.
    pub maglev: bool,
    /// ClientIP affinity, seconds.
    pub affinity_seconds: Option<u32>,
    /// Whom load balancer frontends admit, sorted; `None` for everyone.
    pub source_ranges: Option<Vec<IpNet>>,
    /// Who is in the Cluster set.
    pub cluster: Vec<Member>,
    /// Who is in the Local set.
    pub local: Vec<Member>,
    /// Sorted by address; those that are gone are left out.
    pub backends: Vec<BackendView>,
}

/// One frontend.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct FrontendView {
    /// Where.
    pub address: FrontendAddress,
    /// Port.
    pub port: u16,
    /// Transport protocol; `None` for a number that Services do not know.
    pub protocol: Option<Protocol>,
    /// What it is; `None` if the entry is damaged.
    pub kind: Option<FrontendKind>,
}

/// One backend's part of a set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Member {
    /// Backend id.
    pub backend: u32,
    /// Its address; `None` if there is no such backend: the map is damaged.
    pub address: Option<SocketAddr>,
    /// How many of the set's slots it has.
    pub slots: u32,
    /// Its part of new flows, 0 to 1.
    pub share: f64,
}

/// One backend.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent bit of a backend"
)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct BackendView {
    /// Id in its family's map.
    pub id: u32,
    /// Address and port.
    pub address: SocketAddr,
    /// How often the id was given to another endpoint.
    pub generation: u16,
    /// In the Cluster set.
    pub in_cluster: bool,
    /// In the Local set.
    pub in_local: bool,
    /// UDP flows may stay on it.
    pub serving: bool,
    /// On this node.
    pub local: bool,
}

impl Tables {
    /// Reads the tables; `names` as of [`Planner::names`](super::Planner::names), or empty.
    #[must_use]
    pub fn new(snapshot: &Snapshot, names: &BTreeMap<u32, PortKey>) -> Self {
        let mut services: BTreeMap<u32, ServiceView> = BTreeMap::new();
        let mut tables = Self::default();
        for (at, value) in &snapshot.frontends {
            if at.is_address() {
                let node = value.kind == kind::NODE_PORT;
                tables.node_addresses.extend(node.then_some(at.address));
                continue;
            }
            let service = entry(&mut services, value.service, names);
            service.family.get_or_insert(at.family());
            service.frontends.push(FrontendView::new(at, *value));
        }
        for family in FAMILIES {
            for (id, record) in snapshot.backends.of(family) {
                if record.bits & GONE == 0 {
                    let service = entry(&mut services, record.service, names);
                    service.family.get_or_insert(family);
                    service.backends.push(BackendView::new(*id, record));
                }
            }
        }
        for (index, words) in &snapshot.services {
            let empty = words.cluster.length() == 0 && words.local.length() == 0;
            // Index 0 is nobody's; an emptied index keeps the sequence numbers of its ranges.
            if !empty || services.contains_key(index) {
                entry(&mut services, *index, names).add_words(words, snapshot);
            }
        }
        tables.services = services.into_values().collect();
        for service in &mut tables.services {
            service.frontends.sort_unstable();
            service
                .backends
                .sort_unstable_by_key(|backend| backend.address);
        }
        tables
            .services
            .sort_by(|a, b| (a.name.is_none(), &a.name).cmp(&(b.name.is_none(), &b.name)));
        tables
    }
}

fn entry<'a>(
    services: &'a mut BTreeMap<u32, ServiceView>,
    index: u32,
    names: &BTreeMap<u32, PortKey>,
) -> &'a mut ServiceView {
    services.entry(index).or_insert_with(|| ServiceView {
        index,
        name: names.get(&index).cloned(),
        family: None,
        frontends: Vec::new(),
        internal_local: false,
        external_local: false,
        has_any: false,
        maglev: false,
        affinity_seconds: None,
        source_ranges: None,
        cluster: Vec::new(),
        local: Vec::new(),
        backends: Vec::new(),
    })
}

impl ServiceView {
    fn add_words(&mut self, words: &Service, snapshot: &Snapshot) {
        let flags = words.flags();
        self.internal_local = flags & flag::INTERNAL_LOCAL != 0;
        self.external_local = flags & flag::EXTERNAL_LOCAL != 0;
        self.has_any = flags & flag::HAS_ANY != 0;
        self.maglev = flags & flag::MAGLEV != 0;
        let seconds = words.affinity_seconds();
        self.affinity_seconds = (seconds != 0).then_some(seconds);
        self.source_ranges =
            (flags & flag::SOURCE_RANGES != 0).then(|| ranges_of(self.index, snapshot));
        self.cluster = self.members(words.cluster, snapshot);
        self.local = self.members(words.local, snapshot);
    }

    fn members(&self, range: Range, snapshot: &Snapshot) -> Vec<Member> {
        let mut slots: BTreeMap<u32, u32> = BTreeMap::new();
        let first = range.start() as usize;
        for position in first..first.saturating_add(range.length() as usize) {
            let id = snapshot.slots.get(position).copied().unwrap_or(0);
            *slots.entry(id).or_insert(0) += 1;
        }
        let mut members: Vec<_> = slots
            .into_iter()
            .map(|(backend, slots)| Member {
                backend,
                address: self.address_of(backend),
                slots,
                share: f64::from(slots) / f64::from(range.length()),
            })
            .collect();
        members.sort_by_key(|member| (member.address, member.backend));
        members
    }

    fn address_of(&self, id: u32) -> Option<SocketAddr> {
        let backend = self.backends.iter().find(|backend| backend.id == id)?;
        Some(backend.address)
    }
}

/// A service's source ranges, found in the sorted list.
fn ranges_of(service: u32, snapshot: &Snapshot) -> Vec<IpNet> {
    let all = &snapshot.source_ranges;
    let first = all.partition_point(|range| range.service < service);
    let ranges = all.iter().skip(first);
    let own = ranges.take_while(|range| range.service == service);
    own.map(|range| range.net).collect()
}

impl FrontendView {
    fn new(at: &FrontendAt, value: FrontendValue) -> Self {
        let address = if at.address.is_unspecified() {
            FrontendAddress::Node
        } else {
            FrontendAddress::Ip(at.address)
        };
        Self {
            address,
            port: at.port,
            protocol: Protocol::from_number(at.protocol),
            kind: match value.kind {
                kind::CLUSTER_IP => Some(FrontendKind::ClusterIp),
                kind::NODE_PORT => Some(FrontendKind::NodePort),
                kind::LOAD_BALANCER => Some(FrontendKind::LoadBalancer),
                kind::EXTERNAL_IP => Some(FrontendKind::ExternalIp),
                _ => None,
            },
        }
    }
}

impl BackendView {
    const fn new(id: u32, record: &BackendRecord) -> Self {
        Self {
            id,
            address: record.address,
            generation: record.generation,
            in_cluster: record.bits & IN_CLUSTER != 0,
            in_local: record.bits & IN_LOCAL != 0,
            serving: record.bits & SERVING != 0,
            local: record.bits & LOCAL != 0,
        }
    }
}
