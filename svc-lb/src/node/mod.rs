//! Facts about this node from netlink: interfaces, addresses, default routes.

pub mod health;
pub mod ports;
mod read;
pub mod snat_ports;
mod watch;
pub mod whereabouts;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;
use thiserror::Error;

pub use read::{everything as read, requests};
pub use watch::{Watcher, watch};

/// Why the node's facts cannot be had.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum NodeError {
    #[error("open a netlink socket")]
    Socket(#[source] io::Error),
    #[error("list the node's {what} over netlink")]
    List {
        what: &'static str,
        source: Box<rtnetlink::Error>,
    },
}

/// Link-layer header of an interface's frames.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkLayer {
    /// Ethernet.
    Ethernet,
    /// The loopback interface.
    Loopback,
    /// None or another one: wireguard, tun, ipip and the like.
    Other,
}

/// One interface.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// The kernel's name of a virtual kind: veth, bridge, wireguard; none for hardware.
    pub kind: Option<String>,
    /// What its frames begin with.
    pub layer: LinkLayer,
    /// Its own MAC address; zero where it has none.
    pub mac: [u8; 6],
    /// Interface index of its master: the bridge it is a port of, the bond it is part of.
    pub master: Option<u32>,
    /// Interface index of the one that it is a VLAN of.
    pub vlan_of: Option<u32>,
    /// The XDP program on it.
    pub xdp: Option<AttachedXdp>,
}

/// An XDP program on an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct AttachedXdp {
    /// The kernel's id of the program.
    pub program: u32,
    /// In the driver, or in its hardware; otherwise generic.
    pub native: bool,
}

/// The node at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Node {
    /// Interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// Local addresses but loopback and IPv6 link-local ones: where NodePorts can be served.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of each interface that packets can leave with, in the kernel's order: not secondary,
    /// deprecated or still being checked.
    pub first_addresses: BTreeMap<u32, Vec<IpAddr>>,
    /// Interfaces that a default route of the main table leaves through.
    pub default_routes: BTreeSet<u32>,
}

/// An address of each family.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Sources {
    /// IPv4's.
    pub v4: Option<Ipv4Addr>,
    /// IPv6's.
    pub v6: Option<Ipv6Addr>,
}

impl Node {
    /// The source of packets that leave through an interface: its own first address, or, where it
    /// has none, as pods' interfaces, that of an interface with a default route, or of any.
    #[must_use]
    pub fn source_on(&self, link: u32) -> Sources {
        let uplinks = self
            .default_routes
            .iter()
            .filter_map(|link| self.first_addresses.get(link));
        let addresses = self.first_addresses.get(&link).into_iter().chain(uplinks);
        let mut sources = Sources::default();
        for address in addresses.chain(self.first_addresses.values()).flatten() {
            match address {
                IpAddr::V4(address) => sources.v4 = sources.v4.or(Some(*address)),
                IpAddr::V6(address) => sources.v6 = sources.v6.or(Some(*address)),
            }
        }
        sources
    }

    /// What the node is known by unless its Node object says otherwise: of each family the first
    /// address of the first interface with a default route that has one.
    #[must_use]
    pub fn primary_addresses(&self) -> BTreeSet<IpAddr> {
        let first = |v4: bool| {
            let links = self.default_routes.iter();
            let mut addresses = links
                .filter_map(|link| self.first_addresses.get(link))
                .flatten();
            addresses.find(|address| address.is_ipv4() == v4).copied()
        };
        first(true).into_iter().chain(first(false)).collect()
    }

    /// The bridge that a link is a port of.
    #[must_use]
    pub fn bridge_of(&self, link: &Link) -> Option<&Link> {
        let master = self.links.get(&link.master?)?;
        (master.kind.as_deref() == Some("bridge")).then_some(master)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_routes_interface_has_the_primary_addresses() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut node = Node {
            first_addresses: BTreeMap::from([
                (2, vec![ip("10.0.0.9")]),
                (3, vec![ip("192.0.2.1"), ip("192.0.2.2")]),
                (4, vec![ip("198.51.100.1"), ip("2001:db8::1")]),
            ]),
            ..Node::default()
        };
        assert_eq!(node.primary_addresses(), BTreeSet::new());
        node.default_routes = BTreeSet::from([3, 4]);
        let expected = BTreeSet::from([ip("192.0.2.1"), ip("2001:db8::1")]);
        assert_eq!(node.primary_addresses(), expected);
    }
}
