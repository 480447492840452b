//! The lab's address plan.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, for loops.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// One address of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dual {
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Dual {
    /// Both addresses of something.
    #[must_use]
    pub const fn new(v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        Self { v4, v6 }
    }

    /// The address of one family.
    #[must_use]
    pub const fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }

    /// Both addresses from text, as Kubernetes objects list them, in any order.
    #[must_use]
    pub fn parse<'a>(ips: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let (mut v4, mut v6) = (None, None);
        for ip in ips {
            match ip.parse().ok()? {
                IpAddr::V4(ip) => v4 = Some(ip),
                IpAddr::V6(ip) => v6 = Some(ip),
            }
        }
        Some(Self::new(v4?, v6?))
    }

    /// The address of one family with a port.
    #[must_use]
    pub const fn socket(self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.of(family), port)
    }

    /// Both addresses.
    #[must_use]
    pub const fn both(self) -> [IpAddr; 2] {
        [IpAddr::V4(self.v4), IpAddr::V6(self.v6)]
    }

    /// Whether `ip` is one of the two.
    #[must_use]
    pub fn contains(self, ip: IpAddr) -> bool {
        self.both().contains(&ip)
    }
}

impl fmt::Display for Dual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.v4, self.v6)
    }
}

/// An address range of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DualNet {
    /// First addresses of the ranges.
    pub base: Dual,
    /// Prefix length of the IPv4 range.
    pub v4_len: u8,
    /// Prefix length of the IPv6 range.
    pub v6_len: u8,
}

impl DualNet {
    /// The `n`th address of both ranges; `n` is the caller's promise to stay inside.
    #[must_use]
    pub const fn nth(self, n: u16) -> Dual {
        Dual::new(
            Ipv4Addr::from_bits(self.base.v4.to_bits() + n as u32),
            Ipv6Addr::from_bits(self.base.v6.to_bits() + n as u128),
        )
    }

    /// Prefix length of one family's range.
    #[must_use]
    pub const fn len(self, family: Family) -> u8 {
        match family {
            Family::V4 => self.v4_len,
            Family::V6 => self.v6_len,
        }
    }

    /// `address/length` of one family.
    #[must_use]
    pub fn cidr(self, family: Family) -> String {
        format!("{}/{}", self.base.of(family), self.len(family))
    }

    /// Whether an address of either family is inside.
    #[must_use]
    pub const fn contains(self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => (ip.to_bits() ^ self.base.v4.to_bits()) >> (32 - self.v4_len) == 0,
            IpAddr::V6(ip) => (ip.to_bits() ^ self.base.v6.to_bits()) >> (128 - self.v6_len) == 0,
        }
    }

    /// Whether both addresses are inside.
    #[must_use]
    pub const fn holds(self, addr: Dual) -> bool {
        self.contains(IpAddr::V4(addr.v4)) && self.contains(IpAddr::V6(addr.v6))
    }
}

const fn net(v4: [u8; 4], v4_len: u8, v6: [u16; 8], v6_len: u8) -> DualNet {
    DualNet {
        base: Dual::new(Ipv4Addr::from_octets(v4), Ipv6Addr::from_segments(v6)),
        v4_len,
        v6_len,
    }
}

/// The nodes' network: router .1, node-a .11, node-b .12.
pub const NODES: DualNet = net([192, 0, 2, 0], 24, [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 64);
/// The outside clients' network: router .1, clients from .10 on.
pub const OUTSIDE: DualNet = net(
    [203, 0, 113, 0],
    24,
    [0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0],
    64,
);
/// Pods of node-a.
pub const PODS_A: DualNet = net(
    [10, 244, 1, 0],
    24,
    [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0],
    64,
);
/// The part of [`PODS_A`] that lives on the bridge `cni0`; its gateway is the first address.
pub const BRIDGED: DualNet = net(
    [10, 244, 1, 128],
    25,
    [0xfd00, 0x10, 0x244, 1, 0xb, 0, 0, 0],
    80,
);
/// Pods of node-b.
pub const PODS_B: DualNet = net(
    [10, 244, 2, 0],
    24,
    [0xfd00, 0x10, 0x244, 2, 0, 0, 0, 0],
    64,
);
/// ClusterIPs.
pub const SERVICES: DualNet = net([10, 96, 0, 0], 16, [0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0], 112);
/// LoadBalancer addresses; the router sends them to node-a.
pub const LB_POOL: DualNet = net(
    [198, 51, 100, 0],
    24,
    [0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0],
    112,
);
/// Addresses for `externalIPs`; the router sends them to node-a.
pub const EXTERNAL: DualNet = net(
    [198, 18, 0, 0],
    24,
    [0x2001, 0xdb8, 0x18, 0, 0, 0, 0, 0],
    112,
);

/// Node-a, the node under test.
pub const NODE_A: Dual = Dual::new(
    Ipv4Addr::new(192, 0, 2, 11),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x11),
);
/// Node-b.
pub const NODE_B: Dual = Dual::new(
    Ipv4Addr::new(192, 0, 2, 12),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x12),
);
/// The router's address in the nodes' network.
pub const ROUTER_NODES: Dual = NODES.nth(1);
/// The router's address in the outside network.
pub const ROUTER_OUTSIDE: Dual = OUTSIDE.nth(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridged_pods_are_pods_of_node_a() {
        let pod = BRIDGED.nth(9);
        assert!(BRIDGED.holds(pod) && PODS_A.holds(pod));
        assert!(!BRIDGED.holds(PODS_A.nth(9)));
        assert!(!PODS_A.holds(PODS_B.nth(9)));
    }
}
