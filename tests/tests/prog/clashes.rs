//! Tuples that meet behind the frontends.

use svc_lb_common::Protocol;
use svc_lb_common::config::Config;
use svc_lb_common::conntrack::flow;
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::rig::Setup;
use svc_lb_tests::prog::tables::{Describe as _, port};

use crate::bench::*;
use crate::walks::at_port;

/// Two services with the same backend.
fn two_services(bench: &mut Bench, w: &World, protocol: Protocol) {
    bench.program(w.port(protocol).backends(&[w.remote]));
    let other = port("other", protocol, w.family).cluster_ip(w.other_vip);
    bench.rig.set("other", vec![other.backends(&[w.remote])]);
}

/// One client socket through two frontends to one backend: the second flow's source port is translated, and each answer
/// comes back from where its question went (SEMANTICS C15).
#[test]
fn two_frontends_of_one_backend() {
    for_families(|bench, w| {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            two_services(bench, w, protocol);
            let first = match protocol {
                Protocol::Tcp => Frame::tcp(w.client, w.vip, SYN),
                Protocol::Udp | Protocol::Sctp => Frame::udp(w.client, w.vip),
            };
            let second = first.clone().to(w.other_vip);
            let out = bench.pod_sends(&first).opened();
            assert_eq!(out, first.clone().to(w.remote));
            let other = bench
                .pod_sends(&second)
                .translated(Outcome::Open, &[Event::PortTranslated]);
            let range = bench.rig.config.snat_first..=bench.rig.config.snat_last;
            assert!(range.contains(&other.source.port()));
            assert_eq!(other, second.clone().to(w.remote).from(other.source));
            assert_eq!(other.source.ip(), w.client.ip());
            // The same again on the second packet.
            bench
                .pod_sends(&second)
                .became(Outcome::ForwardOpening, &other);
            for (out, vip) in [(out, w.vip), (other, w.other_vip)] {
                let answer = out.answer(SYN | ACK);
                bench
                    .pod_gets(&answer)
                    .became(Outcome::Reverse, &answer.clone().from(vip).to(w.client));
            }
        }
    });
}

/// A connection that is over does not hold its tuple.
#[test]
fn a_closed_connection_gives_way() {
    for_families(|bench, w| {
        two_services(bench, w, Protocol::Tcp);
        let first = Frame::tcp(w.client, w.vip, SYN);
        let out = bench.pod_sends(&first).opened();
        bench
            .pod_gets(&out.answer(RST | ACK))
            .translated(Outcome::Reverse, &[]);
        let second = first.clone().to(w.other_vip);
        bench
            .pod_sends(&second)
            .became(Outcome::Open, &second.clone().to(w.remote));
        let answer = second.clone().to(w.remote).answer(SYN | ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.other_vip));
    });
}

/// A SYN straight to a backend whose tuple has a live flow behind a frontend gets a translated source port; the
/// connection's further packets follow, in both directions.
#[test]
fn a_direct_connection_beside_a_flow() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let through = Frame::tcp(w.client, w.vip, SYN);
        let out = bench.open(&through);
        let direct = Frame::tcp(w.client, w.remote, SYN);
        let translated = bench
            .pod_sends(&direct)
            .translated(Outcome::Open, &[Event::PortTranslated]);
        assert_eq!(translated, direct.clone().from(translated.source));
        assert_ne!(translated.source.port(), w.client.port());
        let answer = translated.answer(SYN | ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().to(w.client));
        bench
            .pod_sends(&direct.with_flags(ACK))
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        bench
            .pod_sends(&direct.with_flags(ACK | PSH))
            .became(Outcome::Forward, &translated.with_flags(ACK | PSH));
        // The flow through the frontend is as it was.
        let answer = out.answer(ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
        // A stranger's segment to that backend is looked up and passes.
        let stranger = Frame::tcp(at_port(w.client, 9), w.remote, ACK);
        bench.pod_sends(&stranger).passed(Outcome::NoFrontend);
    });
}

/// A SYN straight to a backend from the port of a direct flow that is over begins anew: with a translated port while the
/// tuple is still taken, nothing left of how the last connection ended, and as it is once the tuple is free.
#[test]
fn a_direct_connection_after_another() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let through = Frame::tcp(w.client, w.vip, SYN);
        let out = bench.open(&through);
        let direct = Frame::tcp(w.client, w.remote, SYN);
        let first = bench
            .pod_sends(&direct)
            .translated(Outcome::Open, &[Event::PortTranslated]);
        bench.pod_gets(&first.answer(SYN | ACK)).parsed();
        bench.pod_sends(&direct.with_flags(FIN | ACK)).parsed();
        bench.pod_gets(&first.answer(FIN | ACK)).parsed();
        let second = bench
            .pod_sends(&direct)
            .translated(Outcome::Open, &[Event::PortTranslated]);
        assert_ne!(second.source, direct.source);
        let direct_flows = |bench: &Bench| -> Vec<_> {
            let flows = bench.rig.flows().into_iter();
            flows
                .filter(|flow| flow.traits & flow::DIRECT != 0)
                .map(|flow| (flow.traits & flow::REVERSE != 0, flow.state))
                .collect()
        };
        let mut states = direct_flows(bench);
        states.sort_unstable();
        assert_eq!(states, [(false, 0), (true, 0)]);

        // Both are over: nobody is in the way.
        bench.pod_gets(&second.answer(RST | ACK)).parsed();
        bench.pod_gets(&out.answer(RST | ACK)).parsed();
        bench.pod_sends(&direct).ignored();
        assert_eq!(direct_flows(bench), []);
    });
}

/// The order that nothing shows beforehand: a connection to the backend was there first. The backend's answers to it are
/// not the flow's, which began with a SYN: they stay as they are and are counted.
#[test]
fn a_direct_connection_that_was_first() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let direct = Frame::tcp(w.client, w.remote, SYN);
        bench.pod_sends(&direct).ignored();
        let through = Frame::tcp(w.client, w.vip, SYN);
        bench.pod_sends(&through).opened();
        let data = direct.answer(ACK | PSH);
        let ran = bench.pod_gets(&data);
        ran.counted(Outcome::NotOurs, &[Event::Clash]);
        assert_eq!(ran.bytes, data.to_bytes());
        // What a backend says to a SYN is the flow's.
        let answer = direct.answer(SYN | ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
        let data = direct.answer(ACK);
        bench
            .pod_gets(&data)
            .became(Outcome::Reverse, &data.clone().from(w.vip));
    });
}

/// No free source port: dropped and counted; a port that is given back is found.
#[test]
fn ports_run_out() {
    let setup = Setup::default();
    let setup = Setup {
        config: Config {
            snat_first: 61_000,
            snat_last: 61_000,
            ..setup.config
        },
        ..setup
    };
    with_setup(&setup, |bench| {
        let w = world(svc_lb_common::Family::V4);
        let vips: Vec<_> = (1..=3).map(|n| at_port(w.vip, n)).collect();
        let port = vips
            .iter()
            .fold(w.port(Protocol::Tcp), |port, vip| port.cluster_ip(*vip));
        bench.program(port.backends(&[w.remote]));
        let syn = |n: usize| Frame::tcp(w.client, vips[n], SYN);
        bench.pod_sends(&syn(0)).opened();
        let second = bench
            .pod_sends(&syn(1))
            .translated(Outcome::Open, &[Event::PortTranslated]);
        assert_eq!(second.source.port(), 61_000);
        bench.pod_sends(&syn(2)).dropped(Outcome::PortsExhausted);
        bench
            .pod_gets(&second.answer(RST))
            .translated(Outcome::Reverse, &[]);
        let third = bench
            .pod_sends(&syn(2))
            .translated(Outcome::Open, &[Event::PortTranslated]);
        assert_eq!(third.source.port(), 61_000);
    });
}
