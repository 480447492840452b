//! The first process of the machines that `cargo xtask vm` boots: sets the system up, runs the tests, powers off.
//!
//! Its last line on the console says whether everything passed. A panic ends process 1, on which the kernel panics
//! and the machine stops without that line.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Write as _, stdout};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, process};

use anyhow::{Context as _, Result, bail};
use nix::kmod::init_module;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::utsname::uname;
use nix::unistd::sync;
use svc_lb::dataplane::loader;
use svc_lb::dataplane::pins::Pins;
use svc_lb::dataplane::sizes::MapSizes;
use svc_lb::dataplane::sockets::{Place, SocketSettings};
use svc_lb_common::config::{self, Config};
use svc_lb_tests::lab::addresses::{NODE_A, SERVICES};
use svc_lb_tests::lab::agent::{self, AgentConfig, AgentProcess};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::{Manifests, Protocol, Service};
use svc_lb_tests::lab::process::collected;
use svc_lb_tests::lab::{self, Family, Lab, POD_INTERFACES, UPLINK, sctp, server};

/// A test that `cargo xtask vm` can run by name.
type Test = fn() -> Result<()>;

fn main() -> ExitCode {
    if process::id() != 1 {
        eprintln!(
            "vm-init mounts file systems and powers the machine off: it runs only as process 1 of `cargo xtask vm`"
        );
        return ExitCode::FAILURE;
    }
    let outcome = match run() {
        Ok(()) => "PASS".to_owned(),
        Err(error) => format!("FAIL: {error:#}"),
    };
    say(&outcome);
    sync();
    match reboot(RebootMode::RB_AUTOBOOT) {
        Ok(never) => match never {},
        Err(error) => {
            say(&format!("reboot: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// A line on the console. A console that cannot be written to leaves nothing to be done about it.
fn say(text: &str) {
    let mut out = stdout();
    let _written = writeln!(out, "svc-lb-vm: {text}").and_then(|()| out.flush());
}

fn run() -> Result<()> {
    mount_file_systems()?;
    let system = uname()?;
    say(&format!(
        "Linux {} {}",
        system.release().display(),
        system.machine().display()
    ));
    load_modules()?;
    let wanted: Vec<String> = env::args().skip(1).collect();
    let tests: &[(&str, Test)] = &[
        ("check", check),
        ("load", load),
        ("lab", lab),
        ("clusterip", clusterip),
        ("sctp", sctp_associations),
    ];
    for (name, test) in tests {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            test().with_context(|| (*name).to_owned())?;
            say(&format!("{name} ok"));
        }
    }
    let is_test = |wanted: &String| tests.iter().any(|(test, _)| test == wanted);
    if wanted.is_empty() && has_everything(&system.release().to_string_lossy()) {
        return scenarios(&SCENARIOS.map(str::to_owned));
    }
    let named: Vec<String> = wanted.into_iter().filter(|name| !is_test(name)).collect();
    if named.is_empty() {
        return Ok(());
    }
    scenarios(&named)
}

/// The scenarios that every kernel since 6.1 is to pass: clients outside, backends everywhere, and what needs devices that
/// not every kernel has.
const SCENARIOS: [&str; 3] = [
    "remote::outside_clients_reach_every_backend",
    "overlay::",
    "uplinks::",
];
/// The test program with the scenarios.
const PROGRAM: &str = "/bin/scenarios";
/// How much slower than elsewhere everything is here: the processor is emulated, by few of the machine's own.
const SLOWNESS: &str = "8";

/// Whether it is a kernel for all of svc-lb: 6.1 or later.
fn has_everything(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 1),
        _ => false,
    }
}

/// Runs scenarios by parts of their names, one at a time, also those that the development machine's kernel cannot run.
fn scenarios(names: &[String]) -> Result<()> {
    let started = Instant::now();
    let status = Command::new(PROGRAM)
        .args(names)
        .args(["--test-threads", "1", "--include-ignored"])
        .env(lab::SLOWNESS, SLOWNESS)
        .status()
        .with_context(|| format!("start {PROGRAM}"))?;
    if !status.success() {
        bail!("scenarios {}: {status}", names.join(" "));
    }
    say(&format!(
        "scenarios ok ({:.0} s)",
        started.elapsed().as_secs_f32()
    ));
    Ok(())
}

/// What every init mounts.
fn mount_file_systems() -> Result<()> {
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("bpf", "/sys/fs/bpf"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&Path>)
            .with_context(|| format!("mount {kind} on {at}"))?;
    }
    Ok(())
}

/// Loads `/modules/*` in the order of their names.
fn load_modules() -> Result<()> {
    let mut files = fs::read_dir("/modules")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    for file in &files {
        let image = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        init_module(&image, c"").with_context(|| format!("load {}", file.display()))?;
    }
    say(&format!("{} modules loaded", files.len()));
    Ok(())
}

/// The agent's own view of this kernel, on a node with an uplink and a pod. Degraded is fine: that is what older
/// kernels are.
fn check() -> Result<()> {
    const OK: i32 = 0;
    const DEGRADED: i32 = 3;
    let lab = Lab::builder().name("vm").routed("a").clients(1).build()?;
    let mut command = collected(agent::binary()?);
    command
        .args(["check", "--all"])
        .args(["--uplink", UPLINK, "--pod-interface", POD_INTERFACES]);
    let output = lab
        .node_a()
        .start(command)?
        .output(Duration::from_mins(2))?;
    say(&String::from_utf8_lossy(&output.stdout));
    if !matches!(output.status.code(), Some(OK | DEGRADED)) {
        bail!(
            "svc-lb check: {} {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// The verifier of this kernel takes every program, as it is by default, and with all that can be switched on.
fn load() -> Result<()> {
    let place = Place::find(&SocketSettings::default());
    if let Err(reason) = &place {
        say(&format!("socket hooks: {reason}"));
    }
    for bits in [Config::DEFAULT.bits, !config::DIAGNOSTICS] {
        let pins = Pins::new("/sys/fs/bpf/vm-init");
        pins.prepare()?;
        let mut loaded = loader::load(&loader::Settings {
            object: loader::object()?,
            pins: &pins,
            sizes: &MapSizes::for_memory(0),
            config: Config {
                bits,
                ..Config::DEFAULT
            },
            sockets: place.is_ok(),
        })?;
        let refused = [
            loaded.programs.xdp_refused.take(),
            loaded.programs.sockets_refused.take(),
        ];
        if let Some(refused) = refused.into_iter().flatten().next() {
            return Err(refused.into());
        }
        for (program, instructions) in loaded.programs.verified_instructions() {
            say(&format!(
                "{program}: {instructions} instructions verified, settings {bits:#x}"
            ));
        }
        pins.remove()?;
    }
    Ok(())
}

/// Namespaces, veth pairs, a bridge and their routing work before the agent comes in.
fn lab() -> Result<()> {
    let lab = Lab::builder()
        .name("vm")
        .routed("a")
        .bridged("b")
        .clients(1)
        .build()?;
    let mut servers = Vec::new();
    for pod in lab.pods() {
        servers.push(server::http(pod.ns(), pod.name(), 8080)?);
    }
    for source in [lab.pod("a").ns(), lab.pod("b").ns(), lab.client(0).ns()] {
        for pod in lab.pods() {
            for family in Family::BOTH {
                let to = pod.addr().socket(family, 8080);
                let hit = Client::of(source)
                    .hit(to)
                    .with_context(|| format!("{} to {to}", source.name()))?;
                if hit != pod.name() {
                    bail!("{to} is {}, but {hit} answered", pod.name());
                }
            }
        }
    }
    Ok(())
}

/// The service's backends; the client is another pod.
const BACKENDS: [&str; 2] = ["a", "b"];
const CLIENT: &str = "c";
/// Enough to reach both of two backends, but for once in a hundred million runs.
const TRIES: usize = 28;

/// The agent attaches its programs to edges and uplink, and a pod reaches both backends of a Service through its
/// ClusterIPs, over TCP and UDP. Afterwards `detach` leaves nothing pinned.
fn clusterip() -> Result<()> {
    let lab = Lab::builder()
        .name("vm")
        .routed("a")
        .bridged("b")
        .routed("c")
        .clients(1)
        .build()?;
    let mut servers = Vec::new();
    for pod in BACKENDS.map(|name| lab.pod(name)) {
        servers.push(server::http(pod.ns(), pod.name(), 8080)?);
        servers.push(server::udp_echo(pod.ns(), pod.name(), 5353)?);
    }
    let service = Service::new("web", SERVICES.nth(80))
        .port("http", Protocol::Tcp, 80, 8080)
        .port("udp", Protocol::Udp, 53, 5353)
        .pods(BACKENDS.map(|name| lab.pod(name)));
    let manifests = Manifests::create(lab.dir(), &[service])?;
    for sockets in ["off", "tcp,host-udp"] {
        let config = AgentConfig::manifests(manifests.path()).sockets(sockets);
        let mut agent = AgentProcess::start(&lab, config)?;
        say(&format!("svc-lb status\n{}", agent.ask(&["status"])?));
        hits_both(&lab)?;
        let pins = agent.pin_dir().to_owned();
        agent.detach()?;
        if pins.exists() {
            bail!("detach leaves {}", pins.display());
        }
    }
    Ok(())
}

fn hits_both(lab: &Lab) -> Result<()> {
    let client = lab.pod(CLIENT);
    for family in Family::BOTH {
        let vip = SERVICES.nth(80);
        let hits = tries(|| Client::of(client.ns()).hit(vip.socket(family, 80)))?;
        expect_both(family, "TCP", &hits)?;
        // Each datagram is a flow of its own: from a socket of its own.
        let hits = tries(|| {
            let udp = Client::of(client.ns()).udp(client.addr().of(family))?;
            Ok(udp.ask_at(vip.socket(family, 53), "x")?.server)
        })?;
        expect_both(family, "UDP", &hits)?;
    }
    Ok(())
}

/// Associations through a ClusterIP from a pod, and through a NodePort from outside, to backends here and on another
/// node: with other ports behind the frontend, so that the checksum changes, and over wires that carry it in full.
fn sctp_associations() -> Result<()> {
    let lab = Lab::builder()
        .name("vm")
        .routed("a")
        .bridged("b")
        .routed("c")
        .remote("far")
        .clients(1)
        .build()?;
    let backends = ["a", "b", "far"];
    for pod in backends.map(|name| lab.pod(name)) {
        for family in Family::BOTH {
            sctp::serve(pod.ns(), pod.name(), pod.addr().socket(family, 3868))?;
        }
    }
    let service = Service::new("diameter", SERVICES.nth(80))
        .port("peer", Protocol::Sctp, 38, 3868)
        .node_port(30_038)
        .pods(backends.map(|name| lab.pod(name)));
    let manifests = Manifests::create(lab.dir(), &[service])?;
    for xdp in ["off", "generic"] {
        let config = AgentConfig::manifests(manifests.path()).xdp(xdp);
        let mut agent = AgentProcess::start(&lab, config)?;
        for family in Family::BOTH {
            for (client, to) in [
                (lab.pod("c").ns(), SERVICES.nth(80).socket(family, 38)),
                (lab.client(0).ns(), NODE_A.socket(family, 30_038)),
            ] {
                let seen: BTreeSet<String> = (0..TRIES * 2)
                    .map(|_| Ok(sctp::ask(client, to)?.0))
                    .collect::<Result<_>>()?;
                let wanted = backends.map(str::to_owned).into();
                if seen != wanted {
                    bail!("SCTP to {to}, XDP {xdp}, hit {seen:?}, not {wanted:?}");
                }
            }
        }
        agent.detach()?;
    }
    Ok(())
}

fn tries(mut hit: impl FnMut() -> Result<String>) -> Result<BTreeSet<String>> {
    (0..TRIES).map(|_| hit()).collect()
}

fn expect_both(family: Family, protocol: &str, hits: &BTreeSet<String>) -> Result<()> {
    let wanted = BACKENDS.map(str::to_owned).into();
    if *hits != wanted {
        bail!("{protocol} over {family} hit {hits:?}, not {wanted:?}");
    }
    Ok(())
}
