//! The programs against the reference in plain Rust, on random services and packets: the same verdict, the same bytes, the
//! same counters.
//!
//! `SVC_LB_SEED=<number>` repeats the round that a failure named, with the counters compared after every packet.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use svc_lb_common::outcome::{Event, Hook, Outcome};
use svc_lb_tests::lab::privileged;
use svc_lb_tests::prog::differential::{self, Plan, Report};
use svc_lb_tests::prog::network;
use svc_lb_tests::prog::rig::{self, Count};

/// How often each outcome that packets can have must have been met.
const LEAST: u64 = 100;
/// How many ICMP messages about flows a run must have.
const ICMP_MESSAGES: u64 = 20_000;
/// How many fragments a run must have.
const FRAGMENTS: u64 = 20_000;
/// How many datagrams must have been translated in parts and put together: half of what runs have.
const DATAGRAMS: usize = 300;
/// No memory, a kernel that refuses, an interface without addresses: nothing a packet can bring about.
const OUT_OF_REACH: [Outcome; 3] = [
    Outcome::FlowInsert,
    Outcome::RewriteFailed,
    Outcome::NoSource,
];

#[test]
fn the_programs_do_what_the_reference_does() {
    if !privileged() {
        return;
    }
    let chosen = std::env::var("SVC_LB_SEED").ok().map(|text| {
        text.parse::<u64>()
            .unwrap_or_else(|error| panic!("SVC_LB_SEED={text}: {error}"))
    });
    let seed = chosen.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(1, |now| {
            u64::from(now.subsec_nanos()) << 20 | now.as_secs() & 0xfffff
        })
    });
    let plan = Plan {
        seed,
        rounds: if chosen.is_some() { 1 } else { 16 },
        packets: 24_000,
        count_each: chosen.is_some(),
    };
    println!("seed {seed}");
    let report = network::private(|network| differential::run(network, &rig::object(), &plan));
    let report = report.unwrap_or_else(|mismatch| panic!("{}", mismatch.0));
    println!("{}", table(&report));
    if chosen.is_some() {
        return;
    }
    println!("{} ICMP messages about flows", report.messages);
    println!(
        "{} fragments, {} datagrams put together",
        report.fragments, report.datagrams
    );
    assert!(report.messages >= ICMP_MESSAGES, "{}", report.messages);
    assert!(report.fragments >= FRAGMENTS, "{}", report.fragments);
    assert!(report.datagrams >= DATAGRAMS, "{}", report.datagrams);
    for outcome in Outcome::ALL {
        let met = met(&report, *outcome);
        let least = if OUT_OF_REACH.contains(outcome) {
            0
        } else {
            LEAST
        };
        assert!(met >= least, "{}: met {met} times", outcome.name());
    }
    for event in Event::ALL {
        let met = report.coverage.get(Count::Event(*event));
        // Nobody else uses the maps, and there are no sockets.
        let least = match event {
            Event::CheckMismatch
            | Event::SocketTranslated
            | Event::SocketRefused
            | Event::SocketLeft
            | Event::SocketMoved
            | Event::SocketForgotten => 0,
            Event::PortTranslated
            | Event::Promoted
            | Event::Moved
            | Event::Clash
            | Event::Mended => LEAST,
        };
        assert!(met >= least, "{}: met {met} times", event.name());
    }
}

fn met(report: &Report, outcome: Outcome) -> u64 {
    let at = |hook: &Hook| report.coverage.get(Count::Outcome(*hook, outcome));
    Hook::ALL.iter().map(at).sum()
}

/// What was met how often.
fn table(report: &Report) -> String {
    let [programs, reference, all] = report.times;
    let packets = u32::try_from(report.packets).map_or(f64::INFINITY, f64::from);
    let rate = |time: std::time::Duration| packets / time.as_secs_f64();
    let mut text = format!(
        "{} packets in {all:.1?}: {:.0} a second through the programs, {:.0} through the reference\n{:<18}",
        report.packets,
        rate(programs),
        rate(reference),
        "",
    );
    for hook in Hook::ALL {
        let _ = write!(text, "{:>12}", hook.name());
    }
    for outcome in Outcome::ALL {
        let _ = write!(text, "\n{:<18}", outcome.name());
        for hook in Hook::ALL {
            let count = report.coverage.get(Count::Outcome(*hook, *outcome));
            let _ = write!(text, "{count:>12}");
        }
    }
    for event in Event::ALL {
        let count = report.coverage.get(Count::Event(*event));
        let _ = write!(text, "\n{:<18}{count:>12}", event.name());
    }
    text
}
