//! Whatever goes wrong between a cluster and the agent: once it is over, the maps are what the cluster's state compiles
//! to. The same for all three sources: the API server's lists and watches, streams of its watch events, and manifests.
//! The run against the kernel's maps needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot go on panics"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use serde_json::{Value, json};
use similar::TextDiff;
use svc_lb::app::reconcile::{Reconciler, Settings};
use svc_lb::compile::CompileOptions;
use svc_lb::dataplane::Dataplane;
use svc_lb::dataplane::memory::Memory;
use svc_lb::model::{Batch, Change, SourceId};
use svc_lb::node::ports::NodePorts;
use svc_lb::source::kubernetes::Access;
use svc_lb::source::stream::Target;
use svc_lb::source::{self, Health, Spec, kubernetes, manifests};
use svc_lb::standalone::{self, Standalone};
use svc_lb_tests::apiserver::{ApiServer, Faults, Key, Resource};
use svc_lb_tests::cases;
use svc_lb_tests::lab::privileged;
use svc_lb_tests::prog::rig;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const NODE: &str = "here";
/// Longer than the longest pause of a source.
const PATIENCE: Duration = Duration::from_secs(40);
/// What stays in the cluster all the time.
const STABLE: &str =
    "default/stable TCP IPv4\n  at 10.96.0.100:80 ClusterIP\n  to 10.0.0.100:8080: cluster\n";

// The cluster.

fn service(random: &mut Rng, number: u8) -> Value {
    let pick = |random: &mut Rng, all: &[&str]| (*random.choice(all).unwrap()).to_owned();
    let kind = pick(
        random,
        &["ClusterIP", "ClusterIP", "NodePort", "LoadBalancer"],
    );
    let mut port = json!({"name": "a", "port": 80, "targetPort": 8080});
    let mut other = json!({"name": "b", "port": 53, "protocol": "UDP"});
    let mut spec = json!({
        "type": kind,
        "clusterIP": format!("10.96.0.{number}"),
        "clusterIPs": [format!("10.96.0.{number}"), format!("fd00:96::{number}")],
        "internalTrafficPolicy": pick(random, &["Cluster", "Cluster", "Local"]),
        "sessionAffinity": pick(random, &["None", "ClientIP"]),
    });
    let mut status = json!({});
    if kind != "ClusterIP" {
        spec["externalTrafficPolicy"] = pick(random, &["Cluster", "Local"]).into();
        port["nodePort"] = (30_000 + u16::from(number)).into();
        other["nodePort"] = (30_000 + u16::from(number)).into();
    }
    if kind == "LoadBalancer" {
        status = json!({"loadBalancer": {"ingress": [{"ip": format!("198.51.100.{number}")}]}});
    }
    spec["ports"] = json!([port, other]);
    let mut labels = json!({});
    if random.u8(0..8) == 0 {
        labels["service.kubernetes.io/service-proxy-name"] = "another".into();
    }
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("s{number}"), "namespace": "default", "labels": labels, "managedFields": [
            {"manager": "kubectl", "fieldsV1": {"f:spec": {"f:ports": {".": {}}}}},
        ]},
        "spec": spec, "status": status,
    })
}

fn slice(random: &mut Rng, number: u8, part: u8) -> Value {
    let v6 = part == 2;
    let endpoints: Vec<Value> = (0..random.u8(0..6))
        .map(|_| {
            let host = random.u8(1..9);
            let mut endpoint = json!({
                "addresses": [if v6 { format!("fd00:10::{host}") } else { format!("10.0.0.{host}") }],
                "nodeName": random.choice([NODE, "there", "elsewhere"]).unwrap(),
                "conditions": {
                    "ready": random.u8(0..4) > 0, "serving": random.u8(0..4) > 0, "terminating": random.u8(0..4) == 0,
                },
            });
            if random.bool() {
                endpoint["hints"] = json!({"forZones": [{"name": random.choice(["a", "b"]).unwrap()}]});
            }
            endpoint
        })
        .collect();
    let mut labels = json!({"kubernetes.io/service-name": format!("s{number}")});
    match random.u8(0..12) {
        0 => labels["service.kubernetes.io/headless"] = "".into(),
        1 => labels["service.kubernetes.io/service-proxy-name"] = "another".into(),
        _ => {}
    }
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("s{number}-{part}"), "namespace": "default", "labels": labels},
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": [{"name": "a", "port": 8080, "protocol": "TCP"}, {"name": "b", "port": 53, "protocol": "UDP"}],
        "endpoints": endpoints,
    })
}

fn node(zone: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

/// One random change of the cluster.
fn change(server: &ApiServer, random: &mut Rng) {
    let (number, part) = (random.u8(1..7), random.u8(0..3));
    match random.u8(0..20) {
        0..6 => drop(server.apply(service(random, number)).unwrap()),
        6..15 => drop(server.apply(slice(random, number, part)).unwrap()),
        15 => drop(
            server
                .apply(node(random.choice(["a", "b"]).unwrap()))
                .unwrap(),
        ),
        16..19 => {
            // Deleting what is not there is refused, as by any server.
            let key = Key::new(Resource::EndpointSlices, &format!("s{number}-{part}"));
            drop(server.with(|store| store.delete(&key)));
        }
        _ => {
            let key = Key::new(Resource::Services, &format!("s{number}"));
            drop(server.with(|store| store.delete(&key)));
        }
    }
}

fn populate(server: &ApiServer, random: &mut Rng) {
    for number in 1..7 {
        server.apply(service(random, number)).unwrap();
        server.apply(slice(random, number, 0)).unwrap();
    }
    server.apply(node("a")).unwrap();
    server
        .apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "there"}}))
        .unwrap();
    let stable = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "stable"},
        "spec": {"clusterIP": "10.96.0.100", "clusterIPs": ["10.96.0.100"], "ports": [{"port": 80}]},
    });
    server.apply(stable).unwrap();
    let endpoints = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "stable-1", "labels": {"kubernetes.io/service-name": "stable"}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080}],
        "endpoints": [{"addresses": ["10.0.0.100"], "nodeName": "there"}],
    });
    server.apply(endpoints).unwrap();
}

// The agent.

fn reconciler<D: Dataplane>(dataplane: D, sources: u32, standalone: bool) -> Result<Reconciler<D>> {
    let standalone = standalone.then(|| Standalone::open(&standalone::Config::default()));
    let mut reconciler = Reconciler::new(
        Settings {
            sources: (0..sources).map(SourceId).collect(),
            node_name: NODE.to_owned(),
            options: CompileOptions::default(),
            node_ports: vec![NodePorts::All],
            standalone: standalone.transpose()?,
        },
        dataplane,
    )?;
    let address: IpAddr = [192, 0, 2, 1].into();
    reconciler.set_node_addresses(BTreeSet::from([address]), BTreeSet::from([address]));
    Ok(reconciler)
}

fn write<D: Dataplane>(reconciler: &mut Reconciler<D>) {
    while reconciler.apply(Instant::now()).is_some() {}
    if let Some(epoch) = reconciler.seal() {
        // Nobody reads these maps.
        reconciler.reclaim(epoch);
    }
    let bits = reconciler.pending_clears().clone();
    reconciler.clear(&bits);
}

/// What the cluster's state compiles to.
fn wanted(server: &ApiServer) -> Result<String> {
    let mut objects = Vec::new();
    server.with(|store| {
        for (_, value) in store.objects() {
            let text = serde_json::to_vec(value).unwrap();
            objects.extend(manifests::parse(Path::new("cluster"), &text).objects);
        }
    });
    let mut reconciler = reconciler(Memory::new(rig::map_sizes()), 1, false)?;
    let changes = objects.into_iter().map(Change::Upsert);
    reconciler.take([Batch {
        source: SourceId(0),
        changes: changes.chain([Change::InitialListComplete]).collect(),
    }]);
    write(&mut reconciler);
    tables(&reconciler)
}

/// What is programmed. Why other Services are not is left out: of some, the API server is not even asked.
fn tables<D: Dataplane>(reconciler: &Reconciler<D>) -> Result<String> {
    let text = cases::programmed(reconciler)?;
    let is_table = |line: &&str| !line.contains(" not programmed: ");
    Ok(text.split_inclusive('\n').filter(is_table).collect())
}

/// Sources at work, and a reconciler that hears them.
struct Agent<D> {
    runtime: Runtime,
    batches: mpsc::Receiver<Batch>,
    health: Vec<watch::Receiver<Health>>,
    cancel: CancellationToken,
    reconciler: Reconciler<D>,
    /// It was complete once.
    listed: bool,
}

impl<D: Dataplane> Agent<D> {
    fn start(dataplane: D, specs: Vec<Spec>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let standalone = !specs.iter().any(|spec| matches!(spec, Spec::Kubernetes(_)));
        let count = u32::try_from(specs.len())?;
        let (sender, batches) = mpsc::channel(64);
        let cancel = CancellationToken::new();
        let mut health = Vec::new();
        for (id, spec) in (0..).map(SourceId).zip(specs) {
            let spawn = source::spawn(id, spec, sender.clone(), cancel.clone());
            health.push(runtime.block_on(spawn)?.health);
        }
        Ok(Self {
            runtime,
            batches,
            health,
            cancel,
            reconciler: reconciler(dataplane, count, standalone)?,
            listed: false,
        })
    }

    /// Takes what comes within a time, and programs it.
    fn listen(&mut self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            let batches = &mut self.batches;
            let received = self
                .runtime
                .block_on(async { timeout(rest, batches.recv()).await });
            let Ok(batch) = received else { return Ok(()) };
            self.reconciler.take([batch.context("the sources ended")?]);
            write(&mut self.reconciler);
            let programmed = tables(&self.reconciler)?;
            // G8: a list takes effect as a whole, so what stays in the cluster is never missing.
            ensure!(
                !self.listed || programmed.contains(STABLE),
                "what was there all the time is missing:\n{programmed}"
            );
            self.listed |= self.reconciler.settled();
        }
    }

    /// Listens until the maps are what the cluster's state compiles to.
    fn converge(&mut self, server: &ApiServer) -> Result<Duration> {
        let begun = Instant::now();
        let wanted = wanted(server)?;
        loop {
            self.listen(Duration::from_millis(20))?;
            let found = tables(&self.reconciler)?;
            if self.reconciler.settled() && found == wanted {
                return Ok(begun.elapsed());
            }
            let health: Vec<Health> = self
                .health
                .iter()
                .map(|health| health.borrow().clone())
                .collect();
            ensure!(
                begun.elapsed() < PATIENCE,
                "{}\n{health:#?}",
                TextDiff::from_lines(&wanted, &found)
                    .unified_diff()
                    .header("wanted", "programmed")
            );
        }
    }
}

impl<D> Drop for Agent<D> {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn cluster(server: &ApiServer, directory: &TempDir, streaming_lists: bool) -> Spec {
    Spec::Kubernetes(kubernetes::Settings {
        access: Access {
            kubeconfig: Some(server.kubeconfig(directory.path()).unwrap()),
            servers: Vec::new(),
        },
        node_name: NODE.to_owned(),
        proxy_name: None,
        streaming_lists,
    })
}

const FAULTS: Faults = Faults {
    too_many: 40,
    error: 60,
    gone: 60,
    torn: 60,
    ended: 60,
    late: 300,
    split: 300,
    bookmarks: 300,
};

/// Lets the cluster change and everything go wrong, by a seed, and then calm down.
fn chaos<D: Dataplane>(
    agent: &mut Agent<D>,
    server: &mut ApiServer,
    random: &mut Rng,
    rounds: usize,
    mut changed: impl FnMut(&ApiServer),
) -> Result<()> {
    changed(server);
    for _ in 0..rounds {
        server.set_faults(FAULTS);
        for _ in 0..random.usize(1..25) {
            match random.u8(0..40) {
                0 => server.kill(),
                1 => server.cut()?,
                2..4 => server.revive()?,
                4..6 => server.with(svc_lb_tests::apiserver::Store::compact),
                _ => change(server, random),
            }
            changed(server);
            if random.bool() {
                agent.listen(Duration::from_millis(random.u64(0..30)))?;
            }
        }
        server.set_faults(Faults::default());
        server.revive()?;
        agent.converge(server)?;
    }
    Ok(())
}

fn kubernetes_survives<D: Dataplane>(
    dataplane: D,
    streaming_lists: bool,
    seed: u64,
    rounds: usize,
) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let mut server = ApiServer::start(seed)?;
    populate(&server, &mut random);
    let directory = tempfile::tempdir()?;
    let mut agent = Agent::start(
        dataplane,
        vec![cluster(&server, &directory, streaming_lists)],
    )?;
    chaos(&mut agent, &mut server, &mut random, rounds, |_| {})
        .with_context(|| format!("seed {seed}"))
}

/// G8, A2, A4: lists and watches, in pages and as streams.
#[test]
fn the_maps_are_the_clusters_state_however_the_watches_go() {
    for seed in 0..4 {
        let memory = Memory::new(rig::map_sizes());
        kubernetes_survives(memory, seed % 2 == 1, seed, 4).unwrap();
    }
}

/// G8: the same with the kernel's maps.
#[test]
fn so_are_the_kernels_maps() {
    if !privileged() {
        return;
    }
    kubernetes_survives(rig::maps(), false, 7, 3).unwrap();
}

/// Copies a watch to a stream's socket, as `kubectl get --raw` in a loop does.
fn relay(server: SocketAddr, resource: Resource, socket: &Path, stop: &AtomicBool) {
    let path = format!(
        "{}?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true",
        resource.path()
    );
    let once = || -> io::Result<()> {
        let mut watch = TcpStream::connect(server)?;
        watch.set_read_timeout(Some(Duration::from_millis(50)))?;
        write!(watch, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            watch.read_exact(&mut byte)?;
            head.extend(byte);
        }
        if !head.starts_with(b"HTTP/1.0 200") {
            return Err(io::ErrorKind::Other.into());
        }
        let mut stream = UnixStream::connect(socket)?;
        let mut chunk = [0; 4096];
        while !stop.load(Ordering::Relaxed) {
            match watch.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => stream.write_all(chunk.get(..count).unwrap_or_default())?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    while !stop.load(Ordering::Relaxed) {
        // It is tried again whatever happened.
        drop(once());
        thread::sleep(Duration::from_millis(10));
    }
}

/// G8: streams of watch events, each cut and begun again as the watch behind it is.
#[test]
fn so_they_are_by_way_of_streams() {
    let seed = 11;
    let mut random = Rng::with_seed(seed);
    let mut server = ApiServer::start(seed).unwrap();
    populate(&server, &mut random);
    let directory = tempfile::tempdir().unwrap();
    let socket = |resource: Resource| directory.path().join(resource.kind());
    let specs = Resource::ALL.map(|resource| Spec::Stream {
        target: Target::Unix(socket(resource)),
        initial_quiet: None,
    });
    let mut agent = Agent::start(Memory::new(rig::map_sizes()), specs.into()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let relays = Resource::ALL.map(|resource| {
        let (address, socket, stop) = (server.address(), socket(resource), Arc::clone(&stop));
        thread::spawn(move || relay(address, resource, &socket, &stop))
    });
    let result = chaos(&mut agent, &mut server, &mut random, 4, |_| {});
    stop.store(true, Ordering::Relaxed);
    for relay in relays {
        relay.join().unwrap();
    }
    result.unwrap();
}

/// Writes the cluster's objects as files, and takes away those of objects that are gone.
fn export(server: &ApiServer, directory: &Path) {
    let mut files = BTreeSet::new();
    server.with(|store| {
        for (key, value) in store.objects() {
            let path: PathBuf =
                directory.join(format!("{}-{}.json", key.resource.kind(), key.name));
            let text = value.to_string();
            if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
                fs::write(&path, text).unwrap();
            }
            files.insert(path);
        }
    });
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if !files.contains(&path) {
            fs::remove_file(path).unwrap();
        }
    }
}

/// G8: files that change under the agent.
#[test]
fn so_they_are_by_way_of_manifests() {
    let seed = 13;
    let mut random = Rng::with_seed(seed);
    let mut server = ApiServer::start(seed).unwrap();
    populate(&server, &mut random);
    let directory = tempfile::tempdir().unwrap();
    export(&server, directory.path());
    let specs = vec![Spec::Manifests(directory.path().to_owned())];
    let mut agent = Agent::start(Memory::new(rig::map_sizes()), specs).unwrap();
    let files = directory.path().to_owned();
    chaos(&mut agent, &mut server, &mut random, 4, |server| {
        export(server, &files);
    })
    .unwrap();
}
