//! Collecting what has timed out, with and without packets meanwhile.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use svc_lb::compile::desired::DesiredPort;
use svc_lb::dataplane::clock::jiffies_per_second;
use svc_lb::dataplane::collect::{Collector, MARGIN, PassReport, Reason};
use svc_lb::dataplane::{FlowState, FlowTable, Timeouts};
use svc_lb_common::config::Config;
use svc_lb_common::conntrack::flow;
use svc_lb_common::limits::name;
use svc_lb_common::outcome::{Event, Lru, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::rig::Setup;
use svc_lb_tests::prog::tables::{Describe as _, port};
use svc_lb_tests::prog::{Frame, race};

use crate::bench::*;
use crate::walks::at_port;

/// The timeouts of these tests: as many seconds as tens to the states' order.
fn timeouts() -> Timeouts {
    let said = (1..).zip(FlowState::ALL).map(|(n, state)| {
        format!("{state}={}s", 10 * n)
            .parse()
            .expect("STATE=DURATION")
    });
    Timeouts::with(&said.collect::<Vec<_>>())
}

/// A whole pass, in ticks of so many entries.
fn pass(collector: &mut Collector, budget: usize) -> PassReport {
    loop {
        if let Some(report) = collector.tick(budget).unwrap() {
            return report;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Two passes: some reverse entries go with the first, the others with the second.
fn passes(collector: &mut Collector, budget: usize) -> PassReport {
    pass(collector, budget);
    pass(collector, budget)
}

/// What was collected from all maps.
fn collected(report: &PassReport) -> BTreeMap<Reason, u64> {
    let mut all = BTreeMap::new();
    for (reason, count) in report.maps.iter().flat_map(|map| &map.collected) {
        *all.entry(*reason).or_default() += count;
    }
    all
}

/// Entries by state.
fn states(bench: &Bench) -> BTreeMap<FlowState, usize> {
    let mut states = BTreeMap::new();
    for flow in bench.rig.flows() {
        *states.entry(flow.flow_state()).or_default() += 1;
    }
    states
}

const ALL: &dyn Fn(FlowTable, u16) -> bool = &|_, _| true;

/// Two flows or more in every state: through a frontend, direct with a translated port, and hairpins. Returns how many in each.
fn flows_in_every_state(bench: &mut Bench, w: &World) -> BTreeMap<FlowState, usize> {
    let web = w.port(Protocol::Tcp).backends(&[w.remote]);
    bench.program(web);
    let dns = port("dns", Protocol::Udp, w.family).cluster_ip(w.vip);
    bench.rig.set("dns", vec![dns.backends(&[w.remote])]);
    let own = port("own", Protocol::Tcp, w.family).cluster_ip(w.other_vip);
    bench
        .rig
        .set("own", vec![own.local_backends(&[at_port(w.client, 8_080)])]);

    let open = |bench: &mut Bench, first: u16, frontend| {
        for n in 0..4 {
            let syn = Frame::tcp(at_port(w.client, first + n), frontend, SYN);
            bench.pod_sends(&syn).parsed();
        }
    };
    let go_on = |bench: &mut Bench, first: u16, frontend| {
        for (n, flags) in (0..).zip([&[][..], &[ACK], &[ACK, FIN | ACK], &[ACK, RST | ACK]]) {
            let syn = Frame::tcp(at_port(w.client, first + n), frontend, SYN);
            let out = bench.pod_sends(&syn).parsed();
            let answer = out.answer(SYN | ACK);
            if frontend == w.other_vip {
                bench.pod_sends(&answer).parsed();
            } else {
                bench.pod_gets(&answer).parsed();
            }
            for flags in flags {
                bench.pod_sends(&syn.with_flags(*flags)).parsed();
            }
        }
    };
    // Direct ones have a connection of the same port through the frontend beside them.
    let connections = [(1_000, w.vip), (1_000, w.remote), (2_000, w.other_vip)];
    for (first, to) in connections {
        open(bench, first, to);
    }
    for (first, to) in connections {
        go_on(bench, first, to);
    }
    let datagram = Frame::udp(at_port(w.client, 3_000), w.vip);
    bench.open(&datagram);
    bench.rig.age_datagrams();
    bench
        .pod_sends(&datagram)
        .translated(Outcome::ForwardOpening, &[Event::Promoted]);
    bench
        .pod_sends(&Frame::udp(at_port(w.client, 3_001), w.vip))
        .opened();
    BTreeMap::from([
        (FlowState::TcpOpening, 3),
        (FlowState::TcpEstablished, 3),
        (FlowState::TcpClosing, 3),
        (FlowState::TcpClosed, 3),
        (FlowState::UdpOpening, 1),
        (FlowState::UdpEstablished, 1),
    ])
}

/// G5: flows of every state are over after that state's timeout and no earlier, direct ones and hairpins too; both
/// entries go, and what is counted is what went.
#[test]
fn every_state_has_its_timeout() {
    for_families(|bench, w| {
        let mut expected = flows_in_every_state(bench, w);
        let entries = |flows: &BTreeMap<FlowState, usize>| -> BTreeMap<_, _> {
            flows
                .iter()
                .map(|(state, flows)| (*state, 2 * flows))
                .collect()
        };
        assert_eq!(states(bench), entries(&expected));
        let mut collector = bench.rig.collector(timeouts());
        let mut gone = BTreeMap::new();
        let mut idle = 0;
        for (state, limit) in timeouts().iter() {
            bench.rig.age(limit + MARGIN - 1 - idle, ALL);
            let report = pass(&mut collector, 1_000);
            assert_eq!(collected(&report), gone, "just before {state}");
            bench.rig.age(2, ALL);
            idle = limit + MARGIN + 1;
            let flows = expected.remove(&state).unwrap();
            gone.insert(Reason::Flow(state), flows as u64);
            let report = passes(&mut collector, 1_000);
            assert_eq!(collected(&report), gone, "just after {state}");
            assert_eq!(states(bench), entries(&expected));
            let present: u64 = report.maps.iter().map(|map| map.entries).sum();
            assert_eq!(present, entries(&expected).values().sum::<usize>() as u64);
        }
    });
}

/// G5: a pair is over only when both entries are: the younger one decides. An entry alone is judged alone.
#[test]
fn pairs_are_judged_together() {
    for_families(|bench, w| {
        let flows = flows_in_every_state(bench, w);
        let mut collector = bench.rig.collector(timeouts());
        for half in [0, flow::REVERSE] {
            bench
                .rig
                .age(100, &|_, traits| traits & flow::REVERSE == half);
            passes(&mut collector, 1_000);
            let left: usize = states(bench).values().sum();
            let expected = match half {
                0 => 2 * flows.values().sum::<usize>(),
                _ => 0,
            };
            assert_eq!(left, expected);
        }
        let syn = Frame::tcp(w.client, w.vip, SYN);
        bench.open(&syn);
        bench.rig.remove(&|_, traits| traits & flow::REVERSE != 0);
        bench.rig.age(100, ALL);
        passes(&mut collector, 1_000);
        assert_eq!(bench.rig.flows(), []);
        bench.open(&syn);
        bench.rig.remove(&|_, traits| traits & flow::REVERSE == 0);
        bench.rig.age(100, ALL);
        passes(&mut collector, 1_000);
        assert_eq!(bench.rig.flows(), []);
    });
}

/// The programs told the kernel's own clock, so that flows a second old are refreshed.
fn real_time() -> Setup {
    let setup = Setup::default();
    Setup {
        config: Config {
            hz: jiffies_per_second().unwrap(),
            ..setup.config
        },
        ..setup
    }
}

/// G5: connections that get a packet just when they are collected, by another CPU at the same time: the answer finds its
/// way back. That flows were put back shows that it was close.
///
/// Nothing can be done about a collector that is held up between two system calls; this happens rarely enough to allow
/// for one in thousands.
#[test]
fn a_packet_saves_its_flow() {
    const FLOWS: u16 = 6;
    const ROUNDS: usize = 1_500;
    with_setup(&real_time(), |bench| {
        let w = world(Family::V4);
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        let clients = (0..FLOWS).map(|n| at_port(w.client, 1_000 + n));
        let frames: Vec<_> = clients
            .map(|client| Frame::tcp(client, w.vip, ACK))
            .collect();
        let mut collector = bench.rig.collector(timeouts());
        let mut rng = Rng::with_seed(7);
        let mut report = PassReport::default();
        let mut lost = 0;
        let put_back =
            |report: &PassReport| -> u64 { report.maps.iter().map(|map| map.put_back).sum() };
        // How often it is close depends on the machine.
        for round in 0..4 * ROUNDS {
            if round >= ROUNDS && put_back(&report) > 5 {
                break;
            }
            for frame in frames.iter().chain(&frames) {
                answered(bench, frame);
            }
            bench.rig.age(100, ALL);
            let order = rng.usize(..frames.len());
            let wait = Duration::from_micros(rng.u64(..150) + 1_000 * rng.u64(..3));
            let together = Barrier::new(2);
            let bench = &*bench;
            report = thread::scope(|scope| {
                let collect = scope.spawn(|| {
                    race::stay_on(1);
                    together.wait();
                    passes(&mut collector, 1_000)
                });
                race::stay_on(0);
                together.wait();
                let begin = Instant::now();
                while begin.elapsed() < wait {
                    std::hint::spin_loop();
                }
                let frames = frames.iter().cycle().skip(order).take(frames.len());
                lost += frames.filter(|frame| !answered(bench, frame)).count();
                collect.join().unwrap()
            });
        }
        let put_back = put_back(&report);
        let gone: u64 = collected(&report).values().sum();
        println!("{gone} flows collected, {put_back} put back, {lost} answers lost");
        assert!(
            gone > 100 && put_back > 0,
            "{gone} collected, {put_back} put back"
        );
        assert!(lost <= 2, "{lost} answers lost their way");
    });
}

/// Sends a frame and what its backend answers; whether the answer came back from where the frame was sent to.
fn answered(bench: &Bench, frame: &Frame) -> bool {
    let pod = bench.network.pod;
    let (_, out) = bench.rig.run(TcIngress, pod, &frame.to_bytes());
    let out = Frame::parse(&out).unwrap();
    assert_ne!(out.destination, frame.destination);
    let answer = out.answer(ACK);
    // No answer is quicker.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_micros(20) {
        std::hint::spin_loop();
    }
    let (_, back) = bench.rig.run(TcEgress, pod, &answer.to_bytes());
    let back = Frame::parse(&back).unwrap();
    back == answer.from(frame.destination)
}

/// A tick costs what it may, whatever there is to do; a pass ends after a number of ticks that follows from that.
#[test]
fn ticks_are_bounded() {
    const FLOWS: u16 = 5_000;
    const BUDGET: usize = 1_000;
    on_bench(|bench| {
        let w = world(Family::V4);
        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        for n in 0..FLOWS {
            let datagram = Frame::udp(at_port(w.client, 1_000 + n), w.vip);
            let _ran = bench
                .rig
                .run(TcIngress, bench.network.pod, &datagram.to_bytes());
        }
        let entries = 2 * usize::from(FLOWS);
        let mut collector = bench.rig.collector(timeouts());
        let ticks = |collector: &mut Collector| {
            let mut ticks = 1;
            while collector.tick(BUDGET).unwrap().is_none() {
                ticks += 1;
            }
            ticks
        };
        let idle = ticks(&mut collector);
        assert!(
            (entries / BUDGET..=entries / BUDGET + 3).contains(&idle),
            "{idle} ticks"
        );
        // Removals count more, so a pass that has many takes longer.
        bench.rig.age(100, ALL);
        let before = bench.rig.flows().len();
        assert_eq!(before, entries);
        collector.tick(BUDGET).unwrap();
        let after = bench.rig.flows().len();
        assert!(
            before - after <= 2 * 1_024,
            "{} removed in a tick",
            before - after
        );
        let busy = ticks(&mut collector);
        assert!(
            busy > 3 * idle && busy < 30 * idle,
            "{busy} ticks, {idle} when idle"
        );
        pass(&mut collector, BUDGET);
        assert_eq!(bench.rig.flows(), []);
    });
}

/// Positions of direct flows are cleared when no such flow is left, and not those of flows that live or were opened while
/// the pass went on.
#[test]
fn positions_of_direct_flows_are_cleared() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote, w.local]));
        let direct = |bench: &mut Bench, backend, first: u16| {
            for n in first.. {
                let client = at_port(w.client, n);
                let through = Frame::tcp(client, w.vip, SYN);
                if bench.open(&through).destination == backend {
                    return bench
                        .pod_sends(&Frame::tcp(client, backend, SYN))
                        .translated(Outcome::Open, &[Event::PortTranslated]);
                }
            }
            unreachable!("one of two backends is picked sooner or later")
        };
        let mut collector = bench.rig.collector(timeouts());
        direct(bench, w.remote, 1_000);
        let [position] = bench.rig.direct_positions()[..] else {
            panic!("one position")
        };
        bench.rig.age_direct(100);
        pass(&mut collector, 1_000);
        assert_eq!(bench.rig.direct_positions(), [position], "its flow lives");

        bench.rig.age(100, ALL);
        // The pass begins, another direct flow is opened there, the pass ends.
        assert!(collector.tick(1).unwrap().is_none());
        bench.rig.clear_flows();
        direct(bench, w.remote, 2_000);
        pass(&mut collector, 1_000);
        assert_eq!(bench.rig.direct_positions(), [position], "opened meanwhile");

        direct(bench, w.local, 3_000);
        bench.rig.age_direct(100);
        bench.rig.clear_flows();
        pass(&mut collector, 1_000);
        assert!(bench.rig.direct_positions().is_empty(), "nobody goes there");
    });
}

/// F1, H6: pins that count no more are collected, and those that do are not.
#[test]
fn old_pins_are_collected() {
    for_families(|bench, w| {
        let affine = |seconds| DesiredPort {
            affinity_seconds: seconds,
            ..w.port(Protocol::Tcp).backends(&[w.remote])
        };
        bench.program(affine(Some(50)));
        let syn = Frame::tcp(w.client, w.vip, SYN);
        let pin = |bench: &mut Bench| {
            bench.rig.clear_flows();
            bench.open(&syn);
            bench.pod_sends(&syn.with_flags(ACK)).parsed();
        };
        pin(bench);
        let hz = u64::from(jiffies_per_second().unwrap());
        let mut collector = bench.rig.collector(timeouts());
        let pins = |collector: &mut Collector| {
            let report = pass(collector, 1_000);
            let maps = report.maps.iter().filter(|map| map.lru == Lru::Affinity);
            let entries: u64 = maps.map(|map| map.entries).sum();
            let old = collected(&report).get(&Reason::Pin).copied();
            (entries, old.unwrap_or(0))
        };
        bench.rig.change_pins(|pin| pin.seen -= 50 * hz);
        assert_eq!(pins(&mut collector), (1, 0));
        bench.rig.change_pins(|pin| pin.seen -= 4 * hz);
        assert_eq!(pins(&mut collector), (0, 1));

        pin(bench);
        assert_eq!(pins(&mut collector), (1, 1));
        // Affinity is switched off: the pin counts no more.
        bench.program(affine(None));
        assert_eq!(pins(&mut collector), (0, 2));
    });
}

/// H6: evictions are estimated from what came, what left and what is there.
#[test]
fn evictions_are_estimated() {
    const FLOWS: u16 = 3_000;
    let mut setup = Setup::default();
    setup.sizes.extend(name::OPENING.map(|name| (name, 1_024)));
    with_setup(&setup, |bench| {
        let w = world(Family::V4);
        bench.program(w.port(Protocol::Udp).backends(&[w.remote]));
        let mut collector = bench.rig.collector(timeouts());
        let opening = |report: &PassReport| {
            let mut maps = report.maps.iter();
            let map = maps.find(|map| map.lru == Lru::Opening && map.family == Family::V4);
            map.cloned().unwrap()
        };
        assert_eq!(opening(&pass(&mut collector, 1_000)).evicted, 0);
        for n in 0..FLOWS {
            let datagram = Frame::udp(at_port(w.client, 1_000 + n), w.vip);
            let _ran = bench
                .rig
                .run(TcIngress, bench.network.pod, &datagram.to_bytes());
        }
        let report = opening(&pass(&mut collector, 1_000));
        let present = bench.rig.flows().len() as u64;
        assert_eq!(report.entries, present);
        assert!((512..=1_024).contains(&present), "{present} of 1,024");
        assert_eq!(report.evicted, 2 * u64::from(FLOWS) - present);
        // What is collected was not evicted. (What ages the entries writes them, which evicts some more.)
        bench.rig.age(100, ALL);
        let present = bench.rig.flows().len() as u64;
        let report = opening(&passes(&mut collector, 1_000));
        assert_eq!(report.entries, 0);
        assert_eq!(report.evicted, 2 * u64::from(FLOWS) - present);
    });
}
