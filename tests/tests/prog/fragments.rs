//! Fragments: what follows the first one of a datagram goes where that went, and what cannot is not half translated
//! (SEMANTICS E7).

use std::net::SocketAddr;

use svc_lb::dataplane::Timeouts;
use svc_lb::dataplane::collect::Reason;
use svc_lb_common::outcome::{Lru, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::frame::{Part, Transport};
use svc_lb_tests::prog::network::XDP_UPLINK;
use svc_lb_tests::prog::rig::{Count, Counters, Setup};
use svc_lb_tests::prog::tables::{Describe as _, at, port};
use svc_lb_tests::prog::{Frame, Verdict};

use crate::bench::*;

/// Runs a hook's program on one frame after the other; what came out, and how often which outcome was counted.
fn run_all(
    bench: &Bench,
    hook: svc_lb_common::outcome::Hook,
    interface: u32,
    frames: &[Vec<u8>],
) -> (Vec<(Verdict, Vec<u8>)>, Counters) {
    let before = bench.rig.counters();
    let run = |bytes: &Vec<u8>| bench.rig.run(hook, interface, bytes);
    let ran = frames.iter().map(run).collect();
    (ran, bench.rig.counters().since(&before))
}

/// All parts went that way; the datagram that they make.
fn together(ran: &[(Verdict, Vec<u8>)], verdict: Verdict) -> Frame {
    assert!(ran.iter().all(|(way, _)| *way == verdict), "{ran:02x?}");
    let pieces: Vec<_> = ran.iter().map(|(_, bytes)| bytes.clone()).collect();
    Frame::put_together(&pieces).unwrap_or_else(|| panic!("no datagram: {pieces:02x?}"))
}

fn counts<const N: usize>(
    hook: svc_lb_common::outcome::Hook,
    outcomes: [(Outcome, u64); N],
) -> Counters {
    let mut counters = Counters::default();
    for (outcome, number) in outcomes {
        counters.add(Count::Outcome(hook, outcome), number);
    }
    counters
}

fn datagram(source: SocketAddr, destination: SocketAddr) -> Frame {
    Frame {
        payload: (0..=255).cycle().take(3_001).collect(),
        ..Frame::udp(source, destination)
    }
}

const CUTS: [usize; 2] = [1_200, 2_400];

/// E7: a pod's fragmented datagram reaches the backend whole, and the backend's answer the pod; so do an outside client's
/// at XDP.
#[test]
fn later_fragments_follow_the_first() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        let (pod, uplink) = (bench.network.pod, bench.network.uplink);
        let sent = datagram(w.client, w.vip);
        let (ran, counted) = run_all(bench, TcIngress, pod, &sent.pieces(7, &CUTS));
        assert_eq!(together(&ran, Verdict::On), sent.clone().to(w.remote));
        let outcomes = [(Outcome::Open, 1), (Outcome::ForwardOpening, 2)];
        assert_eq!(counted, counts(TcIngress, outcomes));

        let answer = sent.clone().to(w.remote).answer(0);
        let answer = Frame {
            payload: sent.payload,
            ..answer
        };
        let (ran, counted) = run_all(bench, TcEgress, pod, &answer.pieces(9, &CUTS));
        assert_eq!(together(&ran, Verdict::On), answer.from(w.vip));
        assert_eq!(counted, counts(TcEgress, [(Outcome::Reverse, 3)]));

        bench.program(
            port("web", Protocol::Udp, w.family)
                .frontend(
                    svc_lb::compile::desired::FrontendKind::LoadBalancer,
                    w.balancer,
                )
                .local_backends(&[w.local]),
        );
        let sent = datagram(w.outside, w.balancer);
        let (ran, counted) = run_all(bench, XdpIngress, uplink, &sent.pieces(7, &CUTS));
        assert_eq!(together(&ran, Verdict::On), sent.to(w.local));
        let outcomes = [(Outcome::Open, 1), (Outcome::ForwardOpening, 2)];
        assert_eq!(counted, counts(XdpIngress, outcomes));
    });
}

/// E7: fragments that come before their first one are dropped where nobody has the address, left to tc by XDP, and left to
/// the stack where the node may have it; a backend's own are left alone.
#[test]
fn fragments_without_their_first() {
    for_families(|bench, w| {
        let kind = svc_lb::compile::desired::FrontendKind::LoadBalancer;
        let external = svc_lb::compile::desired::FrontendKind::ExternalIp;
        bench.program(
            w.port(Protocol::Udp)
                .node_port(w.node.port())
                .frontend(kind, w.balancer)
                .frontend(external, w.external)
                .backends(&[w.remote]),
        );
        let (pod, uplink) = (bench.network.pod, bench.network.uplink);
        for (to, outcome) in [
            (w.vip, Outcome::Fragment),
            (w.other_vip, Outcome::Unallocated),
            (w.balancer, Outcome::Fragment),
            (w.external, Outcome::FragmentToStack),
            (w.node, Outcome::FragmentToStack),
        ] {
            let later = &datagram(w.client, to).pieces(7, &CUTS)[1..];
            let (ran, counted) = run_all(bench, TcIngress, pod, later);
            assert_eq!(counted, counts(TcIngress, [(outcome, 2)]), "{to}");
            if outcome == Outcome::FragmentToStack {
                let as_they_were = later.iter().map(|bytes| (Verdict::On, bytes.clone()));
                assert_eq!(ran, as_they_were.collect::<Vec<_>>());
            }
            let (_, counted) = run_all(bench, XdpIngress, uplink, later);
            assert_eq!(counted, counts(XdpIngress, [(Outcome::LeftToTc, 2)]));
        }
        let straight = datagram(w.client, w.remote).pieces(7, &CUTS);
        let (_, counted) = run_all(bench, TcIngress, pod, &straight);
        assert_eq!(counted, Counters::default());
        let (_, counted) = run_all(
            bench,
            TcEgress,
            pod,
            &datagram(w.remote, w.client).pieces(7, &CUTS),
        );
        assert_eq!(counted, Counters::default());
    });
}

/// An identification that is used again is the next datagram's; an old one is nobody's.
#[test]
fn ids_are_used_again() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        let pod = bench.network.pod;
        let mut other = w.client;
        other.set_port(w.client.port() + 1);
        for client in [w.client, other, w.client] {
            let sent = datagram(client, w.vip);
            let (ran, _) = run_all(bench, TcIngress, pod, &sent.pieces(7, &CUTS));
            assert_eq!(together(&ran, Verdict::On), sent.to(w.remote));
        }
        bench.rig.age_fragments(0);
        let late = &datagram(w.client, w.vip).pieces(7, &CUTS)[1..];
        let (_, counted) = run_all(bench, TcIngress, pod, late);
        assert_eq!(counted, counts(TcIngress, [(Outcome::Fragment, 2)]));
    });
}

/// A later fragment says nothing about its flow but that it lives.
#[test]
fn later_fragments_leave_the_state_alone() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        let out = bench.open(&syn);
        let pod = bench.network.pod;
        let reset = Frame {
            payload: vec![0x55; 2_000],
            ..out.answer(RST)
        };
        let pieces = reset.pieces(3, &[1_200]);
        let _first = run_all(bench, TcEgress, pod, &pieces[..1]);
        let states = |bench: &Bench| {
            let mut flows = bench.rig.flows();
            flows.sort_by_key(|flow| flow.source);
            flows.iter().map(|flow| flow.state).collect::<Vec<_>>()
        };
        let before = states(bench);
        let (_, counted) = run_all(bench, TcEgress, pod, &pieces[1..]);
        assert_eq!(counted, counts(TcEgress, [(Outcome::Reverse, 1)]));
        assert_eq!(states(bench), before, "still reset, not answered again");
    });
}

/// The first fragment may be too short for TCP's flags: then nothing is translated (RFC 1858).
#[test]
fn a_first_fragment_without_the_whole_header() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let tiny = Frame::tcp(w.client, w.vip, SYN).pieces(7, &[8, 16]);
        let (_, counted) = run_all(bench, TcIngress, bench.network.pod, &tiny);
        let outcomes = [(Outcome::Malformed, 1), (Outcome::Fragment, 2)];
        assert_eq!(counted, counts(TcIngress, outcomes));
    });
}

/// An IPv6 fragment header on a whole datagram is an ordinary extension header (RFC 6946).
#[test]
fn atomic_fragments_are_whole() {
    on_bench(|bench| {
        let w = world(Family::V6);
        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        let whole = Frame {
            part: Some(Part {
                offset: 0,
                more: false,
                id: 7,
            }),
            ..Frame::udp(w.client, w.vip)
        };
        bench
            .pod_sends(&whole)
            .became(Outcome::Open, &whole.clone().to(w.remote));
    });
}

/// A pod that reaches itself does so in fragments too.
#[test]
fn fragments_are_turned_around() {
    for_families(|bench, w| {
        let itself = SocketAddr::new(w.client.ip(), 8_080);
        bench.program(w.port(Protocol::Udp).local_backends(&[itself]));
        let pod = bench.network.pod;
        let sent = datagram(w.client, w.vip);
        let (ran, counted) = run_all(bench, TcIngress, pod, &sent.pieces(7, &CUTS));
        let seen = together(&ran, Verdict::Back);
        let mut source = w.vip;
        source.set_port(w.client.port());
        assert_eq!(seen, sent.clone().from(source).to(itself).turned());
        assert_eq!(counted, counts(TcIngress, [(Outcome::Hairpin, 3)]));
        let answer = Frame {
            payload: sent.payload,
            ..seen.answer(0)
        };
        let (ran, counted) = run_all(bench, TcIngress, pod, &answer.pieces(8, &CUTS));
        let back = together(&ran, Verdict::Back);
        assert_eq!((back.source, back.destination), (w.vip, w.client));
        assert_eq!(counted, counts(TcIngress, [(Outcome::HairpinReverse, 3)]));
    });
}

/// E7: with this node's address as their source fragments leave by the routes, at XDP and at tc, and their answers come
/// back. The first one too big is answered; later ones never are (RFC 1122 3.2.2).
#[test]
fn fragments_with_a_translated_source() {
    on_bench(|bench| {
        for (client, backend) in [
            ("198.18.0.7:40000", "198.19.0.9:8080"),
            ("[2001:db8:2::14]:40000", "[2001:db8:1::a]:8080"),
        ] {
            let (client, backend) = (at(client), at(backend));
            let w = world(Family::of(client.ip()));
            let asked = SocketAddr::new(w.node.ip(), 30_080);
            bench.program(
                port("web", Protocol::Udp, w.family)
                    .node_port(30_080)
                    .backends(&[backend]),
            );
            let (uplink, xdp) = (bench.network.uplink, bench.network.xdp_uplink);
            let sent = datagram(client, asked);
            let (ran, counted) = run_all(bench, XdpIngress, xdp, &sent.pieces(7, &CUTS));
            let out = together(&ran, Verdict::Back);
            assert_eq!(out.destination, backend);
            assert!(XDP_UPLINK.sources.contains(&out.source.ip()), "{out:?}");
            assert_eq!(out.hops, sent.hops - 1);
            assert_eq!(
                counted.get(Count::Outcome(XdpIngress, Outcome::ForwardRemote)),
                2
            );
            // The same at tc, and the answer.
            let (ran, _) = run_all(bench, TcIngress, uplink, &sent.pieces(8, &CUTS));
            assert_eq!(together(&ran, Verdict::Back).source, out.source);
            let answer = Frame {
                payload: sent.payload.clone(),
                ..out.answer(0)
            };
            let (ran, counted) = run_all(bench, TcIngress, uplink, &answer.pieces(9, &CUTS));
            let back = together(&ran, Verdict::Back);
            assert_eq!((back.source, back.destination), (asked, client));
            assert_eq!(counted, counts(TcIngress, [(Outcome::ReverseRemote, 3)]));

            let large = sent.pieces(10, &[1_400, 2_800]);
            let (_, counted) = run_all(bench, XdpIngress, xdp, &large[..1]);
            assert_eq!(counted, counts(XdpIngress, [(Outcome::TooBig, 1)]));
            let (ran, counted) = run_all(bench, XdpIngress, xdp, &large[1..]);
            assert_eq!(ran[0].0, Verdict::Dropped);
            assert_eq!(ran[1].0, Verdict::Back, "that one fits");
            let outcomes = [(Outcome::RejectSilent, 1), (Outcome::ForwardRemote, 1)];
            assert_eq!(counted, counts(XdpIngress, outcomes));
            bench.rig.clear_flows();
        }
    });
}

/// The checksum of an SCTP packet with other ports depends on its length, which its first fragment does not know;
/// where only addresses change, there is nothing to know.
#[test]
fn fragments_of_sctp() {
    for_families(|bench, w| {
        let mut same_port = w.remote;
        same_port.set_port(w.vip.port());
        let pod = bench.network.pod;
        let sent = Frame {
            payload: vec![0x55; 2_000],
            ..Frame::new(w.client, w.vip, Transport::Sctp { flags: SYN })
        };
        bench.program(w.port(Protocol::Sctp).backends(&[same_port]));
        let (ran, _) = run_all(bench, TcIngress, pod, &sent.pieces(7, &[1_200]));
        assert_eq!(together(&ran, Verdict::On), sent.clone().to(same_port));
        bench.rig.clear_flows();
        bench.program(w.port(Protocol::Sctp).backends(&[w.remote]));
        let (_, counted) = run_all(bench, TcIngress, pod, &sent.pieces(8, &[1_200]));
        let outcomes = [(Outcome::FragmentSctp, 1), (Outcome::Fragment, 1)];
        assert_eq!(counted, counts(TcIngress, outcomes));
    });
}

/// Many fragmented datagrams are held in bounded memory; who evicts is estimated, and what is old is collected.
#[test]
fn fragmented_datagrams_are_bounded_and_collected() {
    use svc_lb_common::limits::name;
    let setup = Setup {
        sizes: vec![(name::FRAGMENTS[0], 1_024)],
        ..Setup::default()
    };
    with_setup(&setup, |bench| {
        let w = world(Family::V4);
        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        let mut collector = bench.rig.collector(Timeouts::default());
        let mut pass = || loop {
            if let Some(report) = collector.tick(1 << 20).expect("the maps are walked") {
                let of_map = |map: &&svc_lb::dataplane::collect::MapReport| {
                    (map.lru, map.family) == (Lru::Fragments, Family::V4)
                };
                break report.maps.iter().find(of_map).expect("the map").clone();
            }
        };
        let _base = pass();
        let first = |id| datagram(w.client, w.vip).pieces(id, &CUTS).remove(0);
        let firsts: Vec<_> = (0..4_000).map(first).collect();
        let _sent = run_all(bench, TcIngress, bench.network.pod, &firsts);
        let report = pass();
        assert!((100..=1_024).contains(&report.entries), "{report:?}");
        assert_eq!(report.evicted, 4_000 - report.entries, "{report:?}");
        bench.rig.age_fragments(2);
        let collected = pass().collected.get(&Reason::Fragments).copied();
        assert_eq!(collected, Some(report.entries));
    });
}
