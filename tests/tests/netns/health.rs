//! What load balancers and probes are told, asked for from outside.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use serde_json::json;
use svc_lb::dataplane::pins::Pins;
use svc_lb::observe::metrics::METRICS;
use svc_lb_common::limits::name;
use svc_lb_common::service::{Frontend, FrontendKey, kind};
use svc_lb_common::{Addr4, Be16};
use svc_lb_tests::lab::addresses::{EXTERNAL, LB_POOL, NODE_A};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::objects::{Protocol, Service, nodes};
use svc_lb_tests::lab::{Family, Lab, eventually, privileged, server};

use crate::cluster::{
    ECHO, HTTP, NODE_ECHO, NODE_HTTP, SERVICE_ECHO, SERVICE_HTTP, SOON, cluster_ip, each_family,
    serve_all, start, start_with,
};

const HEALTH: u16 = 32_100;
const OTHER_HEALTH: u16 = 32_101;
const HEALTHZ: u16 = 10_256;

/// A load balancer's Service with a Local policy.
fn balanced(name: &str, n: u16, health: u16) -> Service {
    Service::new(name, cluster_ip(n))
        .port("http", Protocol::Tcp, SERVICE_HTTP, HTTP)
        .port("echo", Protocol::Tcp, SERVICE_ECHO, ECHO)
        .load_balancer(LB_POOL.nth(n))
        .spec("externalTrafficPolicy", json!("Local"))
        .spec("healthCheckNodePort", json!(health))
}

/// The same with node ports, which only one can have.
fn web() -> Service {
    Service::new("web", cluster_ip(80))
        .port("http", Protocol::Tcp, SERVICE_HTTP, HTTP)
        .node_port(NODE_HTTP)
        .port("echo", Protocol::Tcp, SERVICE_ECHO, ECHO)
        .node_port(NODE_ECHO)
        .load_balancer(LB_POOL.nth(80))
        .spec("externalTrafficPolicy", json!("Local"))
        .spec("healthCheckNodePort", json!(HEALTH))
}

/// curl's view of one answer: status line, headers and body.
fn ask(client: Client<'_>, to: SocketAddr, path: &str) -> Result<String> {
    client.curl_ok(&["--include", &format!("http://{to}{path}")])
}

/// Waits for an answer with this code and number of endpoints.
fn tells(client: Client<'_>, to: SocketAddr, code: u16, endpoints: u32) {
    eventually(&format!("{to} says {code}"), SOON, || {
        let answer = ask(client, to, "/")?;
        ensure!(
            answer.starts_with(&format!("HTTP/1.1 {code} "))
                && answer.contains(&format!("\"localEndpoints\": {endpoints},\n")),
            "{answer}"
        );
        Ok(())
    });
}

/// G6, B8 and trap 7: a load balancer outside learns from healthCheckNodePort how many endpoints this node has, through
/// the same interface that the programs watch.
#[test]
fn load_balancers_learn_where_endpoints_are() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .bridged("b1")
        .remote("far")
        .clients(1)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let (manifests, agent) = start(
        &lab,
        &[web().pods(["r1", "b1", "far"].map(|name| lab.pod(name)))],
    );
    each_family(|family| {
        let client = Client::of(lab.client(0).ns());
        let to = NODE_A.socket(family, HEALTH);
        manifests.write(&[web().pods(["r1", "b1", "far"].map(|name| lab.pod(name)))])?;
        tells(client, to, 200, 2);
        let answer = ask(client, to, "/any/path")?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let head = head.to_lowercase();
        for header in [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 2",
        ] {
            assert!(head.lines().any(|line| line == header), "{header}: {head}");
        }
        assert_eq!(
            body,
            "{\n\"service\": {\n\t\"namespace\": \"default\",\n\t\"name\": \"web\"\n},\n\
             \"localEndpoints\": 2,\n\"serviceProxyHealthy\": true\n}"
        );
        manifests.write(&[web().pods([lab.pod("far")])])?;
        tells(client, to, 503, 0);
        Ok(())
    });
    let status = agent.ask(&["status", "--services"]).unwrap();
    assert!(
        status.contains(&format!(
            "default/web: healthCheckNodePort {HEALTH}: 0 ready here"
        )),
        "{status}"
    );
}

/// H4: a scrape shows every metric that is declared and no other, and packets count in it.
#[test]
fn prometheus_scrapes_all_that_is_documented() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").routed("r2").build().unwrap();
    let _servers = serve_all(&lab);
    let (_manifests, agent) = start(&lab, &[web().pods([lab.pod("r1")])]);
    let node = Client::of(lab.node_a());
    let scrape = || node.curl_ok(&["http://127.0.0.1:10249/metrics"]).unwrap();
    let value = |text: &str, series: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        let value = line.unwrap_or_else(|| panic!("{series} is missing: {text}"));
        value.trim().parse().unwrap()
    };
    let opened = r#"svc_lb_packets_total{hook="tc_ingress",outcome="open",fate="pass"}"#;
    let before = value(&scrape(), opened);
    each_family(|family| {
        let to = cluster_ip(80).socket(family, SERVICE_HTTP);
        Client::of(lab.pod("r2").ns())
            .curl_ok(&[&format!("http://{to}/")])
            .map(drop)
    });
    let text = scrape();
    assert!(value(&text, opened) >= before + 2.0, "{text}");
    for (series, expected) in [
        ("svc_lb_ready", 1.0),
        ("svc_lb_services{state=\"programmed\"}", 1.0),
        ("svc_lb_sync_failures_total", 0.0),
        (
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count",
            1.0,
        ),
        ("kubeproxy_sync_proxy_rules_service_changes_pending", 0.0),
    ] {
        assert!(
            (value(&text, series) - expected).abs() < 0.5,
            "{series}: {text}"
        );
    }
    let typed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    let declared: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
    // Nothing has timed out yet, nor a whole pass ended.
    let later = BTreeSet::from(["svc_lb_collected_total", "svc_lb_map_evictions_total"]);
    let unexpected: Vec<_> = typed.symmetric_difference(&declared).collect();
    assert!(
        unexpected.iter().all(|name| later.contains(**name)),
        "{unexpected:?}"
    );
    drop(agent);
}

/// D3, trap 10 and the end-to-end case "should fail health check node port if there are only terminating endpoints":
/// load balancers are sent away while the NodePort still serves.
#[test]
fn health_check_fails_while_the_last_endpoint_drains() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let (manifests, _agent) = start(&lab, &[web().pods([lab.pod("r1")])]);
    each_family(|family| {
        let client = Client::of(lab.client(0).ns());
        let health = NODE_A.socket(family, HEALTH);
        manifests.write(&[web().pods([lab.pod("r1")])])?;
        tells(client, health, 200, 1);
        manifests.write(&[web().terminating(lab.pod("r1"))])?;
        tells(client, health, 503, 0);
        for _ in 0..20 {
            assert_eq!(client.hit(NODE_A.socket(family, NODE_HTTP))?, "r1");
            assert_eq!(
                client.hit(LB_POOL.nth(80).socket(family, SERVICE_HTTP))?,
                "r1"
            );
        }
        Ok(())
    });
}

/// G6: servers come, move and go with their Services, and the others do not notice: a connection to one is not cut.
#[test]
fn health_checks_follow_their_services() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let one = || balanced("one", 81, HEALTH).pods([lab.pod("r1")]);
    let two = |port| balanced("two", 82, port);
    let (manifests, _agent) = start(&lab, &[one()]);
    let client = Client::of(lab.client(0).ns());
    let at = |port| NODE_A.socket(Family::V4, port);
    tells(client, at(HEALTH), 200, 1);
    assert!(client.connect(at(OTHER_HEALTH)).is_err());
    let mut kept = client.http(at(HEALTH)).unwrap();
    assert_eq!(kept.request("/", false).unwrap().status, 200);

    manifests.write(&[one(), two(OTHER_HEALTH)]).unwrap();
    tells(client, at(OTHER_HEALTH), 503, 0);
    let moved = OTHER_HEALTH + 1;
    manifests.write(&[one(), two(moved)]).unwrap();
    tells(client, at(moved), 503, 0);
    assert!(
        client.connect(at(OTHER_HEALTH)).is_err(),
        "the old port is free"
    );
    manifests.write(&[one()]).unwrap();
    eventually("the port is released", SOON, || {
        ensure!(client.connect(at(moved)).is_err());
        Ok(())
    });
    assert_eq!(kept.request("/", true).unwrap().status, 200);
}

/// G6: a port that another process has is named in the status, under the Service, and served once it is free; what is
/// programmed is not touched by it.
#[test]
fn a_taken_health_check_port_is_reported_and_retried() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let squatter = server::http(lab.node_a(), "squatter", HEALTH).unwrap();
    let (_manifests, agent) = start(&lab, &[web().pods([lab.pod("r1")])]);
    let client = Client::of(lab.client(0).ns());
    eventually("the status names it", SOON, || {
        let status = agent.ask(&["status"])?;
        let said = status.lines().find(|line| {
            line.contains(&format!(
                "default/web: healthCheckNodePort {HEALTH}: cannot listen"
            ))
        });
        ensure!(said.is_some_and(|line| line.contains("in use")), "{status}");
        Ok(())
    });
    assert_eq!(
        client.hit(NODE_A.socket(Family::V4, NODE_HTTP)).unwrap(),
        "r1"
    );
    drop(squatter);
    for family in Family::BOTH {
        tells(client, NODE_A.socket(family, HEALTH), 200, 1);
    }
}

/// G6, B2: health checks are served on the addresses that serve NodePorts, and on no others.
#[test]
fn health_checks_listen_where_node_ports_are() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let services = [web().pods([lab.pod("r1")])];
    let ranges = format!("{}/32,2001:db8:ffff::/64", NODE_A.v4);
    let (_manifests, _agent) = start_with(&lab, &services, |config| {
        config.args(["--nodeport-addresses", &ranges])
    });
    let client = Client::of(lab.client(0).ns());
    tells(client, NODE_A.socket(Family::V4, HEALTH), 200, 1);
    assert!(client.connect(NODE_A.socket(Family::V6, HEALTH)).is_err());
    let itself = Client::of(lab.node_a());
    assert!(
        itself
            .connect((std::net::Ipv4Addr::LOCALHOST, HEALTH).into())
            .is_err()
    );
    tells(itself, NODE_A.socket(Family::V4, HEALTH), 200, 1);
}

/// G7: /healthz and /livez, from outside: the node that leaves fails the first only; both say when a source is lost
/// that all is well.
#[test]
fn healthz_and_livez() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let (manifests, agent) = start(&lab, &[web().pods([lab.pod("r1")])]);
    let client = Client::of(lab.client(0).ns());
    let code = |family, path: &str, expected: u16| {
        let answer = ask(client, NODE_A.socket(family, HEALTHZ), path)?;
        ensure!(
            answer.starts_with(&format!("HTTP/1.1 {expected} ")),
            "{path}: {answer}"
        );
        Ok(answer)
    };
    for family in Family::BOTH {
        let answer = code(family, "/healthz", 200).unwrap();
        assert!(answer.contains("\"nodeEligible\": true}"), "{answer}");
        assert!(
            answer
                .to_lowercase()
                .contains("content-type: application/json\r\n")
        );
        let answer = code(family, "/livez", 200).unwrap();
        assert!(answer.contains("\"lastUpdated\": \"2") && !answer.contains("nodeEligible"));
    }
    code(Family::V4, "/metrics", 404).unwrap();

    let mut items = nodes();
    for node in &mut items {
        node["spec"] = json!({"taints": [
            {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"},
        ]});
    }
    items.extend(web().pods([lab.pod("r1")]).objects());
    manifests.write_items(&items).unwrap();
    eventually("healthz fails", SOON, || {
        code(Family::V4, "/healthz", 503).map(drop)
    });
    let answer = code(Family::V4, "/healthz", 503).unwrap();
    assert!(answer.contains("\"nodeEligible\": false}"), "{answer}");
    code(Family::V4, "/livez", 200).unwrap();
    // Services answer on: who is here may stay.
    tells(client, NODE_A.socket(Family::V4, HEALTH), 200, 1);

    manifests.write(&[web().pods([lab.pod("r1")])]).unwrap();
    eventually("healthz recovers", SOON, || {
        code(Family::V4, "/healthz", 200).map(drop)
    });
    std::fs::remove_file(manifests.path()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    code(Family::V4, "/healthz", 200).unwrap();

    let status: serde_json::Value =
        serde_json::from_str(&agent.ask(&["status", "-o", "json"]).unwrap()).unwrap();
    let health = &status["health"];
    assert!(
        health["proxy_healthz_total"]["200"].as_u64().unwrap() >= 4,
        "{health}"
    );
    assert!(
        health["proxy_healthz_total"]["503"].as_u64().unwrap() >= 2,
        "{health}"
    );
    assert_eq!(health["proxy_livez_total"]["503"], 0, "{health}");
}

/// G7: the address of /healthz is a setting; off is off.
#[test]
fn healthz_can_be_bound_elsewhere_or_off() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let client = Client::of(lab.client(0).ns());
    let at = |port| NODE_A.socket(Family::V4, port);
    let (_manifests, agent) = start_with(&lab, &[web().pods([lab.pod("r1")])], |config| {
        config.args(["--healthz-bind-address", "off"])
    });
    assert!(client.connect(at(HEALTHZ)).is_err());
    assert!(
        agent
            .ask(&["status"])
            .unwrap()
            .contains("healthz and livez off")
    );
    tells(client, at(HEALTH), 200, 1);
    drop(agent);

    let (_manifests, _agent) = start_with(&lab, &[web().pods([lab.pod("r1")])], |config| {
        config.args(["--healthz-bind-address", "192.0.2.11:9999"])
    });
    assert!(
        ask(client, at(9999), "/livez")
            .unwrap()
            .starts_with("HTTP/1.1 200 ")
    );
    assert!(client.connect(NODE_A.socket(Family::V6, 9999)).is_err());
}

/// G6, G7: an update that does not get through makes the proxy unhealthy in time, at every door, while what is programmed
/// serves on; when it does get through all is well again. The map has no room for it: somebody else filled it.
#[test]
fn updates_that_do_not_get_through_are_unhealthy() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let serving = || web().pods([lab.pod("r1")]);
    let (manifests, agent) = start_with(&lab, &[serving()], |config| {
        config.args(["--sync-period", "500ms", "--map-size", "frontends4=64"])
    });
    let client = Client::of(lab.client(0).ns());
    let node = |port| NODE_A.socket(Family::V4, port);
    let code = |path: &str, expected: u16| {
        let answer = ask(client, node(HEALTHZ), path)?;
        ensure!(
            answer.starts_with(&format!("HTTP/1.1 {expected} ")),
            "{path}: {answer}"
        );
        Ok(())
    };
    tells(client, node(HEALTH), 200, 1);

    let path = Pins::new(agent.pin_dir()).map(name::FRONTENDS[0]);
    let map = Map::HashMap(MapData::from_pin(path).unwrap());
    let mut map: HashMap<_, FrontendKey<Addr4>, Frontend> = map.try_into().unwrap();
    let strange = |n: u16| FrontendKey::new(Addr4(n.into()), Be16(n), 6);
    let fits = |n: &u16| {
        let key = strange(*n);
        let value = Frontend::new(&key, 1, kind::EXTERNAL_IP);
        map.insert(key, value, 0).is_ok()
    };
    let filled: Vec<u16> = (1..1_000).take_while(fits).collect();
    assert!((1..64).contains(&filled.len()), "{}", filled.len());

    let more = || serving().external_ips(EXTERNAL.nth(80));
    manifests.write(&[more()]).unwrap();
    eventually("the proxy is unhealthy", SOON, || {
        code("/healthz", 503)?;
        code("/livez", 503)
    });
    let answer = ask(client, node(HEALTH), "/").unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let said = "\"localEndpoints\": 1,\n\"serviceProxyHealthy\": false";
    assert!(answer.contains(said), "{answer}");
    assert_eq!(client.hit(node(NODE_HTTP)).unwrap(), "r1");
    let status = agent.ask(&["status"]).unwrap();
    assert!(status.contains("proxy unhealthy"), "{status}");

    for n in filled {
        map.remove(&strange(n)).unwrap();
    }
    eventually("the proxy recovers", 4 * SOON, || code("/healthz", 200));
    let external = EXTERNAL.nth(80).socket(Family::V4, SERVICE_HTTP);
    assert_eq!(client.hit(external).unwrap(), "r1");
    tells(client, node(HEALTH), 200, 1);
}
