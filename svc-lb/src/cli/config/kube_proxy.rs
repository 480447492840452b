//! kube-proxy's own configuration, as far as it has counterparts here.

use super::file::{Entry, File};
use crate::source::located::Located;

pub(super) const KIND: &str = "KubeProxyConfiguration";

/// What becomes of a field.
enum Fate {
    /// This setting.
    Is(&'static str),
    /// A timeout of this state.
    Timeout(&'static str),
    /// An address, with this port where it has none.
    Address(&'static str, u16),
    /// Nothing, because.
    Not(&'static str),
}

use Fate::{Address, Is, Not, Timeout};

const NO_NETFILTER: &str = "there are no netfilter rules";
const FIELDS: &[(&str, Fate)] = &[
    ("apiVersion", Not("")),
    ("kind", Not("")),
    (
        "bindAddress",
        Not("each server has an address of its own here"),
    ),
    (
        "bindAddressHardFail",
        Not("a port that is taken is tried again, and told in status"),
    ),
    ("clientConnection.kubeconfig", Is("kubeconfig")),
    (
        "clusterCIDR",
        Not("pods are told by the interfaces they are behind: --pod-interface"),
    ),
    (
        "configSyncPeriod",
        Not("the API server's watches tell every change"),
    ),
    (
        "conntrack.maxPerCore",
        Not("flows have maps of their own: --map-size"),
    ),
    (
        "conntrack.min",
        Not("flows have maps of their own: --map-size"),
    ),
    ("conntrack.tcpBeLiberal", Not("TCP windows are not checked")),
    ("conntrack.tcpCloseWaitTimeout", Timeout("tcp-closing")),
    (
        "conntrack.tcpEstablishedTimeout",
        Timeout("tcp-established"),
    ),
    ("conntrack.udpStreamTimeout", Timeout("udp-stream")),
    ("conntrack.udpTimeout", Timeout("udp-opening")),
    (
        "detectLocalMode",
        Not("pods are told by the interfaces they are behind: --pod-interface"),
    ),
    (
        "healthzBindAddress",
        Address("healthz-bind-address", 10_256),
    ),
    ("hostnameOverride", Is("node-name")),
    ("iptables.masqueradeAll", Is("masquerade-all")),
    (
        "iptables.localhostNodePorts",
        Not("NodePorts are served at addresses that others can reach"),
    ),
    ("iptables.masqueradeBit", Not(NO_NETFILTER)),
    (
        "iptables.minSyncPeriod",
        Not("every change is programmed at once"),
    ),
    ("iptables.syncPeriod", Is("sync-period")),
    (
        "metricsBindAddress",
        Address("metrics-bind-address", 10_249),
    ),
    ("mode", Not("there is one mode")),
    ("nftables.masqueradeAll", Is("masquerade-all")),
    ("nftables.masqueradeBit", Not(NO_NETFILTER)),
    (
        "nftables.minSyncPeriod",
        Not("every change is programmed at once"),
    ),
    ("nftables.syncPeriod", Is("sync-period")),
    ("nodePortAddresses", Is("nodeport-addresses")),
    ("oomScoreAdj", Not("set it where the agent is started")),
    ("portRange", Not("kube-proxy does not use it either")),
];

/// Reads it; fields that are not set, or to what stands for nothing, are passed over.
pub(super) fn read(root: &Located, place: &dyn Fn(u64) -> String) -> File {
    let mut file = File::default();
    walk(root, "", place, &mut file);
    // Modes have fields of the same meaning: the first one that is set counts.
    let mut seen = Vec::new();
    file.entries.retain(|entry| {
        let again = entry.key != "timeout" && seen.contains(&entry.key);
        seen.push(entry.key.clone());
        !again
    });
    file
}

fn walk(at: &Located, path: &str, place: &dyn Fn(u64) -> String, file: &mut File) {
    for (key, line, value) in at.fields().into_iter().flatten() {
        let path = if path.is_empty() {
            key.to_owned()
        } else {
            format!("{path}.{key}")
        };
        let Some(values) = value.scalars() else {
            walk(value, &path, place, file);
            continue;
        };
        // Absent, or the zero value that stands for the default.
        let unset = |value: &String| matches!(&**value, "" | "0" | "0s" | "false");
        if values.iter().all(unset) {
            continue;
        }
        let fate = FIELDS.iter().find(|(known, _)| *known == path);
        let mut entry = |key: &str, values| {
            file.entries.push(Entry {
                key: key.to_owned(),
                line,
                values,
            });
        };
        let first = values.first().cloned().unwrap_or_default();
        match fate.map(|(_, fate)| fate) {
            Some(Is(key)) => entry(key, values),
            Some(Timeout(state)) => entry("timeout", vec![format!("{state}={first}")]),
            Some(Address(key, port)) => {
                let whole = first.parse::<std::net::SocketAddr>().is_ok();
                let bare = first.parse::<std::net::IpAddr>();
                let text = match bare {
                    Ok(ip) if !whole => std::net::SocketAddr::new(ip, *port).to_string(),
                    _ => first,
                };
                entry(key, vec![text]);
            }
            Some(Not("")) => {}
            Some(Not(why)) => ignored(file, &place(line), &path, why),
            None => ignored(file, &place(line), &path, "it has no counterpart here"),
        }
    }
}

fn ignored(file: &mut File, place: &str, path: &str, why: &str) {
    file.ignored
        .push(format!("{place}: {path}: ignored: {why}"));
}
