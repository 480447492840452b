//! Who may open a flow.

use std::net::SocketAddr;

use svc_lb::compile::desired::{DesiredPort, FrontendKind};
use svc_lb_common::config::{Config, EXTERNAL_IPS_OUTSIDE};
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::rig::Setup;
use svc_lb_tests::prog::tables::{Describe as _, at, port};
use svc_lb_tests::prog::{Frame, Verdict};

use crate::bench::*;
use crate::walks::at_port;

/// A service behind every kind of frontend.
fn everywhere(w: &World, protocol: Protocol) -> DesiredPort {
    w.port(protocol)
        .node_port(w.node.port())
        .frontend(FrontendKind::LoadBalancer, w.balancer)
        .frontend(FrontendKind::ExternalIp, w.external)
        .local_backends(&[w.local])
}

fn pick<'a>(w: &World, v4: &'a [&'a str], v6: &'a [&'a str]) -> &'a [&'a str] {
    match w.family {
        Family::V4 => v4,
        Family::V6 => v6,
    }
}

/// B7: a load balancer's address admits the clients in its source ranges and no others, pods included, in silence; the
/// longest prefix is not the only one that counts, and other services' ranges do not.
#[test]
fn b7_source_ranges_admit_clients() {
    for_families(|bench, w| {
        let other = port("other", Protocol::Tcp, w.family)
            .frontend(FrontendKind::LoadBalancer, at_port(w.balancer, 81))
            .backends(&[w.remote])
            .admits(pick(w, &["0.0.0.0/0"], &["::/0"]));
        bench.rig.set("other", vec![other]);
        for (ranges, outside, pod) in [
            (
                pick(w, &["203.0.113.0/24"], &["2001:db8:9::/48"]),
                true,
                false,
            ),
            (
                pick(w, &["203.0.113.9/32"], &["2001:db8:9::9/128"]),
                true,
                false,
            ),
            (
                pick(w, &["203.0.113.8/32"], &["2001:db8:9::8/128"]),
                false,
                false,
            ),
            (
                pick(w, &["203.0.113.0/29"], &["2001:db8:9::/125"]),
                false,
                false,
            ),
            (
                pick(w, &["10.244.0.0/16"], &["fd00:10:244::/48"]),
                false,
                true,
            ),
            (
                pick(
                    w,
                    &["203.0.0.0/8", "203.0.113.8/32", "10.244.1.5/32"],
                    &["2001:db8::/32", "2001:db8:9::8/128", "fd00:10:244:1::5/128"],
                ),
                true,
                true,
            ),
            (pick(w, &["0.0.0.0/0"], &["::/0"]), true, true),
            (&[], false, false),
        ] {
            bench.program(everywhere(w, Protocol::Tcp).admits(ranges));
            let uplinks = [
                (TcIngress, bench.network.uplink, w.outside, outside),
                (XdpIngress, bench.network.xdp_uplink, w.outside, outside),
                (TcIngress, bench.network.pod, w.client, pod),
            ];
            for (hook, interface, client, admitted) in uplinks {
                let ran = bench.run(hook, interface, &Frame::tcp(client, w.balancer, SYN));
                if admitted {
                    assert_eq!(ran.opened().destination, w.local, "{ranges:?}");
                } else {
                    ran.dropped(Outcome::SourceRange);
                }
                bench.rig.clear_flows();
            }
        }
    });
}

/// B7: no other frontend of the service is restricted.
#[test]
fn b7_source_ranges_are_the_load_balancers_alone() {
    for_families(|bench, w| {
        bench.program(everywhere(w, Protocol::Udp).admits(&[]));
        for frontend in [w.vip, w.node, w.external] {
            let _open = bench
                .outside_sends(&Frame::udp(w.outside, frontend))
                .opened();
            let _open = bench.pod_sends(&Frame::udp(w.client, frontend)).opened();
            bench.rig.clear_flows();
        }
        bench
            .outside_sends(&Frame::udp(w.outside, w.balancer))
            .dropped(Outcome::SourceRange);
    });
}

/// B7: an open flow stays when its client is admitted no more; the next one is not opened. A client that is not
/// admitted gets silence, whether the service has a backend or none.
#[test]
fn b7_open_flows_outlive_their_range() {
    for_families(|bench, w| {
        let range = pick(w, &["10.244.1.5/32"], &["fd00:10:244:1::5/128"]);
        let elsewhere = pick(w, &["10.244.9.0/24"], &["fd00:10:244:9::/64"]);
        bench.program(everywhere(w, Protocol::Tcp).admits(range));
        let syn = Frame::tcp(w.client, w.balancer, SYN);
        let _open = bench.open(&syn);
        bench.program(everywhere(w, Protocol::Tcp).admits(elsewhere));
        bench
            .pod_sends(&syn.with_flags(ACK))
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        let next = Frame::tcp(at_port(w.client, 40_001), w.balancer, SYN);
        bench.pod_sends(&next).dropped(Outcome::SourceRange);

        let mut empty = everywhere(w, Protocol::Tcp).admits(elsewhere);
        empty.backends.clear();
        empty.has_any = false;
        bench.program(empty);
        bench.pod_sends(&next).dropped(Outcome::SourceRange);
        bench.program(everywhere(w, Protocol::Tcp));
        let _open = bench.pod_sends(&next).opened();
    });
}

/// A source that no packet from elsewhere may have opens no flow, through whichever frontend; the stack drops it.
#[test]
fn martians_open_nothing() {
    for_families(|bench, w| {
        bench.program(everywhere(w, Protocol::Udp));
        let sources = pick(
            w,
            &[
                "0.0.0.0:9",
                "0.1.2.3:9",
                "127.0.0.1:9",
                "224.0.0.1:9",
                "239.1.1.1:9",
                "255.255.255.255:9",
            ],
            &["[::]:9", "[::1]:9", "[ff02::1]:9"],
        );
        let sent = |bench: &mut Bench, source: SocketAddr, frontend| {
            let frame = Frame::udp(source, frontend);
            let at_pod = bench.pod_sends(&frame);
            [at_pod, bench.outside_sends(&frame), {
                let uplink = bench.network.xdp_uplink;
                bench.run(XdpIngress, uplink, &frame)
            }]
        };
        for source in sources.iter().map(|text| at(text)) {
            for frontend in [w.vip, w.node, w.balancer, w.external] {
                for ran in sent(bench, source, frontend) {
                    ran.passed(Outcome::Martian);
                }
            }
        }
        assert_eq!(bench.rig.flows(), []);
        // Reserved, but a host's as far as the kernel is concerned.
        if w.family == Family::V4 {
            for ran in sent(bench, at("240.0.0.5:9"), w.vip) {
                assert_eq!(ran.verdict, Verdict::On);
                assert_eq!(ran.parsed().destination, w.local);
            }
        }
    });
}

/// B4, with external IPs for outside clients alone: a pod's packets to them go on as if no Service were there, also where
/// the address is the node's own or a backend's; everybody else, and every other frontend, is served.
#[test]
fn b4_external_ips_can_be_kept_from_pods() {
    let plain = Setup::default();
    let setup = Setup {
        config: Config {
            bits: plain.config.bits | EXTERNAL_IPS_OUTSIDE,
            ..plain.config
        },
        ..plain
    };
    with_setup(&setup, |bench| {
        for w in FAMILIES.map(world) {
            let own = at_port(w.node, 81);
            let of_backend = at_port(w.local, 80);
            bench.program(
                everywhere(&w, Protocol::Tcp)
                    .frontend(FrontendKind::ExternalIp, own)
                    .frontend(FrontendKind::ExternalIp, of_backend),
            );
            // A SYN to a backend is nothing to look at unless a flow has its tuple.
            let none = Outcome::NoFrontend;
            let cases = [
                (w.external, none),
                (own, none),
                (of_backend, Outcome::NotOurs),
            ];
            for (frontend, outcome) in cases {
                let syn = Frame::tcp(w.client, frontend, SYN);
                bench.pod_sends(&syn).passed(outcome);
                let syn = Frame::tcp(w.outside, frontend, SYN);
                let _open = bench.outside_sends(&syn).opened();
                bench.rig.clear_flows();
            }
            for frontend in [w.vip, w.node, w.balancer] {
                let syn = Frame::tcp(w.client, frontend, SYN);
                let _open = bench.pod_sends(&syn).opened();
                bench.rig.clear_flows();
            }
        }
    });
}
