//! Edges: the interfaces a client may be behind.

use crate::layout::record;

record! {
    /// Value of the `edges` hash, keyed by interface index (u32, host order).
    pub struct Edge = 16 {
        /// Bits of [`edge`](self).
        pub bits: u32,
        /// Interface index of the bridge this is a port of; 0 for none. It is the interface the
        /// routes name.
        pub bridge: u32,
        /// The interface's own MAC address.
        pub mac: [u8; 6],
        /// Zero.
        pub reserved: [u8; 2],
    }
}

/// Towards the network: clients behind it are outside the node.
pub const UPLINK: u32 = 1 << 0;
/// Towards a pod.
pub const POD: u32 = 1 << 1;
/// `xdp_ingress` has seen what comes in here ahead of `tc_ingress`: it runs on it, or on the interface that it
/// is a VLAN of, where the tag may have been off already.
pub const XDP: u32 = 1 << 2;
