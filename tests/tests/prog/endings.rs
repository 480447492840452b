//! Backends that leave while flows are on them.

use svc_lb::compile::desired::{Backend, DesiredPort};
use svc_lb_common::Protocol;
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::tables::{Describe as _, ready};

use crate::bench::*;

/// A UDP flow moves on its next packet when its backend no longer serves and another does; while none does it stays
/// (SEMANTICS G1).
#[test]
fn datagrams_move_from_a_backend_that_left() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Udp).backends(&[w.local]));
        let datagram = Frame::udp(w.client, w.vip);
        let out = bench.open(&datagram);
        assert_eq!(out.destination, w.local);

        bench.program(w.port(Protocol::Udp));
        bench.rig.age_datagrams();
        let stays = bench
            .pod_sends(&datagram)
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        assert_eq!(stays.destination, w.local);

        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        let moved = bench
            .pod_sends(&datagram)
            .translated(Outcome::Open, &[Event::Moved]);
        assert_eq!(moved, datagram.clone().to(w.remote));
        // The answer of the new one; the old one's is nobody's.
        let answer = moved.answer(0);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
        bench.pod_gets(&out.answer(0)).ignored();
    });
}

/// A backend that serves but gets no new flows, as by a policy or while it terminates, keeps the ones it has.
#[test]
fn datagrams_stay_with_a_backend_that_still_serves() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Udp).backends(&[w.local]));
        let datagram = Frame::udp(w.client, w.vip);
        bench.pod_sends(&datagram).opened();
        let draining = Backend {
            in_cluster: false,
            ..ready(w.local, false)
        };
        let with = |backend: Backend| DesiredPort {
            backends: vec![backend, ready(w.remote, false)],
            ..w.port(Protocol::Udp).backends(&[w.remote])
        };
        bench.program(with(draining));
        bench
            .pod_sends(&datagram)
            .became(Outcome::ForwardOpening, &datagram.clone().to(w.local));
        bench.program(with(Backend {
            serving: false,
            ..draining
        }));
        let moved = bench
            .pod_sends(&datagram)
            .translated(Outcome::Open, &[Event::Moved]);
        assert_eq!(moved.destination, w.remote);
    });
}

/// TCP keeps its backend whatever becomes of it (SEMANTICS D4); a new SYN from the same port finds one that is there.
#[test]
fn connections_stay_until_they_end() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.local]));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        let out = bench.open(&syn);
        assert_eq!(out.destination, w.local);
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let data = syn.with_flags(ACK | PSH);
        let after = bench
            .pod_sends(&data)
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        assert_eq!(after.destination, w.local);
        bench
            .pod_sends(&data)
            .became(Outcome::Forward, &data.clone().to(w.local));
        let answer = out.answer(ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
        bench
            .pod_sends(&syn)
            .became(Outcome::Open, &syn.clone().to(w.remote));
    });
}

/// A flow outlives its service: with the frontend gone its packets are still its own; a new one finds nothing.
#[test]
fn a_flow_outlives_its_service() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        let out = bench.open(&syn);
        bench.rig.set("web", Vec::new());
        let data = syn.with_flags(ACK);
        bench
            .pod_sends(&data)
            .translated(Outcome::ForwardOpening, &[Event::Promoted]);
        let answer = out.answer(ACK);
        bench
            .pod_gets(&answer)
            .became(Outcome::Reverse, &answer.clone().from(w.vip));
        bench.pod_sends(&syn).dropped(Outcome::Unallocated);
    });
}
