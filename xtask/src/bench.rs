//! `cargo xtask bench`: the figures we quote, measured here.

use std::os::unix::process::CommandExt as _;
use std::path::absolute;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::unistd::geteuid;

use crate::setup::{self, Need};
use crate::{build, proc};

const BENCH: &str = "svc-lb-bench";

/// Build everything and measure: needs root.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench            everything\n  cargo xtask bench --packets  the programs alone, nanoseconds a packet\n  cargo xtask bench --agent    the agent at full size: cold start, memory, one change\n  cargo xtask bench -- --help  every part and option"
)]
pub(crate) struct Args {
    /// Parts and options of the benchmark itself.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Runs the command. On success this process has become the benchmark.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !geteuid().is_root() {
        bail!("benchmarks make network namespaces and load BPF programs: run them as root");
    }
    setup::ensure(&[Need::Build, Need::Lab])?;
    build::bpf_object()?;
    build::replay_object()?;
    let agent = build::agent(true)?;
    let build = ["build", "--release", "--package", "svc-lb-tests", "--bin"];
    proc::run(proc::cargo().args(build).arg(BENCH))?;
    let bench = absolute(proc::target_dir().join("release").join(BENCH)).context("its path")?;
    let error = Command::new(&bench)
        .args(&args.args)
        .env("SVC_LB_BIN", agent)
        .exec();
    Err(error).with_context(|| format!("start {}", bench.display()))
}
