//! Running other programs: with their output shown, captured, or behind a progress line.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use std::{env, iter};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Where the output of quiet steps is kept.
const LOG_DIR: &str = "target/xtask";
/// Lines of a failed step's output to repeat on the terminal.
const TAIL_LINES: usize = 30;
/// How often a long step says that it is still alive where no progress line can be drawn.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Runs `cmd` with the terminal as its input and output; a non-zero exit is an error that names the command.
pub(crate) fn run(cmd: &mut Command) -> Result<()> {
    let status = cmd
        .status()
        .with_context(|| format!("start {}", line(cmd)))?;
    if !status.success() {
        bail!("{} failed: {status}", line(cmd));
    }
    Ok(())
}

/// Runs `cmd` and returns what it printed to standard output, without the final newline.
pub(crate) fn capture(cmd: &mut Command) -> Result<String> {
    let text = String::from_utf8(capture_bytes(cmd)?)
        .with_context(|| format!("output of {} is not UTF-8", line(cmd)))?;
    Ok(text.trim_end().to_owned())
}

/// Runs `cmd` and returns what it wrote to standard output.
pub(crate) fn capture_bytes(cmd: &mut Command) -> Result<Vec<u8>> {
    let output = cmd
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", line(cmd)))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}\n{}",
            line(cmd),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(output.stdout)
}

/// Runs `cmd` behind a progress line that shows `label` and the latest line of output.
///
/// The whole output goes to a log file; its end is shown if the command fails. `label` should say how long the
/// step takes if that is more than a few seconds.
pub(crate) fn run_quiet(label: &str, cmd: &mut Command) -> Result<()> {
    let log_path = log_path(label)?;
    let mut log =
        File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
    writeln!(log, "$ {}", line(cmd))?;

    let mut child = cmd
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", line(cmd)))?;
    let (sender, lines) = mpsc::channel();
    let stderr = child.stderr.take().map(|e| forward(e, sender.clone()));
    let stdout = child.stdout.take().map(|o| forward(o, sender));

    let progress = Progress::start(label);
    let mut tail = Vec::new();
    loop {
        match lines.recv_timeout(HEARTBEAT) {
            Ok(text) => {
                progress.show(&text);
                writeln!(log, "{text}")?;
                tail.push(text);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => progress.beat(),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    for reader in [stdout, stderr].into_iter().flatten() {
        // A reader ends when its pipe closes; it cannot panic.
        let _ended = reader.join();
    }
    let status = child
        .wait()
        .with_context(|| format!("wait for {}", line(cmd)))?;
    if status.success() {
        progress.done();
        return Ok(());
    }
    progress.failed();
    let skipped = tail.len().saturating_sub(TAIL_LINES);
    let mut shown = String::new();
    for text in tail.iter().skip(skipped) {
        writeln!(shown, "    {text}")?;
    }
    bail!(
        "{} failed: {status}\n{shown}    whole output: {}",
        line(cmd),
        log_path.display()
    )
}

/// A line on standard error that says which step runs and for how long.
pub(crate) struct Progress {
    label: String,
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    /// Shows `label` at once; where there is no terminal it is printed as a plain line.
    pub(crate) fn start(label: &str) -> Self {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(120));
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}")
        {
            bar.set_style(style);
        }
        bar.set_prefix(label.to_owned());
        if bar.is_hidden() {
            eprintln!("  ...  {label}");
        }
        Self {
            label: label.to_owned(),
            bar,
            started: Instant::now(),
        }
    }

    /// Replaces the text behind the label.
    pub(crate) fn show(&self, text: &str) {
        self.bar.set_message(text.trim().to_owned());
    }

    /// Says that the step still runs, where no line can be redrawn.
    fn beat(&self) {
        if self.bar.is_hidden() {
            eprintln!(
                "  ...  {} (running for {} s)",
                self.label,
                self.started.elapsed().as_secs()
            );
        }
    }

    /// Ends the line with the time the step took.
    pub(crate) fn done(&self) {
        self.end("done");
    }

    /// Ends the line of a step that failed.
    pub(crate) fn failed(&self) {
        self.end("FAIL");
    }

    fn end(&self, word: &str) {
        self.bar.finish_and_clear();
        eprintln!(
            "  {word}  {} ({:.1} s)",
            self.label,
            self.started.elapsed().as_secs_f32()
        );
    }
}

/// The file for the output of the step called `label`.
fn log_path(label: &str) -> Result<PathBuf> {
    fs::create_dir_all(LOG_DIR).with_context(|| format!("create {LOG_DIR}"))?;
    let name: String = label
        .chars()
        .take_while(|c| *c != '(')
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    Ok(Path::new(LOG_DIR).join(format!("{}.log", name.trim_matches('-'))))
}

/// Sends each line of `from` to `sender` until it ends.
fn forward(
    from: impl Read + Send + 'static,
    sender: mpsc::Sender<String>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for text in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            if sender
                .send(String::from_utf8_lossy(&text).into_owned())
                .is_err()
            {
                return;
            }
        }
    })
}

/// `cmd` as one would type it, for messages.
pub(crate) fn line(cmd: &Command) -> String {
    let program = Path::new(cmd.get_program());
    iter::once(program.file_name().unwrap_or_default())
        .chain(cmd.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The cargo that runs us, so that every step uses the pinned toolchain.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The path of `program` in `PATH` or in the directories for system programs, which `PATH` may lack.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// cargo's target directory for host builds.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}
