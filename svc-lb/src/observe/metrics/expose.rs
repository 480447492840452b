//! One scrape: what is known at the moment, as text.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric as Encoded, Registry};
use svc_lb_common::outcome::{Event, Fate, Hook, Outcome, counter};

use super::{Metric, SyncFigures};
use crate::observe::status::{MapStatus, Status};
use crate::plan::AUDITED;

/// What a scrape shows.
#[derive(Debug)]
pub struct Facts<'a> {
    /// How the agent is.
    pub status: &'a Status,
    /// The programs' counters, summed over the CPUs.
    pub counters: &'a [u64],
    /// The way from changes to the maps.
    pub sync: &'a SyncFigures,
}

type Labels = Vec<(&'static str, String)>;

/// The text that Prometheus reads (version 0.0.4).
///
/// # Errors
/// None that a `String` has.
pub fn text(facts: &Facts<'_>) -> Result<String, fmt::Error> {
    let mut scrape = Scrape::default();
    scrape.programs(facts.counters);
    scrape.maps(facts.status);
    scrape.agent(facts.status);
    scrape.sync(facts.sync);
    scrape.process();
    let mut text = String::new();
    prometheus_text::encode(&mut text, &scrape.0)?;
    Ok(text)
}

#[derive(Default)]
struct Scrape(Registry);

impl Scrape {
    fn register(&mut self, metric: &Metric, encoded: impl Encoded) {
        self.0
            .register(metric.bare_name(), metric.bare_help(), encoded);
    }

    /// Labels are given in the order in which they are declared.
    fn counters<const N: usize>(
        &mut self,
        metric: &Metric,
        values: impl IntoIterator<Item = ([String; N], u64)>,
    ) {
        let family = Family::<Labels, Counter>::default();
        for (labels, value) in values {
            let labels = metric.labels.iter().copied().zip(labels).collect();
            family.get_or_create_owned(&labels).inc_by(value);
        }
        self.register(metric, family);
    }

    /// The same of gauges.
    fn gauges<const N: usize>(
        &mut self,
        metric: &Metric,
        values: impl IntoIterator<Item = ([String; N], f64)>,
    ) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in values {
            let labels = metric.labels.iter().copied().zip(labels).collect();
            family.get_or_create_owned(&labels).set(value);
        }
        self.register(metric, family);
    }

    fn programs(&mut self, counters: &[u64]) {
        let value = |index: u32| counters.get(index as usize).copied().unwrap_or(0);
        let packets = Hook::ALL.iter().flat_map(|hook| {
            // What is not ours is the only outcome that is not counted.
            let counted = Outcome::ALL.iter().filter(|o| **o != Outcome::NotOurs);
            counted.map(move |outcome| {
                let fate = match outcome.fate() {
                    Fate::Pass => "pass",
                    Fate::Drop => "drop",
                };
                let labels = [hook.name(), outcome.name(), fate].map(str::to_owned);
                (labels, value(counter(*hook, *outcome)))
            })
        });
        self.counters(&super::PACKETS, packets);
        let events = Event::ALL.iter();
        let events = events.map(|event| ([event.name().to_owned()], value(event.index())));
        self.counters(&super::EVENTS, events);
    }

    fn maps(&mut self, status: &Status) {
        let maps = || status.maps.iter();
        let of = |map: &MapStatus, value| ([map.name.clone()], value);
        self.gauges(
            &super::MAP_ENTRIES,
            maps().filter_map(|map| Some(of(map, float(map.entries?)))),
        );
        self.gauges(
            &super::MAP_CAPACITY,
            maps().map(|map| of(map, map.limit.into())),
        );
        self.gauges(
            &super::MAP_BYTES,
            maps().filter_map(|map| Some(of(map, float(map.bytes?)))),
        );
        let flow_maps = || status.flows.maps.iter();
        self.counters(
            &super::MAP_EVICTIONS,
            flow_maps().map(|map| ([map.name.clone()], map.evicted)),
        );
        let collected = flow_maps().flat_map(|map| {
            let of_map = map.collected.iter();
            of_map.map(|(state, count)| ([map.name.clone(), state.clone()], *count))
        });
        self.counters(&super::COLLECTED, collected);
    }

    fn agent(&mut self, status: &Status) {
        let services = &status.services;
        let numbers = [
            ("known", services.known),
            ("programmed", services.programmed),
            ("not_programmed", services.not_programmed.len()),
        ];
        self.gauges(
            &super::SERVICES,
            numbers.map(|(state, count)| ([state.to_owned()], float(count as u64))),
        );
        let one = |value| [([], value)];
        self.gauges(&super::SERVICE_PORTS, one(float(services.ports as u64)));
        self.gauges(&super::REFUSALS, one(float(services.refusals.len() as u64)));
        self.counters(&super::WRITES, [([], services.writes)]);
        self.counters(&super::WRITE_FAILURES, [([], services.failures)]);
        let audit = &services.audit;
        self.counters(&super::AUDITS, [([], audit.passes)]);
        self.counters(
            &super::REPAIRED,
            AUDITED.map(|map| {
                let repaired = audit.repaired.get(map).copied().unwrap_or(0);
                ([map.to_owned()], repaired)
            }),
        );
        self.gauges(&super::PENDING, one(services.pending.into()));
        self.gauges(&super::READY, one(status.ready.into()));
        let edges = ["uplink", "pod"].map(|kind| {
            let count = status.edges.iter().filter(|edge| edge.role == kind);
            ([kind.to_owned()], float(count.count() as u64))
        });
        self.gauges(&super::EDGES, edges);
        self.gauges(
            &super::EDGES_REFUSED,
            one(float(status.refused.len() as u64)),
        );
        let sources = || status.sources.iter();
        self.gauges(
            &super::SOURCE_LISTED,
            sources().map(|source| ([source.name.clone()], source.listed.into())),
        );
        self.counters(
            &super::SOURCE_CHANGES,
            sources().map(|source| ([source.name.clone()], source.changes)),
        );
        self.counters(
            &super::SOURCE_MALFORMED,
            sources().map(|source| ([source.name.clone()], source.malformed)),
        );
        self.gauges(
            &super::SOURCE_PROBLEMS,
            sources().map(|source| ([source.name.clone()], float(source.problems.len() as u64))),
        );
        let proxy = &status.health.proxy;
        for (metric, counts) in [
            (&super::HEALTHZ, proxy.proxy_healthz_total),
            (&super::LIVEZ, proxy.proxy_livez_total),
        ] {
            let codes = [("200", counts.ok), ("503", counts.unavailable)];
            self.counters(metric, codes.map(|(code, n)| ([code.to_owned()], n)));
        }
        let versions = [
            status.version.clone(),
            status.layout.to_string(),
            status.kernel.clone(),
        ];
        self.gauges(&super::BUILD_INFO, [(versions, 1.0)]);
    }

    fn sync(&mut self, sync: &SyncFigures) {
        self.register(&super::SYNC_DURATION, sync.duration.clone());
        self.register(&super::SYNC_FULL, sync.full.clone());
        self.register(&super::SYNC_PARTIAL, sync.partial.clone());
        self.register(&super::SYNC_LAST, sync.last.clone());
        self.register(&super::SYNC_LAST_QUEUED, sync.last_queued.clone());
        self.register(&super::SERVICE_CHANGES, sync.service_changes.clone());
        self.register(
            &super::SERVICE_CHANGES_PENDING,
            sync.services_pending.clone(),
        );
        self.register(&super::ENDPOINT_CHANGES, sync.endpoint_changes.clone());
        self.register(
            &super::ENDPOINT_CHANGES_PENDING,
            sync.endpoints_pending.clone(),
        );
        self.register(
            &super::NETWORK_PROGRAMMING,
            sync.network_programming.clone(),
        );
    }

    /// As all clients of Prometheus show their process; nothing where /proc does not tell.
    fn process(&mut self) {
        let Ok(process) = procfs::process::Process::myself() else {
            return;
        };
        let one = |value| [([], value)];
        if let Ok(stat) = process.stat() {
            let ticks = float(procfs::ticks_per_second());
            let cpu = Counter::<f64, AtomicU64>::default();
            cpu.inc_by(float(stat.utime + stat.stime) / ticks);
            self.register(&super::CPU, cpu);
            self.gauges(&super::RESIDENT, one(float(stat.rss * procfs::page_size())));
            self.gauges(&super::VIRTUAL, one(float(stat.vsize)));
            if let Ok(boot) = procfs::boot_time_secs() {
                let start = float(boot) + float(stat.starttime) / ticks;
                self.gauges(&super::START_TIME, one(start));
            }
        }
        if let Ok(count) = process.fd_count() {
            self.gauges(&super::OPEN_FDS, one(float(count as u64)));
        }
        if let Ok(limits) = process.limits()
            && let procfs::process::LimitValue::Value(max) = limits.max_open_files.soft_limit
        {
            self.gauges(&super::MAX_FDS, one(float(max)));
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus knows floats only; figures beyond 2^53 are not met"
)]
const fn float(value: u64) -> f64 {
    value as f64
}
