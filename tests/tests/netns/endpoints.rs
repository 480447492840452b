//! Endpoints that come and go under traffic.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::ensure;
use serde_json::json;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::crowd::Crowd;
use svc_lb_tests::lab::{Family, Lab, eventually, privileged};

use crate::cluster::{
    CLUSTER_IP, FROM_OUTSIDE, LOAD_BALANCER, NODE_PORT, SOON, each_family, everywhere, leaves,
    serve_all, settles, start,
};

/// G1: a UDP flow whose backend no longer serves moves on with its next packet; the client's socket stays the same.
/// F7: one socket's datagrams stay together while nothing changes.
#[test]
fn udp_flow_moves_when_its_backend_leaves() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("r2")
        .routed("client-r")
        .bridged("client-b")
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let both = || everywhere("web").pods(["r1", "r2"].map(|name| lab.pod(name)));
    let (manifests, _agent) = start(&lab, &[both()]);
    each_family(|family| {
        let sources = [
            (lab.pod("client-r").ns(), CLUSTER_IP),
            (lab.pod("client-b").ns(), CLUSTER_IP),
            (lab.client(0).ns(), NODE_PORT),
        ];
        for (source, frontend) in sources {
            manifests.write(&[both()])?;
            let to = frontend.addr.socket(family, frontend.udp);
            let client = Client::of(source).patience(Duration::from_millis(200));
            eventually("both serve", SOON, || {
                let seen: std::collections::BTreeSet<_> = (0..20)
                    .map(|_| Ok(client.udp(to.ip())?.ask_at(to, "x")?.server))
                    .collect::<anyhow::Result<_>>()?;
                ensure!(seen.len() == 2, "{seen:?}");
                Ok(())
            });
            let socket = client.udp_connected(to)?;
            let first = socket.ask("x")?.server;
            for _ in 0..20 {
                assert_eq!(socket.ask("x")?.server, first);
            }
            let other = if first == "r1" { "r2" } else { "r1" };
            manifests.write(&[everywhere("web").pods([lab.pod(other)])])?;
            eventually("the flow moves", SOON, || {
                let server = socket.ask("x")?.server;
                ensure!(server == other, "still at {server}");
                Ok(())
            });
        }
        Ok(())
    });
}

/// G2: a client that was refused, or heard nothing, is served from its old socket once there is an endpoint.
#[test]
fn udp_flow_recovers_when_the_first_endpoint_comes() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .remote("far")
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let local = || everywhere("web").spec("externalTrafficPolicy", "Local".into());
    let (manifests, _agent) = start(&lab, &[local()]);
    each_family(|family| {
        let inside = Client::of(lab.pod("client-r").ns()).patience(Duration::from_millis(200));
        let outside = Client::of(lab.client(0).ns()).patience(Duration::from_millis(200));
        let vip = CLUSTER_IP.addr.socket(family, CLUSTER_IP.udp);
        manifests.write(&[local()])?;
        eventually("pods are refused", SOON, || {
            // A socket that had an answer keeps its flow, so a new one for each try.
            let error = inside.udp_connected(vip)?.ask("x").err();
            ensure!(
                error.as_ref().map(std::io::Error::kind) == Some(ErrorKind::ConnectionRefused),
                "{error:?}"
            );
            Ok(())
        });
        let inside = inside.udp_connected(vip)?;
        let outside = outside.udp_connected(NODE_PORT.addr.socket(family, NODE_PORT.udp))?;
        assert!(inside.ask("x").is_err() && outside.ask("x").is_err());
        // An endpoint elsewhere: outside clients now meet silence instead of a refusal.
        manifests.write(&[local().pods([lab.pod("far")])])?;
        eventually("pods are served", SOON, || {
            ensure!(inside.ask("x")?.server == "far");
            Ok(())
        });
        eventually("outside hears nothing", SOON, || {
            let error = outside.ask("x").err();
            ensure!(
                error.as_ref().map(std::io::Error::kind) == Some(ErrorKind::WouldBlock),
                "{error:?}"
            );
            Ok(())
        });
        manifests.write(&[local().pods([lab.pod("r1")])])?;
        eventually("outside is served", SOON, || {
            ensure!(outside.ask("x")?.server == "r1");
            Ok(())
        });
        Ok(())
    });
}

/// D4 and the step's own promise: a thousand connections through a ClusterIP and a thousand through a NodePort while
/// endpoints come and go, and one pod goes for good: none but those to that pod breaks.
#[test]
fn thousand_connections_survive_changes() {
    if !privileged() {
        return;
    }
    let mut lab = Lab::builder()
        .routed("r1")
        .bridged("b1")
        .routed("flaps")
        .routed("dies")
        .routed("client-r")
        .clients(1)
        .build()
        .unwrap();
    let servers = serve_all(&lab);
    let all = ["r1", "b1", "flaps", "dies"];
    let (manifests, _agent) = start(&lab, &[everywhere("web").pods(all.map(|n| lab.pod(n)))]);
    let inside = Crowd::open(
        lab.pod("client-r").ns(),
        CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo),
        1000,
    )
    .unwrap();
    let outside = Crowd::open(
        lab.client(0).ns(),
        NODE_PORT.addr.socket(Family::V6, NODE_PORT.echo),
        1000,
    )
    .unwrap();
    for crowd in [&inside, &outside] {
        let servers = crowd.servers();
        assert_eq!(servers.len(), all.len(), "{servers:?}");
        for (server, count) in servers {
            assert!((150..400).contains(&count), "{server} has {count} of 1000");
        }
    }
    for _ in 0..5 {
        for names in [
            ["r1", "b1"].as_slice(),
            &["r1", "b1", "flaps"],
            &["r1"],
            &all,
        ] {
            manifests
                .write(&[everywhere("web").pods(names.iter().map(|name| lab.pod(name)))])
                .unwrap();
            std::thread::sleep(Duration::from_millis(60));
        }
    }
    for crowd in [&inside, &outside] {
        assert!(crowd.verify().is_empty(), "{:?}", crowd.broken().first());
    }

    manifests
        .write(&[everywhere("web").pods(["r1", "b1"].map(|name| lab.pod(name)))])
        .unwrap();
    lab.remove_pod("dies").unwrap();
    for crowd in [&inside, &outside] {
        for broken in crowd.verify() {
            assert_eq!(broken.server, "dies", "{broken:?}");
        }
    }
    drop((inside, outside, servers));
}

/// F1, F2, F3: one client keeps its pod through every frontend; when the pod leaves it gets another and keeps that.
#[test]
fn affinity_holds_across_frontends() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("r2")
        .bridged("b1")
        .routed("client-r")
        .clients(2)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let sticky = || {
        everywhere("web")
            .spec("sessionAffinity", "ClientIP".into())
            .spec(
                "sessionAffinityConfig",
                json!({"clientIP": {"timeoutSeconds": 600}}),
            )
    };
    let names = ["r1", "r2", "b1"];
    let (manifests, _agent) = start(&lab, &[sticky().pods(names.map(|name| lab.pod(name)))]);
    each_family(|family| {
        manifests.write(&[sticky().pods(names.map(|name| lab.pod(name)))])?;
        let outside = Client::of(lab.client(0).ns());
        let to = LOAD_BALANCER.addr.socket(family, LOAD_BALANCER.echo);
        settles(outside, to, &names);
        let mut first = outside.echo(to)?;
        first.ping("an answered flow pins its client")?;
        for _ in 0..10 {
            for frontend in FROM_OUTSIDE {
                let to = frontend.addr.socket(family, frontend.echo);
                assert_eq!(
                    outside.echo(to)?.server(),
                    first.server(),
                    "{}",
                    frontend.kind
                );
            }
        }
        let left: Vec<&str> = names
            .into_iter()
            .filter(|name| *name != first.server())
            .collect();
        manifests.write(&[sticky().pods(left.iter().map(|name| lab.pod(name)))])?;
        leaves(outside, to, &[first.server()]);
        let mut second = outside.echo(to)?;
        second.ping("pinned again")?;
        for _ in 0..20 {
            assert_eq!(outside.echo(to)?.server(), second.server());
        }
        first.ping("the old connection lives")
    });
}

/// D2: when no endpoint is ready, one that is being deleted but still serves takes new connections.
#[test]
fn terminating_endpoints_are_the_fallback() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("r2")
        .routed("client-r")
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let with_ready = everywhere("web")
        .pods([lab.pod("r1")])
        .terminating(lab.pod("r2"));
    let (manifests, _agent) = start(&lab, &[with_ready]);
    let client = Client::of(lab.pod("client-r").ns());
    let to = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    for _ in 0..30 {
        assert_eq!(client.echo(to).unwrap().server(), "r1");
    }
    manifests
        .write(&[everywhere("web").terminating(lab.pod("r2"))])
        .unwrap();
    settles(client, to, &["r2"]);
    for _ in 0..30 {
        assert_eq!(client.echo(to).unwrap().server(), "r2");
    }
}

/// A manifest that cannot be read changes nothing, and `status` names it; the next good one is applied.
#[test]
fn unreadable_manifests_keep_the_last_good_state() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("r2")
        .routed("client-r")
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let (manifests, agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    let client = Client::of(lab.pod("client-r").ns());
    let to = CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo);
    std::fs::write(manifests.path(), "{\"kind\": \"List\", \"items\": [{").unwrap();
    eventually("status names the file", SOON, || {
        let status = agent.ask(&["status"])?;
        let name = manifests.path().file_name().unwrap_or_default();
        let named = status
            .lines()
            .filter(|line| line.contains(&*name.to_string_lossy()))
            .count();
        // One line is the source itself, another its problem.
        ensure!(named > 1, "{status}");
        Ok(())
    });
    assert_eq!(client.echo(to).unwrap().server(), "r1");
    manifests
        .write(&[everywhere("web").pods([lab.pod("r2")])])
        .unwrap();
    settles(client, to, &["r2"]);
}
