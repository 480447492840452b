//! Control groups for the threads and processes of a node and its pods.
//!
//! Sockets belong to the cgroup of the thread that makes them. The lab's clients are threads of the test, hence
//! threaded cgroups, which the test's own one must be an ancestor of: the root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context as _, Result};

/// Everything of the lab lies under this directory of the hierarchy.
const LAB: &str = "svc-lb-lab";

/// A cgroup; dropping it removes it once nobody is in it.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the cgroup `name` of a run.
    pub fn of_run(id: &str, name: &str) -> Result<Self> {
        let lab = root()?.join(LAB);
        make(&lab)?;
        let run = lab.join(id);
        make(&run)?;
        Self::at(run.join(name))
    }

    /// Makes a cgroup inside.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::at(self.0.join(name))
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The file that a thread writes 0 to, to be in it.
    #[must_use]
    pub fn threads(&self) -> PathBuf {
        self.0.join("cgroup.threads")
    }

    fn at(path: PathBuf) -> Result<Self> {
        make(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Threads that have ended may count for a moment; the sweep of the run has what is left.
        let _gone = fs::remove_dir(&self.0);
    }
}

/// Removes all cgroups of a run; those with somebody in them stay.
pub fn remove_run(id: &str) {
    if let Ok(root) = root() {
        remove(&root.join(LAB).join(id));
    }
}

fn remove(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _gone = fs::remove_dir(path);
}

fn make(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("make {}", path.display()));
        }
        _ => {}
    }
    let kind = path.join("cgroup.type");
    fs::write(&kind, "threaded").with_context(|| format!("write {}", kind.display()))
}

/// The root of the cgroup v2 hierarchy; this process is in it then.
fn root() -> Result<&'static Path> {
    static ROOT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let root = ROOT.get_or_init(|| {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let root = mounts.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let path = mount.split(' ').nth(4)?;
            file_system
                .starts_with("cgroup2 ")
                .then(|| PathBuf::from(path))
        })?;
        let _moved = fs::write(root.join("cgroup.procs"), "0");
        Some(root)
    });
    root.as_deref()
        .context("no cgroup v2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}
