//! The agent and its API server.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use serde_json::Value;
use svc_lb::dataplane::pins::Pins;
use svc_lb_common::limits::name;
use svc_lb_common::service::Service as ServiceElement;
use svc_lb_tests::apiserver::ApiServer;
use svc_lb_tests::lab::agent::{AgentConfig, AgentProcess};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::crowd::Crowd;
use svc_lb_tests::lab::objects::{Service, nodes};
use svc_lb_tests::lab::{Family, Lab, privileged};

use crate::cluster::{
    CLUSTER_IP, NODE_PORT, Source, everywhere, leaves, reaches, serve_all, settles,
};

/// How long the API server stays away.
const AWAY: Duration = Duration::from_mins(1);
/// How long the agent may take once it is back.
const BACK: Duration = Duration::from_secs(1);

fn apply(server: &ApiServer, objects: impl IntoIterator<Item = Value>) {
    for object in objects {
        server.apply(object).unwrap();
    }
}

/// Starts the double on node-a, and the agent that watches it.
fn start(lab: &Lab, services: &[Service]) -> (ApiServer, AgentProcess) {
    let server = lab.node_a().run(|| ApiServer::start(0)).unwrap();
    apply(&server, nodes());
    apply(&server, services.iter().flat_map(Service::objects));
    let config = AgentConfig::cluster(server.kubeconfig(lab.dir()).unwrap());
    let agent = AgentProcess::start(lab, config).unwrap();
    (server, agent)
}

/// G7, G8: a cluster's Services serve; for a minute without the API server no connection breaks, new ones work and the
/// node is healthy; a second after its return the node knows what happened meanwhile.
#[test]
fn the_api_server_goes_and_returns() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .bridged("b1")
        .routed("client-r")
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let (mut server, agent) = start(
        &lab,
        &[everywhere("web").pods(["r1", "b1"].map(|name| lab.pod(name)))],
    );
    for family in Family::BOTH {
        reaches(
            Source::pod(&lab, "client-r"),
            CLUSTER_IP,
            family,
            &["r1", "b1"],
        );
        reaches(Source::outside(&lab, 0), NODE_PORT, family, &["r1", "b1"]);
    }
    let open = |ns, frontend: crate::cluster::Frontend, family| {
        Crowd::open(ns, frontend.addr.socket(family, frontend.echo), 200).unwrap()
    };
    let crowds = [
        open(lab.pod("client-r").ns(), CLUSTER_IP, Family::V6),
        open(lab.client(0).ns(), NODE_PORT, Family::V4),
    ];
    let node = Client::of(lab.node_a());
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let healthz = format!("http://{}/healthz", local(10_256));
    // H5: kube-proxy's tools find what they look for.
    let mode = node.curl_ok(&[&format!("http://{}/proxyMode", local(10_249))]);
    assert_eq!(mode.unwrap(), "svc-lb");

    server.kill();
    let until = Instant::now() + AWAY;
    apply(&server, everywhere("web").pods([lab.pod("b1")]).objects());
    while Instant::now() < until {
        node.curl_ok(&["--fail", &healthz]).unwrap();
        for crowd in &crowds {
            let broken = crowd.verify();
            assert!(broken.is_empty(), "{:?}", broken.first());
        }
        for family in Family::BOTH {
            let to = CLUSTER_IP.addr.socket(family, CLUSTER_IP.echo);
            settles(Client::of(lab.pod("client-r").ns()), to, &["r1", "b1"]);
        }
        thread::sleep(Duration::from_secs(2));
    }
    let status = agent.ask(&["status"]).unwrap();
    assert!(
        status.contains("cannot be watched, what is programmed stays"),
        "{status}"
    );

    // Each service's range of slots is one word, written when what it leads to changes.
    let map = MapData::from_pin(Pins::new(agent.pin_dir()).map(name::SERVICES)).unwrap();
    let map: Array<_, ServiceElement> = Map::Array(map).try_into().unwrap();
    let words = || -> Vec<u64> {
        let ranges = (0..32).map(|index| map.get(&index, 0).unwrap().cluster.0);
        ranges.collect()
    };
    let before = words();
    lab.node_a().run(|| server.revive()).unwrap();
    let back = Instant::now();
    while words() == before {
        assert!(back.elapsed() < BACK, "the maps are as they were before");
        thread::sleep(Duration::from_millis(1));
    }
    eprintln!("{:?} until the maps know", back.elapsed());
    for family in Family::BOTH {
        let to = CLUSTER_IP.addr.socket(family, CLUSTER_IP.echo);
        leaves(Client::of(lab.pod("client-r").ns()), to, &["r1"]);
    }
    for crowd in &crowds {
        let broken = crowd.verify();
        assert!(broken.is_empty(), "{:?}", broken.first());
    }
}
