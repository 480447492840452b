//! Flows from their first packet to their last.

use svc_lb::dataplane::FlowTable;
use svc_lb_common::Protocol;
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::frame::Transport;
use svc_lb_tests::prog::tables::{Describe as _, at};

use crate::bench::*;

/// An SCTP association (SEMANTICS A5) through ports that differ, its checksum right on both sides; it is confirmed by the tag that
/// the backend asked for, and over after both have shut it down.
#[test]
fn an_sctp_association_lives_and_ends() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Sctp).backends(&[w.remote]));
        let init = Frame::new(w.client, w.vip, Transport::Sctp { flags: SYN });
        bench
            .pod_sends(&init)
            .became(Outcome::Open, &init.clone().to(w.remote));
        let answer = init.clone().to(w.remote).answer(SYN | ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
        assert_eq!(tables(bench), [FlowTable::Opening; 2]);

        // Who does not know the tag has not seen the answer.
        let [initiate, verify] = init.numbers;
        let mut forged = init.with_flags(ACK);
        forged.numbers = [initiate, verify ^ 1];
        bench
            .pod_sends(&forged)
            .became(Outcome::ForwardOpening, &forged.clone().to(w.remote));
        let data = init.with_flags(ACK);
        let out = bench
            .pod_sends(&data)
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        assert_eq!(out, data.clone().to(w.remote));
        assert_eq!(tables(bench), [FlowTable::Established; 2]);

        let shutdown = init.with_flags(FIN);
        bench
            .pod_sends(&shutdown)
            .became(Outcome::Forward, &shutdown.clone().to(w.remote));
        let and_ours = answer.with_flags(FIN);
        bench
            .pod_gets(&and_ours)
            .became(Outcome::Reverse, &and_ours.clone().from(w.vip));
        bench
            .pod_sends(&init)
            .became(Outcome::Open, &init.clone().to(w.remote));
    });
}

/// ClusterIP from a pod (SEMANTICS A1): backend seen by the client's own address, answers from the ClusterIP; a flow moves to
/// `established` when the client sends again after the backend's answer; a SYN after both FINs is a new flow.
#[test]
fn a_tcp_connection_lives_and_ends() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        bench
            .pod_sends(&syn)
            .became(Outcome::Open, &syn.clone().to(w.remote));
        // A retransmission takes the same way.
        bench
            .pod_sends(&syn)
            .became(Outcome::ForwardOpening, &syn.clone().to(w.remote));
        assert_eq!(tables(bench), [FlowTable::Opening; 2]);

        let answer = syn.clone().to(w.remote).answer(SYN | ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));

        let ack = syn.with_flags(ACK);
        let out = bench
            .pod_sends(&ack)
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        assert_eq!(out, ack.clone().to(w.remote));
        assert_eq!(tables(bench), [FlowTable::Established; 2]);
        bench
            .pod_sends(&ack)
            .became(Outcome::Forward, &ack.clone().to(w.remote));

        let fin = syn.with_flags(FIN | ACK);
        bench
            .pod_sends(&fin)
            .became(Outcome::Forward, &fin.clone().to(w.remote));
        // Half closed: a SYN follows, and nothing of the connection it begins has ended yet.
        bench
            .pod_sends(&syn)
            .became(Outcome::Forward, &syn.clone().to(w.remote));
        let backends_fin = answer.with_flags(FIN | ACK);
        bench
            .pod_gets(&backends_fin)
            .became(Outcome::Reverse, &backends_fin.clone().from(w.vip));
        bench
            .pod_sends(&syn)
            .became(Outcome::Forward, &syn.clone().to(w.remote));
        bench.pod_gets(&backends_fin).parsed();
        bench.pod_sends(&fin).parsed();
        // The last acknowledgement still follows.
        bench
            .pod_sends(&ack)
            .became(Outcome::Forward, &ack.clone().to(w.remote));
        bench
            .pod_sends(&syn)
            .became(Outcome::Open, &syn.clone().to(w.remote));
        assert_eq!(tables(bench), [FlowTable::Opening; 2]);
    });
}

fn tables(bench: &Bench) -> Vec<FlowTable> {
    bench.rig.flows().iter().map(|flow| flow.table).collect()
}

/// A RST ends a connection from either side.
#[test]
fn a_reset_connection_is_over() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        for from_client in [true, false] {
            let out = bench.pod_sends(&syn).opened();
            if from_client {
                bench
                    .pod_sends(&syn.with_flags(RST))
                    .translated(Outcome::ForwardOpening, &[]);
            } else {
                bench
                    .pod_gets(&out.answer(RST | ACK))
                    .translated(Outcome::Reverse, &[]);
            }
        }
        bench.pod_sends(&syn).opened();
    });
}

/// UDP: the same flow and the same walk (SEMANTICS F7); a zero IPv4 checksum means none and stays zero (SEMANTICS E10).
#[test]
fn datagrams_of_one_socket_stay_together() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Udp).backends(&[w.local, w.remote]));
        let mut datagram = Frame::udp(w.client, w.vip);
        let out = bench.pod_sends(&datagram).opened();
        assert!([w.local, w.remote].contains(&out.destination));
        for length in [0, 1, 2, 7, 1_400] {
            for checksum in [true, false] {
                datagram.transport = Transport::Udp { checksum };
                datagram.payload = vec![0xa5; length];
                let ran = bench.pod_sends(&datagram);
                ran.became(
                    Outcome::ForwardOpening,
                    &datagram.clone().to(out.destination),
                );
            }
        }
        let answer = out.answer(0);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
        // A pair of datagrams and an answer make no stream yet: anybody's datagrams can bring them about.
        bench.pod_sends(&datagram).became(
            Outcome::ForwardOpening,
            &datagram.clone().to(out.destination),
        );
        assert_eq!(tables(bench), [FlowTable::Opening; 2]);
        bench.rig.age_datagrams();
        bench
            .pod_sends(&datagram)
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        assert_eq!(tables(bench), [FlowTable::Streams; 2]);
        bench
            .pod_sends(&datagram)
            .became(Outcome::Forward, &datagram.clone().to(out.destination));
    });
}

/// A UDP checksum that comes out as 0 is sent as 0xffff: over IPv4 0 would mean "none", over IPv6 receivers drop it
/// (RFC 768, RFC 8200 8.1).
#[test]
fn a_udp_checksum_never_becomes_zero() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        let mut datagram = Frame::udp(w.client, w.vip);
        let translated = |datagram: &Frame| datagram.clone().to(w.remote).to_bytes();
        let found = (0..=u16::MAX).find(|word| {
            datagram.payload = word.to_be_bytes().to_vec();
            let bytes = translated(&datagram);
            bytes[datagram.l4() + 6..datagram.l4() + 8] == [0xff, 0xff]
        });
        assert!(found.is_some(), "some payload sums up to it");
        for hook in [TcIngress, XdpIngress] {
            let (_, bytes) = bench.rig.run(hook, bench.network.pod, &datagram.to_bytes());
            assert_eq!(bytes, translated(&datagram), "{hook:?}");
        }
    });
}

/// XDP makes of a packet exactly what tc makes of it.
#[test]
fn xdp_and_tc_agree() {
    for_families(|bench, w| {
        let port = w.port(Protocol::Tcp).local_backends(&[w.local]);
        bench.program(port);
        let syn = Frame::tcp(w.outside, w.vip, SYN);
        let uplink = bench.network.xdp_uplink;
        let ran = bench.run(XdpIngress, uplink, &syn);
        ran.became(Outcome::Open, &syn.clone().to(w.local));
        // What XDP translated comes by tc as a packet to the backend itself, and is no direct connection.
        let seen = ran.parsed();
        bench
            .run(TcIngress, uplink, &seen)
            .passed(Outcome::NoFrontend);
        bench
            .run(TcIngress, uplink, &seen.with_flags(ACK))
            .ignored();
        let answer = seen.answer(SYN | ACK);
        bench
            .run(TcEgress, uplink, &answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
    });
}

/// Packets of others are left alone after the guard: in either direction, whatever they carry.
#[test]
fn what_is_not_ours_is_not_touched() {
    for_families(|bench, w| {
        bench.program(
            w.port(Protocol::Tcp)
                .node_port(w.node.port())
                .backends(&[w.remote]),
        );
        let stranger = match w.family {
            svc_lb_common::Family::V4 => at("192.0.2.200:80"),
            svc_lb_common::Family::V6 => at("[2001:db8:77::200]:80"),
        };
        for frame in [
            Frame::tcp(w.client, stranger, SYN),
            Frame::udp(w.client, stranger),
            // The node's own, on a port that is no NodePort.
            Frame::tcp(w.outside, at_port(w.node, 22), SYN),
            // An ordinary packet to a pod that is a backend.
            Frame::tcp(w.client, w.remote, ACK),
            Frame::udp(w.client, w.remote),
            // A SYN to it whose tuple nobody has.
            Frame::tcp(w.client, w.remote, SYN),
        ] {
            bench.pod_sends(&frame).ignored();
            bench.outside_sends(&frame).ignored();
            bench.pod_gets(&frame).ignored();
            bench.outside_gets(&frame).ignored();
            bench.pod_gets(&frame.answer(ACK)).ignored();
        }
    });
}

/// The same address with another port.
pub(crate) fn at_port(address: std::net::SocketAddr, port: u16) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.ip(), port)
}

/// A pod that reaches itself is turned around at its edge, both ways, as by a router; what it sees as its peer is the
/// frontend (SEMANTICS C10).
#[test]
fn a_pod_reaches_itself() {
    for_families(|bench, w| {
        let port = w.port(Protocol::Tcp).node_port(w.node.port());
        bench.program(port.local_backends(&[at_port(w.client, 8080)]));
        let server = at_port(w.client, 8080);
        let syn = Frame::tcp(w.client, w.vip, SYN);
        let expected = syn
            .clone()
            .from(at_port(w.vip, w.client.port()))
            .to(server)
            .turned();
        bench
            .pod_sends(&syn)
            .returned(Outcome::Hairpin, &expected.to_bytes());
        let answer = expected.answer(SYN | ACK);
        let turned = answer.clone().from(w.vip).to(w.client).turned();
        bench
            .pod_sends(&answer)
            .returned(Outcome::HairpinReverse, &turned.to_bytes());
        let ack = syn.with_flags(ACK);
        let ran = bench.pod_sends(&ack);
        ran.counted(Outcome::Hairpin, &[Event::Promoted]);
        assert_eq!(
            ran.bytes,
            Frame {
                transport: ack.transport,
                ..expected.clone()
            }
            .to_bytes()
        );

        // The last hop ends here.
        let tired = Frame {
            hops: 1,
            ..syn.with_flags(ACK | PSH)
        };
        bench.pod_sends(&tired).dropped(Outcome::TtlExceeded);

        // By a NodePort its source port is translated, so that the answer passes the guard of the node's ports.
        let syn = Frame::tcp(w.client, w.node, SYN);
        let ran = bench.pod_sends(&syn);
        ran.counted(Outcome::Hairpin, &[Event::PortTranslated]);
        let out = ran.parsed();
        assert_eq!(out.source.ip(), w.node.ip());
        assert!(out.source.port() >= bench.rig.config.snat_first);
        assert_eq!(out.destination, server);
        let answer = out.answer(SYN | ACK);
        let turned = answer.clone().from(w.node).to(w.client).turned();
        bench
            .pod_sends(&answer)
            .returned(Outcome::HairpinReverse, &turned.to_bytes());
    });
}

/// A bridged pod's packet to a backend behind the same bridge gets the backend's MAC address and stays at layer 2; to
/// one elsewhere, or whose neighbour is unknown, it goes up the stack.
#[test]
fn traffic_within_a_bridge_stays_there() {
    use svc_lb_tests::prog::network::{NEIGHBOURS, UNKNOWN_NEIGHBOURS};
    for_families(|bench, w| {
        let family = |address: &std::net::IpAddr| svc_lb_common::Family::of(*address) == w.family;
        let neighbours: Vec<_> = NEIGHBOURS
            .into_iter()
            .filter(|(address, _)| family(address))
            .collect();
        let unknown = UNKNOWN_NEIGHBOURS.into_iter().find(family).unwrap();
        let (client, _) = neighbours[0];
        let (backend, mac) = neighbours[1];
        let client = std::net::SocketAddr::new(client, 40_000);
        for (backend, mac) in [(backend, Some(mac)), (unknown, None), (w.remote.ip(), None)] {
            let backend = std::net::SocketAddr::new(backend, 8_080);
            bench.program(w.port(Protocol::Tcp).backends(&[backend]));
            let syn = Frame::tcp(client, w.vip, SYN);
            let mut expected = syn.clone().to(backend);
            if let Some(mac) = mac {
                expected.macs[0] = mac;
            }
            let interface = bench.network.bridged_pod;
            bench
                .run(TcIngress, interface, &syn)
                .became(Outcome::Open, &expected);
            bench
                .run(TcIngress, interface, &syn)
                .became(Outcome::ForwardOpening, &expected);
            let answer = expected.answer(RST | ACK);
            bench
                .run(TcEgress, interface, &answer)
                .became(Outcome::Reverse, &answer.clone().from(w.vip));
        }
    });
}
