//! `cargo xtask setup`: makes a bare Debian or Ubuntu machine with rustup ready.
//!
//! Every part is probed for, not remembered, so that a second run does nothing and a broken part is repaired.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use nix::unistd::geteuid;

use crate::{apt, proc};

/// Its default LLVM is that of the pinned rustc; another version may not read rustc's bitcode.
const BPF_LINKER: &str = "0.10.3";

/// Programs the lab calls and the packages that hold them.
const LAB_TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("ethtool", "ethtool"),
    ("nginx", "nginx"),
    // dnsmasq-base is the program alone: no system service.
    ("dnsmasq", "dnsmasq-base"),
    ("curl", "curl"),
    ("openssl", "openssl"),
    ("dig", "bind9-dnsutils"),
];

/// Programs `cargo xtask vm` calls.
const VM_TOOLS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("xz", "xz-utils"),
];

/// Make this machine ready to build and test; does only what is missing.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask setup         what build, test and demo need\n  cargo xtask setup --vm    also QEMU, for cargo xtask vm"
)]
pub(crate) struct Args {
    /// Also install what `cargo xtask vm` needs.
    #[arg(long)]
    vm: bool,
    /// Where to take the sources of Rust's core library from.
    #[arg(long, value_enum, default_value_t = RustSrc::Auto)]
    rust_src: RustSrc,
}

/// Sources of the `rust-src` component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RustSrc {
    /// rustup, and where that fails Debian.
    Auto,
    /// Only `rustup component add`.
    Rustup,
    /// Only Debian's package of the same version; replaces what is there.
    Debian,
}

/// What a command needs of setup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// bpf-linker and rust-src: enough to build.
    Build,
    /// The programs the lab, the tests and the demo call.
    Lab,
    /// QEMU.
    Vm,
    /// clippy and rustfmt.
    Lint,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    bpf_linker()?;
    rust_src(args.rust_src)?;
    ensure(&[Need::Lab, Need::Lint])?;
    if args.vm {
        ensure(&[Need::Vm])?;
    }
    eprintln!(
        "setup: ready ({:.1} s): bpf-linker {BPF_LINKER}, rust-src, clippy, rustfmt, {}",
        started.elapsed().as_secs_f32(),
        LAB_TOOLS
            .iter()
            .chain(VM_TOOLS.iter().filter(|_| args.vm))
            .map(|(program, _)| *program)
            .collect::<Vec<_>>()
            .join(", ")
    );
    Ok(())
}

/// Makes the given parts ready; silent where nothing is missing.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    for need in needs {
        match need {
            Need::Build => {
                bpf_linker()?;
                rust_src(RustSrc::Auto)?;
            }
            Need::Lab => packages("the lab", LAB_TOOLS)?,
            Need::Vm => packages("cargo xtask vm", VM_TOOLS)?,
            Need::Lint => lint_components()?,
        }
    }
    Ok(())
}

/// Installs the linker for the BPF target unless this very version is there.
fn bpf_linker() -> Result<()> {
    let present = proc::capture(Command::new("bpf-linker").arg("--version"));
    if present.is_ok_and(|version| version.split_whitespace().any(|word| word == BPF_LINKER)) {
        return Ok(());
    }
    eprintln!("setup: bpf-linker {BPF_LINKER} is missing: compiling it");
    proc::run_quiet(
        &format!("cargo install bpf-linker {BPF_LINKER} (about 2 minutes on 2 cores)"),
        proc::cargo().args([
            "install",
            "bpf-linker",
            "--version",
            BPF_LINKER,
            "--locked",
            "--force",
        ]),
    )
}

/// Puts the sources of Rust's core library where `-Z build-std` looks for them.
fn rust_src(from: RustSrc) -> Result<()> {
    let dir = rust_src_dir()?;
    if from == RustSrc::Debian {
        return rust_src_debian(&dir);
    }
    if rust_src_present(&dir) {
        return Ok(());
    }
    eprintln!("setup: rust-src is missing: adding it to the toolchain");
    let added = proc::run_quiet("rustup component add rust-src", &mut rustup_add("rust-src"))
        .and_then(|()| {
            if rust_src_present(&dir) {
                return Ok(());
            }
            bail!(
                "rustup takes rust-src for installed, but {} does not hold it; \
             `rustup component remove rust-src` helps",
                dir.display()
            )
        });
    match added {
        Err(error) if from == RustSrc::Auto => {
            eprintln!("setup: rustup could not: {error:#}");
            eprintln!("setup: taking rust-src of the same version from Debian instead");
            rust_src_debian(&dir)
        }
        done => done,
    }
}

/// `$(rustc --print sysroot)/lib/rustlib/src/rust` of the pinned toolchain.
fn rust_src_dir() -> Result<PathBuf> {
    let sysroot = proc::capture(Command::new("rustc").args(["--print", "sysroot"]))?;
    Ok(Path::new(&sysroot).join("lib/rustlib/src/rust"))
}

fn rust_src_present(dir: &Path) -> bool {
    ["library/Cargo.lock", "library/core/src/lib.rs"]
        .iter()
        .all(|file| dir.join(file).is_file())
}

/// Unpacks Debian's package of rustc's own version; it is built from the same source release.
fn rust_src_debian(dir: &Path) -> Result<()> {
    let version = proc::capture(Command::new("rustc").arg("--version"))?;
    let version = version
        .split_whitespace()
        .nth(1)
        .context("rustc --version prints no version")?
        .to_owned();
    debian_keys()?;
    let deb = apt::Suite::open("trixie-backports")?.download("rust-src", &format!("{version}+"))?;

    // Unpacked beside its place and renamed, so that a killed run leaves no half of it.
    let parent = dir.parent().context("rust-src directory has no parent")?;
    fs::create_dir_all(parent).with_context(|| {
        format!(
            "create {}: run as the user who owns the toolchain",
            parent.display()
        )
    })?;
    let fresh = tempfile::tempdir_in(parent)
        .with_context(|| format!("create a directory in {}", parent.display()))?;
    let progress = proc::Progress::start("unpack rust-src");
    apt::unpack(
        &deb,
        &format!("usr/src/rustc-{version}/library"),
        3,
        fresh.path(),
    )?;
    progress.done();
    if !rust_src_present(fresh.path()) {
        bail!("{} does not hold the library's sources", deb.display());
    }
    if dir.symlink_metadata().is_ok() {
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    let fresh = fresh.keep();
    fs::rename(&fresh, dir)
        .with_context(|| format!("rename {} to {}", fresh.display(), dir.display()))?;
    Ok(())
}

/// Ubuntu does not install the keys of Debian's archive.
pub(crate) fn debian_keys() -> Result<()> {
    if Path::new(apt::KEYRING).exists() {
        return Ok(());
    }
    require_root("the lab's packages", &["debian-archive-keyring"])?;
    apt::install(&["debian-archive-keyring"])
}

/// Installs the packages whose programs are missing.
fn packages(what: &str, tools: &[(&str, &'static str)]) -> Result<()> {
    let mut missing: Vec<&str> = tools
        .iter()
        .filter(|(program, _)| proc::find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: {what} needs packages: {}", missing.join(", "));
    require_root(what, &missing)?;
    apt::install(&missing)?;
    if missing.contains(&"nginx") && Path::new("/run/systemd/system").exists() {
        proc::run_quiet(
            "keep the nginx service off",
            Command::new("systemctl").args(["disable", "--now", "nginx"]),
        )?;
    }
    match tools
        .iter()
        .find(|(program, _)| proc::find(program).is_none())
    {
        None => Ok(()),
        Some((program, package)) => bail!("{package} is installed but {program} is not in PATH"),
    }
}

fn require_root(what: &str, packages: &[&str]) -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "{what}: installing packages needs root; run this command as root, or first\n    \
         sudo apt-get install --no-install-recommends {}",
        packages.join(" ")
    )
}

/// clippy and rustfmt are not part of a minimal toolchain.
fn lint_components() -> Result<()> {
    for (program, component) in [("cargo-clippy", "clippy"), ("rustfmt", "rustfmt")] {
        if proc::capture(Command::new(program).arg("--version")).is_err() {
            proc::run_quiet(
                &format!("rustup component add {component}"),
                &mut rustup_add(component),
            )?;
        }
    }
    Ok(())
}

fn rustup_add(component: &str) -> Command {
    let mut cmd = Command::new("rustup");
    cmd.args(["component", "add", component])
        // Its stack traces would bury its message.
        .env_remove("RUST_BACKTRACE");
    cmd
}
