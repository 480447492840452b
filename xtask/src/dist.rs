//! `cargo xtask dist`: the agent as one static binary, proved to need nothing else.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::{chdir, chroot, geteuid};

use crate::setup::{self, Need};
use crate::{build, proc};

/// Without NSS modules glibc's static half does all we need: addresses need no lookup, and files and DNS are built in.
const STATIC: &str = "-Ctarget-feature=+crt-static";

/// Build the agent as one static binary and try it in an empty root directory: needs root.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask dist   target/dist/svc-lb, for a node or for deploy/Containerfile"
)]
pub(crate) struct Args {}

/// Runs the command.
pub(crate) fn run(_args: &Args) -> Result<()> {
    setup::ensure(&[Need::Build])?;
    build::bpf_object()?;
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // With a target of its own, build scripts and macros stay as they are.
    proc::run(
        proc::cargo()
            .args([
                "build",
                "--release",
                "--package",
                "svc-lb",
                "--target",
                &target,
            ])
            .env("CARGO_ENCODED_RUSTFLAGS", STATIC),
    )?;
    let built = proc::target_dir().join(&target).join("release/svc-lb");
    let dist = proc::target_dir().join("dist");
    fs::create_dir_all(&dist).with_context(|| format!("create {}", dist.display()))?;
    let binary = dist.join("svc-lb");
    fs::copy(&built, &binary).with_context(|| format!("copy {}", built.display()))?;
    prove(&binary)?;
    let size = fs::metadata(&binary)?.len() / (1 << 20);
    eprintln!("{}: {size} MiB, static", binary.display());
    Ok(())
}

/// Runs the binary where there is nothing else.
fn prove(binary: &Path) -> Result<()> {
    if !geteuid().is_root() {
        bail!("the binary is tried in an empty root directory: run this as root");
    }
    let root = tempfile::tempdir()?;
    fs::copy(binary, root.path().join("svc-lb"))?;
    // `check` says what this machine lacks by its exit code: without /sys and /proc, much. That it runs is the proof.
    for (args, codes) in [(&["--version"][..], &[0][..]), (&["check"], &[0, 3, 4])] {
        let mut command = Command::new("/svc-lb");
        command.args(args).env_clear();
        let inside: PathBuf = root.path().to_owned();
        // SAFETY: between fork and exec it makes two system calls and allocates nothing that another thread could hold.
        unsafe {
            command.pre_exec(move || {
                chroot(&inside)?;
                chdir("/")?;
                Ok(())
            });
        }
        let output = command
            .output()
            .context("start the binary in an empty root directory")?;
        let code = output.status.code();
        ensure!(
            code.is_some_and(|code| codes.contains(&code)),
            "svc-lb {} in an empty root directory: {}\n{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8_lossy(&output.stdout);
        eprintln!(
            "in an empty root directory: svc-lb {}: {}",
            args.join(" "),
            text.lines().next().unwrap_or_default()
        );
    }
    Ok(())
}
