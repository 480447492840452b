//! What sockets do with a connection.

use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{Lab, privileged};

use crate::cluster::{
    CLUSTER_IP, Frontend, NODE_PORT, Source, each_family, everywhere, lab, serve_all, start,
};

/// Flows whose spread is counted.
const FLOWS: usize = 900;

/// Clients of each kind with a frontend they can use.
fn clients(lab: &Lab) -> [(Source<'_>, Frontend); 3] {
    [
        (Source::pod(lab, "client-r"), CLUSTER_IP),
        (Source::pod(lab, "client-b"), CLUSTER_IP),
        (Source::outside(lab, 0), NODE_PORT),
    ]
}

/// One source port for one connection after the other, each ended by a reset or by a close of the client's: the next
/// one is a flow of its own.
#[test]
fn source_ports_are_used_again() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let pods = ["r1", "b1", "far"].map(|name| lab.pod(name));
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods(pods)]);
    for (source, frontend) in clients(&lab) {
        // A client may use its port again while the last connection is in TIME_WAIT.
        source.ns.sysctl("net.ipv4.tcp_tw_reuse", "1").unwrap();
        each_family(|family| {
            let to = frontend.addr.socket(family, frontend.echo);
            for round in 0..20 {
                let client = Client::of(source.ns).from_port(42_000);
                let mut echo = client.echo(to)?;
                echo.ping(&format!("round {round}"))?;
                echo.abort()?;
            }
            Ok(())
        });
    }
}

/// A client that has said all it had to say still hears the answer.
#[test]
fn half_closed_connections_go_on() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let pods = ["r1", "b1", "far"].map(|name| lab.pod(name));
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods(pods)]);
    for (source, frontend) in clients(&lab) {
        each_family(|family| {
            let to = frontend.addr.socket(family, frontend.echo);
            for _ in 0..6 {
                let mut echo = Client::of(source.ns).echo(to)?;
                echo.ping("both ways")?;
                echo.half_close(&"last words ".repeat(10_000))?;
            }
            Ok(())
        });
    }
}

/// E10: datagrams that leave the socket as one long packet and are cut on their way.
#[test]
fn segmented_datagrams() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let pods = ["r1", "b1", "far"].map(|name| lab.pod(name));
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods(pods)]);
    for (source, frontend) in clients(&lab) {
        each_family(|family| {
            let to = frontend.addr.socket(family, frontend.udp);
            for _ in 0..6 {
                let socket = Client::of(source.ns).udp_connected(to)?;
                let pieces = ["a", "b", "c", "d", "e"].map(|letter| letter.repeat(1000));
                socket.send_segments(&pieces.concat(), 1000)?;
                let mut servers = Vec::new();
                for piece in pieces {
                    let answer = socket.answer()?;
                    assert_eq!(answer.text, piece);
                    servers.push(answer.server);
                }
                servers.dedup();
                assert_eq!(servers.len(), 1, "one flow, one backend: {servers:?}");
            }
            Ok(())
        });
    }
}

/// F8: new flows spread evenly, over TCP and over UDP.
#[test]
fn new_flows_spread_evenly() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let names = ["r1", "b1", "far"];
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods(names.map(|n| lab.pod(n)))]);
    let client = Client::of(lab.pod("client-r").ns());
    each_family(|family| {
        let tcp = CLUSTER_IP.addr.socket(family, CLUSTER_IP.echo);
        let udp = CLUSTER_IP.addr.socket(family, CLUSTER_IP.udp);
        let mut hits = [
            std::collections::BTreeMap::new(),
            std::collections::BTreeMap::new(),
        ];
        for _ in 0..FLOWS {
            let server = client.echo(tcp)?.server().to_owned();
            *hits[0].entry(server).or_insert(0_usize) += 1;
            let server = client.udp(udp.ip())?.ask_at(udp, "x")?.server;
            *hits[1].entry(server).or_insert(0_usize) += 1;
        }
        for hits in &hits {
            for (server, count) in hits {
                // 300 expected; six standard deviations are 85.
                assert!(
                    (215..=385).contains(count),
                    "{server} has {count} of {FLOWS}: {hits:?}"
                );
            }
            assert_eq!(hits.len(), names.len());
        }
        Ok(())
    });
}
