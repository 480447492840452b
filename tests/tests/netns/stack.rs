//! The node's own stack around the programs: netfilter, reverse path filters, what is on the wires.

use svc_lb_tests::lab::addresses::NODE_A;
use svc_lb_tests::lab::capture::{Capture, Seen};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{Dual, Family, Lab, privileged};

use crate::cluster::{
    CLUSTER_IP, FROM_OUTSIDE, FROM_PODS, LOAD_BALANCER, NODE_PORT, Source, each_family, each_mode,
    everywhere, reaches, serve_all, start, start_in,
};

/// Drops what connection tracking finds invalid, and masquerades what leaves the pods' network, as CNIs do.
const RULES: &str = "
table inet lab {
  chain forward { type filter hook forward priority 0; policy accept; ct state invalid counter drop; }
  chain input { type filter hook input priority 0; policy accept; ct state invalid counter drop; }
  chain postrouting {
    type nat hook postrouting priority 100; policy accept;
    ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
    ip6 saddr fd00:10:244::/48 ip6 daddr != fd00:10:244::/48 masquerade
  }
}
";

const BRIDGE_CALLS: [&str; 2] = [
    "net.bridge.bridge-nf-call-iptables",
    "net.bridge.bridge-nf-call-ip6tables",
];

fn lab() -> Lab {
    Lab::builder()
        .routed("r1")
        .routed("r2")
        .bridged("b1")
        .bridged("b2")
        .remote("far")
        .clients(1)
        .build()
        .unwrap()
}

/// C12, C13: connection tracking on the node sees both directions of a flow or neither: a rule that drops what is
/// invalid drops nothing of ours, and masquerading leaves it alone.
#[test]
fn netfilter_drops_nothing() {
    if !privileged() {
        return;
    }
    each_mode(|mode| {
        for bridge_calls in ["0", "1"] {
            let lab = lab();
            let _servers = serve_all(&lab);
            lab.nft(RULES).unwrap();
            // Whether netfilter sees what is only switched. Kernels without br_netfilter never do.
            for key in BRIDGE_CALLS {
                let set = lab.node_a().sysctl(key, bridge_calls);
                assert!(set.is_ok() || bridge_calls == "0", "{set:?}");
            }
            let all = ["r1", "r2", "b1", "b2", "far"];
            let (_manifests, _agent) = start_in(
                &lab,
                &[everywhere("web").pods(all.map(|n| lab.pod(n)))],
                mode,
            );
            for family in Family::BOTH {
                for source in ["r1", "r2", "b1", "b2"] {
                    for frontend in [CLUSTER_IP, LOAD_BALANCER] {
                        reaches(Source::pod(&lab, source), frontend, family, &all);
                    }
                }
                for frontend in FROM_OUTSIDE {
                    reaches(Source::outside(&lab, 0), frontend, family, &all);
                }
            }
        }
    });
}

/// Any reverse path filter of the node: routed, bridged, hairpin, outside.
#[test]
fn every_reverse_path_filter() {
    if !privileged() {
        return;
    }
    each_mode(|mode| {
        for filter in 0..=2 {
            let lab = Lab::builder()
                .routed("r1")
                .bridged("b1")
                .remote("far")
                .clients(1)
                .rp_filter(filter)
                .build()
                .unwrap();
            let _servers = serve_all(&lab);
            let all = ["r1", "b1", "far"];
            let (_manifests, _agent) = start_in(
                &lab,
                &[everywhere("web").pods(all.map(|n| lab.pod(n)))],
                mode,
            );
            for family in Family::BOTH {
                for source in ["r1", "b1"] {
                    reaches(Source::pod(&lab, source), CLUSTER_IP, family, &all);
                    reaches(Source::pod(&lab, source), NODE_PORT, family, &all);
                }
                for frontend in FROM_OUTSIDE {
                    reaches(Source::outside(&lab, 0), frontend, family, &all);
                }
            }
        }
    });
}

/// C2, C11, E10: clients' wires carry the frontend's address, pods' wires the pods' own, each with right checksums,
/// for short and long segments.
#[test]
fn wires_carry_the_right_addresses() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    let (client, pod) = (lab.client(0).addr(), lab.pod("r1").addr());
    each_family(|family| {
        for frontend in FROM_OUTSIDE {
            let outside = Capture::start(lab.router(), "node-a")?;
            let inside = Capture::start(lab.pod("r1").ns(), "eth0")?;
            let source = Client::of(lab.client(0).ns());
            let mut echo = source.echo(frontend.addr.socket(family, frontend.echo))?;
            echo.ping("short")?;
            echo.ping(&"long ".repeat(4000))?;
            let to = frontend.addr.socket(family, frontend.udp);
            source.udp(to.ip())?.ask_at(to, "datagram")?;
            // Answers may still be on their way through the stack.
            drop(echo);
            std::thread::sleep(std::time::Duration::from_millis(50));
            let what = format!("{} over {family}", frontend.kind);
            only(&what, &outside.stop()?, client, frontend.addr, true);
            // The pod's own packets leave it with partial checksums, which no wire carries.
            only(&what, &inside.stop()?, client, pod, false);
        }
        Ok(())
    });
}

/// A1: what a pod sends to a ClusterIP leaves the node with the backend's address, never the service's.
#[test]
fn cluster_ips_never_leave_the_node() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("far")])]);
    let far = lab.pod("far").addr();
    each_family(|family| {
        for name in ["r1", "b1"] {
            for frontend in FROM_PODS {
                let wire = Capture::start(lab.router(), "node-a")?;
                let mut echo = Client::of(lab.pod(name).ns())
                    .echo(frontend.addr.socket(family, frontend.echo))?;
                echo.ping(&"long ".repeat(4000))?;
                drop(echo);
                std::thread::sleep(std::time::Duration::from_millis(50));
                let what = format!("{name} -> {} over {family}", frontend.kind);
                only(&what, &wire.stop()?, lab.pod(name).addr(), far, true);
            }
        }
        Ok(())
    });
}

/// With the uplink's offload on, as a real network card has it: long segments arrive whole.
#[test]
fn partial_checksums_and_segmentation_offload() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .remote("far")
        .clients(1)
        .uplink_offload()
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let pods = ["r1", "far"].map(|name| lab.pod(name));
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods(pods)]);
    each_family(|family| {
        for (source, frontend) in [
            (lab.pod("client-r").ns(), CLUSTER_IP),
            (lab.client(0).ns(), NODE_PORT),
        ] {
            for _ in 0..10 {
                let to = frontend.addr.socket(family, frontend.echo);
                let mut echo = Client::of(source).echo(to)?;
                echo.ping(&"segment ".repeat(30_000))?;
            }
        }
        Ok(())
    });
}

/// Every TCP and UDP packet is between the two given, in both directions; checksums are right where asked for.
fn only(what: &str, packets: &[Seen], client: Dual, server: Dual, checksums: bool) {
    let (mut there, mut back) = (0, 0);
    for seen in packets
        .iter()
        .filter(|seen| [6, 17].contains(&seen.protocol))
    {
        let (from, to) = (seen.from.ip(), seen.to.ip());
        if client.contains(from) && server.contains(to) {
            there += 1;
            assert!(seen.checksums_ok, "{what}: wrong checksum: {seen:?}");
        } else if server.contains(from) && client.contains(to) {
            back += 1;
            assert!(
                seen.checksums_ok || !checksums,
                "{what}: wrong checksum: {seen:?}"
            );
        } else {
            panic!("{what}: neither {client} nor {server} (node {NODE_A}): {seen:?}");
        }
    }
    assert!(there > 3 && back > 3, "{what}: {there} there, {back} back");
}
