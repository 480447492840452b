//! Real servers behind services.

use std::collections::BTreeMap;

use anyhow::ensure;
use svc_lb_tests::lab::addresses::{LB_POOL, NODE_A};
use svc_lb_tests::lab::client::{Client, dig};
use svc_lb_tests::lab::objects::{Protocol, Service};
use svc_lb_tests::lab::server::{Rule, dns, ingress};
use svc_lb_tests::lab::{Family, Lab, privileged};

use crate::cluster::{SERVICE_HTTP, cluster_ip, each_family, inside, serve, start};

/// A5: a DNS server behind UDP 53 and TCP 53 of one address, asked by a real resolver.
#[test]
fn dns_over_udp_and_tcp() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("dns-1")
        .bridged("dns-2")
        .routed("client-r")
        .bridged("client-b")
        .build()
        .unwrap();
    let records = BTreeMap::from([("web.test".to_owned(), cluster_ip(80).of(Family::V4))]);
    let _servers = ["dns-1", "dns-2"].map(|name| dns(lab.pod(name).ns(), name, &records).unwrap());
    let service = Service::new("dns", cluster_ip(10))
        .port("dns", Protocol::Udp, 53, 53)
        .port("dns-tcp", Protocol::Tcp, 53, 53)
        .pods(["dns-1", "dns-2"].map(|name| lab.pod(name)));
    let (_manifests, _agent) = start(&lab, &[service]);
    each_family(|family| {
        for source in ["client-r", "client-b"] {
            for transport in ["+notcp", "+tcp"] {
                let source = lab.pod(source).ns();
                let server = format!("@{}", cluster_ip(10).of(family));
                let answer = dig(source, &[&server, transport, "web.test", "A"])?;
                ensure!(answer == "10.96.0.80", "{transport}: {answer:?}");
                let who = dig(source, &[&server, transport, "whoami.test", "TXT"])?;
                ensure!(
                    ["\"dns-1\"", "\"dns-2\""].contains(&who.as_str()),
                    "{who:?}"
                );
            }
        }
        Ok(())
    });
}

/// An ingress as users run it: nginx with TLS, host and path rules, behind NodePort and LoadBalancer, in front of
/// two services by their ClusterIPs. nginx sees the client's own address.
#[test]
fn ingress_with_tls_in_front_of_services() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("nginx")
        .routed("shop")
        .bridged("blog")
        .clients(1)
        .build()
        .unwrap();
    let _servers = ["shop", "blog"].map(|name| serve(lab.pod(name)));
    let rule = |host: &str, path: &str, ip: u16, family: Family| Rule {
        host: host.to_owned(),
        path: path.to_owned(),
        upstream: cluster_ip(ip).socket(family, SERVICE_HTTP),
    };
    let rules = [
        rule("shop.test", "/", 1, Family::V4),
        rule("shop.test", "/blog/", 2, Family::V6),
        rule("blog.test", "/", 2, Family::V4),
    ];
    let dir = lab.dir().join("nginx");
    let _nginx = ingress(lab.pod("nginx").ns(), "nginx-1", &rules, &dir).unwrap();
    let services = [
        inside("shop", 1).pods([lab.pod("shop")]),
        inside("blog", 2).pods([lab.pod("blog")]),
        Service::new("ingress", cluster_ip(3))
            .port("http", Protocol::Tcp, 80, 80)
            .node_port(30080)
            .port("https", Protocol::Tcp, 443, 443)
            .node_port(30443)
            .load_balancer(LB_POOL.nth(1))
            .pods([lab.pod("nginx")]),
    ];
    let (_manifests, _agent) = start(&lab, &services);
    let client = Client::of(lab.client(0).ns());
    let crt = dir.join("tls.crt").display().to_string();
    each_family(|family| {
        for (addr, http, https) in [(NODE_A, 30080, 30443), (LB_POOL.nth(1), 80, 443)] {
            for (host, path, pod) in [
                ("shop.test", "/", "shop"),
                ("shop.test", "/blog/", "blog"),
                ("blog.test", "/", "blog"),
            ] {
                for (scheme, port) in [("http", http), ("https", https)] {
                    let to = format!("{host}:{port}:{}", bracketed(addr.of(family)));
                    let url = format!("{scheme}://{host}:{port}{path}");
                    let args = ["--include", "--cacert", &crt, "--resolve", &to, &url];
                    let answer = client.curl_ok(&args)?;
                    ensure!(
                        answer.contains(&format!("You've hit {pod}")),
                        "{url}: {answer}"
                    );
                    let seen = format!("Client: {}", lab.client(0).addr().of(family));
                    ensure!(answer.contains(&seen), "{url}: not {seen}: {answer}");
                }
            }
        }
        Ok(())
    });
}

fn bracketed(ip: std::net::IpAddr) -> String {
    match ip {
        std::net::IpAddr::V4(ip) => ip.to_string(),
        std::net::IpAddr::V6(ip) => format!("[{ip}]"),
    }
}
