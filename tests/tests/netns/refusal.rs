//! What is refused, and what is met with silence.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use svc_lb_tests::lab::addresses::LB_POOL;
use svc_lb_tests::lab::capture::Capture;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{Family, Lab, privileged};

use crate::cluster::{
    CLUSTER_IP, FROM_OUTSIDE, FROM_PODS, Frontend, NODE_PORT, Source, cluster_ip, each_mode,
    everywhere, reaches, serve_all, start, start_in, start_with,
};

/// Far below any timeout.
const AT_ONCE: Duration = Duration::from_millis(500);
/// The first retransmission comes after a second. An ICMP error that arrives while the connecting thread still holds
/// its socket, which on a veth it does, is kept for that moment by Linux; netfilter's `reject` meets the same.
const RETRANSMITTED: Duration = Duration::from_millis(1500);
/// Long enough that a refusal would have come.
const SILENCE: Duration = Duration::from_millis(700);
/// More datagrams than the limit lets refusals pass.
const FLOOD: usize = 20_000;

pub(crate) fn refused(client: Client<'_>, to: SocketAddr, udp: SocketAddr) {
    let started = Instant::now();
    let error = client.connect(to).unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::ConnectionRefused,
        "TCP to {to}: {error}"
    );
    assert!(
        started.elapsed() < RETRANSMITTED,
        "TCP to {to}: {:?}",
        started.elapsed()
    );

    let started = Instant::now();
    let socket = client.udp_connected(udp).unwrap();
    let error = socket.ask("anybody?").unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::ConnectionRefused,
        "UDP to {udp}: {error}"
    );
    assert!(
        started.elapsed() < AT_ONCE,
        "UDP to {udp}: {:?}",
        started.elapsed()
    );
}

pub(crate) fn silent(client: Client<'_>, to: SocketAddr, udp: SocketAddr) {
    let client = client.patience(SILENCE);
    let error = client.connect(to).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "TCP to {to}: {error}");
    let error = client
        .udp_connected(udp)
        .unwrap()
        .ask("anybody?")
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "UDP to {udp}: {error}");
}

pub(crate) fn ports(frontend: Frontend, family: Family) -> (SocketAddr, SocketAddr) {
    (
        frontend.addr.socket(family, frontend.echo),
        frontend.addr.socket(family, frontend.udp),
    )
}

fn lab() -> Lab {
    Lab::builder()
        .routed("r1")
        .routed("client-r")
        .bridged("client-b")
        .remote("far")
        .clients(1)
        .build()
        .unwrap()
}

/// E1, E2: a service without endpoints is refused at once, to pods and to outside clients, over TCP and UDP.
#[test]
fn no_endpoint_is_refused() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let (_manifests, _agent) = start(&lab, &[everywhere("empty")]);
    for family in Family::BOTH {
        for source in ["client-r", "client-b"] {
            for frontend in FROM_PODS {
                let (tcp, udp) = ports(frontend, family);
                refused(Client::of(lab.pod(source).ns()), tcp, udp);
            }
        }
        for frontend in FROM_OUTSIDE {
            let (tcp, udp) = ports(frontend, family);
            refused(Client::of(lab.client(0).ns()), tcp, udp);
        }
    }
}

/// E1 by the XDP program: outside clients are refused just so.
#[test]
fn no_endpoint_is_refused_in_each_mode() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let services = [everywhere("empty")];
    each_mode(|mode| {
        let (_manifests, _agent) = start_in(&lab, &services, mode);
        for family in Family::BOTH {
            for frontend in FROM_OUTSIDE {
                let (tcp, udp) = ports(frontend, family);
                refused(Client::of(lab.client(0).ns()), tcp, udp);
            }
        }
    });
}

/// E3: a port that a live ClusterIP does not have is refused. E4: an address of the service range that nobody has is
/// silent, and loops nowhere.
#[test]
fn undefined_ports_and_addresses() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    let wire = Capture::start(lab.router(), "node-a").unwrap();
    for family in Family::BOTH {
        let client = Client::of(lab.pod("client-r").ns());
        let undefined = CLUSTER_IP.addr.socket(family, 4444);
        refused(client, undefined, undefined);
        let nobody = cluster_ip(4000).socket(family, 80);
        silent(client, nobody, nobody);
    }
    let leaked: Vec<_> = wire
        .stop()
        .unwrap()
        .into_iter()
        .filter(|seen| {
            [CLUSTER_IP.addr, cluster_ip(4000)]
                .iter()
                .any(|addr| addr.contains(seen.to.ip()))
        })
        .collect();
    assert!(leaked.is_empty(), "left the node: {leaked:?}");
}

/// E3, E4 as in kube-proxy's iptables mode, by setting: nobody answers at a port that a ClusterIP does not have, and what
/// is for an address that nobody has goes where routes lead. C3, C6 with a reject, by setting.
#[test]
fn refusals_are_settings() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let service = everywhere("web")
        .spec("externalTrafficPolicy", "Local".into())
        .spec("internalTrafficPolicy", "Local".into())
        .pods([lab.pod("far")]);
    let (_manifests, _agent) = start_with(&lab, &[service], |config| {
        config.args([
            "--undefined-port=pass",
            "--unallocated-address=pass",
            "--no-local-endpoint=reject",
        ])
    });
    let client = Client::of(lab.pod("client-r").ns());
    for family in Family::BOTH {
        let wire = Capture::start(lab.router(), "node-a").unwrap();
        let undefined = CLUSTER_IP.addr.socket(family, 4444);
        silent(client, undefined, undefined);
        let nobody = cluster_ip(4000).socket(family, 80);
        let _nobody_answers = client.patience(SILENCE).connect(nobody);
        let left = wire.stop().unwrap();
        let leads = |to: SocketAddr| left.iter().any(|seen| seen.to == to);
        assert!(leads(nobody), "{nobody} did not leave the node: {left:?}");
        assert!(!leads(undefined), "{undefined} left the node: {left:?}");
        for (source, frontend) in [
            (client, CLUSTER_IP),
            (Client::of(lab.client(0).ns()), NODE_PORT),
        ] {
            let (tcp, udp) = ports(frontend, family);
            refused(source, tcp, udp);
        }
    }
}

/// C3: with externalTrafficPolicy Local and endpoints on other nodes only, outside clients hear nothing; pods are
/// served (C4).
#[test]
fn no_local_endpoint_is_silent_for_outside_clients() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let service = everywhere("web")
        .spec("externalTrafficPolicy", "Local".into())
        .pods([lab.pod("far")]);
    let (_manifests, _agent) = start(&lab, &[service]);
    for family in Family::BOTH {
        for frontend in FROM_OUTSIDE {
            let (tcp, udp) = ports(frontend, family);
            silent(Client::of(lab.client(0).ns()), tcp, udp);
            reaches(Source::pod(&lab, "client-r"), frontend, family, &["far"]);
        }
    }
}

/// C6: with internalTrafficPolicy Local and no endpoint here, a ClusterIP is silent.
#[test]
fn no_local_endpoint_is_silent_for_internal_local() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let service = everywhere("web")
        .spec("internalTrafficPolicy", "Local".into())
        .pods([lab.pod("far")]);
    let (_manifests, _agent) = start(&lab, &[service]);
    for family in Family::BOTH {
        let (tcp, udp) = ports(CLUSTER_IP, family);
        silent(Client::of(lab.pod("client-r").ns()), tcp, udp);
    }
}

/// A2, A3: a headless service and an ExternalName program nothing, whatever address they carry.
#[test]
fn address_without_service_is_not_taken() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let service = everywhere("web")
        .spec("type", "ExternalName".into())
        .spec("externalName", "example.com".into())
        .pods([lab.pod("r1")]);
    let (_manifests, _agent) = start(&lab, &[service]);
    for family in Family::BOTH {
        let client = Client::of(lab.client(0).ns()).patience(SILENCE);
        let (node_port, _) = ports(NODE_PORT, family);
        // The node's own stack answers: nobody listens there.
        let error = client.connect(node_port).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        let vip = LB_POOL.nth(80).socket(family, 80);
        assert!(client.connect(vip).is_err(), "{vip}");
    }
}

/// Refusals are limited: a flood gets some answers, not one each.
#[test]
fn refusals_are_rate_limited() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let (_manifests, agent) = start(&lab, &[everywhere("empty")]);
    for family in Family::BOTH {
        let to = NODE_PORT.addr.socket(family, NODE_PORT.udp);
        let capture = Capture::start(lab.client(0).ns(), "eth0").unwrap();
        let client = Client::of(lab.client(0).ns());
        let socket = client.udp(to.ip()).unwrap();
        for _ in 0..FLOOD {
            // A full queue is no reason to stop.
            let _sent = socket.socket().send_to(b"x", to);
        }
        let icmp = capture
            .stop()
            .unwrap()
            .iter()
            .filter(|seen| {
                [1, 58].contains(&seen.protocol) && seen.to.ip() == lab.client(0).addr().of(family)
            })
            .filter(|seen| matches!((seen.protocol, seen.flags), (1, 3) | (58, 1)))
            .count();
        assert!(icmp > 0, "{family}: no answer at all");
        assert!(
            icmp < FLOOD / 4,
            "{family}: {icmp} answers to {FLOOD} datagrams"
        );
    }
    let counters = agent.ask(&["dump", "counters"]).unwrap();
    assert!(
        counters.contains("limit"),
        "the limit does not show in {counters}"
    );
}
