//! The nodes' pods joined by VXLAN, as flannel does it: nothing is learned, nothing is resolved.
//!
//! Each node has one interface whose own addresses are the first ones of its pods' network. A node's pods are routed
//! to that address of their node, whose neighbour entry has its Ethernet address, whose forwarding entry has the
//! node's. The network between the nodes knows no pod.

use anyhow::Result;

use super::addresses::{Dual, DualNet, Family, NODE_A, NODE_B, PODS_A, PODS_B};
use super::netlink::{Mac, Via, Vxlan};
use super::netns::Namespace;
use super::topology::{UPLINK, assign};

/// The nodes' interface.
pub const INTERFACE: &str = "flannel.1";
/// Its MTU: what is left of 1,500 bytes after IPv4, UDP, VXLAN and Ethernet headers.
pub const MTU: u32 = 1450;
/// node-a's addresses on it.
pub const ADDRESS_A: Dual = PODS_A.nth(0);
/// node-b's addresses on it.
pub const ADDRESS_B: Dual = PODS_B.nth(0);

/// flannel's number and port.
const VNI: u32 = 1;
const PORT: u16 = 8472;

/// One node's end.
struct End<'a> {
    node: &'a Namespace,
    below: &'a str,
    /// The node's address outside of the overlay.
    outer: Dual,
    inner: Dual,
    mac: Mac,
    pods: DualNet,
}

/// Joins the two nodes.
pub(super) fn join(node_a: &Namespace, uplink_a: &str, node_b: &Namespace) -> Result<()> {
    let a = End {
        node: node_a,
        below: uplink_a,
        outer: NODE_A,
        inner: ADDRESS_A,
        mac: [0x02, 0, 0, 0xf1, 0, 0x0a],
        pods: PODS_A,
    };
    let b = End {
        node: node_b,
        below: UPLINK,
        outer: NODE_B,
        inner: ADDRESS_B,
        mac: [0x02, 0, 0, 0xf1, 0, 0x0b],
        pods: PODS_B,
    };
    reach(&a, &b)?;
    reach(&b, &a)
}

/// Makes one end, with its way to the other.
fn reach(here: &End<'_>, there: &End<'_>) -> Result<()> {
    let netlink = here.node.netlink();
    let tunnel = Vxlan {
        below: here.below,
        local: here.outer.v4,
        vni: VNI,
        port: PORT,
        mac: here.mac,
        mtu: MTU,
    };
    netlink.vxlan(INTERFACE, tunnel)?;
    assign(netlink, INTERFACE, here.inner, 32, 128)?;
    netlink.forward_to(INTERFACE, there.mac, there.outer.v4.into())?;
    for family in Family::BOTH {
        let gateway = there.inner.of(family);
        netlink.neighbour(INTERFACE, gateway, there.mac)?;
        let pods = there.pods.base.of(family);
        let via = Via::gateway(INTERFACE, gateway);
        netlink.route(pods, there.pods.len(family), via)?;
    }
    Ok(())
}
