//! Every service called from everywhere.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use svc_lb_tests::lab::client::{Client, Http, dig, pod_of};
use svc_lb_tests::lab::process::Process;
use svc_lb_tests::lab::server::{self, Rule, Server};
use svc_lb_tests::lab::{AgentProcess, Family, Lab, Namespace};

use crate::examples::{Examples, LEGACY, SHELL, SHELL_BRIDGED};
use crate::frontends::{Frontends, Kind};
use crate::go_on;
use crate::show::{Hits, Show, note};

/// Calls per row: enough that each of three pods is met in all but one of 60,000 rows.
const CALLS: usize = 36;
/// How long a change of an object may take to show.
const SOON: Duration = Duration::from_secs(5);
const KUBIA: [&str; 3] = ["kubia-1", "kubia-2", "kubia-3"];
/// Those on node-a.
const KUBIA_LOCAL: [&str; 2] = ["kubia-1", "kubia-2"];

/// What the tour needs at hand.
struct Tour<'a> {
    lab: &'a Lab,
    agent: &'a AgentProcess,
    examples: &'a Examples,
    frontends: Frontends,
}

/// Runs the tour.
pub(crate) fn run(
    lab: &Lab,
    agent: &AgentProcess,
    examples: &Examples,
    show: &mut Show,
) -> Result<()> {
    let frontends = wait_for(|| {
        let frontends = Frontends::ask(agent)?;
        ensure!(
            frontends.count("default/kubia") > 0,
            "kubia has no frontend"
        );
        Ok(frontends)
    })
    .context("the agent programs the examples")?;
    let tour = Tour {
        lab,
        agent,
        examples,
        frontends,
    };
    let _servers = tour.serve()?;
    for part in [
        Tour::cluster_ip,
        Tour::multi_port,
        Tour::dual_stack,
        Tour::node_port,
        Tour::load_balancer,
        Tour::local_policy,
        Tour::affinity,
        Tour::keep_alive,
        Tour::legacy,
        Tour::nothing_to_program,
        Tour::dns,
        Tour::ingress,
        Tour::readiness,
    ] {
        go_on()?;
        part(&tour, show)?;
    }
    Ok(())
}

impl Tour<'_> {
    /// The servers the pods' images stand for.
    fn serve(&self) -> Result<(Vec<Server>, Vec<Process>)> {
        let mut servers = Vec::new();
        let mut processes = Vec::new();
        for pod in self.examples.pods() {
            let ns = self.lab.pod(&pod.name).ns();
            match pod.image.as_str() {
                "dns" => processes.push(server::dns(ns, &pod.name, &self.records())?),
                "nginx" => {
                    let dir = self.lab.dir().join(&pod.name);
                    processes.push(server::ingress(ns, &pod.name, &self.rules()?, &dir)?);
                }
                _ => {
                    for &port in &pod.ports {
                        servers.push(server::http(ns, &pod.name, port)?);
                    }
                }
            }
        }
        servers.push(server::http(self.lab.machine(LEGACY).ns(), LEGACY, 8080)?);
        Ok((servers, processes))
    }

    /// What a cluster's DNS says: each service's name and ClusterIP.
    fn records(&self) -> BTreeMap<String, std::net::IpAddr> {
        ["default/kubia", "default/legacy"]
            .into_iter()
            .filter_map(|service| {
                let addr = self.vip(service, Kind::ClusterIp, "").ok()?;
                let (namespace, name) = service.split_once('/')?;
                Some((format!("{name}.{namespace}.svc.cluster.local"), addr.ip()))
            })
            .collect()
    }

    /// What an Ingress object would say.
    fn rules(&self) -> Result<Vec<Rule>> {
        let rule = |host: &str, path: &str, service| {
            anyhow::Ok(Rule {
                host: host.to_owned(),
                path: path.to_owned(),
                upstream: self.vip(service, Kind::ClusterIp, "")?,
            })
        };
        Ok(vec![
            rule("kubia.example.com", "/", "default/kubia")?,
            rule("kubia.example.com", "/legacy/", "default/legacy")?,
        ])
    }

    fn cluster_ip(&self, show: &mut Show) -> Result<()> {
        let vip = self.vip("default/kubia", Kind::ClusterIp, "")?;
        show.section(
            "kubia",
            "ClusterIP, port 80 -> targetPort 8080; kubia-3 runs on node-b",
        );
        for (caller, ns) in self.pods() {
            show.hits(caller, &url(vip), one_shots(ns, vip), &KUBIA);
        }
        show.hits(
            "kubia-1 itself",
            &url(vip),
            one_shots(self.lab.pod("kubia-1").ns(), vip),
            &KUBIA,
        );
        Ok(())
    }

    fn multi_port(&self, show: &mut Show) -> Result<()> {
        show.section("kubia-ports", "two named ports, targets by name");
        for port in ["http", "https"] {
            let vip = self.vip("default/kubia-ports", Kind::ClusterIp, port)?;
            show.hits(SHELL, &url(vip), one_shots(self.shell(), vip), &KUBIA);
        }
        Ok(())
    }

    fn dual_stack(&self, show: &mut Show) -> Result<()> {
        show.section("kubia-dual", "an address of each family");
        for family in Family::BOTH {
            let service = "default/kubia-dual";
            let vip = self.frontends.one(service, Kind::ClusterIp, family, "")?;
            show.hits(SHELL, &url(vip), one_shots(self.shell(), vip), &KUBIA);
            let vip = self
                .frontends
                .one(service, Kind::LoadBalancer, family, "")?;
            show.hits(
                "outside",
                &url(vip),
                one_shots(self.outside(0), vip),
                &KUBIA,
            );
        }
        Ok(())
    }

    fn node_port(&self, show: &mut Show) -> Result<()> {
        let vip = self.vip("default/kubia-nodeport", Kind::NodePort, "")?;
        show.section("kubia-nodeport", "NodePort 30123");
        show.hits(SHELL, &url(vip), one_shots(self.shell(), vip), &KUBIA);
        show.hits(
            "outside",
            &url(vip),
            one_shots(self.outside(0), vip),
            &KUBIA,
        );
        Ok(())
    }

    fn load_balancer(&self, show: &mut Show) -> Result<()> {
        let vip = self.vip("default/kubia-loadbalancer", Kind::LoadBalancer, "")?;
        show.section(
            "kubia-loadbalancer",
            "LoadBalancer, an address from the pool",
        );
        for (caller, ns) in self.pods() {
            show.hits(caller, &url(vip), one_shots(ns, vip), &KUBIA);
        }
        show.hits(
            "outside",
            &url(vip),
            one_shots(self.outside(0), vip),
            &KUBIA,
        );
        Ok(())
    }

    fn local_policy(&self, show: &mut Show) -> Result<()> {
        let vip = self.vip("default/kubia-local", Kind::NodePort, "")?;
        show.section("kubia-local", "externalTrafficPolicy Local, NodePort 30124");
        show.hits(
            "outside",
            &url(vip),
            one_shots(self.outside(0), vip),
            &KUBIA_LOCAL,
        );
        show.hits(SHELL, &url(vip), one_shots(self.shell(), vip), &KUBIA);
        for n in 0..2 {
            let client = self.lab.client(n);
            let seen = Client::of(client.ns()).curl_ok(&[&format!("{}/whoami", url(vip))]);
            let own = client.addr().v4;
            show.check(
                &format!("the pod sees client-{n}'s own address {own}"),
                seen.and_then(|seen| {
                    ensure!(seen.trim().ends_with(&format!(" {own}")), "it saw {seen:?}");
                    Ok(())
                }),
            );
        }
        Ok(())
    }

    fn affinity(&self, show: &mut Show) -> Result<()> {
        let vip = self.vip("default/kubia-sticky", Kind::ClusterIp, "")?;
        show.section("kubia-sticky", "sessionAffinity ClientIP");
        for (caller, ns) in self.pods() {
            let hits = one_shots(ns, vip);
            let first = hits
                .as_ref()
                .ok()
                .and_then(|hits| hits.keys().next().cloned());
            let first = first.unwrap_or_default();
            let expected = KUBIA.into_iter().find(|pod| *pod == first);
            show.hits(caller, &url(vip), hits, expected.as_slice());
        }
        Ok(())
    }

    fn keep_alive(&self, show: &mut Show) -> Result<()> {
        let vip = self.vip("default/kubia", Kind::ClusterIp, "")?;
        show.section(
            "kubia",
            "keep-alive against one-shot clients: a connection is what is balanced",
        );
        let hits = kept_alive(self.shell(), vip);
        let first = hits
            .as_ref()
            .ok()
            .and_then(|hits| hits.keys().next().cloned());
        let first = first.unwrap_or_default();
        let expected = KUBIA.into_iter().find(|pod| *pod == first);
        show.hits("one connection", &url(vip), hits, expected.as_slice());
        show.hits("one each", &url(vip), one_shots(self.shell(), vip), &KUBIA);
        Ok(())
    }

    fn legacy(&self, show: &mut Show) -> Result<()> {
        let vip = self.vip("default/legacy", Kind::ClusterIp, "")?;
        show.section(
            "legacy",
            "no selector, v1 Endpoints: a machine outside the cluster",
        );
        for (caller, ns) in self.pods() {
            show.hits(caller, &url(vip), one_shots(ns, vip), &[LEGACY]);
        }
        Ok(())
    }

    fn nothing_to_program(&self, show: &mut Show) -> Result<()> {
        show.section(
            "kubia-headless, api",
            "headless and ExternalName: DNS names, nothing to balance",
        );
        let status = self.agent.ask(&["status"])?;
        for service in ["default/kubia-headless", "default/api"] {
            let programmed = self.frontends.count(service);
            let reason = status.lines().find(|line| line.contains(service));
            show.check(
                &format!("{service} programs nothing, and status says why"),
                match (programmed, reason) {
                    (0, Some(_)) => Ok(()),
                    (0, None) => Err(anyhow::anyhow!("status does not mention it")),
                    (n, _) => Err(anyhow::anyhow!("{n} frontends are programmed")),
                },
            );
            if let Some(reason) = reason {
                note(reason.trim());
            }
        }
        Ok(())
    }

    fn dns(&self, show: &mut Show) -> Result<()> {
        show.section(
            "kube-dns",
            "one address, UDP 53 and TCP 53; dnsmasq behind it",
        );
        let kubia = self
            .vip("default/kubia", Kind::ClusterIp, "")?
            .ip()
            .to_string();
        for (caller, ns) in self.pods() {
            for transport in ["+notcp", "+tcp"] {
                let answer = dig(
                    ns,
                    &["@10.96.0.10", transport, "kubia.default.svc.cluster.local"],
                );
                show.check(
                    &format!(
                        "{caller:<16} dig {transport:<7} kubia.default.svc.cluster.local -> {kubia}"
                    ),
                    answer.and_then(|answer| {
                        ensure!(answer == kubia, "it says {answer:?}");
                        Ok(())
                    }),
                );
            }
        }
        Ok(())
    }

    fn ingress(&self, show: &mut Show) -> Result<()> {
        show.section(
            "ingress-nginx",
            "nginx with TLS, host and path rules, in front of ClusterIPs",
        );
        let crt = self
            .lab
            .dir()
            .join("ingress-nginx-1/tls.crt")
            .display()
            .to_string();
        for (what, kind) in [("LB", Kind::LoadBalancer), ("NodePort", Kind::NodePort)] {
            let addr = self.vip("ingress-nginx/ingress-nginx", kind, "https")?;
            for (path, expected) in [("/", KUBIA.as_slice()), ("/legacy/", &[LEGACY])] {
                let address = format!("https://kubia.example.com:{}{path}", addr.port());
                let resolve = format!("kubia.example.com:{}:{}", addr.port(), addr.ip());
                let hits = repeat(
                    self.outside(0),
                    &[
                        "--header",
                        "Connection: close",
                        "--cacert",
                        &crt,
                        "--resolve",
                        &resolve,
                    ],
                    &address,
                );
                show.hits(
                    "outside",
                    &format!("{what} kubia.example.com{path}"),
                    hits,
                    expected,
                );
            }
        }
        Ok(())
    }

    fn readiness(&self, show: &mut Show) -> Result<()> {
        const STEADY: &str = "kubia-steady";
        const TOGGLE: &str = "kubia-toggle";
        let unready = self.examples.text("readiness.yaml")?;
        ensure!(
            unready.matches("\"False\"").count() == 1,
            "readiness.yaml is to hold one pod that is not ready"
        );
        let ready = unready.replace("\"False\"", "\"True\"");
        let vip = self.vip("default/kubia-readiness", Kind::ClusterIp, "")?;
        let shell = self.shell();
        show.section(
            "kubia-readiness",
            "a pod's Ready condition is edited while clients call",
        );
        show.hits("not ready", &url(vip), one_shots(shell, vip), &[STEADY]);
        self.examples.add("readiness.yaml", &ready)?;
        let mut kept =
            wait_for(|| connection_to(shell, vip, TOGGLE)).context("kubia-toggle joins")?;
        show.hits("ready", &url(vip), one_shots(shell, vip), &[STEADY, TOGGLE]);
        self.examples.add("readiness.yaml", &unready)?;
        wait_for(|| {
            let hits = one_shots(shell, vip)?;
            ensure!(!hits.contains_key(TOGGLE), "{TOGGLE} is still hit");
            Ok(())
        })
        .context("kubia-toggle leaves")?;
        show.hits(
            "not ready again",
            &url(vip),
            one_shots(shell, vip),
            &[STEADY],
        );
        show.check(
            "its open connection goes on",
            kept.request("/", false).and_then(|answer| {
                ensure!(pod_of(&answer)? == TOGGLE, "{answer:?}");
                Ok(())
            }),
        );
        Ok(())
    }

    fn vip(&self, service: &str, kind: Kind, port: &str) -> Result<SocketAddr> {
        self.frontends.one(service, kind, Family::V4, port)
    }

    fn shell(&self) -> &Namespace {
        self.lab.pod(SHELL).ns()
    }

    fn outside(&self, n: usize) -> &Namespace {
        self.lab.client(n).ns()
    }

    fn pods(&self) -> [(&'static str, &Namespace); 2] {
        [SHELL, SHELL_BRIDGED].map(|name| (name, self.lab.pod(name).ns()))
    }
}

fn url(addr: SocketAddr) -> String {
    format!("http://{addr}")
}

/// A connection for each call.
fn one_shots(ns: &Namespace, addr: SocketAddr) -> Result<Hits> {
    repeat(
        ns,
        &["--header", "Connection: close"],
        &format!("{}/", url(addr)),
    )
}

/// All calls over one connection.
fn kept_alive(ns: &Namespace, addr: SocketAddr) -> Result<Hits> {
    repeat(ns, &[], &format!("{}/", url(addr)))
}

/// Calls a URL [`CALLS`] times by one curl; who answered how often.
fn repeat(ns: &Namespace, args: &[&str], url: &str) -> Result<Hits> {
    let mut curl = vec!["--globoff", "--connect-timeout", "2"];
    curl.extend(args);
    curl.extend(std::iter::repeat_n(url, CALLS));
    let text = Client::of(ns).curl_ok(&curl)?;
    let mut hits = Hits::new();
    for line in text.lines() {
        let Some(pod) = line.strip_prefix("You've hit ") else {
            bail!("{url} answers {line:?}");
        };
        *hits.entry(pod.to_owned()).or_default() += 1;
    }
    let total: u64 = hits.values().sum();
    ensure!(
        total == CALLS as u64,
        "{total} of {CALLS} calls were answered"
    );
    Ok(hits)
}

/// A connection that happens to lead to `pod`.
fn connection_to(ns: &Namespace, addr: SocketAddr, pod: &str) -> Result<Http> {
    for _ in 0..CALLS {
        let mut http = Client::of(ns).http(addr)?;
        if pod_of(&http.request("/", false)?)? == pod {
            return Ok(http);
        }
    }
    bail!("{pod} is not hit")
}

/// Tries until it works, for a few seconds.
fn wait_for<T>(mut what: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        go_on()?;
        match what() {
            Ok(value) => return Ok(value),
            Err(error) if std::time::Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
