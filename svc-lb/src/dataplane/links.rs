//! The `links` map: every interface that a packet may leave through, and the source it then gets.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use aya::maps::{HashMap, Map, MapData, MapError};
use svc_lb_common::limits::name;
use svc_lb_common::link::{self, Link};
use thiserror::Error;

use super::pins::Pins;
use crate::node::{LinkLayer, Node, Sources};

/// Why the map is not what it should be.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LinksError {
    #[error("open the pinned map {}", name::LINKS)]
    Open(#[source] MapError),
    #[error("write interface {ifindex} to the map {}", name::LINKS)]
    Write { ifindex: u32, source: MapError },
}

/// The map and what it holds.
#[derive(Debug)]
pub struct Links {
    map: HashMap<MapData, u32, Link>,
    written: BTreeMap<u32, Link>,
}

/// What the map should hold. `turns_answers` says of which interfaces answers to this node meet our
/// programs, as those to a translated source must; `has_xdp` on which our XDP program runs.
#[must_use]
pub fn wanted(
    node: &Node,
    turns_answers: impl Fn(u32) -> bool,
    has_xdp: impl Fn(u32) -> bool,
) -> BTreeMap<u32, Link> {
    node.links
        .values()
        .filter(|link| link.layer != LinkLayer::Loopback)
        .map(|link| {
            let sources = if turns_answers(link.index) {
                node.source_on(link.index)
            } else {
                Sources::default()
            };
            let link_record = Link {
                v4: sources.v4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
                v6: sources.v6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
                bits: if has_xdp(link.index) { link::XDP } else { 0 },
                reserved: 0,
            };
            (link.index, link_record)
        })
        .collect()
}

impl Links {
    /// Takes over what an earlier agent left.
    pub fn open(pins: &Pins) -> Result<Self, LinksError> {
        let map = MapData::from_pin(pins.map(name::LINKS)).map_err(LinksError::Open)?;
        let map: HashMap<_, u32, Link> = Map::HashMap(map).try_into().map_err(LinksError::Open)?;
        let written = map
            .iter()
            .collect::<Result<_, _>>()
            .map_err(LinksError::Open)?;
        Ok(Self { map, written })
    }

    /// Makes the map hold what is wanted; the first failure ends it, and it can be repeated.
    pub fn apply(&mut self, wanted: &BTreeMap<u32, Link>) -> Result<(), LinksError> {
        let failed = |ifindex| move |source| LinksError::Write { ifindex, source };
        for (ifindex, link) in wanted {
            if self.written.get(ifindex) == Some(link) {
                continue;
            }
            self.map
                .insert(ifindex, link, 0)
                .map_err(failed(*ifindex))?;
            self.written.insert(*ifindex, *link);
        }
        let gone: Vec<u32> = self
            .written
            .keys()
            .copied()
            .filter(|ifindex| !wanted.contains_key(ifindex))
            .collect();
        for ifindex in gone {
            match self.map.remove(&ifindex) {
                Ok(()) | Err(MapError::KeyNotFound) => self.written.remove(&ifindex),
                Err(source) => return Err(LinksError::Write { ifindex, source }),
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use svc_lb_common::Addr4;

    use super::*;
    use crate::node::Link as NodeLink;

    fn node_link(index: u32, layer: LinkLayer) -> (u32, NodeLink) {
        let link = NodeLink {
            index,
            name: format!("if{index}"),
            kind: None,
            layer,
            mac: [0; 6],
            master: None,
            vlan_of: None,
            xdp: None,
        };
        (index, link)
    }

    #[test]
    fn edges_without_an_address_have_the_uplinks_and_others_have_none() {
        let own = |last| vec![Ipv4Addr::new(192, 0, 2, last).into()];
        let node = Node {
            links: [
                node_link(1, LinkLayer::Loopback),
                node_link(2, LinkLayer::Ethernet),
                node_link(3, LinkLayer::Ethernet),
                node_link(4, LinkLayer::Other),
            ]
            .into(),
            first_addresses: [(2, own(2)), (4, own(4))].into(),
            default_routes: [4].into(),
            ..Node::default()
        };
        let links = wanted(&node, |index| index != 4, |index| index == 2);
        let seen: Vec<_> = links
            .iter()
            .map(|(index, link)| (*index, link.v4, link.bits))
            .collect();
        let address = |last| Addr4::from(Ipv4Addr::new(192, 0, 2, last));
        assert_eq!(
            seen,
            [
                (2, address(2), link::XDP),
                (3, address(4), 0),
                (4, Addr4::from(Ipv4Addr::UNSPECIFIED), 0)
            ]
        );
    }
}
