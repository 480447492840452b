//! `cargo xtask lint`: everything that is checked without running the code.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::ValueEnum as _;

use crate::setup::{self, Need};
use crate::{build, deps, proc, semantics, tidy};

/// Check formatting, lints, layering, dependencies and documentation.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask lint               everything, stops at the first failure\n  cargo xtask lint --keep-going  everything, reports each failure\n  cargo xtask lint tidy deps     only these steps"
)]
pub(crate) struct Args {
    /// Steps to run; all of them if none is named.
    #[arg(value_enum)]
    steps: Vec<Step>,
    /// Go on after a step failed.
    #[arg(long)]
    keep_going: bool,
}

/// One check, in the order they run: the quick ones first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Step {
    /// rustfmt changes nothing.
    Fmt,
    /// The repository's own rules.
    Tidy,
    /// docs/semantics.md is what the tests say.
    Semantics,
    /// Licences and sources of dependencies.
    Deps,
    /// clippy on what runs on the host.
    Clippy,
    /// clippy on the kernel crate, for the BPF target.
    ClippyBpf,
    /// rustdoc without a warning.
    Docs,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::ensure(&[Need::Build, Need::Lint])?;
    let steps = if args.steps.is_empty() {
        Step::value_variants()
    } else {
        &args.steps
    };
    let mut failed = Vec::new();
    for step in steps {
        let name = step.name();
        eprintln!("lint: {name}");
        let started = Instant::now();
        let result = step.run();
        let seconds = started.elapsed().as_secs_f32();
        match result {
            Ok(()) => eprintln!("lint: {name} ok ({seconds:.1} s)"),
            Err(error) => {
                eprintln!("lint: {name} FAILED ({seconds:.1} s): {error:#}");
                failed.push(name);
                if !args.keep_going {
                    break;
                }
            }
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    Ok(())
}

impl Step {
    fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    fn run(self) -> Result<()> {
        match self {
            Self::Fmt => proc::run(proc::cargo().args(["fmt", "--all", "--check"])),
            Self::Tidy => tidy::check(),
            Self::Semantics => semantics::check(),
            Self::Deps => deps::check(),
            Self::Clippy => proc::run(
                host_packages(proc::cargo().arg("clippy"))
                    .arg("--all-targets")
                    .args(["--", "-D", "warnings"]),
            ),
            Self::ClippyBpf => build::BPF_PACKAGES.into_iter().try_for_each(|package| {
                let mut cmd = build::bpf_cargo("clippy", package);
                proc::run(cmd.args(["--release", "--", "-D", "warnings"]))
            }),
            Self::Docs => proc::run(
                host_packages(proc::cargo().arg("doc"))
                    .arg("--no-deps")
                    .env("RUSTDOCFLAGS", "-D warnings"),
            ),
        }
    }
}

/// Every package but the kernel's, which have no standard library to build against.
fn host_packages(cmd: &mut Command) -> &mut Command {
    let excluded = build::BPF_PACKAGES.map(|package| ["--exclude", package]);
    cmd.arg("--workspace").args(excluded.concat())
}
