//! TCP throughput of a pod to a ClusterIP against pod to pod.

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;
use svc_lb_tests::lab::addresses::SERVICES;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::{Protocol, Service};
use svc_lb_tests::lab::server::{self, Server};
use svc_lb_tests::lab::{Family, Lab, eventually};

use crate::examples::{Examples, SHELL};
use crate::go_on;
use crate::show::{Show, note};

/// The pod that receives; it serves the examples as well, which are idle meanwhile.
const TARGET: &str = "kubia-1";
const PORT: u16 = 5201;
/// Pairs of measurements, one each way; short, so that both ways meet the same machine.
const ROUNDS: usize = 60;
/// Length of one measurement, after a start that is not counted.
const ROUND: Duration = Duration::from_millis(100);
const START: Duration = Duration::from_millis(50);
/// What the way through the ClusterIP must keep.
const GOAL: f64 = 0.95;

/// Measures in turn, so that both ways meet the same machine.
pub(crate) fn run(lab: &Lab, examples: &Examples, show: &mut Show) -> Result<()> {
    let target = lab.pod(TARGET);
    let cluster_ip = SERVICES.nth(5201);
    let service = Service::new("bench", cluster_ip)
        .port("bulk", Protocol::Tcp, PORT, PORT)
        .pods([target]);
    let list = json!({"apiVersion": "v1", "kind": "List", "items": service.objects()});
    examples.add("bench.json", &list.to_string())?;
    // Two threads that chase each other over the CPUs would make the figures a scheduler's.
    let cpus = sched_getaffinity(Pid::from_raw(0))?;
    let [sender_cpu, sink_cpu] = two_of(&cpus)?;
    // The sink's threads inherit it.
    sched_setaffinity(Pid::from_raw(0), &sink_cpu)?;
    let sink = server::sink(target.ns(), PORT);
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    let sink = sink?;

    show.section(
        "bench",
        "one TCP stream, pod shell to kubia-1, pod to pod and through a ClusterIP in turn",
    );
    for family in Family::BOTH {
        let direct = target.addr().socket(family, PORT);
        let vip = cluster_ip.socket(family, PORT);
        let client = Client::of(lab.pod(SHELL).ns());
        eventually(
            "the bench's service is programmed",
            Duration::from_secs(5),
            || client.connect(vip).map(drop).context("connect"),
        );
        let direct = Stream::open(lab, direct, sender_cpu)?;
        let vip = Stream::open(lab, vip, sender_cpu)?;
        let (mut directs, mut vips) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            go_on()?;
            // Whoever goes second in a round goes first in the next.
            if round % 2 == 0 {
                directs.push(direct.gbits(&sink)?);
                vips.push(vip.gbits(&sink)?);
            } else {
                vips.push(vip.gbits(&sink)?);
                directs.push(direct.gbits(&sink)?);
            }
        }
        let ratios: Vec<f64> = vips
            .iter()
            .zip(&directs)
            .map(|(vip, direct)| vip / direct)
            .collect();
        let (direct, vip, ratio) = (spread(directs), spread(vips), spread(ratios));
        note(&format!("{family}  pod -> pod        {direct} Gbit/s"));
        note(&format!("{family}  pod -> ClusterIP  {vip} Gbit/s"));
        show.check(
            &format!("{family}  ratio of a round   {ratio}, at least {GOAL}"),
            (|| {
                ensure!(ratio.median >= GOAL, "the ClusterIP costs too much");
                Ok(())
            })(),
        );
    }
    Ok(())
}

/// The first and the last CPU that we may run on, which may be one and the same.
fn two_of(cpus: &CpuSet) -> Result<[CpuSet; 2]> {
    let usable = |cpu: &usize| cpus.is_set(*cpu).unwrap_or(false);
    let first = (0..CpuSet::count()).find(usable).context("no CPU")?;
    let last = (0..CpuSet::count()).rfind(usable).context("no CPU")?;
    let mut sets = [CpuSet::new(); 2];
    for (set, cpu) in sets.iter_mut().zip([first, last]) {
        set.set(cpu)?;
    }
    Ok(sets)
}

/// One TCP connection that sends when it is told to.
struct Stream {
    to: SocketAddr,
    send: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
    over: Arc<AtomicBool>,
}

impl Stream {
    fn open(lab: &Lab, to: SocketAddr, cpu: CpuSet) -> Result<Self> {
        let mut stream = Client::of(lab.pod(SHELL).ns())
            .connect(to)
            .with_context(|| format!("connect to {to}"))?;
        let (send, over) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let (go, end) = (Arc::clone(&send), Arc::clone(&over));
        let sender = thread::spawn(move || {
            // Where it may not be pinned, it wanders: the figures only spread more.
            let _pinned = sched_setaffinity(Pid::from_raw(0), &cpu);
            let chunk = vec![0x5a; 256 * 1024];
            while !end.load(Ordering::Relaxed) {
                if !go.load(Ordering::Relaxed) {
                    thread::park_timeout(Duration::from_millis(20));
                } else if stream.write_all(&chunk).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            to,
            send,
            sender: Some(sender),
            over,
        })
    }

    /// Sends for one round; what arrived.
    fn gbits(&self, sink: &Server) -> Result<f64> {
        self.send.store(true, Ordering::Relaxed);
        if let Some(sender) = &self.sender {
            sender.thread().unpark();
        }
        thread::sleep(START);
        let (from, started) = (sink.served(), Instant::now());
        thread::sleep(ROUND);
        let (bytes, took) = (sink.served() - from, started.elapsed());
        self.send.store(false, Ordering::Relaxed);
        // What is still in the socket's buffers arrives before the other way's round.
        let mut before = 0;
        while sink.served() != before {
            before = sink.served();
            thread::sleep(Duration::from_millis(5));
        }
        ensure!(bytes > 0, "nothing arrived at {}", self.to);
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let bits = bytes as f64 * 8.0;
        Ok(bits / took.as_secs_f64() / 1e9)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            sender.thread().unpark();
            let _joined = sender.join();
        }
    }
}

/// Median and extremes.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            median,
            least,
            most,
        } = self;
        write!(f, "median {median:.3} ({least:.3} to {most:.3})")
    }
}

fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    Spread {
        median: at(values.len() / 2),
        least: at(0),
        most: at(values.len().saturating_sub(1)),
    }
}
