//! The agent's end: killed, restarted, detached.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::crowd::Crowd;
use svc_lb_tests::lab::run::{BPFFS, Machine};
use svc_lb_tests::lab::{Family, KernelState, Lab, privileged};

use crate::cluster::{
    CLUSTER_IP, FROM_OUTSIDE, FROM_PODS, NODE_PORT, Source, everywhere, reaches, serve_all,
    settles, start,
};

/// How long the kernel may take to free what nobody uses.
const SETTLE: Duration = Duration::from_secs(10);

/// G9: kill -9 under a thousand connections each way: none breaks, new ones work while no agent runs, the next agent
/// adopts what is pinned and renumbers nothing.
#[test]
fn kill_and_adopt_under_traffic() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .bridged("b1")
        .routed("client-r")
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let pods = ["r1", "b1"].map(|name| lab.pod(name));
    let (manifests, mut agent) = start(&lab, &[everywhere("web").pods(pods)]);
    let inside = Crowd::open(
        lab.pod("client-r").ns(),
        CLUSTER_IP.addr.socket(Family::V6, CLUSTER_IP.echo),
        1000,
    )
    .unwrap();
    let outside = Crowd::open(
        lab.client(0).ns(),
        NODE_PORT.addr.socket(Family::V4, NODE_PORT.echo),
        1000,
    )
    .unwrap();
    let before = ["services", "backends"].map(|what| agent.dump(what).unwrap());
    let pins = pin_names(&agent);
    let held = KernelState::of_pins(agent.pin_dir()).unwrap();

    agent.kill().unwrap();
    for crowd in [&inside, &outside] {
        let broken = crowd.verify();
        assert!(broken.is_empty(), "after the kill: {:?}", broken.first());
    }
    for family in Family::BOTH {
        reaches(
            Source::pod(&lab, "client-r"),
            CLUSTER_IP,
            family,
            &["r1", "b1"],
        );
        reaches(Source::outside(&lab, 0), NODE_PORT, family, &["r1", "b1"]);
    }

    agent.restart().unwrap();
    let after = ["services", "backends"].map(|what| agent.dump(what).unwrap());
    assert_eq!(before, after, "the next agent renumbered");
    assert_eq!(pin_names(&agent), pins, "the next agent pinned otherwise");
    let now = KernelState::of_pins(agent.pin_dir()).unwrap();
    for kind in ["map", "link"] {
        let adopted: BTreeSet<_> = now.of_kind(kind).collect();
        // Constants and the log's ring belong to the programs, which are replaced.
        let programs_own = |one: &str| one.contains("rodata") || one.contains("AYA_LOGS");
        for one in held.of_kind(kind).filter(|one| !programs_own(one)) {
            assert!(
                adopted.contains(one),
                "not adopted: {one}; pinned now: {now:?}"
            );
        }
    }
    for crowd in [&inside, &outside] {
        let broken = crowd.verify();
        assert!(broken.is_empty(), "after the restart: {:?}", broken.first());
    }

    // The adopted maps are written to: a change arrives, and the flows still live.
    manifests
        .write(&[everywhere("web").pods([lab.pod("r1")])])
        .unwrap();
    let client = Client::of(lab.pod("client-r").ns());
    let to = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    crate::cluster::leaves(client, to, &["b1"]);
    for crowd in [&inside, &outside] {
        let broken = crowd.verify();
        assert!(broken.is_empty(), "after the change: {:?}", broken.first());
    }
}

/// G9: a change made while no agent runs is found by the next one.
#[test]
fn next_agent_reconciles() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("r2")
        .routed("client-r")
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let (manifests, mut agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    let client = Client::of(lab.pod("client-r").ns());
    let to = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    assert_eq!(client.echo(to).unwrap().server(), "r1");
    agent.kill().unwrap();
    manifests
        .write(&[everywhere("web").pods([lab.pod("r2")])])
        .unwrap();
    assert_eq!(client.echo(to).unwrap().server(), "r1", "without an agent");
    agent.restart().unwrap();
    settles(client, to, &["r2"]);
}

/// G9: SIGTERM is not the end of the service either: only `detach` is.
#[test]
fn stopped_agent_leaves_the_dataplane() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let (_manifests, mut agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    agent.stop().unwrap();
    let client = Client::of(lab.pod("client-r").ns()).patience(Duration::from_millis(500));
    let to = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    assert_eq!(client.echo(to).unwrap().server(), "r1");
    agent.detach().unwrap();
    assert!(client.echo(to).is_err(), "detached, yet served");
}

/// G11: after `detach` programs, maps, links, pins, qdiscs, namespaces and routes are as before, also when the agent was
/// killed first.
#[test]
fn detach_leaves_nothing_behind() {
    if !privileged() {
        return;
    }
    let machine = Machine::alone().unwrap();
    let before = KernelState::take().unwrap().settings();
    let mut held = KernelState::default();
    {
        let lab = Lab::builder()
            .routed("r1")
            .bridged("b1")
            .routed("client-r")
            .clients(1)
            .build_alone(&machine)
            .unwrap();
        let _servers = serve_all(&lab);
        for killed in [false, true] {
            let on_node = lab.node_a().run(KernelState::take).unwrap().settings();
            let services = [everywhere("web").pods(["r1", "b1"].map(|name| lab.pod(name)))];
            let (_manifests, mut agent) = start(&lab, &services);
            reaches(
                Source::pod(&lab, "client-r"),
                FROM_PODS[0],
                Family::V4,
                &["r1", "b1"],
            );
            reaches(
                Source::outside(&lab, 0),
                FROM_OUTSIDE[0],
                Family::V6,
                &["r1", "b1"],
            );
            held = KernelState::of_pins(agent.pin_dir()).unwrap();
            for kind in ["program", "map", "link"] {
                assert!(
                    held.of_kind(kind).count() >= 3,
                    "{kind}s of the agent: {held:?}"
                );
            }
            if killed {
                agent.kill().unwrap();
            }
            agent.detach().unwrap();
            let settled = lab.node_a().run(|| on_node.settle(&held, SETTLE)).unwrap();
            assert!(
                settled.is_empty(),
                "after detach (killed: {killed}):\n{settled}"
            );
        }
    }
    let settled = before.settle(&held, SETTLE).unwrap();
    assert!(settled.is_empty(), "after the lab:\n{settled}");
}

/// The demo killed in the middle of its tour, and interrupted there: everything is as before.
#[test]
fn ended_demo_leaves_nothing_behind() {
    if !privileged() {
        return;
    }
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let machine = Machine::alone().unwrap();
        let before = KernelState::take().unwrap().settings();
        drop(machine);

        let mut demo = Command::new(env!("CARGO_BIN_EXE_svc-lb-demo"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
        let called = lines.any(|line| line.unwrap().contains("kubia-2"));
        assert!(called, "the demo ended without a call: {:?}", demo.wait());
        let pins = Path::new(BPFFS).join(format!("svc-lb-{}x0", demo.id()));
        let held = KernelState::of_pins(&pins).unwrap();
        assert!(
            held.of_kind("link").count() > 3,
            "links of the demo: {held:?}"
        );
        let pid = Pid::from_raw(i32::try_from(demo.id()).unwrap());
        kill(pid, signal).unwrap();
        lines.for_each(drop);
        let status = demo.wait().unwrap();
        if signal == Signal::SIGINT {
            assert_eq!(status.code(), Some(130));
        }

        let _machine = Machine::alone().unwrap();
        let settled = before.settle(&held, SETTLE).unwrap();
        assert!(settled.is_empty(), "after {signal}:\n{settled}");
    }
}

fn pin_names(agent: &svc_lb_tests::lab::AgentProcess) -> BTreeSet<String> {
    let dir = agent.pin_dir().display().to_string();
    KernelState::take()
        .unwrap()
        .of_kind("pin")
        .filter(|pin| pin.contains(&dir))
        .map(str::to_owned)
        .collect()
}
