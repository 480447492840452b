//! Whom a service serves, and at which addresses.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use svc_lb_tests::lab::addresses::{NODE_A, NODES};
use svc_lb_tests::lab::capture::{Capture, SYN};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::Protocol;
use svc_lb_tests::lab::server::{self, Server};
use svc_lb_tests::lab::{Dual, Family, Host, Lab, eventually, privileged};

use crate::cluster::{
    CLUSTER_IP, ECHO, EXTERNAL_IP, Frontend, LOAD_BALANCER, NODE_ECHO, NODE_PORT, SERVICE_ECHO,
    SERVICE_UDP, SOON, Source, cluster_ip, each_family, everywhere, inside, reaches, serve_all,
    settles, start, start_with,
};
use crate::refusal::{ports, silent};

/// TCP flag RST.
const RST: u8 = 0x04;
/// Long enough that a packet would have come.
const MOMENT: Duration = Duration::from_millis(700);

/// Ranges that hold these addresses and no others.
fn only(sources: &[Source<'_>]) -> Value {
    let ranges = sources.iter().flat_map(|source| {
        let [v4, v6] = source.addr.both();
        [format!("{v4}/32"), format!("{v6}/128")]
    });
    ranges.collect::<Vec<_>>().into()
}

/// B7: a load balancer's address serves the clients in loadBalancerSourceRanges, and is silent to others, pods included.
/// Every other frontend serves everyone. A change of the ranges counts for the next connection; one that is open stays.
/// They hold while no agent runs, and the next one takes them over.
#[test]
fn source_ranges() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("pod-in")
        .bridged("pod-out")
        .clients(2)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let inside = [Source::outside(&lab, 0), Source::pod(&lab, "pod-in")];
    let outside = [Source::outside(&lab, 1), Source::pod(&lab, "pod-out")];
    let service = || everywhere("web").pods([lab.pod("r1")]);
    let restricted =
        |sources: &[Source<'_>]| service().spec("loadBalancerSourceRanges", only(sources));
    let (manifests, mut agent) = start(&lab, &[restricted(&inside)]);
    for family in Family::BOTH {
        let (tcp, udp) = ports(LOAD_BALANCER, family);
        for source in inside {
            reaches(source, LOAD_BALANCER, family, &["r1"]);
        }
        for source in outside {
            silent(Client::of(source.ns), tcp, udp);
        }
        for frontend in [NODE_PORT, EXTERNAL_IP] {
            for source in inside.into_iter().chain(outside) {
                reaches(source, frontend, family, &["r1"]);
            }
        }
        reaches(Source::pod(&lab, "pod-out"), CLUSTER_IP, family, &["r1"]);
    }

    let dumped = agent.ask(&["dump", "source-ranges"]).unwrap();
    for ip in inside.iter().flat_map(|source| source.addr.both()) {
        assert!(dumped.contains(&ip.to_string()), "{ip}: {dumped}");
    }
    let (to, udp) = ports(LOAD_BALANCER, Family::V4);
    agent.kill().unwrap();
    silent(Client::of(outside[0].ns), to, udp);
    reaches(inside[0], LOAD_BALANCER, Family::V4, &["r1"]);
    agent.restart().unwrap();
    assert_eq!(agent.ask(&["dump", "source-ranges"]).unwrap(), dumped);
    silent(Client::of(outside[0].ns), to, udp);

    let mut open = Client::of(inside[0].ns).echo(to).unwrap();
    open.ping("still in").unwrap();
    manifests.write(&[restricted(&outside)]).unwrap();
    eventually("the other clients are admitted", SOON, || {
        Client::of(outside[0].ns).echo(to).map(drop)
    });
    open.ping("out, but open").unwrap();
    for family in Family::BOTH {
        let (tcp, udp) = ports(LOAD_BALANCER, family);
        for source in inside {
            silent(Client::of(source.ns), tcp, udp);
        }
        for source in outside {
            reaches(source, LOAD_BALANCER, family, &["r1"]);
        }
    }

    manifests.write(&[service()]).unwrap();
    eventually("everyone is admitted", SOON, || {
        Client::of(inside[0].ns).echo(to).map(drop)
    });
    for family in Family::BOTH {
        for source in inside.into_iter().chain(outside) {
            reaches(source, LOAD_BALANCER, family, &["r1"]);
        }
    }
}

/// A pod, an outside client, and a machine beside the nodes.
fn lab_with_machine() -> Lab {
    Lab::builder()
        .routed("r1")
        .routed("client-r")
        .bridged("client-b")
        .clients(1)
        .machine("machine", MACHINE)
        .build()
        .unwrap()
}

const MACHINE: Dual = NODES.nth(50);

/// What the machine serves, at the ports of the service that claims its address.
const MACHINES_OWN: Frontend = Frontend {
    kind: "the machine",
    addr: MACHINE,
    echo: SERVICE_ECHO,
    udp: SERVICE_UDP,
};

fn serve_machine(machine: &Host) -> [Server; 2] {
    [
        server::tcp_echo(machine.ns(), "machine", SERVICE_ECHO).unwrap(),
        server::udp_echo(machine.ns(), "machine", SERVICE_UDP).unwrap(),
    ]
}

/// B4: whoever writes Services can have what pods send to any address, as by kube-proxy (CVE-2020-8554); unless external
/// IPs are for outside clients alone, or for nobody. Then pods reach whoever really has the address.
#[test]
fn external_ips() {
    if !privileged() {
        return;
    }
    let lab = lab_with_machine();
    let _servers = serve_all(&lab);
    let _machine = serve_machine(lab.machine("machine"));
    let service = || {
        everywhere("web")
            .external_ips(MACHINE)
            .pods([lab.pod("r1")])
    };
    let outside = Source::outside(&lab, 0);
    for setting in ["all", "outside", "off"] {
        let settings = ["--external-ips", setting];
        let (_manifests, agent) = start_with(&lab, &[service()], |config| config.args(settings));
        let server = if setting == "all" { "r1" } else { "machine" };
        for family in Family::BOTH {
            for name in ["client-r", "client-b"] {
                let pod = Source::pod(&lab, name);
                reaches(pod, MACHINES_OWN, family, &[server]);
                for frontend in [CLUSTER_IP, NODE_PORT, LOAD_BALANCER] {
                    reaches(pod, frontend, family, &["r1"]);
                }
            }
            for frontend in [NODE_PORT, LOAD_BALANCER] {
                reaches(outside, frontend, family, &["r1"]);
            }
            if setting == "off" {
                let (to, _) = ports(EXTERNAL_IP, family);
                let client = Client::of(outside.ns).patience(MOMENT);
                assert!(client.connect(to).is_err(), "{to}");
            } else {
                reaches(outside, EXTERNAL_IP, family, &["r1"]);
            }
        }
        let status = agent.ask(&["status", "--services"]).unwrap();
        let note = format!("external IP {} is left out", MACHINE.v4);
        assert_eq!(status.contains(&note), setting == "off", "{status}");
    }
}

/// B1: an address that the node gets while the agent runs serves NodePorts at once.
#[test]
fn node_ports_on_an_address_that_comes_later() {
    if !privileged() {
        return;
    }
    let lab = lab_with_machine();
    let _servers = serve_all(&lab);
    let (_manifests, _agent) = start(&lab, &[everywhere("web").pods([lab.pod("r1")])]);
    let later = Frontend {
        kind: "NodePort at a new address",
        addr: add_address(&lab),
        ..NODE_PORT
    };
    for family in Family::BOTH {
        let (to, _) = ports(later, family);
        settles(Client::of(lab.client(0).ns()), to, &["r1"]);
        reaches(Source::outside(&lab, 0), later, family, &["r1"]);
        reaches(Source::pod(&lab, "client-r"), later, family, &["r1"]);
    }
}

/// Gives node-a a second address of each family.
fn add_address(lab: &Lab) -> Dual {
    let second = NODES.nth(77);
    for (ip, prefix) in second.both().into_iter().zip([24, 64]) {
        lab.node_a().netlink().address("eth0", ip, prefix).unwrap();
    }
    second
}

/// B2: an address of the node that is not chosen for NodePorts is the host's: its RST, or its own server.
#[test]
fn node_ports_on_chosen_addresses_alone() {
    if !privileged() {
        return;
    }
    let lab = lab_with_machine();
    let _servers = serve_all(&lab);
    let second = add_address(&lab);
    let ranges = format!("{}/32,{}/128", NODE_A.v4, NODE_A.v6);
    for chosen in [ranges.as_str(), "primary"] {
        let settings = ["--nodeport-addresses", chosen];
        let services = [everywhere("web").pods([lab.pod("r1")])];
        let (_manifests, agent) = start_with(&lab, &services, |config| config.args(settings));
        for source in [Source::outside(&lab, 0), Source::pod(&lab, "client-r")] {
            let client = Client::of(source.ns).patience(MOMENT);
            for family in Family::BOTH {
                reaches(source, NODE_PORT, family, &["r1"]);
                let to = second.socket(family, NODE_ECHO);
                let wire = Capture::start(source.ns, "eth0").unwrap();
                let error = eventually_refused(client, to);
                assert_eq!(error, ErrorKind::ConnectionRefused, "{to}");
                let seen = wire.stop().unwrap();
                let reset = seen
                    .iter()
                    .any(|seen| seen.from == to && seen.flags & RST != 0);
                assert!(reset, "{to} was not refused by the host: {seen:?}");

                let host = server::tcp_echo(lab.node_a(), "host", NODE_ECHO).unwrap();
                let echo = client.echo(to).unwrap();
                assert_eq!(echo.server(), "host", "{to}");
                assert_eq!(echo.seen_as().ip(), source.addr.of(family));
                drop((echo, host));
            }
        }
        let dump = agent.ask(&["dump", "frontends"]).unwrap();
        assert!(
            dump.ends_with(&format!("node: {} {}\n", NODE_A.v4, NODE_A.v6)),
            "{dump}"
        );
    }
}

/// How a connection fails that nobody listens for. (A new IPv6 address is tentative for a moment, and silent.)
fn eventually_refused(client: Client<'_>, to: SocketAddr) -> ErrorKind {
    let mut last = ErrorKind::TimedOut;
    for _ in 0..10 {
        last = client
            .connect(to)
            .map_or_else(|error| error.kind(), |_| ErrorKind::Other);
        if last != ErrorKind::TimedOut {
            break;
        }
    }
    last
}

/// B6: with ipMode Proxy a pod's packets to the load balancer leave the node as they are and reach it; NodePorts still
/// work. B5: with ipMode VIP the node answers them itself.
#[test]
fn the_load_balancer_is_a_proxy() {
    if !privileged() {
        return;
    }
    let lab = lab_with_machine();
    let _servers = serve_all(&lab);
    let _machine = serve_machine(lab.machine("machine"));
    let service = |mode: &str| {
        let ingress = MACHINE.both().map(|ip| json!({"ip": ip, "ipMode": mode}));
        inside("web", 80)
            .port("on-nodes", Protocol::Tcp, 70, ECHO)
            .node_port(NODE_ECHO)
            .ingress(ingress)
            .pods([lab.pod("r1")])
    };
    let (manifests, _agent) = start(&lab, &[service("Proxy")]);
    each_family(|family| {
        for name in ["client-r", "client-b"] {
            let pod = Source::pod(&lab, name);
            let wire = Capture::start(lab.router(), "node-a")?;
            reaches(pod, MACHINES_OWN, family, &["machine"]);
            let (to, _) = ports(MACHINES_OWN, family);
            let left = wire.stop()?.into_iter().any(|seen| {
                seen.to == to && seen.from.ip() == pod.addr.of(family) && seen.flags & SYN != 0
            });
            assert!(left, "no SYN to {to} was seen on the wire");
        }
        for source in [Source::outside(&lab, 0), Source::pod(&lab, "client-r")] {
            let echo = Client::of(source.ns).echo(NODE_A.socket(family, NODE_ECHO))?;
            assert_eq!(echo.server(), "r1");
        }
        Ok(())
    });
    manifests.write(&[service("VIP")]).unwrap();
    let (to, _) = ports(MACHINES_OWN, Family::V4);
    settles(Client::of(lab.pod("client-r").ns()), to, &["r1"]);
    for family in Family::BOTH {
        for name in ["client-r", "client-b"] {
            reaches(Source::pod(&lab, name), MACHINES_OWN, family, &["r1"]);
        }
    }
}

/// A10: without allocated node ports a load balancer's address works and no port of the node does.
/// A11: of a load balancer with a host name there is nothing to serve, and an address that is merely wished for is none.
#[test]
fn load_balancers_without_node_ports_and_without_addresses() {
    if !privileged() {
        return;
    }
    let lab = lab_with_machine();
    let _servers = serve_all(&lab);
    let no_node_ports = inside("web", 80)
        .load_balancer(LOAD_BALANCER.addr)
        .spec("allocateLoadBalancerNodePorts", false.into())
        .pods([lab.pod("r1")]);
    let wished_for = EXTERNAL_IP.addr;
    let host_name = inside("named", 81)
        .ingress([json!({"hostname": "lb.example.com"})])
        .spec("loadBalancerIP", wished_for.v4.to_string().into())
        .spec("loadBalancerClass", "example.com/lb".into())
        .spec("allocateLoadBalancerNodePorts", false.into())
        .pods([lab.pod("r1")]);
    let (_manifests, agent) = start(&lab, &[no_node_ports, host_name]);
    let outside = Source::outside(&lab, 0);
    for family in Family::BOTH {
        reaches(outside, LOAD_BALANCER, family, &["r1"]);
        reaches(
            Source::pod(&lab, "client-r"),
            LOAD_BALANCER,
            family,
            &["r1"],
        );
    }
    let to = wished_for.socket(Family::V4, SERVICE_ECHO);
    assert!(Client::of(outside.ns).patience(MOMENT).connect(to).is_err());
    let dump = agent.ask(&["dump", "frontends"]).unwrap();
    assert!(!dump.contains("NodePort"), "{dump}");
    let status = agent.ask(&["status", "--services"]).unwrap();
    assert!(
        status.contains("default/named") && status.contains("host name"),
        "{status}"
    );
}

/// A4: Services and slices with the label of another proxy are not there; told its name, the agent handles those alone.
#[test]
fn services_of_another_proxy() {
    if !privileged() {
        return;
    }
    let lab = lab_with_machine();
    let _servers = serve_all(&lab);
    let labelled = || {
        inside("labelled", 81)
            .label("service.kubernetes.io/service-proxy-name", "other")
            .pods([lab.pod("r1")])
    };
    let services = [everywhere("web").pods([lab.pod("r1")]), labelled()];
    let at_labelled = Frontend {
        addr: cluster_ip(81),
        ..CLUSTER_IP
    };
    let none: [&str; 0] = [];
    for (settings, ours, others) in [
        (none.as_slice(), CLUSTER_IP, at_labelled),
        (&["--service-proxy-name", "other"], at_labelled, CLUSTER_IP),
    ] {
        let (_manifests, _agent) = start_with(&lab, &services, |config| config.args(settings));
        for family in Family::BOTH {
            reaches(Source::pod(&lab, "client-r"), ours, family, &["r1"]);
            // An address of the service range that nobody has.
            let (tcp, udp) = ports(others, family);
            silent(Client::of(lab.pod("client-r").ns()), tcp, udp);
        }
    }
}
