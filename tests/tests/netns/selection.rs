//! Which backend a new flow gets, where its Service or its slices say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use svc_lb_tests::lab::agent::{AgentConfig, AgentProcess};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::{Manifests, Service, nodes};
use svc_lb_tests::lab::{Family, Lab, eventually, privileged};

use crate::cluster::{CLUSTER_IP, SOON, each_family, everywhere, inside, serve_all, start};

const PODS: [&str; 4] = ["r1", "r2", "r3", "b1"];

fn lab() -> Lab {
    Lab::builder()
        .routed("r1")
        .routed("r2")
        .routed("r3")
        .bridged("b1")
        .routed("client-r")
        .build()
        .unwrap()
}

/// Objects of which that of this kind and name has an annotation.
fn annotated(
    mut objects: Vec<Value>,
    kind: &str,
    name: &str,
    key: &str,
    value: &str,
) -> Vec<Value> {
    for object in &mut objects {
        let is = |path, text| object.pointer(path).and_then(Value::as_str) == Some(text);
        let meant = is("/kind", kind) && is("/metadata/name", name);
        if let Some(Value::Object(metadata)) = object.pointer_mut("/metadata")
            && meant
        {
            metadata.insert("annotations".to_owned(), json!({key: value}));
        }
    }
    objects
}

/// Nodes, and "web" with Maglev.
fn with_maglev(services: &[Service]) -> Vec<Value> {
    let mut items = nodes();
    items.extend(services.iter().flat_map(Service::objects));
    annotated(items, "Service", "web", "svc-lb.io/lb-algorithm", "maglev")
}

/// Who answers a client on each of these ports.
fn answers(lab: &Lab, family: Family) -> Result<BTreeMap<u16, String>> {
    let to = CLUSTER_IP.addr.socket(family, CLUSTER_IP.echo);
    let ports = 20_000..20_060;
    ports
        .map(|port| {
            let echo = Client::of(lab.pod("client-r").ns())
                .from_port(port)
                .echo(to)?;
            let server = echo.server().to_owned();
            // The next run uses the port again.
            echo.abort()?;
            Ok((port, server))
        })
        .collect()
}

/// F9: a node that never met the other one picks the same backends for the same flows, with the same seed: one agent is
/// taken away with all it left, another one starts with other Services before this one.
#[test]
fn maglev_picks_alike_on_every_node() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let web = || everywhere("web").pods(PODS.map(|name| lab.pod(name)));
    let others = [1, 2].map(|n| inside(&format!("a{n}"), n).pods([lab.pod("r2")]));
    let start = |seed: &str, services: &[Service]| {
        let manifests = Manifests::create(lab.dir(), services).unwrap();
        manifests.write_items(&with_maglev(services)).unwrap();
        let args = ["--maglev-seed", seed, "--maglev-table-size", "1021"];
        let config = AgentConfig::manifests(manifests.path()).args(args);
        AgentProcess::start(&lab, config).unwrap()
    };
    for family in Family::BOTH {
        let one = start("alike", &[web()]);
        let first = answers(&lab, family).unwrap();
        let backends: BTreeSet<_> = first.values().collect();
        assert_eq!(backends.len(), PODS.len(), "{first:?}");
        assert!(one.ask(&["dump", "services"]).unwrap().contains("maglev"));
        drop(one);

        let [a1, a2] = &others;
        let two = start("alike", &[a1.clone(), a2.clone(), web()]);
        assert_eq!(answers(&lab, family).unwrap(), first, "{family}");
        drop(two);

        let _three = start("another", &[web()]);
        assert_ne!(answers(&lab, family).unwrap(), first, "{family}");
    }
}

/// D9, F11: an endpoint in quarantine keeps its connections and its UDP flows and gets no new ones, while its part goes to
/// the others; the annotation is that of its slice.
#[test]
fn quarantined_endpoints_keep_their_flows() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    let both = || everywhere("web").pods(["r1", "r2"].map(|name| lab.pod(name)));
    let (manifests, agent) = start(&lab, &[both()]);
    // A second pair of slices: a weight is a slice's.
    let split = |weight: &str| {
        let mut items = nodes();
        items.extend(everywhere("web").pods([lab.pod("r2")]).objects());
        let slices = everywhere("aside").pods([lab.pod("r1")]).objects();
        for mut slice in slices.into_iter().skip(1) {
            slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!("web");
            slice["metadata"]["annotations"] = json!({"svc-lb.io/weight": weight});
            items.push(slice);
        }
        items
    };
    each_family(|family| {
        manifests.write(&[both()])?;
        let client = Client::of(lab.pod("client-r").ns()).patience(Duration::from_millis(500));
        let tcp = CLUSTER_IP.addr.socket(family, CLUSTER_IP.echo);
        let udp = CLUSTER_IP.addr.socket(family, CLUSTER_IP.udp);
        let mut held = None;
        eventually("a connection to r1", SOON, || {
            let echo = client.echo(tcp)?;
            ensure!(echo.server() == "r1");
            held = Some(echo);
            Ok(())
        });
        let mut datagrams = None;
        eventually("a UDP flow to r1", SOON, || {
            let socket = client.udp_connected(udp)?;
            ensure!(socket.ask("x")?.server == "r1");
            datagrams = Some(socket);
            Ok(())
        });
        manifests.write_items(&split("0"))?;
        eventually("the status says so", SOON, || {
            let status = agent.ask(&["status", "--services"])?;
            let address = lab.pod("r1").addr().of(family);
            ensure!(
                status.contains(&format!("endpoint {address} takes no new flows")),
                "{status}"
            );
            Ok(())
        });
        for _ in 0..40 {
            assert_eq!(client.echo(tcp)?.server(), "r2");
            assert_eq!(client.udp_connected(udp)?.ask("x")?.server, "r2");
        }
        held.as_mut().expect("held").ping("still here")?;
        assert_eq!(datagrams.as_ref().expect("held").ask("x")?.server, "r1");
        // Nine in ten, where it was half: both ways of picking know weights.
        manifests.write_items(&split("9"))?;
        eventually("r1 is back", SOON, || {
            ensure!(client.echo(tcp)?.server() == "r1");
            Ok(())
        });
        let hits = (0..200).filter(|_| client.echo(tcp).is_ok_and(|echo| echo.server() == "r1"));
        let hits = hits.count();
        assert!((160..=197).contains(&hits), "{hits} of 200");
        Ok(())
    });
}
