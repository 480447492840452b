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
    /// No edge.
    pub stranger: u32,
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
    let interface = |name: &str| -> anyhow::Result<u32> {
        let far = format!("{name}-far");
        let end = |name| End { name, mac: None };
        netlink.veth(end(name), end(&far), here.as_fd())?;
        netlink.up(name)?;
        netlink.up(&far)?;
        netlink.index(name)
    };
    netlink.bridge(BRIDGE)?;
    let network = Network {
        uplink: interface("eth0")?,
        xdp_uplink: interface("eth1")?,
        pod: interface("veth0")?,
        other_pod: interface("veth1")?,
        bridged_pod: interface("veth2")?,
        stranger: interface("tap0")?,
        bridge: netlink.index(BRIDGE)?,
    };
    netlink.bridge_port(BRIDGE, "veth2")?;
    for (net, length) in BRIDGED_NET {
        netlink.route(net, length, Via::link(BRIDGE))?;
    }
    for (address, mac) in NEIGHBOURS {
        netlink.neighbour(BRIDGE, address, mac)?;
    }
    Ok((network, netlink))
}
