//! ICMP errors about flows' packets: who sent such a packet gets the error, with its own packet in it.

use std::net::IpAddr;

use svc_lb::compile::desired::FrontendKind;
use svc_lb_common::outcome::{Hook, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::frame::{Icmp, Part, Transport, next};
use svc_lb_tests::prog::rig::{Count, Counters};
use svc_lb_tests::prog::tables::{Describe as _, at};
use svc_lb_tests::prog::{Frame, Verdict};

use crate::bench::*;

/// How much of a packet's transport header and payload an error quotes: the least, half a header, a TCP header, everything.
const LENGTHS: [usize; 4] = [8, 16, 20, 1_000];

/// Type and code, and the second word, of errors that hosts and routers send.
const fn kinds(family: Family) -> [([u8; 2], [u8; 4]); 3] {
    match family {
        Family::V4 => [
            ([3, 3], [0; 4]),
            ([3, 4], [0, 0, 5, 0]),
            ([11, 0], [0, 5, 0, 0]),
        ],
        Family::V6 => [([1, 4], [0; 4]), ([2, 0], [0, 0, 5, 0]), ([3, 0], [0; 4])],
    }
}

/// A router's address.
fn router(family: Family) -> IpAddr {
    match family {
        Family::V4 => at("192.0.2.254:0").ip(),
        Family::V6 => at("[2001:db8:2::fe]:0").ip(),
    }
}

/// The error that `speaker` sends about a packet to whom that came from.
fn error(speaker: IpAddr, about: &Frame, (kind, word): ([u8; 2], [u8; 4]), length: usize) -> Icmp {
    let mut error = Icmp::about(about, kind, speaker, length);
    error.data = word;
    error
}

/// Runs a hook's program on an error, of which this outcome is counted and nothing else.
fn run(
    bench: &Bench,
    (hook, interface): (Hook, u32),
    error: &Icmp,
    outcome: Outcome,
) -> (Verdict, Vec<u8>) {
    let before = bench.rig.counters();
    let came = bench.rig.run(hook, interface, &error.to_bytes());
    let mut expected = Counters::default();
    if outcome != Outcome::NotOurs {
        expected.add(Count::Outcome(hook, outcome), 1);
    }
    assert_eq!(bench.rig.counters().since(&before), expected, "{error:x?}");
    came
}

/// An error went on, or back, as exactly this one.
fn becomes(bench: &Bench, at: (Hook, u32), error: &Icmp, verdict: Verdict, expected: &Icmp) {
    let came = run(bench, at, error, Outcome::IcmpError);
    assert_eq!(
        came,
        (verdict, expected.to_bytes()),
        "{error:x?}\nexpected {expected:x?}"
    );
}

/// Packets of every protocol from a client to a frontend, some with what may stand in front of the ports.
fn packets(w: &World, protocol: Protocol) -> Vec<Frame> {
    let transport = match protocol {
        Protocol::Tcp => Transport::Tcp { flags: SYN },
        Protocol::Udp => Transport::Udp { checksum: true },
        Protocol::Sctp => Transport::Sctp { flags: SYN },
    };
    let plain = Frame::new(w.client, w.vip, transport);
    let mut decorated = plain.clone();
    match w.family {
        Family::V4 => decorated.options = vec![1; 12],
        Family::V6 => decorated.extensions = vec![(next::DESTINATION, vec![0; 14])],
    }
    let mut first = plain.clone();
    first.part = Some(Part {
        offset: 0,
        more: true,
        id: 1,
    });
    vec![plain, decorated, first]
}

/// E6: an error about what a client sent, from the backend or from a router on the way there: the client gets it with the
/// packet that it sent, from the frontend or from the router.
#[test]
fn about_a_clients_packet() {
    for_families(|bench, w| {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            bench.program(w.port(protocol).backends(&[w.remote]));
            for (n, sent) in packets(w, protocol).into_iter().enumerate() {
                if n == 0 {
                    let _opened = bench.pod_sends(&sent).opened();
                }
                let gone = sent.clone().to(w.remote);
                let flows = bench.rig.flows();
                for (kind, length) in kinds(w.family)
                    .into_iter()
                    .flat_map(|kind| LENGTHS.map(|length| (kind, length)))
                {
                    // SCTP's own checksum tells of the ports too; in a quote it stays what it was.
                    let length = if protocol == Protocol::Sctp {
                        8
                    } else {
                        length
                    };
                    for (speaker, as_seen) in [
                        (w.remote.ip(), w.vip.ip()),
                        (router(w.family), router(w.family)),
                    ] {
                        let comes = error(speaker, &gone, kind, length);
                        let expected = error(as_seen, &sent, kind, length);
                        for interface in [bench.network.pod, bench.network.uplink] {
                            let at = (TcEgress, interface);
                            becomes(bench, at, &comes, Verdict::On, &expected);
                        }
                    }
                }
                assert_eq!(bench.rig.flows(), flows, "an error changes no flow");
            }
        }
    });
}

/// E6: an error about an answer, towards the frontend that it seems to come from: the backend gets it with the packet that
/// it sent. XDP leaves it to tc.
#[test]
fn about_a_backends_packet() {
    for_families(|bench, w| {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench.program(
                w.port(protocol)
                    .frontend(FrontendKind::LoadBalancer, w.balancer)
                    .backends(&[w.local]),
            );
            bench.rig.set("web", {
                let mut port = w
                    .port(protocol)
                    .frontend(FrontendKind::LoadBalancer, w.balancer);
                port.backends
                    .push(svc_lb_tests::prog::tables::ready(w.local, true));
                vec![port]
            });
            let mut sent = packets(w, protocol).remove(0).to(w.balancer);
            sent.source = w.outside;
            let _opened = bench.outside_sends(&sent).opened();
            let answer = sent.clone().to(w.local).answer(SYN | ACK);
            let as_seen = answer.clone().from(w.balancer);
            for (kind, length) in kinds(w.family)
                .into_iter()
                .flat_map(|kind| LENGTHS.map(|length| (kind, length)))
            {
                for speaker in [w.outside.ip(), router(w.family)] {
                    let comes = error(speaker, &as_seen, kind, length);
                    let expected = error(speaker, &answer, kind, length);
                    let xdp = (XdpIngress, bench.network.xdp_uplink);
                    let same = run(bench, xdp, &comes, Outcome::LeftToTc);
                    assert_eq!(same, (Verdict::On, comes.to_bytes()));
                    let at = (TcIngress, bench.network.uplink);
                    becomes(bench, at, &comes, Verdict::On, &expected);
                }
            }
            bench.rig.clear_flows();
        }
    });
}

/// E6, C10: a pod that is its own backend gets its own errors, turned around at its edge.
#[test]
fn about_a_hairpins_packet() {
    for_families(|bench, w| {
        let backend = std::net::SocketAddr::new(w.client.ip(), 8_080);
        bench.program(w.port(Protocol::Udp).backends(&[backend]));
        let sent = Frame::udp(w.client, w.vip);
        let _turned = bench.pod_sends(&sent);
        let arrived = sent
            .clone()
            .to(backend)
            .from(std::net::SocketAddr::new(w.vip.ip(), w.client.port()));
        let [kind, ..] = kinds(w.family);
        let comes = error(w.client.ip(), &arrived, kind, 1_000);
        let mut expected = error(w.vip.ip(), &sent, kind, 1_000);
        expected.macs.reverse();
        expected.hops -= 1;
        let at = (TcIngress, bench.network.pod);
        becomes(bench, at, &comes, Verdict::Back, &expected);
        let mut last = comes;
        last.hops = 1;
        let (verdict, _) = run(bench, at, &last, Outcome::TtlExceeded);
        assert_eq!(verdict, Verdict::Dropped);
    });
}

/// E6, C1: with a translated source both ways leave by redirect, one hop further: towards the client from the frontend or a
/// router, towards the backend from this node, which is all that it knows.
#[test]
fn about_packets_with_a_translated_source() {
    for_families(|bench, w| {
        let pick = |v4: &str, v6: &str| match w.family {
            Family::V4 => at(v4),
            Family::V6 => at(v6),
        };
        let client = pick("172.16.2.22:40000", "[2001:db8:2::16]:40000");
        let backend = pick("172.16.1.12:8080", "[2001:db8:1::c]:8080");
        bench.program(
            w.port(Protocol::Tcp)
                .frontend(FrontendKind::LoadBalancer, w.balancer)
                .backends(&[backend]),
        );
        let sent = Frame::tcp(client, w.balancer, SYN);
        let (_, gone) = bench
            .rig
            .run(TcIngress, bench.network.uplink, &sent.to_bytes());
        let gone = Frame::parse(&gone).expect("a whole frame");
        assert_eq!(gone.destination, backend);
        assert_ne!(gone.source.ip(), client.ip());
        let further = |mut error: Icmp| {
            error.hops -= 1;
            error
        };
        let at = (TcIngress, bench.network.uplink);
        for (kind, length) in kinds(w.family)
            .into_iter()
            .flat_map(|kind| LENGTHS.map(|length| (kind, length)))
        {
            for (speaker, as_seen) in [
                (backend.ip(), w.balancer.ip()),
                (router(w.family), router(w.family)),
            ] {
                let comes = error(speaker, &gone, kind, length);
                let mut original = sent.clone();
                original.hops = gone.hops;
                let mut expected = further(error(as_seen, &original, kind, length));
                expected.macs = comes.macs;
                becomes(bench, at, &comes, Verdict::Back, &expected);
            }
            let answer = gone.answer(SYN | ACK);
            let as_client_sees = answer.clone().from(w.balancer).to(client);
            for speaker in [client.ip(), router(w.family)] {
                let comes = error(speaker, &as_client_sees, kind, length);
                let expected = further(error(gone.source.ip(), &answer, kind, length));
                becomes(bench, at, &comes, Verdict::Back, &expected);
            }
        }
        // No error about an error.
        let [kind, ..] = kinds(w.family);
        let mut last = error(router(w.family), &gone, kind, 8);
        last.hops = 1;
        let (verdict, _) = run(bench, at, &last, Outcome::TtlExceeded);
        assert_eq!(verdict, Verdict::Dropped);
    });
}

/// E6: a redirect about a packet of a flow names addresses that its receiver does not use: dropped and counted. One about
/// another packet passes.
#[test]
fn redirects() {
    on_bench(|bench| {
        let w = world(Family::V4);
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let sent = Frame::tcp(w.client, w.vip, SYN);
        let gone = bench.pod_sends(&sent).opened();
        let at = (TcEgress, bench.network.pod);
        let redirect = |about: &Frame| error(router(w.family), about, ([5, 1], [192, 0, 2, 7]), 8);
        let (verdict, _) = run(bench, at, &redirect(&gone), Outcome::IcmpRedirect);
        assert_eq!(verdict, Verdict::Dropped);
        let mut other = gone;
        other.source.set_port(9);
        let (verdict, _) = run(bench, at, &redirect(&other), Outcome::NotOurs);
        assert_eq!(verdict, Verdict::On);
    });
}

/// E6: what is about no packet of a flow passes untouched, as does what is not enough of one to tell, and what is behind the
/// packet in its frame.
#[test]
fn about_nothing_of_ours() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let sent = Frame::tcp(w.client, w.vip, SYN);
        let gone = bench.pod_sends(&sent).opened();
        let [kind, ..] = kinds(w.family);
        let router = router(w.family);
        let whole = error(router, &gone, kind, 8);
        let mut strangers = Vec::new();
        let mut other = gone.clone();
        other.destination.set_port(9);
        strangers.push(error(router, &other, kind, 8));
        // Not to the packet's sender: nobody sends that.
        let mut elsewhere = whole.clone();
        elsewhere.destination = w.outside.ip();
        strangers.push(elsewhere);
        // Without both ports, as a later fragment, and not about a packet with ports.
        strangers.push(error(router, &gone, kind, 3));
        let mut later = gone.clone();
        later.part = Some(Part {
            offset: 1,
            more: false,
            id: 1,
        });
        strangers.push(error(router, &later, kind, 8));
        let mut other = gone.clone();
        other.transport = Transport::Other(47);
        strangers.push(error(router, &other, kind, 8));
        // No error at all.
        strangers.push(error(router, &gone, ([129, 0], [0; 4]), 8));
        let at = (TcEgress, bench.network.pod);
        for stranger in strangers {
            let came = run(bench, at, &stranger, Outcome::NotOurs);
            assert_eq!(came, (Verdict::On, stranger.to_bytes()));
        }
        // Trailing bytes are not the quote's checksum.
        let trailer = [0x55; 16];
        let frame = [whole.to_bytes(), trailer.to_vec()].concat();
        let (verdict, came) = bench.rig.run(TcEgress, bench.network.pod, &frame);
        let expected = [error(router, &sent, kind, 8).to_bytes(), trailer.to_vec()].concat();
        assert_eq!((verdict, came), (Verdict::On, expected));
    });
}
