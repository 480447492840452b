//! Uplinks of other kinds than one Ethernet interface.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::ensure;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::netlink::Via;
use svc_lb_tests::lab::process::collected;
use svc_lb_tests::lab::{Dual, Family, Lab, eventually, privileged};

use crate::cluster::{
    BRIEF, FROM_OUTSIDE, NODE_PORT, SOON, Source, each_mode, everywhere, reaches, serve_all,
    start_in, start_with,
};

/// A machine behind the tunnel.
const BEHIND: Dual = Dual::new(
    Ipv4Addr::new(198, 18, 0, 5),
    Ipv6Addr::new(0x2001, 0xdb8, 0x18, 0, 0, 0, 0, 5),
);

/// An interface whose frames have no Ethernet header is refused by name, and nothing is sent with this node's address
/// where the answers would not be turned: it is dropped and counted. The rest works.
#[test]
fn a_tunnel_without_ethernet_is_refused() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let node = lab.node_a();
    let mut make = collected("ip");
    make.args(["tuntap", "add", "dev", "tun0", "mode", "tun"]);
    let output = node.start(make).unwrap().output(Duration::from_secs(5));
    assert!(output.unwrap().status.success(), "ip tuntap add");
    node.netlink().up("tun0").unwrap();
    for (address, length) in BEHIND.both().into_iter().zip([32, 128]) {
        let via = Via::link("tun0");
        node.netlink().route(address, length, via).unwrap();
    }
    let inside = everywhere("web").pods([lab.pod("r1")]);
    let (manifests, agent) =
        start_with(&lab, &[inside], |config| config.args(["--uplink", "tun0"]));
    let status = agent.ask(&["status"]).unwrap();
    let refused = "tun0: refused: tun frames have no Ethernet header; name an Ethernet interface with --uplink";
    assert!(status.contains(refused), "{status}");
    for family in Family::BOTH {
        reaches(Source::outside(&lab, 0), NODE_PORT, family, &["r1"]);
    }

    manifests
        .write(&[everywhere("web").elsewhere(BEHIND)])
        .unwrap();
    let no_source = || {
        let counters = agent.dump("counters").unwrap();
        let counters = counters.as_array().unwrap().iter();
        let no_source = counters.filter(|counter| counter["name"] == "no_source");
        no_source
            .filter_map(|counter| counter["packets"].as_u64())
            .sum::<u64>()
    };
    for family in Family::BOTH {
        let before = no_source();
        let to = NODE_PORT.addr.socket(family, NODE_PORT.echo);
        let client = Client::of(lab.client(0).ns()).patience(BRIEF);
        eventually(
            "flows into the tunnel are dropped and counted",
            SOON,
            || {
                ensure!(client.connect(to).is_err(), "connected");
                ensure!(no_source() > before, "not counted");
                Ok(())
            },
        );
    }
}

/// node-a's network behind one tag or two: backends here and on another node, whichever way the uplink takes packets.
fn through_vlans(ids: &[u16]) {
    let lab = Lab::builder()
        .routed("r1")
        .bridged("b1")
        .remote("far")
        .vlans(ids)
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let all = ["r1", "b1", "far"];
    each_mode(|mode| {
        let services = [everywhere("web").pods(all.map(|name| lab.pod(name)))];
        let (_manifests, _agent) = start_in(&lab, &services, mode);
        for family in Family::BOTH {
            for frontend in FROM_OUTSIDE {
                reaches(Source::outside(&lab, 0), frontend, family, &all);
            }
        }
    });
}

/// The uplink is a VLAN interface.
#[test]
#[ignore = "needs VLAN devices: `cargo xtask vm 6.1` runs it"]
fn a_vlan_as_uplink() {
    if privileged() {
        through_vlans(&[100]);
    }
}

/// The uplink is a VLAN interface above another one (802.1ad).
#[test]
#[ignore = "needs VLAN devices: `cargo xtask vm 6.1` runs it"]
fn a_vlan_in_a_vlan_as_uplink() {
    if privileged() {
        through_vlans(&[100, 200]);
    }
}
