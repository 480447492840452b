//! Links, addresses, routes of one namespace over netlink.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth, LinkMessage, VlanProtocol};
use rtnetlink::packet_route::neighbour::NeighbourFlags;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVlan, LinkVxlan,
    RouteMessageBuilder,
};

/// A netlink socket of one namespace; its methods block the calling thread, which need not be inside.
#[derive(Debug)]
pub struct Netlink {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

/// Ethernet address.
pub type Mac = [u8; 6];

/// Where a route leads.
#[derive(Debug, Clone, Copy)]
pub struct Via<'a> {
    /// The interface.
    pub interface: &'a str,
    /// The next hop, none for what is on the link.
    pub gateway: Option<IpAddr>,
    /// The address the namespace uses as its own on this route.
    pub source: Option<IpAddr>,
}

impl<'a> Via<'a> {
    /// Straight out of an interface.
    #[must_use]
    pub const fn link(interface: &'a str) -> Self {
        Self {
            interface,
            gateway: None,
            source: None,
        }
    }

    /// To a gateway behind an interface; it need not be on a connected network.
    #[must_use]
    pub const fn gateway(interface: &'a str, gateway: IpAddr) -> Self {
        Self {
            interface,
            gateway: Some(gateway),
            source: None,
        }
    }
}

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// Interface name.
    pub name: &'a str,
    /// Ethernet address, random if none.
    pub mac: Option<Mac>,
}

/// A VXLAN interface.
#[derive(Debug, Clone, Copy)]
pub struct Vxlan<'a> {
    /// The interface its packets leave through.
    pub below: &'a str,
    /// Their source.
    pub local: Ipv4Addr,
    /// The network's number.
    pub vni: u32,
    /// UDP port of both ends.
    pub port: u16,
    /// Its own Ethernet address.
    pub mac: Mac,
    /// Its MTU, bytes from the inner network header on.
    pub mtu: u32,
}

impl Netlink {
    /// A socket in the calling thread's namespace.
    pub fn open() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("build a runtime")?;
        let handle = {
            let _in_runtime = runtime.enter();
            let (connection, handle, _) =
                rtnetlink::new_connection().context("open a netlink socket")?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime, handle })
    }

    /// A veth pair, both ends down, the second one in the namespace `peer_in` from birth.
    pub fn veth(&self, near: End<'_>, far: End<'_>, peer_in: BorrowedFd<'_>) -> Result<()> {
        let mut peer = LinkUnspec::new_with_name(far.name).setns_by_fd(peer_in.as_raw_fd());
        if let Some(mac) = far.mac {
            peer = peer.address(mac.to_vec());
        }
        let mut link = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(near.name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
        if let Some(mac) = near.mac {
            link = link.address(mac.to_vec());
        }
        self.runtime
            .block_on(self.handle.link().add(link.build()).execute())
            .with_context(|| format!("make veth {} - {}", near.name, far.name))
    }

    /// A bridge, up.
    pub fn bridge(&self, name: &str) -> Result<()> {
        // No group membership reports and no delay: the lab has no loops.
        let link = LinkBridge::new(name)
            .forward_delay(0)
            .mcast_snooping(false)
            .up()
            .build();
        self.runtime
            .block_on(self.handle.link().add(link).execute())
            .with_context(|| format!("make bridge {name}"))
    }

    /// A VLAN interface above another one, up; the tag is 802.1ad's if `service` says so, else 802.1Q's.
    pub fn vlan(&self, name: &str, below: &str, id: u16, service: bool) -> Result<()> {
        let protocol = if service {
            VlanProtocol::Ieee8021Ad
        } else {
            VlanProtocol::Ieee8021Q
        };
        let link = LinkVlan::new(name, self.index(below)?, id)
            .protocol(protocol)
            .up()
            .build();
        self.runtime
            .block_on(self.handle.link().add(link).execute())
            .with_context(|| format!("make VLAN {id} above {below}"))
    }

    /// A VXLAN interface that learns nothing, up.
    pub fn vxlan(&self, name: &str, tunnel: Vxlan<'_>) -> Result<()> {
        let Vxlan {
            below,
            local,
            vni,
            port,
            mac,
            mtu,
        } = tunnel;
        let link = LinkVxlan::new(name, vni)
            .dev(self.index(below)?)
            .local(local)
            .port(port)
            .learning(false)
            .address(mac.to_vec())
            .mtu(mtu)
            .up()
            .build();
        self.runtime
            .block_on(self.handle.link().add(link).execute())
            .with_context(|| format!("make VXLAN {vni} on {below}"))
    }

    /// Says behind which machine a VXLAN interface finds an Ethernet address.
    pub fn forward_to(&self, interface: &str, mac: Mac, machine: IpAddr) -> Result<()> {
        let index = self.index(interface)?;
        let request = self
            .handle
            .neighbours()
            .add_bridge(index, &mac)
            .flags(NeighbourFlags::Own)
            .destination(machine);
        self.runtime
            .block_on(request.execute())
            .with_context(|| format!("forward to {machine} on {interface}"))
    }

    /// Takes a port off its bridge.
    pub fn free(&self, port: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(self.index(port)?)
            .nocontroller()
            .build();
        self.set(port, message)
    }

    /// Makes `port` a port of `bridge` and takes it up.
    pub fn bridge_port(&self, bridge: &str, port: &str) -> Result<()> {
        let master = self.index(bridge)?;
        let message = LinkUnspec::new_with_index(self.index(port)?)
            .controller(master)
            .up()
            .build();
        self.set(port, message)
    }

    /// Takes an interface up.
    pub fn up(&self, name: &str) -> Result<()> {
        self.set(
            name,
            LinkUnspec::new_with_index(self.index(name)?).up().build(),
        )
    }

    /// Sets an interface's MTU, bytes from the network header on.
    pub fn mtu(&self, name: &str, mtu: u32) -> Result<()> {
        let index = self.index(name)?;
        self.set(name, LinkUnspec::new_with_index(index).mtu(mtu).build())
    }

    /// Sets an interface's MAC address.
    pub fn mac(&self, name: &str, mac: Mac) -> Result<()> {
        let index = self.index(name)?;
        let message = LinkUnspec::new_with_index(index).address(mac.to_vec());
        self.set(name, message.build())
    }

    /// Removes an interface, for a veth both ends.
    pub fn remove(&self, name: &str) -> Result<()> {
        let index = self.index(name)?;
        self.runtime
            .block_on(self.handle.link().del(index).execute())
            .with_context(|| format!("remove {name}"))
    }

    /// Adds an address; IPv6 ones are usable at once only where `accept_dad` is 0.
    pub fn address(&self, name: &str, address: IpAddr, prefix_len: u8) -> Result<()> {
        let index = self.index(name)?;
        self.runtime
            .block_on(
                self.handle
                    .address()
                    .add(index, address, prefix_len)
                    .execute(),
            )
            .with_context(|| format!("add {address}/{prefix_len} to {name}"))
    }

    /// Adds or replaces a route.
    pub fn route(&self, to: IpAddr, prefix_len: u8, via: Via<'_>) -> Result<()> {
        let what = || format!("route {to}/{prefix_len} via {via:?}");
        let mut route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(to, prefix_len)
            .with_context(what)?
            .output_interface(self.index(via.interface)?);
        if let Some(gateway) = via.gateway {
            route = route.gateway(gateway).with_context(what)?.onlink();
        }
        if let Some(source) = via.source {
            route = route.pref_source(source).with_context(what)?;
        }
        self.runtime
            .block_on(self.handle.route().add(route.build()).replace().execute())
            .with_context(what)
    }

    /// Adds a neighbour that stays.
    pub fn neighbour(&self, interface: &str, address: IpAddr, mac: Mac) -> Result<()> {
        let index = self.index(interface)?;
        let request = self
            .handle
            .neighbours()
            .add(index, address)
            .link_layer_address(&mac);
        self.runtime
            .block_on(request.execute())
            .with_context(|| format!("add neighbour {address} to {interface}"))
    }

    /// An interface's index.
    pub fn index(&self, name: &str) -> Result<u32> {
        Ok(self.link(name)?.header.index)
    }

    fn link(&self, name: &str) -> Result<LinkMessage> {
        let links = self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute();
        self.runtime
            .block_on(async { std::pin::pin!(links).try_next().await })
            .with_context(|| format!("look up {name}"))?
            .with_context(|| format!("no interface {name}"))
    }

    fn set(&self, name: &str, message: LinkMessage) -> Result<()> {
        self.runtime
            .block_on(self.handle.link().set(message).execute())
            .with_context(|| format!("change {name}"))
    }
}
