//! Outside clients and the backends of every node, with node-a's uplink in each mode.

use svc_lb_tests::lab::addresses::{NODE_A, PODS_B, SERVICES};
use svc_lb_tests::lab::netlink::Via;
use svc_lb_tests::lab::wires::Wires;
use svc_lb_tests::lab::{AgentProcess, Family, Lab, Mode, privileged};

use crate::cluster::{
    CLUSTER_IP, FROM_OUTSIDE, FROM_PODS, Masked, Source, each_mode, everywhere, reaches, serve_all,
    start_in, start_with,
};

const ALL: [&str; 3] = ["r1", "b1", "far"];

fn lab() -> Lab {
    Lab::builder()
        .routed("r1")
        .bridged("b1")
        .remote("far")
        .routed("client-r")
        .clients(1)
        .build()
        .unwrap()
}

/// A9, B1, B4, B5, and ours in place of C1: outside clients reach every backend; those of this node see the
/// clients' own addresses, those of others this node's. Where XDP runs, it sends what it can.
#[test]
fn outside_clients_reach_every_backend() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let services = [everywhere("web").pods(ALL.map(|name| lab.pod(name)))];
        let (_manifests, agent) = start_in(&lab, &services, mode);
        let wires = Wires::watch(&lab).unwrap();
        for frontend in FROM_OUTSIDE {
            for family in Family::BOTH {
                reaches(Source::outside(&lab, 0), frontend, family, &ALL);
                // A pod of another node is an outside client to this one.
                reaches(Source::pod(&lab, "far"), frontend, family, &ALL);
            }
        }
        wires.check();
        if mode != Mode::Tc {
            sent_by_xdp(&agent);
        }
    });
}

/// Flows with translated sources went on and came back by XDP.
pub(crate) fn sent_by_xdp(agent: &AgentProcess) {
    let counters = agent.dump("counters").unwrap();
    for name in ["forward_remote", "reverse_remote"] {
        let by_xdp = counters
            .as_array()
            .unwrap()
            .iter()
            .any(|counter| counter["hook"] == "xdp_ingress" && counter["name"] == name);
        assert!(by_xdp, "XDP sent nothing on as {name}: {counters}");
    }
}

/// C1 as kube-proxy has it, by setting: every backend sees this node.
#[test]
fn every_backend_sees_the_node_where_told() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let services = [everywhere("web").pods(ALL.map(|name| lab.pod(name)))];
        let (_manifests, _agent) = start_with(&lab, &services, |config| {
            let config = config.xdp(mode.as_str());
            config.args(["--external-snat", "always"])
        });
        let wires = Wires::watch(&lab).unwrap();
        for frontend in FROM_OUTSIDE {
            for family in Family::BOTH {
                let outside = Source::outside(&lab, 0).masked(Masked::Always);
                reaches(outside, frontend, family, &ALL);
                reaches(Source::pod(&lab, "client-r"), frontend, family, &ALL);
            }
        }
        wires.check();
    });
}

/// C9: masqueradeAll is for ClusterIPs.
#[test]
fn pods_are_masked_where_told() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let services = [everywhere("web").pods(ALL.map(|name| lab.pod(name)))];
        let (_manifests, _agent) = start_with(&lab, &services, |config| {
            config.xdp(mode.as_str()).args(["--masquerade-all"])
        });
        let wires = Wires::watch(&lab).unwrap();
        for frontend in FROM_PODS {
            for family in Family::BOTH {
                let masked = if frontend.kind == CLUSTER_IP.kind {
                    Masked::Always
                } else {
                    Masked::Never
                };
                let pod = Source::pod(&lab, "client-r").masked(masked);
                reaches(pod, frontend, family, &ALL);
            }
        }
        wires.check();
    });
}

/// B14: a ClusterIP that the network routes to the node works for outside clients as other frontends do.
#[test]
fn cluster_ips_are_reached_where_they_are_routed() {
    if !privileged() {
        return;
    }
    let lab = lab();
    for family in Family::BOTH {
        let to_node = Via::gateway("nodes", NODE_A.of(family));
        let net = SERVICES.base.of(family);
        let routed = lab
            .router()
            .netlink()
            .route(net, SERVICES.len(family), to_node);
        routed.unwrap();
    }
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let services = [everywhere("web").pods(ALL.map(|name| lab.pod(name)))];
        let (_manifests, _agent) = start_in(&lab, &services, mode);
        let wires = Wires::watch(&lab).unwrap();
        for family in Family::BOTH {
            reaches(Source::outside(&lab, 0), CLUSTER_IP, family, &ALL);
        }
        wires.check();
    });
}

/// C14: while the agent's programs are there the kernel gives no connection of the node's own a port of theirs; what the
/// operator reserved before is reserved afterwards, and nothing else.
#[test]
fn ports_of_translated_sources_are_reserved_until_detach() {
    const LIST: &str = "net.ipv4.ip_local_reserved_ports";
    if !privileged() {
        return;
    }
    let lab = Lab::builder().build().unwrap();
    let node = lab.node_a();
    node.sysctl(LIST, "8080,61500-62000").unwrap();
    let list = || {
        let path = format!("/proc/sys/{}", LIST.replace('.', "/"));
        node.run(|| std::fs::read_to_string(path)).unwrap()
    };
    let (_manifests, mut agent) = start_with(&lab, &[], |config| {
        // Ports that connections of the node would get.
        config.args(["--snat-ports", "60000-65535"])
    });
    assert_eq!(list().trim(), "8080,60000-65535");
    agent.kill().unwrap();
    assert_eq!(list().trim(), "8080,60000-65535", "flows go on");
    agent.restart().unwrap();
    agent.detach().unwrap();
    assert_eq!(list().trim(), "8080,61500-62000");
}

/// C8: with `--pod-cidr` a pod of another node is one here as well: whatever externalTrafficPolicy says, it reaches every
/// backend, itself too, and those of this node see its own address. Who is outside still does not.
#[test]
fn pods_of_other_nodes_are_known_by_their_range() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let range = |family| format!("{}/{}", PODS_B.base.of(family), PODS_B.len(family));
    let ranges = Family::BOTH.map(range).join(",");
    for (settings, reached) in [
        (vec![], vec!["r1"]),
        (vec!["--pod-cidr", &ranges], vec!["r1", "far"]),
    ] {
        let services = [everywhere("web")
            .spec("externalTrafficPolicy", "Local".into())
            .pods(["r1", "far"].map(|name| lab.pod(name)))];
        let (_manifests, _agent) = start_with(&lab, &services, |config| config.args(settings));
        for frontend in FROM_OUTSIDE {
            for family in Family::BOTH {
                reaches(Source::pod(&lab, "far"), frontend, family, &reached);
                reaches(Source::outside(&lab, 0), frontend, family, &["r1"]);
            }
        }
    }
}
