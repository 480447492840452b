//! Gathers the status from those who know.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use svc_lb_common::edge::Edge;
use svc_lb_common::limits::{LAYOUT_VERSION, name};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use super::admin::{Answer, Request};
use super::apply::{Question, Summary};
use super::edges;
use crate::dataplane::collect::PassReport;
use crate::dataplane::pins::Pins;
use crate::dataplane::sys::map::map_info;
use crate::dataplane::{Timeouts, kernel, loader};
use crate::health::proxy::{Bind, Moment, ProxyHealth};
use crate::health::services::Report;
use crate::observe::metrics::{self, Facts, SyncFigures};
use crate::observe::status::{
    FlowsStatus, HealthStatus, LruStatus, MapStatus, ProgramStatus, SourceStatus, Status,
};
use crate::source;

/// What a version before step 3 cannot do.
const LIMITS: [&str; 1] = [
    "clients outside the cluster select among this node's backends only, \
     whatever externalTrafficPolicy says",
];

/// Knows whom to ask.
#[derive(Debug)]
pub(super) struct Gatherer {
    pub(super) started: Instant,
    pub(super) pins: Pins,
    pub(super) programs: Vec<ProgramStatus>,
    pub(super) sources: Vec<source::Running>,
    pub(super) questions: mpsc::Sender<Question>,
    pub(super) timeouts: Timeouts,
    pub(super) flows: watch::Receiver<PassReport>,
    pub(super) edges: watch::Receiver<edges::Report>,
    pub(super) health: HealthReport,
    pub(super) sync: SyncFigures,
}

/// What the health servers know.
#[derive(Debug)]
pub(super) struct HealthReport {
    pub(super) proxy: Arc<ProxyHealth>,
    pub(super) healthz: Bind,
    pub(super) healthz_failures: watch::Receiver<Vec<String>>,
    pub(super) services: watch::Receiver<Report>,
}

impl HealthReport {
    fn status(&self) -> HealthStatus {
        HealthStatus {
            proxy: self.proxy.status(Moment::now()),
            healthz_address: match self.healthz {
                Bind::At(address) => Some(address),
                Bind::Off => None,
            },
            healthz_failures: self.healthz_failures.borrow().clone(),
            services: self
                .services
                .borrow()
                .iter()
                .map(|(name, status)| (name.to_string(), status.clone()))
                .collect(),
        }
    }
}

impl Gatherer {
    /// Answers one request.
    pub(super) async fn answer(&self, request: Request) -> Answer {
        let answer = match request {
            Request::Status => self
                .status()
                .await
                .map(|status| Answer::Status(Box::new(status))),
            Request::Names => self
                .ask(Question::Names)
                .await
                .map(|names| Answer::Names(names.into_iter().collect())),
            Request::Verify { repair } => self
                .ask(|sender| Question::Verify { repair, sender })
                .await
                .map(|found| found.map_or_else(Answer::Error, Answer::Drifts)),
        };
        answer.unwrap_or_else(|| Answer::Error("the agent is about to end".to_owned()))
    }

    /// What Prometheus scrapes; nothing while the agent ends.
    pub(super) async fn metrics(&self) -> Option<String> {
        let status = self.status().await?;
        let pins = self.pins.clone();
        let counters = tokio::task::spawn_blocking(move || counters(&pins)).await;
        let facts = Facts {
            status: &status,
            counters: &counters.ok()?,
            sync: &self.sync,
        };
        metrics::text(&facts).ok()
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        self.questions.send(question(sender)).await.ok()?;
        receiver.await.ok()
    }

    async fn status(&self) -> Option<Status> {
        let Summary {
            programmed,
            incomplete,
            node,
            services,
            tables,
        } = self.ask(Question::Summary).await?;
        let edges::Report {
            attached,
            edges,
            refused,
            sockets,
        } = self.edges.borrow().clone();
        let mut waiting_for: Vec<String> = self
            .sources
            .iter()
            .filter(|source| !programmed && incomplete.contains(&source.id))
            .map(|source| format!("the end of the first list of {}", source.name))
            .collect();
        if !programmed && waiting_for.is_empty() {
            waiting_for.push("the maps to be written".to_owned());
        }
        if !attached {
            waiting_for.push("the interfaces to be attached".to_owned());
        }
        let pins = self.pins.clone();
        let mut used: Vec<_> = tables
            .iter()
            .map(|table| (table.table, u64::from(table.used)))
            .collect();
        let passed = self.flows.borrow().clone();
        let met = passed.maps.iter();
        used.extend(met.map(|map| (map.lru.name(map.family), map.entries)));
        let maps = tokio::task::spawn_blocking(move || maps(&pins, used))
            .await
            .ok()?;
        Some(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            layout: LAYOUT_VERSION,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: waiting_for.is_empty(),
            waiting_for,
            limits: LIMITS.map(str::to_owned).to_vec(),
            node,
            sources: self.sources.iter().map(describe).collect(),
            services,
            health: self.health.status(),
            edges,
            refused,
            sockets,
            programs: self.programs.clone(),
            flows: flow_status(&self.timeouts, passed),
            maps,
        })
    }
}

fn describe(source: &source::Running) -> SourceStatus {
    let health = source.health.borrow();
    SourceStatus {
        name: source.name.clone(),
        listed: health.listed,
        changes: health.changes,
        malformed: health.malformed,
        problems: health.problems.iter().map(ToString::to_string).collect(),
    }
}

/// What the latest pass over the flows found.
fn flow_status(timeouts: &Timeouts, passed: PassReport) -> FlowsStatus {
    let maps = passed.maps.into_iter().map(|map| LruStatus {
        name: map.lru.name(map.family).to_owned(),
        entries: map.entries,
        limit: map.limit,
        evicted: map.evicted,
        collected: map
            .collected
            .into_iter()
            .map(|(reason, count)| (reason.name().to_owned(), count))
            .collect(),
    });
    FlowsStatus {
        timeouts: timeouts.iter().collect(),
        passes: passed.passes,
        maps: maps.collect(),
    }
}

/// The programs' counters; none where they cannot be read.
fn counters(pins: &Pins) -> Vec<u64> {
    let read = || Ok::<_, Box<dyn std::error::Error>>(kernel::counters(loader::open_maps(pins)?)?);
    read().unwrap_or_else(|error| {
        warn!(%error, "counters not read for metrics");
        Vec::new()
    })
}

/// Entries, limits and memory of every map.
fn maps(pins: &Pins, mut used: Vec<(&'static str, u64)>) -> Vec<MapStatus> {
    let set = match loader::open_maps(pins) {
        Ok(set) => set,
        Err(error) => {
            warn!(%error, "maps not read for status");
            return Vec::new();
        }
    };
    let mut maps = Vec::new();
    for name in name::PINNED {
        let Some(fd) = set.fds.get(name) else {
            continue;
        };
        let Ok(info) = map_info(fd.as_fd()) else {
            continue;
        };
        maps.push(MapStatus {
            name: name.to_owned(),
            entries: None,
            limit: info.max_entries,
            bytes: memory(fd.as_fd()),
        });
    }
    used.extend(edge_count(pins));
    for map in &mut maps {
        map.entries = used
            .iter()
            .find(|(name, _)| *name == map.name)
            .map(|(_, used)| *used);
    }
    maps
}

fn edge_count(pins: &Pins) -> Option<(&'static str, u64)> {
    let map = aya::maps::MapData::from_pin(pins.map(name::EDGES)).ok()?;
    let edges: aya::maps::HashMap<_, u32, Edge> = aya::maps::Map::HashMap(map).try_into().ok()?;
    Some((name::EDGES, edges.keys().count() as u64))
}

/// The kernel memory of a map, as its descriptor's information says.
fn memory(map: BorrowedFd<'_>) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd())).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))?;
    line.trim().parse().ok()
}
