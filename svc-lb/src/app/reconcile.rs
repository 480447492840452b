//! From batches of changes to what the maps hold: intake, control plane, model, compile, plan.
//!
//! Synchronous, and the only owner of all of it; the apply task drives it. Runs against any
//! [`Dataplane`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use tracing::{debug, info, warn};

use crate::compile::desired::PortKey;
use crate::compile::{CompileOptions, HealthCheck, Note, compile};
use crate::dataplane::{self, Dataplane, GuardBit, Snapshot};
use crate::health::ListenOn;
use crate::model::{Batch, Change, Edit, Intake, Kind, Model, ObjectName, SourceId};
use crate::node::ports::{self, NodePorts};
use crate::observe::metrics::SyncFigures;
use crate::observe::programming::Programming;
use crate::observe::status::{AuditStatus, NodeStatus, ServiceNotes, ServicesStatus};
use crate::plan::{self, Drift, Epoch, Planner, TableUse};
use crate::standalone::Standalone;

/// Pause after the first failure to write; doubled with each further one.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// What a reconciler starts from.
#[derive(Debug)]
pub struct Settings {
    /// Sources whose first lists are waited for.
    pub sources: Vec<SourceId>,
    /// Name that endpoints use for this node.
    pub node_name: String,
    /// How Services become tables.
    pub options: CompileOptions,
    /// Where NodePorts are served.
    pub node_ports: Vec<NodePorts>,
    /// The control plane of sources that have none; not where a cluster is watched.
    pub standalone: Option<Standalone>,
}

/// Owns the cluster's state and what is programmed of it.
#[derive(Debug)]
pub struct Reconciler<D> {
    intake: Intake,
    standalone: Option<Standalone>,
    model: Model,
    options: CompileOptions,
    node_ports: Vec<NodePorts>,
    /// The node's addresses, and those it is known by unless its Node object says otherwise.
    addresses: Option<(BTreeSet<IpAddr>, BTreeSet<IpAddr>)>,
    planner: Planner,
    dataplane: D,
    compiled: BTreeMap<ObjectName, Outcome>,
    /// Where health checks are served, if that may be elsewhere since it was last taken.
    listen_on: Option<ListenOn>,
    /// Services whose health check is another one since they were last taken.
    health_changes: BTreeSet<ObjectName>,
    refusals: Vec<plan::Refusal>,
    listed: bool,
    /// When the first lists were complete, until they are programmed.
    listed_at: Option<Instant>,
    programmed: bool,
    /// When changes became so in the cluster that are not programmed.
    triggered: Vec<SystemTime>,
    programming: Programming,
    writes: u64,
    failures: u64,
    failing: Option<Failing>,
    figures: SyncFigures,
    audited: AuditStatus,
    /// Time spent on what is not written yet.
    spent: Duration,
}

/// What became of one Service.
#[derive(Debug, Default)]
struct Outcome {
    ports: usize,
    health_check: Option<HealthCheck>,
    notes: Vec<Note>,
}

/// The maps cannot be written at the moment.
#[derive(Debug)]
struct Failing {
    error: String,
    pause: Duration,
    until: Instant,
}

impl<D: Dataplane> Reconciler<D> {
    /// Takes over what is programmed, numbers and all. Waits out a grace period.
    pub fn new(settings: Settings, dataplane: D) -> dataplane::Result<Self> {
        let Settings {
            sources,
            node_name,
            options,
            node_ports,
            standalone,
        } = settings;
        let snapshot = dataplane.snapshot()?;
        dataplane.grace()?;
        let planner = Planner::restore(&snapshot);
        if !planner.damage().is_none() {
            warn!(damage = ?planner.damage(), "damaged map entries found; they are repaired");
        }
        Ok(Self {
            intake: Intake::new(sources),
            standalone,
            model: Model::new(node_name),
            options,
            node_ports,
            addresses: None,
            planner,
            dataplane,
            compiled: BTreeMap::new(),
            listen_on: None,
            health_changes: BTreeSet::new(),
            refusals: Vec::new(),
            listed: false,
            listed_at: None,
            programmed: false,
            triggered: Vec::new(),
            programming: Programming::default(),
            writes: 0,
            failures: 0,
            failing: None,
            figures: SyncFigures::default(),
            audited: AuditStatus::default(),
            spent: Duration::ZERO,
        })
    }

    /// Takes changes in. Nothing comes of them until every source's first list is complete.
    pub fn take(&mut self, batches: impl IntoIterator<Item = Batch>) {
        let begun = Instant::now();
        let mut edits = Vec::new();
        for batch in batches {
            let triggered = batch.changes.iter().filter_map(|change| match change {
                Change::Triggered(time) => Some(*time),
                Change::Resync
                | Change::InitialListComplete
                | Change::Replace { .. }
                | Change::Unreadable(_)
                | Change::Upsert(_)
                | Change::Delete(_) => None,
            });
            self.triggered.extend(triggered);
            edits.extend(self.intake.apply(batch));
        }
        self.note_changes(&edits);
        if !self.intake.started() {
            return;
        }
        let known_by = self.model.node_object_addresses().clone();
        let edits = match &mut self.standalone {
            Some(standalone) => standalone.apply(edits),
            None => edits,
        };
        let affected = self.model.apply(edits);
        if *self.model.node_object_addresses() != known_by {
            self.serve_node_ports();
        }
        debug!(services = affected.len(), "compile");
        for name in affected {
            self.compile(name);
        }
        self.spent += begun.elapsed();
        if !self.listed {
            self.listed = true;
            self.listed_at = Some(begun);
            self.planner.remove_unclaimed();
            info!(
                services = self.compiled.len(),
                "every source's list is complete"
            );
        }
    }

    /// Says which addresses the node has, and by which of them it is known unless its Node object
    /// says otherwise.
    pub fn set_node_addresses(&mut self, addresses: BTreeSet<IpAddr>, primary: BTreeSet<IpAddr>) {
        for name in self.model.set_node_addresses(&addresses) {
            self.compile(name);
        }
        let addresses = Some((addresses, primary));
        if self.addresses != addresses {
            self.addresses = addresses;
            self.serve_node_ports();
        }
    }

    fn serve_node_ports(&mut self) {
        let addresses = self.node_port_addresses();
        self.listen_on = Some(if self.node_ports.contains(&NodePorts::All) {
            ListenOn::Any
        } else {
            ListenOn::Only(addresses.clone())
        });
        self.planner.set_node_addresses(addresses);
    }

    /// The addresses that serve NodePorts.
    fn node_port_addresses(&self) -> BTreeSet<IpAddr> {
        let Some((addresses, primary)) = &self.addresses else {
            return BTreeSet::new();
        };
        let known_by = self.model.node_object_addresses();
        let primary = if known_by.is_empty() {
            primary
        } else {
            known_by
        };
        ports::select(&self.node_ports, addresses, primary)
    }

    /// Says which addresses translated sources may have.
    pub fn set_sources(&mut self, addresses: &BTreeSet<IpAddr>) {
        self.planner.set_sources(addresses.iter().copied());
    }

    /// Writes what is pending, unless a failure a moment ago forbids it. Returns when to come
    /// again although nothing changed.
    pub fn apply(&mut self, now: Instant) -> Option<Instant> {
        if !self.listed || !self.planner.is_pending() {
            self.programmed |= self.listed;
            self.measure();
            return None;
        }
        if let Some(failing) = &self.failing
            && now < failing.until
        {
            return Some(failing.until);
        }
        let begun = Instant::now();
        let result = plan::apply(&mut self.planner, &mut self.dataplane);
        self.spent += begun.elapsed();
        match result {
            Ok(writes) => {
                self.applied(writes, now);
                self.measure();
                None
            }
            Err(error) => Some(self.failed(&error, now)),
        }
    }

    /// What was triggered is programmed.
    fn measure(&mut self) {
        let now = SystemTime::now();
        for triggered in self.triggered.drain(..) {
            self.programming.programmed(triggered, now);
        }
    }

    /// How long changes took from the cluster to the maps.
    pub fn programming(&self) -> &Programming {
        &self.programming
    }

    /// Compares the maps, as somebody read them a moment ago, with what was written to them, and
    /// repairs what differs. Nothing comes of it while something waits to be written.
    pub fn audit(&mut self, seen: &Snapshot) {
        let Some(audit) = self.planner.audit(seen) else {
            return;
        };
        // What was written since then differs too: only a look while nobody writes is proof.
        if audit.drifts.is_empty() {
            self.audited.passes += 1;
        } else if let Err(error) = self.verify(true) {
            warn!(%error, "maps not audited; tried again");
        }
    }

    /// Compares the maps with what was written to them, now. With `repair`, writes it again.
    ///
    /// # Errors
    /// Why the maps cannot be compared or written.
    pub fn verify(&mut self, repair: bool) -> Result<Vec<Drift>, String> {
        let snapshot = self.dataplane.snapshot().map_err(|error| causes(&error))?;
        let audit = self
            .planner
            .audit(&snapshot)
            .ok_or("changes wait to be written; ask again when they are")?;
        let drifts = audit.drifts.clone();
        self.audited.passes += 1;
        if !repair || drifts.is_empty() {
            return Ok(drifts);
        }
        for drift in &drifts {
            warn!(%drift, "a map is not as it was written; repaired");
            *self.audited.repaired.entry(drift.map.clone()).or_default() += 1;
        }
        plan::repair(&mut self.planner, &mut self.dataplane, audit)
            .map_err(|error| causes(&error))?;
        Ok(drifts)
    }

    /// What is measured of it; clones share the figures.
    pub fn figures(&self) -> SyncFigures {
        self.figures.clone()
    }

    /// Everything that was taken in is programmed.
    pub fn settled(&self) -> bool {
        self.listed && !self.planner.is_pending()
    }

    /// Health checks that are others since this was last asked; none where a Service has none any
    /// more.
    pub fn take_health_changes(&mut self) -> Vec<(ObjectName, Option<HealthCheck>)> {
        std::mem::take(&mut self.health_changes)
            .into_iter()
            .map(|name| {
                let outcome = self.compiled.get(&name);
                let check = outcome.and_then(|outcome| outcome.health_check);
                (name, check)
            })
            .collect()
    }

    /// Where health checks are served, if that may be elsewhere since this was last asked: where
    /// NodePorts are, but on all addresses the loopback's and those of load balancers too.
    pub fn take_listen_on(&mut self) -> Option<ListenOn> {
        self.listen_on.take()
    }

    /// Addresses of endpoints on this node, whatever their condition.
    pub fn endpoints_here(&self) -> BTreeSet<IpAddr> {
        self.model.endpoints_here().collect()
    }

    /// The node is about to be deleted.
    pub fn node_leaves(&self) -> bool {
        self.model.node_leaves()
    }

    /// The first complete lists are programmed.
    pub fn programmed(&self) -> bool {
        self.programmed
    }

    /// Starts a grace period, if something waits for one; [`Reconciler::reclaim`] ends it.
    pub fn seal(&mut self) -> Option<Epoch> {
        self.planner.seal()
    }

    /// A grace period is over.
    pub fn reclaim(&mut self, epoch: Epoch) {
        self.planner.reclaim(epoch);
    }

    /// Guard bits that can be cleared unless live flows need them.
    pub fn pending_clears(&self) -> &BTreeSet<GuardBit> {
        self.planner.pending_clears()
    }

    /// Clears guard bits that no flow was found to need. Those that an object needs again
    /// meanwhile stay.
    pub fn clear(&mut self, unused: &BTreeSet<GuardBit>) {
        let bits: Vec<GuardBit> = self
            .planner
            .pending_clears()
            .intersection(unused)
            .copied()
            .collect();
        let result = self.dataplane.clear_guard(&bits);
        if let Err(error) = &result {
            warn!(%error, "guard bits not cleared; tried again");
        }
        self.planner.cleared(&bits, result.is_ok());
    }

    /// Which service port has which index.
    pub fn names(&self) -> BTreeMap<u32, PortKey> {
        self.planner.names()
    }

    /// What is written to.
    pub fn dataplane(&self) -> &D {
        &self.dataplane
    }

    /// Ends, and leaves what is written as it is.
    pub fn into_dataplane(self) -> D {
        self.dataplane
    }

    /// Sizes of the tables.
    pub fn sizes(&self) -> dataplane::Sizes {
        self.dataplane.sizes()
    }

    /// How full the tables are.
    pub fn table_uses(&self) -> Vec<TableUse> {
        self.planner.table_uses()
    }

    /// Sources whose current list is not complete.
    pub fn incomplete(&self) -> Vec<SourceId> {
        self.intake.incomplete()
    }

    /// This node's name and zone.
    pub fn node(&self) -> NodeStatus {
        let node = self.model.node();
        NodeStatus {
            name: node.name.clone(),
            zone: node.zone.clone(),
            addresses: self.node_port_addresses().into_iter().collect(),
        }
    }

    /// How the Services are.
    pub fn services(&self) -> ServicesStatus {
        let describe = |(name, outcome): (&ObjectName, &Outcome)| ServiceNotes {
            service: name.to_string(),
            notes: outcome.notes.iter().map(ToString::to_string).collect(),
        };
        let (programmed, not_programmed): (Vec<_>, Vec<_>) = self
            .compiled
            .iter()
            .partition(|(_, outcome)| outcome.ports > 0);
        ServicesStatus {
            known: self.compiled.len(),
            programmed: programmed.len(),
            ports: programmed.iter().map(|(_, outcome)| outcome.ports).sum(),
            not_programmed: not_programmed.into_iter().map(describe).collect(),
            notes: programmed
                .into_iter()
                .filter(|(_, outcome)| !outcome.notes.is_empty())
                .map(describe)
                .collect(),
            refusals: self.refusals.iter().map(ToString::to_string).collect(),
            control_plane: self
                .standalone
                .iter()
                .flat_map(Standalone::problems)
                .map(ToString::to_string)
                .collect(),
            programming: self.programming.clone(),
            pending: self.planner.is_pending(),
            writes: self.writes,
            failures: self.failures,
            last_error: self.failing.as_ref().map(|failing| failing.error.clone()),
            damaged_at_start: (!self.planner.damage().is_none())
                .then(|| format!("{:?}", self.planner.damage())),
            audit: self.audited.clone(),
        }
    }

    fn compile(&mut self, name: ObjectName) {
        let Some(service) = self.model.service(&name) else {
            self.planner.remove_service(&name);
            let outcome = self.compiled.remove(&name);
            if outcome.is_some_and(|outcome| outcome.health_check.is_some()) {
                self.health_changes.insert(name);
            }
            return;
        };
        let compiled = compile(
            service,
            self.model.slices(&name),
            self.model.node(),
            &self.options,
        );
        let outcome = Outcome {
            ports: compiled.ports.len(),
            health_check: compiled.health_check,
            notes: compiled.notes,
        };
        self.planner.set_service(&name, compiled.ports);
        let before = self
            .compiled
            .get(&name)
            .and_then(|before| before.health_check);
        if before != outcome.health_check {
            self.health_changes.insert(name.clone());
        }
        self.compiled.insert(name, outcome);
    }

    fn note_changes(&self, edits: &[Edit]) {
        let (mut services, mut endpoints) = (0, 0);
        for edit in edits {
            let kind = match edit {
                Edit::Upsert(object) => object.key().kind,
                Edit::Delete(key) => key.kind,
            };
            match kind {
                Kind::Service => services += 1,
                Kind::EndpointSlice | Kind::Endpoints => endpoints += 1,
                Kind::Pod | Kind::Node => {}
            }
        }
        if services + endpoints > 0 {
            self.figures.queued(services, endpoints, SystemTime::now());
        }
    }

    fn applied(&mut self, writes: usize, now: Instant) {
        self.writes += writes as u64;
        self.programmed = true;
        self.figures.written(
            std::mem::take(&mut self.spent),
            self.listed_at.is_some(),
            self.triggered.iter().copied(),
            SystemTime::now(),
        );
        if let Some(listed) = self.listed_at.take() {
            let millis = listed.elapsed().as_millis();
            info!(writes, millis, "the first lists are programmed");
        }
        if self.failing.take().is_some() {
            info!(failures = self.failures, "the maps can be written again");
        }
        debug!(writes, micros = now.elapsed().as_micros(), "programmed");
        let refusals = self.planner.refusals();
        for refusal in refusals
            .iter()
            .filter(|refusal| !self.refusals.contains(refusal))
        {
            warn!(%refusal, "not programmed as desired");
        }
        self.refusals = refusals;
    }

    fn failed(&mut self, error: &plan::ApplyError, now: Instant) -> Instant {
        self.failures += 1;
        let pause = self
            .failing
            .as_ref()
            .map_or(BACKOFF, |failing| (failing.pause * 2).min(BACKOFF_MAX));
        let until = now + pause;
        warn!(
            error = error as &dyn std::error::Error,
            ?pause,
            "maps not written; tried again"
        );
        self.failing = Some(Failing {
            error: causes(error),
            pause,
            until,
        });
        until
    }
}

/// An error with its causes, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use svc_lb_common::Protocol;

    use super::*;
    use crate::dataplane::faulty::Faulty;
    use crate::dataplane::memory::Memory;
    use crate::dataplane::{PerFamily, Sizes};
    use crate::model::build::{endpoint, object, port, service, slice};
    use crate::model::{
        Change, IpMode, Kind, LoadBalancerIngress, Node, Object, ObjectKey, ServiceType,
        TrafficPolicy,
    };
    use crate::standalone;

    const SOURCES: [SourceId; 2] = [SourceId(0), SourceId(1)];
    const SIZES: Sizes = Sizes {
        guard_words: 1_024,
        frontends: PerFamily { v4: 64, v6: 64 },
        services: 64,
        slots: 256,
        backends: PerFamily { v4: 64, v6: 64 },
        source_ranges: PerFamily { v4: 64, v6: 64 },
    };

    fn reconciler<D: Dataplane>(dataplane: D) -> Reconciler<D> {
        let settings = Settings {
            sources: SOURCES.to_vec(),
            node_name: "here".to_owned(),
            options: CompileOptions::default(),
            node_ports: vec![NodePorts::All],
            standalone: Some(Standalone::open(&standalone::Config::default()).unwrap()),
        };
        Reconciler::new(settings, dataplane).unwrap()
    }

    /// The Service "web" from one source, its endpoints from the other.
    fn lists() -> [Batch; 2] {
        let web = object(service("web", &["10.96.0.1"]));
        let endpoints = slice("web-1", "web", vec![endpoint("10.0.0.1", "here")]);
        let list = |source, object| Batch {
            source,
            changes: vec![Change::Upsert(object), Change::InitialListComplete],
        };
        [
            list(SOURCES[0], web),
            list(SOURCES[1], Object::EndpointSlice(endpoints)),
        ]
    }

    #[test]
    fn nothing_is_programmed_before_every_list_is_complete() {
        let mut reconciler = reconciler(Memory::new(SIZES));
        let [services, endpoints] = lists();
        reconciler.take([services]);
        assert_eq!(reconciler.apply(Instant::now()), None);
        assert!(!reconciler.programmed());
        assert_eq!(reconciler.incomplete(), [SOURCES[1]]);
        assert!(reconciler.dataplane.frontends().is_empty());

        reconciler.take([endpoints]);
        assert_eq!(reconciler.apply(Instant::now()), None);
        assert!(reconciler.programmed());
        assert!(!reconciler.dataplane.frontends().is_empty());
        let status = reconciler.services();
        assert_eq!(
            (status.known, status.programmed, status.pending),
            (1, 1, false)
        );
    }

    #[test]
    fn failures_are_retried_ever_later_and_made_good() {
        let mut reconciler = reconciler(Faulty::new(Memory::new(SIZES), 1, 0));
        reconciler.dataplane.set_rate(1_024);
        reconciler.take(lists());
        let start = Instant::now();
        let first = reconciler.apply(start).unwrap();
        assert_eq!(first, start + BACKOFF);
        assert_eq!(reconciler.apply(start), Some(first), "too early");
        assert_eq!(reconciler.services().failures, 1);
        let second = reconciler.apply(first).unwrap();
        assert_eq!(second, first + 2 * BACKOFF);
        assert!(
            reconciler
                .services()
                .last_error
                .is_some_and(|error| error.contains("injected"))
        );
        assert!(!reconciler.programmed());

        reconciler.dataplane.set_rate(0);
        assert_eq!(reconciler.apply(second), None);
        assert!(reconciler.programmed());
        assert_eq!(reconciler.services().last_error, None);
        assert!(!reconciler.dataplane.inner().frontends().is_empty());
    }

    /// B7: ranges that hold an address of the node admit the load balancer's too, whenever the node
    /// gets such an address.
    #[test]
    fn source_ranges_follow_the_nodes_addresses() {
        let mut reconciler = reconciler(Memory::new(SIZES));
        let vip: IpAddr = "198.51.100.1".parse().unwrap();
        let mut web = service("web", &["10.96.0.1"]);
        web.source_ranges = vec!["192.0.2.0/24".parse().unwrap()];
        web.load_balancer = vec![LoadBalancerIngress {
            ip: vip,
            mode: IpMode::Vip,
        }];
        let [_, endpoints] = lists();
        let services = Batch {
            source: SOURCES[0],
            changes: vec![Change::Upsert(object(web)), Change::InitialListComplete],
        };
        reconciler.take([services, endpoints]);
        reconciler.apply(Instant::now());
        let (index, _) = reconciler.names().pop_first().unwrap();
        assert!(!reconciler.dataplane.admits(index, vip));
        for (address, admitted) in [("192.0.2.1", true), ("192.0.3.1", false)] {
            let addresses = [address.parse().unwrap()].into();
            reconciler.set_node_addresses(addresses, BTreeSet::new());
            assert_eq!(reconciler.apply(Instant::now()), None);
            assert_eq!(
                reconciler.dataplane.admits(index, vip),
                admitted,
                "{address}"
            );
        }
        assert!(
            reconciler
                .dataplane
                .admits(index, "192.0.2.77".parse().unwrap())
        );
    }

    /// B4, A1: of two Services with one address and port the same one has it whatever is updated, and the
    /// other one is named, until it is alone.
    #[test]
    fn a_contested_address_stays_with_its_holder_and_the_loser_is_named() {
        let mut reconciler = reconciler(Memory::new(SIZES));
        let contested = |name: &str, cluster_ip: &str, affinity| {
            let mut service = service(name, &[cluster_ip]);
            service.external_ips = vec!["198.51.100.7".parse().unwrap()];
            service.affinity_seconds = affinity;
            Change::Upsert(object(service))
        };
        let batch = |changes| Batch {
            source: SOURCES[0],
            changes,
        };
        let second = Batch {
            source: SOURCES[1],
            changes: vec![Change::InitialListComplete],
        };
        let first = vec![
            contested("b", "10.96.0.2", None),
            Change::InitialListComplete,
        ];
        reconciler.take([batch(first), second]);
        reconciler.apply(Instant::now());
        assert_eq!(reconciler.services().refusals, [""; 0]);
        for changes in [
            vec![contested("a", "10.96.0.1", None)],
            vec![contested("b", "10.96.0.2", Some(60))],
            vec![contested("a", "10.96.0.1", Some(60))],
        ] {
            reconciler.take([batch(changes)]);
            reconciler.apply(Instant::now());
            let refusals = reconciler.services().refusals;
            assert_eq!(refusals.len(), 1);
            let loser = "service default/b (TCP, IPv4) does not get 198.51.100.7:80/TCP: service \
                         default/a (TCP, IPv4) has it";
            assert!(refusals[0].starts_with(loser), "{refusals:?}");
        }
        let key = ObjectKey {
            kind: Kind::Service,
            name: ObjectName::new("default", "a"),
        };
        reconciler.take([batch(vec![Change::Delete(key)])]);
        reconciler.apply(Instant::now());
        assert_eq!(reconciler.services().refusals, [""; 0]);
    }

    /// B2: `primary` is what the Node object says, else the first address of the default route.
    #[test]
    fn node_ports_are_served_where_they_are_told_to_be() {
        let mut reconciler = reconciler(Memory::new(SIZES));
        reconciler.node_ports = vec![NodePorts::Primary];
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = BTreeSet::from([ip("192.0.2.1"), ip("192.0.2.2"), ip("192.0.2.3")]);
        let complete = SOURCES.map(|source| Batch {
            source,
            changes: vec![Change::InitialListComplete],
        });
        reconciler.take(complete);
        reconciler.set_node_addresses(all.clone(), [ip("192.0.2.1")].into());
        reconciler.apply(Instant::now());
        assert_eq!(reconciler.node().addresses, [ip("192.0.2.1")]);
        let only = |address| Some(ListenOn::Only([ip(address)].into()));
        assert_eq!(reconciler.take_listen_on(), only("192.0.2.1"));
        assert_eq!(reconciler.take_listen_on(), None, "told once");

        let node = Object::Node(Node {
            name: "here".to_owned(),
            zone: None,
            leaves: false,
            addresses: [ip("192.0.2.2")].into(),
        });
        reconciler.take([Batch {
            source: SOURCES[0],
            changes: vec![Change::Upsert(node)],
        }]);
        reconciler.apply(Instant::now());
        let programmed = |reconciler: &Reconciler<Memory>| -> Vec<IpAddr> {
            let frontends = reconciler.dataplane.frontends().keys();
            frontends.map(|at| at.address).collect()
        };
        assert_eq!(programmed(&reconciler), [ip("192.0.2.2")]);
        assert_eq!(reconciler.take_listen_on(), only("192.0.2.2"));
        // Known by an address that it does not have: none.
        reconciler.set_node_addresses([ip("192.0.2.3")].into(), BTreeSet::new());
        reconciler.apply(Instant::now());
        assert!(programmed(&reconciler).is_empty());
        reconciler.set_node_addresses(all, BTreeSet::new());
        reconciler.apply(Instant::now());
        assert_eq!(programmed(&reconciler), [ip("192.0.2.2")]);
    }

    /// H3: measured is what came after the lists, once it is programmed.
    #[test]
    fn changes_are_measured_from_their_trigger_time() {
        let mut reconciler = reconciler(Faulty::new(Memory::new(SIZES), 1, 0));
        reconciler.take(lists());
        reconciler.apply(Instant::now());
        assert_eq!(reconciler.programming().count, 0);
        let slice = slice("web-1", "web", vec![endpoint("10.0.0.9", "there")]);
        let ago = SystemTime::now() - Duration::from_secs(7);
        reconciler.dataplane.set_rate(1_024);
        reconciler.take([Batch {
            source: SOURCES[1],
            changes: vec![
                Change::Upsert(Object::EndpointSlice(slice)),
                Change::Triggered(ago),
            ],
        }]);
        let again = reconciler.apply(Instant::now()).unwrap();
        assert_eq!(reconciler.programming().count, 0, "not written");
        reconciler.dataplane.set_rate(0);
        reconciler.apply(again);
        assert_eq!(reconciler.programming().count, 1);
        assert!((7.0..20.0).contains(&reconciler.programming().sum));
    }

    #[test]
    fn the_next_agent_writes_nothing_and_renumbers_nothing() {
        let mut first = reconciler(Memory::new(SIZES));
        first.take(lists());
        first.apply(Instant::now());
        let names = first.names();
        assert!(names.values().any(|name| name.protocol == Protocol::Tcp));

        let mut next = reconciler(first.dataplane);
        next.take(lists());
        assert_eq!(next.apply(Instant::now()), None);
        assert_eq!(next.names(), names);
        assert_eq!(next.services().writes, 0);

        // What nobody names any more goes, but only with the complete lists.
        let mut last = reconciler(next.dataplane);
        assert!(!last.dataplane.frontends().is_empty());
        last.take(SOURCES.map(|source| Batch {
            source,
            changes: vec![Change::InitialListComplete],
        }));
        last.apply(Instant::now());
        assert!(last.dataplane.frontends().is_empty());
        assert!(last.programmed());
    }

    /// SEMANTICS G6, G7: health checks change with their Services' endpoints and not otherwise, and
    /// count only once everything is programmed.
    #[test]
    fn health_checks_are_told_when_they_change() {
        let mut reconciler = reconciler(Faulty::new(Memory::new(SIZES), 1, 0));
        let [_, endpoints] = lists();
        let mut web = service("web", &["10.96.0.1"]);
        web.service_type = ServiceType::LoadBalancer;
        web.external_policy = TrafficPolicy::Local;
        web.health_check_node_port = Some(port(31000));
        let services = Batch {
            source: SOURCES[0],
            changes: vec![
                Change::Upsert(object(web.clone())),
                Change::Upsert(object(service("other", &["10.96.0.2"]))),
                Change::InitialListComplete,
            ],
        };
        reconciler.take([services]);
        assert!(!reconciler.settled(), "a list is missing");
        reconciler.dataplane.set_rate(1_024);
        reconciler.take([endpoints]);
        let again = reconciler.apply(Instant::now());
        assert!(!reconciler.settled(), "not written");
        reconciler.dataplane.set_rate(0);
        reconciler.apply(again.unwrap());
        assert!(reconciler.settled());
        let check = |local_endpoints| HealthCheck {
            port: port(31000),
            local_endpoints,
        };
        assert_eq!(
            reconciler.take_health_changes(),
            [(web.name.clone(), Some(check(1)))]
        );

        let slice = |endpoints| Batch {
            source: SOURCES[1],
            changes: vec![Change::Upsert(Object::EndpointSlice(slice(
                "web-1", "web", endpoints,
            )))],
        };
        let mut changes = |endpoints| {
            reconciler.take([slice(endpoints)]);
            reconciler.apply(Instant::now());
            reconciler.take_health_changes()
        };
        let here = || endpoint("10.0.0.1", "here");
        let there = endpoint("10.0.0.2", "there");
        assert_eq!(changes(vec![here(), there]), []);
        assert_eq!(changes(vec![]), [(web.name.clone(), Some(check(0)))]);
        assert_eq!(changes(vec![here()]), [(web.name.clone(), Some(check(1)))]);
        reconciler.take([Batch {
            source: SOURCES[0],
            changes: vec![Change::Delete(object(web.clone()).key())],
        }]);
        assert_eq!(reconciler.take_health_changes(), [(web.name, None)]);
    }
}
