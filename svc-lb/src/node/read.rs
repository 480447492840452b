//! Reads the node's facts by netlink dumps.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink's enums are open: most of what they can say does not matter here"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{
    LinkAttribute, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, XdpAttached,
};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{AttachedXdp, Link, LinkLayer, Node, NodeError};

/// Opens a socket for requests; its connection runs as a task of the current runtime.
///
/// Events come over a socket of their own: one that overflows may lose an answer.
pub fn requests() -> Result<Handle, NodeError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NodeError::Socket)?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Reads everything.
pub async fn everything(handle: &Handle) -> Result<Node, NodeError> {
    let (addresses, first_addresses) = addresses(handle).await?;
    Ok(Node {
        links: links(handle).await?,
        addresses,
        first_addresses,
        default_routes: default_routes(handle).await?,
    })
}

pub(super) async fn links(handle: &Handle) -> Result<BTreeMap<u32, Link>, NodeError> {
    handle
        .link()
        .get()
        .execute()
        .try_fold(BTreeMap::new(), |mut links, message| {
            let link = link(message);
            links.insert(link.index, link);
            future::ready(Ok(links))
        })
        .await
        .map_err(|source| list("interfaces", source))
}

/// Addresses that packets should not leave with. (Secondary and IPv6's temporary ones have one bit.)
const UNFIT: AddressHeaderFlags = AddressHeaderFlags::Secondary
    .union(AddressHeaderFlags::Deprecated)
    .union(AddressHeaderFlags::Tentative)
    .union(AddressHeaderFlags::Dadfailed);

/// All addresses, and the first ones of each interface.
pub(super) async fn addresses(
    handle: &Handle,
) -> Result<(BTreeSet<IpAddr>, BTreeMap<u32, Vec<IpAddr>>), NodeError> {
    handle
        .address()
        .get()
        .execute()
        .try_fold((BTreeSet::new(), BTreeMap::new()), |mut found, message| {
            let (all, first): (_, &mut BTreeMap<u32, Vec<IpAddr>>) = (&mut found.0, &mut found.1);
            if let Some(address) = local_address(&message).filter(serves_node_ports) {
                all.insert(address);
                if !message.header.flags.intersects(UNFIT) {
                    first.entry(message.header.index).or_default().push(address);
                }
            }
            future::ready(Ok(found))
        })
        .await
        .map_err(|source| list("addresses", source))
}

pub(super) async fn default_routes(handle: &Handle) -> Result<BTreeSet<u32>, NodeError> {
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let dumps = [
        RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(main)
            .build(),
        RouteMessageBuilder::<Ipv6Addr>::new()
            .table_id(main)
            .build(),
    ];
    let mut interfaces = BTreeSet::new();
    for dump in dumps {
        let mut routes = handle.route().get(dump).execute();
        while let Some(route) = routes
            .try_next()
            .await
            .map_err(|source| list("routes", source))?
        {
            if is_default(&route) {
                interfaces.extend(outputs(&route));
            }
        }
    }
    Ok(interfaces)
}

pub(super) fn list(what: &'static str, source: rtnetlink::Error) -> NodeError {
    NodeError::List {
        what,
        source: Box::new(source),
    }
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        layer: match message.header.link_layer_type {
            LinkLayerType::Ether => LinkLayer::Ethernet,
            LinkLayerType::Loopback => LinkLayer::Loopback,
            _ => LinkLayer::Other,
        },
        mac: [0; 6],
        master: None,
        vlan_of: None,
        xdp: None,
    };
    let mut below = None;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => {
                link.mac = mac.as_slice().try_into().unwrap_or_default();
            }
            LinkAttribute::Controller(master) => link.master = Some(master),
            LinkAttribute::LinkInfo(info) => link.kind = kind(&info),
            LinkAttribute::Link(index) => below = Some(index),
            LinkAttribute::Xdp(xdp) => link.xdp = attached_xdp(&xdp),
            _ => {}
        }
    }
    // A veth has one as well: its other end.
    link.vlan_of = below.filter(|_| link.kind.as_deref() == Some("vlan"));
    link
}

fn kind(info: &[LinkInfo]) -> Option<String> {
    info.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    })
}

fn attached_xdp(xdp: &[LinkXdp]) -> Option<AttachedXdp> {
    let mut native = false;
    let mut program = None;
    for attribute in xdp {
        match attribute {
            LinkXdp::Attached(mode) => native = *mode != XdpAttached::SocketBuffer,
            LinkXdp::ProgId(id) => program = Some(*id),
            _ => {}
        }
    }
    program.map(|program| AttachedXdp { program, native })
}

/// Loopback addresses serve the node alone. IPv6 link-local ones mean nothing without an
/// interface, and every pod interface has its own.
fn serves_node_ports(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    }
}

/// The address that is ours: on point-to-point links `Address` is the peer's.
fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => return Some(*local),
            AddressAttribute::Address(other) => address = Some(*other),
            _ => {}
        }
    }
    address
}

/// Whether a route is a unicast default route of the main table.
pub(super) fn is_default(route: &RouteMessage) -> bool {
    let header = &route.header;
    let ip = matches!(
        header.address_family,
        AddressFamily::Inet | AddressFamily::Inet6
    );
    ip && header.destination_prefix_length == 0
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
}

/// Interfaces that a route leaves through.
fn outputs(route: &RouteMessage) -> Vec<u32> {
    let mut interfaces = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(interface) => interfaces.push(*interface),
            RouteAttribute::MultiPath(hops) => {
                interfaces.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    interfaces
}
