//! A value pointer may be somebody else's entry: freed elements are reused at once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use svc_lb_common::limits::name;
use svc_lb_common::outcome::Event;
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::lab::privileged;
use svc_lb_tests::prog::rig::{Count, Setup, object};
use svc_lb_tests::prog::tables::{Describe as _, port};
use svc_lb_tests::prog::{Frame, Rig, network, race};

use crate::bench::*;
use crate::walks::at_port;

/// How long the CPUs fight.
const TIME: Duration = Duration::from_secs(3);
/// Clients of each CPU: many times what the maps hold.
const CLIENTS: u16 = 4_000;

/// Two CPUs with more flows than the maps hold, so that every element is taken from under somebody all the time: each
/// packet is translated for its own client or not at all, and a flow that was evicted is made again with the same
/// backend.
#[test]
fn no_packet_gets_another_clients_translation() {
    let mut setup = Setup::default();
    for names in [name::OPENING, name::ESTABLISHED] {
        setup.sizes.extend(names.map(|name| (name, 64)));
    }
    with_setup(&setup, |bench| {
        let w = world(Family::V4);
        let backends: Vec<_> = (1..=7).map(|n| at_port(w.remote, 8_000 + n)).collect();
        bench.program(w.port(Protocol::Udp).backends(&backends));
        let other = port("other", Protocol::Udp, Family::V4).cluster_ip(w.other_vip);
        bench.rig.set("other", vec![other.backends(&backends)]);

        let (rig, pod) = (&bench.rig, bench.network.pod);
        let packets: u64 = std::thread::scope(|scope| {
            let fighters: Vec<_> = (0..2)
                .map(|cpu| scope.spawn(move || fight(rig, pod, cpu)))
                .collect();
            fighters
                .into_iter()
                .map(|fighter| fighter.join().unwrap())
                .sum()
        });
        let mismatches = bench.rig.counters().get(Count::Event(Event::CheckMismatch));
        println!("{packets} packets, {mismatches} caught by their check word");
        assert!(packets > 10_000, "only {packets} packets");
        assert!(
            bench.rig.flows().len() <= 1_024,
            "the maps are small: {}",
            bench.rig.flows().len()
        );
    });
}

/// Sends datagrams and their answers from one CPU; returns how many.
fn fight(rig: &Rig, pod: u32, cpu: usize) -> u64 {
    race::stay_on(cpu);
    let w = world(Family::V4);
    let address = format!("10.244.{}.5", 100 + cpu).parse().unwrap();
    let mut chosen: HashMap<(SocketAddr, SocketAddr), SocketAddr> = HashMap::new();
    let mut packets = 0;
    let end = Instant::now() + TIME;
    for n in 0u64.. {
        if n % 64 == 0 && Instant::now() > end {
            break;
        }
        // Runs over a window of clients that moves: some entries are hit again, most are not.
        let client = SocketAddr::new(
            address,
            1_024 + u16::try_from((n / 8 + n % 8 * 3) % u64::from(CLIENTS)).unwrap(),
        );
        let vip = if n % 3 == 0 { w.other_vip } else { w.vip };
        let sent = Frame::udp(client, vip);
        let (_, bytes) = rig.run(TcIngress, pod, &sent.to_bytes());
        let out = Frame::parse(&bytes).expect("well-formed");
        assert_eq!(out.source.ip(), client.ip(), "{sent:?} became {out:?}");
        let backend = *chosen.entry((client, vip)).or_insert(out.destination);
        assert_eq!(out.destination, backend, "{sent:?} became {out:?}");
        assert_ne!(out.destination, vip);

        let answer = out.answer(0);
        let (_, bytes) = rig.run(TcEgress, pod, &answer.to_bytes());
        let back = Frame::parse(&bytes).expect("well-formed");
        // Evicted meanwhile: as it was. Else this client's, from one of the frontends it asked.
        if back != answer {
            assert_eq!(back.destination, client, "{answer:?} became {back:?}");
            assert!([w.vip, w.other_vip].contains(&back.source), "{back:?}");
            if out.source.port() == client.port() {
                assert_eq!(back, answer.clone().from(back.source));
            }
        }
        packets += 2;
    }
    packets
}

/// The same where it is likeliest: see [`race::take_turns`].
#[test]
fn an_answer_is_its_own_frontends_or_nobodys() {
    if !privileged() {
        return;
    }
    let race = network::private(|network| race::take_turns(network, &object(), TIME));
    println!("{race:?}");
    assert_eq!(race.wrong, None);
    assert!(race.translated > 1_000, "{race:?}");
}
