//! TCP throughput of a pod to a ClusterIP against pod to pod.

use std::io::Write as _;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
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
const ROUNDS: usize = 11;
/// Length of one measurement, after a start that is not counted.
const ROUND: Duration = Duration::from_millis(800);
const START: Duration = Duration::from_millis(200);
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
    let sink = server::sink(target.ns(), PORT)?;

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
        let (mut directs, mut vips) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            go_on()?;
            // Whoever goes second in a round goes first in the next.
            if round % 2 == 0 {
                directs.push(gbits(lab, direct, &sink)?);
                vips.push(gbits(lab, vip, &sink)?);
            } else {
                vips.push(gbits(lab, vip, &sink)?);
                directs.push(gbits(lab, direct, &sink)?);
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

/// One stream for one round.
fn gbits(lab: &Lab, to: SocketAddr, sink: &Server) -> Result<f64> {
    let mut stream = Client::of(lab.pod(SHELL).ns())
        .connect(to)
        .with_context(|| format!("connect to {to}"))?;
    let sender = thread::spawn(move || {
        let chunk = vec![0x5a; 256 * 1024];
        let end = Instant::now() + START + ROUND + Duration::from_millis(100);
        while Instant::now() < end && stream.write_all(&chunk).is_ok() {}
    });
    thread::sleep(START);
    let (from, started) = (sink.served(), Instant::now());
    thread::sleep(ROUND);
    let (bytes, took) = (sink.served() - from, started.elapsed());
    sender.join().ok().context("the sender panicked")?;
    ensure!(bytes > 0, "nothing arrived at {to}");
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let bits = bytes as f64 * 8.0;
    Ok(bits / took.as_secs_f64() / 1e9)
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
