//! Which backends a client gets: SEMANTICS 1.2, one row per assertion, and session affinity.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use svc_lb::compile::desired::{DesiredPort, FrontendKind, Selection};
use svc_lb_common::config::{Config, REJECT_NO_LOCAL, SNAT_ALWAYS};
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::rig::Setup;
use svc_lb_tests::prog::tables::{Describe as _, at, port};
use svc_lb_tests::prog::{Frame, Verdict};

use crate::bench::*;
use crate::walks::at_port;

/// A service behind every kind of frontend, with a backend here and one elsewhere.
fn everywhere(w: &World) -> DesiredPort {
    w.port(Protocol::Tcp)
        .node_port(w.node.port())
        .frontend(FrontendKind::LoadBalancer, w.balancer)
        .frontend(FrontendKind::ExternalIp, w.external)
        .local_backends(&[w.local])
        .backends(&[w.remote])
}

/// The backends that connections from 64 ports get, or what else comes of them.
fn reached(
    bench: &mut Bench,
    interface: u32,
    client: SocketAddr,
    frontend: SocketAddr,
) -> Result<BTreeSet<SocketAddr>, Verdict> {
    (0..64)
        .map(|n| {
            let syn = Frame::tcp(at_port(client, 20_000 + n), frontend, SYN);
            let ran = bench.run(TcIngress, interface, &syn);
            match ran.verdict {
                Verdict::On => Ok(ran.parsed().destination),
                verdict @ (Verdict::Back | Verdict::Away | Verdict::Dropped) => Err(verdict),
            }
        })
        .collect()
}

/// internalTrafficPolicy governs ClusterIPs, externalTrafficPolicy the others; a pod is never outside and gets the Cluster
/// set whichever external address it uses (SEMANTICS 1.2, C4, C7).
#[test]
fn policies_choose_the_set() {
    for_families(|bench, w| {
        let (pod, uplink) = (bench.network.pod, bench.network.uplink);
        let both = BTreeSet::from([w.local, w.remote]);
        let local = BTreeSet::from([w.local]);
        for internal_local in [false, true] {
            for external_local in [false, true] {
                bench.program(DesiredPort {
                    internal_local,
                    external_local,
                    ..everywhere(w)
                });
                let internal = if internal_local { &local } else { &both };
                let external = if external_local { &local } else { &both };
                let check =
                    |bench: &mut Bench, interface, client, frontend, expected: &BTreeSet<_>| {
                        let reached = reached(bench, interface, client, frontend);
                        assert_eq!(reached.as_ref(), Ok(expected), "{frontend} from {client}");
                    };
                check(bench, pod, w.client, w.vip, internal);
                check(bench, uplink, w.outside, w.vip, internal);
                for frontend in [w.node, w.balancer, w.external] {
                    check(bench, pod, w.client, frontend, &both);
                    check(bench, uplink, w.outside, frontend, external);
                }
                forget_flows(bench);
            }
        }
    });
}

/// Ends every flow by a RST from its client.
fn forget_flows(bench: &mut Bench) {
    let flows = bench.rig.flows();
    for flow in flows.iter().filter(|flow| flow.direction == 0) {
        let rst = Frame::tcp(flow.source, flow.destination, RST);
        let _ran = bench.rig.run(TcIngress, bench.network.pod, &rst.to_bytes());
    }
}

fn with_bits(bits: u32) -> Setup {
    let setup = Setup::default();
    Setup {
        config: Config {
            bits: setup.config.bits | bits,
            ..setup.config
        },
        ..setup
    }
}

/// A Local policy without a local endpoint, while others exist: silence, or a reject where told (SEMANTICS C3, C6).
#[test]
fn no_local_endpoint() {
    let w = world(Family::V4);
    let local_only = || DesiredPort {
        internal_local: true,
        external_local: true,
        ..everywhere(&w)
    };
    let without_local = || DesiredPort {
        backends: vec![svc_lb_tests::prog::tables::ready(w.remote, false)],
        ..local_only()
    };
    for (bits, rejected) in [(0, false), (REJECT_NO_LOCAL, true)] {
        with_setup(&with_bits(bits), |bench| {
            bench.program(without_local());
            for frontend in [w.vip, w.node, w.balancer, w.external] {
                let syn = Frame::tcp(w.outside, frontend, SYN);
                let ran = bench.outside_sends(&syn);
                if rejected {
                    ran.returned(Outcome::Rejected, &syn.port_unreachable());
                } else {
                    ran.dropped(Outcome::NoLocalEndpoint);
                }
            }
            // A pod's short cut to the Cluster set; its ClusterIP has none.
            let syn = Frame::tcp(w.client, w.node, SYN);
            bench
                .pod_sends(&syn)
                .became(Outcome::Open, &syn.clone().to(w.remote));
        });
    }
}

/// NodePorts are on the node's addresses that serve them and on no others, for the port's protocol alone.
#[test]
fn node_ports_are_the_nodes() {
    for_families(|bench, w| {
        bench.program(everywhere(w));
        let other_address = SocketAddr::new(w.balancer.ip(), w.node.port());
        for (frame, ours) in [
            (Frame::tcp(w.outside, w.node, SYN), true),
            (Frame::udp(w.outside, w.node), false),
            (Frame::tcp(w.outside, at_port(w.node, 30_081), SYN), false),
        ] {
            let ran = bench.outside_sends(&frame);
            if ours {
                ran.translated(Outcome::Open, &[]);
            } else {
                ran.ignored();
            }
        }
        // An address of a frontend is none of the node's.
        bench
            .outside_sends(&Frame::tcp(w.outside, other_address, SYN))
            .passed(Outcome::NoFrontend);
    });
}

/// ClientIP affinity: one backend for a client from any port and through any frontend of the port, pinned when the flow
/// is confirmed; a pin older than the timeout, or whose backend drains or is gone, is none (SEMANTICS F1, F2, F3, F4, F5).
#[test]
fn affinity_holds_a_client() {
    for_families(|bench, w| {
        let backends: Vec<_> = (1..=9).map(|n| at_port(w.remote, 8_000 + n)).collect();
        let affine = |backends: &[SocketAddr]| DesiredPort {
            affinity_seconds: Some(10),
            ..w.port(Protocol::Tcp)
                .frontend(FrontendKind::ExternalIp, w.external)
                .backends(backends)
        };
        bench.program(affine(&backends));
        let connect = |bench: &mut Bench, port: u16, frontend| {
            let syn = Frame::tcp(at_port(w.client, port), frontend, SYN);
            let out = bench.open(&syn);
            bench
                .pod_sends(&syn.with_flags(ACK))
                .translated(Outcome::ForwardOpening, &[Event::Promoted]);
            out.destination
        };
        let first = connect(bench, 1_001, w.vip);
        for port in 1_002..1_032 {
            assert_eq!(connect(bench, port, w.vip), first, "from port {port}");
        }
        assert_eq!(connect(bench, 1_040, w.external), first, "other frontend");

        // The pin holds whatever else the table comes to hold.
        for count in 1..=8 {
            let others = backends.iter().copied().filter(|backend| *backend != first);
            let fewer: Vec<_> = std::iter::once(first).chain(others.take(count)).collect();
            bench.program(affine(&fewer));
            let port = 1_100 + u16::try_from(count).unwrap();
            assert_eq!(connect(bench, port, w.vip), first, "{count} others");
        }

        // Draining: it still serves, but another one is picked and pinned.
        let mut draining = affine(&backends);
        for backend in &mut draining.backends {
            backend.in_cluster = backend.address != first;
        }
        bench.program(draining);
        let second = connect(bench, 1_200, w.vip);
        assert_ne!(second, first);
        bench.program(affine(&backends));
        assert_eq!(connect(bench, 1_201, w.vip), second, "the new pin");

        // Gone: the same.
        let without: Vec<_> = backends
            .iter()
            .copied()
            .filter(|backend| *backend != second)
            .collect();
        bench.program(affine(&without));
        let third = connect(bench, 1_210, w.vip);
        assert_ne!(third, second);
        bench.program(affine(&backends));
        assert_eq!(connect(bench, 1_211, w.vip), third, "the newer pin");

        // Too old: the table alone decides again, as it did for the first connection.
        let idle = 10 * u64::from(bench.rig.config.hz);
        bench.rig.change_pins(|pin| pin.seen -= idle + 1);
        assert_eq!(connect(bench, 1_300, w.vip), first, "the pin is too old");
    });
}

/// Which of nine backends a client's ports get, on a node with this seed of its own that has programmed `before` other
/// services first.
fn picks(node: u64, before: usize, affinity_seconds: Option<u32>) -> Vec<SocketAddr> {
    let setup = Setup::default();
    let setup = Setup {
        config: Config {
            seed: node,
            maglev_seed: 0xc105,
            ..setup.config
        },
        ..setup
    };
    let mut picks = Vec::new();
    with_setup(&setup, |bench| {
        for family in FAMILIES {
            let w = world(family);
            for n in 0..before {
                let name = format!("other-{n}-{family}");
                bench.rig.set(
                    &name,
                    vec![port(&name, Protocol::Tcp, family).backends(&[w.local])],
                );
            }
            let backends: Vec<_> = (1..=9).map(|n| at_port(w.remote, 8_000 + n)).collect();
            bench.rig.set(
                &format!("web-{family}"),
                vec![DesiredPort {
                    affinity_seconds,
                    selection: Selection::Maglev {
                        seed: 7,
                        slots: 211,
                    },
                    ..w.port(Protocol::Tcp)
                        .frontend(FrontendKind::ExternalIp, w.external)
                        .backends(&backends)
                }],
            );
            for n in 0..64 {
                let host = SocketAddr::new(w.client.ip(), 20_000 + n);
                for frontend in [w.vip, w.external] {
                    let syn = Frame::tcp(host, frontend, SYN);
                    picks.push(bench.pod_sends(&syn).parsed().destination);
                }
            }
        }
    });
    picks
}

/// With Maglev every node picks the same backend for a tuple, whatever its own seed, its ids and its services' indexes are;
/// with ClientIP affinity the client alone decides (SEMANTICS F5, F9).
#[test]
fn maglev_is_the_same_on_every_node() {
    let here = picks(1, 0, None);
    assert_eq!(here, picks(2, 3, None));
    let different: BTreeSet<_> = here.iter().collect();
    // Nobody runs anything without root.
    assert!(here.is_empty() || different.len() >= 14, "{different:?}");

    let sticky = picks(1, 0, Some(10));
    assert_eq!(sticky, picks(2, 3, Some(10)));
    for of_family in sticky.chunks(128) {
        let one: BTreeSet<_> = of_family.iter().collect();
        assert_eq!(one.len(), 1, "one client, one backend: {one:?}");
    }
}

/// A client with an address of the pods' range is a pod wherever it comes in: the Cluster set at every frontend, its own address
/// towards a backend of this node. One of another node, itself too, sees this node's: its answers would not come by here
/// (SEMANTICS C8).
#[test]
fn pods_are_known_by_their_range() {
    let plain = with_bits(SNAT_ALWAYS);
    let mut config = plain.config;
    // Any place of the list will do.
    config.pod_nets4[3] = Ipv4Addr::new(172, 16, 1, 0).into();
    config.pod_masks4[3] = Ipv4Addr::new(255, 255, 255, 0).into();
    config.pod_nets6[0] = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0).into();
    config.pod_masks6[0] = Ipv6Addr::from_bits(!0 << 64).into();
    with_setup(&Setup { config, ..plain }, |bench| {
        for (family, client, other) in [
            (Family::V4, "172.16.1.12:7", "172.16.1.10:8080"),
            (Family::V6, "[2001:db8:1::c]:7", "[2001:db8:1::a]:8080"),
        ] {
            let (w, client, other) = (world(family), at(client), at(other));
            let itself = at_port(client, 8080);
            bench.program(DesiredPort {
                external_local: true,
                ..w.port(Protocol::Tcp)
                    .node_port(w.node.port())
                    .frontend(FrontendKind::LoadBalancer, w.balancer)
                    .local_backends(&[w.local])
                    .backends(&[other, itself])
            });
            let uplink = bench.network.uplink;
            for frontend in [w.vip, w.node, w.balancer] {
                let mut seen = BTreeSet::new();
                for n in 0..64 {
                    let syn = Frame::tcp(at_port(client, 20_000 + n), frontend, SYN);
                    let ran = bench.run(TcIngress, uplink, &syn);
                    let out = ran.parsed();
                    let masked = out.source.ip() != client.ip();
                    assert_eq!(ran.verdict == Verdict::Back, masked, "{out:?}");
                    seen.insert((out.destination, masked));
                }
                let expected = [(w.local, false), (other, true), (itself, true)];
                assert_eq!(seen, BTreeSet::from(expected), "{frontend}");
                // Who is outside hears of the Local set alone.
                let reached = reached(bench, uplink, w.outside, w.balancer);
                assert_eq!(reached, Ok(BTreeSet::from([w.local])));
                bench.rig.clear_flows();
            }
        }
    });
}
