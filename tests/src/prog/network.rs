//! Interfaces for test runs: the programs ask the kernel about the interface a packet is at.

use std::fs;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::thread;

use nix::sched::{CloneFlags, sched_setaffinity, unshare};
use nix::unistd::Pid;

use crate::lab::netlink::{End, Mac, Netlink, Via};

/// The interfaces of a namespace that only the running thread is in. Indexes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Network {
    /// Towards the network.
    pub uplink: u32,
    /// Towards the network, with `xdp_ingress` ahead of tc.
    pub xdp_uplink: u32,
    /// Towards a routed pod.
    pub pod: u32,
    /// Towards another routed pod.
    pub other_pod: u32,
    /// Towards a pod, a port of [`Network::bridge`].
    pub bridged_pod: u32,
    /// The bridge.
    pub bridge: u32,
    /// No edge, but a way out that XDP may take.
    pub stranger: u32,
}

/// An interface by its name's constant and what leaves through it.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// Its name.
    name: &'static str,
    /// Its MAC address.
    pub mac: Mac,
    /// The address that a translated source gets on it, IPv4 and IPv6.
    pub sources: [IpAddr; 2],
    /// The router behind it.
    gateways: [IpAddr; 2],
    /// The router's MAC address.
    pub router: Mac,
    /// The longest packet that it takes.
    pub mtu: u16,
}

const fn out(name: &'static str, number: u8, mtu: u16) -> Out {
    Out {
        name,
        mac: [2, 0, 0, 0, number, 1],
        sources: [v4(192, 168, number, 10), wide6(number, 10)],
        gateways: [v4(192, 168, number, 1), wide6(number, 1)],
        router: [2, 0, 0, 0, number, 254],
        mtu,
    }
}

/// What leaves through [`Network::uplink`].
pub const UPLINK: Out = out("eth0", 70, MTU);
/// What leaves through [`Network::xdp_uplink`].
pub const XDP_UPLINK: Out = out("eth1", 77, SMALL_MTU);
/// What leaves through [`Network::stranger`].
pub const STRANGER: Out = out("tap0", 79, SMALL_MTU);
/// The bridge's own addresses.
pub const BRIDGE_SOURCES: [IpAddr; 2] = [v4(10, 244, 1, 254), v6(0x1_00fe)];
/// Ethernet's MTU.
pub const MTU: u16 = 1_500;
/// MTU of [`Network::stranger`] and [`Network::xdp_uplink`]: IPv6's least.
pub const SMALL_MTU: u16 = 1_280;

/// 65,536 addresses of clients.
pub const MANY_CLIENTS: IpAddr = v4(198, 18, 0, 0);
/// 65,536 addresses of pods on other nodes.
pub const MANY_BACKENDS: IpAddr = v4(198, 19, 0, 0);

/// 4 million addresses of clients that XDP reaches.
pub const XDP_CLIENTS: [IpAddr; 2] = [v4(100, 64, 0, 0), host6(0x100, 0)];
/// 65,536 addresses of pods on other nodes, which XDP reaches.
pub const XDP_BACKENDS: [IpAddr; 2] = [MANY_BACKENDS, host6(0x200, 0)];

/// Where packets to other hosts go: the longest prefix counts.
const ROUTES: [(IpAddr, u8, Out); 17] = [
    (XDP_CLIENTS[0], 10, XDP_UPLINK),
    (XDP_CLIENTS[1], 64, XDP_UPLINK),
    (XDP_BACKENDS[1], 64, XDP_UPLINK),
    (MANY_CLIENTS, 16, UPLINK),
    (MANY_BACKENDS, 16, XDP_UPLINK),
    (v4(172, 16, 1, 10), 32, XDP_UPLINK),
    (v4(172, 16, 1, 11), 32, XDP_UPLINK),
    (v4(172, 16, 1, 12), 32, UPLINK),
    (v4(172, 16, 1, 13), 32, STRANGER),
    (v4(172, 16, 2, 20), 31, XDP_UPLINK),
    (v4(172, 16, 2, 22), 32, UPLINK),
    (host6(1, 10), 128, XDP_UPLINK),
    (host6(1, 11), 128, XDP_UPLINK),
    (host6(1, 12), 128, UPLINK),
    (host6(1, 13), 128, STRANGER),
    (host6(2, 20), 127, XDP_UPLINK),
    (host6(2, 22), 128, UPLINK),
];

/// The way that packets to an address take, as the routes say.
#[derive(Clone, Copy, Debug)]
pub enum Hop {
    /// To the router behind an interface.
    Router(Out),
    /// Onto the bridge; the neighbour's MAC address where it is known.
    Bridge(Option<Mac>),
    /// To a neighbour on an interface without a source, of whom nothing is known.
    Sourceless,
    /// Nowhere.
    None,
}

/// The way to an address.
#[must_use]
pub fn hop(to: IpAddr) -> Hop {
    if let Some((_, mac)) = NEIGHBOURS.iter().find(|(address, _)| *address == to) {
        return Hop::Bridge(Some(*mac));
    }
    if UNKNOWN_NEIGHBOURS.contains(&to) {
        return Hop::Bridge(None);
    }
    if SOURCELESS.contains(&to) {
        return Hop::Sourceless;
    }
    let matches = |net: IpAddr, length: u8| {
        let net = ipnet::IpNet::new(net, length).expect("a length of the family");
        net.contains(&to)
    };
    ROUTES
        .iter()
        .filter(|(net, length, _)| matches(*net, *length))
        .max_by_key(|(_, length, _)| *length)
        .map_or(Hop::None, |(_, _, out)| Hop::Router(*out))
}

/// Addresses behind the bridge whose neighbour is known, and its MAC address.
pub const NEIGHBOURS: [(IpAddr, Mac); 4] = [
    (v4(10, 244, 1, 129), [2, 0, 0, 0, 1, 129]),
    (v4(10, 244, 1, 130), [2, 0, 0, 0, 1, 130]),
    (v6(0x1_0081), [2, 0, 0, 0, 6, 129]),
    (v6(0x1_0082), [2, 0, 0, 0, 6, 130]),
];
/// Behind the bridge, with nothing known of the neighbour.
pub const UNKNOWN_NEIGHBOURS: [IpAddr; 2] = [v4(10, 244, 1, 140), v6(0x1_008c)];

/// Behind [`Network::other_pod`].
const SOURCELESS: [IpAddr; 2] = [v4(172, 16, 1, 14), host6(1, 14)];

const BRIDGE: &str = "cni0";
const BRIDGED_NET: [(IpAddr, u8); 2] = [(v4(10, 244, 1, 128), 25), (v6(0x1_0080), 121)];

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::new(a, b, c, d))
}

/// An address of `fd00:10:244::/48` by its last 32 bits.
const fn v6(low: u32) -> IpAddr {
    let [a, b, c, d] = low.to_be_bytes();
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    IpAddr::V6(std::net::Ipv6Addr::new(
        0xfd00, 0x10, 0x244, 0, 0, 0, high, low,
    ))
}

/// `2001:db8:NET::HOST`.
const fn host6(net: u16, host: u16) -> IpAddr {
    IpAddr::V6(std::net::Ipv6Addr::new(
        0x2001, 0xdb8, net, 0, 0, 0, 0, host,
    ))
}

/// `fd00:NUMBER::HOST`.
const fn wide6(number: u8, host: u8) -> IpAddr {
    IpAddr::V6(std::net::Ipv6Addr::new(
        0xfd00,
        number as u16,
        0,
        0,
        0,
        0,
        0,
        host as u16,
    ))
}

/// Runs `test` on a thread of its own, on one CPU, in a network namespace of its own that ends with it.
///
/// # Panics
/// With the panic of `test`, and if the namespace cannot be made.
pub fn private<T: Send>(test: impl FnOnce(&Network) -> T + Send) -> T {
    let name = thread::current().name().unwrap_or("private").to_owned();
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name(name)
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET).expect("a namespace needs root");
                let (network, _netlink) = build().expect("interfaces are made");
                stay_on_one_cpu();
                test(&network)
            })
            .expect("a thread is started");
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Per-CPU state is then one state.
fn stay_on_one_cpu() {
    let allowed = nix::sched::sched_getaffinity(Pid::from_raw(0)).expect("affinity is read");
    let first = (0..nix::sched::CpuSet::count())
        .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .expect("there is a CPU");
    let mut one = nix::sched::CpuSet::new();
    one.set(first).expect("the CPU exists");
    sched_setaffinity(Pid::from_raw(0), &one).expect("affinity is set");
}

fn build() -> anyhow::Result<(Network, Netlink)> {
    for (sysctl, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
    ] {
        fs::write(format!("/proc/sys/net/{sysctl}"), value)?;
    }
    let netlink = Netlink::open()?;
    let here = fs::File::open("/proc/thread-self/ns/net")?;
    let interface = |name: &str, mac: Option<Mac>| -> anyhow::Result<u32> {
        let far = format!("{name}-far");
        netlink.veth(
            End { name, mac },
            End {
                name: &far,
                mac: None,
            },
            here.as_fd(),
        )?;
        netlink.up(name)?;
        netlink.up(&far)?;
        netlink.index(name)
    };
    let out = |out: Out| -> anyhow::Result<u32> {
        let index = interface(out.name, Some(out.mac))?;
        netlink.mtu(out.name, u32::from(out.mtu))?;
        for ((gateway, source), length) in out.gateways.into_iter().zip(out.sources).zip([24, 64]) {
            netlink.address(out.name, source, length)?;
            netlink.neighbour(out.name, gateway, out.router)?;
        }
        Ok(index)
    };
    netlink.bridge(BRIDGE)?;
    let network = Network {
        uplink: out(UPLINK)?,
        xdp_uplink: out(XDP_UPLINK)?,
        pod: interface("veth0", None)?,
        other_pod: interface("veth1", None)?,
        bridged_pod: interface("veth2", None)?,
        stranger: out(STRANGER)?,
        bridge: netlink.index(BRIDGE)?,
    };
    netlink.bridge_port(BRIDGE, "veth2")?;
    for (net, length) in BRIDGED_NET {
        netlink.route(net, length, Via::link(BRIDGE))?;
    }
    for (net, length, out) in ROUTES {
        let [v4, v6] = out.gateways;
        let gateway = if net.is_ipv4() { v4 } else { v6 };
        netlink.route(net, length, Via::gateway(out.name, gateway))?;
    }
    for (address, length) in SOURCELESS.into_iter().zip([32, 128]) {
        netlink.route(address, length, Via::link("veth1"))?;
    }
    for (address, mac) in NEIGHBOURS {
        netlink.neighbour(BRIDGE, address, mac)?;
    }
    Ok((network, netlink))
}
