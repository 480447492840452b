//! What is to be written, in which order, as data; and writing it.
//!
//! Make before break. After every single store a reader, which goes frontend -> service -> range
//! -> slot -> backend, meets either the old or the new state of a service, never a mixture:
//!
//! | phase | so that |
//! | --- | --- |
//! | [`Guard`](Phase::Guard) | no packet to or from a new address slips past the guard |
//! | [`Backends`](Phase::Backends) | every id that a slot will name exists; bits only grow |
//! | [`Slots`](Phase::Slots) | fresh ranges are full before anything names them |
//! | [`SourceRanges`](Phase::SourceRanges) | whoever a service will admit is there before its flag is |
//! | [`Services`](Phase::Services) | one store swaps a range; see [`service_words`] |
//! | [`Frontends`](Phase::Frontends) | clients find only services that are complete |
//! | [`FrontendRemovals`](Phase::FrontendRemovals) | clients stop finding what goes |
//! | [`ServiceRemovals`](Phase::ServiceRemovals) | sets that end empty, or that nobody finds, are emptied |
//! | [`SourceRangeRemovals`](Phase::SourceRangeRemovals) | nobody looks for what is missing |
//! | [`BackendRemovals`](Phase::BackendRemovals) | ids that no range names are marked gone |
//!
//! What the last four leave behind is reused only after a grace period
//! ([`Planner::reclaim`](super::Planner::reclaim)).

use std::net::SocketAddr;
use std::sync::Arc;

use serde::Serialize;
use svc_lb_common::Family;
use svc_lb_common::service::Range;

use crate::dataplane::{
    BackendRecord, Dataplane, DataplaneError, FAMILIES, FrontendAt, FrontendValue, GuardBit,
    PerFamily, Result, ServiceWord, SourceRange,
};

/// The steps of a plan, in order.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Guard bits are set.
    Guard,
    /// New backends are filled in, bits of others gained.
    Backends,
    /// Fresh slot ranges are filled.
    Slots,
    /// Source ranges are inserted; those that no flag leads to are deleted.
    SourceRanges,
    /// Ranges and options of services are published.
    Services,
    /// Frontends and address entries are inserted or pointed elsewhere.
    Frontends,
    /// Frontends and address entries are deleted.
    FrontendRemovals,
    /// Sets that end empty are emptied, and services without frontends.
    ServiceRemovals,
    /// Source ranges are deleted.
    SourceRangeRemovals,
    /// Bits of backends are lost; backends that left are marked gone, one generation on.
    BackendRemovals,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 10] = [
        Self::Guard,
        Self::Backends,
        Self::Slots,
        Self::SourceRanges,
        Self::Services,
        Self::Frontends,
        Self::FrontendRemovals,
        Self::ServiceRemovals,
        Self::SourceRangeRemovals,
        Self::BackendRemovals,
    ];
}

/// One write.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op {
    /// Sets guard bits.
    SetGuard(Vec<GuardBit>),
    /// Fills in a backend that nothing names yet.
    PutBackend {
        /// Its table.
        family: Family,
        /// Its id.
        id: u32,
        /// The whole element.
        record: BackendRecord,
    },
    /// Changes a backend's bits.
    SetBits {
        /// Its table.
        family: Family,
        /// Its id.
        id: u32,
        /// The element as it will read.
        record: BackendRecord,
    },
    /// Marks a backend gone.
    Retire {
        /// Its table.
        family: Family,
        /// Its id.
        id: u32,
        /// The element as it will read.
        record: BackendRecord,
    },
    /// Fills a range that nothing names yet.
    FillSlots {
        /// The service it is for.
        service: u32,
        /// For which of its sets.
        set: Set,
        /// First position.
        start: u32,
        /// Backend ids.
        ids: Arc<[u32]>,
    },
    /// Publishes one word of a service.
    StoreService {
        /// Index.
        service: u32,
        /// Which word.
        word: ServiceWord,
        /// Its value.
        value: u64,
    },
    /// Inserts a source range.
    PutSourceRange(SourceRange),
    /// Deletes a source range.
    DeleteSourceRange(SourceRange),
    /// Inserts or replaces a frontend or an address entry.
    PutFrontend {
        /// Key.
        at: FrontendAt,
        /// Value.
        value: FrontendValue,
    },
    /// Deletes a frontend or an address entry.
    DeleteFrontend(FrontendAt),
}

/// The sets that new flows pick from.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Set {
    /// Endpoints anywhere.
    Cluster,
    /// Endpoints on this node.
    Local,
}

impl Set {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Cluster, Self::Local];

    /// The word of the service that publishes it.
    #[must_use]
    pub const fn word(self) -> ServiceWord {
        match self {
            Self::Cluster => ServiceWord::Cluster,
            Self::Local => ServiceWord::Local,
        }
    }
}

/// The writes of one phase.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Batch {
    /// Which.
    pub phase: Phase,
    /// In order.
    pub ops: Vec<Op>,
}

impl Batch {
    /// Whether there is nothing to do.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Number of writes.
    #[must_use]
    pub fn len(&self) -> usize {
        let writes = |op: &Op| match op {
            Op::SetGuard(bits) => bits.len(),
            Op::FillSlots { ids, .. } => ids.len(),
            Op::PutBackend { .. }
            | Op::SetBits { .. }
            | Op::Retire { .. }
            | Op::StoreService { .. }
            | Op::PutSourceRange(_)
            | Op::DeleteSourceRange(_)
            | Op::PutFrontend { .. }
            | Op::DeleteFrontend(_) => 1,
        };
        self.ops.iter().map(writes).sum()
    }
}

/// Everything that is to be written now: [`Planner::plan`](super::Planner::plan) makes it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Plan {
    /// Phases with something to do, in order.
    pub batches: Vec<Batch>,
}

impl Plan {
    /// Whether there is nothing to do.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Number of writes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.batches.iter().map(Batch::len).sum()
    }
}

/// Collects writes by phase while a plan is made.
#[derive(Debug, Default)]
pub(super) struct Draft {
    ops: std::collections::BTreeMap<Phase, Vec<Op>>,
}

impl Draft {
    pub(super) fn push(&mut self, phase: Phase, op: Op) {
        self.ops.entry(phase).or_default().push(op);
    }

    pub(super) fn extend(&mut self, phase: Phase, ops: impl IntoIterator<Item = Op>) {
        for op in ops {
            self.push(phase, op);
        }
    }

    pub(super) fn finish(self) -> Plan {
        let batch = |(phase, ops)| Batch { phase, ops };
        Plan {
            batches: self.ops.into_iter().map(batch).collect(),
        }
    }
}

/// Drafts the stores that take a service from one state to the next, given the words that change:
/// sets that will hold something, then the options, and much later sets that will be empty.
///
/// The options say which set a kind of client uses. Take any such choice with a set that is not
/// empty before and one that is not empty after. Until the options change, clients use the old
/// set: untouched, or already replaced by its new, non-empty value. When they change, the new set
/// is published already. The old one is emptied only after that, and after the frontends: one that
/// goes to another service at the same time is never seen with a set that is emptied here. (Only
/// where its old service switches its policy as well, the switch may show it an empty set first.
/// And a program that has read the old options and reads its range only after both later stores
/// can still meet an emptied set: its packet meets what an empty set is met with.)
pub(super) fn service_words(
    service: u32,
    ranges: impl IntoIterator<Item = (ServiceWord, Range)>,
    options: Option<u64>,
    draft: &mut Draft,
) {
    let mut store = |phase, word, value| {
        let op = Op::StoreService {
            service,
            word,
            value,
        };
        draft.push(phase, op);
    };
    for (word, range) in ranges {
        let phase = match range.length() {
            0 => Phase::ServiceRemovals,
            _ => Phase::Services,
        };
        store(phase, word, range.0);
    }
    if let Some(value) = options {
        store(Phase::Services, ServiceWord::Options, value);
    }
}

/// Writes that go to the store in one call each.
const CALL: usize = 4_096;

/// Writes collected for a call, in the order they were given.
#[derive(Default)]
struct Calls {
    writes: usize,
    backends: PerFamily<Vec<(u32, BackendRecord)>>,
    metas: PerFamily<Vec<(u32, u64)>>,
    frontends: PerFamily<Vec<(FrontendAt, FrontendValue)>>,
    removals: PerFamily<Vec<FrontendAt>>,
    ranges: PerFamily<Vec<SourceRange>>,
    range_removals: PerFamily<Vec<SourceRange>>,
}

/// Does one phase. After an error any part of it may be done.
///
/// # Errors
/// What the store says.
pub fn execute(batch: &Batch, dataplane: &mut impl Dataplane) -> Result<()> {
    let mut calls = Calls::default();
    for op in &batch.ops {
        match op {
            Op::SetGuard(bits) => dataplane.set_guard(bits)?,
            Op::PutBackend { family, id, record } => {
                calls.backends.of_mut(*family).push((*id, *record));
            }
            Op::SetBits { family, id, record } | Op::Retire { family, id, record } => {
                calls.metas.of_mut(*family).push((*id, record.meta()));
            }
            Op::FillSlots { start, ids, .. } => dataplane.put_slots(*start, ids)?,
            Op::StoreService {
                service,
                word,
                value,
            } => dataplane.store_service(*service, *word, *value)?,
            Op::PutSourceRange(range) => calls.ranges.of_mut(range.family()).push(*range),
            Op::DeleteSourceRange(range) => {
                calls.range_removals.of_mut(range.family()).push(*range);
            }
            Op::PutFrontend { at, value } => {
                calls.frontends.of_mut(at.family()).push((*at, *value));
            }
            Op::DeleteFrontend(at) => calls.removals.of_mut(at.family()).push(*at),
        }
        calls.writes += 1;
        if calls.writes == CALL {
            std::mem::take(&mut calls).run(dataplane)?;
        }
    }
    calls.run(dataplane)
}

impl Calls {
    fn run(&self, dataplane: &mut impl Dataplane) -> Result<()> {
        for family in FAMILIES {
            let backends = self.backends.of(family);
            if !backends.is_empty() {
                dataplane.put_backends(family, backends)?;
            }
            let metas = self.metas.of(family);
            if !metas.is_empty() {
                dataplane.put_backend_meta(family, metas)?;
            }
            let frontends = self.frontends.of(family);
            if !frontends.is_empty() {
                dataplane.put_frontends(family, frontends)?;
            }
            // Those that go make room for those that come.
            let range_removals = self.range_removals.of(family);
            if !range_removals.is_empty() {
                dataplane.delete_source_ranges(family, range_removals)?;
            }
            let ranges = self.ranges.of(family);
            if !ranges.is_empty() {
                dataplane.put_source_ranges(family, ranges)?;
            }
            let removals = self.removals.of(family);
            if !removals.is_empty() {
                dataplane.delete_frontends(family, removals)?;
            }
        }
        Ok(())
    }
}

/// A phase that was not done, or not in full. The rest of the plan is pending.
#[derive(Debug, thiserror::Error)]
#[error("phase {phase:?} of {writes} writes failed")]
pub struct ApplyError {
    /// Which.
    pub phase: Phase,
    /// How many writes it has.
    pub writes: usize,
    /// Why.
    pub source: DataplaneError,
}

/// The element of a backend that has left its service.
pub(super) fn gone(address: SocketAddr, generation: u16, service: u32) -> BackendRecord {
    BackendRecord {
        address,
        generation: generation.wrapping_add(1),
        bits: svc_lb_common::backend::GONE,
        service,
    }
}
