//! Settings of the node that decide whether translated packets arrive.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use serde::Deserialize;
use tracing::debug;

use super::Node;
use crate::observe::finding::{Finding, Level};

/// Looks at forwarding, reverse path filters, ICMP redirects and netfilter, for these edges.
#[must_use]
pub fn findings(node: &Node, edges: &[&str]) -> Vec<Finding> {
    let mut findings = vec![forwarding4()];
    findings.extend(forwarding6(node));
    findings.extend(reverse_path(edges));
    findings.extend(redirects(edges));
    findings.extend(netfilter());
    findings
}

fn sysctl(name: &str) -> Option<i64> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The same of one interface. Its name may hold dots.
fn interface_sysctl(interface: &str, name: &str) -> Option<i64> {
    let path = format!("/proc/sys/net/ipv4/conf/{interface}/{name}");
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn forwarding4() -> Finding {
    const NAME: &str = "net.ipv4.ip_forward";
    match sysctl(NAME) {
        Some(0) => Finding::new(
            Level::Unusable,
            NAME,
            "0",
            "no packet gets from a pod to another network, or from outside to a pod",
        )
        .fix("sysctl -w net.ipv4.ip_forward=1"),
        value => Finding::ok(NAME, show(value)),
    }
}

fn forwarding6(node: &Node) -> Option<Finding> {
    const NAME: &str = "net.ipv6.conf.all.forwarding";
    let routed = node.addresses.iter().any(IpAddr::is_ipv6);
    match sysctl(NAME) {
        // No IPv6 in the kernel.
        None => None,
        Some(0) if routed => Some(
            Finding::new(
                Level::Degraded,
                NAME,
                "0",
                "no IPv6 packet gets from a pod to another network, or from outside to a pod",
            )
            .fix("sysctl -w net.ipv6.conf.all.forwarding=1"),
        ),
        Some(0) => Some(Finding::new(
            Level::Note,
            NAME,
            "0",
            "no IPv6 packet is forwarded; the node has no IPv6 address but link-local ones",
        )),
        value => Some(Finding::ok(NAME, show(value))),
    }
}

/// The larger of `all` and the interface's own counts.
fn reverse_path(edges: &[&str]) -> Vec<Finding> {
    const STRICT: i64 = 1;
    let all = interface_sysctl("all", "rp_filter").unwrap_or(0);
    let strict: Vec<&str> = edges
        .iter()
        .copied()
        .filter(|edge| interface_sysctl(edge, "rp_filter").unwrap_or(0).max(all) == STRICT)
        .collect();
    if strict.is_empty() {
        return vec![Finding::ok("rp_filter", "not strict on any edge")];
    }
    vec![
        Finding::new(
            Level::Note,
            "rp_filter",
            format!("strict (1) on {}", strict.join(", ")),
            "services work with it; but where a client's packets come in by one interface and the \
         route back to it leaves by another, the kernel drops them",
        )
        .fix("only for asymmetric routing: sysctl -w net.ipv4.conf.all.rp_filter=2"),
    ]
}

/// Either of `all` and the interface's own suffices.
fn redirects(edges: &[&str]) -> Vec<Finding> {
    let all = interface_sysctl("all", "send_redirects").unwrap_or(0) != 0;
    let sending: Vec<&str> = edges
        .iter()
        .copied()
        .filter(|edge| all || interface_sysctl(edge, "send_redirects").unwrap_or(0) != 0)
        .collect();
    if sending.is_empty() {
        return vec![Finding::ok("send_redirects", "off on all edges")];
    }
    vec![Finding::new(
        Level::Note,
        "send_redirects",
        format!("on for {}", sending.join(", ")),
        "a packet that leaves by the interface it came in by may be answered with an ICMP \
         redirect, past the service; pods on one bridge are served at layer 2 and see none",
    )
    .fix("where redirects are seen: sysctl -w net.ipv4.conf.all.send_redirects=0, and on the interface")]
}

fn show(value: Option<i64>) -> String {
    value.map_or_else(|| "unknown".to_owned(), |value| value.to_string())
}

/// A base chain that drops what no rule accepts, and what it belongs to.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Dropping(String);

/// What netfilter has to say about forwarded packets.
#[derive(Debug, Default, Eq, PartialEq)]
struct Netfilter {
    dropping: BTreeSet<Dropping>,
    kube_proxy: bool,
}

fn netfilter() -> Vec<Finding> {
    const POLICY: &str = "FORWARD policy";
    let mut seen = Netfilter::default();
    let mut asked = Vec::new();
    if let Some(text) = output("nft", &["-j", "list", "chains"]) {
        asked.push("nft");
        seen.read_nft(&text);
    }
    for tool in ["iptables-legacy", "ip6tables-legacy"] {
        if let Some(text) = output(tool, &["-S"]) {
            asked.push(tool);
            seen.read_iptables(tool, &text);
        }
    }
    if asked.is_empty() {
        for tool in ["iptables", "ip6tables"] {
            if let Some(text) = output(tool, &["-S"]) {
                asked.push(tool);
                seen.read_iptables(tool, &text);
            }
        }
    }
    if asked.is_empty() {
        return vec![Finding::new(
            Level::Note,
            POLICY,
            "unknown",
            "neither nft nor iptables is installed here",
        )];
    }
    let mut findings = Vec::new();
    if seen.dropping.is_empty() {
        findings.push(Finding::ok(
            POLICY,
            format!("accept (asked {})", asked.join(", ")),
        ));
    } else {
        let chains: Vec<&str> = seen
            .dropping
            .iter()
            .map(|Dropping(chain)| chain.as_str())
            .collect();
        findings.push(
            Finding::new(
                Level::Degraded,
                POLICY,
                format!("drop in {}", chains.join(", ")),
                "forwarded packets, services' among them, need a rule there that accepts them; \
                 they carry the addresses of client and backend, both ways",
            )
            .fix("accept traffic from and to the pods' addresses, for example: iptables -I FORWARD -s POD_CIDR -j ACCEPT; iptables -I FORWARD -d POD_CIDR -j ACCEPT"),
        );
    }
    if seen.kube_proxy {
        findings.push(
            Finding::new(
                Level::Note,
                "kube-proxy",
                "its netfilter rules are there",
                "packets that svc-lb translates never match them; others still do",
            )
            .fix("stop kube-proxy, then: kube-proxy --cleanup"),
        );
    }
    findings
}

#[derive(Deserialize)]
struct NftList {
    nftables: Vec<NftObject>,
}

#[derive(Deserialize)]
struct NftObject {
    chain: Option<NftChain>,
}

#[derive(Deserialize)]
struct NftChain {
    family: String,
    table: String,
    name: String,
    hook: Option<String>,
    policy: Option<String>,
}

impl Netfilter {
    fn read_nft(&mut self, text: &str) {
        let list: NftList = match serde_json::from_str(text) {
            Ok(list) => list,
            Err(error) => {
                debug!(%error, "nft's list of chains is not understood");
                return;
            }
        };
        for chain in list.nftables.into_iter().filter_map(|object| object.chain) {
            let NftChain {
                family,
                table,
                name,
                hook,
                policy,
            } = chain;
            self.kube_proxy |= table == "kube-proxy" || name == "KUBE-SERVICES";
            if hook.as_deref() == Some("forward") && policy.as_deref() == Some("drop") {
                self.dropping
                    .insert(Dropping(format!("{family} {table} {name}")));
            }
        }
    }

    fn read_iptables(&mut self, tool: &str, text: &str) {
        for line in text.lines() {
            self.kube_proxy |= line == "-N KUBE-SERVICES";
            if line == "-P FORWARD DROP" {
                self.dropping
                    .insert(Dropping(format!("{tool} filter FORWARD")));
            }
        }
    }
}

/// What a tool prints; `None` if it is not there or fails.
fn output(tool: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(tool).args(args).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => {
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Ok(output) => {
            debug!(tool, status = %output.status, stderr = %String::from_utf8_lossy(&output.stderr), "tool failed");
            None
        }
        Err(error) => {
            debug!(tool, %error, "tool not started");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nft_chains_that_drop_forwarded_packets_are_found() {
        let mut seen = Netfilter::default();
        seen.read_nft(
            r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
                {"chain": {"family": "ip", "table": "filter", "name": "INPUT", "handle": 1,
                           "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}},
                {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 2,
                           "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
                {"chain": {"family": "inet", "table": "fw", "name": "fwd", "handle": 2,
                           "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}},
                {"chain": {"family": "ip", "table": "nat", "name": "KUBE-SERVICES", "handle": 3}}]}"#,
        );
        let expected = Netfilter {
            dropping: BTreeSet::from([Dropping("ip filter FORWARD".to_owned())]),
            kube_proxy: true,
        };
        assert_eq!(seen, expected);
    }

    #[test]
    fn iptables_policies_are_found() {
        let mut seen = Netfilter::default();
        seen.read_iptables(
            "iptables-legacy",
            "-P INPUT DROP\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n",
        );
        assert_eq!(seen, Netfilter::default());
        seen.read_iptables("iptables-legacy", "-P INPUT ACCEPT\n-P FORWARD DROP\n");
        assert_eq!(seen.dropping.len(), 1);
        assert!(!seen.kube_proxy);
    }
}
