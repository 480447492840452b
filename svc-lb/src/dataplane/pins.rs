//! Where maps, programs and links are pinned: what lets the agent be killed at any moment.
//!
//! ```text
//! /sys/fs/bpf/svc-lb/          --pin-dir, locked by the one agent that uses it
//!     v1/                      the layout version of the records in the maps
//!         maps/services ...
//!         programs/tc_ingress ...
//!         links/12-tc_ingress  interface index and hook
//!         links/12-clsact      a directory: the clsact qdisc of interface 12 was made by us
//! ```

use std::fs::{self, File};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use svc_lb_common::limits::LAYOUT_VERSION;
use svc_lb_common::outcome::Hook;
use svc_lb_common::socket::SocketHook;
use thiserror::Error;
use tracing::{debug, info, warn};

use super::sys::{self, ObjectKind};

/// Where pins go unless told otherwise.
pub const DEFAULT_DIR: &str = "/sys/fs/bpf/svc-lb";
/// Where the kernel's documentation has the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// What `mount` shows as the source of a file system that the agent mounted, so that `detach`
/// knows its own.
const MOUNT_SOURCE: &str = "svc-lb";

/// Why the pins cannot be used.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PinError {
    #[error("mount the BPF file system at {path}; the agent must be root (CAP_SYS_ADMIN)")]
    Mount { path: PathBuf, source: nix::Error },
    #[error("{operation} {path}")]
    File {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "{path} is in use by another agent; stop it first, or give each agent its own --pin-dir"
    )]
    Locked { path: PathBuf },
    #[error("{path} is {found:?}, not {expected:?}, and not ours; remove it: rm '{path}'")]
    Foreign {
        path: PathBuf,
        expected: ObjectKind,
        found: ObjectKind,
    },
}

impl PinError {
    fn file(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

/// The pins of one layout version.
#[derive(Clone, Debug)]
pub struct Pins {
    base: PathBuf,
    version: u32,
}

/// Keeps other agents from the pins until dropped. The kernel drops it with the process.
#[derive(Debug)]
pub struct PinLock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

/// Names one entry of the links directory.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct LinkName {
    /// Interface index.
    pub ifindex: u32,
    /// What it holds.
    pub what: Linked,
}

/// How the notes about reserved ports are called.
const RESERVED_PREFIX: &str = "reserved-";

/// What an entry of the links directory holds.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Linked {
    /// The link of `xdp_ingress`.
    Xdp,
    /// The link of `tc_ingress`.
    Ingress,
    /// The link of `tc_egress`.
    Egress,
    /// A marker: the clsact qdisc was made by us.
    Clsact,
}

impl Linked {
    const ALL: [Self; 4] = [Self::Xdp, Self::Ingress, Self::Egress, Self::Clsact];

    /// The pin of a hook's link.
    #[must_use]
    pub fn hook(hook: Hook) -> Self {
        match hook {
            Hook::XdpIngress => Self::Xdp,
            Hook::TcIngress => Self::Ingress,
            Hook::TcEgress => Self::Egress,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Xdp => Hook::XdpIngress.name(),
            Self::Ingress => Hook::TcIngress.name(),
            Self::Egress => Hook::TcEgress.name(),
            Self::Clsact => "clsact",
        }
    }
}

impl std::fmt::Display for LinkName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.ifindex, self.what.name())
    }
}

impl FromStr for LinkName {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let (ifindex, what) = name.split_once('-').ok_or(())?;
        let ifindex = ifindex.parse().map_err(|_| ())?;
        let what = Linked::ALL
            .into_iter()
            .find(|linked| linked.name() == what)
            .ok_or(())?;
        Ok(Self { ifindex, what })
    }
}

impl Pins {
    /// The pins of this version's layout under `base`.
    #[must_use]
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self::of_layout(base, LAYOUT_VERSION)
    }

    /// The pins of another layout under `base`.
    #[must_use]
    pub fn of_layout(base: impl Into<PathBuf>, version: u32) -> Self {
        Self {
            base: base.into(),
            version,
        }
    }

    /// The directory that the operator named.
    #[must_use]
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The layout version of these pins.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    fn dir(&self, kind: &str) -> PathBuf {
        self.base.join(format!("v{}", self.version)).join(kind)
    }

    /// Where a map is pinned.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.dir("maps").join(name)
    }

    /// Where a program is pinned.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir("programs").join(name)
    }

    /// Where a link is pinned.
    #[must_use]
    pub fn link(&self, name: LinkName) -> PathBuf {
        self.dir("links").join(name.to_string())
    }

    /// Where a socket hook's link is pinned.
    #[must_use]
    pub fn socket(&self, hook: SocketHook) -> PathBuf {
        self.dir("sockets").join(hook.name())
    }

    /// Whether anything of this layout is pinned.
    #[must_use]
    pub fn exist(&self) -> bool {
        self.dir("maps").is_dir()
    }

    /// Mounts the BPF file system where it is missing and makes the directories.
    pub fn prepare(&self) -> Result<(), PinError> {
        if !on_bpffs(&self.base) {
            self.mount()?;
        }
        for kind in ["maps", "programs", "links", "sockets"] {
            let dir = self.dir(kind);
            fs::create_dir_all(&dir).map_err(|source| PinError::file("create", &dir, source))?;
        }
        Ok(())
    }

    fn mount_point(&self) -> &Path {
        if self.base.starts_with(BPFFS) {
            Path::new(BPFFS)
        } else {
            &self.base
        }
    }

    fn mount(&self) -> Result<(), PinError> {
        let path = self.mount_point();
        // /sys/fs/bpf itself is made by the kernel and cannot be made in sysfs.
        if !path.is_dir() {
            fs::create_dir_all(path).map_err(|source| PinError::file("create", path, source))?;
        }
        nix::mount::mount(
            Some(MOUNT_SOURCE),
            path,
            Some("bpf"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some("mode=0700"),
        )
        .map_err(|source| PinError::Mount {
            path: path.to_owned(),
            source,
        })?;
        info!(path = %path.display(), "mounted the BPF file system");
        if mount_namespace_is_private() {
            warn!(
                path = %path.display(),
                "this mount namespace is not the host's: pins, and with them the programs, end \
                 with it; mount the host's /sys/fs/bpf into it instead"
            );
        }
        Ok(())
    }

    /// Takes the pins for this process.
    pub fn lock(&self) -> Result<PinLock, PinError> {
        let dir =
            File::open(&self.base).map_err(|source| PinError::file("open", &self.base, source))?;
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(PinLock(lock)),
            Err((_, nix::Error::EWOULDBLOCK)) => Err(PinError::Locked {
                path: self.base.clone(),
            }),
            Err((_, error)) => Err(PinError::file("lock", &self.base, error.into())),
        }
    }

    /// The pins of every other layout version under the same base.
    pub fn other_layouts(&self) -> Result<Vec<Self>, PinError> {
        let names = entries(&self.base)?;
        let versions = names.iter().filter_map(|name| name.strip_prefix('v'));
        Ok(versions
            .filter_map(|version| version.parse().ok())
            .filter(|version| *version != self.version)
            .map(|version| Self::of_layout(&self.base, version))
            .collect())
    }

    /// Notes that these ports were put on the kernel's list of reserved ports.
    pub fn note_reserved(&self, ports: &RangeInclusive<u16>) -> Result<(), PinError> {
        let path = self.reserved_note(ports);
        fs::create_dir_all(&path).map_err(|source| PinError::file("create", &path, source))
    }

    /// Removes such a note.
    pub fn forget_reserved(&self, ports: &RangeInclusive<u16>) -> Result<(), PinError> {
        remove_dir(&self.reserved_note(ports))
    }

    /// Ports that are noted so.
    pub fn reserved(&self) -> Result<Vec<RangeInclusive<u16>>, PinError> {
        let names = entries(&self.base)?;
        let ranges = names.iter().filter_map(|name| {
            let (first, last) = name.strip_prefix(RESERVED_PREFIX)?.split_once('-')?;
            Some(first.parse().ok()?..=last.parse().ok()?)
        });
        Ok(ranges.collect())
    }

    fn reserved_note(&self, ports: &RangeInclusive<u16>) -> PathBuf {
        let (first, last) = (ports.start(), ports.end());
        self.base.join(format!("{RESERVED_PREFIX}{first}-{last}"))
    }

    /// Entries of the links directory, sorted. What is not ours is named in the log and left out.
    pub fn links(&self) -> Result<Vec<LinkName>, PinError> {
        let dir = self.dir("links");
        let mut links = Vec::new();
        for name in entries(&dir)? {
            if let Ok(link) = name.parse() {
                links.push(link);
            } else {
                let path = dir.join(name);
                warn!(path = %path.display(), fix = format!("rm '{}'", path.display()), "foreign pin left alone");
            }
        }
        links.sort_unstable();
        Ok(links)
    }

    /// Takes the links of another layout over, so that their programs can be replaced in one step.
    /// Returns how many.
    pub fn take_links_of(&self, other: &Self) -> Result<usize, PinError> {
        let links = other.links()?;
        for link in &links {
            let path = self.link(*link);
            fs::rename(other.link(*link), &path)
                .map_err(|source| PinError::file("take over", &path, source))?;
        }
        let sockets = entries(&other.dir("sockets"))?;
        for name in &sockets {
            let path = self.dir("sockets").join(name);
            fs::rename(other.dir("sockets").join(name), &path)
                .map_err(|source| PinError::file("take over", &path, source))?;
        }
        Ok(links.len() + sockets.len())
    }

    /// Removes everything of this layout: with the last link its program goes, with the last
    /// program its maps. Qdiscs and filters are [`super::attach`]'s to remove first.
    ///
    /// Removes the base too if nothing is left in it, and takes down the file system if the agent
    /// had mounted it. Returns the number of pins removed.
    pub fn remove(&self) -> Result<usize, PinError> {
        let mut removed = 0;
        for kind in ["links", "sockets", "programs", "maps"] {
            let dir = self.dir(kind);
            for name in entries(&dir)? {
                let path = dir.join(&name);
                if path.is_dir() {
                    fs::remove_dir(&path)
                } else {
                    removed += 1;
                    fs::remove_file(&path)
                }
                .map_err(|source| PinError::file("remove", &path, source))?;
            }
            remove_dir(&dir)?;
        }
        remove_dir(&self.dir(""))?;
        Ok(removed)
    }

    /// Removes the base if it is empty, and takes down the file system if the agent had mounted
    /// it and nothing is left in it.
    pub fn remove_base(&self) -> Result<(), PinError> {
        let mount_point = self.mount_point();
        if mount_point != self.base && entries(&self.base)?.is_empty() {
            remove_dir(&self.base)?;
        }
        if !mounted_by_us(mount_point) || !entries(mount_point)?.is_empty() {
            return Ok(());
        }
        nix::mount::umount2(mount_point, MntFlags::empty())
            .map_err(|error| PinError::file("unmount", mount_point, error.into()))?;
        if mount_point == self.base {
            remove_dir(mount_point)?;
        }
        Ok(())
    }
}

/// Removes a pin; that it is gone already is fine.
pub fn unpin(path: &Path) -> Result<(), PinError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(PinError::file("remove", path, source))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes a marker; that it is gone already is fine.
pub fn remove_marker(path: &Path) -> Result<(), PinError> {
    remove_dir(path)
}

/// Opens a pin and makes sure what it is; `None` where nothing is pinned.
pub fn open(path: &Path, expected: ObjectKind) -> Result<Option<std::os::fd::OwnedFd>, PinError> {
    let fd = match sys::open_pin(path) {
        Ok(fd) => fd,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(PinError::file("open the pin", path, source)),
    };
    let found =
        sys::object_kind(fd.as_fd()).map_err(|source| PinError::file("identify", path, source))?;
    if found != expected {
        return Err(PinError::Foreign {
            path: path.to_owned(),
            expected,
            found,
        });
    }
    Ok(Some(fd))
}

/// Pins in place of whatever is pinned there, in one step.
pub fn replace(fd: impl std::os::fd::AsFd, path: &Path) -> Result<(), PinError> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push("-new");
    let fresh = PathBuf::from(fresh);
    unpin(&fresh)?;
    sys::pin(fd, &fresh).map_err(|source| PinError::file("pin", &fresh, source))?;
    fs::rename(&fresh, path).map_err(|source| PinError::file("rename to", path, source))
}

/// Names in a directory; none where it is missing. Names with a dot are the kernel's own
/// (`maps.debug`): nobody else can make them on a BPF file system.
fn entries(dir: &Path) -> Result<Vec<String>, PinError> {
    let failed = |source| PinError::file("read", dir, source);
    let read = match fs::read_dir(dir) {
        Ok(read) => read,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed(source)),
    };
    let mut names = Vec::new();
    for entry in read {
        let name = entry.map_err(failed)?.file_name();
        let name = name.to_string_lossy();
        if !name.contains('.') {
            names.push(name.into_owned());
        }
    }
    Ok(names)
}

fn remove_dir(dir: &Path) -> Result<(), PinError> {
    match fs::remove_dir(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(PinError::file("remove", dir, source))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether `path`, or the part of it that exists, lies on a BPF file system.
fn on_bpffs(path: &Path) -> bool {
    let existing = path.ancestors().find(|ancestor| ancestor.exists());
    existing.is_some_and(|dir| statfs(dir).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC))
}

/// Whether the agent mounted the BPF file system at `path`.
fn mounted_by_us(path: &Path) -> bool {
    let Ok(mounts) = fs::read_to_string("/proc/thread-self/mountinfo") else {
        return false;
    };
    mounts.lines().any(|line| is_our_mount(line, path))
}

/// Whether a line of mountinfo (proc(5)) is our mount at `path`.
fn is_our_mount(line: &str, path: &Path) -> bool {
    let Some((mount, file_system)) = line.split_once(" - ") else {
        return false;
    };
    let at = mount.split(' ').nth(4);
    let mut file_system = file_system.split(' ');
    at.is_some_and(|at| Path::new(at) == path)
        && file_system.next() == Some("bpf")
        && file_system.next() == Some(MOUNT_SOURCE)
}

fn mount_namespace_is_private() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
    match (namespace("thread-self"), namespace("1")) {
        (Ok(own), Ok(init)) => own != init,
        (own, init) => {
            debug!(?own, ?init, "cannot compare mount namespaces");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_round_trip() {
        for what in Linked::ALL {
            let link = LinkName { ifindex: 12, what };
            assert_eq!(link.to_string().parse(), Ok(link));
        }
        for foreign in ["", "12", "12-", "x-tc_ingress", "12-other", "-1-tc_ingress"] {
            assert_eq!(foreign.parse::<LinkName>(), Err(()), "{foreign}");
        }
    }

    #[test]
    fn only_our_own_mount_is_recognised() {
        let ours = "36 25 0:30 / /run/b rw,nosuid shared:1 - bpf svc-lb rw,mode=700";
        assert!(is_our_mount(ours, Path::new("/run/b")));
        assert!(!is_our_mount(ours, Path::new("/run")));
        let systemd = "36 25 0:30 / /sys/fs/bpf rw,nosuid - bpf bpf rw,mode=700";
        assert!(!is_our_mount(systemd, Path::new("/sys/fs/bpf")));
    }

    #[test]
    fn pins_elsewhere_than_the_usual_mount_get_a_mount_of_their_own() {
        let lab = Pins::new("/run/svc-lb-lab/bpf");
        assert_eq!(lab.mount_point(), Path::new("/run/svc-lb-lab/bpf"));
        let node = Pins::new("/sys/fs/bpf/svc-lb-2");
        assert_eq!(node.mount_point(), Path::new("/sys/fs/bpf"));
    }
}
