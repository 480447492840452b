//! `cargo xtask build`: the BPF object, checked, and the agent with it inside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::setup::{self, Need};
use crate::{elf_gate, proc};

/// Where the checked object lies. `svc-lb/build.rs` looks for it there, also in a plain `cargo build`.
pub(crate) const BPF_OBJECT: &str = "target/bpf/svc-lb";
/// Where `tests/src/prog/replay.rs` looks for it.
const REPLAY_OBJECT: &str = "target/bpf/replay";
/// A target directory of its own: host builds and BPF builds do not wait for each other's lock.
const BPF_TARGET_DIR: &str = "target/bpf-build";
pub(crate) const BPF_PACKAGE: &str = "svc-lb-ebpf";
/// What puts frames back before each run of a benchmark.
const REPLAY_PACKAGE: &str = "svc-lb-replay";
/// All that builds for the BPF target alone.
pub(crate) const BPF_PACKAGES: [&str; 2] = [BPF_PACKAGE, REPLAY_PACKAGE];

/// Build the BPF object and the agent that embeds it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask build            target/debug/svc-lb\n  cargo xtask build --release  target/release/svc-lb\n  cargo xtask build --bpf-only target/bpf/svc-lb, checked"
)]
pub(crate) struct Args {
    /// Build the agent with optimisation. The BPF object always is.
    #[arg(long)]
    release: bool,
    /// Stop after the BPF object.
    #[arg(long)]
    bpf_only: bool,
    /// Build the BPF object of the workspace in DIR, to DIR/svc-lb: how the tests build programs with a bug in them.
    #[arg(long, value_name = "DIR", requires = "bpf_only", hide = true)]
    bpf_workspace: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<()> {
    let Args {
        release,
        bpf_only,
        bpf_workspace,
    } = args;
    if let Some(workspace) = bpf_workspace {
        let object = workspace.join("svc-lb");
        let bytes = checked_object(workspace, BPF_PACKAGE)?;
        return fs::write(&object, bytes).with_context(|| format!("write {}", object.display()));
    }
    bpf_object()?;
    if !bpf_only {
        agent(*release)?;
    }
    Ok(())
}

/// Builds one of a workspace's BPF objects and puts it through the gate.
fn checked_object(workspace: &Path, package: &str) -> Result<Vec<u8>> {
    setup::ensure(&[Need::Build])?;
    let mut cmd = bpf_cargo("build", package);
    proc::run(cmd.args(["--release", "--bins"]).current_dir(workspace))?;
    let built = workspace
        .join(BPF_TARGET_DIR)
        .join(bpf_target())
        .join("release")
        .join(package);
    let bytes = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    elf_gate::check(&bytes).with_context(|| format!("check {}", built.display()))?;
    Ok(bytes)
}

/// Builds the BPF object, puts it through the gate and copies it to [`BPF_OBJECT`].
pub(crate) fn bpf_object() -> Result<()> {
    object(BPF_PACKAGE, BPF_OBJECT)
}

/// Builds what benchmarks put in front of the programs.
pub(crate) fn replay_object() -> Result<()> {
    object(REPLAY_PACKAGE, REPLAY_OBJECT)
}

fn object(package: &str, to: &str) -> Result<()> {
    let bytes = checked_object(Path::new("."), package)?;

    // An unchanged object keeps its time stamp, so that the agent is not built anew.
    if fs::read(to).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    fs::create_dir_all("target/bpf").context("create target/bpf")?;
    // Renamed into place: a build that runs at the same time reads the old object or the new one.
    let fresh = Path::new(BPF_TARGET_DIR).join(format!("{package}.checked"));
    fs::write(&fresh, bytes).with_context(|| format!("write {}", fresh.display()))?;
    fs::rename(&fresh, to).with_context(|| format!("write {to}"))
}

/// Builds the agent and returns its path.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    let mut cmd = proc::cargo();
    cmd.args(["build", "--package", "svc-lb"]);
    if release {
        cmd.arg("--release");
    }
    proc::run(&mut cmd)?;
    let profile = if release { "release" } else { "debug" };
    std::path::absolute(proc::target_dir().join(profile).join("svc-lb")).context("agent's path")
}

/// `cargo <subcommand>` for one of [`BPF_PACKAGES`]: BPF target, its own core, aya's flags.
pub(crate) fn bpf_cargo(subcommand: &str, package: &str) -> Command {
    let mut cmd = proc::cargo();
    cmd.args([subcommand, "--package", package, "--target", bpf_target()])
        .args(["-Z", "build-std=core", "--target-dir", BPF_TARGET_DIR])
        // `-Z` on the pinned stable toolchain.
        .env("RUSTC_BOOTSTRAP", "1")
        // aya-ebpf-bindings picks the kernel's register layout by this cfg; BTF needs debug information.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            [
                &format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
                "-Cdebuginfo=2",
                "-Clink-arg=--btf",
                // 32-bit arithmetic and jumps: kernel 5.1 and later, and we begin at 5.10.
                "-Ctarget-cpu=v3",
            ]
            .join("\x1f"),
        )
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    cmd
}

/// The BPF target with the byte order of the machine that will run it.
fn bpf_target() -> &'static str {
    if cfg!(target_endian = "big") {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    }
}
