//! What is fixed when the programs are loaded: one frozen global, so that the verifier removes
//! the branches a node does not use.

use crate::layout::record;
use crate::{Addr4, Addr6};

record! {
    /// The programs' settings. Changing one means loading the programs again and replacing the
    /// attached ones through their links; maps and flows stay.
    pub struct Config = 248 {
        /// The node's secret: mixed into selection, port search and nothing that leaves the node.
        pub seed: u64,
        /// IPv4 service CIDR: network address.
        pub service_net4: Addr4,
        /// IPv4 service CIDR: netmask; 0 where the node has none.
        pub service_mask4: Addr4,
        /// IPv6 service CIDR: network address.
        pub service_net6: Addr6,
        /// IPv6 service CIDR: netmask; 0 where the node has none.
        pub service_mask6: Addr6,
        /// IPv4 ranges of pods' addresses, beside the interfaces of pods: network addresses.
        pub pod_nets4: [Addr4; POD_NETS],
        /// Their netmasks; 0 where there is none.
        pub pod_masks4: [Addr4; POD_NETS],
        /// IPv6 ranges of pods' addresses: network addresses.
        pub pod_nets6: [Addr6; POD_NETS],
        /// Their netmasks; 0 where there is none.
        pub pod_masks6: [Addr6; POD_NETS],
        /// Bits of [`config`](self).
        pub bits: u32,
        /// Size of the `guard` array in words, a power of two.
        pub guard_words: u32,
        /// First port of the range that translated source ports come from, host byte order.
        pub snat_first: u16,
        /// Last port of that range, host byte order.
        pub snat_last: u16,
        /// Jiffies per second (the kernel's CONFIG_HZ), which only the agent can measure.
        pub hz: u32,
        /// Generated packets (ICMP errors) per second and CPU.
        pub generate_rate: u32,
        /// Generated packets that a CPU may send at once after a pause.
        pub generate_burst: u32,
        /// The cluster's seed, the same on every node: selection of services with [`MAGLEV`] and
        /// nothing else.
        ///
        /// [`MAGLEV`]: crate::service::flag::MAGLEV
        pub maglev_seed: u64,
        /// Cookie of the node's own network namespace: what socket hooks meet there is the node's, all
        /// else in their cgroup is a pod's.
        pub netns: u64,
    }
}

/// Ranges of pods' addresses of each family.
pub const POD_NETS: usize = 4;

/// Answer packets for an undefined port of a live ClusterIP with a reject.
pub const REJECT_UNDEFINED_PORT: u32 = 1 << 0;
/// Drop packets to an unallocated address of the service CIDR.
pub const DROP_UNALLOCATED: u32 = 1 << 1;
/// Meet outside clients of a Local service without local endpoint with a reject, not silence.
pub const REJECT_NO_LOCAL: u32 = 1 << 2;
/// The kernel knows BPF_F_IPV6 of bpf_l4_csum_replace (6.16, ead7f9b8de65632ef8060b84b0c55049a33cfea1).
pub const CSUM_IPV6: u32 = 1 << 3;
/// aya-log diagnostics, switched on by the operator.
pub const DIAGNOSTICS: u32 = 1 << 4;
/// External IPs are frontends for clients outside alone: pods' packets to them go on as they are.
pub const EXTERNAL_IPS_OUTSIDE: u32 = 1 << 6;
/// Clients outside get a translated source even where the backend is on this node, as with
/// kube-proxy; not where a Local policy applies.
pub const SNAT_ALWAYS: u32 = 1 << 5;
/// Pods get a translated source on their way to a ClusterIP (kube-proxy's masqueradeAll).
pub const MASQUERADE_ALL: u32 = 1 << 7;
/// Answer packets of TCP connections whose backend, a pod of this node, has vanished with a RST.
pub const RESET_VANISHED: u32 = 1 << 8;
/// Socket hooks give TCP sockets of pods their backends; else those of the node alone.
pub const SOCKETS_OF_PODS: u32 = 1 << 9;
/// The kernel has bpf_set_retval (5.18): a socket hook can say ECONNREFUSED.
pub const SET_RETVAL: u32 = 1 << 10;
/// The node's own sockets reach NodePorts at 127.0.0.0/8.
pub const LOOPBACK_NODE_PORTS4: u32 = 1 << 11;
/// The node's own sockets reach NodePorts at ::1.
pub const LOOPBACK_NODE_PORTS6: u32 = 1 << 12;

impl Config {
    /// The settings of a node that was told nothing.
    pub const DEFAULT: Self = Self {
        seed: 0,
        service_net4: Addr4(0),
        service_mask4: Addr4(0),
        service_net6: Addr6([0; 4]),
        service_mask6: Addr6([0; 4]),
        pod_nets4: [Addr4(0); POD_NETS],
        pod_masks4: [Addr4(0); POD_NETS],
        pod_nets6: [Addr6([0; 4]); POD_NETS],
        pod_masks6: [Addr6([0; 4]); POD_NETS],
        bits: REJECT_UNDEFINED_PORT | DROP_UNALLOCATED,
        guard_words: crate::limits::GUARD_WORDS,
        snat_first: 61_000,
        snat_last: 65_535,
        hz: 100,
        generate_rate: 1_000,
        generate_burst: 1_000,
        maglev_seed: 0,
        netns: 0,
    };
}
