//! ICMP errors about packets of flows reach who sent those, and make sense there.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use svc_lb_tests::lab::addresses::{NODE_A, NODE_B, ROUTER_OUTSIDE};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::process::collected;
use svc_lb_tests::lab::{AgentProcess, BRIDGE, Family, Lab, Namespace, eventually, privileged};

use crate::cluster::{
    self, BRIEF, CLUSTER_IP, FROM_OUTSIDE, FROM_PODS, Frontend, LOAD_BALANCER, NODE_PORT, SOON,
    each_mode, everywhere, serve_all, start_in,
};

const ALL: [&str; 3] = ["r1", "b1", "far"];
/// The MTU of links that are smaller than Ethernet's: IPv6's least.
const SMALL: &str = "1280";

fn lab() -> Lab {
    let lab = cluster::lab();
    // Hosts would send one error a second.
    let pods = lab.pods().map(svc_lb_tests::lab::Pod::ns);
    for host in pods.chain([lab.node_a(), lab.node_b(), lab.router()]) {
        host.sysctl("net.ipv4.icmp_ratelimit", "0").unwrap();
        host.sysctl("net.ipv6.icmp.ratelimit", "0").unwrap();
    }
    lab
}

/// Clients and the frontends that they can use.
fn clients(lab: &Lab) -> impl Iterator<Item = (&Namespace, &'static [Frontend])> {
    [
        (lab.client(0).ns(), &FROM_OUTSIDE[..]),
        (lab.pod("client-r").ns(), &FROM_PODS[..]),
        (lab.pod("client-b").ns(), &FROM_PODS[..]),
    ]
    .into_iter()
}

fn ip(host: &Namespace, args: &[&str]) -> Result<()> {
    let mut ip = collected("ip");
    ip.args(args);
    let output = host.start(ip)?.output(Duration::from_secs(5))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("ip {}: {said}", args.join(" "));
    }
    Ok(())
}

/// How many errors about flows were translated.
fn translated(agent: &AgentProcess) -> u64 {
    let counters = agent.dump("counters").unwrap();
    let counters = counters.as_array().unwrap().iter();
    let errors = counters.filter(|counter| counter["name"] == "icmp_error");
    errors
        .filter_map(|counter| counter["packets"].as_u64())
        .sum()
}

/// E6: a datagram to a port that nobody listens at: the backend says so, and the client's connected socket is refused.
#[test]
fn a_closed_port_is_told_to_the_client() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for name in ALL {
        each_mode(|mode| {
            let (_manifests, agent) =
                start_in(&lab, &[everywhere("web").pods([lab.pod(name)])], mode);
            for (client, frontends) in clients(&lab) {
                for (frontend, family) in frontends
                    .iter()
                    .flat_map(|frontend| Family::BOTH.map(|family| (frontend, family)))
                {
                    let what = format!("{} of {name} from {}", frontend.kind, client.name());
                    let to = frontend.addr.socket(family, frontend.udp);
                    let before = translated(&agent);
                    let socket = Client::of(client)
                        .patience(BRIEF)
                        .udp_connected(to)
                        .unwrap();
                    eventually(&format!("{what}: refused over {family}"), SOON, || {
                        let error = socket.ask("anybody?").err().context("answered")?;
                        ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
                        Ok(())
                    });
                    assert!(translated(&agent) > before, "{what}: not counted");
                }
            }
        });
    }
}

/// Has every path to `to` behind `via` of a router take packets of [`SMALL`] bytes at most.
fn narrow(router: &Namespace, to: std::net::IpAddr, via: &[&str]) -> Result<()> {
    let (family, length) = if to.is_ipv4() {
        ("-4", 32)
    } else {
        ("-6", 128)
    };
    let to = format!("{to}/{length}");
    let path = ["route", "replace", &to];
    let limit = ["mtu", "lock", SMALL];
    ip(router, &[&[family], &path[..], via, &limit].concat())
}

/// E6: PMTU discovery through frontends, in both directions and both families: connections carry bulk over paths with a small
/// link behind the node, and one on the clients' side, whose routers send errors to the frontend.
#[test]
fn connections_learn_the_size_of_their_path() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let (node_a, node_b) = (lab.node_a(), lab.node_b());
    let pods = lab.pods().map(svc_lb_tests::lab::Pod::ns);
    let hosts: Vec<_> = pods.chain([lab.client(0).ns(), node_a, node_b]).collect();
    for family in Family::BOTH {
        for (router, name) in [(node_a, "r1"), (node_b, "far")] {
            let pod = lab.pod(name);
            narrow(router, pod.addr().of(family), &["dev", pod.interface()]).unwrap();
        }
        narrow(node_a, lab.pod("b1").addr().of(family), &["dev", BRIDGE]).unwrap();
        narrow(
            lab.router(),
            lab.client(0).addr().of(family),
            &["dev", "outside"],
        )
        .unwrap();
    }
    for name in ALL {
        each_mode(|mode| {
            let (_manifests, agent) =
                start_in(&lab, &[everywhere("web").pods([lab.pod(name)])], mode);
            for (client, frontends) in clients(&lab) {
                // A bridge is no router: nobody there would say what is too big.
                if client.name() == "pod-client-b" && name == "b1" {
                    continue;
                }
                for (frontend, family) in frontends
                    .iter()
                    .flat_map(|frontend| Family::BOTH.map(|family| (frontend, family)))
                {
                    let what = format!(
                        "{} of {name} from {} over {family}",
                        frontend.kind,
                        client.name()
                    );
                    for host in &hosts {
                        for family in ["-4", "-6"] {
                            ip(host, &[family, "route", "flush", "cache"]).unwrap();
                        }
                    }
                    let before = translated(&agent);
                    let to = frontend.addr.socket(family, frontend.echo);
                    let mut echo = Client::of(client)
                        .echo(to)
                        .unwrap_or_else(|error| panic!("{what}: {error:#}"));
                    echo.ping(&"long ".repeat(4_000))
                        .unwrap_or_else(|error| panic!("{what}: {error:#}"));
                    let after = translated(&agent);
                    assert!(after > before, "{what}: no error was translated");
                }
            }
        });
    }
}

/// E6: who traces the route to a frontend sees every router's own address, and the frontend at its end.
#[test]
fn a_traced_route_makes_sense() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for (name, route) in [
        ("r1", &[ROUTER_OUTSIDE, NODE_A][..]),
        ("far", &[ROUTER_OUTSIDE, NODE_A, NODE_B]),
    ] {
        each_mode(|mode| {
            let (_manifests, _agent) =
                start_in(&lab, &[everywhere("web").pods([lab.pod(name)])], mode);
            for (frontend, family) in [NODE_PORT, LOAD_BALANCER]
                .into_iter()
                .flat_map(|frontend| Family::BOTH.map(|family| (frontend, family)))
            {
                let to = frontend.addr.socket(family, frontend.udp);
                let hops = route.iter().map(|hop| hop.of(family)).chain([to.ip()]);
                for (hops, expected) in (1..).zip(hops) {
                    let what = format!("{name} by {}, hop {hops}", frontend.kind);
                    let socket = Client::of(lab.client(0).ns()).udp_connected(to).unwrap();
                    socket.hops(hops).unwrap();
                    eventually(&format!("{what}: {expected}"), SOON, || {
                        // What was told about the one before comes back here.
                        let _told = socket.socket().send(b"where?");
                        std::thread::sleep(Duration::from_millis(5));
                        let teller = socket.told_by()?;
                        ensure!(teller == expected, "told by {teller}");
                        Ok(())
                    });
                }
            }
        });
    }
}

/// E6: a pod's own errors to itself, and what of them it sees: its frontend.
#[test]
fn a_pod_tells_itself() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let name = "client-r";
    let (_manifests, _agent) = start_in(
        &lab,
        &[everywhere("web").pods([lab.pod(name)])],
        svc_lb_tests::lab::Mode::Tc,
    );
    for family in Family::BOTH {
        let to = CLUSTER_IP.addr.socket(family, CLUSTER_IP.udp);
        let client = Client::of(lab.pod(name).ns()).patience(BRIEF);
        let socket = client.udp_connected(to).unwrap();
        eventually(&format!("refused over {family}"), SOON, || {
            let error = socket.ask("anybody?").err().context("answered")?;
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
            Ok(())
        });
    }
}
