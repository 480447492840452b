//! What is refused, and how.

use std::collections::BTreeSet;

use svc_lb::compile::desired::{DesiredPort, FrontendKind};
use svc_lb_common::config::{Config, DROP_UNALLOCATED, REJECT_UNDEFINED_PORT, RESET_VANISHED};
use svc_lb_common::outcome::Outcome;
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::frame::next;
use svc_lb_tests::prog::rig::{BURST, Setup};
use svc_lb_tests::prog::tables::{Describe as _, at, ready};

use crate::bench::*;
use crate::walks::at_port;

/// No endpoint at all: ICMP port unreachable from the address that was asked, quoting the packet; for TCP and UDP,
/// every kind of frontend, every hook, and with options and extension headers (SEMANTICS 1.2, E1).
#[test]
fn nobody_there() {
    for_families(|bench, w| {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench.program(
                w.port(protocol)
                    .node_port(w.node.port())
                    .frontend(FrontendKind::LoadBalancer, w.balancer),
            );
            for frontend in [w.vip, w.node, w.balancer] {
                for (length, extended) in [(0, false), (1, true), (900, true)] {
                    let mut frame = match protocol {
                        Protocol::Tcp => Frame::tcp(w.client, frontend, SYN),
                        Protocol::Udp | Protocol::Sctp => Frame::udp(w.client, frontend),
                    };
                    frame.payload = vec![0x77; length];
                    match w.family {
                        Family::V4 => frame.options = vec![1; length.min(40) / 4 * 4],
                        Family::V6 if extended => {
                            frame.extensions = vec![
                                (next::HOP_BY_HOP, vec![1; 6]),
                                (next::DESTINATION, vec![1; 14]),
                            ];
                        }
                        Family::V6 => {}
                    }
                    let expected = frame.port_unreachable();
                    for (hook, interface) in [
                        (TcIngress, bench.network.pod),
                        (TcIngress, bench.network.uplink),
                        (XdpIngress, bench.network.xdp_uplink),
                    ] {
                        let _filled = bench.rig.set_tokens(BURST);
                        bench
                            .run(hook, interface, &frame)
                            .returned(Outcome::Rejected, &expected);
                    }
                }
            }
        }
        assert_eq!(bench.rig.flows(), [], "nothing was opened");
    });
}

/// Generated packets are limited; over the limit is a counted drop.
#[test]
fn rejects_are_limited() {
    on_bench(|bench| {
        let w = world(Family::V4);
        bench.program(w.port(Protocol::Tcp));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        for _ in 0..BURST {
            bench
                .pod_sends(&syn)
                .returned(Outcome::Rejected, &syn.port_unreachable());
        }
        bench.pod_sends(&syn).dropped(Outcome::RejectLimited);
        assert!(bench.rig.set_tokens(1));
        bench
            .pod_sends(&syn)
            .returned(Outcome::Rejected, &syn.port_unreachable());
        bench.pod_sends(&syn).dropped(Outcome::RejectLimited);
    });
}

/// Never in answer to what was sent to many, or from no single host (RFC 1122 3.2.2).
#[test]
fn some_are_refused_in_silence() {
    on_bench(|bench| {
        for family in FAMILIES {
            let w = world(family);
            bench.program(w.port(Protocol::Udp));
            let mut frame = Frame::udp(w.client, w.vip);
            frame.macs[0] = [0xff; 6];
            bench.pod_sends(&frame).dropped(Outcome::RejectSilent);
            frame.macs[0] = [0x33, 0x33, 0, 0, 0, 1];
            bench.pod_sends(&frame).dropped(Outcome::RejectSilent);
        }
        let sources = [
            "0.0.0.0:9",
            "127.0.0.1:9",
            "224.0.0.1:9",
            "240.0.0.1:9",
            "255.255.255.255:9",
            "[::]:9",
            "[::1]:9",
            "[ff02::1]:9",
        ];
        for source in sources.map(at) {
            let w = world(Family::of(source.ip()));
            bench.program(w.port(Protocol::Udp));
            // Of a frontend that is there they would be martians.
            let frame = Frame::udp(source, at_port(w.vip, 81));
            bench.pod_sends(&frame).dropped(Outcome::RejectSilent);
        }
        // Nothing of it used up the limit.
        let w = world(Family::V6);
        let frame = Frame::udp(w.client, w.vip);
        for _ in 0..BURST {
            bench
                .pod_sends(&frame)
                .returned(Outcome::Rejected, &frame.port_unreachable());
        }
        bench.pod_sends(&frame).dropped(Outcome::RejectLimited);
    });
}

/// An undefined port of a live ClusterIP is rejected; an unallocated address of the service CIDR is dropped; of a load
/// balancer's address the other ports are somebody else's (SEMANTICS E3, E4). Each can be switched off.
#[test]
fn nothing_there_that_could_answer() {
    let bits = [0, REJECT_UNDEFINED_PORT, DROP_UNALLOCATED];
    for bits in bits {
        let setup = Setup::default();
        let setup = Setup {
            config: Config {
                bits,
                ..setup.config
            },
            ..setup
        };
        with_setup(&setup, |bench| {
            for family in FAMILIES {
                let w = world(family);
                bench.program(
                    w.port(Protocol::Tcp)
                        .frontend(FrontendKind::LoadBalancer, w.balancer)
                        .backends(&[w.remote]),
                );
                for frame in [
                    Frame::tcp(w.client, at_port(w.vip, 81), SYN),
                    Frame::udp(w.client, w.vip),
                    Frame::tcp(w.client, at_port(w.vip, 81), ACK),
                ] {
                    let ran = bench.pod_sends(&frame);
                    if bits == REJECT_UNDEFINED_PORT {
                        ran.returned(Outcome::Rejected, &frame.port_unreachable());
                    } else {
                        ran.passed(Outcome::NoFrontend);
                    }
                }
                let ran = bench.pod_sends(&Frame::tcp(w.client, w.other_vip, SYN));
                if bits == DROP_UNALLOCATED {
                    ran.dropped(Outcome::Unallocated);
                } else {
                    ran.passed(Outcome::NoFrontend);
                }
                bench
                    .outside_sends(&Frame::tcp(w.outside, at_port(w.balancer, 81), SYN))
                    .passed(Outcome::NoFrontend);
            }
        });
    }
}

/// Nothing leaves the node still addressed to a ClusterIP; towards pods it may, and other frontends are real addresses.
#[test]
fn nothing_leaks() {
    for_families(|bench, w| {
        bench.program(
            w.port(Protocol::Tcp)
                .frontend(FrontendKind::LoadBalancer, w.balancer)
                .backends(&[w.remote]),
        );
        for frame in [
            Frame::tcp(w.client, w.vip, SYN),
            Frame::tcp(w.client, at_port(w.vip, 9), ACK),
            Frame::udp(w.client, w.vip),
        ] {
            bench.outside_gets(&frame).dropped(Outcome::Untranslated);
            bench.pod_gets(&frame).ignored();
        }
        bench
            .outside_gets(&Frame::tcp(w.client, w.balancer, SYN))
            .ignored();
        bench
            .outside_gets(&Frame::tcp(w.client, w.other_vip, SYN))
            .ignored();
    });
}

/// Verdicts are for new flows: what a client had goes on when the service's set has become empty (SEMANTICS 1.2, E2).
#[test]
fn an_old_connection_is_not_rejected() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        let out = bench.open(&syn);
        let mut gone = w.port(Protocol::Tcp);
        bench.program(gone.clone());
        let data = syn.with_flags(ACK | PSH);
        let promoted = [svc_lb_common::outcome::Event::Promoted];
        let after = bench
            .pod_sends(&data)
            .translated(Outcome::ForwardOpening, &promoted);
        assert_eq!(after.destination, out.destination);
        // A new connection is.
        let new = Frame::tcp(at_port(w.client, 40_001), w.vip, SYN);
        bench
            .pod_sends(&new)
            .returned(Outcome::Rejected, &new.port_unreachable());
        // So is one from the same port.
        bench
            .pod_sends(&syn)
            .returned(Outcome::Rejected, &syn.port_unreachable());
        gone.backends.push(ready(w.local, true));
        bench.program(gone);
        bench
            .pod_sends(&syn)
            .became(Outcome::Open, &syn.clone().to(w.local));
    });
}

/// With `--reset-gone-backends local` a segment of a connection to a pod of this node that has vanished is answered with the
/// reset that the pod's kernel would have sent; one to a pod that lives, or is still an endpoint, goes on, as do all without
/// the setting (SEMANTICS G4).
#[test]
fn connections_to_vanished_pods_are_reset() {
    let setup = Setup::default();
    let bits = [setup.config.bits, setup.config.bits | RESET_VANISHED];
    for bits in bits {
        let config = Config {
            bits,
            ..setup.config
        };
        let setup = Setup {
            config,
            ..setup.clone()
        };
        with_setup(&setup, |bench| {
            for family in FAMILIES {
                segments_of_a_vanished_pod(bench, &world(family), bits & RESET_VANISHED != 0);
            }
        });
    }
}

fn segments_of_a_vanished_pod(bench: &mut Bench, w: &World, on: bool) {
    let entrances = [
        (TcIngress, bench.network.pod, w.vip, w.client),
        (XdpIngress, bench.network.xdp_uplink, w.balancer, w.outside),
        (TcIngress, bench.network.uplink, w.node, w.outside),
    ];
    let service = || {
        w.port(Protocol::Tcp)
            .node_port(w.node.port())
            .frontend(FrontendKind::LoadBalancer, w.balancer)
    };
    let pods = BTreeSet::from([w.local.ip()]);
    for (hook, interface, frontend, client) in entrances {
        bench.rig.clear_flows();
        bench.rig.set_vanished(&BTreeSet::new());
        bench.program(service().local_backends(&[w.local]));
        let syn = Frame::tcp(client, frontend, SYN);
        bench.run(hook, interface, &syn).opened();
        let mut segment = syn.with_flags(ACK | PSH);
        let goes_on = |bench: &mut Bench, segment: &Frame| {
            let sent = segment.clone().to(w.local);
            bench
                .run(hook, interface, segment)
                .became(Outcome::ForwardOpening, &sent);
        };
        // Its interface is gone, but it is an endpoint still, and one of those that drain.
        bench.rig.set_vanished(&pods);
        goes_on(bench, &segment);
        let mut drains = ready(w.local, true);
        (drains.in_cluster, drains.in_local, drains.serving) = (false, false, false);
        bench.program(DesiredPort {
            backends: vec![drains],
            ..service()
        });
        goes_on(bench, &segment);
        // It is no endpoint any more, but lives.
        bench.program(service());
        bench.rig.set_vanished(&BTreeSet::new());
        goes_on(bench, &segment);

        bench.rig.set_vanished(&pods);
        if !on {
            goes_on(bench, &segment);
            continue;
        }
        for (flags, length) in [
            (ACK, 0),
            (ACK | PSH, 1),
            (FIN | ACK, 900),
            (FIN, 7),
            (PSH, 8),
            (SYN | ACK, 0),
        ] {
            segment = segment.with_flags(flags);
            segment.payload = vec![0x77; length];
            for options in [0, 8] {
                match w.family {
                    Family::V4 => segment.options = vec![1; options],
                    Family::V6 if options == 0 => segment.extensions.clear(),
                    Family::V6 => segment.extensions = vec![(next::DESTINATION, vec![1; 14])],
                }
                let mut expected = segment.reset();
                if hook == XdpIngress {
                    expected.resize(expected.len().max(60), 0);
                }
                bench
                    .run(hook, interface, &segment)
                    .returned(Outcome::Reset, &expected);
            }
        }
        // A reset is not answered, nor is what was sent to many.
        goes_on(bench, &syn.with_flags(RST));
        let mut to_all = syn.with_flags(ACK);
        to_all.macs[0] = [0xff; 6];
        bench
            .run(hook, interface, &to_all)
            .dropped(Outcome::RejectSilent);
        assert!(bench.rig.set_tokens(0));
        bench
            .run(hook, interface, &syn.with_flags(ACK))
            .dropped(Outcome::RejectLimited);
        assert!(bench.rig.set_tokens(BURST));

        // Who comes anew gets what is there now.
        bench
            .run(hook, interface, &syn)
            .returned(Outcome::Rejected, &syn.port_unreachable());
        bench.program(service().local_backends(&[w.local]));
        bench.run(hook, interface, &syn).opened();
        // A pod with the same address is another endpoint: its connections are not the old one's.
        goes_on(bench, &syn.with_flags(ACK));
    }
}
