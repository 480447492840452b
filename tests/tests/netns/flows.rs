//! Flows that live through floods, and flows that end.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use svc_lb_tests::lab::addresses::NODE_A;
use svc_lb_tests::lab::agent::AgentProcess;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{Family, Lab, Namespace, eventually, privileged};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::frame::flags::{ACK, SYN};

use crate::cluster::{
    CLUSTER_IP, NODE_ECHO, NODE_PORT, NODE_UDP, everywhere, serve_all, start_with,
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
