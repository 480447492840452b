//! The figures we quote, measured on this machine: `cargo xtask bench`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

mod agent;
mod figures;
mod lab;
mod packets;
mod report;

/// Measures svc-lb on this machine. Needs root.
#[derive(Debug, clap::Parser)]
#[command(
    after_help = "Examples:\n  svc-lb-bench                          everything\n  svc-lb-bench --packets                nanoseconds a packet, the programs alone\n  svc-lb-bench --agent                  the agent with 10,000 Services and 100,000 endpoints\n  svc-lb-bench --packets --json new.json --baseline old.json\n                                        and the ratio of each figure to an earlier run's\n\nOther work on the machine shows in the spread: compare ratios of one run, not figures of two."
)]
struct Args {
    /// The programs alone: nanoseconds a packet by BPF_PROG_TEST_RUN.
    #[arg(long)]
    packets: bool,
    /// The agent at the size it is designed for: cold start, memory, and how fast one change is active.
    #[arg(long)]
    agent: bool,
    /// Real traffic between pods: connects, exchanges, datagrams and bulk, against kube-proxy's rules.
    #[arg(long)]
    lab: bool,
    /// Numbers of services for --lab.
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,1000,10000"
    )]
    services: Vec<u32>,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Rounds of each case.
    #[arg(long, default_value_t = 101)]
    rounds: usize,
    /// Write all figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with the figures that an earlier run wrote.
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
}

fn main() -> ExitCode {
    match bench(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("benchmarks make network namespaces and load BPF programs: run them as root");
    }
    if args.rounds == 0 {
        bail!("--rounds 0: at least one round makes a figure");
    }
    let baseline = args
        .baseline
        .as_deref()
        .map(|path| report::read(path).with_context(|| format!("--baseline {}", path.display())))
        .transpose()?;
    let all = !args.packets && !args.lab && !args.agent;
    if args.agent || all {
        agent::run()?;
    }
    let mut figures = Vec::new();
    if args.packets || all {
        figures.extend(packets::run(&packets::Options {
            only: args.only.clone(),
            rounds: args.rounds,
        }));
    }
    if args.lab || all {
        figures.extend(lab::run(&lab::Options {
            only: args.only.clone(),
            rounds: args.rounds,
            services: args.services.clone(),
        })?);
    }
    if figures.is_empty() {
        return Ok(());
    }
    report::table(&figures, baseline.as_deref())?;
    if let Some(path) = &args.json {
        report::write(path, &figures).with_context(|| format!("--json {}", path.display()))?;
    }
    Ok(())
}
