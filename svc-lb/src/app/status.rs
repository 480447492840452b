//! Gathers the status from those who know.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use svc_lb_common::limits::{LAYOUT_VERSION, name};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use super::admin::{Answer, Request};
use super::apply::{Question, Summary};
use super::edges::Report;
use crate::dataplane::kernel::Kernel;
use crate::dataplane::pins::Pins;
use crate::dataplane::sys::map::map_info;
use crate::dataplane::{Dataplane as _, FlowTable, loader};
use crate::node::Node;
use crate::observe::status::{MapStatus, ProgramStatus, SourceStatus, Status};
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
    pub(super) edges: watch::Receiver<Report>,
    pub(super) node: watch::Receiver<Arc<Node>>,
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
        };
        answer.unwrap_or_else(|| Answer::Error("the agent is about to end".to_owned()))
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
            mut node,
            services,
            tables,
        } = self.ask(Question::Summary).await?;
        let Report {
            attached,
            edges,
            refused,
        } = self.edges.borrow().clone();
        node.addresses = self.node.borrow().addresses.iter().copied().collect();
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
        let used = tables
            .iter()
            .map(|table| (table.table, u64::from(table.used)))
            .collect();
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
            edges,
            refused,
            programs: self.programs.clone(),
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
    match Kernel::new(set) {
        Ok(kernel) => used.extend(counts(&kernel)),
        Err(error) => warn!(%error, "maps not read for status"),
    }
    for map in &mut maps {
        map.entries = used
            .iter()
            .find(|(name, _)| *name == map.name)
            .map(|(_, used)| *used);
    }
    maps
}

/// Entries of the maps that the planner does not count.
fn counts(kernel: &Kernel) -> Vec<(&'static str, u64)> {
    let mut flows = [[0; 2]; 2];
    let counted = kernel.visit_flows(&mut |flow| {
        let [opening, established] = &mut flows;
        let table = match flow.table {
            FlowTable::Opening => opening,
            FlowTable::Established => established,
        };
        let [v4, v6] = table;
        *(if flow.source.is_ipv4() { v4 } else { v6 }) += 1;
    });
    if let Err(error) = counted {
        warn!(%error, "flows not counted for status");
        return Vec::new();
    }
    let [opening, established] = flows;
    let mut counts: Vec<(&'static str, u64)> = name::OPENING.into_iter().zip(opening).collect();
    counts.extend(name::ESTABLISHED.into_iter().zip(established));
    if let Ok(edges) = kernel.edges() {
        counts.push((name::EDGES, edges.len() as u64));
    }
    counts
}

/// The kernel memory of a map, as its descriptor's information says.
fn memory(map: BorrowedFd<'_>) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd())).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))?;
    line.trim().parse().ok()
}
