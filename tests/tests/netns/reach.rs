//! Every frontend from everywhere.

use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::{Protocol, Service};
use svc_lb_tests::lab::{Attach, Family, Lab, NodeName, privileged, server};

use crate::cluster::{
    CLUSTER_IP, ECHO, FROM_OUTSIDE, FROM_PODS, Frontend, HTTP, NODE_PORT, Source, cluster_ip,
    each_family, each_mode, ends, everywhere, inside, lab, reaches, serve, serve_all, serves,
    settles, start, start_in,
};
use crate::refusal::{ports, silent};

/// A1, A5, A9, B1, B4, B5, C11: pods reach every backend through every frontend, over both families and protocols.
/// C10 as well: the pods that serve are clients too.
#[test]
fn pods_reach_every_frontend() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let pods = ["r1", "b1", "far"].map(|name| lab.pod(name));
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods(pods)]);
    for source in ["client-r", "client-b", "r1", "b1"] {
        for frontend in FROM_PODS {
            for family in Family::BOTH {
                let source = Source::pod(&lab, source);
                reaches(source, frontend, family, &["r1", "b1", "far"]);
            }
        }
    }
}

/// C2, C4, C7: with externalTrafficPolicy Local outside clients keep to this node, pods use the whole cluster.
#[test]
fn local_policy_is_for_outside_clients() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let service = everywhere("web")
            .spec("externalTrafficPolicy", "Local".into())
            .pods(["r1", "far"].map(|name| lab.pod(name)));
        let (_manifests, _agent) = start_in(&lab, &[service], mode);
        for frontend in FROM_OUTSIDE {
            for family in Family::BOTH {
                reaches(Source::outside(&lab, 0), frontend, family, &["r1"]);
                reaches(
                    Source::pod(&lab, "client-r"),
                    frontend,
                    family,
                    &["r1", "far"],
                );
            }
        }
    });
}

/// C6: with internalTrafficPolicy Local a ClusterIP leads to this node's endpoints only.
#[test]
fn internal_local_policy_keeps_to_the_node() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let service = everywhere("web")
        .spec("internalTrafficPolicy", "Local".into())
        .pods(["r1", "b1", "far"].map(|name| lab.pod(name)));
    let (_manifests, _agent) = start(&lab, &[service]);
    for family in Family::BOTH {
        let source = Source::pod(&lab, "client-r");
        reaches(source, CLUSTER_IP, family, &["r1", "b1"]);
        reaches(source, NODE_PORT, family, &["r1", "b1", "far"]);
    }
}

/// A6: each named port of a service leads to its own target port.
#[test]
fn named_ports_lead_to_their_own_targets() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("client-r")
        .build()
        .unwrap();
    let pod = lab.pod("r1");
    let _servers = [
        server::http(pod.ns(), "first", 8001).unwrap(),
        server::http(pod.ns(), "second", 8002).unwrap(),
    ];
    let service = Service::new("ports", cluster_ip(1))
        .port("one", Protocol::Tcp, 80, 8001)
        .port("two", Protocol::Tcp, 81, 8002)
        .pods([pod]);
    let (_manifests, _agent) = start(&lab, &[service]);
    let client = Client::of(lab.pod("client-r").ns());
    each_family(|family| {
        for (port, expected) in [(80, "first"), (81, "second")] {
            assert_eq!(client.hit(cluster_ip(1).socket(family, port))?, expected);
        }
        Ok(())
    });
}

/// C10: a pod reaches itself through its service when it is the only backend, routed and bridged.
#[test]
fn hairpin() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").bridged("b1").build().unwrap();
    let _servers = serve_all(&lab);
    for name in ["r1", "b1"] {
        let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod(name)])]);
        for frontend in FROM_PODS {
            for family in Family::BOTH {
                reaches(Source::pod(&lab, name), frontend, family, &[name]);
            }
        }
    }
}

/// A pod whose interface appears while the agent runs is served as client and as backend at once.
#[test]
fn pods_that_come_later_are_served() {
    if !privileged() {
        return;
    }
    let mut lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let mut servers = serve_all(&lab);
    let (manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    for (name, attach) in [("late-r", Attach::Routed), ("late-b", Attach::Bridged)] {
        servers.push(serve(lab.add_pod(name, NodeName::A, attach).unwrap()));
    }
    let pods = ["late-r", "late-b"].map(|name| lab.pod(name));
    manifests.write(&[everywhere("web").pods(pods)]).unwrap();
    for source in ["late-r", "late-b"] {
        for family in Family::BOTH {
            let to = CLUSTER_IP.addr.socket(family, CLUSTER_IP.echo);
            settles(Client::of(lab.pod(source).ns()), to, &["late-r", "late-b"]);
        }
    }
    crate::cluster::leaves(
        Client::of(lab.pod("late-r").ns()),
        CLUSTER_IP.addr.socket(Family::V4, CLUSTER_IP.echo),
        &["r1"],
    );
    for family in Family::BOTH {
        for name in ["late-r", "late-b"] {
            let source = Source::pod(&lab, name);
            reaches(source, CLUSTER_IP, family, &["late-r", "late-b"]);
        }
        reaches(
            Source::outside(&lab, 0),
            NODE_PORT,
            family,
            &["late-r", "late-b"],
        );
    }
}

/// A8: endpoints that are no pods: a machine in the nodes' network.
#[test]
fn endpoints_outside_the_cluster() {
    if !privileged() {
        return;
    }
    let addr = svc_lb_tests::lab::addresses::NODES.nth(50);
    let lab = Lab::builder()
        .routed("client-r")
        .bridged("client-b")
        .machine("legacy", addr)
        .build()
        .unwrap();
    let legacy = lab.machine("legacy");
    let _servers = [
        server::http(legacy.ns(), "legacy", HTTP).unwrap(),
        server::tcp_echo(legacy.ns(), "legacy", ECHO).unwrap(),
        server::udp_echo(legacy.ns(), "legacy", crate::cluster::UDP).unwrap(),
    ];
    let (_manifests, _agent) = start(&lab, &[inside("legacy", 80).elsewhere(addr)]);
    for source in ["client-r", "client-b"] {
        for family in Family::BOTH {
            let frontend = Frontend {
                addr: cluster_ip(80),
                ..CLUSTER_IP
            };
            reaches(Source::pod(&lab, source), frontend, family, &["legacy"]);
        }
    }
}

/// Backends of the hosts' own network, on this node and on another one; C6: with internalTrafficPolicy Local that on this
/// node serves, and that on another one does not.
#[test]
fn backends_of_the_host_network() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = [(lab.node_a(), NodeName::A), (lab.node_b(), NodeName::B)].map(|(ns, node)| {
        let [v4, v6] = Family::BOTH.map(|family| {
            let at = node.addr().socket(family, crate::cluster::UDP);
            server::udp_echo_at(ns, node.as_str(), at).unwrap()
        });
        let tcp = server::tcp_echo(ns, node.as_str(), ECHO).unwrap();
        [v4, v6, tcp]
    });
    each_mode(|mode| {
        let service = everywhere("web")
            .host_network(NodeName::A)
            .host_network(NodeName::B);
        let (manifests, _agent) = start_in(&lab, &[service], mode);
        for family in Family::BOTH {
            for source in ["client-r", "client-b"] {
                for frontend in FROM_PODS {
                    let source = Source::pod(&lab, source);
                    reaches(source, frontend, family, &["node-a", "node-b"]);
                }
            }
            for frontend in FROM_OUTSIDE {
                let nodes = ["node-a", "node-b"];
                reaches(Source::outside(&lab, 0), frontend, family, &nodes);
            }
        }
        let local = || everywhere("web").spec("internalTrafficPolicy", "Local".into());
        let both = local().host_network(NodeName::A).host_network(NodeName::B);
        manifests.write(&[both]).unwrap();
        let clients = ["client-r", "client-b"].map(|name| Source::pod(&lab, name));
        for (source, family) in clients.into_iter().zip(Family::BOTH) {
            serves(source, CLUSTER_IP, family, &["node-a"]);
            reaches(source, CLUSTER_IP, family, &["node-a"]);
        }
        manifests
            .write(&[local().host_network(NodeName::B)])
            .unwrap();
        for (source, family) in clients.into_iter().zip(Family::BOTH) {
            ends(source, CLUSTER_IP, family);
            let (tcp, udp) = ports(CLUSTER_IP, family);
            silent(Client::of(source.ns), tcp, udp);
        }
    });
}
