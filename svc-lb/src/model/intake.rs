//! Settles which source owns which object, and holds back every list until it is complete.
//!
//! Nothing is programmed and nothing removed from a partial list (SEMANTICS G8): no edit leaves
//! before every source has completed its first list, and a later list of one source takes effect
//! as a whole, at its end.

use std::collections::{BTreeMap, BTreeSet};

use super::change::{Batch, Change, Edit, Kind, Object, ObjectKey, SourceId};

/// The lists of all sources.
///
/// An object that two sources name belongs to the one that named it last; what the other one says
/// about its absence is ignored from then on.
#[derive(Debug)]
pub struct Intake {
    listings: BTreeMap<SourceId, Listing>,
    owners: BTreeMap<ObjectKey, SourceId>,
    started: bool,
}

/// What a source named; none where it could not be read.
type Named = BTreeMap<ObjectKey, Option<Object>>;

/// Where a source is with its list.
#[derive(Debug)]
enum Listing {
    /// What it named since the list began.
    Partial(Named),
    /// Complete, but another source's first list is not.
    Waiting(Named),
    /// In effect: changes pass.
    Live,
}

impl Intake {
    /// Expects a first list from each of `sources`.
    pub fn new(sources: impl IntoIterator<Item = SourceId>) -> Self {
        let listings = sources
            .into_iter()
            .map(|source| (source, Listing::Partial(BTreeMap::new())))
            .collect();
        Self {
            listings,
            owners: BTreeMap::new(),
            started: false,
        }
    }

    /// Takes a batch; returns what takes effect now, in order.
    ///
    /// A batch of a source that `new` was not told about is a list of its own from then on.
    pub fn apply(&mut self, batch: Batch) -> Vec<Edit> {
        let Batch { source, changes } = batch;
        let mut edits = Vec::new();
        for change in changes {
            self.apply_one(source, change, &mut edits);
        }
        edits
    }

    /// Every source has completed its first list: edits pass.
    #[must_use]
    pub fn started(&self) -> bool {
        self.started
    }

    /// Sources whose current list is not complete.
    #[must_use]
    pub fn incomplete(&self) -> Vec<SourceId> {
        let partial = |listing: &Listing| matches!(listing, Listing::Partial(_));
        self.listings
            .iter()
            .filter(|(_, l)| partial(l))
            .map(|(source, _)| *source)
            .collect()
    }

    fn apply_one(&mut self, source: SourceId, change: Change, edits: &mut Vec<Edit>) {
        let listing = self
            .listings
            .entry(source)
            .or_insert_with(|| Listing::Partial(BTreeMap::new()));
        match (change, listing) {
            (Change::Resync, listing) => *listing = Listing::Partial(BTreeMap::new()),
            (Change::InitialListComplete, Listing::Waiting(_) | Listing::Live)
            | (Change::Unreadable(_), Listing::Live)
            | (Change::Triggered(_), _) => {}
            (Change::InitialListComplete, Listing::Partial(held)) => {
                let objects = std::mem::take(held);
                self.complete(source, objects, edits);
            }
            (
                Change::Replace {
                    kind,
                    objects,
                    unreadable,
                },
                listing,
            ) => {
                let named = named(objects, unreadable);
                match listing {
                    Listing::Live => self.release(source, Some(kind), named, edits),
                    Listing::Partial(held) | Listing::Waiting(held) => {
                        held.retain(|key, _| key.kind != kind);
                        held.extend(named);
                    }
                }
            }
            (Change::Unreadable(key), Listing::Partial(held) | Listing::Waiting(held)) => {
                held.entry(key).or_insert(None);
            }
            (Change::Upsert(object), Listing::Partial(held) | Listing::Waiting(held)) => {
                held.insert(object.key(), Some(object));
            }
            (Change::Delete(key), Listing::Partial(held) | Listing::Waiting(held)) => {
                held.remove(&key);
            }
            (Change::Upsert(object), Listing::Live) => {
                self.owners.insert(object.key(), source);
                edits.push(Edit::Upsert(object));
            }
            (Change::Delete(key), Listing::Live) => {
                if self.owners.get(&key) == Some(&source) {
                    self.owners.remove(&key);
                    edits.push(Edit::Delete(key));
                }
            }
        }
    }

    fn complete(&mut self, source: SourceId, objects: Named, edits: &mut Vec<Edit>) {
        if self.started {
            self.listings.insert(source, Listing::Live);
            self.release(source, None, objects, edits);
            return;
        }
        self.listings.insert(source, Listing::Waiting(objects));
        if !self.incomplete().is_empty() {
            return;
        }
        self.started = true;
        for (source, listing) in std::mem::take(&mut self.listings) {
            if let Listing::Waiting(objects) = listing {
                self.release(source, None, objects, edits);
            }
            self.listings.insert(source, Listing::Live);
        }
    }

    /// Replaces all that `source` owned (of one kind, or of any) by `objects`. Removals come last, so that an object that
    /// moved (an endpoint from one slice to another) is never missing in between.
    fn release(
        &mut self,
        source: SourceId,
        kind: Option<Kind>,
        objects: Named,
        edits: &mut Vec<Edit>,
    ) {
        let concerned = |key: &ObjectKey| kind.is_none_or(|kind| key.kind == kind);
        let named: BTreeSet<&ObjectKey> = objects.keys().collect();
        let gone: Vec<ObjectKey> = self
            .owners
            .iter()
            .filter(|(key, owner)| **owner == source && concerned(key) && !named.contains(key))
            .map(|(key, _)| key.clone())
            .collect();
        for (key, object) in objects {
            let Some(object) = object else { continue };
            self.owners.insert(key, source);
            edits.push(Edit::Upsert(object));
        }
        for key in gone {
            self.owners.remove(&key);
            edits.push(Edit::Delete(key));
        }
    }
}

fn named(objects: Vec<Object>, unreadable: Vec<ObjectKey>) -> Named {
    let read = objects
        .into_iter()
        .map(|object| (object.key(), Some(object)));
    // An object that was read as well is not unreadable.
    unreadable
        .into_iter()
        .map(|key| (key, None))
        .chain(read)
        .collect()
}
