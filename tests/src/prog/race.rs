//! Map elements that change hands while a program holds a pointer to them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use svc_lb_common::outcome::{Event, Hook};
use svc_lb_common::{Family, Protocol};

use super::frame::{Frame, flags};
use super::network::Network;
use super::rig::{Count, Rig, Setup};
use super::tables::{Describe as _, at, port};

/// What came of a race.
#[derive(Clone, Debug)]
pub struct Race {
    /// Answers that were sent through.
    pub answers: u64,
    /// How many of them were translated.
    pub translated: u64,
    /// Copies whose check word was not their key's.
    pub mismatches: u64,
    /// The first answer that came out as nobody's, if one did.
    pub wrong: Option<String>,
}

/// One CPU translates a backend's answers; another opens and resets connections of the same client to the same backend
/// through two frontends in turn. Each takes the tuple over from the one before: both its entries are deleted, and the
/// two new ones get the same elements, crosswise. An answer therefore often finds an element that becomes another key's
/// before it is copied.
#[must_use]
pub fn take_turns(network: &Network, object: &Path, time: Duration) -> Race {
    let setup = Setup {
        object: object.to_owned(),
        ..Setup::default()
    };
    let mut rig = Rig::with(network, &setup);
    let [client, backend] = ["10.244.1.5:40000", "10.244.2.8:8080"].map(at);
    let frontends = ["10.96.0.10:80", "10.96.0.11:80"].map(at);
    for (name, frontend) in ["one", "two"].into_iter().zip(frontends) {
        let port = port(name, Protocol::Tcp, Family::V4).cluster_ip(frontend);
        rig.set(name, vec![port.backends(&[backend])]);
    }
    let over = AtomicBool::new(false);
    let (rig, pod) = (&rig, network.pod);
    let (answers, translated, wrong) = thread::scope(|scope| {
        scope.spawn(|| {
            stay_on(1);
            while !over.load(Ordering::Relaxed) {
                for frontend in frontends {
                    for tcp in [flags::SYN, flags::RST] {
                        let packet = Frame::tcp(client, frontend, tcp).to_bytes();
                        let _ran = rig.run(Hook::TcIngress, pod, &packet);
                    }
                }
            }
        });
        stay_on(0);
        let answer = Frame::tcp(backend, client, flags::SYN | flags::ACK);
        let result = answers(rig, pod, &answer, frontends, time);
        over.store(true, Ordering::Relaxed);
        result
    });
    Race {
        answers,
        translated,
        mismatches: rig.counters().get(Count::Event(Event::CheckMismatch)),
        wrong,
    }
}

/// Sends an answer through until `time` is over or it comes out as neither what it was nor a frontend's.
fn answers(
    rig: &Rig,
    pod: u32,
    answer: &Frame,
    frontends: [SocketAddr; 2],
    time: Duration,
) -> (u64, u64, Option<String>) {
    let sent = answer.to_bytes();
    let from = frontends.map(|frontend| answer.clone().from(frontend).to_bytes());
    let end = Instant::now() + time;
    let (mut count, mut translated) = (0, 0);
    while Instant::now() < end {
        let (_, out) = rig.run(Hook::TcEgress, pod, &sent);
        count += 1;
        if from.contains(&out) {
            translated += 1;
        } else if out != sent {
            return (
                count,
                translated,
                Some(format!("{answer:?} became {:?}", Frame::parse(&out))),
            );
        }
    }
    (count, translated, None)
}

/// Keeps the calling thread on one CPU, if there are that many.
pub fn stay_on(cpu: usize) {
    let mut only = CpuSet::new();
    only.set(cpu).expect("a small number");
    let _kept = sched_setaffinity(Pid::from_raw(0), &only);
}
