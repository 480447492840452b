//! Chooses the edges among the node's interfaces. Pure: [`super::attach`] acts on it.

use std::collections::BTreeMap;

use clap::ValueEnum;
use glob::Pattern;
use serde::{Deserialize, Serialize};

use crate::node::{Link, LinkLayer, Node};

/// Virtual interfaces whose other end is usually a pod.
const POD_KINDS: [&str; 2] = ["veth", "netkit"];
/// Tunnels that carry pods' packets from node to node: what a remote backend answers comes in by them.
const TUNNEL_KINDS: [&str; 2] = ["vxlan", "geneve"];
/// Kinds without a driver that runs XDP.
const KINDS_WITHOUT_XDP: [&str; 7] = [
    "bridge", "dummy", "geneve", "ipvlan", "macvlan", "vlan", "vxlan",
];
/// Names that hardware gets; only looked at where the node has no default route.
const HARDWARE_NAMES: [&str; 2] = ["eth", "en"];

/// `--xdp`: whether uplinks run `xdp_ingress` ahead of tc.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// Native where the driver has it, but not on veth; else off.
    #[default]
    Auto,
    /// In the driver, or report an error.
    Native,
    /// After the driver: slower than tc alone, for tests.
    Generic,
    /// tc only.
    Off,
}

/// Which interfaces are edges.
#[derive(Clone, Debug, Default)]
pub struct EdgeSettings {
    /// Names of uplinks. Empty: VXLAN and Geneve tunnels, and the interfaces of the default routes;
    /// where there is none, eth* and en*.
    pub uplinks: Vec<Pattern>,
    /// Names of pod interfaces. Empty: veth and netkit devices that are not uplinks.
    pub pods: Vec<Pattern>,
    /// XDP on uplinks.
    pub xdp: XdpMode,
}

/// What is on the other side of an edge.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The network.
    Uplink,
    /// A pod.
    Pod,
}

/// What to do about XDP on one edge.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct XdpChoice {
    /// Off for pod interfaces. `Auto`: try native, and be content without.
    pub mode: XdpMode,
    /// Why.
    pub reason: &'static str,
}

/// One interface that is to be an edge.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// The interface.
    pub link: Link,
    /// What is behind it.
    pub role: Role,
    /// XDP.
    pub xdp: XdpChoice,
    /// Interface index of the bridge it is a port of.
    pub bridge: Option<u32>,
}

/// An interface that was asked for and cannot be an edge.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// What [`choose`] makes of a node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Choice {
    /// Edges by interface index.
    pub edges: BTreeMap<u32, Wanted>,
    /// Interfaces that were asked for and cannot be edges.
    pub refused: Vec<Refused>,
}

impl Choice {
    /// Whether what comes back to this node by an interface passes our programs: it is an edge, or
    /// a bridge with one as its port.
    #[must_use]
    pub fn turns_answers(&self, ifindex: u32) -> bool {
        let is_port = |edge: &Wanted| edge.bridge == Some(ifindex);
        self.edges.contains_key(&ifindex) || self.edges.values().any(is_port)
    }
}

/// Chooses the edges. The loopback interface never is one.
#[must_use]
pub fn choose(node: &Node, settings: &EdgeSettings) -> Choice {
    let mut choice = Choice::default();
    for link in node.links.values() {
        if link.layer == LinkLayer::Loopback {
            continue;
        }
        let role = if is_uplink(node, link, settings) {
            Role::Uplink
        } else if is_pod(link, settings) {
            Role::Pod
        } else {
            continue;
        };
        if link.layer == LinkLayer::Other {
            choice.refused.push(Refused {
                name: link.name.clone(),
                reason: format!(
                    "{} frames have no Ethernet header; name an Ethernet interface with {}",
                    link.kind.as_deref().unwrap_or("its"),
                    match role {
                        Role::Uplink => "--uplink",
                        Role::Pod => "--pod-interface",
                    }
                ),
            });
            continue;
        }
        let wanted = Wanted {
            role,
            xdp: xdp(node, link, role, settings),
            bridge: node.bridge_of(link).map(|bridge| bridge.index),
            link: link.clone(),
        };
        choice.edges.insert(link.index, wanted);
    }
    choice
}

fn is_uplink(node: &Node, link: &Link, settings: &EdgeSettings) -> bool {
    if !settings.uplinks.is_empty() {
        return matches(&settings.uplinks, &link.name);
    }
    if matches(&settings.pods, &link.name) {
        return false;
    }
    if is_kind(link, &TUNNEL_KINDS) {
        return true;
    }
    if !node.default_routes.is_empty() {
        return node.default_routes.contains(&link.index);
    }
    link.kind.is_none()
        && link.master.is_none()
        && HARDWARE_NAMES
            .iter()
            .any(|prefix| link.name.starts_with(prefix))
}

fn is_pod(link: &Link, settings: &EdgeSettings) -> bool {
    if !settings.pods.is_empty() {
        return matches(&settings.pods, &link.name);
    }
    is_kind(link, &POD_KINDS)
}

fn is_kind(link: &Link, kinds: &[&str]) -> bool {
    link.kind
        .as_deref()
        .is_some_and(|kind| kinds.contains(&kind))
}

fn matches(patterns: &[Pattern], name: &str) -> bool {
    patterns.iter().any(|pattern| pattern.matches(name))
}

fn xdp(node: &Node, link: &Link, role: Role, settings: &EdgeSettings) -> XdpChoice {
    let mode = settings.xdp;
    let foreign_vlan = || {
        let mut vlans = node.links.values();
        vlans.any(|vlan| vlan.vlan_of == Some(link.index) && !is_uplink(node, vlan, settings))
    };
    let choice = |mode, reason| XdpChoice { mode, reason };
    match (role, mode) {
        (Role::Pod, _) => choice(XdpMode::Off, "not an uplink"),
        (Role::Uplink, XdpMode::Auto) if link.kind.as_deref() == Some("veth") => choice(
            XdpMode::Off,
            "native XDP would take a veth's segmentation offload (TSO) away",
        ),
        (Role::Uplink, XdpMode::Auto | XdpMode::Native) if is_kind(link, &KINDS_WITHOUT_XDP) => {
            choice(XdpMode::Off, "interfaces of its kind have no native XDP")
        }
        // A driver that takes tags off would have it see their frames as its own.
        (Role::Uplink, XdpMode::Auto) if foreign_vlan() => choice(
            XdpMode::Off,
            "a VLAN interface above it is no uplink, and drivers hide tags from XDP",
        ),
        (Role::Uplink, XdpMode::Auto) => choice(XdpMode::Auto, "native where the driver has it"),
        (Role::Uplink, XdpMode::Native | XdpMode::Generic | XdpMode::Off) => {
            choice(mode, "asked for with --xdp")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: Option<&str>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            layer: match kind {
                Some("wireguard" | "tun") => LinkLayer::Other,
                Some(_) | None if name == "lo" => LinkLayer::Loopback,
                Some(_) | None => LinkLayer::Ethernet,
            },
            mac: [2, 0, 0, 0, 0, 1],
            master: None,
            vlan_of: None,
            xdp: None,
        }
    }

    fn node(links: Vec<Link>, default_routes: &[u32]) -> Node {
        Node {
            links: links.into_iter().map(|link| (link.index, link)).collect(),
            default_routes: default_routes.iter().copied().collect(),
            ..Node::default()
        }
    }

    fn roles(choice: &Choice) -> Vec<(&str, Role)> {
        choice
            .edges
            .values()
            .map(|edge| (edge.link.name.as_str(), edge.role))
            .collect()
    }

    fn patterns(patterns: &[&str]) -> Vec<Pattern> {
        patterns
            .iter()
            .map(|pattern| Pattern::new(pattern).unwrap())
            .collect()
    }

    #[test]
    fn by_default_the_default_route_names_the_uplink_and_other_veths_are_pods() {
        let node = node(
            vec![
                link(1, "lo", None),
                link(2, "ens5", None),
                link(3, "ens6", None),
                link(4, "cali0", Some("veth")),
                link(5, "eth0", Some("veth")),
                link(6, "cni0", Some("bridge")),
            ],
            &[2, 5],
        );
        let choice = choose(&node, &EdgeSettings::default());
        assert_eq!(
            roles(&choice),
            [
                ("ens5", Role::Uplink),
                ("cali0", Role::Pod),
                ("eth0", Role::Uplink)
            ]
        );
        assert!(choice.refused.is_empty());
    }

    #[test]
    fn tunnels_between_nodes_are_uplinks() {
        let node = node(
            vec![
                link(2, "ens5", None),
                link(3, "flannel.1", Some("vxlan")),
                link(4, "eth0.7", Some("vlan")),
            ],
            &[2],
        );
        let choice = choose(&node, &EdgeSettings::default());
        assert_eq!(
            roles(&choice),
            [("ens5", Role::Uplink), ("flannel.1", Role::Uplink)]
        );
        let named = EdgeSettings {
            uplinks: patterns(&["ens5"]),
            ..EdgeSettings::default()
        };
        assert_eq!(roles(&choose(&node, &named)), [("ens5", Role::Uplink)]);
    }

    #[test]
    fn without_a_default_route_hardware_names_are_uplinks() {
        let mut slave = link(4, "eth1", None);
        slave.master = Some(9);
        let node = node(
            vec![
                link(2, "ens5", None),
                link(3, "eth0", Some("veth")),
                slave,
                link(5, "wlan0", None),
            ],
            &[],
        );
        let choice = choose(&node, &EdgeSettings::default());
        assert_eq!(
            roles(&choice),
            [("ens5", Role::Uplink), ("eth0", Role::Pod)]
        );
    }

    #[test]
    fn patterns_replace_the_defaults() {
        let node = node(
            vec![
                link(1, "lo", None),
                link(2, "up0", Some("veth")),
                link(3, "pod1", Some("veth")),
                link(4, "veth9", Some("veth")),
                link(5, "eth0", None),
            ],
            &[5],
        );
        let settings = EdgeSettings {
            uplinks: patterns(&["up*", "lo"]),
            pods: patterns(&["pod*", "up*"]),
            xdp: XdpMode::Auto,
        };
        let choice = choose(&node, &settings);
        assert_eq!(roles(&choice), [("up0", Role::Uplink), ("pod1", Role::Pod)]);
    }

    #[test]
    fn interfaces_without_ethernet_header_are_refused_by_name() {
        let node = node(vec![link(2, "wg0", Some("wireguard"))], &[2]);
        let choice = choose(&node, &EdgeSettings::default());
        assert!(choice.edges.is_empty());
        let [refused] = choice.refused.as_slice() else {
            panic!("{choice:?}")
        };
        assert_eq!(refused.name, "wg0");
        assert!(
            refused
                .reason
                .contains("wireguard frames have no Ethernet header"),
            "{refused:?}"
        );
    }

    #[test]
    fn auto_xdp_spares_veths_and_pods() {
        let mode = |kind, role, xdp_mode| {
            let settings = EdgeSettings {
                xdp: xdp_mode,
                ..EdgeSettings::default()
            };
            xdp(&Node::default(), &link(2, "x", kind), role, &settings).mode
        };
        assert_eq!(mode(None, Role::Uplink, XdpMode::Auto), XdpMode::Auto);
        assert_eq!(
            mode(Some("veth"), Role::Uplink, XdpMode::Auto),
            XdpMode::Off
        );
        assert_eq!(
            mode(Some("veth"), Role::Uplink, XdpMode::Native),
            XdpMode::Native
        );
        for kind in KINDS_WITHOUT_XDP.map(Some) {
            assert_eq!(mode(kind, Role::Uplink, XdpMode::Native), XdpMode::Off);
            assert_eq!(mode(kind, Role::Uplink, XdpMode::Generic), XdpMode::Generic);
        }
        assert_eq!(mode(None, Role::Pod, XdpMode::Native), XdpMode::Off);
        assert_eq!(mode(None, Role::Uplink, XdpMode::Off), XdpMode::Off);
    }

    #[test]
    fn auto_xdp_sees_no_frames_of_foreign_vlans() {
        let mut vlan = link(3, "ens5.7", Some("vlan"));
        vlan.vlan_of = Some(2);
        let node = node(vec![link(2, "ens5", None), vlan], &[2]);
        let mode = |uplinks: &[&str]| {
            let settings = EdgeSettings {
                uplinks: patterns(uplinks),
                ..EdgeSettings::default()
            };
            choose(&node, &settings).edges[&2].xdp.mode
        };
        assert_eq!(mode(&[]), XdpMode::Off);
        assert_eq!(mode(&["ens5*"]), XdpMode::Auto);
    }

    #[test]
    fn ports_of_a_bridge_know_it() {
        let mut port = link(2, "veth1", Some("veth"));
        port.master = Some(9);
        let mut slave = link(3, "veth2", Some("veth"));
        slave.master = Some(10);
        let node = node(
            vec![
                port,
                slave,
                link(9, "cni0", Some("bridge")),
                link(10, "bond0", Some("bond")),
            ],
            &[],
        );
        let bridges: Vec<Option<u32>> = choose(&node, &EdgeSettings::default())
            .edges
            .values()
            .map(|e| e.bridge)
            .collect();
        assert_eq!(bridges, [Some(9), None]);
        let turns = |ifindex| choose(&node, &EdgeSettings::default()).turns_answers(ifindex);
        assert_eq!([2, 3, 9, 10].map(turns), [true, true, true, false]);
    }
}
