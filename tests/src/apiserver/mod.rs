//! A double of the Kubernetes API server, as far as a service proxy sees it: list in pages, watch from a version,
//! bookmarks, streaming lists, 410 Gone, and everything that goes wrong between a node and a real one. Answers are
//! built from the API's documentation ("Kubernetes API Concepts"); no real server stands behind it.

mod serve;
mod store;
mod watch;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use axum::serve::ListenerExt as _;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch as channel;

pub use self::store::{Key, Resource, Store};

/// How long a port may stay taken by what was just killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// What goes wrong, each so many times in 1,024.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Requests answered with 429 and a time to come again.
    pub too_many: u32,
    /// Requests answered with 500 or 503.
    pub error: u32,
    /// Watches answered with 410, half of them as an event.
    pub gone: u32,
    /// Events of a watch that are cut in the middle, and the connection with them.
    pub torn: u32,
    /// Events of a watch before which it ends.
    pub ended: u32,
    /// Events and requests that come late, by some milliseconds.
    pub late: u32,
    /// Events that come byte by byte, so to speak.
    pub split: u32,
    /// Events that a bookmark comes after.
    pub bookmarks: u32,
}

/// What requests share.
#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    faults: Mutex<(Faults, fastrand::Rng)>,
    /// The version of the last change.
    version: channel::Sender<u64>,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it goes wrong now; and another number by chance.
    fn chance(&self, rate: impl Fn(&Faults) -> u32) -> Option<u32> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let (faults, random) = &mut *faults;
        (random.u32(0..1_024) < rate(faults)).then(|| random.u32(..))
    }

    async fn late(&self) {
        if let Some(by) = self.chance(|faults| faults.late) {
            tokio::time::sleep(Duration::from_millis(u64::from(by % 50))).await;
        }
    }
}

/// The double, on an address of its own.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    /// None while it is dead.
    runtime: Option<Runtime>,
}

impl ApiServer {
    /// Starts on a free port of 127.0.0.1, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(seed: u64) -> Result<Self> {
        Self::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), seed)
    }

    /// Starts on an address, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start_at(address: SocketAddr, seed: u64) -> Result<Self> {
        let listener = listen(address)?;
        let mut server = Self {
            shared: Arc::new(Shared {
                store: Mutex::default(),
                faults: Mutex::new((Faults::default(), fastrand::Rng::with_seed(seed))),
                version: channel::channel(0).0,
            }),
            address: listener.local_addr()?,
            runtime: None,
        };
        server.serve(listener)?;
        Ok(server)
    }

    fn serve(&mut self, listener: TcpListener) -> Result<()> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let router = serve::router(Arc::clone(&self.shared));
        // As Go's servers do; else an event's second packet waits for the first one's acknowledgement.
        let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
        runtime.spawn(async move { axum::serve(listener, router).await });
        self.runtime = Some(runtime);
        Ok(())
    }

    /// Ends the process, so to speak: all its connections, and what it listens on. The objects are in etcd.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
    }

    /// Starts again where it was.
    ///
    /// # Errors
    /// When it cannot listen there again.
    pub fn revive(&mut self) -> Result<()> {
        if self.runtime.is_some() {
            return Ok(());
        }
        let until = Instant::now() + PATIENCE;
        let listener = loop {
            match listen(self.address) {
                Ok(listener) => break listener,
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        self.serve(listener)
    }

    /// Ends all connections, and goes on listening.
    ///
    /// # Errors
    /// When it cannot listen again.
    pub fn cut(&mut self) -> Result<()> {
        self.kill();
        self.revive()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets go wrong what shall.
    pub fn set_faults(&self, faults: Faults) {
        let mut shared = self
            .shared
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        shared.0 = faults;
    }

    /// Reads or changes what it knows; who watches is told.
    pub fn with<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.shared.store();
        let result = change(&mut store);
        self.shared.version.send_replace(store.version());
        result
    }

    /// Creates or replaces an object.
    ///
    /// # Errors
    /// When it is none.
    pub fn apply(&self, object: Value) -> Result<Key> {
        self.with(|store| store.apply(object))
    }

    /// Writes a kubeconfig for it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn kubeconfig(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: double\ncontexts:\n- name: double\n  context: {{cluster: double, \
             user: nobody}}\nclusters:\n- name: double\n  cluster: {{server: \"http://{}\"}}\nusers:\n- name: nobody\n  user: {{}}\n",
            self.address
        );
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Listens although connections of an earlier life may still be known.
fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket
        .bind(&address.into())
        .with_context(|| format!("bind {address}"))?;
    socket.listen(128)?;
    Ok(socket.into())
}
