//! `cargo xtask demo`: a small cluster out of namespaces, with services that are called from everywhere.

use std::os::unix::process::CommandExt as _;
use std::path::absolute;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::unistd::geteuid;

use crate::setup::{self, Need};
use crate::{build, proc};

const DEMO: &str = "svc-lb-demo";

/// Build everything and run the demo: needs root.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask demo             what hits what, then cleans up\n  cargo xtask demo --bench     also throughput through a ClusterIP against pod to pod\n  cargo xtask demo -- --help   every option of the demo itself"
)]
pub(crate) struct Args {
    /// Options of the demo itself.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Runs the command. On success this process has become the demo, so signals reach it without a middleman.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !geteuid().is_root() {
        bail!("the demo makes network namespaces and loads BPF programs: run it as root");
    }
    setup::ensure(&[Need::Build, Need::Lab])?;
    build::bpf_object()?;
    // The profile that the tests use: the packets' path is the kernel's either way, and a fresh machine
    // builds everything once.
    let agent = build::agent(false)?;
    proc::run(proc::cargo().args(["build", "--package", "svc-lb-tests", "--bin", DEMO]))?;
    let demo = absolute(proc::target_dir().join("debug").join(DEMO)).context("demo's path")?;
    let error = Command::new(&demo)
        .args(&args.args)
        .env("SVC_LB_BIN", agent)
        .exec();
    Err(error).with_context(|| format!("start {}", demo.display()))
}
