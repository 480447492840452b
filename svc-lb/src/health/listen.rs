//! HTTP servers on one port of some addresses, which come and go without the others noticing.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::RETRY;

/// Connections of one listener at a time; further ones wait. Strangers can reach these ports, and
/// must not use up the agent's descriptors.
const CONNECTIONS: usize = 256;
/// How long a client may take to send a request, from the answer to its last one on.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a connection may last, requests or none.
const CONNECTION: Duration = Duration::from_mins(1);
/// How long the last answer of a connection may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const BACKLOG: i32 = 128;

/// Which of the node's addresses serve.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum ListenOn {
    /// All that the node has and will have, of both families.
    #[default]
    Any,
    /// These.
    Only(BTreeSet<IpAddr>),
}

impl ListenOn {
    /// The addresses to bind.
    pub(super) fn addresses(&self) -> BTreeSet<IpAddr> {
        match self {
            Self::Any => {
                BTreeSet::from([Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()])
            }
            Self::Only(addresses) => addresses.clone(),
        }
    }
}

impl From<IpAddr> for ListenOn {
    /// Either family's unspecified address means both, as in Go and so in kube-proxy.
    fn from(address: IpAddr) -> Self {
        if address.is_unspecified() {
            Self::Any
        } else {
            Self::Only(BTreeSet::from([address]))
        }
    }
}

/// Serves at an address that an option names, until it is dropped; tries again where it cannot. `report` is told where
/// that is.
pub(crate) async fn keep_serving(
    option: &str,
    at: SocketAddr,
    router: Router,
    report: impl Fn(Vec<String>),
) {
    let wanted = ListenOn::from(at.ip()).addresses();
    let mut port = Port::new(at.port(), router);
    let mut known = Vec::new();
    loop {
        port.open(&wanted);
        let failed = port.failures();
        for failure in failed.iter().filter(|failure| !known.contains(*failure)) {
            warn!("{option}: {failure}; tried again");
        }
        known.clone_from(&failed);
        let done = failed.is_empty();
        report(failed);
        if done {
            debug!(address = %at, "{option}: served");
            // Nothing closes it but its end.
            std::future::pending::<()>().await;
        }
        sleep(RETRY).await;
    }
}

/// One port, wherever it is to be open.
#[derive(Debug)]
pub(super) struct Port {
    number: u16,
    router: Router,
    open: BTreeMap<IpAddr, Server>,
    failed: BTreeMap<IpAddr, String>,
}

impl Port {
    /// Open nowhere yet.
    pub(super) fn new(number: u16, router: Router) -> Self {
        Self {
            number,
            router,
            open: BTreeMap::new(),
            failed: BTreeMap::new(),
        }
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }

    /// Closes it at all other addresses; they are free when this returns.
    pub(super) async fn keep(&mut self, wanted: &BTreeSet<IpAddr>) {
        self.failed.retain(|address, _| wanted.contains(address));
        for (_, server) in self
            .open
            .extract_if(.., |address, _| !wanted.contains(address))
        {
            server.close().await;
        }
    }

    /// Opens it where it is not open yet. What fails stays in [`Port::failures`].
    pub(super) fn open(&mut self, wanted: &BTreeSet<IpAddr>) {
        for address in wanted {
            if self.open.contains_key(address) {
                continue;
            }
            match Server::bind(SocketAddr::new(*address, self.number), self.router.clone()) {
                Ok(server) => {
                    self.open.insert(*address, server);
                    self.failed.remove(address);
                }
                // A node without IPv6 has no IPv6 address to serve.
                Err(error)
                    if address.is_unspecified()
                        && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                Err(error) => {
                    self.failed.insert(*address, error.to_string());
                }
            }
        }
    }

    /// Sentences about the addresses where it could not be opened.
    pub(super) fn failures(&self) -> Vec<String> {
        self.failed
            .iter()
            .map(|(address, error)| {
                format!(
                    "cannot listen on {}: {error}",
                    SocketAddr::new(*address, self.number)
                )
            })
            .collect()
    }

    /// Frees it everywhere.
    pub(super) async fn close(mut self) {
        self.keep(&BTreeSet::new()).await;
    }
}

/// One listening socket.
#[derive(Debug)]
struct Server {
    cancel: CancellationToken,
    accepting: JoinHandle<()>,
}

impl Server {
    fn bind(address: SocketAddr, router: Router) -> io::Result<Self> {
        let listener = listener(address)?;
        let cancel = CancellationToken::new();
        let accepting = tokio::spawn(accept(listener, router, cancel.clone()));
        Ok(Self { cancel, accepting })
    }

    /// Ends what is connected and frees the port.
    async fn close(mut self) {
        self.cancel.cancel();
        if let Err(error) = (&mut self.accepting).await {
            warn!(%error, "health listener");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Connections of an earlier agent may linger.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Until it is cancelled.
async fn accept(listener: TcpListener, router: Router, cancel: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let next = async || {
        let permit = Arc::clone(&room)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        Ok::<_, io::Error>((permit, listener.accept().await?))
    };
    loop {
        match cancel.run_until_cancelled(next()).await {
            None => return,
            Some(Ok((permit, (stream, _)))) => {
                tokio::spawn(serve(stream, router.clone(), permit, cancel.clone()));
            }
            Some(Err(error)) => {
                debug!(%error, "health connection not accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(
    stream: TcpStream,
    router: Router,
    _permit: OwnedSemaphorePermit,
    cancel: CancellationToken,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(REQUEST);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = ended(&cancel) => {
            connection.as_mut().graceful_shutdown();
            timeout(FAREWELL, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = result {
        debug!(%error, "health connection");
    }
}

/// The listener goes, or the connection has lasted long enough.
async fn ended(cancel: &CancellationToken) {
    // Both ends are alike.
    let _lasted = timeout(CONNECTION, cancel.cancelled()).await;
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream as Client;

    use axum::routing::get;
    use std::io::{Read as _, Write as _};

    use super::super::free_port;
    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

    fn port() -> Port {
        let number = free_port([HERE, THERE]);
        Port::new(number, Router::new().fallback(get(async || "hello")))
    }

    async fn ask(address: IpAddr, number: u16) -> io::Result<String> {
        tokio::task::spawn_blocking(move || {
            let mut client = Client::connect((address, number))?;
            client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            client.read_to_string(&mut text)?;
            Ok(text)
        })
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn a_port_opens_and_closes_address_by_address() {
        let mut port = port();
        let number = port.number();
        let both = BTreeSet::from([HERE, THERE]);
        port.open(&both);
        assert_eq!(port.failures(), [""; 0]);
        for address in [HERE, THERE] {
            assert!(ask(address, number).await.unwrap().ends_with("hello"));
        }
        port.keep(&BTreeSet::from([THERE])).await;
        assert!(ask(HERE, number).await.is_err());
        assert!(ask(THERE, number).await.unwrap().ends_with("hello"));
        // Free at once: somebody else may have it.
        drop(std::net::TcpListener::bind((HERE, number)).unwrap());
        port.close().await;
        assert!(ask(THERE, number).await.is_err());
    }

    #[tokio::test]
    async fn a_taken_port_is_named_and_opened_once_it_is_free() {
        let mut port = port();
        let number = port.number();
        let taken = std::net::TcpListener::bind((HERE, number)).unwrap();
        let wanted = BTreeSet::from([HERE]);
        port.open(&wanted);
        let [failure] = &port.failures()[..] else {
            panic!("{:?}", port.failures());
        };
        assert!(failure.contains(&format!("127.0.0.1:{number}")) && failure.contains("in use"));
        drop(taken);
        port.open(&wanted);
        assert_eq!(port.failures(), [""; 0]);
        assert!(ask(HERE, number).await.unwrap().ends_with("hello"));
    }

    #[tokio::test]
    async fn closing_ends_kept_connections() {
        let mut port = port();
        let number = port.number();
        port.open(&BTreeSet::from([HERE]));
        let asked = tokio::task::spawn_blocking(move || {
            let mut client = Client::connect((HERE, number)).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            client
                .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap();
            let mut answer = [0; 512];
            let length = client.read(&mut answer).unwrap();
            assert!(answer[..length].ends_with(b"hello"));
            client
        });
        let mut client = asked.await.unwrap();
        port.close().await;
        let read = tokio::task::spawn_blocking(move || client.read(&mut [0]).unwrap());
        assert_eq!(read.await.unwrap(), 0);
    }
}
