//! A server for each Service that asks for one: tells load balancers whether this node has
//! endpoints of it (SEMANTICS G6, D3).

use std::collections::{BTreeMap, BTreeSet};
use std::future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::{debug, warn};

use super::listen::{ListenOn, Port};
use super::proxy::{Moment, ProxyHealth};
use super::{HEADERS, RETRY};
use crate::compile::HealthCheck;
use crate::model::ObjectName;

/// Load balancers send a node with more endpoints more clients.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is to be served from now on.
#[derive(Debug)]
pub enum Edit {
    /// A Service's health check is this one, or it has none.
    Services(Vec<(ObjectName, Option<HealthCheck>)>),
    /// Where all of them listen.
    ListenOn(ListenOn),
}

/// One server, for the status.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct ServiceHealthStatus {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node.
    pub local_endpoints: u32,
    /// Where it cannot listen, and why; it tries again.
    pub failures: Vec<String>,
}

/// All servers, by Service.
pub type Report = BTreeMap<ObjectName, ServiceHealthStatus>;

/// Keeps the servers as the edits say, until it is dropped or nobody sends any more.
pub async fn run(
    proxy: Arc<ProxyHealth>,
    mut edits: mpsc::UnboundedReceiver<Edit>,
    report: watch::Sender<Report>,
) {
    let mut servers = Servers::new(proxy, report);
    loop {
        let retry = async {
            if servers.unopened.is_empty() {
                future::pending::<()>().await;
            } else {
                sleep(RETRY).await;
            }
        };
        tokio::select! {
            edit = edits.recv() => match edit {
                Some(edit) => servers.apply(edit).await,
                None => return,
            },
            () = retry => {}
        }
        while let Ok(edit) = edits.try_recv() {
            servers.apply(edit).await;
        }
        servers.open();
    }
}

#[derive(Debug)]
struct Servers {
    proxy: Arc<ProxyHealth>,
    listen_on: ListenOn,
    services: BTreeMap<ObjectName, Served>,
    /// Those that do not listen everywhere yet.
    unopened: BTreeSet<ObjectName>,
    report: watch::Sender<Report>,
}

#[derive(Debug)]
struct Served {
    port: Port,
    answer: Arc<Answer>,
}

impl Servers {
    fn new(proxy: Arc<ProxyHealth>, report: watch::Sender<Report>) -> Self {
        Self {
            proxy,
            listen_on: ListenOn::default(),
            services: BTreeMap::new(),
            unopened: BTreeSet::new(),
            report,
        }
    }

    /// Notes what is to be served and closes what is not. Opens nothing: a port may be free only
    /// when all edits are in.
    async fn apply(&mut self, edit: Edit) {
        match edit {
            Edit::Services(services) => {
                for (name, check) in services {
                    self.set(name, check).await;
                }
            }
            Edit::ListenOn(listen_on) => {
                self.listen_on = listen_on;
                let wanted = self.listen_on.addresses();
                for served in self.services.values_mut() {
                    served.port.keep(&wanted).await;
                }
                self.unopened.extend(self.services.keys().cloned());
            }
        }
    }

    async fn set(&mut self, name: ObjectName, check: Option<HealthCheck>) {
        if let Some(check) = check
            && let Some(served) = self.services.get(&name)
            && served.port.number() == check.port.get()
        {
            served
                .answer
                .local_endpoints
                .store(check.local_endpoints, Ordering::Relaxed);
            self.tell(&name);
            return;
        }
        self.unopened.remove(&name);
        if let Some(served) = self.services.remove(&name) {
            debug!(service = %name, port = served.port.number(), "health check closed");
            served.port.close().await;
        }
        if let Some(check) = check {
            let answer = Arc::new(Answer {
                name: name.clone(),
                local_endpoints: check.local_endpoints.into(),
                proxy: Arc::clone(&self.proxy),
            });
            let port = Port::new(check.port.get(), router(Arc::clone(&answer)));
            self.services.insert(name.clone(), Served { port, answer });
            self.unopened.insert(name.clone());
        }
        self.tell(&name);
    }

    /// Opens what is not open.
    fn open(&mut self) {
        let wanted = self.listen_on.addresses();
        for name in std::mem::take(&mut self.unopened) {
            let Some(Served { port, .. }) = self.services.get_mut(&name) else {
                continue;
            };
            let before = port.failures();
            port.open(&wanted);
            let failures = port.failures();
            for failure in failures.iter().filter(|failure| !before.contains(failure)) {
                warn!(service = %name, "health check: {failure}; tried again");
            }
            if failures != before {
                self.tell(&name);
            }
            if !failures.is_empty() {
                self.unopened.insert(name);
            }
        }
    }

    /// Brings the report up to date for one Service.
    fn tell(&self, name: &ObjectName) {
        let status = self
            .services
            .get(name)
            .map(|Served { port, answer }| ServiceHealthStatus {
                port: port.number(),
                local_endpoints: answer.local_endpoints.load(Ordering::Relaxed),
                failures: port.failures(),
            });
        self.report.send_modify(|report| {
            match status {
                Some(status) => report.insert(name.clone(), status),
                None => report.remove(name),
            };
        });
    }
}

/// What one server answers from.
#[derive(Debug)]
struct Answer {
    name: ObjectName,
    local_endpoints: AtomicU32,
    proxy: Arc<ProxyHealth>,
}

fn router(answer: Arc<Answer>) -> Router {
    async fn respond(State(answer): State<Arc<Answer>>) -> Response {
        let endpoints = answer.local_endpoints.load(Ordering::Relaxed);
        let healthy = answer.proxy.verdict(Moment::now()).healthy;
        let code = if endpoints > 0 && healthy {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        let weight = [(WEIGHT, HeaderValue::from(endpoints))];
        (
            code,
            HEADERS,
            weight,
            body(&answer.name, endpoints, healthy),
        )
            .into_response()
    }
    // Any path, any method.
    Router::new().fallback(respond).with_state(answer)
}

/// kube-proxy's, to the byte: a template from which the indentation was taken.
fn body(name: &ObjectName, endpoints: u32, healthy: bool) -> String {
    let ObjectName { namespace, name } = name;
    format!(
        "{{\n\"service\": {{\n\t\"namespace\": {namespace:?},\n\t\"name\": {name:?}\n}},\n\
         \"localEndpoints\": {endpoints},\n\"serviceProxyHealthy\": {healthy}\n}}"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::{Read as _, Write as _};
    use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
    use std::num::NonZeroU16;
    use std::time::Duration;

    use super::super::free_port;
    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3));
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 4));

    fn free() -> u16 {
        free_port([HERE, THERE])
    }

    fn check(port: u16, local_endpoints: u32) -> Option<HealthCheck> {
        NonZeroU16::new(port).map(|port| HealthCheck {
            port,
            local_endpoints,
        })
    }

    fn edit<const N: usize>(checks: [(&str, Option<HealthCheck>); N]) -> Edit {
        let named = |(name, check)| (ObjectName::new("shop", name), check);
        Edit::Services(checks.map(named).into())
    }

    fn only<const N: usize>(addresses: [IpAddr; N]) -> Edit {
        Edit::ListenOn(ListenOn::Only(addresses.into()))
    }

    async fn servers() -> Servers {
        let start = Moment::now();
        let proxy = ProxyHealth::new(Duration::from_mins(1), start);
        proxy.updated(start);
        let (report, _) = watch::channel(Report::new());
        let mut servers = Servers::new(Arc::new(proxy), report);
        servers.apply(only([HERE])).await;
        servers
    }

    async fn get(address: IpAddr, port: u16, path: &'static str) -> String {
        let asked = tokio::task::spawn_blocking(move || {
            let mut client = TcpStream::connect((address, port))?;
            write!(
                client,
                "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            )?;
            let mut text = String::new();
            client.read_to_string(&mut text)?;
            std::io::Result::Ok(text)
        });
        asked
            .await
            .unwrap()
            .unwrap_or_else(|error| error.kind().to_string())
    }

    /// G6: status line, headers and body, for any path.
    #[tokio::test]
    async fn g6_answers_are_kube_proxys() {
        let mut servers = servers().await;
        let port = free();
        servers.apply(edit([("web", check(port, 2))])).await;
        servers.open();
        let answer = get(HERE, port, "/any/path?at=all").await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let head: BTreeSet<String> = head.lines().map(str::to_lowercase).collect();
        for line in [
            "http/1.1 200 ok",
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 2",
        ] {
            assert!(head.contains(line), "{line} in {head:?}");
        }
        let expected = "{\n\"service\": {\n\t\"namespace\": \"shop\",\n\t\"name\": \"web\"\n},\n\
                        \"localEndpoints\": 2,\n\"serviceProxyHealthy\": true\n}";
        assert_eq!(body, expected);

        servers.apply(edit([("web", check(port, 0))])).await;
        let answer = get(HERE, port, "/").await;
        assert!(
            answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
            "{answer}"
        );
        assert!(answer.contains("\"localEndpoints\": 0,\n\"serviceProxyHealthy\": true"));
        assert!(answer.to_lowercase().contains("weight: 0\r\n"));
    }

    /// G6: a proxy that does not keep up is no place to send clients to; a node that leaves is
    /// the business of /healthz.
    #[tokio::test]
    async fn g6_an_unhealthy_proxy_fails_every_service() {
        let mut servers = servers().await;
        servers.proxy = Arc::new(ProxyHealth::new(Duration::ZERO, Moment::now()));
        servers.proxy.updated(Moment::now());
        servers.proxy.set_node_leaves(true);
        let port = free();
        servers.apply(edit([("web", check(port, 3))])).await;
        servers.open();
        assert!(get(HERE, port, "/").await.starts_with("HTTP/1.1 200"));
        servers.proxy.queued(Moment::now());
        let answer = get(HERE, port, "/").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("\"localEndpoints\": 3,\n\"serviceProxyHealthy\": false"));
    }

    /// G6: ports follow their Services, also where two trade theirs, and free ones are free.
    #[tokio::test]
    async fn g6_ports_follow_their_services() {
        let mut servers = servers().await;
        let (one, two) = (free(), free());
        servers
            .apply(edit([("a", check(one, 1)), ("b", check(two, 1))]))
            .await;
        servers.open();
        let who = async |port| {
            let answer = get(HERE, port, "/").await;
            let name = answer
                .split("\"name\": \"")
                .nth(1)
                .and_then(|rest| rest.chars().next());
            name.unwrap_or('-')
        };
        assert_eq!((who(one).await, who(two).await), ('a', 'b'));
        servers
            .apply(edit([("a", check(two, 1)), ("b", check(one, 1))]))
            .await;
        servers.open();
        assert!(servers.unopened.is_empty());
        assert_eq!((who(one).await, who(two).await), ('b', 'a'));
        servers.apply(edit([("b", None)])).await;
        servers.open();
        drop(TcpListener::bind((HERE, one)).unwrap());
        assert_eq!(who(two).await, 'a');
        assert_eq!(servers.report.borrow().len(), 1);
    }

    /// G6: servers follow the addresses that serve NodePorts.
    #[tokio::test]
    async fn g6_servers_follow_addresses() {
        let mut servers = servers().await;
        let port = free();
        servers.apply(edit([("web", check(port, 1))])).await;
        servers.open();
        assert_eq!(get(THERE, port, "/").await, "connection refused");
        servers.apply(only([THERE])).await;
        servers.open();
        assert!(get(THERE, port, "/").await.starts_with("HTTP/1.1 200"));
        assert_eq!(get(HERE, port, "/").await, "connection refused");
    }

    /// G6: a port that somebody has is named under the Service, and served once it is free.
    #[tokio::test]
    async fn g6_a_taken_port_is_told_and_retried() {
        let proxy = Arc::new(ProxyHealth::new(Duration::from_mins(1), Moment::now()));
        let (edits, receiver) = mpsc::unbounded_channel();
        let (report, mut told) = watch::channel(Report::new());
        let task = tokio::spawn(run(proxy, receiver, report));
        let port = free();
        let taken = TcpListener::bind((HERE, port)).unwrap();
        edits.send(only([HERE])).unwrap();
        edits.send(edit([("web", check(port, 1))])).unwrap();
        let web = ObjectName::new("shop", "web");
        let failures = |report: &Report| report.get(&web).map(|s| s.failures.clone());
        let said = told
            .wait_for(|report| failures(report).is_some_and(|f| !f.is_empty()))
            .await
            .unwrap();
        assert!(failures(&said).unwrap()[0].contains(&format!("127.0.0.3:{port}")));
        drop(said);
        drop(taken);
        told.wait_for(|report| failures(report).is_some_and(|f| f.is_empty()))
            .await
            .unwrap();
        assert!(get(HERE, port, "/").await.starts_with("HTTP/1.1 200"));
        task.abort();
    }
}
