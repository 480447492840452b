//! Names and locks of a lab's run, and the removal of what killed runs left behind.
//!
//! A run holds an exclusive flock on `/run/svc-lb-lab/<id>.lock` as long as it lives; whatever carries the name of a
//! run whose lock is free belongs to nobody and may go.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup;

/// Where the locks live.
pub const LOCKS: &str = "/run/svc-lb-lab";
/// Where named network namespaces live, as iproute2 has it.
pub const NAMESPACES: &str = "/run/netns";
/// Namespaces of the lab are named `svclb-<run>-<namespace>`.
pub const PREFIX: &str = "svclb-";
/// Where BPF objects are pinned.
pub const BPFFS: &str = "/sys/fs/bpf";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// One lab's identity.
#[derive(Debug)]
pub struct Run {
    id: String,
    lock_path: PathBuf,
    _lock: Flock<File>,
    _machine: Option<Flock<File>>,
}

impl Run {
    /// Sweeps dead runs, then takes a new name and locks it.
    ///
    /// Labs share the machine with each other; a test that has it alone says so by `machine`.
    pub fn start(machine: Option<&Machine>) -> Result<Self> {
        let machine = match machine {
            Some(_alone) => None,
            None => Some(machine_lock(FlockArg::LockShared)?),
        };
        sweep()?;
        let id = format!(
            "{}x{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let lock_path = Path::new(LOCKS).join(format!("{id}.lock"));
        loop {
            let file = open_lock(&lock_path)?;
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
                && same_file(&lock, &lock_path)
            {
                return Ok(Self {
                    id,
                    lock_path,
                    _lock: lock,
                    _machine: machine,
                });
            }
        }
    }

    /// The run's name: process id and a number.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pin directory of the run's agents.
    #[must_use]
    pub fn pin_dir(&self) -> PathBuf {
        pin_dir(&self.id)
    }

    /// The admin socket of the run's agent; short, as the paths of sockets must be.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        admin_socket(&self.id)
    }

    /// The full name of one of the run's namespaces.
    #[must_use]
    pub fn namespace(&self, name: &str) -> String {
        format!("{PREFIX}{}-{name}", self.id)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // An agent that a failed test left behind.
        if let Err(error) = remove_pins(&self.pin_dir()) {
            eprintln!("lab: {error:#}");
        }
        let _gone = fs::remove_file(self.admin_socket());
        cgroup::remove_run(&self.id);
        let _gone = fs::remove_file(&self.lock_path);
    }
}

/// The whole machine for one test: no lab but its own lives while this does.
#[derive(Debug)]
pub struct Machine {
    _lock: Flock<File>,
}

impl Machine {
    /// Waits until every lab on the machine is gone and keeps new ones waiting.
    pub fn alone() -> Result<Self> {
        let lock = machine_lock(FlockArg::LockExclusive)?;
        sweep()?;
        Ok(Self { _lock: lock })
    }
}

fn machine_lock(how: FlockArg) -> Result<Flock<File>> {
    let path = Path::new(LOCKS).join("machine");
    Flock::lock(open_lock(&path)?, how)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("lock {}", path.display()))
}

fn open_lock(path: &Path) -> Result<File> {
    fs::create_dir_all(LOCKS).with_context(|| format!("create {LOCKS}"))?;
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

/// Whether `path` still names the open file: a sweep may have removed it between open and lock.
fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => open.ino() == named.ino() && open.dev() == named.dev(),
        _ => false,
    }
}

fn pin_dir(id: &str) -> PathBuf {
    Path::new(BPFFS).join(format!("svc-lb-{id}"))
}

fn admin_socket(id: &str) -> PathBuf {
    Path::new(LOCKS).join(format!("{id}.sock"))
}

/// Removes everything that carries the name of a run that no longer lives. Returns the names of those runs.
pub fn sweep() -> Result<Vec<String>> {
    let mut swept = Vec::new();
    let Ok(entries) = fs::read_dir(LOCKS) else {
        return Ok(swept);
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".lock")) else {
            continue;
        };
        let path = entry.path();
        let Ok(lock) = Flock::lock(open_lock(&path)?, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        if same_file(&lock, &path) {
            remove_run(id)?;
            let _gone = fs::remove_file(&path);
            swept.push(id.to_owned());
        }
    }
    Ok(swept)
}

/// Waits until the run `id` has ended, then removes what it left. For a guardian process.
pub fn reap(id: &str) -> Result<()> {
    let path = Path::new(LOCKS).join(format!("{id}.lock"));
    if !path.exists() {
        return Ok(());
    }
    let lock = Flock::lock(open_lock(&path)?, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("lock {}", path.display()))?;
    remove_run(id)?;
    let _gone = fs::remove_file(&path);
    drop(lock);
    Ok(())
}

fn remove_run(id: &str) -> Result<()> {
    let prefix = format!("{PREFIX}{id}-");
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            let path = entry.path();
            kill_inside(&path);
            remove_namespace(&path)
                .with_context(|| format!("remove namespace {}", path.display()))?;
        }
    }
    let _gone = fs::remove_file(admin_socket(id));
    cgroup::remove_run(id);
    remove_pins(&pin_dir(id))
}

/// Unmounts and removes the name of a namespace; the namespace itself goes with its last user.
pub(crate) fn remove_namespace(path: &Path) -> Result<()> {
    // Not a mount point if its maker died between the two steps.
    let _unmounted = umount2(path, MntFlags::MNT_DETACH);
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Kills the processes that live in a dead run's namespace.
fn kill_inside(namespace: &Path) {
    let Ok(wanted) = fs::metadata(namespace).map(|meta| (meta.dev(), meta.ino())) else {
        return;
    };
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let inside = fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == wanted);
        if inside {
            let _sent = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Unpins everything under `dir`: programs and links without another user are detached by that.
fn remove_pins(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove pins under {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// A directory for the files of one test (logs, configuration), emptied: `target/lab/<test>`.
pub fn scratch(test: &str) -> Result<PathBuf> {
    let name: String = test
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/lab")
        .join(name);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("empty {}", dir.display()));
        }
        _ => {}
    }
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    dir.canonicalize()
        .with_context(|| format!("resolve {}", dir.display()))
}
