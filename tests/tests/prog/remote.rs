//! Flows with a translated source: to backends of other nodes, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use svc_lb_common::config::Config;
use svc_lb_common::limits::name;
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::network::{MANY_BACKENDS, MANY_CLIENTS, STRANGER, UPLINK, XDP_UPLINK};
use svc_lb_tests::prog::rig::{Count, Setup, Verdict};
use svc_lb_tests::prog::tables::{Describe as _, at, port};

use crate::bench::*;

const NODE_PORT: u16 = 30_080;

fn nth(net: IpAddr, host: u32) -> Ipv4Addr {
    let IpAddr::V4(net) = net else {
        panic!("{net} is IPv4's")
    };
    Ipv4Addr::from(u32::from(net) + host)
}

fn backend(n: u32) -> SocketAddr {
    SocketAddr::new(nth(MANY_BACKENDS, 256 + n).into(), 8_080)
}

fn node_port(backends: &[SocketAddr]) -> svc_lb::compile::desired::DesiredPort {
    port("web", Protocol::Tcp, Family::V4)
        .node_port(NODE_PORT)
        .backends(backends)
}

/// An outside client's packets to a backend of another node leave by XDP with this node's address as their source,
/// one hop further, and its answers come back as the frontend's (SEMANTICS C1).
#[test]
fn xdp_sends_on_and_back() {
    on_bench(|bench| {
        bench.program(node_port(&[backend(0)]));
        let w = world(Family::V4);
        let client = SocketAddr::new(nth(MANY_CLIENTS, 7).into(), 40_000);
        let asked = SocketAddr::new(w.node.ip(), NODE_PORT);
        let syn = Frame::tcp(client, asked, SYN);
        let (uplink, xdp) = (bench.network.uplink, bench.network.xdp_uplink);

        let (verdict, out) = bench.rig.run(XdpIngress, xdp, &syn.to_bytes());
        assert_eq!(verdict, Verdict::Back, "out by the interface it came in by");
        let out = Frame::parse(&out).expect("a whole frame with right checksums");
        assert_eq!(out.macs, [XDP_UPLINK.router, XDP_UPLINK.mac]);
        assert_eq!(out.destination, backend(0));
        assert_eq!(out.source.ip(), XDP_UPLINK.sources[0]);
        assert!((61_000..=65_535).contains(&out.source.port()), "{out:?}");
        assert_eq!(out.hops, syn.hops - 1);

        // The way back leads through an interface that takes no frames from XDP: tc finishes it.
        let answer = out.answer(SYN | ACK);
        let (verdict, same) = bench.rig.run(XdpIngress, xdp, &answer.to_bytes());
        assert_eq!(verdict, Verdict::On);
        assert_eq!(same, answer.to_bytes(), "it goes up unchanged");
        let (verdict, back) = bench.rig.run(TcIngress, uplink, &answer.to_bytes());
        assert_eq!(verdict, Verdict::Back);
        let back = Frame::parse(&back).expect("a whole frame with right checksums");
        assert_eq!((back.source, back.destination), (asked, client));
        assert_eq!(back.hops, answer.hops - 1);
    });
}

/// A packet that fits no way on is answered with the size that would (RFC 1191, RFC 8201), one whose hops end with
/// that; both from this node's address.
#[test]
fn what_cannot_go_on_is_told() {
    on_bench(|bench| {
        // Behind the interface with the small MTU.
        bench.program(node_port(&[at("172.16.1.13:8080")]));
        let w = world(Family::V4);
        let client = SocketAddr::new(nth(MANY_CLIENTS, 7).into(), 40_000);
        let asked = SocketAddr::new(w.node.ip(), NODE_PORT);
        let mut syn = Frame::tcp(client, asked, SYN);
        let uplink = bench.network.uplink;
        let tells = |bench: &mut Bench, frame: &Frame, kind: [u8; 2], word: [u8; 4]| {
            let (verdict, out) = bench.rig.run(TcIngress, uplink, &frame.to_bytes());
            assert_eq!(verdict, Verdict::Back);
            let icmp = frame.l3() + 20;
            assert_eq!(out[icmp..icmp + 2], kind);
            assert_eq!(out[icmp + 4..icmp + 8], word);
            let source: [u8; 4] = out[26..30].try_into().expect("an address");
            assert_eq!(IpAddr::from(source), UPLINK.sources[0]);
        };
        syn.hops = 1;
        tells(bench, &syn, [11, 0], [0; 4]);
        syn.hops = 2;
        syn.payload = vec![0; 1_300];
        let [high, low] = STRANGER.mtu.to_be_bytes();
        tells(bench, &syn, [3, 4], [0, 0, high, low]);
    });
}

/// One million flows of as many clients through one NodePort to 330 backends of other nodes: no two of them look alike to a
/// backend, every one finds a port, and answers reach the client they belong to (SEMANTICS C14).
#[test]
fn a_million_flows_through_one_node_port() {
    const FLOWS: u32 = 1_000_000;
    const BACKENDS: u32 = 330;
    let plain = Setup::default();
    let setup = Setup {
        sizes: vec![(name::OPENING[0], 2_400_000)],
        ..plain
    };
    with_setup(&setup, |bench| {
        let backends: Vec<_> = (0..BACKENDS).map(backend).collect();
        bench.program(node_port(&backends));
        let w = world(Family::V4);
        let asked = SocketAddr::new(w.node.ip(), NODE_PORT);
        let client = |n: u32| {
            let port = 1_024 + u16::try_from(n % 50_000).expect("a port");
            SocketAddr::new(nth(MANY_CLIENTS, n / 50_000 + 1).into(), port)
        };
        let (uplink, xdp) = (bench.network.uplink, bench.network.xdp_uplink);
        let mut seen: BTreeMap<(u16, SocketAddr), u32> = BTreeMap::new();
        let mut by_backend: BTreeMap<SocketAddr, u32> = BTreeMap::new();
        let mut without_port = 0;
        for n in 0..FLOWS {
            let syn = Frame::tcp(client(n), asked, SYN);
            let (verdict, out) = bench.rig.run(XdpIngress, xdp, &syn.to_bytes());
            if verdict == Verdict::Dropped {
                without_port += 1;
                continue;
            }
            let out = Frame::parse(&out).expect("a whole frame with right checksums");
            assert_eq!(out.source.ip(), XDP_UPLINK.sources[0]);
            *by_backend.entry(out.destination).or_default() += 1;
            let other = seen.insert((out.source.port(), out.destination), n);
            assert_eq!(other, None, "{out:?} looks like flow {other:?}");
        }
        assert_eq!(by_backend.len(), backends.len());
        let counted = bench
            .rig
            .counters()
            .get(Count::Outcome(XdpIngress, Outcome::PortsExhausted));
        assert_eq!(counted, without_port);
        assert_eq!(without_port, 0, "two thirds of the ports are in use");

        for ((port, backend), n) in seen.iter().filter(|(_, n)| *n % 10 == 0) {
            let node = SocketAddr::new(XDP_UPLINK.sources[0], *port);
            let answer = Frame::tcp(*backend, node, SYN | ACK);
            let (verdict, back) = bench.rig.run(TcIngress, uplink, &answer.to_bytes());
            assert_eq!(verdict, Verdict::Back);
            let back = Frame::parse(&back).expect("a whole frame with right checksums");
            assert_eq!((back.source, back.destination), (asked, client(*n)));
        }
    });
}

/// New flows find a source port while the range of their backend fills up, nearly to its end; how many do not is printed
/// (SEMANTICS C14).
#[test]
fn ports_are_found_in_a_crowded_range() {
    // At that many hundredths in use, at most that many of a hundred new flows are dropped.
    const LEVELS: [(u32, u32); 5] = [(50, 0), (67, 0), (90, 1), (95, 3), (98, 40)];
    with_setup(&Setup::default(), |bench| {
        bench.program(node_port(&[backend(0)]));
        let w = world(Family::V4);
        let asked = SocketAddr::new(w.node.ip(), NODE_PORT);
        let xdp = bench.network.xdp_uplink;
        let range = 65_535 - 61_000 + 1;
        let (mut taken, mut tried) = (0, 0);
        let mut ports = BTreeSet::new();
        let mut open_until = |bench: &mut Bench, hundredths: u32| {
            let (mut opened, mut dropped) = (0, 0);
            while taken * 100 < range * hundredths {
                let port = 1_024 + u16::try_from(tried % 50_000).expect("a port");
                let client = SocketAddr::new(nth(MANY_CLIENTS, tried / 50_000 + 1).into(), port);
                tried += 1;
                let syn = Frame::tcp(client, asked, SYN);
                let (verdict, out) = bench.rig.run(XdpIngress, xdp, &syn.to_bytes());
                if verdict == Verdict::Dropped {
                    dropped += 1;
                    continue;
                }
                let out = Frame::parse(&out).expect("a whole frame with right checksums");
                assert!(ports.insert(out.source.port()), "{out:?} is taken");
                taken += 1;
                opened += 1;
            }
            (opened, dropped)
        };
        for (level, allowed) in LEVELS {
            open_until(bench, level);
            let (opened, dropped) = open_until(bench, level + 1);
            println!(
                "{level} % of the range in use: {dropped} of {} dropped",
                opened + dropped
            );
            assert!(
                dropped * 100 <= (opened + dropped) * allowed,
                "{level} %: {dropped} dropped, {opened} opened"
            );
        }
    });
}

/// A range of source ports that is used up drops new flows and counts them; those that are open go on (SEMANTICS C14).
#[test]
fn a_range_of_ports_ends() {
    let plain = Setup::default();
    let setup = Setup {
        config: Config {
            snat_last: plain.config.snat_first + 3,
            ..plain.config
        },
        ..plain
    };
    with_setup(&setup, |bench| {
        bench.program(node_port(&[backend(0)]));
        let w = world(Family::V4);
        let asked = SocketAddr::new(w.node.ip(), NODE_PORT);
        let xdp = bench.network.xdp_uplink;
        let mut opened = Vec::new();
        for n in 0..64 {
            let client = SocketAddr::new(nth(MANY_CLIENTS, 7).into(), 40_000 + n);
            let syn = Frame::tcp(client, asked, SYN);
            let (verdict, _) = bench.rig.run(XdpIngress, xdp, &syn.to_bytes());
            if verdict == Verdict::Back {
                opened.push(syn);
            }
        }
        assert_eq!(opened.len(), 4, "a port each");
        for syn in opened {
            let (verdict, _) = bench.rig.run(XdpIngress, xdp, &syn.to_bytes());
            assert_eq!(verdict, Verdict::Back);
        }
        let counters = bench.rig.counters();
        let dropped = Count::Outcome(XdpIngress, Outcome::PortsExhausted);
        assert_eq!(counters.get(dropped), 60);
        assert_eq!(counters.get(Count::Event(Event::PortTranslated)), 4);
    });
}
