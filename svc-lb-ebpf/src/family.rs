//! One address family: its maps and its IP header. Everything else is written once for both.

use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use svc_lb_common::affinity::{Affinity, AffinityKey};
use svc_lb_common::backend::Backend;
use svc_lb_common::config::{LOOPBACK_NODE_PORTS4, LOOPBACK_NODE_PORTS6};
use svc_lb_common::conntrack::{Flow, FlowKey};
use svc_lb_common::fragment::{FirstFragment, FragmentKey};
use svc_lb_common::link::Link;
use svc_lb_common::service::{Frontend, FrontendKey};
use svc_lb_common::socket::{SocketEntry, SocketKey};
use svc_lb_common::source_range::Source;
use svc_lb_common::{Addr4, Addr6, Address};

use crate::config::{config, enabled};
use crate::maps;
use crate::met::Met;
use crate::open;

mod sealed {
    pub(crate) trait Sealed {}
    impl Sealed for super::V4 {}
    impl Sealed for super::V6 {}
}

/// An address family.
pub(crate) trait Family: sealed::Sealed + Sized {
    /// Its addresses.
    type Addr: Address;
    /// Length of the fixed header in bytes.
    const HEADER: usize;
    /// Offset of the source address in the header; the destination's follows.
    const SOURCE: usize;
    /// Its socket number, as in `bpf_fib_lookup`.
    const AF: u8;
    /// IANA number of its ICMP.
    const ICMP: u8;
    /// Offset of the byte that says what follows the header.
    const PROTOCOL: usize;

    /// Where to note what is known of the packet.
    fn met() -> Option<&'static mut Met<Self::Addr>>;
    /// Whether the address lies in the node's service CIDR.
    fn in_service_net(address: Self::Addr) -> bool;
    /// Whether the address lies in one of the pods' ranges.
    fn in_pod_nets(address: Self::Addr) -> bool;
    /// Whether the node knows a service CIDR of this family.
    fn has_service_net() -> bool;
    /// Whether the address is one host's on a network, so that an ICMP error may be sent to it (RFC
    /// 1122 3.2.2).
    fn is_unicast(address: Self::Addr) -> bool;
    /// Whether no packet from elsewhere may have this source; the kernel drops such packets.
    fn is_martian(source: Self::Addr) -> bool;
    /// The address that translated sources get on an interface.
    fn source_of(link: &Link) -> Self::Addr;
    /// The map of frontends.
    fn frontends() -> &'static HashMap<FrontendKey<Self::Addr>, Frontend>;
    /// The array of backends.
    fn backends() -> &'static Array<Backend<Self::Addr>>;
    /// Flows that are not confirmed yet.
    fn opening() -> &'static LruHashMap<FlowKey<Self::Addr>, Flow<Self::Addr>>;
    /// Confirmed TCP connections.
    fn established() -> &'static LruHashMap<FlowKey<Self::Addr>, Flow<Self::Addr>>;
    /// Confirmed UDP streams.
    fn streams() -> &'static LruHashMap<FlowKey<Self::Addr>, Flow<Self::Addr>>;
    /// Session affinity.
    fn affinity() -> &'static LruHashMap<AffinityKey<Self::Addr>, Affinity>;
    /// Pods of this node that are gone.
    fn vanished() -> &'static HashMap<Self::Addr, u64>;
    /// Fragmented datagrams.
    fn fragments() -> &'static LruHashMap<FragmentKey<Self::Addr>, FirstFragment>;
    /// Whom services admit at load balancer addresses.
    fn source_ranges() -> &'static LpmTrie<Source<Self::Addr>, u32>;
    /// `open::tuple_is_free`, verified once.
    fn tuple_is_free() -> bool;
    /// What sockets were given in place of what they asked for.
    fn sockets() -> &'static LruHashMap<SocketKey<Self::Addr>, SocketEntry<Self::Addr>>;
    /// How many sockets each backend was given.
    fn socket_hits() -> &'static Array<u64>;
    /// Whether the address is the loopback's, and the node's own sockets reach NodePorts there.
    fn has_loopback_node_ports(address: Self::Addr) -> bool;
}

/// IPv4.
pub(crate) enum V4 {}
/// IPv6.
pub(crate) enum V6 {}

impl Family for V4 {
    type Addr = Addr4;
    const HEADER: usize = Ipv4Hdr::LEN;
    const SOURCE: usize = core::mem::offset_of!(Ipv4Hdr, src_addr);
    const AF: u8 = 2;
    const ICMP: u8 = 1;
    const PROTOCOL: usize = core::mem::offset_of!(Ipv4Hdr, proto);

    #[inline(always)]
    fn met() -> Option<&'static mut Met<Addr4>> {
        let met = maps::MET4.get_ptr_mut(0)?;
        // SAFETY: a per-CPU element; see `met` for why nobody else has it.
        Some(unsafe { &mut *met })
    }

    #[inline(always)]
    fn in_service_net(address: Addr4) -> bool {
        Self::has_service_net() && address.0 & config!(service_mask4).0 == config!(service_net4).0
    }

    #[inline(always)]
    fn in_pod_nets(address: Addr4) -> bool {
        let within = |net: Addr4, mask: Addr4| mask.0 != 0 && address.0 & mask.0 == net.0;
        within(config!(pod_nets4[0]), config!(pod_masks4[0]))
            || within(config!(pod_nets4[1]), config!(pod_masks4[1]))
            || within(config!(pod_nets4[2]), config!(pod_masks4[2]))
            || within(config!(pod_nets4[3]), config!(pod_masks4[3]))
    }

    #[inline(always)]
    fn has_service_net() -> bool {
        config!(service_mask4).0 != 0
    }

    #[inline(always)]
    fn is_unicast(address: Addr4) -> bool {
        let first = u32::from_be(address.0) >> 24;
        first != 0 && first != 127 && first < 224
    }

    #[inline(always)]
    fn is_martian(source: Addr4) -> bool {
        // 240.0.0.0/4 but the broadcast address is routed as unicast.
        (!Self::is_unicast(source) && u32::from_be(source.0) >> 28 != 0xf) || source.0 == u32::MAX
    }

    #[inline(always)]
    fn source_of(link: &Link) -> Addr4 {
        link.v4
    }

    #[inline(always)]
    fn frontends() -> &'static HashMap<FrontendKey<Addr4>, Frontend> {
        &maps::FRONTENDS4
    }

    #[inline(always)]
    fn backends() -> &'static Array<Backend<Addr4>> {
        &maps::BACKENDS4
    }

    #[inline(always)]
    fn opening() -> &'static LruHashMap<FlowKey<Addr4>, Flow<Addr4>> {
        &maps::OPENING4
    }

    #[inline(always)]
    fn established() -> &'static LruHashMap<FlowKey<Addr4>, Flow<Addr4>> {
        &maps::ESTABLISHED4
    }

    #[inline(always)]
    fn streams() -> &'static LruHashMap<FlowKey<Addr4>, Flow<Addr4>> {
        &maps::STREAMS4
    }

    #[inline(always)]
    fn affinity() -> &'static LruHashMap<AffinityKey<Addr4>, Affinity> {
        &maps::AFFINITY4
    }

    #[inline(always)]
    fn vanished() -> &'static HashMap<Addr4, u64> {
        &maps::VANISHED4
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKey<Addr4>, FirstFragment> {
        &maps::FRAGMENTS4
    }

    #[inline(always)]
    fn source_ranges() -> &'static LpmTrie<Source<Addr4>, u32> {
        &maps::SOURCE_RANGES4
    }

    #[inline(always)]
    fn tuple_is_free() -> bool {
        open::tuple_is_free4() != 0
    }

    #[inline(always)]
    fn sockets() -> &'static LruHashMap<SocketKey<Addr4>, SocketEntry<Addr4>> {
        &maps::SOCKETS4
    }

    #[inline(always)]
    fn socket_hits() -> &'static Array<u64> {
        &maps::SOCKET_HITS4
    }

    #[inline(always)]
    fn has_loopback_node_ports(address: Addr4) -> bool {
        enabled(LOOPBACK_NODE_PORTS4) && u32::from_be(address.0) >> 24 == 127
    }
}

impl Family for V6 {
    type Addr = Addr6;
    const HEADER: usize = Ipv6Hdr::LEN;
    const SOURCE: usize = core::mem::offset_of!(Ipv6Hdr, src_addr);
    const AF: u8 = 10;
    const ICMP: u8 = 58;
    const PROTOCOL: usize = core::mem::offset_of!(Ipv6Hdr, next_hdr);

    #[inline(always)]
    fn met() -> Option<&'static mut Met<Addr6>> {
        let met = maps::MET6.get_ptr_mut(0)?;
        // SAFETY: a per-CPU element; see `met` for why nobody else has it.
        Some(unsafe { &mut *met })
    }

    #[inline(always)]
    fn in_service_net(address: Addr6) -> bool {
        within(address, config!(service_net6), config!(service_mask6))
    }

    #[inline(always)]
    fn in_pod_nets(address: Addr6) -> bool {
        within(address, config!(pod_nets6[0]), config!(pod_masks6[0]))
            || within(address, config!(pod_nets6[1]), config!(pod_masks6[1]))
            || within(address, config!(pod_nets6[2]), config!(pod_masks6[2]))
            || within(address, config!(pod_nets6[3]), config!(pod_masks6[3]))
    }

    #[inline(always)]
    fn has_service_net() -> bool {
        let [first, ..] = config!(service_mask6).0;
        first != 0
    }

    #[inline(always)]
    fn is_unicast(address: Addr6) -> bool {
        let [first, b, c, last] = address.0;
        let loopback = [first, b, c, u32::from_be(last)] == [0, 0, 0, 1];
        u32::from_be(first) >> 24 != 0xff && address != Addr6::UNSPECIFIED && !loopback
    }

    #[inline(always)]
    fn is_martian(source: Addr6) -> bool {
        !Self::is_unicast(source)
    }

    #[inline(always)]
    fn source_of(link: &Link) -> Addr6 {
        link.v6
    }

    #[inline(always)]
    fn frontends() -> &'static HashMap<FrontendKey<Addr6>, Frontend> {
        &maps::FRONTENDS6
    }

    #[inline(always)]
    fn backends() -> &'static Array<Backend<Addr6>> {
        &maps::BACKENDS6
    }

    #[inline(always)]
    fn opening() -> &'static LruHashMap<FlowKey<Addr6>, Flow<Addr6>> {
        &maps::OPENING6
    }

    #[inline(always)]
    fn established() -> &'static LruHashMap<FlowKey<Addr6>, Flow<Addr6>> {
        &maps::ESTABLISHED6
    }

    #[inline(always)]
    fn streams() -> &'static LruHashMap<FlowKey<Addr6>, Flow<Addr6>> {
        &maps::STREAMS6
    }

    #[inline(always)]
    fn affinity() -> &'static LruHashMap<AffinityKey<Addr6>, Affinity> {
        &maps::AFFINITY6
    }

    #[inline(always)]
    fn vanished() -> &'static HashMap<Addr6, u64> {
        &maps::VANISHED6
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKey<Addr6>, FirstFragment> {
        &maps::FRAGMENTS6
    }

    #[inline(always)]
    fn source_ranges() -> &'static LpmTrie<Source<Addr6>, u32> {
        &maps::SOURCE_RANGES6
    }

    #[inline(always)]
    fn tuple_is_free() -> bool {
        open::tuple_is_free6() != 0
    }

    #[inline(always)]
    fn sockets() -> &'static LruHashMap<SocketKey<Addr6>, SocketEntry<Addr6>> {
        &maps::SOCKETS6
    }

    #[inline(always)]
    fn socket_hits() -> &'static Array<u64> {
        &maps::SOCKET_HITS6
    }

    #[inline(always)]
    fn has_loopback_node_ports(address: Addr6) -> bool {
        let [a, b, c, last] = address.0;
        enabled(LOOPBACK_NODE_PORTS6) && [a, b, c, u32::from_be(last)] == [0, 0, 0, 1]
    }
}

/// Whether the address lies in a range; none does where there is no mask.
#[inline(always)]
fn within(address: Addr6, net: Addr6, mask: Addr6) -> bool {
    let [a, b, c, d] = address.0;
    let [ma, mb, mc, md] = mask.0;
    ma != 0 && [a & ma, b & mb, c & mc, d & md] == net.0
}
