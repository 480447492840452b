//! The maps as plain tables in memory, with the kernel's limits and none of its surprises: what
//! the planner is tested on, and a model of the kernel's side.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use svc_lb_common::guard::PORT_WORDS;
use svc_lb_common::limits::name;
use svc_lb_common::service::{Range, SLOTS_PER_WORD, Service};
use svc_lb_common::{Family, limits};

use super::{
    BackendRecord, Dataplane, DataplaneError, FlowEntry, FrontendAt, FrontendValue, GuardBit,
    PerFamily, Result, ServiceWord, Sizes, Snapshot, SourceRange, map_name,
};

/// The maps, in memory.
#[derive(Clone, Debug)]
pub struct Memory {
    sizes: Sizes,
    guard: Vec<u64>,
    guard_port: Vec<u64>,
    frontends: BTreeMap<FrontendAt, FrontendValue>,
    used_frontends: PerFamily<u32>,
    services: BTreeMap<u32, Service>,
    slots: BTreeMap<u32, u32>,
    backends: PerFamily<BTreeMap<u32, BackendRecord>>,
    source_ranges: PerFamily<BTreeSet<SourceRange>>,
    /// The flow maps' entries; the programs would write them.
    pub flows: Vec<FlowEntry>,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            guard_words: limits::GUARD_WORDS,
            frontends: PerFamily::from_fn(|_| limits::FRONTENDS),
            services: limits::SERVICES,
            slots: limits::SLOT_WORDS * SLOTS_PER_WORD,
            backends: PerFamily::from_fn(|_| limits::BACKENDS),
            source_ranges: PerFamily::from_fn(|_| limits::SOURCE_RANGES),
        }
    }
}

impl Memory {
    /// Empty maps.
    #[must_use]
    pub fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            guard: vec![0; sizes.guard_words as usize],
            guard_port: vec![0; PORT_WORDS as usize],
            frontends: BTreeMap::new(),
            used_frontends: PerFamily::default(),
            services: BTreeMap::new(),
            slots: BTreeMap::new(),
            backends: PerFamily::default(),
            source_ranges: PerFamily::default(),
            flows: Vec::new(),
        }
    }

    /// A frontend or an address entry.
    #[must_use]
    pub fn frontend(&self, at: &FrontendAt) -> Option<FrontendValue> {
        self.frontends.get(at).copied()
    }

    /// All frontends and address entries.
    #[must_use]
    pub fn frontends(&self) -> &BTreeMap<FrontendAt, FrontendValue> {
        &self.frontends
    }

    /// A service; all zero where none was written.
    #[must_use]
    pub fn service(&self, index: u32) -> Service {
        self.services
            .get(&index)
            .copied()
            .unwrap_or(Service::new(Range(0), Range(0), 0, 0))
    }

    /// The backend id at a position; 0 where none was written.
    #[must_use]
    pub fn slot(&self, position: u32) -> u32 {
        self.slots.get(&position).copied().unwrap_or(0)
    }

    /// A backend; `None` where none was written.
    #[must_use]
    pub fn backend(&self, family: Family, id: u32) -> Option<BackendRecord> {
        self.backends.of(family).get(&id).copied()
    }

    /// Whether a range of the service holds the address.
    #[must_use]
    pub fn admits(&self, service: u32, address: IpAddr) -> bool {
        let ranges = self.source_ranges.of(Family::of(address));
        ranges
            .iter()
            .any(|range| range.service == service && range.net.contains(&address))
    }

    /// Whether a bit is set.
    #[must_use]
    pub fn guarded(&self, bit: GuardBit) -> bool {
        let (word, mask) = bit.position();
        let table = match bit {
            GuardBit::Address { .. } => &self.guard,
            GuardBit::Port { .. } => &self.guard_port,
        };
        table
            .get(word as usize)
            .is_some_and(|word| word & mask != 0)
    }

    fn check_backend(&self, family: Family, id: u32) -> Result<()> {
        in_bounds(
            map_name(name::BACKENDS, family),
            id,
            *self.sizes.backends.of(family),
        )
    }

    fn write_guard(&mut self, bits: &[GuardBit], change: impl Fn(&mut u64, u64)) -> Result<()> {
        for bit in bits {
            let (word, mask) = bit.position();
            let (table, map) = match bit {
                GuardBit::Address { .. } => (&mut self.guard, name::GUARD),
                GuardBit::Port { .. } => (&mut self.guard_port, name::GUARD_PORT),
            };
            let size = u32::try_from(table.len()).unwrap_or(u32::MAX);
            in_bounds(map, word, size)?;
            if let Some(word) = table.get_mut(word as usize) {
                change(word, mask);
            }
        }
        Ok(())
    }
}

/// Fails for an element that the table does not have.
pub(super) fn in_bounds(table: &'static str, index: u32, size: u32) -> Result<()> {
    if index >= size {
        return Err(DataplaneError::OutOfBounds { table, index, size });
    }
    Ok(())
}

/// Fails for slots that the table does not have, and for a start in the middle of a word.
pub(super) fn check_slots(start: u32, ids: &[u32], size: u32) -> Result<()> {
    let last = u32::try_from(ids.len())
        .ok()
        .and_then(|length| start.checked_add(length.saturating_sub(1)))
        .unwrap_or(u32::MAX);
    in_bounds(name::SLOTS, last, size)?;
    if !start.is_multiple_of(SLOTS_PER_WORD) {
        return Err(DataplaneError::OutOfBounds {
            table: "slots, by whole words,",
            index: start,
            size,
        });
    }
    Ok(())
}

impl Dataplane for Memory {
    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn set_guard(&mut self, bits: &[GuardBit]) -> Result<()> {
        self.write_guard(bits, |word, mask| *word |= mask)
    }

    fn clear_guard(&mut self, bits: &[GuardBit]) -> Result<()> {
        self.write_guard(bits, |word, mask| *word &= !mask)
    }

    fn put_backends(&mut self, family: Family, backends: &[(u32, BackendRecord)]) -> Result<()> {
        for (id, record) in backends {
            self.check_backend(family, *id)?;
            let address = record.address.ip();
            if Family::of(address) != family {
                return Err(DataplaneError::WrongFamily { address, family });
            }
            self.backends.of_mut(family).insert(*id, *record);
        }
        Ok(())
    }

    fn put_backend_meta(&mut self, family: Family, metas: &[(u32, u64)]) -> Result<()> {
        for (id, meta) in metas {
            self.check_backend(family, *id)?;
            let unwritten = BackendRecord {
                address: (
                    FrontendAt::node_port(family, 0, svc_lb_common::Protocol::Tcp).address,
                    0,
                )
                    .into(),
                generation: 0,
                bits: 0,
                service: 0,
            };
            let table = self.backends.of_mut(family);
            let record = table.get(id).copied().unwrap_or(unwritten);
            table.insert(*id, record.with_meta(*meta));
        }
        Ok(())
    }

    fn put_slots(&mut self, start: u32, ids: &[u32]) -> Result<()> {
        check_slots(start, ids, self.sizes.slots)?;
        for (position, id) in (start..).zip(ids) {
            self.slots.insert(position, *id);
        }
        let odd = !ids.len().is_multiple_of(SLOTS_PER_WORD as usize);
        if let Some(position) = (start..).nth(ids.len()).filter(|_| odd) {
            self.slots.insert(position, 0);
        }
        Ok(())
    }

    fn store_service(&mut self, index: u32, word: ServiceWord, value: u64) -> Result<()> {
        in_bounds(name::SERVICES, index, self.sizes.services)?;
        let mut service = self.service(index);
        match word {
            ServiceWord::Cluster => service.cluster = Range(value),
            ServiceWord::Local => service.local = Range(value),
            ServiceWord::Options => service.options = value,
        }
        self.services.insert(index, service);
        Ok(())
    }

    fn put_frontends(
        &mut self,
        family: Family,
        frontends: &[(FrontendAt, FrontendValue)],
    ) -> Result<()> {
        let map = map_name(name::FRONTENDS, family);
        for (at, value) in frontends {
            let address = at.address;
            if at.family() != family {
                return Err(DataplaneError::WrongFamily { address, family });
            }
            let used = self.used_frontends.of_mut(family);
            if !self.frontends.contains_key(at) {
                if *used >= *self.sizes.frontends.of(family) {
                    return Err(DataplaneError::Kernel {
                        operation: "update",
                        object: format!("{map} {}:{}", address, at.port),
                        source: io::Error::from_raw_os_error(libc::E2BIG),
                    });
                }
                *used += 1;
            }
            self.frontends.insert(*at, *value);
        }
        Ok(())
    }

    fn delete_frontends(&mut self, family: Family, frontends: &[FrontendAt]) -> Result<()> {
        for at in frontends {
            if at.family() == family && self.frontends.remove(at).is_some() {
                *self.used_frontends.of_mut(family) -= 1;
            }
        }
        Ok(())
    }

    fn put_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()> {
        let limit = *self.sizes.source_ranges.of(family) as usize;
        let table = self.source_ranges.of_mut(family);
        for range in ranges {
            if range.family() != family {
                let address = range.net.addr();
                return Err(DataplaneError::WrongFamily { address, family });
            }
            if table.len() >= limit && !table.contains(range) {
                return Err(DataplaneError::Kernel {
                    operation: "update",
                    object: map_name(name::SOURCE_RANGES, family).to_owned(),
                    source: io::Error::from_raw_os_error(libc::ENOSPC),
                });
            }
            table.insert(*range);
        }
        Ok(())
    }

    fn delete_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()> {
        for range in ranges {
            self.source_ranges.of_mut(family).remove(range);
        }
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let filled = |table: &BTreeMap<u32, BackendRecord>| {
            table.iter().map(|(id, record)| (*id, *record)).collect()
        };
        let length = self
            .slots
            .iter()
            .rfind(|(_, id)| **id != 0)
            .map_or(0, |(position, _)| position + 1);
        Ok(Snapshot {
            sizes: self.sizes,
            guard: self.guard.clone(),
            guard_port: self.guard_port.clone(),
            frontends: self
                .frontends
                .iter()
                .map(|(at, value)| (*at, *value))
                .collect(),
            services: self
                .services
                .iter()
                .map(|(index, service)| (*index, *service))
                .collect(),
            slots: (0..length).map(|position| self.slot(position)).collect(),
            backends: PerFamily::from_fn(|family| filled(self.backends.of(family))),
            source_ranges: {
                let PerFamily { v4, v6 } = &self.source_ranges;
                v4.union(v6).copied().collect()
            },
        })
    }

    fn grace(&self) -> Result<()> {
        Ok(())
    }

    fn visit_flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<()> {
        self.flows.iter().for_each(visit);
        Ok(())
    }
}
