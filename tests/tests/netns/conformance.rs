//! What Kubernetes' own end-to-end tests ask of a service proxy, and that the scenarios beside this one do not show.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use socket2::{Domain, Protocol as Transport, Socket, Type};
use svc_lb_tests::lab::capture::Capture;
use svc_lb_tests::lab::client::{Client, Echo, Udp};
use svc_lb_tests::lab::objects::{Protocol, Service, nodes};
use svc_lb_tests::lab::{Attach, Family, Lab, NodeName, Pod, eventually, privileged};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::frame::flags::{ACK, PSH, RST};

use crate::cluster::{
    BRIEF, CLUSTER_IP, ECHO, Frontend, HTTP, LOAD_BALANCER, NODE_ECHO, NODE_HTTP, NODE_PORT,
    NODE_UDP, SERVICE_ECHO, SERVICE_HTTP, SERVICE_UDP, SOON, Source, UDP, cluster_ip, each_family,
    each_mode, ends, everywhere, inside, lab, reaches, serve, serve_all, serves, settles, start,
    start_in,
};
use crate::refusal::{ports, refused, silent};

/// The `n`th ClusterIP as a frontend.
fn at(n: u16) -> Frontend {
    Frontend {
        addr: cluster_ip(n),
        ..CLUSTER_IP
    }
}

/// A1, E4, G9: Services come beside others, go and come back, also while no agent runs.
#[test]
fn services_go_up_and_down() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let names = ["r1", "b1"];
    let services = |numbers: &[u16]| -> Vec<Service> {
        let pods = || names.map(|name| lab.pod(name));
        numbers
            .iter()
            .map(|n| inside(&format!("up-{n}"), *n).pods(pods()))
            .collect()
    };
    let pod = Source::pod(&lab, "client-r");
    let up = |numbers: &[u16]| {
        for n in numbers {
            for family in Family::BOTH {
                serves(pod, at(*n), family, &names);
                reaches(pod, at(*n), family, &names);
            }
        }
    };
    let down = |n: u16| {
        for family in Family::BOTH {
            ends(pod, at(n), family);
        }
    };
    let (manifests, mut agent) = start(&lab, &services(&[1, 2]));
    up(&[1, 2]);
    manifests.write(&services(&[1, 3])).unwrap();
    up(&[3, 1]);
    down(2);

    agent.kill().unwrap();
    manifests.write(&services(&[3, 4])).unwrap();
    up(&[1, 3]);
    agent.restart().unwrap();
    up(&[4, 3]);
    down(1);
    manifests.write(&services(&[1, 2, 3])).unwrap();
    up(&[1, 2, 3]);
    down(4);
}

/// A3, B1, E2: a Service that becomes an ExternalName, a ClusterIP, a NodePort and all of it back again; what is open
/// stays open.
#[test]
fn types_change_under_open_connections() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let external_name = || {
            inside("web", 80)
                .spec("type", "ExternalName".into())
                .spec("externalName", "example.com".into())
                .pods([lab.pod("r1")])
        };
        let internal = || inside("web", 80).pods([lab.pod("r1")]);
        let on_nodes = || {
            Service::new("web", cluster_ip(80))
                .port("http", Protocol::Tcp, SERVICE_HTTP, HTTP)
                .node_port(NODE_HTTP)
                .port("echo", Protocol::Tcp, SERVICE_ECHO, ECHO)
                .node_port(NODE_ECHO)
                .port("udp", Protocol::Udp, SERVICE_UDP, UDP)
                .node_port(NODE_UDP)
                .pods([lab.pod("r1")])
        };
        let (pod, outside) = (Source::pod(&lab, "client-r"), Source::outside(&lab, 0));
        let (manifests, _agent) = start_in(&lab, &[external_name()], mode);
        each_family(|family| {
            manifests.write(&[external_name()])?;
            ends(pod, CLUSTER_IP, family);
            ends(outside, NODE_PORT, family);

            manifests.write(&[internal()])?;
            serves(pod, CLUSTER_IP, family, &["r1"]);
            ends(outside, NODE_PORT, family);

            manifests.write(&[on_nodes()])?;
            serves(outside, NODE_PORT, family, &["r1"]);
            reaches(outside, NODE_PORT, family, &["r1"]);
            let mut open = [(pod, CLUSTER_IP), (pod, NODE_PORT), (outside, NODE_PORT)]
                .map(|(source, frontend)| Flows::open(source, frontend, family).unwrap());

            manifests.write(&[internal()])?;
            ends(outside, NODE_PORT, family);
            serves(pod, CLUSTER_IP, family, &["r1"]);
            open.iter_mut()
                .try_for_each(|flows| flows.go_on("as a ClusterIP"))?;

            manifests.write(&[external_name()])?;
            ends(pod, CLUSTER_IP, family);
            // Datagrams have nowhere to stay: their backend serves the Service no longer.
            open.iter_mut()
                .try_for_each(|flows| flows.connection_goes_on("as an ExternalName"))
        });
    });
}

/// A TCP connection and a datagram socket through one frontend.
struct Flows {
    frontend: &'static str,
    tcp: Echo,
    udp: Udp,
    server: String,
}

impl Flows {
    fn open(source: Source<'_>, frontend: Frontend, family: Family) -> Result<Self> {
        let client = Client::of(source.ns);
        let mut tcp = client.echo(frontend.addr.socket(family, frontend.echo))?;
        tcp.ping("hello")?;
        let udp = client.udp_connected(frontend.addr.socket(family, frontend.udp))?;
        udp.ask("hello")?;
        let server = udp.ask("hello again")?.server;
        Ok(Self {
            frontend: frontend.kind,
            tcp,
            udp,
            server,
        })
    }

    /// Both are still where they were.
    fn go_on(&mut self, when: &str) -> Result<()> {
        self.connection_goes_on(when)?;
        let Self {
            frontend,
            udp,
            server,
            ..
        } = self;
        let now = udp
            .ask(when)
            .with_context(|| format!("{frontend}, UDP, {when}"))?
            .server;
        ensure!(now == *server, "{frontend}, {when}: from {server} to {now}");
        Ok(())
    }

    /// The connection is; datagrams may have gone elsewhere.
    fn connection_goes_on(&mut self, when: &str) -> Result<()> {
        let ping = self.tcp.ping(when);
        ping.with_context(|| format!("{}, TCP, {when}", self.frontend))
    }
}

/// A5, A6, B1: one number for TCP and for UDP, at the ClusterIP and at the node, each with endpoints of its own; one is
/// refused while the other goes on.
#[test]
fn one_port_number_for_two_protocols() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let service = || {
        Service::new("dns", cluster_ip(53))
            .port("tcp", Protocol::Tcp, 53, ECHO)
            .node_port(30053)
            .port("udp", Protocol::Udp, 53, UDP)
            .node_port(30053)
    };
    // The Service, and slices with one port each.
    let objects = |slices: &[(&str, &str)]| {
        let mut items = nodes();
        items.extend(service().objects().into_iter().take(1));
        for (port, pod) in slices {
            for mut slice in service().pods([lab.pod(pod)]).objects().into_iter().skip(1) {
                let name = format!("{}-{port}", slice["metadata"]["name"].as_str().unwrap());
                slice["metadata"]["name"] = name.into();
                slice["ports"]
                    .as_array_mut()
                    .unwrap()
                    .retain(|one| one["name"] == *port);
                items.push(slice);
            }
        }
        items
    };
    let (manifests, _agent) = start(&lab, &[]);
    each_family(|family| {
        manifests.write_items(&objects(&[("tcp", "r1"), ("udp", "b1")]))?;
        let at = [
            (
                Source::pod(&lab, "client-r"),
                cluster_ip(53).socket(family, 53),
            ),
            (
                Source::outside(&lab, 0),
                NODE_PORT.addr.socket(family, 30053),
            ),
        ];
        for (source, to) in at {
            let client = Client::of(source.ns);
            settles(client, to, &["r1"]);
            eventually("UDP is served", SOON, || {
                client.udp_connected(to)?.ask("x")?;
                Ok(())
            });
            for _ in 0..10 {
                assert_eq!(client.echo(to)?.server(), "r1");
                assert_eq!(client.udp(to.ip())?.ask_at(to, "x")?.server, "b1");
            }
        }
        let (source, to) = at[0];
        let mut open = Client::of(source.ns).echo(to)?;
        manifests.write_items(&objects(&[("tcp", "r1")]))?;
        eventually("UDP is refused", SOON, || {
            let answer = Client::of(source.ns).udp_connected(to)?.ask("x");
            ensure!(answer.is_err(), "{answer:?}");
            Ok(())
        });
        for (source, to) in at {
            assert_eq!(Client::of(source.ns).echo(to)?.server(), "r1");
        }
        open.ping("not a datagram")
    });
}

/// A Pod object for a pod of the lab.
fn pod_object(pod: &Pod, ready: bool, phase: &str, terminating: bool) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name(),
            "namespace": "default",
            "labels": {"app": "web"},
            "deletionTimestamp": terminating.then_some("2026-01-01T00:00:00Z"),
        },
        "spec": {"nodeName": pod.node().as_str(), "containers": []},
        "status": {
            "phase": phase,
            "podIPs": pod.addr().both().map(|ip| json!({"ip": ip})),
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
        },
    })
}

/// A13, E1: pods that are not ready, or are being deleted, serve where a Service publishes them, and are refused where
/// it does not; so is a pod that was evicted.
#[test]
fn pods_that_are_not_ready_or_evicted() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let objects = |publish: bool, pods: &[Value]| {
        let service = inside("web", 80)
            .spec("selector", json!({"app": "web"}))
            .spec("publishNotReadyAddresses", publish.into());
        let mut items = nodes();
        items.extend(service.objects().into_iter().take(1));
        items.extend(pods.iter().cloned());
        items
    };
    let unready = [
        pod_object(lab.pod("r1"), false, "Running", false),
        pod_object(lab.pod("b1"), false, "Running", true),
    ];
    let (manifests, _agent) = start(&lab, &[]);
    let pod = Source::pod(&lab, "client-r");
    each_family(|family| {
        manifests.write_items(&objects(true, &unready))?;
        serves(pod, CLUSTER_IP, family, &["r1", "b1"]);
        reaches(pod, CLUSTER_IP, family, &["r1", "b1"]);

        manifests.write_items(&objects(false, &unready))?;
        ends(pod, CLUSTER_IP, family);
        let (tcp, udp) = ports(CLUSTER_IP, family);
        refused(Client::of(pod.ns), tcp, udp);

        let ready = pod_object(lab.pod("r1"), true, "Running", false);
        manifests.write_items(&objects(false, &[ready]))?;
        serves(pod, CLUSTER_IP, family, &["r1"]);

        let mut evicted = pod_object(lab.pod("r1"), true, "Failed", false);
        evicted["status"]["reason"] = "Evicted".into();
        manifests.write_items(&objects(false, &[evicted]))?;
        ends(pod, CLUSTER_IP, family);
        refused(Client::of(pod.ns), tcp, udp);
        Ok(())
    });
}

/// Seconds of affinity, where it is to end.
const STICKY_SECONDS: u64 = 3;

/// F1: affinity holds as long as new connections come within its timeout, and is over after it.
/// F6: it is switched on and off for the next connection.
#[test]
fn affinity_ends_and_is_switched() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let all = ["r1", "b1", "far"];
        let service = |seconds: Option<u64>, names: &[&str]| {
            let service = everywhere("web").pods(names.iter().map(|name| lab.pod(name)));
            match seconds {
                None => service,
                Some(seconds) => service.spec("sessionAffinity", "ClientIP".into()).spec(
                    "sessionAffinityConfig",
                    json!({"clientIP": {"timeoutSeconds": seconds}}),
                ),
            }
        };
        let clients = [
            (Source::pod(&lab, "client-r"), CLUSTER_IP, SERVICE_HTTP),
            (Source::pod(&lab, "client-b"), NODE_PORT, NODE_HTTP),
            (Source::outside(&lab, 0), NODE_PORT, NODE_HTTP),
        ];
        // Who serves each client, at two ports and in both families. A flow pins its client once it goes both ways.
        let hits = || -> Result<Vec<String>> {
            let mut hits = Vec::new();
            for (source, frontend, http) in clients {
                for family in Family::BOTH {
                    let client = Client::of(source.ns);
                    let mut echo = client.echo(frontend.addr.socket(family, frontend.echo))?;
                    echo.ping("pinned")?;
                    hits.push(echo.server().to_owned());
                    hits.push(client.hit(frontend.addr.socket(family, http))?);
                }
            }
            Ok(hits)
        };
        let (manifests, _agent) = start_in(&lab, &[service(Some(STICKY_SECONDS), &["far"])], mode);
        // The pin is kept by use, longer than it lasts alone.
        assert!(hits().unwrap().iter().all(|server| server == "far"));
        manifests
            .write(&[service(Some(STICKY_SECONDS), &all)])
            .unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(STICKY_SECONDS + 2) {
            let hits = hits().unwrap();
            assert!(hits.iter().all(|server| server == "far"), "{hits:?}");
            std::thread::sleep(Duration::from_millis(300));
        }
        std::thread::sleep(Duration::from_millis(STICKY_SECONDS * 1000 + 500));
        // Of twelve pairs of a client and a port one keeps its pod by chance, but not all.
        let after = hits().unwrap();
        assert!(
            after.iter().any(|server| server != "far"),
            "still pinned: {after:?}"
        );
        assert_eq!(hits().unwrap(), after, "pinned anew");

        let spread = |wanted: bool| {
            eventually(&format!("clients are spread: {wanted}"), SOON, || {
                for (source, frontend, _) in clients {
                    for family in Family::BOTH {
                        let to = frontend.addr.socket(family, frontend.echo);
                        let servers = (0..12).map(|_| {
                            let mut echo = Client::of(source.ns).echo(to)?;
                            echo.ping("hello")?;
                            Ok(echo.server().to_owned())
                        });
                        let servers: BTreeSet<String> = servers.collect::<Result<_>>()?;
                        ensure!(
                            (servers.len() > 1) == wanted,
                            "{}: {servers:?}",
                            frontend.kind
                        );
                    }
                }
                Ok(())
            });
        };
        spread(false);
        manifests.write(&[service(None, &all)]).unwrap();
        spread(true);
        manifests.write(&[service(Some(600), &all)]).unwrap();
        spread(false);
        manifests.write(&[service(None, &all)]).unwrap();
        spread(true);
    });
}

/// C3, C6, D2: where no endpoint of a set is ready, those that serve while they terminate are used: under both policies,
/// for pods and for outside clients, each set by itself.
#[test]
fn each_set_falls_back_to_terminating_endpoints() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let local = |service: Service| {
            service
                .spec("internalTrafficPolicy", "Local".into())
                .spec("externalTrafficPolicy", "Local".into())
        };
        let (r1, far) = (lab.pod("r1"), lab.pod("far"));
        let (pod, outside) = (Source::pod(&lab, "client-r"), Source::outside(&lab, 0));
        let both = everywhere("web").terminating(r1).terminating(far);
        let (manifests, _agent) = start_in(&lab, &[both], mode);
        for family in Family::BOTH {
            serves(pod, CLUSTER_IP, family, &["r1", "far"]);
            serves(outside, NODE_PORT, family, &["r1", "far"]);
        }
        manifests
            .write(&[local(everywhere("web").terminating(r1).pods([far]))])
            .unwrap();
        for family in Family::BOTH {
            serves(pod, CLUSTER_IP, family, &["r1"]);
            serves(outside, NODE_PORT, family, &["r1"]);
            serves(pod, NODE_PORT, family, &["far"]);
        }
        let gone = everywhere("web")
            .with_conditions(r1, [false, false, true])
            .pods([far]);
        manifests.write(&[local(gone)]).unwrap();
        for family in Family::BOTH {
            serves(pod, NODE_PORT, family, &["far"]);
            for (source, frontend) in [(pod, CLUSTER_IP), (outside, NODE_PORT)] {
                ends(source, frontend, family);
                let (tcp, udp) = ports(frontend, family);
                silent(Client::of(source.ns), tcp, udp);
            }
        }
    });
}

/// A client's port in the test of datagrams.
const FIXED: u16 = 42_424;

/// G1: a client with one port for all its datagrams follows its service from pod to pod, each of which is deleted with
/// its network: through a ClusterIP and a NodePort.
#[test]
fn datagrams_from_one_port_follow_the_pods() {
    if !privileged() {
        return;
    }
    each_mode(|mode| {
        let mut lab = lab();
        let mut servers = serve_all(&lab);
        let (manifests, _agent) = start_in(&lab, &[everywhere("web").pods([lab.pod("r1")])], mode);
        let follows = |lab: &Lab, server: &str| {
            for (source, frontend) in [
                (Source::pod(lab, "client-r"), CLUSTER_IP),
                (Source::pod(lab, "client-b"), CLUSTER_IP),
                (Source::outside(lab, 0), NODE_PORT),
            ] {
                for family in Family::BOTH {
                    let to = frontend.addr.socket(family, frontend.udp);
                    let client = Client::of(source.ns).from_port(FIXED).patience(BRIEF);
                    eventually(&format!("{server} answers at {to}"), SOON, || {
                        let answer = client.udp(to.ip())?.ask_at(to, "where?")?;
                        ensure!(answer.from == to && answer.server == server, "{answer:?}");
                        Ok(())
                    });
                }
            }
        };
        follows(&lab, "r1");
        for (old, new, attach) in [
            ("r1", "second", Attach::Routed),
            ("second", "third", Attach::Bridged),
        ] {
            servers.push(serve(lab.add_pod(new, NodeName::A, attach).unwrap()));
            let pods = [old, new].map(|name| lab.pod(name));
            manifests.write(&[everywhere("web").pods(pods)]).unwrap();
            manifests
                .write(&[everywhere("web").pods([lab.pod(new)])])
                .unwrap();
            lab.remove_pod(old).unwrap();
            follows(&lab, new);
        }
    });
}

/// E1, E2, C3, C6: refusal and silence are for new connections: what is open goes on when its service's last endpoint,
/// its policy's last one, or the Service itself has gone.
#[test]
fn open_connections_outlive_an_empty_set() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let pods = ["r1", "b1"].map(|name| lab.pod(name));
        let (manifests, _agent) = start_in(&lab, &[everywhere("web").pods(pods)], mode);
        let (pod, outside) = (Source::pod(&lab, "client-r"), Source::outside(&lab, 0));
        let ways = [
            (pod, CLUSTER_IP),
            (pod, NODE_PORT),
            (outside, NODE_PORT),
            (outside, LOAD_BALANCER),
        ];
        let mut open = Vec::new();
        for (source, frontend) in ways {
            for family in Family::BOTH {
                open.push(Flows::open(source, frontend, family).unwrap());
            }
        }
        let mut all_go_on = |when: &str| {
            for flows in &mut open {
                flows.go_on(when).unwrap();
            }
        };
        let elsewhere = everywhere("web")
            .spec("internalTrafficPolicy", "Local".into())
            .spec("externalTrafficPolicy", "Local".into())
            .pods([lab.pod("far")])
            .with_conditions(pods[0], [false, true, false])
            .with_conditions(pods[1], [false, true, false]);
        manifests.write(&[elsewhere]).unwrap();
        serves(pod, NODE_PORT, Family::V4, &["far"]);
        for (source, frontend) in [(pod, CLUSTER_IP), (outside, NODE_PORT)] {
            let (tcp, udp) = ports(frontend, Family::V4);
            silent(Client::of(source.ns), tcp, udp);
        }
        all_go_on("with a policy that leaves none");

        manifests.write(&[everywhere("web")]).unwrap();
        for (source, frontend) in ways {
            for family in Family::BOTH {
                let (tcp, udp) = ports(frontend, family);
                ends(source, frontend, family);
                refused(Client::of(source.ns), tcp, udp);
            }
        }
        all_go_on("without endpoints");

        manifests.write(&[]).unwrap();
        ends(pod, NODE_PORT, Family::V6);
        for flows in &mut open {
            flows.connection_goes_on("without a Service").unwrap();
        }
    });
}

/// C13 (the connection that a segment outside of the window breaks where connection tracking translates): a backend's
/// stray segment reaches the client as the frontend's, which answers it without a reset, and the connection goes on.
#[test]
fn segments_outside_the_window_break_nothing() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let (_manifests, _agent) = start_in(&lab, &[everywhere("web").pods([lab.pod("r1")])], mode);
        let pod = lab.pod("r1");
        each_family(|family| {
            for (source, frontend) in [
                (Source::pod(&lab, "client-r"), CLUSTER_IP),
                (Source::pod(&lab, "client-b"), CLUSTER_IP),
                (Source::outside(&lab, 0), NODE_PORT),
            ] {
                let to = frontend.addr.socket(family, frontend.echo);
                let mut echo = Client::of(source.ns).echo(to)?;
                echo.ping("before")?;
                let wire = Capture::start(source.ns, "eth0")?;
                let backend = pod.addr().socket(family, ECHO);
                let mut stray = Frame::tcp(backend, echo.seen_as(), ACK | PSH);
                stray.payload = vec![b'x'; STRAY];
                inject(pod, &stray)?;
                std::thread::sleep(Duration::from_millis(50));
                echo.ping("after")?;
                let seen = wire.stop()?;
                let what = format!(
                    "{} -> {} over {family}: {seen:?}",
                    source.ns.name(),
                    frontend.kind
                );
                let stray = seen.iter().filter(|packet| packet.payload == STRAY);
                assert!(
                    stray.clone().count() == 1 && stray.clone().all(|packet| packet.from == to),
                    "{what}"
                );
                assert!(seen.iter().all(|packet| packet.flags & RST == 0), "{what}");
                assert!(
                    seen.iter()
                        .all(|packet| packet.from != backend && packet.to != backend),
                    "{what}"
                );
            }
            Ok(())
        });
    });
}

/// Bytes that nothing else in the test sends at once.
const STRAY: usize = 777;

/// Sends a packet out of a pod, whatever its sockets know of it.
fn inject(pod: &Pod, frame: &Frame) -> Result<()> {
    let (packet, to) = (
        frame.to_bytes().split_off(frame.l3()),
        frame.destination.ip(),
    );
    pod.ns().run(|| {
        // IPPROTO_RAW: the IP header is in the packet.
        let socket = Socket::new(
            Domain::for_address((to, 0).into()),
            Type::RAW,
            Some(Transport::from(255)),
        )?;
        let sent = socket.send_to(&packet, &std::net::SocketAddr::new(to, 0).into())?;
        ensure!(sent == packet.len(), "{sent} bytes sent");
        Ok(())
    })
}

/// D5, D6, D7, D8: hints choose endpoints by node and by zone, for pods and outside clients, and the node's zone may
/// change while it runs.
#[test]
fn hints_follow_the_nodes_labels() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let names = ["r1", "b1", "far"];
    // Each endpoint's hints by its address, and this node's zone.
    let objects = |zone: Option<&str>, hints: &[(&str, Value)]| {
        let mut items = nodes();
        for node in &mut items {
            if let (Some(zone), "node-a") = (zone, node["metadata"]["name"].as_str().unwrap()) {
                node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": zone});
            }
        }
        for mut object in everywhere("web")
            .pods(names.map(|name| lab.pod(name)))
            .objects()
        {
            for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
                let address = endpoint["addresses"][0].as_str().unwrap().parse()?;
                for (name, hint) in hints {
                    if lab.pod(name).addr().contains(address) {
                        endpoint["hints"] = hint.clone();
                    }
                }
            }
            items.push(object);
        }
        Ok::<_, anyhow::Error>(items)
    };
    let zones = |names: &[&str]| json!({"forZones": names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>()});
    let by_zone = [
        ("r1", zones(&["a"])),
        ("b1", zones(&["b"])),
        ("far", zones(&["b", "c"])),
    ];
    let mut by_node = by_zone.clone();
    for (name, hint) in &mut by_node {
        hint["forNodes"] = json!([{"name": lab.pod(name).node().as_str()}]);
    }
    let (manifests, _agent) = start(&lab, &[]);
    for (zone, hints, expected) in [
        (None, &by_zone[..], &names[..]),
        (Some("a"), &by_zone[..], &["r1"][..]),
        (Some("b"), &by_zone[..], &["b1", "far"][..]),
        (Some("c"), &by_zone[..], &["far"][..]),
        (Some("d"), &by_zone[..], &names[..]),
        (Some("c"), &by_node[..], &["r1", "b1"][..]),
        (Some("c"), &by_zone[1..], &names[..]),
    ] {
        manifests
            .write_items(&objects(zone, hints).unwrap())
            .unwrap();
        for family in Family::BOTH {
            serves(Source::pod(&lab, "client-r"), CLUSTER_IP, family, expected);
            serves(Source::outside(&lab, 0), NODE_PORT, family, expected);
        }
    }
    // A Local policy is stronger.
    let far_away = [
        ("r1", zones(&["b"])),
        ("b1", zones(&["b"])),
        ("far", zones(&["a"])),
    ];
    let mut items = objects(Some("a"), &far_away).unwrap();
    for item in items.iter_mut().filter(|item| item["kind"] == "Service") {
        item["spec"]["externalTrafficPolicy"] = "Local".into();
    }
    manifests.write_items(&items).unwrap();
    for family in Family::BOTH {
        serves(Source::outside(&lab, 0), NODE_PORT, family, &["r1", "b1"]);
        serves(Source::pod(&lab, "client-b"), CLUSTER_IP, family, &["far"]);
    }
}
