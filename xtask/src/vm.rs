//! `cargo xtask vm`: the agent and its programs on the kernels of Debian's releases, in QEMU.
//!
//! An initramfs holds the agent, an init of our own (`tests/src/bin/vm-init.rs`), the scenarios of `tests/tests/netns.rs`
//! and the kernel modules they need, and nothing else: no distribution to install, a boot takes seconds.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf, absolute};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use cargo_metadata::Message;
use clap::ValueEnum as _;

use crate::setup::{self, Need};
use crate::{build, proc};

mod initramfs;
mod kernel;

/// How the init's lines begin that report the end: `PASS`, or what failed.
const PASS: &str = "svc-lb-vm: PASS";
const FAIL: &str = "svc-lb-vm: FAIL: ";
const INIT: &str = "vm-init";
/// The test program with the lab's scenarios.
const SCENARIOS: &str = "netns";

/// Boot Debian kernels in QEMU and check that svc-lb works on them.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask vm all              5.10, 6.1, 6.12 and the newest\n  cargo xtask vm 5.10             one kernel\n  cargo xtask vm 5.10 -- lab      one test of the init (tests/src/bin/vm-init.rs)\n  cargo xtask vm 6.1 -- remote::  scenarios of tests/tests/netns.rs by a part of their names\n\nConsoles are kept in target/vm/<kernel>/console.log."
)]
pub(crate) struct Args {
    /// Kernels to boot.
    #[arg(value_enum, required = true)]
    kernels: Vec<Kernel>,
    /// Tests to run inside, or parts of scenarios' names; the init's own choice for the kernel if none is named.
    #[arg(last = true)]
    tests: Vec<String>,
    /// Give up on a kernel after this many seconds.
    #[arg(long, default_value_t = 1200)]
    timeout: u64,
    /// Use the processor's virtualisation instead of emulation.
    #[arg(long)]
    kvm: bool,
    /// Fetch the kernels again, to get the suite's newest.
    #[arg(long)]
    refresh: bool,
}

/// A kernel and where it is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kernel {
    /// Debian 11: the oldest we serve.
    #[value(name = "5.10")]
    V5_10,
    /// Debian 12: everything but tcx.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13.
    #[value(name = "6.12")]
    V6_12,
    /// The newest in Debian's backports.
    Latest,
    /// Each of these.
    All,
}

impl Kernel {
    fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    fn suite(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::Latest | Self::All => "trixie-backports",
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("cargo xtask vm boots x86-64 kernels with the agent of this machine: x86-64 only");
    }
    setup::ensure(&[Need::Build, Need::Vm])?;
    setup::debian_keys()?;
    build::bpf_object()?;
    // The profile that tests and demo use, so that a fresh machine builds once.
    let agent = build::agent(false)?;
    proc::run(proc::cargo().args(["build", "--package", "svc-lb-tests", "--bin", INIT]))?;
    let init = proc::target_dir().join("debug").join(INIT);
    let scenarios = scenarios()?;
    let object = absolute(build::BPF_OBJECT)?;

    let mut kernels = args.kernels.clone();
    if kernels.contains(&Kernel::All) {
        kernels = Kernel::value_variants().to_vec();
        kernels.retain(|kernel| *kernel != Kernel::All);
    }
    let mut reports = Vec::new();
    for kernel in kernels {
        let name = kernel.name();
        let dir = absolute(Path::new("target/vm").join(&name))?;
        let unpacked = kernel::fetch(kernel.suite(), &dir, args.refresh)
            .with_context(|| format!("kernel {name}"))?;
        let initramfs = dir.join("initramfs.cpio");
        let programs = initramfs::Programs {
            init: &init,
            agent: &agent,
            scenarios: &scenarios,
            object: &object,
        };
        initramfs::write(&initramfs, &unpacked, &programs)?;
        let boot = Boot {
            name: &name,
            kernel: &unpacked.image,
            initramfs: &initramfs,
            console: &dir.join("console.log"),
            tests: &args.tests,
            timeout: Duration::from_secs(args.timeout),
            kvm: args.kvm,
        };
        let started = Instant::now();
        let result = boot.run();
        reports.push((name, unpacked.release, result, started.elapsed()));
    }

    let mut failed = Vec::new();
    for (name, release, result, took) in &reports {
        let outcome = match result {
            Ok(()) => "pass".to_owned(),
            Err(error) => {
                failed.push(name.as_str());
                format!("FAIL: {error:#}")
            }
        };
        eprintln!(
            "vm: {name:<7} {release:<30} {outcome} ({:.1} s)",
            took.as_secs_f32()
        );
    }
    if !failed.is_empty() {
        bail!("failed on {}", failed.join(", "));
    }
    Ok(())
}

/// Builds the scenarios' test program and returns its path.
fn scenarios() -> Result<PathBuf> {
    let mut cargo = proc::cargo();
    cargo.args(["test", "--no-run", "--package", "svc-lb-tests"]);
    cargo.args(["--test", SCENARIOS, "--message-format", "json"]);
    let messages = proc::capture_bytes(&mut cargo)?;
    let mut executable = None;
    for message in Message::parse_stream(messages.as_slice()) {
        // The package's own programs are built as well.
        if let Message::CompilerArtifact(artifact) = message?
            && artifact.target.name == SCENARIOS
        {
            executable = artifact.executable.or(executable);
        }
    }
    Ok(executable.context("cargo built no test program")?.into())
}

/// One boot of one kernel.
struct Boot<'a> {
    name: &'a str,
    kernel: &'a Path,
    initramfs: &'a Path,
    console: &'a Path,
    tests: &'a [String],
    timeout: Duration,
    kvm: bool,
}

impl Boot<'_> {
    /// Boots, passes the console on line by line, and waits for the machine to stop.
    fn run(&self) -> Result<()> {
        let mut log = File::create(self.console)
            .with_context(|| format!("create {}", self.console.display()))?;
        let mut cmd = self.qemu();
        let mut machine = cmd
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", proc::line(&cmd)))?;
        let console = machine.stdout.take().context("QEMU has no output")?;
        let (sender, lines) = mpsc::channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });

        let deadline = Instant::now() + self.timeout;
        let mut passed = false;
        let mut failure = None;
        let ended = loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    let line = String::from_utf8_lossy(&line);
                    let line = line.trim_end();
                    writeln!(log, "{line}")?;
                    eprintln!("[{}] {line}", self.name);
                    passed |= line.ends_with(PASS);
                    failure = failure.or_else(|| Some(line.split_once(FAIL)?.1.to_owned()));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break true,
                Err(mpsc::RecvTimeoutError::Timeout) => break false,
            }
        };
        if !ended {
            machine.kill().context("stop QEMU")?;
        }
        let status = machine.wait().context("wait for QEMU")?;
        // The pipe is closed now, so the reader has ended; it cannot panic.
        let _ended = reader.join();
        if !ended {
            bail!(
                "still running after {} s; console: {}",
                self.timeout.as_secs(),
                self.console.display()
            );
        }
        if !status.success() {
            bail!("QEMU: {status}");
        }
        if let Some(failure) = failure {
            bail!("{failure}; console: {}", self.console.display());
        }
        if !passed {
            bail!("no {PASS:?} on the console: {}", self.console.display());
        }
        Ok(())
    }

    fn qemu(&self) -> Command {
        let mut cmd = Command::new("qemu-system-x86_64");
        // Emulation works everywhere; nested virtualisation may break in ways of its own. QEMU 7.2's emulation of
        // cmpxchg16b damages registers now and then: one boot in ten of 6.12 ended in a double fault in the
        // allocator, none of 55 without the instruction.
        let (accelerator, cpu) = if self.kvm {
            ("kvm", "max")
        } else {
            ("tcg", "max,-cx16")
        };
        cmd.args(["-accel", accelerator, "-cpu", cpu])
            .args(["-smp", "2", "-m", "2048"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
            .args(["-no-reboot", "-kernel"])
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs);
        // On a busy machine an emulated timer looks broken to the kernel, which then gives up: no_timer_check.
        // A setting the kernel does not know goes into the init's environment; what follows `--` into its arguments.
        let tests = self.tests.join(" ");
        cmd.arg("-append").arg(format!(
            "console=ttyS0 no_timer_check panic=-1 loglevel=4 rdinit=/init SVC_LB_BIN=/bin/svc-lb PATH=/bin -- {tests}"
        ));
        cmd
    }
}
