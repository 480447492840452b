//! The agent's way from objects to maps, step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use svc_lb::app::reconcile::{Reconciler, Settings};
use svc_lb::compile::HealthCheck;
use svc_lb::dataplane::faulty::Faulty;
use svc_lb::dataplane::{Dataplane, FlowClock, Snapshot, Timeouts};
use svc_lb::model::{Batch, Change, Kind, Object, ObjectKey, ObjectName, SourceId};
use svc_lb::plan::view::Tables;
use svc_lb::source::manifests;
use svc_lb::standalone::{self, Standalone};

use super::file::{Case, List, Step};
use super::text;

/// Longer than any pause after a failure.
const LATER: Duration = Duration::from_hours(1);
/// Rounds in which everything that can be written is: what waits for a grace period needs two.
const ROUNDS: usize = 4;
const CLOCK: FlowClock = FlowClock {
    jiffies: 1_000_000,
    hz: 100,
};

/// An agent, its maps, and the cluster around it.
pub(super) struct World<'a, D> {
    case: &'a Case,
    /// None only while one agent follows another.
    reconciler: Option<Reconciler<Faulty<D>>>,
    now: Instant,
    /// The cluster's objects as they were written.
    objects: BTreeMap<ObjectKey, Value>,
    listed: BTreeSet<List>,
    addresses: BTreeSet<IpAddr>,
    health: BTreeMap<ObjectName, HealthCheck>,
    /// Addresses whose guard bits are worth a line.
    seen: BTreeSet<IpAddr>,
}

impl<'a, D: Dataplane> World<'a, D> {
    pub(super) fn new(case: &'a Case, dataplane: D, seed: u64) -> Result<Self> {
        let mut world = Self {
            case,
            reconciler: None,
            now: Instant::now(),
            objects: BTreeMap::new(),
            listed: BTreeSet::new(),
            addresses: case.node.addresses.clone(),
            health: BTreeMap::new(),
            seen: BTreeSet::new(),
        };
        world.start(Faulty::new(dataplane, seed, 0))?;
        Ok(world)
    }

    /// An agent begins, over the maps as they are.
    fn start(&mut self, dataplane: Faulty<D>) -> Result<()> {
        let node_ports = self.case.settings.node_ports.iter();
        let settings = Settings {
            sources: List::ALL.map(source).into(),
            node_name: self.case.node.name.clone(),
            options: self.case.settings.options(),
            node_ports: node_ports
                .map(|part| part.parse())
                .collect::<Result<_, _>>()?,
            standalone: Some(Standalone::open(&standalone::Config::default())?),
        };
        self.health.clear();
        let reconciler = self
            .reconciler
            .insert(Reconciler::new(settings, dataplane)?);
        reconciler.set_node_addresses(self.addresses.clone(), self.case.node.primary.clone());
        Ok(())
    }

    /// The agent dies, and the next one hears what the last one had heard.
    pub(super) fn restart(&mut self) -> Result<()> {
        let reconciler = self.reconciler.take().context("an agent")?;
        let dataplane = reconciler.into_dataplane();
        dataplane.set_rate(0);
        self.start(dataplane)?;
        for list in List::ALL {
            let mut changes = Vec::new();
            for (key, object) in &self.objects {
                if list_of(key.kind) == list {
                    changes.push(Change::Upsert(convert(object)?));
                }
            }
            changes.extend(
                self.listed
                    .contains(&list)
                    .then_some(Change::InitialListComplete),
            );
            self.take(list, changes)?;
        }
        Ok(())
    }

    /// Lets happen what a step says; nothing is written yet.
    pub(super) fn step(&mut self, step: &Step) -> Result<()> {
        self.try_step(step).with_context(|| step.title())
    }

    fn try_step(&mut self, step: &Step) -> Result<()> {
        let first = self.listed.is_empty() && self.objects.is_empty();
        let mut changes = Vec::new();
        for value in &step.apply {
            let (key, value) = identified(value)?;
            changes.push((list_of(key.kind), Change::Upsert(convert(&value)?)));
            self.objects.insert(key, value);
        }
        for patch in &step.patch {
            let (key, patch) = identified(patch)?;
            let object = self
                .objects
                .get_mut(&key)
                .with_context(|| format!("no {key} to patch"))?;
            merge(object, &patch);
            changes.push((list_of(key.kind), Change::Upsert(convert(object)?)));
        }
        for name in &step.delete {
            let key = named(name)?;
            ensure!(self.objects.remove(&key).is_some(), "no {key} to delete");
            changes.push((list_of(key.kind), Change::Delete(key)));
        }
        if let Some(addresses) = &step.addresses {
            self.addresses.clone_from(addresses);
            let primary = self.case.node.primary.clone();
            self.agent()?.set_node_addresses(addresses.clone(), primary);
        }
        let default = if first || step.restart {
            &List::ALL[..]
        } else {
            &[]
        };
        let listed = step.listed.as_deref().unwrap_or(default);
        if step.restart {
            self.listed = listed.iter().copied().collect();
            return self.restart();
        }
        let fresh: BTreeSet<List> = listed
            .iter()
            .copied()
            .filter(|list| self.listed.insert(*list))
            .collect();
        for list in List::ALL {
            let of_list = |(of, change)| (of == list).then_some(change);
            let mut own: Vec<Change> = changes.iter().cloned().filter_map(of_list).collect();
            own.extend(fresh.contains(&list).then_some(Change::InitialListComplete));
            if !own.is_empty() {
                self.take(list, own)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, list: List, changes: Vec<Change>) -> Result<()> {
        let source = source(list);
        self.agent()?.take([Batch { source, changes }]);
        Ok(())
    }

    fn agent(&mut self) -> Result<&mut Reconciler<Faulty<D>>> {
        self.reconciler.as_mut().context("an agent")
    }

    /// Writes for a while, with failures.
    pub(super) fn stumble(&mut self, rate: u32) {
        let Some(reconciler) = &mut self.reconciler else {
            return;
        };
        reconciler.dataplane().set_rate(rate);
        for _ in 0..ROUNDS {
            self.now += LATER;
            round(reconciler, self.now);
        }
    }

    /// Writes until nothing is left, without failures.
    pub(super) fn settle(&mut self) -> Result<()> {
        let complete = List::ALL.iter().all(|list| self.listed.contains(list));
        let reconciler = self.reconciler.as_mut().context("an agent")?;
        reconciler.dataplane().set_rate(0);
        for _ in 0..ROUNDS {
            self.now += LATER;
            round(reconciler, self.now);
        }
        ensure!(
            reconciler.settled() == complete && reconciler.pending_clears().is_empty(),
            "not everything is written: {:?}",
            reconciler.services()
        );
        for (name, check) in reconciler.take_health_changes() {
            match check {
                Some(check) => self.health.insert(name, check),
                None => self.health.remove(&name),
            };
        }
        let snapshot = self.snapshot()?;
        self.seen.extend(text::addresses(&snapshot));
        Ok(())
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot> {
        Ok(self.written()?.dataplane().snapshot()?)
    }

    fn written(&self) -> Result<&Reconciler<Faulty<D>>> {
        self.reconciler.as_ref().context("an agent")
    }

    /// What is programmed, for people.
    pub(super) fn tables(&self) -> Result<String> {
        let reconciler = self.written()?;
        let tables = Tables::new(&self.snapshot()?, &reconciler.names());
        Ok(text::tables(&tables, &reconciler.services(), &self.health))
    }

    /// What is programmed, as it lies in the maps.
    pub(super) fn maps(&self) -> Result<String> {
        Ok(text::maps(&self.snapshot()?, &self.seen))
    }
}

/// One turn of the agent's loop, all waiting done.
fn round<D: Dataplane>(reconciler: &mut Reconciler<Faulty<D>>, now: Instant) {
    // What fails is tried again, by us.
    let _again = reconciler.apply(now);
    if let Some(epoch) = reconciler.seal() {
        // Nobody reads these maps, so the grace period is over at once.
        reconciler.reclaim(epoch);
    }
    let bits = reconciler.pending_clears().clone();
    if let Ok(used) = reconciler
        .dataplane()
        .flows_in_use(&bits, CLOCK, &Timeouts::default())
    {
        reconciler.clear(&bits.difference(&used).copied().collect());
    }
}

const fn source(list: List) -> SourceId {
    SourceId(list as u32)
}

const fn list_of(kind: Kind) -> List {
    match kind {
        Kind::EndpointSlice => List::Endpoints,
        Kind::Service | Kind::Endpoints | Kind::Pod | Kind::Node => List::Services,
    }
}

/// An object with its `apiVersion`, and its name.
fn identified(value: &Value) -> Result<(ObjectKey, Value)> {
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind").context("an object has a kind")?;
    let name = text("/metadata/name").with_context(|| format!("a {kind} has metadata.name"))?;
    let key = match text("/metadata/namespace") {
        Some(namespace) => named(&format!("{kind} {namespace}/{name}")),
        None => named(&format!("{kind} {name}")),
    }?;
    let version = match key.kind {
        Kind::EndpointSlice => "discovery.k8s.io/v1",
        Kind::Service | Kind::Endpoints | Kind::Pod | Kind::Node => "v1",
    };
    let mut value = value.clone();
    if let Value::Object(fields) = &mut value {
        fields.entry("apiVersion").or_insert_with(|| version.into());
    }
    Ok((key, value))
}

/// `Kind name`, or `Kind namespace/name`.
fn named(text: &str) -> Result<ObjectKey> {
    let (kind, name) = text
        .split_once(' ')
        .with_context(|| format!("{text}: no \"Kind name\""))?;
    let kind = match kind {
        "Service" => Kind::Service,
        "EndpointSlice" => Kind::EndpointSlice,
        "Endpoints" => Kind::Endpoints,
        "Pod" => Kind::Pod,
        "Node" => Kind::Node,
        _ => bail!("{kind} is no kind of ours"),
    };
    let namespace = if kind == Kind::Node { "" } else { "default" };
    let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
    let name = ObjectName::new(namespace, name);
    Ok(ObjectKey { kind, name })
}

/// Has an object read as the manifests' source reads it; what it only warns of is an error here.
fn convert(value: &Value) -> Result<Object> {
    let json = serde_json::to_vec(value)?;
    let manifests::Parsed { objects, problems } = manifests::parse(Path::new("case"), &json);
    if let Some(problem) = problems.first() {
        bail!("{problem}");
    }
    let [object] = <[Object; 1]>::try_from(objects)
        .map_err(|objects| anyhow::anyhow!("{} objects in one", objects.len()))?;
    Ok(object)
}

/// A JSON merge patch: null takes away, what is no mapping replaces.
fn merge(target: &mut Value, patch: &Value) {
    let (Value::Object(target), Value::Object(patch)) = (&mut *target, patch) else {
        target.clone_from(patch);
        return;
    };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}
