//! The agent at the size it is designed for, against the API server's double.

#![expect(
    clippy::indexing_slicing,
    reason = "what a JSON value lacks is null, which is told where it is used"
)]

use std::fs;
use std::io::{Write as _, stdout};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use serde_json::{Value, json};
use svc_lb::dataplane::pins::Pins;
use svc_lb_common::limits::name;
use svc_lb_common::service::Service;
use svc_lb_tests::apiserver::ApiServer;
use svc_lb_tests::lab::Lab;
use svc_lb_tests::lab::agent::{AgentConfig, AgentProcess};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;
const CHANGES: u32 = 1_000;
/// How long a change may take before something is wrong.
const LOST: Duration = Duration::from_secs(5);

/// Measures and prints; fails where a figure is over its limit.
pub(crate) fn run() -> Result<()> {
    let lab = Lab::builder().build()?;
    let server = lab.node_a().run(|| ApiServer::start(0))?;
    let mut bytes = 0;
    for number in 0..SERVICES {
        for object in [service(number), slice(number, 0)] {
            bytes += object.to_string().len();
            server.apply(object)?;
        }
    }
    let total = SERVICES * ENDPOINTS;
    print(&format!(
        "{SERVICES} Services, {total} endpoints, {} MB of JSON",
        bytes / 1_000_000
    ))?;
    let kubeconfig = server.kubeconfig(lab.dir())?;
    let config = AgentConfig::cluster(kubeconfig).args(["--log-format", "json"]);
    let agent = AgentProcess::start(&lab, config)?;
    let status = serde_json::from_str::<Value>(&agent.ask(&["status", "-o", "json"])?)?;
    let pid = status["pid"].as_u64().context("the agent's pid")?;

    let mut over = Vec::new();
    let mut figure = |what: &str, value: f64, unit: &str, limit: f64| -> Result<()> {
        let verdict = if value <= limit { "" } else { "  OVER" };
        if value > limit {
            over.push(what.to_owned());
        }
        print(&format!(
            "{what:44} {value:9.2} {unit:4} limit {limit}{verdict}"
        ))
    };
    let log = agent.log()?;
    let cold = logged(&log, "the first lists are programmed", "millis")?;
    figure("complete lists to programmed", cold, "ms", 1_000.0)?;

    let mut micros = changes(&server, &agent)?;
    micros.sort_unstable();
    let at = |part: usize| micros.get(micros.len() * part / 1_000).copied();
    for (part, name, limit) in [
        (500, "median", 5.0),
        (990, "p99", 5.0),
        (999, "p99.9", f64::INFINITY),
    ] {
        let millis = f64::from(at(part).context("changes")?) / 1_000.0;
        figure(&format!("one change to maps, {name}"), millis, "ms", limit)?;
    }
    let memory = |field: &str| memory(pid, field);
    figure(
        "agent's memory at most (VmHWM)",
        memory("VmHWM")?,
        "MiB",
        100.0,
    )?;
    figure(
        "of that its own (RssAnon)",
        memory("RssAnon")?,
        "MiB",
        f64::INFINITY,
    )?;
    figure(
        "maps that it has mapped (RssFile)",
        memory("RssFile")?,
        "MiB",
        f64::INFINITY,
    )?;
    let maps = status["maps"].as_array().context("maps")?;
    let kernel: u64 = maps.iter().filter_map(|map| map["bytes"].as_u64()).sum();
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    figure(
        "kernel memory of the maps",
        kernel as f64 / 1_048_576.0,
        "MiB",
        f64::INFINITY,
    )?;
    ensure!(over.is_empty(), "over the limit: {}", over.join(", "));
    Ok(())
}

fn print(line: &str) -> Result<()> {
    Ok(writeln!(stdout().lock(), "{line}")?)
}

/// Microseconds from each of many changes to its Service's new word in the map.
fn changes(server: &ApiServer, agent: &AgentProcess) -> Result<Vec<u32>> {
    let services = agent.dump("services")?;
    let indexes: Vec<(String, u32)> = services
        .as_array()
        .context("services")?
        .iter()
        .filter_map(|service| {
            let name = service["name"]["service"].as_str()?;
            Some((
                name.to_owned(),
                u32::try_from(service["index"].as_u64()?).ok()?,
            ))
        })
        .collect();
    let map = MapData::from_pin(Pins::new(agent.pin_dir()).map(name::SERVICES))?;
    let map: Array<_, Service> = Map::Array(map).try_into()?;
    let mut micros = Vec::new();
    for round in 0..CHANGES {
        let number = fastrand::u32(0..SERVICES);
        let name = service_name(number);
        let index = indexes.iter().find(|(known, _)| *known == name);
        let (_, index) = index.with_context(|| format!("{name} is not programmed"))?;
        let word = |map: &Array<_, Service>| map.get(index, 0).map(|service| service.cluster.0);
        let before = word(&map)?;
        let object = slice(number, round + 1);
        let begun = Instant::now();
        server.apply(object)?;
        while word(&map)? == before {
            if begun.elapsed() > LOST {
                bail!("a change of {name} is not in the maps after {LOST:?}");
            }
            thread::sleep(Duration::from_micros(50));
        }
        micros.push(u32::try_from(begun.elapsed().as_micros())?);
        thread::sleep(Duration::from_millis(2));
    }
    Ok(micros)
}

fn logged(log: &str, message: &str, field: &str) -> Result<f64> {
    for line in log.lines() {
        let Ok(line) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        if line["message"] == message {
            // Wide integers are written as text.
            let text = line[field].to_string();
            return Ok(text.trim_matches('"').parse()?);
        }
    }
    bail!("{message:?} was not logged")
}

/// MiB of a line of the process's status.
fn memory(pid: u64, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: f64 = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .with_context(|| format!("no {field}"))?
        .trim()
        .parse()?;
    Ok(kib / 1_024.0)
}

fn service_name(number: u32) -> String {
    format!("shop-{number:05}-frontend")
}

fn address(net: u8, number: u32) -> String {
    let [_, a, b, c] = number.to_be_bytes();
    format!("{net}.{}.{b}.{c}", 64 + a)
}

/// What `kubectl apply` and the controllers leave in an object's metadata.
fn metadata(name: &str, number: u32, labels: &Value, fields: &[&str]) -> Value {
    let owned: serde_json::Map<String, Value> = fields
        .iter()
        .map(|field| {
            (
                format!("f:{field}"),
                json!({".": {}, "f:app.kubernetes.io/name": {}}),
            )
        })
        .collect();
    let manager = |manager: &str, operation: &str| {
        json!({
            "manager": manager, "operation": operation, "apiVersion": "v1", "time": "2026-11-03T10:21:07Z",
            "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {"f:annotations": owned, "f:labels": owned}, "f:spec": owned},
        })
    };
    json!({
        "name": name, "namespace": format!("team-{:03}", number % 100),
        "uid": format!("6f2f5c1e-77a1-4d2e-9a3c-{number:012}"),
        "creationTimestamp": "2026-10-01T08:00:00Z", "generation": 7,
        "labels": labels,
        "annotations": {
            "kubectl.kubernetes.io/last-applied-configuration": format!("{{\"apiVersion\":\"v1\",{:>700}}}", "\"kind\":\"Service\""),
            "meta.helm.sh/release-name": "shop", "meta.helm.sh/release-namespace": "shop",
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-11-03T10:21:07Z",
        },
        "managedFields": [manager("kubectl-client-side-apply", "Update"), manager("kube-controller-manager", "Update")],
    })
}

fn service(number: u32) -> Value {
    let name = service_name(number);
    let labels = json!({"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": "shop-1.2.3"});
    let ip = address(10, number + 1);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": metadata(&name, number, &labels, &["clusterIP", "internalTrafficPolicy", "ports", "selector", "sessionAffinity", "type"]),
        "spec": {
            "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "selector": {"app.kubernetes.io/name": name, "app.kubernetes.io/instance": "shop"},
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"}],
        },
        "status": {"loadBalancer": {}},
    })
}

/// The Service's slice; with another `version`, one endpoint has another address.
fn slice(number: u32, version: u32) -> Value {
    let service = service_name(number);
    let labels = json!({
        "kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "app.kubernetes.io/name": service,
    });
    let endpoints: Vec<Value> = (0..ENDPOINTS)
        .map(|i| {
            let host = if i == 0 { SERVICES * ENDPOINTS + 1 + version } else { number * ENDPOINTS + i };
            json!({
                "addresses": [address(100, host)],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": format!("node-{:04}.example.internal", host % 1_000),
                "targetRef": {
                    "kind": "Pod", "namespace": format!("team-{:03}", number % 100),
                    "name": format!("{service}-7d9c5b8f6d-{host:05}"), "uid": format!("0c7ff4de-3f0f-4fd6-8d3c-{host:012}"),
                },
                "zone": "eu-1a",
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": metadata(&format!("{service}-x7k2p"), number, &labels, &["addressType", "endpoints", "ports"]),
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": endpoints,
    })
}
