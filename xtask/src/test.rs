//! `cargo xtask test`: every level of tests, with one summary at the end.
//!
//! `unit` needs nothing. The other levels live in `tests/tests/`, one file each; they load BPF programs and make
//! network namespaces, so they need root, and fail without it unless told to skip.

use std::collections::BTreeSet;
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
use crate::{build, proc, semantics};

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
        let (tally, passed) = if suite.needs_root() && skip_root {
            (suite.count_skipped()?, None)
        } else {
            let (tally, passed) = suite.run(agent.as_deref(), &args.args)?;
            (tally, Some(passed))
        };
        reports.push(Report {
            suite,
            tally,
            passed,
            took: started.elapsed(),
        });
    }
    let proved = if args.args.is_empty() {
        rows_are_proved(&reports, args.level)?
    } else {
        true
    };
    let total = summary(&reports)?;
    Ok(if total.failed == 0 && proved {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What came of a suite.
struct Report<'a> {
    suite: &'a Suite,
    tally: Tally,
    /// Names of tests; none where the suite was skipped.
    passed: Option<BTreeSet<String>>,
    took: Duration,
}

/// Whether each test that claims to prove a row of docs/semantics.md ran and passed, of the suites that ran; and, after
/// all suites, whether the document says what the tests do.
fn rows_are_proved(reports: &[Report<'_>], level: Level) -> Result<bool> {
    let mut problems = Vec::new();
    for claim in semantics::claims()? {
        let report = reports
            .iter()
            .find(|report| report.suite.name == claim.suite);
        let Some(passed) = report.and_then(|report| report.passed.as_ref()) else {
            continue;
        };
        for test in claim.tests.iter().filter(|test| !passed.contains(*test)) {
            let rows = claim.rows();
            problems.push(format!(
                "{}: {test} claims {rows}, and did not run and pass",
                claim.suite
            ));
        }
    }
    if level == Level::All {
        problems.extend(semantics::check().err().map(|error| format!("{error:#}")));
    }
    let mut out = stdout().lock();
    for problem in &problems {
        writeln!(out, "semantics: {problem}")?;
    }
    Ok(problems.is_empty())
}

/// Prints a line per suite, then the sum.
fn summary(reports: &[Report<'_>]) -> Result<Tally> {
    let mut out = stdout().lock();
    let mut total = Tally::default();
    writeln!(out)?;
    for report in reports {
        let Report {
            suite, tally, took, ..
        } = report;
        writeln!(
            out,
            "{:<12} {tally} ({:.1} s)",
            suite.name,
            took.as_secs_f32()
        )?;
        total += *tally;
    }
    writeln!(out, "{total}")?;
    Ok(total)
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
                build::BPF_PACKAGES[0],
                "--exclude",
                build::BPF_PACKAGES[1],
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
        "cases" | "reconcile" | "sources" => Level::Reconcile,
        _ => Level::Netns,
    }
}

/// The suite that runs the tests of a source file, and the path of the file's module.
pub(crate) fn suite_of(path: &str) -> Option<(&str, Vec<&str>)> {
    let path = path.strip_suffix(".rs")?;
    let (suite, modules) = if let Some(path) = path.strip_prefix("tests/tests/") {
        path.split_once('/').unwrap_or((path, ""))
    } else if let Some(path) = path.strip_prefix("tests/src/bin/") {
        (
            "harness",
            path.split_once('/').map_or("", |(_, modules)| modules),
        )
    } else if let Some(path) = path.strip_prefix("tests/src/") {
        ("harness", path)
    } else {
        ("unit", path.split_once("/src/")?.1)
    };
    let mut modules: Vec<&str> = modules.split('/').filter(|part| !part.is_empty()).collect();
    modules.pop_if(|last| matches!(*last, "mod" | "lib" | "main"));
    Some((suite, modules))
}

/// Collects the tests that passed from what libtest, or a program that writes as libtest does, says.
#[derive(Debug, Default)]
struct Passed {
    names: BTreeSet<String>,
    /// A test whose line broke off, as when it runs for long: its result has a line of its own.
    begun: Option<String>,
}

impl Passed {
    fn read(&mut self, line: &str) {
        let test = line
            .strip_prefix("test ")
            .and_then(|line| line.split_once(" ... "));
        match test {
            Some((name, result)) => {
                let name = name.trim_end();
                let name = name.strip_suffix(" - should panic").unwrap_or(name);
                self.begun = Some(name.to_owned());
                self.result(result);
            }
            None => self.result(line),
        }
    }

    fn result(&mut self, result: &str) {
        match result {
            "ok" => self.names.extend(self.begun.take()),
            "FAILED" => self.begun = None,
            ignored if ignored.starts_with("ignored") => self.begun = None,
            _ => {}
        }
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

    /// Runs the suite, passing its output on; with the names of the tests that passed.
    fn run(&self, agent: Option<&Path>, args: &[String]) -> Result<(Tally, BTreeSet<String>)> {
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
        let mut passed = Passed::default();
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            if let Some(result) = Tally::parse(&line) {
                tally += result;
            }
            passed.read(&line);
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
        Ok((tally, passed.names))
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
    use super::{Passed, Tally, suite_of};

    #[test]
    fn passed_tests_are_told_by_name() {
        let mut passed = Passed::default();
        for line in [
            "running 7 tests",
            "test a::b ... ok",
            "test area/x::memory   ... ok",
            "test c - should panic ... ok",
            "test d ... FAILED",
            "test e ... ignored, why",
            "test f ... test f has been running for over 60 seconds",
            "ok",
            "test g ... words of its own",
            "FAILED",
            "ok",
            "test result: FAILED. 4 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.05s",
        ] {
            passed.read(line);
        }
        assert_eq!(
            passed.names.iter().map(String::as_str).collect::<Vec<_>>(),
            ["a::b", "area/x::memory", "c", "f"]
        );
    }

    #[test]
    fn files_belong_to_suites() {
        for (path, suite, modules) in [
            ("svc-lb/src/lib.rs", "unit", &[][..]),
            ("svc-lb/src/compile/tests.rs", "unit", &["compile", "tests"]),
            ("svc-lb/src/compile/mod.rs", "unit", &["compile"]),
            ("tests/src/prog/rig.rs", "harness", &["prog", "rig"]),
            ("tests/src/bin/one/two.rs", "harness", &["two"]),
            ("tests/src/bin/one.rs", "harness", &[]),
            ("tests/tests/netns.rs", "netns", &[]),
            ("tests/tests/netns/reach.rs", "netns", &["reach"]),
        ] {
            assert_eq!(suite_of(path), Some((suite, modules.to_vec())), "{path}");
        }
        assert_eq!(suite_of("README.md"), None);
    }

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
