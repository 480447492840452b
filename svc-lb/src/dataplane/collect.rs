//! Collects what has timed out: flows that are over, pins of clients, and fragmented datagrams.
//!
//! A pass walks over all entries, some at each tick, and so costs what its caller allows however many
//! there are.
//!
//! # What a packet may do meanwhile
//!
//! Programs and collector share no lock. That no flow is lost under a packet rests on this:
//!
//! - A packet that finds an entry not refreshed for a second refreshes both of the pair, and makes
//!   the other one again if it is missing. Only entries that are idle for [`MARGIN`] seconds beyond
//!   their timeout are touched, so every packet of theirs does that.
//! - A pair is over only if both entries say so, which are read once more for it.
//! - The forward entry goes first, by a call that returns what it was at that moment; if a packet had
//!   refreshed it after all, it is put back. Nothing is lost meanwhile: a client's packet that finds
//!   no forward entry finds the reverse one when it opens the flow again, and goes on with it.
//! - The reverse entry goes a tick later, if it is still over and alone. A packet that had found the
//!   forward entry has refreshed it by then. It too is put back if it was refreshed at that moment.
//!
//! What is left: an answer that arrives between the two calls that take a reverse entry out and put it
//! back. Some packet must have refreshed the flow, after its whole timeout, within the microsecond
//! before. And a packet of the backend that is held up between finding the reverse entry and
//! refreshing it, just when that is taken out: the flow is then over a moment early.
//!
//! `guard_direct` holds when a direct flow was last opened behind a position. A position goes back to
//! 0 by compare-and-swap with what it was when the pass began, if the pass met no direct flow of it:
//! a program that opened one since has written another time. Times of the last [`MARGIN`] seconds are
//! left alone, so another one differs. A flow that was there before the pass began was met, for the
//! walk goes through the maps in the order in which flows do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;

use aya_obj::generated::bpf_map_type;
use svc_lb_common::affinity::{Affinity, AffinityKey};
use svc_lb_common::conntrack::{Flow, FlowKey, flow};
use svc_lb_common::fragment::{FirstFragment, FragmentKey, REASSEMBLY_SECONDS};
use svc_lb_common::limits::name;
use svc_lb_common::outcome::{Lru, Tally};
use svc_lb_common::service::Service;
use svc_lb_common::{Addr4, Addr6, Family, HostAddress, guard};

use super::clock::Clock;
use super::kernel::{MapSet, Shape, failed, take_counters};
use super::sys::map::{MappedArray, TypedMap, Walk, from_words, per_cpu};
use super::{FlowClock, FlowState, FlowTable, Result, Timeouts};

/// Seconds beyond its timeout that an entry must be idle: programs write times a second late.
pub const MARGIN: u32 = 2;
/// Entries that are read at once, at most.
const BATCH: usize = 1_024;
/// A removal costs as much as looking at so many entries.
const REMOVAL: usize = 16;

/// Walks over the maps that evict.
#[derive(Debug)]
pub struct Collector {
    clock: Clock,
    timeouts: Timeouts,
    stages: Vec<Stage>,
    guard_direct: MappedArray,
    services: MappedArray,
    counters: OwnedFd,
    /// The pass that goes on.
    pass: Option<Pass>,
    /// Complete passes.
    passes: u64,
    ticks: u64,
    /// What the latest tick went beyond its budget by.
    debt: usize,
}

/// A pass that goes on.
#[derive(Debug)]
struct Pass {
    /// The stage it is at.
    stage: usize,
    /// Non-zero positions of `guard_direct` at its beginning.
    direct_before: BTreeMap<usize, u64>,
    /// Positions for which a direct flow was met.
    direct_used: BTreeSet<usize>,
}

/// One map of the walk.
#[derive(Debug)]
struct Stage {
    lru: Lru,
    family: Family,
    limit: u32,
    map: Box<dyn Collect>,
    /// Entries met and left in the pass that goes on.
    present: u64,
    /// The same of the latest complete pass.
    entries: u64,
    /// Entries taken out since the start.
    taken: u64,
    /// Flows or pins collected since the start.
    collected: BTreeMap<Reason, u64>,
    /// Flows put back since the start.
    put_back: u64,
    evictions: Evictions,
}

/// Why something was collected.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Reason {
    /// A flow timed out in this state.
    Flow(FlowState),
    /// A client had no new connection for its service's affinity timeout, or the service has none
    /// any more.
    Pin,
    /// A datagram that is not put together any more.
    Fragments,
}

impl Reason {
    /// As in the status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flow(state) => state.name(),
            Self::Pin => "affinity",
            Self::Fragments => "fragments",
        }
    }
}

/// An estimate of how many entries the kernel evicted, of which it tells nobody: what the programs
/// inserted, less what they removed, what was collected, and what is still there.
#[derive(Clone, Copy, Debug, Default)]
struct Evictions {
    /// The balance after the first pass, which knows nothing of what was before.
    base: Option<i64>,
    /// Since then. What comes and goes while a pass walks makes the balance waver; this never goes
    /// down.
    estimate: u64,
}

impl Evictions {
    fn update(&mut self, inserted: u64, gone_or_present: [u64; 3]) {
        let balance = gone_or_present
            .into_iter()
            .fold(inserted, u64::wrapping_sub)
            .cast_signed();
        let base = *self.base.get_or_insert(balance);
        let since = u64::try_from(balance.saturating_sub(base)).unwrap_or(0);
        self.estimate = self.estimate.max(since);
    }
}

/// What the latest pass found of one map.
#[derive(Clone, Debug)]
pub struct MapReport {
    /// The kind of map.
    pub lru: Lru,
    /// Whose entries.
    pub family: Family,
    /// Entries it has room for.
    pub limit: u32,
    /// Entries in it.
    pub entries: u64,
    /// Entries evicted since the first pass, estimated.
    pub evicted: u64,
    /// Flows or pins collected since the start.
    pub collected: BTreeMap<Reason, u64>,
    /// Flows put back since the start, because a packet came just when they were taken out.
    pub put_back: u64,
}

/// What there is to say after a pass.
#[derive(Clone, Debug, Default)]
pub struct PassReport {
    /// Complete passes.
    pub passes: u64,
    /// All maps.
    pub maps: Vec<MapReport>,
}

impl PassReport {
    /// How full the fullest map is, in hundredths.
    #[must_use]
    pub fn fullest(&self) -> u64 {
        let percent = |map: &MapReport| map.entries * 100 / u64::from(map.limit.max(1));
        self.maps.iter().map(percent).max().unwrap_or(0)
    }
}

/// What a step over a map needs, and what it finds.
struct Step<'a> {
    /// Number of the tick.
    tick: u64,
    now: FlowClock,
    timeouts: &'a Timeouts,
    services: &'a MappedArray,
    direct_used: &'a mut BTreeSet<usize>,
    met: usize,
    present: u64,
    taken: u64,
    put_back: u64,
    collected: Vec<Reason>,
}

/// A map whose entries can be collected.
trait Collect: Send + fmt::Debug {
    /// Looks at the next entries, about `count`.
    fn step(&mut self, count: usize, step: &mut Step<'_>) -> io::Result<Progress>;
}

/// How far a walk over a map is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Progress {
    /// There are more entries.
    More,
    /// Something must wait for the next tick.
    Wait,
    /// All entries were met.
    Done,
}

impl Collector {
    /// Takes the maps it walks over, after comparing each with the records.
    ///
    /// # Errors
    /// A map that is missing or not as expected, or the kernel's refusal.
    pub fn new(maps: &mut MapSet, timeouts: Timeouts) -> Result<Self> {
        let clock = Clock::new().map_err(|source| failed("read", CLOCK, source))?;
        let mut stages = Vec::new();
        for table in FlowTable::ALL {
            stages.push(flows::<Addr4>(maps, table)?);
            stages.push(flows::<Addr6>(maps, table)?);
        }
        stages.push(pins::<Addr4>(maps)?);
        stages.push(pins::<Addr6>(maps)?);
        stages.push(fragments::<Addr4>(maps)?);
        stages.push(fragments::<Addr6>(maps)?);
        let (guard_direct, _) = maps.take_array::<u64>(name::GUARD_DIRECT)?;
        let (services, _) = maps.take_array::<Service>(name::SERVICES)?;
        Ok(Self {
            clock,
            timeouts,
            stages,
            guard_direct,
            services,
            counters: take_counters(maps)?,
            pass: None,
            passes: 0,
            ticks: 0,
            debt: 0,
        })
    }

    /// Entries that all maps together have room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.stages.iter().map(|stage| stage.limit as usize).sum()
    }

    /// Goes on for about `budget` entries, of which a removal counts as several; begins a pass if
    /// none goes on. Returns what was found if it ends. Some milliseconds must lie between ticks.
    ///
    /// # Errors
    /// The kernel's refusal; the next tick goes on.
    pub fn tick(&mut self, budget: usize) -> Result<Option<PassReport>> {
        self.ticks += 1;
        let mut left = budget.saturating_sub(self.debt);
        self.debt = self.debt.saturating_sub(budget);
        while left > 0 {
            let now = self.now()?;
            let direct = &self.guard_direct;
            let pass = self.pass.get_or_insert_with(|| Pass::begin(now, direct));
            let Some(stage) = self.stages.get_mut(pass.stage) else {
                pass.clear_direct(&self.guard_direct);
                self.pass = None;
                self.passes += 1;
                return Ok(Some(self.report()));
            };
            let mut step = Step {
                tick: self.ticks,
                now,
                timeouts: &self.timeouts,
                services: &self.services,
                direct_used: &mut pass.direct_used,
                met: 0,
                present: 0,
                taken: 0,
                put_back: 0,
                collected: Vec::new(),
            };
            let result = stage.map.step(left.min(BATCH), &mut step);
            let cost = stage.note(step);
            self.debt += cost.saturating_sub(left);
            left = left.saturating_sub(cost);
            match result.map_err(|source| failed("walk over", stage.name(), source))? {
                Progress::More => {}
                Progress::Wait => return Ok(None),
                Progress::Done => {
                    stage.end(&self.counters)?;
                    pass.stage += 1;
                }
            }
        }
        Ok(None)
    }

    fn now(&self) -> Result<FlowClock> {
        let now = self.clock.now();
        now.map_err(|source| failed("read", CLOCK, source))
    }

    fn report(&self) -> PassReport {
        let maps = self.stages.iter().map(|stage| MapReport {
            lru: stage.lru,
            family: stage.family,
            limit: stage.limit,
            entries: stage.entries,
            evicted: stage.evictions.estimate,
            collected: stage.collected.clone(),
            put_back: stage.put_back,
        });
        PassReport {
            passes: self.passes,
            maps: maps.collect(),
        }
    }
}

/// What errors call the source of time.
const CLOCK: &str = "the programs' clock";

impl Pass {
    fn begin(now: FlowClock, guard_direct: &MappedArray) -> Self {
        let words = guard_direct.words().iter().enumerate();
        let direct_before = words
            .map(|(position, word)| (position, word.load(Ordering::Acquire)))
            .filter(|(_, opened)| {
                let [a, b, c, d, ..] = opened.to_le_bytes();
                let opened_at = u32::from_le_bytes([a, b, c, d]);
                *opened != 0 && now.seconds_since(opened_at) >= MARGIN
            })
            .collect();
        Self {
            stage: 0,
            direct_before,
            direct_used: BTreeSet::new(),
        }
    }

    /// Clears the positions behind which no direct flow is any more.
    fn clear_direct(&self, guard_direct: &MappedArray) {
        for (position, opened) in &self.direct_before {
            if self.direct_used.contains(position) {
                continue;
            }
            if let Some(word) = guard_direct.words().get(*position) {
                // A program that opened another one meanwhile has written another time.
                let _opened_since =
                    word.compare_exchange(*opened, 0, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }
}

impl Stage {
    fn new(lru: Lru, family: Family, limit: u32, map: Box<dyn Collect>) -> Self {
        Self {
            lru,
            family,
            limit,
            map,
            present: 0,
            entries: 0,
            taken: 0,
            collected: BTreeMap::new(),
            put_back: 0,
            evictions: Evictions::default(),
        }
    }

    const fn name(&self) -> &'static str {
        self.lru.name(self.family)
    }

    /// Notes what came of a step; returns what it cost.
    fn note(&mut self, step: Step<'_>) -> usize {
        // What was taken out had been met.
        self.present = (self.present + step.present).saturating_sub(step.taken);
        self.taken += step.taken;
        self.put_back += step.put_back;
        let removals = usize::try_from(step.taken + step.put_back).unwrap_or(BATCH);
        let cost = step.met + removals * REMOVAL;
        for reason in step.collected {
            *self.collected.entry(reason).or_default() += 1;
        }
        // Empty maps are read too.
        cost.max(1)
    }

    /// The map's last entry was met.
    fn end(&mut self, counters: &OwnedFd) -> Result<()> {
        let tally = |tally: Tally| {
            per_cpu(counters.as_fd(), tally.index(self.lru, self.family))
                .map(|values| values.into_iter().fold(0, u64::wrapping_add))
                .map_err(|source| failed("read", name::COUNTERS, source))
        };
        let (inserted, removed) = (tally(Tally::Inserted)?, tally(Tally::Removed)?);
        self.entries = std::mem::take(&mut self.present);
        self.evictions
            .update(inserted, [removed, self.taken, self.entries]);
        Ok(())
    }
}

fn flows<A: HostAddress>(maps: &mut MapSet, table: FlowTable) -> Result<Stage>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    let lru = table.lru();
    let shape = Shape::of::<FlowKey<A>, Flow<A>>(bpf_map_type::BPF_MAP_TYPE_LRU_HASH);
    let (map, limit) = maps.take_typed(lru.name(A::FAMILY), &shape)?;
    let flows = Flows::<A> {
        table,
        map,
        walk: Walk::new(),
        walked: false,
        alone: Vec::new(),
        alone_in: 0,
    };
    Ok(Stage::new(lru, A::FAMILY, limit, Box::new(flows)))
}

/// A map of flows.
#[derive(Debug)]
struct Flows<A: HostAddress> {
    table: FlowTable,
    map: TypedMap<FlowKey<A>, Flow<A>>,
    walk: Walk<FlowKey<A>, Flow<A>>,
    /// The walk has ended, but not yet what came of it.
    walked: bool,
    /// Reverse entries that were met alone and over in the tick of that number.
    alone: Vec<FlowKey<A>>,
    alone_in: u64,
}

impl<A: HostAddress> Collect for Flows<A>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    fn step(&mut self, count: usize, step: &mut Step<'_>) -> io::Result<Progress> {
        if self.alone_in != step.tick {
            for key in std::mem::take(&mut self.alone) {
                self.collect_reverse(&key, step)?;
            }
        }
        if !self.walked {
            self.walk(count, step)?;
            self.walked = self.walk.at_start();
        }
        Ok(match (self.walked, self.alone.is_empty()) {
            (false, _) => Progress::More,
            (true, false) => Progress::Wait,
            (true, true) => {
                self.walked = false;
                Progress::Done
            }
        })
    }
}

impl<A: HostAddress> Flows<A>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    fn walk(&mut self, count: usize, step: &mut Step<'_>) -> io::Result<()> {
        let mut over = Vec::new();
        for (key, flow) in self.walk.step(&self.map, count)? {
            step.met += 1;
            step.present += 1;
            if flow.traits & flow::DIRECT != 0 {
                let backend = match flow.traits & flow::REVERSE {
                    0 => key.destination,
                    _ => key.source,
                };
                let position = guard::direct_position(backend);
                step.direct_used.insert(position as usize);
            }
            if is_over(self.table, key, flow, step) {
                over.push((*key, *flow));
            }
        }
        for (key, flow) in over {
            let peer_key = flow.peer_key(key.protocol);
            let peer = self.map.get(&peer_key)?;
            let peer = peer.filter(|peer| peer.answers(&key));
            if flow.traits & flow::REVERSE == 0 {
                let peer_is_over = |peer| is_over(self.table, &peer_key, peer, step);
                if peer.as_ref().is_none_or(peer_is_over) {
                    self.collect_forward(&key, step)?;
                }
            } else if peer.is_none() {
                self.alone.push(key);
                self.alone_in = step.tick;
            }
        }
        Ok(())
    }

    /// Takes out the forward entry of a flow that is over.
    fn collect_forward(&self, key: &FlowKey<A>, step: &mut Step<'_>) -> io::Result<()> {
        let fresh = self.map.get(key)?;
        if !fresh.is_some_and(|flow| is_over(self.table, key, &flow, step)) {
            return Ok(());
        }
        if let Some(flow) = self.take(key, step)? {
            let state = FlowState::of(self.table, key.protocol, flow.state);
            step.collected.push(Reason::Flow(state));
        }
        Ok(())
    }

    /// Takes out a reverse entry that is over and alone.
    fn collect_reverse(&self, key: &FlowKey<A>, step: &mut Step<'_>) -> io::Result<()> {
        let Some(flow) = self.map.get(key)? else {
            return Ok(());
        };
        let forward = self.map.get(&flow.peer_key(key.protocol))?;
        if forward.is_some_and(|forward| forward.answers(key)) {
            return Ok(());
        }
        // Once more: who opens the flow again writes the reverse entry first.
        let flow = self.map.get(key)?;
        if flow.is_some_and(|flow| is_over(self.table, key, &flow, step)) {
            self.take(key, step)?;
        }
        Ok(())
    }

    /// Takes an entry out; puts it back if it was refreshed at the last moment.
    fn take(&self, key: &FlowKey<A>, step: &mut Step<'_>) -> io::Result<Option<Flow<A>>> {
        let Some(flow) = self.map.take(key)? else {
            return Ok(None);
        };
        if is_over(self.table, key, &flow, step) {
            step.taken += 1;
            return Ok(Some(flow));
        }
        // Unless a program was quicker.
        step.taken += u64::from(!self.map.insert_new(key, &flow)?);
        step.put_back += 1;
        Ok(None)
    }
}

/// Whether an entry is over, by itself.
fn is_over<A: HostAddress>(
    table: FlowTable,
    key: &FlowKey<A>,
    flow: &Flow<A>,
    step: &Step<'_>,
) -> bool {
    let state = FlowState::of(table, key.protocol, flow.state);
    let limit = step.timeouts.of(state).saturating_add(MARGIN);
    step.now.seconds_since(flow.seen) >= limit
}

fn pins<A: HostAddress>(maps: &mut MapSet) -> Result<Stage>
where
    AffinityKey<A>: aya::Pod,
{
    let is_old = is_old_pin::<A>;
    singles(maps, Lru::Affinity, A::FAMILY, Reason::Pin, is_old)
}

fn fragments<A: HostAddress>(maps: &mut MapSet) -> Result<Stage>
where
    FragmentKey<A>: aya::Pod,
{
    let is_old = |_: &FragmentKey<A>, first: &FirstFragment, step: &Step<'_>| {
        step.now.seconds_since(first.seen) >= REASSEMBLY_SECONDS.saturating_add(MARGIN)
    };
    singles(maps, Lru::Fragments, A::FAMILY, Reason::Fragments, is_old)
}

fn singles<K: aya::Pod + fmt::Debug + Send, V: aya::Pod + fmt::Debug + Send>(
    maps: &mut MapSet,
    lru: Lru,
    family: Family,
    reason: Reason,
    is_old: fn(&K, &V, &Step<'_>) -> bool,
) -> Result<Stage> {
    let shape = Shape::of::<K, V>(bpf_map_type::BPF_MAP_TYPE_LRU_HASH);
    let (map, limit) = maps.take_typed(lru.name(family), &shape)?;
    let singles = Singles {
        map,
        walk: Walk::new(),
        reason,
        is_old,
    };
    Ok(Stage::new(lru, family, limit, Box::new(singles)))
}

/// A map whose entries stand for themselves: clients' pins, or fragmented datagrams.
#[derive(Debug)]
struct Singles<K: aya::Pod, V: aya::Pod> {
    map: TypedMap<K, V>,
    walk: Walk<K, V>,
    reason: Reason,
    is_old: fn(&K, &V, &Step<'_>) -> bool,
}

impl<K: aya::Pod + fmt::Debug + Send, V: aya::Pod + fmt::Debug + Send> Collect for Singles<K, V> {
    fn step(&mut self, count: usize, step: &mut Step<'_>) -> io::Result<Progress> {
        let mut old = Vec::new();
        for (key, value) in self.walk.step(&self.map, count)? {
            step.met += 1;
            step.present += 1;
            if (self.is_old)(key, value, step) {
                old.push(*key);
            }
        }
        for key in old {
            let Some(value) = self.map.take(&key)? else {
                continue;
            };
            if (self.is_old)(&key, &value, step) {
                step.taken += 1;
                step.collected.push(self.reason);
            } else if !self.map.insert_new(&key, &value)? {
                // A packet wrote another one meanwhile: a pin to another backend, or the next datagram
                // with that id.
                step.taken += 1;
            }
        }
        Ok(if self.walk.at_start() {
            Progress::Done
        } else {
            Progress::More
        })
    }
}

/// Whether a pin no longer counts, and not since a moment only.
fn is_old_pin<A: HostAddress>(key: &AffinityKey<A>, pin: &Affinity, step: &Step<'_>) -> bool {
    let seconds = affinity_seconds(step.services, key.service);
    let [a, b, c, d, ..] = pin.seen.to_le_bytes();
    let idle = step.now.seconds_since(u32::from_le_bytes([a, b, c, d]));
    seconds == 0 || idle > seconds.saturating_add(MARGIN)
}

/// The affinity timeout of a service; 0 for none.
fn affinity_seconds(services: &MappedArray, index: u32) -> u32 {
    const WORDS: usize = size_of::<Service>() / 8;
    let start = index as usize * WORDS;
    let words: Option<Vec<u64>> = services.words().get(start..start + WORDS).map(|words| {
        words
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .collect()
    });
    words
        .and_then(|words| from_words::<Service>(&words))
        .map_or(0, |service| service.affinity_seconds())
}
