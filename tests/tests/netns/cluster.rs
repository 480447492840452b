//! What the scenarios share: servers in every pod, one service behind every kind of frontend, the agent.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use svc_lb_tests::lab::addresses::{BRIDGED, EXTERNAL, LB_POOL, NODE_A, SERVICES};
use svc_lb_tests::lab::agent::{AgentConfig, AgentProcess};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::{Manifests, Protocol, Service};
use svc_lb_tests::lab::server::{self, Server};
use svc_lb_tests::lab::{
    Attach, Dual, Family, Lab, Mode, Namespace, NodeName, Pod, eventually, overlay,
};

/// How long the agent may take to act on a change.
pub(crate) const SOON: Duration = Duration::from_secs(5);
/// Long enough for an answer within the lab.
pub(crate) const BRIEF: Duration = Duration::from_millis(200);
/// Ports of the servers in the pods.
pub(crate) const HTTP: u16 = 8080;
pub(crate) const ECHO: u16 = 7000;
pub(crate) const UDP: u16 = 5353;
/// Ports of the services.
pub(crate) const SERVICE_HTTP: u16 = 80;
pub(crate) const SERVICE_ECHO: u16 = 7;
/// One number, two protocols (SEMANTICS A5).
pub(crate) const SERVICE_UDP: u16 = 7;
pub(crate) const NODE_HTTP: u16 = 30080;
pub(crate) const NODE_ECHO: u16 = 30007;
pub(crate) const NODE_UDP: u16 = 30053;

/// Pods of every kind on both nodes, clients among them, and one outside.
pub(crate) fn lab() -> Lab {
    Lab::builder()
        .routed("r1")
        .bridged("b1")
        .remote("far")
        .routed("client-r")
        .bridged("client-b")
        .clients(1)
        .build()
        .unwrap()
}

/// The servers of one pod: HTTP, TCP echo, UDP echo, each naming the pod.
pub(crate) fn serve(pod: &Pod) -> [Server; 3] {
    [
        server::http(pod.ns(), pod.name(), HTTP).unwrap(),
        server::tcp_echo(pod.ns(), pod.name(), ECHO).unwrap(),
        server::udp_echo(pod.ns(), pod.name(), UDP).unwrap(),
    ]
}

/// The servers of every pod.
pub(crate) fn serve_all(lab: &Lab) -> Vec<[Server; 3]> {
    lab.pods().map(serve).collect()
}

/// A service behind a ClusterIP, a NodePort, a load balancer's address and an external address of each family.
pub(crate) fn everywhere(name: &str) -> Service {
    Service::new(name, cluster_ip(80))
        .port("http", Protocol::Tcp, SERVICE_HTTP, HTTP)
        .node_port(NODE_HTTP)
        .port("echo", Protocol::Tcp, SERVICE_ECHO, ECHO)
        .node_port(NODE_ECHO)
        .port("udp", Protocol::Udp, SERVICE_UDP, UDP)
        .node_port(NODE_UDP)
        .load_balancer(LB_POOL.nth(80))
        .external_ips(EXTERNAL.nth(80))
}

/// A service behind ClusterIPs only.
pub(crate) fn inside(name: &str, n: u16) -> Service {
    Service::new(name, cluster_ip(n))
        .port("http", Protocol::Tcp, SERVICE_HTTP, HTTP)
        .port("echo", Protocol::Tcp, SERVICE_ECHO, ECHO)
        .port("udp", Protocol::Udp, SERVICE_UDP, UDP)
}

/// The `n`th ClusterIPs.
pub(crate) fn cluster_ip(n: u16) -> Dual {
    SERVICES.nth(n)
}

/// A way to [`everywhere`]: addresses and the ports of its TCP echo and its UDP echo.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frontend {
    pub(crate) kind: &'static str,
    pub(crate) addr: Dual,
    pub(crate) echo: u16,
    pub(crate) udp: u16,
}

pub(crate) const CLUSTER_IP: Frontend = Frontend {
    kind: "ClusterIP",
    addr: SERVICES.nth(80),
    echo: SERVICE_ECHO,
    udp: SERVICE_UDP,
};
pub(crate) const NODE_PORT: Frontend = Frontend {
    kind: "NodePort",
    addr: NODE_A,
    echo: NODE_ECHO,
    udp: NODE_UDP,
};
pub(crate) const LOAD_BALANCER: Frontend = Frontend {
    kind: "LoadBalancer",
    addr: LB_POOL.nth(80),
    echo: SERVICE_ECHO,
    udp: SERVICE_UDP,
};
pub(crate) const EXTERNAL_IP: Frontend = Frontend {
    kind: "externalIP",
    addr: EXTERNAL.nth(80),
    echo: SERVICE_ECHO,
    udp: SERVICE_UDP,
};

/// What outside clients can use.
pub(crate) const FROM_OUTSIDE: [Frontend; 3] = [NODE_PORT, LOAD_BALANCER, EXTERNAL_IP];
/// What pods can use.
pub(crate) const FROM_PODS: [Frontend; 4] = [CLUSTER_IP, NODE_PORT, LOAD_BALANCER, EXTERNAL_IP];

/// A client: where it is and what it is called on the wire.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) ns: &'a Namespace,
    pub(crate) addr: Dual,
    lab: &'a Lab,
    /// Whose packets get node-a's address as their source.
    pub(crate) masked: Masked,
}

/// Which backends see node-a in the client's place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Masked {
    /// None.
    Never,
    /// Those of other nodes.
    Remote,
    /// All.
    Always,
}

impl<'a> Source<'a> {
    pub(crate) fn pod(lab: &'a Lab, name: &str) -> Self {
        let pod = lab.pod(name);
        Self {
            ns: pod.ns(),
            addr: pod.addr(),
            lab,
            // A pod of another node is an outside client to this one.
            masked: match pod.node() {
                NodeName::A => Masked::Never,
                NodeName::B => Masked::Remote,
            },
        }
    }

    pub(crate) fn outside(lab: &'a Lab, n: usize) -> Self {
        let client = lab.client(n);
        Self {
            ns: client.ns(),
            addr: client.addr(),
            lab,
            masked: Masked::Remote,
        }
    }

    /// The same under settings that mask more, or less.
    pub(crate) fn masked(self, masked: Masked) -> Self {
        Self { masked, ..self }
    }

    /// The address that a pod sees of it.
    fn seen_by(&self, server: &str) -> Dual {
        // Or a host's network.
        let pod = self.lab.pods().find(|pod| pod.name() == server);
        let node = pod.map_or(server, |pod| pod.node().as_str());
        let masked = match self.masked {
            Masked::Never => false,
            Masked::Remote => node != NodeName::A.as_str(),
            Masked::Always => true,
        };
        match pod.map(Pod::attach) {
            _ if !masked => self.addr,
            // The address of the interface that leads there.
            Some(Attach::Bridged) => BRIDGED.nth(1),
            Some(Attach::Routed) if self.lab.has_overlay() && node != NodeName::A.as_str() => {
                overlay::ADDRESS_A
            }
            Some(Attach::Routed) | None => NODE_A,
        }
    }
}

/// Starts the agent with services that are all reachable once it is ready.
pub(crate) fn start(lab: &Lab, services: &[Service]) -> (Manifests, AgentProcess) {
    start_with(lab, services, |config| config)
}

/// The same with the uplinks in a mode.
pub(crate) fn start_in(lab: &Lab, services: &[Service], mode: Mode) -> (Manifests, AgentProcess) {
    start_with(lab, services, |config| config.xdp(mode.as_str()))
}

/// Environment variable with the modes to run scenarios in, separated by commas: all unless it says otherwise.
const MODES: &str = "SVC_LB_TEST_MODES";

/// Runs a scenario with node-a's uplinks in each mode, and names it in a failure.
pub(crate) fn each_mode(mut scenario: impl FnMut(Mode)) {
    struct Named(Mode);
    impl Drop for Named {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("with --xdp {}", self.0.as_str());
            }
        }
    }
    let wanted = std::env::var(MODES).ok();
    let is_wanted = |mode: &Mode| {
        wanted
            .as_deref()
            .is_none_or(|wanted| wanted.split(',').any(|name| name == mode.as_str()))
    };
    for mode in Mode::ALL.into_iter().filter(is_wanted) {
        let _named = Named(mode);
        scenario(mode);
    }
}

/// The same with other settings.
pub(crate) fn start_with(
    lab: &Lab,
    services: &[Service],
    settings: impl FnOnce(AgentConfig) -> AgentConfig,
) -> (Manifests, AgentProcess) {
    let manifests = Manifests::create(lab.dir(), services).unwrap();
    let config = settings(AgentConfig::manifests(manifests.path()));
    let agent = AgentProcess::start(lab, config).unwrap();
    (manifests, agent)
}

/// Shows that TCP connections and datagrams from `source` to `frontend` reach each of `expected` and nobody else,
/// that the servers see the address they should and the client only ever hears from the frontend.
pub(crate) fn reaches(source: Source<'_>, frontend: Frontend, family: Family, expected: &[&str]) {
    let what = format!("{} -> {} over {family}", source.ns.name(), frontend.kind);
    let expected: BTreeSet<String> = expected.iter().map(|&name| name.to_owned()).collect();
    let client = Client::of(source.ns);

    let to = frontend.addr.socket(family, frontend.echo);
    let mut seen = BTreeSet::new();
    for _ in 0..TRIES {
        let mut echo = client
            .echo(to)
            .unwrap_or_else(|error| panic!("{what}: TCP: {error:#}"));
        echo.ping("hello")
            .unwrap_or_else(|error| panic!("{what}: TCP: {error:#}"));
        check_source(
            &what,
            source,
            echo.server(),
            echo.seen_as(),
            frontend,
            family,
        );
        seen.insert(echo.server().to_owned());
        if seen == expected {
            break;
        }
    }
    assert_eq!(seen, expected, "{what}: TCP");

    let to = frontend.addr.socket(family, frontend.udp);
    let mut seen = BTreeSet::new();
    for _ in 0..TRIES {
        let answer = client
            .udp(to.ip())
            .and_then(|socket| socket.ask_at(to, "hello"))
            .unwrap_or_else(|error| panic!("{what}: UDP: {error}"));
        assert_eq!(answer.from, to, "{what}: UDP answer's source");
        assert_eq!(answer.text, "hello", "{what}: UDP");
        check_source(
            &what,
            source,
            &answer.server,
            answer.seen_as,
            frontend,
            family,
        );
        seen.insert(answer.server);
        if seen == expected {
            break;
        }
    }
    assert_eq!(seen, expected, "{what}: UDP");
}

/// Enough to meet each of a handful of backends but for one run in a billion.
const TRIES: usize = 150;

/// Servers see the client's address or the node's; a pod that reaches itself sees the frontend's (SEMANTICS C10, C11).
fn check_source(
    what: &str,
    source: Source<'_>,
    server: &str,
    seen_as: SocketAddr,
    frontend: Frontend,
    family: Family,
) {
    let itself = source.ns.name() == format!("pod-{server}");
    let expected = if itself && source.masked == Masked::Never {
        frontend.addr
    } else {
        source.seen_by(server)
    };
    assert_eq!(
        seen_as.ip(),
        expected.of(family),
        "{what}: client's address at {server}"
    );
}

/// Waits until one TCP connection to `to` lands on one of `servers`.
pub(crate) fn settles(client: Client<'_>, to: SocketAddr, servers: &[&str]) {
    eventually(&format!("{to} leads to {servers:?}"), SOON, || {
        let server = client.echo(to)?.server().to_owned();
        ensure!(servers.contains(&server.as_str()), "reached {server}");
        Ok(())
    });
}

/// Waits until nobody in `gone` is hit by new connections any longer.
pub(crate) fn leaves(client: Client<'_>, to: SocketAddr, gone: &[&str]) {
    eventually(&format!("{gone:?} leave {to}"), SOON, || {
        for _ in 0..20 {
            let server = client.echo(to)?.server().to_owned();
            ensure!(!gone.contains(&server.as_str()), "reached {server}");
        }
        Ok(())
    });
}

/// Waits until connections to a frontend land on each of `servers` and on nobody else.
pub(crate) fn serves(source: Source<'_>, frontend: Frontend, family: Family, servers: &[&str]) {
    let to = frontend.addr.socket(family, frontend.echo);
    let what = format!("{} leads to {servers:?} over {family}", frontend.kind);
    let expected: BTreeSet<&str> = servers.iter().copied().collect();
    eventually(&what, SOON, || {
        let hits = (0..30).map(|_| Ok(Client::of(source.ns).echo(to)?.server().to_owned()));
        let hits: BTreeSet<String> = hits.collect::<Result<_>>()?;
        ensure!(
            hits.iter().map(String::as_str).eq(expected.iter().copied()),
            "{hits:?}"
        );
        Ok(())
    });
}

/// Waits until nobody answers new connections any more.
pub(crate) fn ends(source: Source<'_>, frontend: Frontend, family: Family) {
    let to = frontend.addr.socket(family, frontend.echo);
    eventually(&format!("{to} is over"), SOON, || {
        let echo = Client::of(source.ns).patience(BRIEF).echo(to);
        ensure!(echo.is_err(), "served");
        Ok(())
    });
}

/// Runs a scenario's body for each family and names it in a failure.
pub(crate) fn each_family(mut body: impl FnMut(Family) -> Result<()>) {
    for family in Family::BOTH {
        body(family).unwrap_or_else(|error| panic!("{family}: {error:#}"));
    }
}
