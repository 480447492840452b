//! Behind which interface a pod of this node is.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink's enums are open: most of what they can say does not matter here"
)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::read::list;
use super::{Node, NodeError};

/// The interfaces that routes to these addresses name; where that is a bridge, the port behind which it has seen the
/// neighbour. Those that cannot be told are left out.
///
/// # Errors
/// What the kernel says to a dump of neighbours.
pub async fn interfaces(
    handle: &Handle,
    node: &Node,
    addresses: &[IpAddr],
) -> Result<BTreeMap<IpAddr, u32>, NodeError> {
    let mut found = BTreeMap::new();
    let mut bridged = Vec::new();
    for address in addresses {
        let Some(interface) = route(handle, *address).await else {
            continue;
        };
        let link = node.links.get(&interface);
        if link.is_some_and(|link| link.kind.as_deref() == Some("bridge")) {
            bridged.push((*address, interface));
        } else {
            found.insert(*address, interface);
        }
    }
    if bridged.is_empty() {
        return Ok(found);
    }
    let neighbours = neighbours(handle).await?;
    let ports = ports(handle).await?;
    for (address, bridge) in bridged {
        let mac = neighbours.get(&(bridge, address));
        if let Some(port) = mac.and_then(|mac| ports.get(&(bridge, mac.clone()))) {
            found.insert(address, *port);
        }
    }
    Ok(found)
}

/// The interface that packets to an address leave through, if there is a route to another host.
async fn route(handle: &Handle, to: IpAddr) -> Option<u32> {
    let question = match to {
        IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to, 32)
            .build(),
        IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to, 128)
            .build(),
    };
    let mut answers = handle.route().get(question).execute();
    // Unreachable is an error, too.
    let route = answers.try_next().await.ok()??;
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(interface) => Some(*interface),
            _ => None,
        })
}

/// MAC addresses by interface and address.
async fn neighbours(handle: &Handle) -> Result<BTreeMap<(u32, IpAddr), Vec<u8>>, NodeError> {
    let mut found = BTreeMap::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for entry in dump(handle, family).await? {
            let address = entry
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                        Some(IpAddr::V4(*address))
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                        Some(IpAddr::V6(*address))
                    }
                    _ => None,
                });
            if let (Some(address), Some(mac)) = (address, mac(&entry)) {
                found.insert((entry.header.ifindex, address), mac);
            }
        }
    }
    Ok(found)
}

/// Bridges' ports by bridge and the MAC address behind them.
async fn ports(handle: &Handle) -> Result<BTreeMap<(u32, Vec<u8>), u32>, NodeError> {
    let mut found = BTreeMap::new();
    for entry in dump(handle, AddressFamily::Bridge).await? {
        let bridge = entry
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                NeighbourAttribute::Controller(bridge) => Some(*bridge),
                _ => None,
            });
        if let (Some(bridge), Some(mac)) = (bridge, mac(&entry)) {
            found.insert((bridge, mac), entry.header.ifindex);
        }
    }
    Ok(found)
}

fn mac(entry: &NeighbourMessage) -> Option<Vec<u8>> {
    entry
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => Some(mac.clone()),
            _ => None,
        })
}

async fn dump(handle: &Handle, family: AddressFamily) -> Result<Vec<NeighbourMessage>, NodeError> {
    let request = handle.neighbours().get().set_address_family(family);
    request
        .execute()
        .try_collect()
        .await
        .map_err(|source| list("neighbours", source))
}
