//! A small cluster out of network namespaces: applies `examples/`, calls every service from everywhere, shows what hit
//! what, and cleans up.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use svc_lb_tests::lab::agent::AgentConfig;
use svc_lb_tests::lab::{AgentProcess, KernelState, Lab, run};

use crate::examples::Examples;
use crate::show::{Show, note, title};

mod bench;
mod examples;
mod frontends;
mod show;
mod tour;

/// How long the kernel may take to free what nobody uses any longer.
const SETTLE: Duration = Duration::from_secs(10);
/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// Calls every example service from pods and from outside, and shows what hit what. Needs root.
#[derive(Debug, clap::Parser)]
#[command(
    after_help = "Examples:\n  svc-lb-demo                    the tour\n  svc-lb-demo --bench            also throughput through a ClusterIP against pod to pod\n  svc-lb-demo --hold             keep the cluster until Ctrl-C, to look around in it\n\nExit code 0: every service was reached by the expected pods and no others."
)]
struct Args {
    /// Directory with the Kubernetes objects.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples"))]
    examples: PathBuf,
    /// Measure TCP throughput pod to ClusterIP against pod to pod.
    #[arg(long)]
    bench: bool,
    /// XDP mode of node-a's uplink: off, generic or native.
    #[arg(long, value_name = "MODE")]
    xdp: Option<String>,
    /// Keep the cluster after the tour, until Ctrl-C.
    #[arg(long)]
    hold: bool,
    /// Wait for the end of a run, then remove what it left. The demo starts itself with it.
    #[arg(long, hide = true, value_name = "RUN")]
    reap: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(id) = &args.reap {
        return match run::reap(id) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    match demo(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if interrupted() => {
            eprintln!("interrupted; everything is removed");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the tour; whether every expectation was met.
fn demo(args: &Args) -> Result<bool> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo makes network namespaces and loads BPF programs: run it as root");
    }
    catch_signals()?;
    let before = KernelState::take()?.settings();
    let mut show = Show::new();
    let held = cluster(args, &mut show)?;
    let left = before.settle(&held, SETTLE)?;
    show.section("clean up", "");
    show.check(
        &format!(
            "gone: {} programs, {} maps, {} links, pins, namespaces; qdiscs and routes as before",
            held.of_kind("program").count(),
            held.of_kind("map").count(),
            held.of_kind("link").count(),
        ),
        if left.is_empty() {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{left}"))
        },
    );
    Ok(show.summary())
}

/// The cluster's life; returns what the agent held in the kernel.
fn cluster(args: &Args, show: &mut Show) -> Result<KernelState> {
    let started = Instant::now();
    let examples = Examples::read(&args.examples)?;
    let lab = examples.lab(Lab::builder().name("demo")).build()?;
    guard(lab.run().id())?;
    let examples = examples.copy_to(&lab.dir().join("examples"))?;
    title(&lab, started.elapsed());

    let mut config = AgentConfig::manifests(examples.dir());
    if let Some(mode) = &args.xdp {
        config = config.xdp(mode);
    }
    let mut agent = AgentProcess::start(&lab, config)?;
    tour::run(&lab, &agent, &examples, show)?;
    if args.bench {
        bench::run(&lab, &examples, show)?;
    }
    show.status(&agent.ask(&["status"])?);
    if args.hold {
        hold(&lab);
    }
    let held = KernelState::of_pins(agent.pin_dir())?;
    agent.detach()?;
    Ok(held)
}

fn hold(lab: &Lab) {
    note("holding; Ctrl-C removes everything. Look around with:");
    for namespace in [
        lab.node_a(),
        lab.pod(examples::SHELL).ns(),
        lab.client(0).ns(),
    ] {
        let name = namespace.path().file_name().unwrap_or_default().display();
        note(&format!("  ip netns exec {name} bash"));
    }
    while !interrupted() {
        std::thread::sleep(Duration::from_millis(100));
    }
}

static INTERRUPT: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_signal: libc::c_int) {
    INTERRUPT.store(true, Ordering::Relaxed);
}

fn catch_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(on_signal),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("catch {signal}"))?;
    }
    Ok(())
}

/// Whether the user wants it to end.
fn interrupted() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}

/// An error if the user wants it to end; asked between steps.
fn go_on() -> Result<()> {
    if interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

/// Starts a process of its own session that removes what is left when this one is killed.
fn guard(id: &str) -> Result<()> {
    let demo = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(demo);
    command
        .args(["--reap", id])
        .current_dir(Path::new("/"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: setsid is async-signal-safe and touches nothing of this process.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
    let child = command.spawn().context("start the guardian")?;
    // It outlives this process on purpose; init reaps it.
    drop(child);
    Ok(())
}
