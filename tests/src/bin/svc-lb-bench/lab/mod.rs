//! Real traffic between two pods of one node, through nothing, svc-lb, and kube-proxy's rule sets, in turn.
//!
//! Each way has a network of its own, all of them there at once, so that a round meets them on the same machine:
//! what counts are the ratios of a round. The client's pod and the server's pod hang on the node by a veth each.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;
use svc_lb_tests::lab::addresses::SERVICES;
use svc_lb_tests::lab::agent::AgentConfig;
use svc_lb_tests::lab::objects::{Manifests, Protocol, Service, nodes};
use svc_lb_tests::lab::{AgentProcess, Family, Lab, NodeName, eventually};

use crate::figures::Figure;

mod rules;
mod traffic;

use self::traffic::{Measure, Server};

/// Port of the service and of its endpoint.
const PORT: u16 = 80;
const TARGET: u16 = 8_080;

/// What lies between client and server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// The node's routes and nothing else: the limit.
    Routing,
    /// svc-lb, each packet translated at tc.
    Tc,
    /// The rules of kube-proxy's nftables mode.
    Nftables,
    /// The rules of its iptables mode.
    Iptables,
}

impl Way {
    const ALL: [Self; 4] = [Self::Routing, Self::Tc, Self::Nftables, Self::Iptables];

    const fn name(self) -> &'static str {
        match self {
            Self::Routing => "routing",
            Self::Tc => "svc-lb tc",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    /// How many services it is measured with at the most: loading 10,000 into iptables takes minutes.
    const fn most(self) -> u32 {
        match self {
            Self::Routing | Self::Tc | Self::Nftables => u32::MAX,
            Self::Iptables => 5_000,
        }
    }
}

/// How it is measured.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Only cases whose name contains this.
    pub(crate) only: String,
    /// Rounds of each case.
    pub(crate) rounds: usize,
    /// Numbers of services.
    pub(crate) services: Vec<u32>,
}

/// Measures every case that is wanted.
pub(crate) fn run(options: &Options) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for services in &options.services {
        let mut nets = Vec::new();
        for way in Way::ALL {
            if *services <= way.most() {
                let net = Net::make(way, *services);
                nets.push(net.with_context(|| format!("{} with {services} services", way.name()))?);
            }
        }
        for measure in Measure::ALL {
            if format!("{} {services}", measure.name()).contains(&options.only) {
                figures.extend(in_turn(&nets, *services, *measure, options.rounds)?);
            }
        }
    }
    Ok(figures)
}

/// Rounds of one measure over all networks; whoever goes first goes last in the next round.
fn in_turn(nets: &[Net], services: u32, measure: Measure, rounds: usize) -> Result<Vec<Figure>> {
    let mut values: Vec<Vec<f64>> = nets.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for turn in 0..nets.len() {
            let index = (turn + round) % nets.len();
            if let (Some(net), Some(values)) = (nets.get(index), values.get_mut(index)) {
                let value = net
                    .server
                    .measure(measure, net.lab.pod("client").ns(), net.to);
                values.push(value.with_context(|| net.way.name())?);
            }
        }
    }
    let mut figures = Vec::new();
    let limit = values.first().cloned().unwrap_or_default();
    for (net, values) in nets.iter().zip(&values) {
        let case = format!(
            "{}, {services} services, {}",
            measure.name(),
            net.way.name()
        );
        eprintln!("  {case}");
        figures.push(Figure::of(case.clone(), measure.unit(), values));
        if net.way != Way::Routing {
            let ratios = values
                .iter()
                .zip(&limit)
                .map(|(value, limit)| value / limit)
                .collect::<Vec<_>>();
            figures.push(Figure::of(case, "of routing", &ratios));
        }
    }
    Ok(figures)
}

/// One network, and what is between its pods.
struct Net {
    way: Way,
    /// Where the client sends to.
    to: SocketAddr,
    // In the order in which they are dropped.
    server: Server,
    _agent: Option<AgentProcess>,
    lab: Lab,
}

impl Net {
    fn make(way: Way, services: u32) -> Result<Self> {
        let name = format!("bench-{}-{services}", way.name().replace(' ', "-"));
        let lab = Lab::builder()
            .name(&name)
            .routed("client")
            .routed("server")
            .build()?;
        let server = lab.pod("server");
        let vip = SERVICES.nth(1);
        let mut agent = None;
        let to = match way {
            Way::Routing => server.addr().socket(Family::V4, TARGET),
            Way::Tc | Way::Nftables | Way::Iptables => vip.socket(Family::V4, PORT),
        };
        match way {
            Way::Routing => {}
            Way::Tc => agent = Some(start(&lab, services)?),
            Way::Nftables => rules::nftables(&lab, services, server.addr().v4)?,
            Way::Iptables => rules::iptables(&lab, services, server.addr().v4)?,
        }
        let server = Server::start(server.ns(), TARGET)?;
        eventually("the way is there", Duration::from_mins(2), || {
            traffic::reaches(lab.pod("client").ns(), to)
        });
        Ok(Self {
            way,
            to,
            server,
            _agent: agent,
            lab,
        })
    }
}

/// The agent with so many services, of which the last is the one that is used.
fn start(lab: &Lab, services: u32) -> Result<AgentProcess> {
    let server = lab.pod("server");
    let target = Service::new("bench", SERVICES.nth(1))
        .port("tcp", Protocol::Tcp, PORT, TARGET)
        .port("udp", Protocol::Udp, PORT, TARGET)
        .pods([server]);
    let mut items = nodes();
    for n in 1..services {
        let ip = rules::other(n);
        items.push(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("other-{n}"), "namespace": "default"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"],
                "ports": [{"name": "tcp", "protocol": "TCP", "port": PORT, "targetPort": TARGET}]},
        }));
        items.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("other-{n}"), "namespace": "default",
                "labels": {"kubernetes.io/service-name": format!("other-{n}")}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [server.addr().v4], "nodeName": NodeName::A.as_str()}],
            "ports": [{"name": "tcp", "protocol": "TCP", "port": TARGET}],
        }));
    }
    items.extend(target.objects());
    let manifests = Manifests::create(lab.dir(), &[])?;
    manifests.write_items(&items)?;
    let config = AgentConfig::manifests(manifests.path()).args(["--map-size", "services=65536"]);
    AgentProcess::start(lab, config)
}
