//! Whether the maps hold what they are known to hold (SEMANTICS G13), and what makes them hold it again.
//!
//! The planner knows each element that it wrote. Whoever else writes to a map, or whatever damages it, makes a
//! difference to that; it is written over, in the order of the phases. Nothing is looked at while something waits to be
//! written: then the maps are not yet what they ought to be.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};
use svc_lb_common::backend::GONE;
use svc_lb_common::limits::name;
use svc_lb_common::service::{Range, Service};
use svc_lb_common::{Family, Protocol};

use super::delta::Element;
use super::phases::{Draft, Op, Phase, Plan, Set, execute, gone};
use super::restore::STRAYS;
use super::{Planner, Table};
use crate::dataplane::{
    BackendRecord, Dataplane, FAMILIES, FrontendAt, FrontendValue, GuardBit, Result, ServiceWord,
    Snapshot, SourceRange,
};

/// The maps that are compared.
pub const AUDITED: [&str; 10] = [
    name::GUARD,
    name::GUARD_PORT,
    Table::Backends(Family::V4).name(),
    Table::Backends(Family::V6).name(),
    Table::Slots.name(),
    Table::SourceRanges(Family::V4).name(),
    Table::SourceRanges(Family::V6).name(),
    Table::Services.name(),
    Table::Frontends(Family::V4).name(),
    Table::Frontends(Family::V6).name(),
];

/// One element that is not as it was written.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// The map.
    pub map: String,
    /// Which element.
    pub element: String,
    /// What was written.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            map,
            element,
            expected,
            found,
        } = self;
        write!(f, "{map} {element}: {found} instead of {expected}")
    }
}

/// What an audit found.
#[derive(Debug, Default)]
pub struct Audit {
    /// In the order of the maps.
    pub drifts: Vec<Drift>,
    repair: Draft,
    /// Guard bits that stand for nothing; they go when no flow needs them.
    strays: Vec<GuardBit>,
}

/// What is said of an element that is not there.
const NOTHING: &str = "nothing";

impl Audit {
    fn found(
        &mut self,
        map: &str,
        element: impl Display,
        [expected, found]: [String; 2],
        phase: Phase,
        op: Op,
    ) {
        self.note(map, element, [expected, found]);
        self.repair.push(phase, op);
    }

    fn note(&mut self, map: &str, element: impl Display, [expected, found]: [String; 2]) {
        self.drifts.push(Drift {
            map: map.to_owned(),
            element: element.to_string(),
            expected,
            found,
        });
    }
}

impl Planner {
    /// Compares the maps, as `snapshot` has them, with what was written. `None` while something waits to be written or
    /// what an earlier agent left is not sorted out.
    #[must_use]
    pub fn audit(&self, snapshot: &Snapshot) -> Option<Audit> {
        let sorting = self.retired.values().any(|retired| retired.find_unheld);
        if self.is_pending() || self.restored.is_some() || sorting {
            return None;
        }
        let mut audit = Audit::default();
        self.audit_guard(snapshot, &mut audit);
        self.audit_backends(snapshot, &mut audit);
        self.audit_slots(snapshot, &mut audit);
        self.audit_source_ranges(snapshot, &mut audit);
        self.audit_services(snapshot, &mut audit);
        self.audit_frontends(snapshot, &mut audit);
        Some(audit)
    }

    /// Guard bits are shown by the word that they are in.
    fn audit_guard(&self, snapshot: &Snapshot, audit: &mut Audit) {
        let (missing, strays) = self
            .guard
            .differences(&snapshot.guard, &snapshot.guard_port);
        let mut words: BTreeMap<(&str, u32), [u64; 2]> = BTreeMap::new();
        for (bits, side) in [(&missing, 0), (&strays, 1)] {
            for bit in bits {
                let map = match bit {
                    GuardBit::Address { .. } => name::GUARD,
                    GuardBit::Port { .. } => name::GUARD_PORT,
                };
                let (word, mask) = bit.position();
                let sides = words.entry((map, word)).or_default();
                if let Some(side) = sides.get_mut(side) {
                    *side |= mask;
                }
            }
        }
        for ((map, index), [missing, stray]) in words {
            let table = if map == name::GUARD {
                &snapshot.guard
            } else {
                &snapshot.guard_port
            };
            let found = table.get(index as usize).copied().unwrap_or(0);
            let expected = found & !stray | missing;
            let texts = [expected, found].map(|word| format!("{word:#018x}"));
            audit.note(map, format_args!("word {index}"), texts);
        }
        if !missing.is_empty() {
            audit.repair.push(Phase::Guard, Op::SetGuard(missing));
        }
        audit.strays = strays;
    }

    fn audit_backends(&self, snapshot: &Snapshot, audit: &mut Audit) {
        for family in FAMILIES {
            let map = Table::Backends(family).name();
            let mut found: BTreeMap<u32, BackendRecord> =
                snapshot.backends.of(family).iter().copied().collect();
            for (service, port) in self.ports.iter().filter(|(_, port)| port.family == family) {
                for held in &port.held {
                    let Element::Bits(bits) = held.element else {
                        continue;
                    };
                    let expected = BackendRecord {
                        address: held.address,
                        generation: held.generation,
                        bits,
                        service: *service,
                    };
                    let found = found.remove(&held.id);
                    if found != Some(expected) {
                        let texts = [backend(Some(&expected)), backend(found.as_ref())];
                        let op = Op::PutBackend {
                            family,
                            id: held.id,
                            record: expected,
                        };
                        audit.found(
                            map,
                            format_args!("id {}", held.id),
                            texts,
                            Phase::Backends,
                            op,
                        );
                    }
                }
            }
            // Whoever is left belongs to nobody, and says so.
            for (id, record) in found.iter().filter(|(_, record)| record.bits & GONE == 0) {
                let texts = [NOTHING.to_owned(), backend(Some(record))];
                let record = gone(record.address, record.generation, record.service);
                let op = Op::Retire {
                    family,
                    id: *id,
                    record,
                };
                let element = format!("id {id}");
                audit.found(map, element, texts, Phase::BackendRemovals, op);
            }
        }
    }

    fn audit_slots(&self, snapshot: &Snapshot, audit: &mut Audit) {
        for (service, port) in &self.ports {
            for set in Set::ALL {
                let Some((range, ids)) = port.set(set).published() else {
                    continue;
                };
                let first = range.start() as usize;
                let at = |offset| snapshot.slots.get(first + offset).copied().unwrap_or(0);
                let wrong =
                    || (0..ids.len()).filter(|offset| ids.get(*offset) != Some(&at(*offset)));
                let Some(offset) = wrong().next() else {
                    continue;
                };
                let count = wrong().count();
                let expected = ids.get(offset).copied().unwrap_or(0);
                let texts = [
                    format!("id {expected}"),
                    format!(
                        "id {} ({count} slots of service {service} differ)",
                        at(offset)
                    ),
                ];
                let op = Op::FillSlots {
                    service: *service,
                    set,
                    start: range.start(),
                    ids: ids.into(),
                };
                let element = format!("position {}", first + offset);
                audit.found(name::SLOTS, element, texts, Phase::Slots, op);
            }
        }
    }

    fn audit_source_ranges(&self, snapshot: &Snapshot, audit: &mut Audit) {
        let (missing, extra) = self.source_ranges.compare(&snapshot.source_ranges);
        let element = |range: &SourceRange| format!("service {} {}", range.service, range.net);
        let map = |range: &SourceRange| Table::SourceRanges(range.family()).name();
        let texts = ["admitted", NOTHING].map(str::to_owned);
        for range in missing {
            let op = Op::PutSourceRange(range);
            let [expected, found] = texts.clone();
            audit.found(
                map(&range),
                element(&range),
                [expected, found],
                Phase::SourceRanges,
                op,
            );
        }
        for range in extra {
            let op = Op::DeleteSourceRange(range);
            let [found, expected] = texts.clone();
            let phase = Phase::SourceRangeRemovals;
            audit.found(map(&range), element(&range), [expected, found], phase, op);
        }
    }

    fn audit_services(&self, snapshot: &Snapshot, audit: &mut Audit) {
        let zero = Service::new(Range(0), Range(0), 0, 0);
        let found: BTreeMap<u32, Service> = snapshot.services.iter().copied().collect();
        let mut expected = self.idle.clone();
        let ports = self.ports.iter().filter(|(index, _)| **index != STRAYS);
        expected.extend(ports.map(|(index, port)| (*index, port.words())));
        let indexes = expected.keys().chain(found.keys());
        let indexes: std::collections::BTreeSet<u32> = indexes.copied().collect();
        for index in indexes {
            let of = |words: &BTreeMap<u32, Service>| words.get(&index).copied().unwrap_or(zero);
            let (expected, found) = (of(&expected), of(&found));
            let words = [
                (ServiceWord::Cluster, expected.cluster.0, found.cluster.0),
                (ServiceWord::Local, expected.local.0, found.local.0),
                (ServiceWord::Options, expected.options, found.options),
            ];
            for (word, expected, found) in words {
                if expected != found {
                    let texts = [expected, found].map(|value| format!("{value:#018x}"));
                    let op = Op::StoreService {
                        service: index,
                        word,
                        value: expected,
                    };
                    let element = format!("index {index}, {word:?}");
                    audit.found(name::SERVICES, element, texts, Phase::Services, op);
                }
            }
        }
    }

    fn audit_frontends(&self, snapshot: &Snapshot, audit: &mut Audit) {
        let index_of = |key: &_| self.named.get(key)?.index;
        let mut found: BTreeMap<FrontendAt, FrontendValue> =
            snapshot.frontends.iter().copied().collect();
        for (at, expected) in self.frontends.all_wanted(index_of) {
            let found = found.remove(&at);
            if found != Some(expected) {
                let texts = [frontend(Some(expected)), frontend(found)];
                let op = Op::PutFrontend {
                    at,
                    value: expected,
                };
                let map = Table::Frontends(at.family()).name();
                audit.found(map, Place(at), texts, Phase::Frontends, op);
            }
        }
        for (at, value) in found {
            let texts = [NOTHING.to_owned(), frontend(Some(value))];
            let map = Table::Frontends(at.family()).name();
            let op = Op::DeleteFrontend(at);
            audit.found(map, Place(at), texts, Phase::FrontendRemovals, op);
        }
    }
}

/// Makes the maps hold again what they are known to hold.
///
/// # Errors
/// What the store says; the next audit finds what is left.
pub fn repair(planner: &mut Planner, dataplane: &mut impl Dataplane, audit: Audit) -> Result<()> {
    let plan: Plan = audit.repair.finish();
    for batch in &plan.batches {
        execute(batch, dataplane)?;
    }
    planner.guard.clear_later(audit.strays);
    Ok(())
}

fn backend(record: Option<&BackendRecord>) -> String {
    record.map_or(NOTHING.to_owned(), |record| {
        let BackendRecord {
            address,
            generation,
            bits,
            service,
        } = record;
        format!("{address} of service {service}, generation {generation}, bits {bits:#x}")
    })
}

fn frontend(value: Option<FrontendValue>) -> String {
    value.map_or(NOTHING.to_owned(), |FrontendValue { service, kind }| {
        format!("service {service}, kind {kind}")
    })
}

/// A key of the frontends, for people.
struct Place(FrontendAt);

impl Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FrontendAt {
            address,
            port,
            protocol,
        } = self.0;
        match Protocol::from_number(protocol) {
            Some(protocol) => {
                let at = std::net::SocketAddr::new(address, port);
                write!(f, "{protocol} {at}")
            }
            None => write!(f, "address {address}"),
        }
    }
}
