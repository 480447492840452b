//! `cargo xtask test`: every level of tests, with one summary at the end.
//!
//! `unit` needs nothing. The other levels live in `tests/tests/`, one file each; they load BPF programs and make
//! network namespaces, so they need root, and fail without it unless told to skip.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _, stdout};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fmt};

use anyhow::{Context as _, Result, bail};
use nix::unistd::geteuid;

use crate::setup::{self, Need};
use crate::{build, proc};

/// Set to 1 to report the levels that need root as skipped instead of running them.
const SKIP_ROOT: &str = "SVC_LB_TEST_SKIP_ROOT";
/// The package whose tests need root.
const ROOT_PACKAGE: &str = "svc-lb-tests";

/// Run the tests. All levels but `unit` need root.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask test                            every level\n  cargo xtask test unit                       without root\n  cargo xtask test netns -- hairpin           tests of one level by name\n  SVC_LB_TEST_SKIP_ROOT=1 cargo xtask test    what needs root is reported as skipped\n\nThe last line is \"N passed, N failed, N skipped\"."
)]
pub(crate) struct Args {
    /// Which tests to run.
    #[arg(value_enum, default_value_t = Level::All)]
    level: Level,
    /// Passed to the test programs, for example a part of a test's name.
    #[arg(last = true)]
    args: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// Pure code of the host crates.
    Unit,
    /// The BPF programs on made-up packets, against a reference, and in the verifier.
    Prog,
    /// Real sockets in network namespaces.
    Netns,
    /// Kubernetes objects in, maps out.
    Reconcile,
    /// All of these.
    All,
}

/// One run of `cargo test`.
struct Suite {
    name: String,
    level: Level,
    /// What `cargo test` is to test.
    select: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let suites: Vec<Suite> = suites()?
        .into_iter()
        .filter(|suite| args.level == Level::All || args.level == suite.level)
        .collect();
    let skip_root = env::var_os(SKIP_ROOT).is_some_and(|value| value == "1");
    let root_suites = suites.iter().any(Suite::needs_root);
    if root_suites && !skip_root && !geteuid().is_root() {
        bail!(
            "these tests load BPF programs and make network namespaces: run them as root, or set \
             {SKIP_ROOT}=1 to skip what needs root"
        );
    }

    let mut agent = None;
    if root_suites {
        setup::ensure(&[Need::Build])?;
        if !skip_root {
            setup::ensure(&[Need::Lab])?;
        }
        build::bpf_object()?;
        agent = Some(build::agent(false)?);
    }
    let mut reports = Vec::new();
    for suite in &suites {
        eprintln!("test: {}", suite.name);
        let started = Instant::now();
        let tally = if suite.needs_root() && skip_root {
            suite.count_skipped()?
        } else {
            suite.run(agent.as_deref(), &args.args)?
        };
        reports.push((suite, tally, started.elapsed()));
    }
    summary(&reports)
}

/// Prints a line per suite, then the sum.
fn summary(reports: &[(&Suite, Tally, Duration)]) -> Result<ExitCode> {
    let mut out = stdout().lock();
    let mut total = Tally::default();
    writeln!(out)?;
    for (suite, tally, took) in reports {
        writeln!(
            out,
            "{:<12} {tally} ({:.1} s)",
            suite.name,
            took.as_secs_f32()
        )?;
        total += *tally;
    }
    writeln!(out, "{total}")?;
    Ok(if total.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Every suite, the quick ones first.
fn suites() -> Result<Vec<Suite>> {
    let mut suites = vec![
        Suite::new(
            "unit",
            Level::Unit,
            &[
                "--workspace",
                "--exclude",
                build::BPF_PACKAGE,
                "--exclude",
                ROOT_PACKAGE,
            ],
        ),
        Suite::new(
            "harness",
            Level::Prog,
            &["--package", ROOT_PACKAGE, "--lib", "--bins"],
        ),
    ];
    let mut files = Vec::new();
    for entry in fs::read_dir("tests/tests").into_iter().flatten() {
        let path: PathBuf = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let stem = path.file_stem().unwrap_or_default();
            files.push(stem.to_string_lossy().into_owned());
        }
    }
    // Cheap levels first, so that a broken program shows before the lab is built.
    files.sort_by_key(|stem| (level_of(stem) as u8, stem.clone()));
    suites.extend(files.iter().map(|stem| {
        Suite::new(
            stem,
            level_of(stem),
            &["--package", ROOT_PACKAGE, "--test", stem],
        )
    }));
    Ok(suites)
}

/// The level a file of `tests/tests/` belongs to; what is not known uses the lab.
fn level_of(stem: &str) -> Level {
    match stem {
        "prog" | "reference" | "seeded_bugs" | "verifier" => Level::Prog,
        "cases" | "reconcile" => Level::Reconcile,
        _ => Level::Netns,
    }
}

impl Suite {
    fn new(name: &str, level: Level, select: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            level,
            select: select.iter().map(|&part| part.to_owned()).collect(),
        }
    }

    fn needs_root(&self) -> bool {
        self.level != Level::Unit
    }

    fn cargo_test(&self) -> Command {
        let mut cmd = proc::cargo();
        cmd.arg("test").args(&self.select);
        cmd
    }

    /// Runs the suite, passing its output on.
    fn run(&self, agent: Option<&Path>, args: &[String]) -> Result<Tally> {
        let mut cmd = self.cargo_test();
        cmd.args(["--no-fail-fast", "--"]);
        if self.level == Level::Netns {
            // Scenarios share one lab and measure: not side by side.
            cmd.arg("--test-threads=1");
        }
        if let Some(agent) = agent {
            cmd.env("SVC_LB_BIN", agent);
        }
        let mut child = cmd
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", proc::line(&cmd)))?;
        let output = child.stdout.take().context("cargo test has no output")?;
        let mut tally = Tally::default();
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            if let Some(result) = Tally::parse(&line) {
                tally += result;
            }
            writeln!(stdout(), "{line}")?;
        }
        let status = child.wait().context("wait for cargo test")?;
        if !status.success() && tally.failed == 0 {
            // It did not compile, or a test program died before it could count.
            writeln!(
                stdout(),
                "{}: {} did not run to its end: {status}",
                self.name,
                proc::line(&cmd)
            )?;
            tally.failed = 1;
        }
        Ok(tally)
    }

    /// Compiles the suite and counts its tests as skipped.
    fn count_skipped(&self) -> Result<Tally> {
        let list = proc::capture(
            self.cargo_test()
                .args(["--", "--list", "--format", "terse"]),
        )?;
        let skipped = list.lines().filter(|line| line.ends_with(": test")).count();
        writeln!(stdout(), "{}: skipped, {SKIP_ROOT} is set", self.name)?;
        Ok(Tally {
            skipped,
            ..Tally::default()
        })
    }
}

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Tally {
    /// Reads libtest's "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; ...".
    fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |what: &str| {
            counts
                .split("; ")
                .find_map(|part| part.strip_suffix(what)?.trim().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            skipped: count("ignored")?,
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn results_of_libtest_are_read() {
        let line = "test result: FAILED. 13 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.05s";
        assert_eq!(
            Tally::parse(line),
            Some(Tally {
                passed: 13,
                failed: 2,
                skipped: 1
            })
        );
        assert_eq!(Tally::parse("test a::b ... ok"), None);
    }
}
