//! Nodes whose pods reach each other by VXLAN: an interface that no XDP program can send to.

use anyhow::ensure;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::wires::Wires;
use svc_lb_tests::lab::{Family, Lab, eventually, overlay, privileged};

use crate::cluster::{
    FROM_OUTSIDE, FROM_PODS, NODE_PORT, SOON, Source, each_family, each_mode, everywhere, reaches,
    serve_all, start_in,
};

const ALL: [&str; 3] = ["r1", "b1", "far"];

fn lab() -> Lab {
    Lab::builder()
        .routed("r1")
        .bridged("b1")
        .remote("far")
        .routed("client-r")
        .overlay()
        .clients(3)
        .build()
        .unwrap()
}

/// B1, B4, B5, C1: outside clients and pods reach backends behind the tunnel, which see the tunnel interface's own
/// address where they see this node.
#[test]
fn backends_behind_a_tunnel() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let services = [everywhere("web").pods(ALL.map(|name| lab.pod(name)))];
        let (_manifests, _agent) = start_in(&lab, &services, mode);
        let wires = Wires::watch(&lab).unwrap();
        for family in Family::BOTH {
            for frontend in FROM_OUTSIDE {
                reaches(Source::outside(&lab, 0), frontend, family, &ALL);
            }
            for frontend in FROM_PODS {
                reaches(Source::pod(&lab, "client-r"), frontend, family, &ALL);
            }
        }
        wires.check();
    });
}

/// A client's packets that do not fit into the tunnel are answered with the size that does, and connections go on with
/// it.
#[test]
fn what_a_tunnel_takes_is_told() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    // What a client has learned it keeps: each mode has its own.
    let mut clients = lab.clients();
    each_mode(|mode| {
        let (_manifests, _agent) =
            start_in(&lab, &[everywhere("web").pods([lab.pod("far")])], mode);
        let client = clients.next().unwrap().ns();
        each_family(|family| {
            let mut echo =
                Client::of(client).echo(NODE_PORT.addr.socket(family, NODE_PORT.echo))?;
            echo.ping(&"long ".repeat(4000))?;
            let to = NODE_PORT.addr.socket(family, NODE_PORT.udp);
            let datagrams = Client::of(client).udp_connected(to)?;
            datagrams.never_cut()?;
            eventually("the tunnel's size is told", SOON, || {
                // The error is what came back for the one before.
                let sent = datagrams.socket().send(&[0; FULL]);
                let mtu = u32::try_from(datagrams.path_mtu()?)?;
                ensure!(mtu == overlay::MTU, "{mtu}, after {sent:?}");
                Ok(())
            });
            Ok(())
        });
    });
}

/// Payload of a datagram that fits into 1,500 bytes in either family, and not into the tunnel.
const FULL: usize = 1_440;
