//! Sockets that are given a backend once, in place of each of their packets.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::json;
use svc_lb::dataplane::sys;
use svc_lb_common::limits::LAYOUT_VERSION;
use svc_lb_tests::lab::addresses::NODE_A;
use svc_lb_tests::lab::agent::{AgentConfig, AgentProcess};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::Manifests;
use svc_lb_tests::lab::{Family, Namespace, eventually, privileged};

use crate::cluster::{
    BRIEF, CLUSTER_IP, NODE_ECHO, NODE_UDP, SERVICE_ECHO, SOON, cluster_ip, each_family,
    everywhere, inside, lab, serve_all, start_with,
};

const DEFAULT: &str = "tcp,host-udp";
/// Far below the first retransmission.
const AT_ONCE: Duration = Duration::from_millis(500);

/// Whether a connection's packets meet no translation: there is no flow of the client's port.
fn is_given(agent: &AgentProcess, port: u16) -> bool {
    let flows = agent.dump("conntrack").unwrap().to_string();
    !flows.contains(&format!(":{port}\""))
}

/// One connection; its server, whether the packets are translated, and that it hears from the frontend alone.
fn connect(agent: &AgentProcess, ns: &Namespace, to: SocketAddr) -> (String, bool) {
    let mut echo = Client::of(ns).echo(to).unwrap();
    echo.ping("hello").unwrap();
    let (local, peer) = echo.ends().unwrap();
    assert_eq!(peer, to, "getpeername from {}", ns.name());
    (echo.server().to_owned(), is_given(agent, local.port()))
}

/// I1: an application sees the frontend, the wire the backend, and no packet is translated: TCP of pods and of the
/// node, over IPv6 sockets with IPv4 addresses too.
#[test]
fn tcp_sockets_are_given_a_backend() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let pods = ["r1", "b1", "far"].map(|name| lab.pod(name));
    let (_manifests, agent) = start_with(&lab, &[everywhere("web").pods(pods)], |c| {
        c.sockets(DEFAULT)
    });
    let clients = [
        lab.node_a(),
        lab.pod("client-r").ns(),
        lab.pod("client-b").ns(),
    ];
    for ns in clients {
        each_family(|family| {
            let mut servers = BTreeSet::new();
            let to = CLUSTER_IP.addr.socket(family, CLUSTER_IP.echo);
            for _ in 0..40 {
                let (server, given) = connect(&agent, ns, to);
                assert!(given, "{} -> {to}: a flow", ns.name());
                servers.insert(server);
            }
            assert_eq!(servers.len(), 3, "{} -> {to}: {servers:?}", ns.name());
            Ok(())
        });
        let IpAddr::V4(v4) = CLUSTER_IP.addr.of(Family::V4) else {
            unreachable!("an IPv4 address");
        };
        let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), CLUSTER_IP.echo);
        assert!(connect(&agent, ns, mapped).1, "{} -> {mapped}", ns.name());
    }
    // The server sees the client itself.
    let echo = Client::of(lab.pod("client-r").ns())
        .echo(CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo))
        .unwrap();
    assert!(lab.pod("client-r").addr().contains(echo.seen_as().ip()));
    let status = agent.ask(&["status"]).unwrap();
    assert!(status.contains("tcp,host-udp at /"), "{status}");
}

/// F7, G1, I1: datagrams of one of the node's sockets stay on one backend, connected or not, come from the frontend,
/// and move when the backend leaves. A pod's are translated packet by packet.
#[test]
fn udp_sockets_of_the_node_are_given_a_backend() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let all = ["r1", "b1", "far"];
    let web = |names: &[&str]| inside("web", 80).pods(names.iter().map(|name| lab.pod(name)));
    let (manifests, agent) = start_with(&lab, &[web(&all)], |c| c.sockets(DEFAULT));
    each_family(|family| {
        manifests.write(&[web(&all)])?;
        let to = CLUSTER_IP.addr.socket(family, CLUSTER_IP.udp);
        let node = Client::of(lab.node_a());
        let connected = node.udp_connected(to)?;
        assert_eq!(connected.socket().peer_addr()?, to);
        let mut servers = BTreeSet::new();
        for _ in 0..5 {
            let answer = connected.ask("x")?;
            assert_eq!(answer.from, to);
            servers.insert(answer.server);
        }
        assert_eq!(servers.len(), 1, "one socket, one backend: {servers:?}");
        assert!(is_given(&agent, connected.socket().local_addr()?.port()));

        let mut seen = BTreeSet::new();
        eventually("all backends are met", SOON, || {
            let socket = node.udp(to.ip())?;
            let server = socket.ask_at(to, "x")?.server;
            for _ in 0..5 {
                let answer = socket.ask_at(to, "x")?;
                ensure!(answer.server == server, "moved to {}", answer.server);
                ensure!(answer.from == to, "answered by {}", answer.from);
            }
            ensure!(is_given(&agent, socket.socket().local_addr()?.port()));
            seen.insert(server);
            ensure!(seen.len() == all.len(), "{seen:?}");
            Ok(())
        });

        let socket = node.udp(to.ip())?;
        let old = socket.ask_at(to, "x")?.server;
        let rest: Vec<&str> = all.into_iter().filter(|name| *name != old).collect();
        manifests.write(&[web(&rest)])?;
        eventually("the socket moves", SOON, || {
            let answer = socket.ask_at(to, "x")?;
            ensure!(answer.server != old, "still at {old}");
            ensure!(answer.from == to);
            Ok(())
        });

        let pod = Client::of(lab.pod("client-r").ns()).udp_connected(to)?;
        pod.ask("x")?;
        let port = pod.socket().local_addr()?.port();
        assert!(!is_given(&agent, port), "a pod's datagrams have a flow");
        Ok(())
    });
}

/// B3: the node reaches NodePorts at its loopback addresses, over TCP and UDP; nobody else does, and not where they
/// are served elsewhere alone.
#[test]
fn node_ports_at_loopback_addresses() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let pods = ["r1", "far"].map(|name| lab.pod(name));
    let web = everywhere("web").pods(pods);
    let loopback = |family| match family {
        Family::V4 => "127.0.0.1".parse::<IpAddr>().unwrap(),
        Family::V6 => "::1".parse().unwrap(),
    };
    let (manifests, agent) = start_with(&lab, &[web], |c| c.sockets(DEFAULT));
    for family in Family::BOTH {
        let node = Client::of(lab.node_a());
        for address in [loopback(family), NODE_A.of(family)] {
            let echo = SocketAddr::new(address, NODE_ECHO);
            let mut echo = node.echo(echo).unwrap();
            echo.ping("hello").unwrap();
            let udp = SocketAddr::new(address, NODE_UDP);
            let answer = node.udp(address).unwrap().ask_at(udp, "x").unwrap();
            assert_eq!(answer.from, udp);
            let answer = node.udp_connected(udp).unwrap().ask("x").unwrap();
            assert_eq!(answer.from, udp);
        }
        let pod = Client::of(lab.pod("client-r").ns());
        let at = SocketAddr::new(loopback(family), NODE_ECHO);
        assert_eq!(
            pod.connect(at).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
    }
    drop(agent);
    let config = AgentConfig::manifests(manifests.path());
    let _agent = AgentProcess::start(
        &lab,
        config
            .sockets(DEFAULT)
            .args(["--nodeport-addresses", "primary"]),
    )
    .unwrap();
    for family in Family::BOTH {
        let at = SocketAddr::new(loopback(family), NODE_ECHO);
        let error = Client::of(lab.node_a()).connect(at).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
}

/// E1, E2, C6: nothing serves: refused at once. A Local policy without an endpoint here: silence.
#[test]
fn sockets_that_nothing_serves() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let local = inside("local", 81)
        .spec("internalTrafficPolicy", json!("Local"))
        .pods([lab.pod("far")]);
    let (_manifests, agent) =
        start_with(&lab, &[inside("none", 80), local], |c| c.sockets(DEFAULT));
    for ns in [lab.node_a(), lab.pod("client-r").ns()] {
        each_family(|family| {
            for (service, port) in [(80, SERVICE_ECHO), (81, 9)] {
                let to = cluster_ip(service).socket(family, port);
                let started = Instant::now();
                let error = Client::of(ns).connect(to).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
                assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
            }
            let to = cluster_ip(81).socket(family, SERVICE_ECHO);
            let error = Client::of(ns).patience(BRIEF).connect(to).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{to}: {error}");
            Ok(())
        });
    }
    let events = agent.dump("counters").unwrap().to_string();
    assert!(events.contains("socket_refused"), "{events}");
}

/// I2: `host-only` leaves pods' sockets to the packet path, `off` all; who is neither the node nor one of its pods is
/// left alone, also by an agent that cannot tell.
#[test]
fn whose_sockets_are_given_a_backend() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let pods = ["r1", "b1", "far"].map(|name| lab.pod(name));
    let manifests = Manifests::create(lab.dir(), &[inside("web", 80).pods(pods)]).unwrap();
    let to = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    let start = |settings: fn(AgentConfig) -> AgentConfig| {
        let config = settings(AgentConfig::manifests(manifests.path()));
        AgentProcess::start(&lab, config).unwrap()
    };
    let pod = lab.pod("client-r").ns();

    let agent = start(|c| c.sockets("host-only"));
    assert!(connect(&agent, lab.node_a(), to).1);
    assert!(!connect(&agent, pod, to).1);
    drop(agent);

    let agent = start(|c| c.sockets("off"));
    assert!(!connect(&agent, pod, to).1);
    drop(agent);

    // At the machine's root, in a network namespace that is not the machine's.
    let agent = start(|c| c.sockets(DEFAULT).any_cgroup());
    assert!(connect(&agent, lab.node_a(), to).1);
    assert!(!connect(&agent, pod, to).1);
    let status = agent.ask(&["status"]).unwrap();
    assert!(status.contains("--cgroup"), "{status}");
    let stranger = Client::of(lab.router()).patience(BRIEF);
    assert!(stranger.connect(to).is_err());
}

/// G9, G10: the hooks outlive the agent, the next one takes them over, and `detach` removes them.
#[test]
fn hooks_outlive_the_agent() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let (_manifests, mut agent) = start_with(
        &lab,
        &[inside("web", 80).pods([lab.pod("r1"), lab.pod("far")])],
        |c| c.sockets(DEFAULT),
    );
    let to = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    let ns = lab.node_a();
    let open = Client::of(ns).echo(to).unwrap();
    let pin_dir = agent.pin_dir().to_owned();
    let links = || programs(&pin_dir);
    let before = links();
    assert_eq!(before.len(), 8, "{before:?}");
    agent.kill().unwrap();
    assert!(connect(&agent, ns, to).1);
    agent.restart().unwrap();
    assert!(connect(&agent, ns, to).1);
    assert_eq!(links().len(), 8, "{:?}", links());
    assert_ne!(links(), before, "the programs are the new agent's");
    assert_eq!(
        open.ends().unwrap().1,
        to,
        "an old socket keeps its peer's name"
    );
    agent.detach().unwrap();
    assert!(links().is_empty(), "{:?}", links());
    // The kernel lets go of an unpinned link a grace period later.
    eventually("nobody gives backends any more", SOON, || {
        ensure!(
            Client::of(ns).patience(BRIEF).connect(to).is_err(),
            "served"
        );
        Ok(())
    });
}

/// Ids of the programs that the pinned socket hooks run.
fn programs(pin_dir: &Path) -> Vec<u32> {
    let dir = pin_dir.join(format!("v{LAYOUT_VERSION}/sockets"));
    let pins = fs::read_dir(dir).into_iter().flatten().flatten();
    let program = |pin: fs::DirEntry| {
        let link = sys::open_pin(&pin.path()).unwrap();
        sys::link_info(link.as_fd()).unwrap().program
    };
    pins.map(program).collect()
}
