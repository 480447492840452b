//! The rule sets that kube-proxy 1.33 makes of ClusterIPs, with one endpoint each: chains, maps and order as in its
//! `pkg/proxy/nftables` and `pkg/proxy/iptables`, without what NodePorts, firewalls and affinity add.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use svc_lb_tests::lab::Lab;
use svc_lb_tests::lab::addresses::SERVICES;
use svc_lb_tests::lab::process::collected;

use super::{PORT, TARGET};

/// Where pods are: what kube-proxy is told as `--cluster-cidr`.
const PODS: &str = "10.244.0.0/16";

/// ClusterIP of the `n`th of the services that are only there.
pub(super) fn other(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(SERVICES.base.v4.to_bits() + 256 + n)
}

/// ClusterIPs and protocols: the one that is used comes last, as the newest does.
fn services(count: u32) -> impl Iterator<Item = (u32, Ipv4Addr, &'static str)> {
    let used = ["tcp", "udp"].map(|protocol| (0, SERVICES.nth(1).v4, protocol));
    (1..count).map(|n| (n, other(n), "tcp")).chain(used)
}

/// kube-proxy's nftables mode.
pub(super) fn nftables(lab: &Lab, count: u32, endpoint: Ipv4Addr) -> Result<()> {
    let mut rules = String::from(
        "table ip kube-proxy {\n\
         chain mark-for-masquerade { meta mark set meta mark or 0x4000; }\n\
         chain masquerading { meta mark & 0x4000 == 0 return; meta mark set meta mark xor 0x4000; masquerade fully-random; }\n\
         chain reject-chain { reject; }\n\
         set cluster-ips { type ipv4_addr; }\n\
         map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
         map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
         map service-nodeports { type inet_proto . inet_service : verdict; }\n",
    );
    for (n, ip, protocol) in services(count) {
        write!(
            rules,
            "chain endpoint-{n}-{protocol} {{ ip saddr {endpoint} jump mark-for-masquerade; meta l4proto {protocol} dnat to {endpoint}:{TARGET}; }}\n\
             chain service-{n}-{protocol} {{ ip daddr {ip} {protocol} dport {PORT} ip saddr != {PODS} jump mark-for-masquerade; numgen random mod 1 vmap {{ 0 : goto endpoint-{n}-{protocol} }}; }}\n"
        )?;
    }
    rules.push_str(
        "chain services { ip daddr . meta l4proto . th dport vmap @service-ips; fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports; }\n\
         chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }\n\
         chain cluster-ips-check { ip daddr @cluster-ips reject; }\n\
         chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }\n\
         chain nat-output { type nat hook output priority -100; jump services; }\n\
         chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }\n\
         chain filter-input { type filter hook input priority -110; ct state new jump service-endpoints-check; }\n\
         chain filter-forward { type filter hook forward priority -110; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }\n\
         chain filter-output { type filter hook output priority -110; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }\n\
         }\n",
    );
    for (n, ip, protocol) in services(count) {
        write!(
            rules,
            "add element ip kube-proxy service-ips {{ {ip} . {protocol} . {PORT} : goto service-{n}-{protocol} }}\n\
             add element ip kube-proxy cluster-ips {{ {ip} }}\n"
        )?;
    }
    load(lab, "nft", &["-f"], "rules.nft", &rules)
}

/// kube-proxy's iptables mode.
pub(super) fn iptables(lab: &Lab, count: u32, endpoint: Ipv4Addr) -> Result<()> {
    let mut chains = String::from(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n",
    );
    let mut rules = String::from(
        "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n",
    );
    for (n, ip, protocol) in services(count) {
        let (service, at) = (
            format!("KUBE-SVC-{n}-{protocol}"),
            format!("KUBE-SEP-{n}-{protocol}"),
        );
        writeln!(chains, ":{service} - [0:0]\n:{at} - [0:0]")?;
        write!(
            rules,
            "-A KUBE-SERVICES -d {ip}/32 -p {protocol} -m comment --comment \"default/other-{n}:{protocol} cluster IP\" -m {protocol} --dport {PORT} -j {service}\n\
             -A {service} ! -s {PODS} -d {ip}/32 -p {protocol} -m {protocol} --dport {PORT} -j KUBE-MARK-MASQ\n\
             -A {service} -m comment --comment \"default/other-{n}:{protocol} -> {endpoint}:{TARGET}\" -j {at}\n\
             -A {at} -s {endpoint}/32 -j KUBE-MARK-MASQ\n\
             -A {at} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}:{TARGET}\n"
        )?;
    }
    rules.push_str(
        "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n\
         *filter\n:KUBE-FORWARD - [0:0]\n\
         -A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n",
    );
    load(
        lab,
        "iptables-restore",
        &[],
        "rules.iptables",
        &(chains + &rules),
    )
}

/// Feeds rules to a program on the node.
fn load(lab: &Lab, program: &str, args: &[&str], name: &str, rules: &str) -> Result<()> {
    let file = lab.dir().join(name);
    std::fs::write(&file, rules).with_context(|| format!("write {}", file.display()))?;
    let mut command = collected(program);
    command.args(args).arg(&file);
    let output = lab
        .node_a()
        .start(command)?
        .output(Duration::from_mins(5))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{program}: {}", text.chars().take(400).collect::<String>());
    }
    Ok(())
}
