//! The one task that owns the reconciler and writes the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::pods::Endpoints;
use super::reconcile::Reconciler;
use crate::compile::desired::PortKey;
use crate::dataplane::clock::Clock;
use crate::dataplane::kernel::{Flows, Kernel};
use crate::dataplane::pins::Pins;
use crate::dataplane::{Dataplane as _, GuardBit, Snapshot, Timeouts, bits_in_use, loader, sys};
use crate::health::proxy::{Moment, ProxyHealth};
use crate::health::services::Edit;
use crate::model::{Batch, SourceId};
use crate::node::Node;
use crate::observe::status::{NodeStatus, ServicesStatus};
use crate::plan::{Drift, Epoch, TableUse};

/// Batches that are taken together when many are waiting.
const BATCHES: usize = 256;
/// How often flows are looked through for guard bits that nobody needs.
const SWEEP: Duration = Duration::from_secs(30);
/// How often the maps are compared with what was written to them.
const AUDIT: Duration = Duration::from_mins(1);

/// A question to the task.
#[derive(Debug)]
pub(super) enum Question {
    /// How things are.
    Summary(oneshot::Sender<Summary>),
    /// Which service port has which index.
    Names(oneshot::Sender<BTreeMap<u32, PortKey>>),
    /// What in the maps is not as it was written; written again, if asked.
    Verify {
        repair: bool,
        sender: oneshot::Sender<Result<Vec<Drift>, String>>,
    },
}

/// The task's part of the status.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) programmed: bool,
    pub(super) incomplete: Vec<SourceId>,
    pub(super) node: NodeStatus,
    pub(super) services: ServicesStatus,
    pub(super) tables: Vec<TableUse>,
}

/// What the task listens to.
#[derive(Debug)]
pub(super) struct Inputs {
    /// When flows are over, and no longer need their guard bits.
    pub(super) timeouts: Timeouts,
    pub(super) batches: mpsc::Receiver<Batch>,
    pub(super) node: watch::Receiver<Arc<Node>>,
    pub(super) questions: mpsc::Receiver<Question>,
    /// Told how far it is.
    pub(super) proxy_health: Arc<ProxyHealth>,
    /// Told which health checks to serve, where.
    pub(super) health_checks: mpsc::UnboundedSender<Edit>,
    /// Told which endpoints are here, if somebody wants to know.
    pub(super) endpoints: Option<watch::Sender<Endpoints>>,
    /// Told when the first complete lists are programmed.
    pub(super) programmed: watch::Sender<bool>,
    pub(super) cancel: CancellationToken,
}

/// Runs until it is cancelled.
pub(super) async fn run(mut reconciler: Reconciler<Kernel>, inputs: Inputs, pins: Pins) {
    let Inputs {
        timeouts,
        mut batches,
        mut node,
        mut questions,
        proxy_health,
        health_checks,
        endpoints,
        programmed,
        cancel,
    } = inputs;
    let mut waiting = Vec::with_capacity(BATCHES);
    let mut sources_live = true;
    let mut grace: Option<JoinHandle<Epoch>> = None;
    let mut sweep: Option<JoinHandle<BTreeSet<GuardBit>>> = None;
    let mut sweep_is_stale = false;
    let mut sweep_time = interval(SWEEP);
    sweep_time.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut audit: Option<JoinHandle<Option<Snapshot>>> = None;
    let mut audit_time = interval(AUDIT);
    audit_time.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // First of all: what is compiled depends on it.
    set_node(&mut reconciler, &mut node);
    loop {
        let again = reconciler.apply(Instant::now());
        if reconciler.programmed() {
            programmed.send_if_modified(|programmed| !std::mem::replace(programmed, true));
        }
        if reconciler.settled() {
            proxy_health.updated(Moment::now());
            let listen_on = reconciler.take_listen_on().map(Edit::ListenOn);
            let changes = reconciler.take_health_changes();
            let services = (!changes.is_empty()).then_some(Edit::Services(changes));
            for edit in listen_on.into_iter().chain(services) {
                // Who no longer listens ends with us.
                drop(health_checks.send(edit));
            }
            if let Some(endpoints) = &endpoints {
                tell_endpoints(&reconciler, endpoints);
            }
        }
        if !reconciler.settled() || !batches.is_empty() {
            proxy_health.queued(Moment::now());
        }
        if grace.is_none()
            && let Some(epoch) = reconciler.seal()
        {
            grace = Some(tokio::task::spawn_blocking(move || {
                sys::map::grace();
                epoch
            }));
        }

        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            Some(question) = questions.recv() => answer(&mut reconciler, question),
            count = batches.recv_many(&mut waiting, BATCHES), if sources_live => {
                sources_live = count > 0;
                // Who sent it said so too, but may have been overtaken by what was through before.
                proxy_health.queued(Moment::now());
                reconciler.take(waiting.drain(..));
                proxy_health.set_node_leaves(reconciler.node_leaves());
            }
            Ok(()) = node.changed() => set_node(&mut reconciler, &mut node),
            Some(epoch) = finished(&mut grace) => {
                reconciler.reclaim(epoch);
                // Flows of what left just now may not have been there when it looked.
                sweep_is_stale = true;
            }
            Some(unused) = finished(&mut sweep) => {
                if !sweep_is_stale {
                    reconciler.clear(&unused);
                }
            }
            _ = sweep_time.tick() => {
                if sweep.is_none() && !reconciler.pending_clears().is_empty() {
                    sweep_is_stale = false;
                    let words = reconciler.sizes().guard_words;
                    let bits = reconciler.pending_clears().clone();
                    sweep = Some(start_sweep(&pins, words, bits, timeouts));
                }
            }
            Some(seen) = finished(&mut audit) => {
                if let Some(seen) = seen {
                    reconciler.audit(&seen);
                }
            }
            _ = audit_time.tick() => {
                if audit.is_none() && reconciler.settled() {
                    audit = Some(start_audit(&pins));
                }
            }
            () = sleep_until(again.unwrap_or_else(Instant::now).into()), if again.is_some() => {}
        }
    }
}

/// Says which endpoints are here, if they are others than last time.
fn tell_endpoints(reconciler: &Reconciler<Kernel>, told: &watch::Sender<Endpoints>) {
    let here = reconciler.endpoints_here();
    told.send_if_modified(|endpoints| {
        let changed = endpoints.as_deref() != Some(&here);
        if changed {
            *endpoints = Some(Arc::new(here));
        }
        changed
    });
}

fn set_node(reconciler: &mut Reconciler<Kernel>, node: &mut watch::Receiver<Arc<Node>>) {
    let node = Arc::clone(&node.borrow_and_update());
    reconciler.set_sources(&node.addresses);
    reconciler.set_node_addresses(node.addresses.clone(), node.primary_addresses());
}

/// The result of a blocking job; never, while there is none. A job that panicked has none.
async fn finished<T>(job: &mut Option<JoinHandle<T>>) -> Option<T> {
    let Some(running) = job else {
        return future::pending().await;
    };
    let result = running.await;
    *job = None;
    result
        .inspect_err(|error| warn!(%error, "background job"))
        .ok()
}

fn answer(reconciler: &mut Reconciler<Kernel>, question: Question) {
    // Who no longer listens needs no answer.
    match question {
        Question::Summary(sender) => drop(sender.send(Summary {
            programmed: reconciler.programmed(),
            incomplete: reconciler.incomplete(),
            node: reconciler.node(),
            services: reconciler.services(),
            tables: reconciler.table_uses(),
        })),
        Question::Names(sender) => drop(sender.send(reconciler.names())),
        Question::Verify { repair, sender } => drop(sender.send(reconciler.verify(repair))),
    }
}

/// Reads the maps, beside the task: large ones take a while.
fn start_audit(pins: &Pins) -> JoinHandle<Option<Snapshot>> {
    let pins = pins.clone();
    tokio::task::spawn_blocking(move || {
        let read = || -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
            Ok(Kernel::new(loader::open_maps(&pins)?)?.snapshot()?)
        };
        read()
            .inspect_err(|error| warn!(%error, "maps not audited; tried again"))
            .ok()
    })
}

/// Looks through all flows, beside the task: a million of them take a while. Returns the bits
/// that none needs.
fn start_sweep(
    pins: &Pins,
    words: u32,
    bits: BTreeSet<GuardBit>,
    timeouts: Timeouts,
) -> JoinHandle<BTreeSet<GuardBit>> {
    let pins = pins.clone();
    tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        match unused(&pins, words, &bits, &timeouts) {
            Ok(unused) => {
                debug!(bits = bits.len(), unused = unused.len(), elapsed = ?started.elapsed(), "swept");
                unused
            }
            Err(error) => {
                warn!(
                    error = error.as_ref() as &dyn std::error::Error,
                    "flows not read; tried again"
                );
                BTreeSet::new()
            }
        }
    })
}

fn unused(
    pins: &Pins,
    words: u32,
    bits: &BTreeSet<GuardBit>,
    timeouts: &Timeouts,
) -> Result<BTreeSet<GuardBit>, Box<dyn std::error::Error + Send + Sync>> {
    let clock = Clock::new()?.now()?;
    let flows = Flows::new(&mut loader::open_maps(pins)?)?;
    let used = bits_in_use(words, bits, clock, timeouts, |visit| flows.visit(visit))?;
    Ok(bits.difference(&used).copied().collect())
}
