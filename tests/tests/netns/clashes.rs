//! Flows that look alike once they are translated.

use std::net::SocketAddr;

use anyhow::Result;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{Lab, privileged};

use crate::cluster::{
    CLUSTER_IP, ECHO, EXTERNAL_IP, FROM_OUTSIDE, FROM_PODS, Frontend, Source, UDP, each_family,
    everywhere, serve_all, start,
};

/// C15: one client port, several frontends, one backend: each connection stays its own.
#[test]
fn one_client_port_through_several_frontends() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .bridged("client-b")
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    let sources: [(Source<'_>, &[Frontend]); 3] = [
        (Source::pod(&lab, "client-r"), &FROM_PODS),
        (Source::pod(&lab, "client-b"), &FROM_PODS),
        (Source::outside(&lab, 0), &FROM_OUTSIDE),
    ];
    for (source, frontends) in sources {
        each_family(|family| {
            let client = Client::of(source.ns).from_port(40_000);
            let tcp: Vec<SocketAddr> = frontends
                .iter()
                .map(|frontend| frontend.addr.socket(family, frontend.echo))
                .collect();
            together(client, &tcp)?;
            let udp: Vec<SocketAddr> = frontends
                .iter()
                .map(|frontend| frontend.addr.socket(family, frontend.udp))
                .collect();
            udp_together(client, &udp)
        });
    }
}

/// C15 with a frontend of another kind: a connection through a VIP and one straight to its backend, from one client
/// port. The straight one comes second: its bare SYN shows the clash, which is then resolved.
#[test]
fn direct_connection_beside_one_through_a_vip() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .bridged("client-b")
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let pod = lab.pod("r1").addr();
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    for (source, frontend) in [
        (Source::pod(&lab, "client-r"), CLUSTER_IP),
        (Source::pod(&lab, "client-b"), CLUSTER_IP),
        (Source::outside(&lab, 0), EXTERNAL_IP),
    ] {
        each_family(|family| {
            let client = Client::of(source.ns).from_port(41_000);
            let vip = frontend.addr.socket(family, frontend.echo);
            together(client, &[vip, pod.socket(family, ECHO)])
        });
    }
}

/// A pod's own direct traffic to a backend is untouched by a service that has the same backend.
#[test]
fn direct_datagrams_are_answered_by_the_pod_itself() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let pod = lab.pod("r1").addr();
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    let client = Client::of(lab.pod("client-r").ns());
    each_family(|family| {
        let socket = client.udp(pod.of(family))?;
        let vip = CLUSTER_IP.addr.socket(family, CLUSTER_IP.udp);
        let direct = pod.socket(family, UDP);
        assert_eq!(socket.ask_at(direct, "before")?.from, direct);
        assert_eq!(client.udp(vip.ip())?.ask_at(vip, "other")?.from, vip);
        assert_eq!(socket.ask_at(direct, "after")?.from, direct);
        Ok(())
    });
}

/// Opens a connection to each address and uses them in turn.
fn together(client: Client<'_>, to: &[SocketAddr]) -> Result<()> {
    let mut open = Vec::new();
    for &to in to {
        open.push(client.echo(to)?);
    }
    for round in 0..3 {
        for (echo, to) in open.iter_mut().zip(to) {
            echo.ping(&format!("{round} to {to}"))?;
            let (_, peer) = echo.ends()?;
            assert_eq!(peer, *to);
        }
    }
    Ok(())
}

/// One socket each, all with the client's port; every answer comes from whom it was asked.
fn udp_together(client: Client<'_>, to: &[SocketAddr]) -> Result<()> {
    let mut sockets = Vec::new();
    for &to in to {
        sockets.push(client.udp_connected(to)?);
    }
    for round in 0..3 {
        for (socket, to) in sockets.iter().zip(to) {
            let text = format!("{round} to {to}");
            let answer = socket.ask(&text)?;
            assert_eq!((answer.text, answer.from), (text, *to));
        }
    }
    Ok(())
}
