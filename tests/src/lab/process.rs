//! Child processes as guards.
//!
//! Children ask the kernel to be killed when the thread that started them ends, so that a killed test leaves none.
//! All are therefore started by one thread that lives as long as this process.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often a child's end is looked for.
const POLL: Duration = Duration::from_millis(5);

/// A running program; dropping it kills and reaps it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// The exit status if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("wait for {}", self.name))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        self.child
            .kill()
            .with_context(|| format!("kill {}", self.name))?;
        self.child
            .wait()
            .with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// Waits at most `limit` for the end; kills and fails after that.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                self.kill()?;
                bail!("{} did not end within {limit:?}", self.name);
            }
            thread::sleep(POLL);
        }
    }

    /// Collects the output (the command's streams must be pipes) and waits at most `limit`.
    pub fn output(mut self, limit: Duration) -> Result<Output> {
        let mut readers = Vec::new();
        let stdout = self.child.stdout.take();
        let stderr = self.child.stderr.take();
        readers.push(thread::spawn(move || drain(stdout)));
        readers.push(thread::spawn(move || drain(stderr)));
        let status = self.wait(limit)?;
        let mut streams = readers
            .into_iter()
            .map(|reader| reader.join().unwrap_or_default());
        Ok(Output {
            status,
            stdout: streams.next().unwrap_or_default(),
            stderr: streams.next().unwrap_or_default(),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _killed = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn drain(stream: Option<impl std::io::Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        let _read = stream.read_to_end(&mut bytes);
    }
    bytes
}

type Job = (Command, mpsc::Sender<std::io::Result<Child>>);

/// Starts `command`, inside `namespace` and in the cgroup of `threads`, if there are any.
pub(crate) fn keep(
    mut command: Command,
    namespace: Option<File>,
    threads: Option<File>,
) -> Result<Process> {
    static KEEPER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let name = command.get_program().to_string_lossy().into_owned();
    // SAFETY: the closure runs between fork and exec and only makes system calls, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            if let Some(namespace) = &namespace {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
            }
            if let Some(threads) = &threads {
                nix::unistd::write(threads, b"0")?;
            }
            Ok(())
        });
    }
    let keeper = KEEPER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in queue {
                let _sent = answer.send(command.spawn());
            }
        });
        jobs
    });
    let (answer, started) = mpsc::channel();
    keeper
        .send((command, answer))
        .ok()
        .context("the thread that starts children has ended")?;
    let child = started
        .recv()
        .context("the thread that starts children has ended")?
        .with_context(|| format!("start {name}"))?;
    Ok(Process { name, child })
}

/// A command whose output is collected and which reads nothing.
#[must_use]
pub fn collected(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}
