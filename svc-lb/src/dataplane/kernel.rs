//! The maps of the running kernel.
//!
//! Arrays are written through memory: one aligned u64 store, with Release ordering, is what a
//! program on another CPU sees whole. Hashes are written by batches.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use aya_obj::generated::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_map_type};
use svc_lb_common::backend::{Backend, generation_of};
use svc_lb_common::conntrack::{Flow, FlowKey};
use svc_lb_common::edge::Edge;
use svc_lb_common::guard::PORT_WORDS;
use svc_lb_common::limits::name;
use svc_lb_common::outcome::COUNTERS;
use svc_lb_common::service::{Frontend, FrontendKey, SLOTS_PER_WORD, Service, slot};
use svc_lb_common::source_range::{ADMITTED, SourceRangeKey};
use svc_lb_common::{Addr4, Addr6, Family, HostAddress};

use super::memory::{check_slots, in_bounds};
use super::sys::map::{self, MapInfo, MappedArray, TypedMap, from_words, map_info, to_words};
use super::{
    BackendRecord, Dataplane, DataplaneError, FlowEntry, FlowTable, FrontendAt, FrontendValue,
    GuardBit, PerFamily, Result, ServiceWord, Sizes, Snapshot, SourceRange, map_name,
};

/// Descriptors of the maps by their names in [`name`].
#[derive(Debug, Default)]
pub struct MapSet {
    /// Those the loader found or made; [`Kernel::new`] needs all that it lists.
    pub fds: BTreeMap<&'static str, OwnedFd>,
}

/// How a map must look.
pub(super) struct Shape {
    kind: bpf_map_type,
    key: usize,
    value: usize,
    flags: u32,
}

impl Shape {
    const fn array<V>() -> Self {
        Self {
            kind: bpf_map_type::BPF_MAP_TYPE_ARRAY,
            key: size_of::<u32>(),
            value: size_of::<V>(),
            flags: BPF_F_MMAPABLE,
        }
    }

    pub(super) const fn of<K, V>(kind: bpf_map_type) -> Self {
        Self {
            kind,
            key: size_of::<K>(),
            value: size_of::<V>(),
            flags: 0,
        }
    }

    const fn trie<K, V>() -> Self {
        Self {
            // The kernel has no other tries.
            flags: BPF_F_NO_PREALLOC,
            ..Self::of::<K, V>(bpf_map_type::BPF_MAP_TYPE_LPM_TRIE)
        }
    }

    fn check(&self, map: &'static str, info: MapInfo) -> Result<()> {
        let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let properties = [
            ("type", info.kind, self.kind as u32),
            ("key size", info.key_size, size(self.key)),
            ("value size", info.value_size, size(self.value)),
            ("flags", info.flags, self.flags),
        ];
        for (property, found, expected) in properties {
            if found != expected {
                return Err(DataplaneError::WrongMap {
                    map,
                    property,
                    found,
                    expected,
                });
            }
        }
        Ok(())
    }
}

impl MapSet {
    /// Takes a map out after comparing it with `shape`; its number of entries comes with it.
    fn take(&mut self, map: &'static str, shape: &Shape) -> Result<(OwnedFd, u32)> {
        let fd = self
            .fds
            .remove(map)
            .ok_or(DataplaneError::MissingMap { map })?;
        let info = map_info(fd.as_fd()).map_err(|source| failed("read", map, source))?;
        shape.check(map, info)?;
        Ok((fd, info.max_entries))
    }

    pub(super) fn take_array<V>(&mut self, map: &'static str) -> Result<(MappedArray, u32)> {
        let (fd, entries) = self.take(map, &Shape::array::<V>())?;
        let array = MappedArray::new(fd.as_fd()).map_err(|source| failed("mmap", map, source))?;
        Ok((array, entries))
    }

    pub(super) fn take_typed<K: aya::Pod, V: aya::Pod>(
        &mut self,
        map: &'static str,
        shape: &Shape,
    ) -> Result<(TypedMap<K, V>, u32)> {
        let (fd, entries) = self.take(map, shape)?;
        let typed = TypedMap::new(fd).map_err(|source| failed("open", map, source))?;
        Ok((typed, entries))
    }
}

/// Takes the counters.
/// All counters of the pinned map, as [`Kernel::counters`] has them.
pub fn counters(mut maps: MapSet) -> Result<Vec<u64>> {
    read_counters(&take_counters(&mut maps)?)
}

fn read_counters(counters: &OwnedFd) -> Result<Vec<u64>> {
    (0..COUNTERS)
        .map(|index| {
            map::per_cpu(counters.as_fd(), index)
                .map(|values| values.into_iter().fold(0, u64::wrapping_add))
                .map_err(|source| failed("read", name::COUNTERS, source))
        })
        .collect()
}

pub(super) fn take_counters(maps: &mut MapSet) -> Result<OwnedFd> {
    let shape = Shape::of::<u32, u64>(bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY);
    let (counters, rows) = maps.take(name::COUNTERS, &shape)?;
    if rows != COUNTERS {
        return Err(DataplaneError::WrongMap {
            map: name::COUNTERS,
            property: "entries",
            found: rows,
            expected: COUNTERS,
        });
    }
    Ok(counters)
}

pub(super) fn failed(
    operation: &'static str,
    object: impl Into<String>,
    source: io::Error,
) -> DataplaneError {
    DataplaneError::Kernel {
        operation,
        object: object.into(),
        source,
    }
}

/// One family's maps.
#[derive(Debug)]
struct FamilyMaps<A: HostAddress> {
    family: Family,
    frontends: TypedMap<FrontendKey<A>, Frontend>,
    backends: MappedArray,
    source_ranges: TypedMap<SourceRangeKey<A>, u32>,
    socket_hits: MappedArray,
}

/// One family's flows.
#[derive(Debug)]
struct FamilyFlows<A: HostAddress> {
    family: Family,
    tables: [(FlowTable, FlowMap<A>); 3],
}

/// One map of flows.
type FlowMap<A> = TypedMap<FlowKey<A>, Flow<A>>;

/// The flow maps alone: for readers beside the owner of [`Kernel`], at no cost of memory.
#[derive(Debug)]
pub struct Flows {
    v4: FamilyFlows<Addr4>,
    v6: FamilyFlows<Addr6>,
}

impl Flows {
    /// Takes the flow maps, after comparing each with the records.
    ///
    /// # Errors
    /// [`DataplaneError::MissingMap`] or [`DataplaneError::WrongMap`].
    pub fn new(maps: &mut MapSet) -> Result<Self> {
        Ok(Self {
            v4: FamilyFlows::take(maps, Family::V4)?,
            v6: FamilyFlows::take(maps, Family::V6)?,
        })
    }

    /// As [`Dataplane::visit_flows`].
    pub fn visit(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<()> {
        self.v4.visit(visit)?;
        self.v6.visit(visit)
    }

    /// Deletes one entry; an absent one is fine.
    pub fn delete(&self, entry: &FlowEntry) -> Result<()> {
        if entry.source.is_ipv4() {
            self.v4.delete(entry)
        } else {
            self.v6.delete(entry)
        }
    }
}

impl<A: HostAddress> FamilyFlows<A>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    fn take(maps: &mut MapSet, family: Family) -> Result<Self> {
        let lru = Shape::of::<FlowKey<A>, Flow<A>>(bpf_map_type::BPF_MAP_TYPE_LRU_HASH);
        let mut take = |table: FlowTable| {
            let (map, _) = maps.take_typed(table.lru().name(family), &lru)?;
            Ok((table, map))
        };
        let [opening, established, streams] = FlowTable::ALL;
        Ok(Self {
            family,
            tables: [take(opening)?, take(established)?, take(streams)?],
        })
    }

    fn visit(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<()> {
        for (table, map) in &self.tables {
            map.visit(&mut |key, flow| visit(&FlowEntry::new(*table, key, flow)))
                .map_err(|source| failed("read", table.lru().name(self.family), source))?;
        }
        Ok(())
    }

    fn delete(&self, entry: &FlowEntry) -> Result<()> {
        let map = self.tables.iter().find(|(table, _)| *table == entry.table);
        let (Some((table, map)), Some(key)) = (map, entry.key()) else {
            return Ok(());
        };
        map.delete(&key)
            .map_err(|source| failed("delete from", table.lru().name(self.family), source))
    }
}

/// Sizes of one family's tables.
struct FamilySizes {
    frontends: u32,
    backends: u32,
    source_ranges: u32,
}

/// The maps of the running kernel. `Send`, and the only writer of what it writes.
#[derive(Debug)]
pub struct Kernel {
    sizes: Sizes,
    guard: MappedArray,
    guard_port: MappedArray,
    services: MappedArray,
    slots: MappedArray,
    v4: FamilyMaps<Addr4>,
    v6: FamilyMaps<Addr6>,
    flows: Flows,
    edges: TypedMap<u32, Edge>,
    counters: OwnedFd,
}

/// Runs the same over the maps of the family that `$family` names.
macro_rules! with_family {
    ($self:expr, $family:expr, $maps:ident => $body:expr) => {
        match $family {
            Family::V4 => {
                let $maps = &$self.v4;
                $body
            }
            Family::V6 => {
                let $maps = &$self.v6;
                $body
            }
        }
    };
}

impl Kernel {
    /// Takes the maps, after comparing each one's kind, key size, value size and flags with the
    /// records'. How many entries they have is the loader's choice and taken as it is.
    ///
    /// # Errors
    /// [`DataplaneError::MissingMap`], [`DataplaneError::WrongMap`], or the kernel's refusal to
    /// map an array.
    pub fn new(mut maps: MapSet) -> Result<Self> {
        let (guard, guard_words) = maps.take_array::<u64>(name::GUARD)?;
        if !guard_words.is_power_of_two() {
            return Err(DataplaneError::WrongMap {
                map: name::GUARD,
                property: "a number of entries that is no power of two,",
                found: guard_words,
                expected: guard_words.checked_next_power_of_two().unwrap_or(0),
            });
        }
        let (guard_port, port_words) = maps.take_array::<u64>(name::GUARD_PORT)?;
        if port_words != PORT_WORDS {
            return Err(DataplaneError::WrongMap {
                map: name::GUARD_PORT,
                property: "entries",
                found: port_words,
                expected: PORT_WORDS,
            });
        }
        let (services, service_count) = maps.take_array::<Service>(name::SERVICES)?;
        let (slots, slot_words) = maps.take_array::<u64>(name::SLOTS)?;
        let (v4, sizes4) = FamilyMaps::take(&mut maps, Family::V4)?;
        let (v6, sizes6) = FamilyMaps::take(&mut maps, Family::V6)?;
        let flows = Flows::new(&mut maps)?;
        let hash = Shape::of::<u32, Edge>(bpf_map_type::BPF_MAP_TYPE_HASH);
        let (edges, _) = maps.take_typed(name::EDGES, &hash)?;
        let counters = take_counters(&mut maps)?;
        let sizes = Sizes {
            guard_words,
            frontends: PerFamily {
                v4: sizes4.frontends,
                v6: sizes6.frontends,
            },
            services: service_count,
            slots: slot_words.saturating_mul(SLOTS_PER_WORD),
            backends: PerFamily {
                v4: sizes4.backends,
                v6: sizes6.backends,
            },
            source_ranges: PerFamily {
                v4: sizes4.source_ranges,
                v6: sizes6.source_ranges,
            },
        };
        Ok(Self {
            sizes,
            guard,
            guard_port,
            services,
            slots,
            v4,
            v6,
            flows,
            edges,
            counters,
        })
    }

    /// Enters an edge, or changes it.
    pub fn put_edge(&mut self, ifindex: u32, edge: &Edge) -> Result<()> {
        self.edges
            .update(&ifindex, edge)
            .map_err(|source| failed("update", format!("{} {ifindex}", name::EDGES), source))
    }

    /// Removes an edge; an absent one is fine.
    pub fn delete_edge(&mut self, ifindex: u32) -> Result<()> {
        self.edges
            .delete(&ifindex)
            .map_err(|source| failed("delete", format!("{} {ifindex}", name::EDGES), source))
    }

    /// How many sockets each backend of a family was given since it got its id; ids of backends that
    /// were given none are left out.
    pub fn socket_hits(&self, family: Family) -> impl Iterator<Item = (u32, u64)> {
        let hits = match family {
            Family::V4 => &self.v4.socket_hits,
            Family::V6 => &self.v6.socket_hits,
        };
        let counts = hits.words().iter().map(|word| word.load(Ordering::Relaxed));
        (0..).zip(counts).filter(|(_, count)| *count != 0)
    }

    /// All edges by interface index.
    pub fn edges(&self) -> Result<BTreeMap<u32, Edge>> {
        let mut edges = BTreeMap::new();
        self.edges
            .visit(&mut |ifindex, edge| {
                edges.insert(*ifindex, *edge);
            })
            .map_err(|source| failed("read", name::EDGES, source))?;
        Ok(edges)
    }

    /// All counters, summed over the CPUs, by [`counter`](svc_lb_common::outcome::counter) and
    /// [`Event::index`](svc_lb_common::outcome::Event::index).
    pub fn counters(&self) -> Result<Vec<u64>> {
        read_counters(&self.counters)
    }

    fn guard_words<'a>(
        &'a self,
        bits: &'a [GuardBit],
    ) -> impl Iterator<Item = Result<(&'a AtomicU64, u64)>> {
        bits.iter().map(|bit| {
            let (index, mask) = bit.position();
            let (array, map) = match bit {
                GuardBit::Address { .. } => (&self.guard, name::GUARD),
                GuardBit::Port { .. } => (&self.guard_port, name::GUARD_PORT),
            };
            Ok((word(array, map, index as usize)?, mask))
        })
    }
}

fn word<'a>(array: &'a MappedArray, map: &'static str, index: usize) -> Result<&'a AtomicU64> {
    let size = array.words().len();
    array
        .words()
        .get(index)
        .ok_or_else(|| DataplaneError::OutOfBounds {
            table: map,
            index: u32::try_from(index).unwrap_or(u32::MAX),
            size: u32::try_from(size).unwrap_or(u32::MAX),
        })
}

/// The elements of an array that are not all zero.
fn elements<T: aya::Pod>(array: &MappedArray) -> impl Iterator<Item = (u32, T)> {
    let stride = size_of::<T>() / 8;
    (0u32..)
        .zip(array.words().chunks_exact(stride))
        .filter_map(|(index, words)| {
            let words: Vec<u64> = words
                .iter()
                .map(|word| word.load(Ordering::Acquire))
                .collect();
            if words.iter().all(|word| *word == 0) {
                return None;
            }
            Some((index, from_words(&words)?))
        })
}

impl<A: HostAddress> FamilyMaps<A>
where
    FrontendKey<A>: aya::Pod,
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRangeKey<A>: aya::Pod,
{
    fn take(maps: &mut MapSet, family: Family) -> Result<(Self, FamilySizes)> {
        let hash = Shape::of::<FrontendKey<A>, Frontend>(bpf_map_type::BPF_MAP_TYPE_HASH);
        let (frontends, frontend_count) =
            maps.take_typed(map_name(name::FRONTENDS, family), &hash)?;
        let (backends, backend_count) =
            maps.take_array::<Backend<A>>(map_name(name::BACKENDS, family))?;
        let trie = Shape::trie::<SourceRangeKey<A>, u32>();
        let (source_ranges, range_count) =
            maps.take_typed(map_name(name::SOURCE_RANGES, family), &trie)?;
        let (socket_hits, _) = maps.take_array::<u64>(map_name(name::SOCKET_HITS, family))?;
        let sizes = FamilySizes {
            frontends: frontend_count,
            backends: backend_count,
            source_ranges: range_count,
        };
        let maps = Self {
            family,
            frontends,
            backends,
            source_ranges,
            socket_hits,
        };
        Ok((maps, sizes))
    }

    fn name(&self, names: [&'static str; 2]) -> &'static str {
        map_name(names, self.family)
    }

    fn wrong_family(&self, address: IpAddr) -> DataplaneError {
        DataplaneError::WrongFamily {
            address,
            family: self.family,
        }
    }

    fn key(&self, at: &FrontendAt) -> Result<FrontendKey<A>> {
        at.to_key().ok_or_else(|| self.wrong_family(at.address))
    }

    fn put_backend(&self, id: u32, record: &BackendRecord) -> Result<()> {
        let address = record.address.ip();
        let record = record
            .to_record::<A>()
            .ok_or_else(|| self.wrong_family(address))?;
        let words = to_words(&record);
        let base = id as usize * words.len();
        let old = word(&self.backends, self.name(name::BACKENDS), base)?.load(Ordering::Acquire);
        if generation_of(old) != record.generation()
            && let Some(hits) = self.socket_hits.words().get(id as usize)
        {
            // Another backend's.
            hits.store(0, Ordering::Relaxed);
        }
        // The first word last: until then an agent that is killed here leaves an element that
        // says it is gone.
        for (offset, value) in words.iter().enumerate().rev() {
            word(&self.backends, self.name(name::BACKENDS), base + offset)?
                .store(*value, Ordering::Release);
        }
        Ok(())
    }

    fn put_meta(&self, id: u32, meta: u64) -> Result<()> {
        let base = id as usize * (size_of::<Backend<A>>() / 8);
        word(&self.backends, self.name(name::BACKENDS), base)?.store(meta, Ordering::Release);
        Ok(())
    }

    fn put_frontends(&self, frontends: &[(FrontendAt, FrontendValue)]) -> Result<()> {
        let mut keys = Vec::with_capacity(frontends.len());
        let mut values = Vec::with_capacity(frontends.len());
        for (at, value) in frontends {
            let key = self.key(at)?;
            values.push(value.to_record(&key));
            keys.push(key);
        }
        self.frontends
            .update_all(&keys, &values)
            .map_err(|source| failed("update", self.name(name::FRONTENDS), source))
    }

    fn delete_frontends(&self, frontends: &[FrontendAt]) -> Result<()> {
        let keys = frontends
            .iter()
            .map(|at| self.key(at))
            .collect::<Result<Vec<_>>>()?;
        self.frontends
            .delete_all(&keys)
            .map_err(|source| failed("delete from", self.name(name::FRONTENDS), source))
    }

    fn read_frontends(&self, into: &mut BTreeMap<FrontendAt, FrontendValue>) -> Result<()> {
        self.frontends
            .visit(&mut |key, record| {
                let value = FrontendValue::from_record(key, record);
                into.insert(FrontendAt::from_key(key), value);
            })
            .map_err(|source| failed("read", self.name(name::FRONTENDS), source))
    }

    fn range_keys(&self, ranges: &[SourceRange]) -> Result<Vec<SourceRangeKey<A>>> {
        let key = |range: &SourceRange| {
            let address = range.net.addr();
            range.to_key().ok_or_else(|| self.wrong_family(address))
        };
        ranges.iter().map(key).collect()
    }

    fn put_source_ranges(&self, ranges: &[SourceRange]) -> Result<()> {
        let keys = self.range_keys(ranges)?;
        self.source_ranges
            .update_all(&keys, &vec![ADMITTED; keys.len()])
            .map_err(|source| failed("update", self.name(name::SOURCE_RANGES), source))
    }

    fn delete_source_ranges(&self, ranges: &[SourceRange]) -> Result<()> {
        let keys = self.range_keys(ranges)?;
        self.source_ranges
            .delete_all(&keys)
            .map_err(|source| failed("delete from", self.name(name::SOURCE_RANGES), source))
    }

    fn read_source_ranges(&self, into: &mut BTreeSet<SourceRange>) -> Result<()> {
        self.source_ranges
            .visit_singly(&mut |key, _| into.extend(SourceRange::from_key(key)))
            .map_err(|source| failed("read", self.name(name::SOURCE_RANGES), source))
    }

    fn read_backends(&self) -> Vec<(u32, BackendRecord)> {
        elements::<Backend<A>>(&self.backends)
            .map(|(id, record)| (id, BackendRecord::from_record(&record)))
            .collect()
    }
}

impl Dataplane for Kernel {
    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn set_guard(&mut self, bits: &[GuardBit]) -> Result<()> {
        for word in self.guard_words(bits) {
            let (word, mask) = word?;
            word.fetch_or(mask, Ordering::Release);
        }
        Ok(())
    }

    fn clear_guard(&mut self, bits: &[GuardBit]) -> Result<()> {
        for word in self.guard_words(bits) {
            let (word, mask) = word?;
            word.fetch_and(!mask, Ordering::Release);
        }
        Ok(())
    }

    fn put_backends(&mut self, family: Family, backends: &[(u32, BackendRecord)]) -> Result<()> {
        with_family!(self, family, maps => {
            backends
                .iter()
                .try_for_each(|(id, record)| maps.put_backend(*id, record))
        })
    }

    fn put_backend_meta(&mut self, family: Family, metas: &[(u32, u64)]) -> Result<()> {
        with_family!(self, family, maps => {
            metas
                .iter()
                .try_for_each(|(id, meta)| maps.put_meta(*id, *meta))
        })
    }

    fn put_slots(&mut self, start: u32, ids: &[u32]) -> Result<()> {
        check_slots(start, ids, self.sizes.slots)?;
        let first = (start / SLOTS_PER_WORD) as usize;
        for (index, pair) in (first..).zip(ids.chunks(SLOTS_PER_WORD as usize)) {
            let value = pair
                .iter()
                .rev()
                .fold(0, |value, id| value << 32 | u64::from(*id));
            word(&self.slots, name::SLOTS, index)?.store(value, Ordering::Release);
        }
        Ok(())
    }

    fn store_service(&mut self, index: u32, which: ServiceWord, value: u64) -> Result<()> {
        in_bounds(name::SERVICES, index, self.sizes.services)?;
        let index = index as usize * (size_of::<Service>() / 8) + which.position();
        word(&self.services, name::SERVICES, index)?.store(value, Ordering::Release);
        Ok(())
    }

    fn put_frontends(
        &mut self,
        family: Family,
        frontends: &[(FrontendAt, FrontendValue)],
    ) -> Result<()> {
        with_family!(self, family, maps => maps.put_frontends(frontends))
    }

    fn delete_frontends(&mut self, family: Family, frontends: &[FrontendAt]) -> Result<()> {
        with_family!(self, family, maps => maps.delete_frontends(frontends))
    }

    fn put_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()> {
        with_family!(self, family, maps => maps.put_source_ranges(ranges))
    }

    fn delete_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()> {
        with_family!(self, family, maps => maps.delete_source_ranges(ranges))
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let read = |array: &MappedArray| -> Vec<u64> {
            let words = array.words().iter();
            words.map(|word| word.load(Ordering::Acquire)).collect()
        };
        let mut frontends = BTreeMap::new();
        self.v4.read_frontends(&mut frontends)?;
        self.v6.read_frontends(&mut frontends)?;
        let mut source_ranges = BTreeSet::new();
        self.v4.read_source_ranges(&mut source_ranges)?;
        self.v6.read_source_ranges(&mut source_ranges)?;
        let mut slots: Vec<u32> = read(&self.slots)
            .into_iter()
            .flat_map(|word| (0..SLOTS_PER_WORD).map(move |i| slot(word, i)))
            .collect();
        slots.truncate(slots.iter().rposition(|id| *id != 0).map_or(0, |i| i + 1));
        Ok(Snapshot {
            sizes: self.sizes,
            guard: read(&self.guard),
            guard_port: read(&self.guard_port),
            frontends: frontends.into_iter().collect(),
            services: elements::<Service>(&self.services).collect(),
            slots,
            backends: PerFamily {
                v4: self.v4.read_backends(),
                v6: self.v6.read_backends(),
            },
            source_ranges: source_ranges.into_iter().collect(),
        })
    }

    fn grace(&self) -> Result<()> {
        map::grace();
        Ok(())
    }

    fn visit_flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<()> {
        self.flows.visit(visit)
    }
}
