//! Flows that live through floods, and flows that end.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use svc_lb::dataplane::pins::Pins;
use svc_lb_common::limits::name;
use svc_lb_common::service::{Frontend, FrontendKey};
use svc_lb_common::{Addr4, Be16};
use svc_lb_tests::lab::addresses::NODE_A;
use svc_lb_tests::lab::agent::AgentProcess;
use svc_lb_tests::lab::client::{Client, Echo};
use svc_lb_tests::lab::{Family, Lab, Namespace, NodeName, eventually, privileged};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::frame::flags::{ACK, SYN};

use crate::cluster::{
    BRIEF, CLUSTER_IP, NODE_ECHO, NODE_PORT, NODE_UDP, SERVICE_ECHO, everywhere, lab, serve,
    serve_all, settles, start_with,
};

/// Forged sources of each kind of flood: many times what the maps hold.
const SOURCES: u32 = 40_000;

/// Sends IPv4 packets with any source.
struct Forger {
    socket: Socket,
}

impl Forger {
    fn new(namespace: &Namespace) -> Self {
        let raw = Protocol::from(libc::IPPROTO_RAW);
        let socket = namespace
            .run(|| Socket::new(Domain::IPV4, Type::RAW, Some(raw)))
            .unwrap();
        socket.set_send_buffer_size(4 << 20).unwrap();
        Self { socket }
    }

    /// One packet from each of [`SOURCES`] sources that nobody else has.
    fn flood(&self, first: u32, frame: impl Fn(SocketAddr) -> Frame) {
        const ETHERNET: usize = 14;
        for n in 0..SOURCES {
            let source = Ipv4Addr::from(0x6440_0000 + first + n);
            let frame = frame(SocketAddr::new(source.into(), 40_000));
            let bytes = frame.to_bytes();
            // The address says where to route it, nothing else.
            let to = SocketAddr::new(frame.destination.ip(), 0);
            let packet = bytes.get(ETHERNET..).unwrap();
            self.socket.send_to(packet, &to.into()).unwrap();
        }
    }
}

/// `conntrack list` shows each flow once, by what is asked, with an agent and without; `flush` takes both its entries, and
/// those of no other flow.
#[test]
fn flows_are_listed_and_flushed_by_filters() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").routed("r2").build().unwrap();
    let _servers = serve_all(&lab);
    let (_manifests, mut agent) =
        start_with(&lab, &[everywhere("web").pods([lab.pod("r1")])], |config| {
            config
        });
    let client = Client::of(lab.pod("r2").ns());
    let to = CLUSTER_IP.addr.socket(Family::V4, SERVICE_ECHO);
    let to6 = CLUSTER_IP.addr.socket(Family::V6, SERVICE_ECHO);
    let mut echo = client.echo(to).unwrap();
    let mut other = client.echo(to6).unwrap();
    let list = |agent: &AgentProcess, filter: &[&str]| -> Vec<Value> {
        let args = [&["conntrack", "list", "-o", "json"], filter].concat();
        serde_json::from_str(&agent.ask(&args).unwrap()).unwrap()
    };
    let frontend = to.to_string();
    let found = list(&agent, &["--frontend", &frontend, "--protocol", "tcp"]);
    let [flow] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!(flow["entries"], 2);
    assert_eq!(flow["state"], "tcp-established");
    assert_eq!(flow["name"]["service"], "web");
    assert_eq!(list(&agent, &["--service", "default/web"]).len(), 2);
    assert_eq!(list(&agent, &["--service", "default/none"]).len(), 0);
    agent.kill().unwrap();
    assert_eq!(list(&agent, &["--client", "0.0.0.0/0"]).len(), 1);
    assert!(!agent.cli(&["conntrack", "flush"]).unwrap().status.success());
    let said = agent
        .ask(&["conntrack", "flush", "--frontend", &frontend])
        .unwrap();
    assert!(said.contains("1 flows ended"), "{said}");
    assert_eq!(list(&agent, &["--frontend", &frontend]).len(), 0);
    let rest = list(&agent, &[]);
    assert_eq!(rest.len(), 1, "{rest:?}");
    assert_eq!(rest[0]["entries"], 2);
    other.ping("the other flow goes on").unwrap();
    // A packet of a connection opens its flow again.
    echo.ping("so does this one, to the only backend").unwrap();
}

/// G13: what somebody else deletes from a map, `verify` names and repairs.
#[test]
fn verify_names_and_repairs_what_somebody_deleted() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").routed("r2").build().unwrap();
    let _servers = serve_all(&lab);
    let (_manifests, agent) =
        start_with(&lab, &[everywhere("web").pods([lab.pod("r1")])], |config| {
            config
        });
    let verify = |args: &[&str]| {
        let output = agent.cli(&[&["verify"], args].concat()).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code().unwrap(), text)
    };
    assert_eq!(
        verify(&[]),
        (0, "the maps are as they were written\n".to_owned())
    );
    let to = CLUSTER_IP.addr.socket(Family::V4, SERVICE_ECHO);
    let IpAddr::V4(address) = to.ip() else {
        unreachable!("an IPv4 address");
    };
    let [frontends4, _] = name::FRONTENDS;
    let pin = Pins::new(agent.pin_dir()).map(frontends4);
    let map = Map::HashMap(MapData::from_pin(pin).unwrap());
    let mut map: HashMap<_, FrontendKey<Addr4>, Frontend> = map.try_into().unwrap();
    let key = FrontendKey::new(Addr4::from(address), Be16::new(to.port()), 6);
    map.remove(&key).unwrap();
    let (code, text) = verify(&["--repair"]);
    assert!(
        code == 3 && text.contains(frontends4) && text.contains(&format!("TCP {to}")),
        "{code}: {text}"
    );
    assert_eq!(verify(&[]).0, 0);
    Client::of(lab.pod("r2").ns()).echo(to).unwrap();
    let status = agent.ask(&["status"]).unwrap();
    assert!(
        status.contains("repaired: 1 elements of frontends4"),
        "{status}"
    );
}

/// G5, D4: a thousand real connections, from pods and from outside, and some UDP streams rest while forged sources flood the
/// node with SYNs, ACKs and pairs of datagrams, which real servers answer; the maps have room for a small part of them. All go
/// on, with the backend they had.
#[test]
fn real_connections_live_through_floods() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .bridged("b1")
        .routed("client-r")
        .clients(2)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let web = |pods: &[&str]| everywhere("web").pods(pods.iter().map(|pod| lab.pod(pod)));
    let (manifests, agent) = start_with(&lab, &[web(&["r1"])], |config| {
        config.args([
            "--map-size",
            "opening4=2048,established4=4096,streams4=1024",
        ])
    });
    let inside = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    let outside = NODE_PORT.addr.socket(Family::V4, NODE_PORT.echo);
    let clients = [
        (Client::of(lab.pod("client-r").ns()), inside),
        (Client::of(lab.client(0).ns()), outside),
    ];
    let mut connections = Vec::new();
    for (client, to) in &clients {
        for _ in 0..500 {
            connections.push(client.echo(*to).unwrap());
        }
    }
    let streams: Vec<_> = [
        (lab.pod("client-r").ns(), CLUSTER_IP),
        (lab.client(0).ns(), NODE_PORT),
    ]
    .into_iter()
    .flat_map(|(ns, frontend)| {
        let to = frontend.addr.socket(Family::V4, frontend.udp);
        (0..50).map(move |_| Client::of(ns).udp_connected(to).unwrap())
    })
    .collect();
    let talk = |text: &str| {
        for stream in &streams {
            let answer = stream.ask(text).unwrap();
            assert_eq!((answer.server.as_str(), answer.text.as_str()), ("r1", text));
        }
    };
    for connection in &mut connections {
        connection.ping("before").unwrap();
    }
    talk("one");
    thread::sleep(Duration::from_millis(2_100));
    talk("two");
    // Who is asked anew goes to the other one half of the time.
    manifests.write(&[web(&["r1", "b1"])]).unwrap();
    let (client, to) = &clients[0];
    eventually("both serve", Duration::from_secs(5), || {
        let server = client.echo(*to)?.server().to_owned();
        ensure!(server == "b1", "{server}");
        Ok(())
    });

    let forger = Forger::new(lab.client(1).ns());
    let tcp = NODE_A.socket(Family::V4, NODE_ECHO);
    let udp = NODE_A.socket(Family::V4, NODE_UDP);
    let syn = |source| Frame::tcp(source, tcp, SYN);
    let ack = |source| Frame::tcp(source, tcp, ACK);
    let datagram = |source| Frame::udp(source, udp);
    forger.flood(0, syn);
    forger.flood(0, ack);
    forger.flood(SOURCES, ack);
    forger.flood(2 * SOURCES, datagram);
    forger.flood(2 * SOURCES, datagram);
    let opened = counted(&agent, "tc_ingress", "open");
    assert!(
        opened > u64::from(2 * SOURCES),
        "only {opened} flows were opened"
    );

    for connection in &mut connections {
        assert_eq!(connection.server(), "r1");
        connection.ping("after").unwrap();
    }
    talk("three");
    // What the floods asked for is evicted from where it was.
    let left = eventually("a pass", Duration::from_secs(30), || {
        let map = flow_map(&agent, "opening4")?;
        let evicted = map["evicted"].as_u64().context("a number")?;
        ensure!(evicted > u64::from(SOURCES), "{map}");
        flow_map(&agent, "established4")
    });
    assert!(left["entries"].as_u64().unwrap() >= 2_000, "{left}");
    assert_eq!(left["evicted"], 0, "{left}");
}

/// How often a hook came to an outcome.
fn counted(agent: &AgentProcess, hook: &str, outcome: &str) -> u64 {
    let rows = agent.dump("counters").unwrap();
    let mut rows = rows.as_array().unwrap().iter();
    let row = rows.find(|row| row["hook"] == hook && row["name"] == outcome);
    row.and_then(|row| row["packets"].as_u64()).unwrap_or(0)
}

/// What the status says of a map that evicts.
fn flow_map(agent: &AgentProcess, name: &str) -> Result<Value> {
    let status: Value = serde_json::from_str(&agent.ask(&["status", "-o", "json"])?)?;
    let maps = status.pointer("/flows/maps").and_then(Value::as_array);
    let mut maps = maps.context("a list of maps")?.iter();
    let map = maps.find(|map| map["name"] == name);
    map.cloned().with_context(|| format!("no {name} yet"))
}

/// Flows of each kind that are over.
const OVER: u64 = 40;

/// G5, H6: flows that are over are collected and counted by what they were, those that rest are not; the status shows how
/// full their map is.
#[test]
fn flows_that_are_over_are_collected() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let (_manifests, agent) =
        start_with(&lab, &[everywhere("web").pods([lab.pod("r1")])], |config| {
            config.args([
                "--timeout",
                "tcp-opening=1s,tcp-closed=1s",
                "--timeout",
                "udp-opening=2s",
            ])
        });
    let client = Client::of(lab.pod("client-r").ns());
    let tcp = CLUSTER_IP.addr.socket(Family::V6, CLUSTER_IP.echo);
    let udp = CLUSTER_IP.addr.socket(Family::V6, CLUSTER_IP.udp);
    let mut resting: Vec<_> = (0..5).map(|_| client.echo(tcp).unwrap()).collect();
    for connection in &mut resting {
        connection.ping("hello").unwrap();
    }
    for n in 0..OVER {
        let mut connection = client.echo(tcp).unwrap();
        connection.ping("hello").unwrap();
        if n % 2 == 0 {
            connection.abort().unwrap();
        }
        let answer = client.udp(udp.ip()).unwrap().ask_at(udp, "hello").unwrap();
        assert_eq!(answer.server, "r1");
    }
    eventually("all are collected", Duration::from_secs(40), || {
        let collected = |map: &str, state: &str| -> Result<u64> {
            let map = flow_map(&agent, map)?;
            Ok(map["collected"][state].as_u64().unwrap_or(0))
        };
        let closed =
            collected("established6", "tcp-closed")? + collected("opening6", "tcp-closed")?;
        let asked = collected("opening6", "udp-opening")?;
        ensure!(
            closed == OVER && asked == OVER,
            "{closed} closed, {asked} asked"
        );
        let map = flow_map(&agent, "established6")?;
        ensure!(map["entries"] == 2 * resting.len(), "{map}");
        Ok(())
    });
    let table = agent.ask(&["status"]).unwrap();
    assert!(table.contains("tcp-closed 40"), "{table}");
    for connection in &mut resting {
        connection.ping("still here").unwrap();
    }
}

/// Longer than the agent waits before it looks for pods again.
const FOUND: Duration = Duration::from_secs(3);

/// A client of each kind and family with a connection to a given server, of which it has not heard since.
fn connections_to(lab: &Lab, server: &str) -> Vec<Echo> {
    let outside = lab.client(0).ns();
    let inside = ["client-r", "client-b"].map(|name| lab.pod(name).ns());
    let mut connections = Vec::new();
    for family in Family::BOTH {
        for (ns, frontend) in [
            (inside[0], CLUSTER_IP),
            (inside[1], CLUSTER_IP),
            (outside, NODE_PORT),
        ] {
            let to = frontend.addr.socket(family, frontend.echo);
            let mut tries = (0..100).map(|_| Client::of(ns).patience(HANGS).echo(to).unwrap());
            let mut connection = tries.find(|echo| echo.server() == server).unwrap();
            connection.ping("hello").unwrap();
            connections.push(connection);
        }
    }
    connections
}

/// How long a client waits for an answer that does not come.
const HANGS: Duration = Duration::from_secs(12);

/// What a client's wait ends with.
fn end_of(connection: &mut Echo) -> std::io::ErrorKind {
    let error = connection.ping("are you there?").unwrap_err();
    let error = error.downcast_ref::<std::io::Error>();
    error.map_or(std::io::ErrorKind::Other, std::io::Error::kind)
}

/// Runs `act` while every connection hangs; what their waits end with, and how long after `act`.
fn ends_after(connections: &mut [Echo], act: impl FnOnce()) -> Vec<(std::io::ErrorKind, Duration)> {
    thread::scope(|scope| {
        let waits: Vec<_> = connections
            .iter_mut()
            .map(|connection| scope.spawn(|| (end_of(connection), Instant::now())))
            .collect();
        thread::sleep(Duration::from_secs(1));
        let acted = Instant::now();
        act();
        let ends = waits.into_iter().map(|wait| wait.join().unwrap());
        ends.map(|(end, at)| (end, at.saturating_duration_since(acted)))
            .collect()
    })
}

/// G4: with `--reset-gone-backends local` clients that hang, because their pod is gone without a word, are reset as soon as the
/// endpoint is gone too, and not while it terminates; those that rest are on their next packet. Connections to other pods, also
/// of another node that is gone, are left alone. A new pod with the same address answers for itself.
#[test]
fn connections_to_pods_that_are_gone_are_reset() {
    if !privileged() {
        return;
    }
    let mut lab = lab();
    let mut servers: BTreeMap<_, _> = lab
        .pods()
        .map(|pod| (pod.name().to_owned(), serve(pod)))
        .collect();
    let web =
        |lab: &Lab, pods: &[&str]| everywhere("web").pods(pods.iter().map(|pod| lab.pod(pod)));
    let (manifests, agent) = start_with(&lab, &[web(&lab, &["r1", "b1", "far"])], |config| {
        config.args(["--reset-gone-backends", "local"])
    });
    let mut hanging = Vec::new();
    let mut resting = Vec::new();
    for server in ["r1", "b1"] {
        hanging.extend(connections_to(&lab, server));
        resting.extend(connections_to(&lab, server));
    }
    let mut elsewhere = connections_to(&lab, "far");
    thread::sleep(FOUND);

    let dying = web(&lab, &["far"]);
    let dying = ["r1", "b1"].iter().fold(dying, |service, pod| {
        service.with_conditions(lab.pod(pod), [false, false, true])
    });
    let without = web(&lab, &["far"]);
    manifests.write(&[dying]).unwrap();
    let address = lab.pod("r1").addr();
    for pod in ["r1", "b1"] {
        lab.remove_pod(pod).unwrap();
        drop(servers.remove(pod));
    }
    thread::sleep(FOUND);
    let ends = ends_after(&mut hanging, || {
        thread::sleep(FOUND);
        assert_eq!(counted(&agent, "tc_ingress", "reset"), 0, "still endpoints");
        manifests.write(&[without]).unwrap();
    });
    for (end, after) in ends {
        assert_eq!(end, std::io::ErrorKind::ConnectionReset);
        // Its next try: they double, from a fifth of a second.
        assert!(after > FOUND && after < Duration::from_secs(9), "{after:?}");
    }
    for connection in &mut resting {
        let begin = Instant::now();
        assert_eq!(end_of(connection), std::io::ErrorKind::ConnectionReset);
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
    }
    for connection in &mut elsewhere {
        let ends = connection.ends().unwrap();
        let lives = connection.ping("still here");
        lives.unwrap_or_else(|error| panic!("{ends:?}: {error:#}"));
    }
    let resets = counted(&agent, "tc_ingress", "reset");
    assert!(resets >= 24, "{resets}");

    // Again, with a successor that has the address.
    let successor = lab.add_pod_at("r1", NodeName::A, address).unwrap();
    let successor = serve(successor);
    manifests.write(&[web(&lab, &["r1"])]).unwrap();
    settles(
        Client::of(lab.pod("client-r").ns()),
        CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo),
        &["r1"],
    );
    let mut old = connections_to(&lab, "r1");
    thread::sleep(FOUND);
    manifests.write(&[web(&lab, &[])]).unwrap();
    lab.remove_pod("r1").unwrap();
    drop(successor);
    lab.add_pod_at("r1", NodeName::A, address).unwrap();
    let _successor = serve(lab.pod("r1"));
    manifests.write(&[web(&lab, &["r1"])]).unwrap();
    settles(
        Client::of(lab.pod("client-r").ns()),
        CLUSTER_IP.addr.socket(Family::V6, CLUSTER_IP.echo),
        &["r1"],
    );
    thread::sleep(BRIEF);
    let resets = counted(&agent, "tc_ingress", "reset");
    for connection in &mut old {
        assert_eq!(end_of(connection), std::io::ErrorKind::ConnectionReset);
    }
    assert_eq!(
        counted(&agent, "tc_ingress", "reset"),
        resets,
        "by the pod itself"
    );
    drop(connections_to(&lab, "r1"));
}

/// G4: without the setting nothing is sent: clients of a pod that is gone hang.
#[test]
fn connections_to_pods_that_are_gone_hang_by_default() {
    if !privileged() {
        return;
    }
    let mut lab = lab();
    let mut servers: BTreeMap<_, _> = lab
        .pods()
        .map(|pod| (pod.name().to_owned(), serve(pod)))
        .collect();
    let (manifests, agent) =
        start_with(&lab, &[everywhere("web").pods([lab.pod("r1")])], |config| {
            config
        });
    let mut hanging = connections_to(&lab, "r1");
    thread::sleep(FOUND);
    lab.remove_pod("r1").unwrap();
    drop(servers.remove("r1"));
    let ends = ends_after(&mut hanging, || {
        manifests.write(&[everywhere("web")]).unwrap();
    });
    for (end, after) in ends {
        assert_eq!(end, std::io::ErrorKind::WouldBlock);
        assert!(after + FOUND > HANGS, "{after:?}");
    }
    assert_eq!(counted(&agent, "tc_ingress", "reset"), 0);
}
