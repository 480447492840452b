//! The agent: wires everything, and is the only place that does.
//!
//! ```text
//! sources -> apply (reconciler: intake, control plane, model, compile, plan) -> maps
//! netlink -> apply (the node's addresses)
//! netlink -> edges (choice, attach) -> links, edges map
//! health servers <- apply
//! admin socket <- all of them
//! ```

pub mod admin;
mod apply;
mod edges;
mod flows;
mod pods;
pub mod reconcile;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya_log::EbpfLogger;
use svc_lb_common::config::{self, Config};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{info, warn};

use self::admin::{Admin, AdminError};
use self::reconcile::Reconciler;
use self::status::{Gatherer, HealthReport};
use crate::compile::CompileOptions;
use crate::dataplane::attach::{AttachError, Attacher, TcHook};
use crate::dataplane::collect::{Collector, PassReport};
use crate::dataplane::edges::EdgeSettings;
use crate::dataplane::kernel::Kernel;
use crate::dataplane::links::{Links, LinksError};
use crate::dataplane::loader::{self, LoadError, Programs};
use crate::dataplane::pins::{PinError, PinLock, Pins};
use crate::dataplane::reserve::{self, ReserveError};
use crate::dataplane::sizes::{MapSizes, SizeOverride};
use crate::dataplane::sockets::{Place, SocketError, SocketSettings};
use crate::dataplane::vanished::{Vanished, VanishedError};
use crate::dataplane::{DataplaneError, Timeouts, probe};
use crate::health::proxy::{Bind, Moment, ProxyHealth};
use crate::health::{proxy, services};
use crate::model::{Batch, SourceId};
use crate::node::ports::NodePorts;
use crate::node::{self, Node, NodeError};
use crate::observe::status::ProgramStatus;
use crate::observe::tools;
use crate::source;
use crate::standalone::{self, Standalone};

/// Batches that may wait for the apply task.
const BATCHES: usize = 1_024;
/// Questions that may wait for the apply task.
const QUESTIONS: usize = 16;
/// How long tasks may take to end.
const FAREWELL: Duration = Duration::from_secs(5);

/// Everything that `svc-lb run` can be told.
#[derive(Debug)]
pub struct Settings {
    /// At least one.
    pub sources: Vec<source::Spec>,
    /// Name that endpoints use for this node.
    pub node_name: String,
    /// The control plane of sources that have none, if there are such sources.
    pub standalone: Option<standalone::Config>,
    /// How Services become tables.
    pub compile: CompileOptions,
    /// Where NodePorts are served.
    pub node_ports: Vec<NodePorts>,
    /// Where everything is pinned.
    pub pins: Pins,
    /// Entries of maps that are made now.
    pub sizes: Vec<SizeOverride>,
    /// The programs' settings; the agent fills in what it finds out.
    pub config: Config,
    /// Which interfaces are edges.
    pub edges: EdgeSettings,
    /// How tc programs are attached; by what the kernel has, if not said.
    pub tc: Option<TcHook>,
    /// When flows without packets are over.
    pub timeouts: Timeouts,
    /// Whose sockets are given backends.
    pub sockets: SocketSettings,
    /// Where to answer `/healthz` and `/livez`.
    pub healthz: Bind,
    /// Where to answer what tools of this node ask.
    pub metrics: Bind,
    /// What each setting is, for those who ask there.
    pub configz: serde_json::Value,
    /// How long a change may take to be programmed; twice that is unhealthy.
    pub sync_period: Duration,
    /// Where to answer `status` and its like.
    pub admin_socket: PathBuf,
}

/// Why the agent cannot run.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum AppError {
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error("the control plane of --manifests and --stream")]
    Standalone(#[from] standalone::Error),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("open the pinned maps")]
    Maps(#[source] DataplaneError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Sockets(#[from] SocketError),
    #[error(transparent)]
    Links(#[from] LinksError),
    #[error(transparent)]
    Vanished(#[from] VanishedError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("{operation}")]
    System {
        operation: &'static str,
        source: io::Error,
    },
    #[error("the task {0} ended by itself; the log says why")]
    TaskEnded(&'static str),
}

fn system(operation: &'static str) -> impl Fn(io::Error) -> AppError {
    move |source| AppError::System { operation, source }
}

/// Runs the agent until SIGTERM or SIGINT. Everything stays pinned and attached then.
pub async fn run(settings: Settings) -> Result<(), AppError> {
    let signals = Signals::catch()?;
    // What can be wrong with the command line comes first: nothing is touched yet.
    let tasks = Tasks::default();
    let health = Arc::new(ProxyHealth::new(settings.sync_period * 2, Moment::now()));
    let (batch_sender, queued) = mpsc::channel(1);
    let (sender, batches) = mpsc::channel(BATCHES);
    tokio::spawn(relay(queued, sender, Arc::clone(&health)));
    let mut sources = Vec::new();
    for (id, spec) in (0..).map(SourceId).zip(&settings.sources) {
        let cancel = tasks.cancel.clone();
        let source = source::spawn(id, spec.clone(), batch_sender.clone(), cancel);
        sources.push(source.await?);
    }
    drop(batch_sender);
    let standalone = settings
        .standalone
        .as_ref()
        .map(Standalone::open)
        .transpose()?;
    let admin = Admin::open(&settings.admin_socket).await?;

    let prepared = Prepared::new(&settings)?;
    let reconciler = Reconciler::new(
        reconcile::Settings {
            sources: sources.iter().map(|source| source.id).collect(),
            node_name: settings.node_name.clone(),
            options: settings.compile.clone(),
            node_ports: settings.node_ports.clone(),
            standalone,
        },
        Kernel::new(loader::open_maps(&settings.pins)?).map_err(AppError::Maps)?,
    )
    .map_err(AppError::Maps)?;
    let inputs = Started {
        sources,
        batches,
        health,
        admin,
        reconciler,
    };
    let _lock = start(&settings, prepared, inputs, &tasks).await?;

    let signal = tokio::select! {
        signal = signals.wait() => Some(signal),
        () = tasks.cancel.cancelled() => None,
    };
    match (signal, tasks.end().await) {
        (Some(signal), None) => {
            info!(signal, "agent stops; programs and flows stay");
            Ok(())
        }
        (_, ended) => Err(AppError::TaskEnded(ended.unwrap_or("?"))),
    }
}

/// Passes batches on, and says that something waits before it does: the apply task may be busy.
async fn relay(
    mut queued: mpsc::Receiver<Batch>,
    batches: mpsc::Sender<Batch>,
    health: Arc<ProxyHealth>,
) {
    while let Some(batch) = queued.recv().await {
        health.queued(Moment::now());
        if batches.send(batch).await.is_err() {
            return;
        }
    }
}

/// The signals that end the agent.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn catch() -> Result<Self, AppError> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(system("catch SIGTERM"))?,
            interrupt: signal(SignalKind::interrupt()).map_err(system("catch SIGINT"))?,
        })
    }

    async fn wait(mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The kernel side: loaded, attached to nothing yet.
struct Prepared {
    lock: PinLock,
    programs: Programs,
    sockets: Result<Place, SocketError>,
    config: Config,
    adopted: bool,
    ebpf: Ebpf,
}

impl Prepared {
    fn new(settings: &Settings) -> Result<Self, AppError> {
        let pins = &settings.pins;
        pins.prepare()?;
        let lock = pins.lock()?;
        let ports = settings.config.snat_first..=settings.config.snat_last;
        reserve::reserve(pins, &ports)?;
        let sizes = MapSizes::for_this_machine(&settings.sizes)
            .map_err(system("read the memory's size"))?;
        let sockets = match Place::find(&settings.sockets) {
            // A wrong command line.
            Err(error @ SocketError::Cgroup { .. }) if settings.sockets.cgroup.is_some() => {
                return Err(error.into());
            }
            sockets => sockets,
        };
        let mut config = Config {
            bits: settings.config.bits | detected() | loopback(&settings.node_ports),
            ..settings.config
        };
        if let Ok(place) = &sockets {
            place.configure(&mut config);
        }
        let loader::Loaded {
            programs,
            config,
            adopted,
            ebpf,
        } = loader::load(&loader::Settings {
            object: loader::object()?,
            pins,
            sizes: &sizes,
            config,
            sockets: sockets.is_ok(),
        })?;
        Ok(Self {
            lock,
            programs,
            sockets,
            config,
            adopted,
            ebpf,
        })
    }
}

/// What runs or listens already.
struct Started {
    sources: Vec<source::Running>,
    batches: mpsc::Receiver<Batch>,
    health: Arc<ProxyHealth>,
    admin: Admin,
    reconciler: Reconciler<Kernel>,
}

/// Connects and starts all tasks.
async fn start(
    settings: &Settings,
    prepared: Prepared,
    started: Started,
    tasks: &Tasks,
) -> Result<PinLock, AppError> {
    let Prepared {
        lock,
        programs,
        sockets,
        config,
        adopted,
        ebpf,
    } = prepared;
    let Started {
        sources,
        batches,
        health,
        admin,
        reconciler,
    } = started;
    let pins = &settings.pins;
    let cancel = &tasks.cancel;
    let (questions, question_receiver) = mpsc::channel(QUESTIONS);
    let (edge_report, edge_status) = watch::channel(edges::Report::default());
    // Adopted programs are replaced at once; new ones wait for their maps to be filled.
    let (programmed, begin) = watch::channel(adopted);

    let (watcher, node) = node::watch().await?;
    tasks.spawn(
        "netlink",
        cancel.clone().run_until_cancelled_owned(watcher.run()),
    );
    let program_status = describe(&programs);
    let tc = settings.tc.unwrap_or_else(probe::tc_hook);
    let attacher = Attacher::new(pins.clone(), programs, tc, node::requests()?, sockets)?;
    let edge_settings = settings.edges.clone();
    tasks.spawn(
        "edges",
        edges::run(
            attacher,
            Links::open(pins)?,
            edge_settings,
            node.clone(),
            begin,
            edge_report,
            cancel.clone(),
        ),
    );
    let (health_checks, health_report) = start_health(settings.healthz, &health, tasks);
    let gatherer = Gatherer {
        started: Instant::now(),
        pins: pins.clone(),
        programs: program_status,
        sources,
        questions,
        edges: edge_status,
        health: health_report,
        timeouts: settings.timeouts,
        flows: start_flows(settings, tasks)?,
        sync: reconciler.figures(),
    };
    let gatherer = Arc::new(gatherer);
    if let Bind::At(address) = settings.metrics {
        let known = Arc::clone(&gatherer);
        let scrape = move || {
            let known = Arc::clone(&known);
            async move { known.metrics().await }
        };
        let serve = tools::serve(address, settings.configz.clone(), scrape);
        tasks.spawn("tools", cancel.clone().run_until_cancelled_owned(serve));
    }
    tasks.spawn("admin socket", admin.run(gatherer, cancel.clone()));
    diagnostics(ebpf, &config, tasks)?;
    let endpoints = start_pods(settings, &node, tasks)?;
    let inputs = apply::Inputs {
        timeouts: settings.timeouts,
        batches,
        node,
        questions: question_receiver,
        proxy_health: health,
        health_checks,
        endpoints,
        programmed,
        cancel: cancel.clone(),
    };
    start_apply(reconciler, inputs, pins.clone(), tasks)?;
    info!(admin_socket = %settings.admin_socket.display(), ?tc, hz = config.hz, "agent runs");
    Ok(lock)
}

/// Bits of the programs' settings that depend on the kernel.
fn detected() -> u32 {
    match probe::has_csum_ipv6() {
        Ok(true) => config::CSUM_IPV6,
        Ok(false) => 0,
        Err(error) => {
            warn!(%error, "cannot probe the IPv6 checksum helper; taken for missing");
            0
        }
    }
}

/// Bits of the programs' settings that say where the node reaches itself: at loopback addresses, where
/// nobody else's packets come from.
fn loopback(node_ports: &[NodePorts]) -> u32 {
    let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let served = node::ports::select(node_ports, &BTreeSet::from([v4, v6]), &BTreeSet::new());
    let bit = |address, bit| if served.contains(&address) { bit } else { 0 };
    bit(v4, config::LOOPBACK_NODE_PORTS4) | bit(v6, config::LOOPBACK_NODE_PORTS6)
}

fn describe(programs: &Programs) -> Vec<ProgramStatus> {
    if let Some(error) = &programs.xdp_refused {
        warn!(%error, "XDP is off");
    }
    if let Some(error) = &programs.sockets_refused {
        warn!(%error, "socket hooks are off");
    }
    let instructions: BTreeMap<_, _> = programs.verified_instructions().collect();
    programs
        .ids()
        .map(|(name, id)| ProgramStatus {
            name: name.to_owned(),
            id,
            verified_instructions: instructions.get(name).copied(),
        })
        .collect()
}

/// Starts the servers that load balancers and probes ask.
fn start_health(
    healthz: Bind,
    health: &Arc<ProxyHealth>,
    tasks: &Tasks,
) -> (mpsc::UnboundedSender<services::Edit>, HealthReport) {
    let (edits, edit_receiver) = mpsc::unbounded_channel();
    let (report, services) = watch::channel(services::Report::new());
    let (failures, healthz_failures) = watch::channel(Vec::new());
    let cancel = &tasks.cancel;
    let serve = services::run(Arc::clone(health), edit_receiver, report);
    tasks.spawn(
        "health checks",
        cancel.clone().run_until_cancelled_owned(serve),
    );
    if let Bind::At(address) = healthz {
        let serve = proxy::serve(Arc::clone(health), address, failures);
        tasks.spawn("healthz", cancel.clone().run_until_cancelled_owned(serve));
    }
    let report = HealthReport {
        proxy: Arc::clone(health),
        healthz,
        healthz_failures,
        services,
    };
    (edits, report)
}

/// Starts the task that sees pods vanish, if connections to them are to be reset; returns where to tell it of endpoints.
fn start_pods(
    settings: &Settings,
    node: &watch::Receiver<Arc<Node>>,
    tasks: &Tasks,
) -> Result<Option<watch::Sender<pods::Endpoints>>, AppError> {
    if settings.config.bits & config::RESET_VANISHED == 0 {
        return Ok(None);
    }
    let (sender, endpoints) = watch::channel(None);
    let run = pods::run(
        Vanished::open(&settings.pins)?,
        settings.edges.clone(),
        node::requests()?,
        node.clone(),
        endpoints,
        tasks.cancel.clone(),
    );
    tasks.spawn("pods", run);
    Ok(Some(sender))
}

/// Starts the thread that owns the reconciler: a long write then delays nobody else.
fn start_apply(
    reconciler: Reconciler<Kernel>,
    inputs: apply::Inputs,
    pins: Pins,
    tasks: &Tasks,
) -> Result<(), AppError> {
    start_thread("apply", apply::run(reconciler, inputs, pins), tasks)
}

/// Starts the thread that collects flows; returns what it reports.
fn start_flows(
    settings: &Settings,
    tasks: &Tasks,
) -> Result<watch::Receiver<PassReport>, AppError> {
    let mut maps = loader::open_maps(&settings.pins)?;
    let collector = Collector::new(&mut maps, settings.timeouts).map_err(AppError::Maps)?;
    let (report, reports) = watch::channel(PassReport::default());
    let run = flows::run(collector, report, tasks.cancel.clone());
    start_thread("flows", run, tasks)?;
    Ok(reports)
}

/// Runs a task that makes long system calls on a thread of its own.
fn start_thread(
    name: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
    tasks: &Tasks,
) -> Result<(), AppError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(system("start a thread's runtime"))?;
    let end = tasks.end_of(name);
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _end = end;
            runtime.block_on(task);
        })
        .map_err(system("start a thread"))?;
    Ok(())
}

/// Reads what the programs say, if the operator asked for it.
fn diagnostics(mut ebpf: Ebpf, config: &Config, tasks: &Tasks) -> Result<(), AppError> {
    if config.bits & config::DIAGNOSTICS == 0 {
        return Ok(());
    }
    let logger = match EbpfLogger::init(&mut ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "--datapath-log: these programs have nothing to say");
            return Ok(());
        }
    };
    // SAFETY: the logger owns its descriptor, keeps it for as long as it lives, and nobody else
    // closes it.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
        .map_err(|error| system("watch the programs' log")(error.into_parts().1))?;
    let read = async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    };
    tasks.spawn(
        "datapath log",
        tasks.cancel.clone().run_until_cancelled_owned(read),
    );
    Ok(())
}

/// Tasks of which none may end before the agent does.
#[derive(Default)]
struct Tasks {
    cancel: CancellationToken,
    tracker: TaskTracker,
    /// The one that ended by itself.
    ended: Arc<OnceLock<&'static str>>,
}

impl Tasks {
    /// Runs a task whose end, or panic, ends the agent.
    fn spawn<T>(&self, name: &'static str, task: impl Future<Output = T> + Send + 'static) {
        let end = self.end_of(name);
        tokio::spawn(async move {
            let _end = end;
            task.await;
        });
    }

    /// To be dropped at the end of whatever `name` is.
    fn end_of(&self, name: &'static str) -> End {
        End {
            name,
            cancel: self.cancel.clone(),
            ended: Arc::clone(&self.ended),
            _tracked: self.tracker.token(),
        }
    }

    /// Ends all; returns the one that had ended by itself.
    async fn end(self) -> Option<&'static str> {
        self.cancel.cancel();
        self.tracker.close();
        if timeout(FAREWELL, self.tracker.wait()).await.is_err() {
            warn!("tasks are still busy; they are left behind");
        }
        self.ended.get().copied()
    }
}

/// Dropped with its task.
struct End {
    name: &'static str,
    cancel: CancellationToken,
    ended: Arc<OnceLock<&'static str>>,
    _tracked: TaskTrackerToken,
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.cancel.is_cancelled() {
            // Only the first one counts.
            self.ended.get_or_init(|| self.name);
            self.cancel.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SEMANTICS G7: a batch that the apply task does not get to counts as waiting.
    #[tokio::test]
    async fn what_is_not_taken_in_is_queued() {
        let health = Arc::new(ProxyHealth::new(Duration::ZERO, Moment::now()));
        health.updated(Moment::now());
        let (sender, queued) = mpsc::channel(1);
        let (relayed, mut batches) = mpsc::channel(1);
        tokio::spawn(relay(queued, relayed, Arc::clone(&health)));
        assert!(health.verdict(Moment::now()).healthy);
        let batch = Batch {
            source: SourceId(0),
            changes: Vec::new(),
        };
        for _ in 0..2 {
            sender.send(batch.clone()).await.unwrap();
        }
        assert_eq!(batches.recv().await, Some(batch));
        assert!(!health.verdict(Moment::now()).healthy);
        drop(sender);
        assert!(batches.recv().await.is_some());
        assert_eq!(batches.recv().await, None, "the sources' end is passed on");
    }
}
