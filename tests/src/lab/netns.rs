//! Named network namespaces as guards.

use std::fs::{self, File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::cgroup::Cgroup;
use super::netlink::Netlink;
use super::process::{Process, keep};
use super::run::{self, Run};

/// A network namespace: a name under `/run/netns`, a way in, a thread for its servers. Dropping it removes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    path: PathBuf,
    /// Keeps the namespace alive and is the way in.
    file: File,
    netlink: Netlink,
    servers: OnceLock<Servers>,
    /// Where its threads and processes are, if not where the test is.
    cgroup: Option<Cgroup>,
}

/// The thread that runs a namespace's asynchronous tasks.
#[derive(Debug)]
struct Servers {
    handle: tokio::runtime::Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Namespace {
    /// Makes the namespace `name` of a run; `lo` is up in it. What runs in it is in `cgroup`, if there is one.
    pub fn create(run: &Run, name: &str, cgroup: Option<Cgroup>) -> Result<Self> {
        let path = Path::new(run::NAMESPACES).join(run.namespace(name));
        let file = make(&path).with_context(|| format!("make namespace {}", path.display()))?;
        let netlink = enter(file.as_fd(), Netlink::open)
            .with_context(|| format!("open netlink in {}", path.display()))?;
        netlink.up("lo")?;
        Ok(Self {
            name: name.to_owned(),
            path,
            file,
            netlink,
            servers: OnceLock::new(),
            cgroup,
        })
    }

    /// The short name, without the run's prefix.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name under `/run/netns`, for `ip netns exec`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The namespace's file, for moving links into it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Links, addresses and routes of this namespace.
    #[must_use]
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// Runs `f` inside, on a thread of its own, and returns its value.
    ///
    /// # Panics
    /// With the panic of `f`.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            self.join_cgroup()?;
            Ok(f())
        };
        match enter(self.fd(), inside) {
            Ok(value) => value,
            Err(error) => panic!("enter namespace {}: {error:#}", self.name),
        }
    }

    /// Starts an asynchronous task on the namespace's own single-threaded runtime.
    ///
    /// # Panics
    /// If the runtime's thread cannot be made.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.servers
            .get_or_init(|| match Servers::start(self) {
                Ok(servers) => servers,
                Err(error) => panic!("start a runtime in namespace {}: {error:#}", self.name),
            })
            .handle
            .spawn(task)
    }

    /// Starts a program inside; it is killed when the returned guard is dropped and when this process dies.
    pub fn start(&self, command: Command) -> Result<Process> {
        let threads = self.cgroup.as_ref().map(|cgroup| {
            let path = cgroup.threads();
            OpenOptions::new().write(true).open(path)
        });
        keep(command, Some(self.file.try_clone()?), threads.transpose()?)
    }

    /// Its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Moves the calling thread.
    fn join_cgroup(&self) -> Result<()> {
        let Some(cgroup) = &self.cgroup else {
            return Ok(());
        };
        let path = cgroup.threads();
        fs::write(&path, "0").with_context(|| format!("write {}", path.display()))
    }

    /// Writes a sysctl of this namespace; `key` with dots or slashes (`net.ipv4.ip_forward`).
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        // /proc/sys/net shows the namespace of the thread that opens it.
        self.run(|| fs::write(&path, value))
            .with_context(|| format!("write {value} to {} in {}", path.display(), self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Servers first: their sockets keep the namespace alive.
        drop(self.servers.take());
        if let Err(error) = run::remove_namespace(&self.path) {
            eprintln!("lab: remove {}: {error:#}", self.path.display());
        }
    }
}

impl Servers {
    fn start(namespace: &Namespace) -> Result<Self> {
        let name = &namespace.name;
        let threads = namespace.cgroup.as_ref().map(Cgroup::threads);
        let namespace = namespace.file.try_clone()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, started) = std::sync::mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("lab-{name}"))
            .spawn(move || {
                let runtime = setns(&namespace, CloneFlags::CLONE_NEWNET)
                    .map_err(io::Error::from)
                    .and_then(|()| threads.map_or(Ok(()), |threads| fs::write(threads, "0")))
                    .and_then(|()| {
                        tokio::runtime::Builder::new_current_thread()
                            .enable_all()
                            .build()
                    });
                match runtime {
                    Ok(runtime) => {
                        let _sent = ready.send(Ok(runtime.handle().clone()));
                        let _stopped = runtime.block_on(stopped);
                    }
                    Err(error) => {
                        let _sent = ready.send(Err(error));
                    }
                }
            })?;
        let handle = started.recv().context("the thread ended")??;
        Ok(Self {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _joined = thread.join();
        }
    }
}

fn make(path: &Path) -> Result<File> {
    fs::create_dir_all(run::NAMESPACES)?;
    File::create_new(path)?;
    // unshare moves the calling thread only, so it must be one that ends here.
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
        mount(
            Some("/proc/thread-self/ns/net"),
            path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .context("bind mount")?;
        File::open("/proc/thread-self/ns/net").context("open")
    })
}

/// Runs `f` on a new thread that has entered `namespace`.
fn enter<T: Send>(namespace: BorrowedFd<'_>, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let raw = namespace.as_raw_fd();
    on_thread(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).with_context(|| format!("setns of fd {raw}"))?;
        f()
    })
}

fn on_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let name = thread::current().name().unwrap_or("lab").to_owned();
    thread::scope(|scope| {
        let joined = thread::Builder::new()
            .name(name)
            .spawn_scoped(scope, f)
            .map_err(|error| anyhow!("start a thread: {error}"))?
            .join();
        match joined {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn sysctl_path(key: &str) -> PathBuf {
    let separator = if key.contains('/') { '/' } else { '.' };
    Path::new("/proc/sys").join(key.split(separator).collect::<PathBuf>())
}
