//! The way to the API server: credentials, timeouts, and the next server where one does not answer.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::{Request, Response, Uri};
use kube::{
    Client, Config,
    client::Body,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::service_fn;
use tracing::info;

use super::pause::Pause;

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a connection may be silent: bookmarks come every minute.
const SILENCE: Duration = Duration::from_secs(90);
/// A watch that is over sooner was none.
const SHORT: Duration = Duration::from_secs(1);

/// Where the API server is and who we are to it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Access {
    /// `--kubeconfig`; without it, the service account of the pod that we are in.
    pub kubeconfig: Option<PathBuf>,
    /// `--api-server`, in order of preference; without any, what the kubeconfig or the pod says.
    pub servers: Vec<Uri>,
}

/// Why there is no way to the API server.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum AccessError {
    #[error("--kubeconfig {path}")]
    Kubeconfig {
        path: PathBuf,
        source: Box<KubeconfigError>,
    },
    #[error(
        "not in a pod of a cluster: give --kubeconfig, or --manifests or --stream instead of \
         --source kubernetes"
    )]
    NotInCluster(#[source] Box<InClusterError>),
    #[error("the credentials for the API server cannot be used")]
    Client(#[source] Box<kube::Error>),
}

impl Access {
    /// A service account of a cluster is at hand.
    #[must_use]
    pub fn in_cluster() -> bool {
        std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
            && Path::new("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()
    }

    /// Reads the credentials; connects to nobody yet. Must be called within a tokio runtime.
    pub(super) async fn client(&self) -> Result<(Client, Arc<Servers>), AccessError> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let unusable = |source| AccessError::Kubeconfig {
                    path: path.clone(),
                    source: Box::new(source),
                };
                let file = Kubeconfig::read_from(path).map_err(unusable)?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                    .await
                    .map_err(unusable)?
            }
            None => {
                Config::incluster().map_err(|error| AccessError::NotInCluster(Box::new(error)))?
            }
        };
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(SILENCE);
        config.reset_reader_on_write = true;
        // Pauses are ours to choose: see `pause`.
        config.default_retry = false;
        let mut uris = self.servers.clone();
        if uris.is_empty() {
            uris.push(config.cluster_url.clone());
        }
        let mut clients = Vec::new();
        for cluster_url in &uris {
            let mut config = config.clone();
            config.cluster_url = cluster_url.clone();
            let client =
                Client::try_from(config).map_err(|error| AccessError::Client(Box::new(error)))?;
            clients.push(client);
        }
        let servers = Arc::new(Servers {
            clients,
            uris,
            current: AtomicUsize::new(0),
            watches: Mutex::default(),
        });
        let shared = Arc::clone(&servers);
        let send = move |request| Arc::clone(&shared).send(request);
        Ok((
            Client::new(service_fn(send), config.default_namespace),
            servers,
        ))
    }
}

/// All servers; requests go to one until it fails.
pub(super) struct Servers {
    clients: Vec<Client>,
    uris: Vec<Uri>,
    /// Counts on for ever; the server is the remainder.
    current: AtomicUsize,
    /// When the last watch of each path began. The watcher itself goes on at once where one ends.
    watches: Mutex<BTreeMap<String, (Instant, Pause)>>,
}

impl Servers {
    /// The server that is asked.
    pub(super) fn current(&self) -> &Uri {
        let at = self.current.load(Ordering::Relaxed) % self.uris.len();
        self.uris
            .get(at)
            .unwrap_or_else(|| unreachable!("a remainder"))
    }

    async fn send(self: Arc<Self>, request: Request<Body>) -> kube::Result<Response<Body>> {
        let watch = watched_path(&request);
        if let Some(path) = &watch {
            tokio::time::sleep(self.pause_before(path)).await;
        }
        let at = self.current.load(Ordering::Relaxed);
        let client = self.clients.get(at % self.clients.len());
        let client = client.unwrap_or_else(|| unreachable!("a remainder"));
        let response = client.send(request).await;
        let failed = match &response {
            Ok(response) => response.status().is_server_error(),
            Err(_) => true,
        };
        // Who else failed with this server has moved on already.
        if failed
            && self.clients.len() > 1
            && self
                .current
                .compare_exchange(at, at.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            info!(server = %self.current(), "the API server does not answer, the next one is asked");
        }
        if let (false, Some(path)) = (failed, watch) {
            let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
            watches
                .entry(path)
                .or_insert_with(|| (Instant::now(), Pause::default()))
                .0 = Instant::now();
        }
        response
    }

    fn pause_before(&self, path: &str) -> Duration {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        match watches.get_mut(path) {
            Some((begun, pause)) if begun.elapsed() < SHORT => pause.after_short_watch(),
            Some((_, pause)) => {
                pause.reset();
                Duration::ZERO
            }
            None => Duration::ZERO,
        }
    }
}

/// The path, if the request is for a watch.
fn watched_path(request: &Request<Body>) -> Option<String> {
    let mut parameters = request.uri().query()?.split('&');
    parameters
        .any(|parameter| parameter == "watch=true")
        .then(|| request.uri().path().to_owned())
}
