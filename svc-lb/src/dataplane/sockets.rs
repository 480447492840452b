//! Attaches the socket hooks to the cgroup whose processes are this node's.
//!
//! A cgroup tells whose sockets the programs meet, and the network namespace which of them are the
//! node's own. So several agents on one kernel do not meet one another's: a kind node's cgroup is the
//! root of its own cgroup namespace, and the lab gives each node one with `--cgroup`. An agent that
//! is in neither, but in a network namespace beside the machine's own, cannot tell its pods from
//! strangers and serves its own namespace's sockets alone.
//!
//! Links are pinned like the edges', and replaced in one step.

use std::fs::{self, File};
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::programs::ProgramType;
use aya::sys::is_helper_supported;
use aya_obj::generated::bpf_func_id;
use clap::ValueEnum;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use serde::{Deserialize, Serialize};
use svc_lb_common::config::{self, Config};
use svc_lb_common::socket::SocketHook;
use thiserror::Error;
use tracing::{debug, info, warn};

use super::loader::Programs;
use super::pins::{self, PinError, Pins};
use super::sys::{self, ObjectKind};

/// SO_NETNS_COOKIE (5.14), which libc does not name.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// Shows itself in the machine's first network namespace only.
const FIRST_NAMESPACE: &str = "/proc/sys/net/core/netdev_max_backlog";

/// `--socket-lb`: whose sockets are given backends.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum SocketMode {
    /// TCP sockets of the node and of pods, UDP sockets of the node: a pod's datagrams stay with the
    /// packet path, so that they never stick to a backend that is gone.
    #[default]
    #[value(name = "tcp,host-udp")]
    TcpHostUdp,
    /// Sockets of the node alone, for pods whose sockets are not the kernel's (gVisor, Kata, KubeVirt)
    /// or whose connections a service mesh must see as they were meant.
    HostOnly,
    /// None: all is translated packet by packet.
    Off,
}

impl SocketMode {
    const fn name(self) -> &'static str {
        match self {
            Self::TcpHostUdp => "tcp,host-udp",
            Self::HostOnly => "host-only",
            Self::Off => "off",
        }
    }
}

/// What the operator says.
#[derive(Clone, Debug, Default)]
pub struct SocketSettings {
    /// Whose sockets.
    pub mode: SocketMode,
    /// The cgroup of this node's processes, if not the root.
    pub cgroup: Option<PathBuf>,
}

/// Why the socket hooks cannot be on.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SocketError {
    #[error("switched off with --socket-lb off")]
    Off,
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )]
    NotMounted,
    #[error("--cgroup {path}: {source}")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("the kernel does not tell network namespaces apart (SO_NETNS_COOKIE, 5.14): {0}")]
    NoCookie(io::Error),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error("attach {program} to {cgroup}: {source}")]
    Attach {
        program: &'static str,
        cgroup: PathBuf,
        source: io::Error,
    },
    #[error("the kernel refused the program {0}")]
    Refused(&'static str),
}

/// Where the socket hooks go, and what they are to do there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    mode: SocketMode,
    cgroup: PathBuf,
    /// The kernel's id of the cgroup.
    id: u64,
    netns: u64,
    /// Sockets of other network namespaces in the cgroup are pods'.
    has_pods: bool,
    set_retval: bool,
}

impl Place {
    /// Finds it out.
    ///
    /// # Errors
    /// Why there is none.
    pub fn find(settings: &SocketSettings) -> Result<Self, SocketError> {
        if settings.mode == SocketMode::Off {
            return Err(SocketError::Off);
        }
        let cgroup = match &settings.cgroup {
            Some(path) => path.clone(),
            None => root().ok_or(SocketError::NotMounted)?,
        };
        let id = cgroup_id(&cgroup).map_err(|source| SocketError::Cgroup {
            path: cgroup.clone(),
            source,
        })?;
        // Only the machine's root has no type.
        let machine = !cgroup.join("cgroup.type").exists();
        let has_pods = !machine || Path::new(FIRST_NAMESPACE).exists();
        Ok(Self {
            mode: settings.mode,
            id,
            cgroup,
            netns: netns_cookie().map_err(SocketError::NoCookie)?,
            has_pods,
            set_retval: has_set_retval(),
        })
    }

    /// Tells the programs.
    pub fn configure(&self, config: &mut Config) {
        config.netns = self.netns;
        if self.has_pods && self.mode == SocketMode::TcpHostUdp {
            config.bits |= config::SOCKETS_OF_PODS;
        }
        if self.set_retval {
            config.bits |= config::SET_RETVAL;
        }
    }

    /// What is less than it could be, and why.
    #[must_use]
    pub fn shortfalls(&self) -> Vec<&'static str> {
        let mut shortfalls = Vec::new();
        if !self.has_pods && self.mode == SocketMode::TcpHostUdp {
            shortfalls.push(
                "pods' sockets are left to the packet path: this agent's network namespace is not \
                 the machine's, and its cgroup is; name the node's own with --cgroup",
            );
        }
        if !self.set_retval {
            shortfalls.push(
                "sockets that nothing serves are rejected by their packets (bpf_set_retval, 5.18)",
            );
        }
        shortfalls
    }

    /// The directory.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }
}

/// Whether a socket hook can say which error a call ends with (5.18).
#[must_use]
pub fn has_set_retval() -> bool {
    is_helper_supported(
        ProgramType::CgroupSockAddr,
        bpf_func_id::BPF_FUNC_set_retval,
    )
    .unwrap_or(false)
}

/// Where the cgroup v2 hierarchy is mounted: the first mount, hybrid setups included.
fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").ok()?;
    mounts.lines().find_map(cgroup2_mount)
}

/// The directory of a line of mountinfo (proc(5)), if cgroup v2 is mounted there.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    let cgroup2 = file_system.split(' ').next() == Some("cgroup2");
    let path = mount.split(' ').nth(4)?;
    cgroup2.then(|| PathBuf::from(path))
}

/// The kernel's id of a cgroup: its inode number.
fn cgroup_id(path: &Path) -> io::Result<u64> {
    if statfs(path)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(io::Error::other("not in a cgroup v2 hierarchy"));
    }
    Ok(fs::metadata(path)?.ino())
}

/// The cookie of this thread's network namespace.
fn netns_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| UdpSocket::bind("[::1]:0"))?;
    let mut cookie: u64 = 0;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// The socket hooks as they are.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct SocketsStatus {
    /// Whose sockets are given backends: as `--socket-lb` has it, or off.
    pub mode: String,
    /// Where the hooks are.
    pub cgroup: Option<String>,
    /// Why it is not more.
    pub notes: Vec<String>,
    /// What is wrong; it is tried again.
    pub error: Option<String>,
}

/// The socket hooks.
#[derive(Debug)]
pub struct Sockets {
    pins: Pins,
    place: Option<Place>,
    status: SocketsStatus,
}

impl Sockets {
    /// Nothing is attached or detached yet.
    #[must_use]
    pub fn new(pins: Pins, place: Result<Place, SocketError>) -> Self {
        let mut status = SocketsStatus {
            mode: SocketMode::Off.name().to_owned(),
            ..SocketsStatus::default()
        };
        let place = match place {
            Ok(place) => {
                place.mode.name().clone_into(&mut status.mode);
                status.cgroup = Some(place.cgroup.display().to_string());
                status.notes = place.shortfalls().into_iter().map(str::to_owned).collect();
                Some(place)
            }
            Err(reason) => {
                status.notes.push(reason.to_string());
                None
            }
        };
        Self {
            pins,
            place,
            status,
        }
    }

    /// Attaches the programs, or replaces those that run; where none shall, removes them.
    pub fn apply(&mut self, programs: &Programs) {
        let result = match &self.place {
            Some(place) => place.attach(&self.pins, programs),
            None => detach(&self.pins),
        };
        let error = result.as_ref().err().map(ToString::to_string);
        match (&error, &self.status.error) {
            (Some(error), old) if old.as_ref() != Some(error) => {
                warn!(error, "socket hooks not attached; tried again");
            }
            _ => {}
        }
        if let Ok(true) = result {
            let SocketsStatus {
                mode,
                cgroup,
                notes,
                ..
            } = &self.status;
            info!(mode, cgroup, ?notes, "socket hooks");
        }
        self.status.error = error;
    }

    /// How they are.
    #[must_use]
    pub const fn status(&self) -> &SocketsStatus {
        &self.status
    }
}

impl Place {
    /// Returns whether anything changed.
    fn attach(&self, pins: &Pins, programs: &Programs) -> Result<bool, SocketError> {
        let cgroup = File::open(&self.cgroup).map_err(|source| SocketError::Cgroup {
            path: self.cgroup.clone(),
            source,
        })?;
        let mut changed = false;
        for hook in SocketHook::ALL {
            let failed = |source| SocketError::Attach {
                program: hook.name(),
                cgroup: self.cgroup.clone(),
                source,
            };
            let Some((program, id)) = programs.socket(hook) else {
                return Err(SocketError::Refused(hook.name()));
            };
            let path = pins.socket(hook);
            if let Some(link) = pins::open(&path, ObjectKind::Link)? {
                let info = sys::link_info(link.as_fd()).map_err(failed)?;
                if info.cgroup == Some(self.id) {
                    if info.program != id {
                        sys::link_update(link.as_fd(), program).map_err(failed)?;
                        debug!(program = hook.name(), "replaced");
                        changed = true;
                    }
                    continue;
                }
            }
            let link = sys::link_create_cgroup(program, cgroup.as_fd(), hook).map_err(failed)?;
            // In place of one in another cgroup, or in one that is gone.
            pins::replace(&link, &path)?;
            changed = true;
        }
        Ok(changed)
    }
}

/// Removes links and programs. Returns whether there were any.
fn detach(pins: &Pins) -> Result<bool, SocketError> {
    let mut changed = false;
    // What gives sockets backends goes first.
    for hook in SocketHook::ALL.into_iter().rev() {
        changed |= pins.socket(hook).exists();
        pins::unpin(&pins.socket(hook))?;
        pins::unpin(&pins.program(hook.name()))?;
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_v2_is_found_beside_v1() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        let expected = Some(PathBuf::from("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup2_mount(hybrid), expected);
        let v1 = "31 24 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu";
        assert_eq!(cgroup2_mount(v1), None);
    }
}
