//! One service port as it is programmed, and what separates it from what is desired.

use std::net::SocketAddr;
use std::sync::Arc;

use svc_lb_common::Family;
use svc_lb_common::backend::{IN_CLUSTER, IN_LOCAL, LOCAL, SERVING};
use svc_lb_common::service::{Range, SLOTS_PER_WORD, Service, flag};

use super::phases::{Draft, Op, Phase, Set, gone, service_words};
use crate::compile::desired::{Backend, DesiredPort, PortKey, Selection};
use crate::dataplane::{BackendRecord, ServiceWord};

/// What is known about a backend's element.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Element {
    /// Not filled in, as far as is known; nothing names it.
    Unwritten,
    /// Filled in, with these bits.
    Bits(u32),
    /// Filled in; a store failed, so the bits are at most these.
    AtMost(u32),
}

/// A backend that has an id.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) address: SocketAddr,
    pub(super) id: u32,
    pub(super) generation: u16,
    pub(super) element: Element,
}

/// A backend whose id goes back: it may be marked gone already, so it cannot be used again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Condemned {
    pub(super) family: Family,
    pub(super) address: SocketAddr,
    pub(super) id: u32,
    pub(super) generation: u16,
}

/// A range on its way to be published.
#[derive(Clone, Debug)]
struct Next {
    range: Range,
    ids: Arc<[u32]>,
    filled: bool,
}

/// One set of a service: the range that is published and what it holds.
#[derive(Clone, Debug)]
pub(super) struct SlotSet {
    /// `None` after a store failed: `next` or one of `stale`.
    published: Option<Range>,
    /// What `published` holds.
    ids: Arc<[u32]>,
    next: Option<Next>,
    /// Ranges to be given back once it is known that they are not published.
    stale: Vec<Range>,
    sequence: u16,
}

/// Elements of `slots` that a range of `length` takes, in whole words.
pub(super) const fn footprint(length: u32) -> u32 {
    length.next_multiple_of(SLOTS_PER_WORD)
}

impl SlotSet {
    /// A set whose published range holds `ids`.
    pub(super) fn restored(range: Range, ids: &[u32]) -> Self {
        Self {
            published: Some(range),
            ids: ids.into(),
            next: None,
            stale: Vec::new(),
            sequence: range.sequence(),
        }
    }

    /// A set whose published range cannot be right; `owned` if its slots are nobody else's.
    pub(super) fn damaged(range: Range, owned: bool) -> Self {
        Self {
            published: None,
            ids: Arc::default(),
            next: None,
            stale: if owned { vec![range] } else { Vec::new() },
            sequence: range.sequence(),
        }
    }

    /// The range that readers find, and what was written to it.
    pub(super) fn published(&self) -> Option<(Range, &[u32])> {
        Some((self.published?, &self.ids))
    }

    /// Whether readers are known to find `ids`.
    pub(super) fn holds(&self, ids: &[u32]) -> bool {
        self.published.is_some() && *self.ids == *ids
    }

    /// Whether a range for `ids` is at hand.
    fn prepares(&self, ids: &[u32]) -> bool {
        self.next.as_ref().is_some_and(|next| *next.ids == *ids)
    }

    /// Whether publishing `ids` needs room for a fresh range.
    pub(super) fn needs_room(&self, ids: &[u32]) -> bool {
        !ids.is_empty() && !self.holds(ids) && !self.prepares(ids)
    }

    /// Decides what to publish next. `start` is where the fresh range is, if one is needed.
    pub(super) fn aim(&mut self, ids: &[u32], start: Option<u32>) {
        if self.holds(ids) {
            self.drop_next();
            return;
        }
        if self.prepares(ids) {
            return;
        }
        self.drop_next();
        self.sequence = self.sequence.wrapping_add(1);
        let length = u16::try_from(ids.len()).unwrap_or(u16::MAX);
        self.next = Some(Next {
            range: Range::new(start.unwrap_or(0), length, self.sequence),
            ids: ids.into(),
            filled: ids.is_empty(),
        });
    }

    /// The range to be published, if it is not.
    fn target(&self) -> Option<Range> {
        self.next.as_ref().map(|next| next.range)
    }

    fn drop_next(&mut self) {
        if let Some(next) = self.next.take() {
            self.stale.push(next.range);
        }
    }

    fn fill(&self, service: u32, set: Set) -> Option<Op> {
        let next = self.next.as_ref().filter(|next| !next.filled)?;
        Some(Op::FillSlots {
            service,
            set,
            start: next.range.start(),
            ids: Arc::clone(&next.ids),
        })
    }

    pub(super) fn was_filled(&mut self) {
        if let Some(next) = &mut self.next {
            next.filled = true;
        }
    }

    /// The range was published; gives back what no reader finds any more.
    pub(super) fn was_published(&mut self, range: Range) -> Vec<Range> {
        let Some(next) = self.next.take_if(|next| next.range == range) else {
            return Vec::new();
        };
        let mut free = std::mem::take(&mut self.stale);
        free.extend(self.published.replace(next.range));
        self.ids = next.ids;
        free.retain(|range| range.length() > 0);
        free
    }

    /// Whether the range was published is not known.
    pub(super) fn is_unknown(&mut self) {
        self.stale.extend(self.published.take());
    }

    /// Ranges that were prepared or replaced and are known not to be published.
    pub(super) fn take_unpublished(&mut self) -> Vec<Range> {
        if self.published.is_none() {
            return Vec::new();
        }
        let mut free = std::mem::take(&mut self.stale);
        free.retain(|range| range.length() > 0);
        free
    }
}

/// One service index in use.
#[derive(Clone, Debug)]
pub(super) struct Port {
    /// Whose; `None` for what a restart found and nobody has claimed.
    pub(super) key: Option<Arc<PortKey>>,
    pub(super) family: Family,
    /// Sorted by address, one for each.
    pub(super) held: Vec<Held>,
    pub(super) condemned: Vec<Condemned>,
    pub(super) cluster: SlotSet,
    pub(super) local: SlotSet,
    /// `None` after a store failed.
    pub(super) options: Option<u64>,
}

/// The bits of a backend.
pub(super) fn bits_of(backend: &Backend) -> u32 {
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    bit(backend.in_cluster, IN_CLUSTER)
        | bit(backend.in_local, IN_LOCAL)
        | bit(backend.serving, SERVING)
        | bit(backend.local, LOCAL)
}

/// The options word of a service.
pub(super) fn options_of(desired: &DesiredPort) -> u64 {
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    let flags = bit(desired.internal_local, flag::INTERNAL_LOCAL)
        | bit(desired.external_local, flag::EXTERNAL_LOCAL)
        | bit(desired.has_any, flag::HAS_ANY)
        | bit(desired.source_ranges.is_some(), flag::SOURCE_RANGES)
        | bit(desired.selection != Selection::Random, flag::MAGLEV);
    let seconds = desired.affinity_seconds.unwrap_or(0);
    Service::new(Range(0), Range(0), flags, seconds).options
}

impl Port {
    /// A port at an index that holds nothing but these words, whose ranges are empty.
    pub(super) fn new(key: Option<Arc<PortKey>>, family: Family, words: Service) -> Self {
        Self {
            key,
            family,
            held: Vec::new(),
            condemned: Vec::new(),
            cluster: SlotSet::restored(words.cluster, &[]),
            local: SlotSet::restored(words.local, &[]),
            options: Some(words.options),
        }
    }

    pub(super) const fn set(&self, set: Set) -> &SlotSet {
        match set {
            Set::Cluster => &self.cluster,
            Set::Local => &self.local,
        }
    }

    pub(super) const fn set_mut(&mut self, set: Set) -> &mut SlotSet {
        match set {
            Set::Cluster => &mut self.cluster,
            Set::Local => &mut self.local,
        }
    }

    pub(super) fn find(&self, address: SocketAddr) -> Option<&Held> {
        let position = self.position(address).ok()?;
        self.held.get(position)
    }

    pub(super) fn find_mut(&mut self, address: SocketAddr) -> Option<&mut Held> {
        let position = self.position(address).ok()?;
        self.held.get_mut(position)
    }

    fn position(&self, address: SocketAddr) -> Result<usize, usize> {
        self.held
            .binary_search_by(|held| held.address.cmp(&address))
    }

    /// Adds backends; their addresses are new here.
    pub(super) fn hold(&mut self, new: impl IntoIterator<Item = Held>) {
        self.held.extend(new);
        self.held.sort_unstable_by_key(|held| held.address);
    }

    /// Takes a backend out for good.
    pub(super) fn condemn(&mut self, address: SocketAddr, id: u32) {
        if let Ok(position) = self.position(address)
            && self.held.get(position).is_some_and(|held| held.id == id)
        {
            let held = self.held.remove(position);
            self.condemned.push(Condemned {
                family: Family::of(held.address.ip()),
                address: held.address,
                id: held.id,
                generation: held.generation,
            });
        }
    }

    /// Whether readers may be looking for its source ranges.
    pub(super) fn may_be_restricted(&self) -> bool {
        let restricted = |options: u64| options & u64::from(flag::SOURCE_RANGES) != 0;
        self.options.is_none_or(restricted)
    }

    /// Whether nothing is left to take back.
    pub(super) const fn is_empty(&self) -> bool {
        self.held.is_empty() && self.condemned.is_empty()
    }

    /// What separates the port from `desired`: whose backends are all held, and whose ranges are
    /// aimed at.
    pub(super) fn draft(&self, index: u32, desired: &DesiredPort, draft: &mut Draft) {
        let mut wanted = desired.backends.iter().peekable();
        for held in &self.held {
            while wanted
                .next_if(|backend| backend.address < held.address)
                .is_some()
            {}
            let backend = wanted.next_if(|backend| backend.address == held.address);
            self.draft_backend(index, held, backend.map(bits_of), draft);
        }
        for condemned in &self.condemned {
            draft.push(Phase::BackendRemovals, condemned.retire(index));
        }
        for set in Set::ALL {
            draft.extend(Phase::Slots, self.set(set).fill(index, set));
        }
        let options = options_of(desired);
        let changed = (self.options != Some(options)).then_some(options);
        service_words(index, self.targets(), changed, draft);
    }

    /// What takes the port out of the tables, its ranges aimed at nothing.
    pub(super) fn draft_removal(&self, index: u32, draft: &mut Draft) {
        service_words(index, self.targets(), None, draft);
        if self.options != Some(0) {
            draft.push(Phase::ServiceRemovals, clear_options(index));
        }
        for held in &self.held {
            self.draft_backend(index, held, None, draft);
        }
        for condemned in &self.condemned {
            draft.push(Phase::BackendRemovals, condemned.retire(index));
        }
    }

    /// The ranges to be published.
    fn targets(&self) -> impl Iterator<Item = (ServiceWord, Range)> {
        let target = |set: Set| Some((set.word(), self.set(set).target()?));
        Set::ALL.into_iter().filter_map(target)
    }

    /// Gains bits before the services, loses them after: a backend in a published range has the
    /// bits that go with it.
    fn draft_backend(&self, index: u32, held: &Held, wanted: Option<u32>, draft: &mut Draft) {
        let Held {
            address,
            id,
            generation,
            element,
        } = *held;
        let family = self.family;
        let record = |bits| BackendRecord {
            address,
            generation,
            bits,
            service: index,
        };
        let set_bits = |bits| Op::SetBits {
            family,
            id,
            record: record(bits),
        };
        let Some(wanted) = wanted else {
            let record = gone(address, generation, index);
            let op = Op::Retire { family, id, record };
            draft.push(Phase::BackendRemovals, op);
            return;
        };
        let most = match element {
            Element::Unwritten => {
                let record = record(wanted);
                let op = Op::PutBackend { family, id, record };
                draft.push(Phase::Backends, op);
                return;
            }
            Element::Bits(bits) | Element::AtMost(bits) => bits,
        };
        let union = most | wanted;
        if element != Element::Bits(union) {
            draft.push(Phase::Backends, set_bits(union));
        }
        if wanted != union {
            draft.push(Phase::BackendRemovals, set_bits(wanted));
        }
    }

    /// The words that an index without anything else holds.
    pub(super) fn words(&self) -> Service {
        let word = |set: Set| self.set(set).published.unwrap_or_default();
        Service {
            cluster: word(Set::Cluster),
            local: word(Set::Local),
            options: self.options.unwrap_or(0),
        }
    }
}

impl Condemned {
    fn retire(&self, index: u32) -> Op {
        Op::Retire {
            family: self.family,
            id: self.id,
            record: gone(self.address, self.generation, index),
        }
    }
}

/// Leaves nothing of an index that nobody finds.
pub(super) const fn clear_options(index: u32) -> Op {
    Op::StoreService {
        service: index,
        word: ServiceWord::Options,
        value: 0,
    }
}

/// Which word of which set, if it is a set's.
pub(super) const fn set_of(word: ServiceWord) -> Option<Set> {
    match word {
        ServiceWord::Cluster => Some(Set::Cluster),
        ServiceWord::Local => Some(Set::Local),
        ServiceWord::Options => None,
    }
}
