//! The numbered list of what can become of a packet, and what else is counted.

use crate::Family;
use crate::limits::name;

/// Whether a packet goes on.
#[derive(Clone, Copy, Eq, PartialEq)]
#[cfg_attr(feature = "user", derive(Debug, serde::Serialize))]
#[cfg_attr(feature = "user", serde(rename_all = "lowercase"))]
pub enum Fate {
    /// It goes on, changed or not.
    Pass,
    /// It ends here.
    Drop,
}

macro_rules! outcomes {
    ($( $(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal, $fate:ident; )*) => {
        /// What became of a packet. The number is the counter's index and never reused; the name
        /// is the metric's label.
        #[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
        #[cfg_attr(feature = "user", derive(Debug))]
        #[repr(u32)]
        pub enum Outcome {
            $( $(#[doc = $doc])+ $variant = $number, )*
        }

        impl Outcome {
            /// All of them, by number.
            pub const ALL: &[Self] = &[$( Self::$variant, )*];

            /// The metric's label.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )* }
            }

            /// Whether the packet goes on.
            #[must_use]
            #[inline(always)]
            pub const fn fate(self) -> Fate {
                match self { $( Self::$variant => Fate::$fate, )* }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn explanation(self) -> &'static str {
                match self { $( Self::$variant => concat!($( $doc, )+).trim_ascii(), )* }
            }
        }
    };
}

outcomes! {
    /// Neither a frontend's nor a backend's: left alone, and the only outcome that is not counted.
    NotOurs = 0, "not_ours", Pass;
    /// Not IPv4 or IPv6, or an unknown link-layer header.
    NotIp = 1, "not_ip", Pass;
    /// Cut short or malformed: an IP or transport header does not fit or contradicts itself.
    Malformed = 2, "malformed", Pass;
    /// A protocol other than TCP and UDP, to or from an address of ours.
    OtherProtocol = 3, "other_protocol", Pass;
    /// The address may be ours by its hash, but no frontend or flow matches.
    NoFrontend = 4, "no_frontend", Pass;
    /// A frame with a VLAN tag, in it or taken off already: it is for the VLAN interface above.
    Vlan = 5, "vlan", Pass;
    /// Translated along an established flow, by the client.
    Forward = 6, "forward", Pass;
    /// Translated along a flow that is still opening, by the client.
    ForwardOpening = 7, "forward_opening", Pass;
    /// Opened a flow and translated its first packet.
    Open = 8, "open", Pass;
    /// A backend's answer, translated back.
    Reverse = 9, "reverse", Pass;
    /// A pod reached itself: turned around at its edge.
    Hairpin = 10, "hairpin", Pass;
    /// A pod's own answer to itself, turned around at its edge.
    HairpinReverse = 11, "hairpin_reverse", Pass;
    /// Rejected: an ICMP error (port unreachable, or IPv6 type 1 code 4) went back in its place.
    Rejected = 12, "rejected", Pass;
    /// Would have been rejected, but the limit of generated packets is used up.
    RejectLimited = 13, "reject_limited", Drop;
    /// Nothing may be sent in answer (RFC 1122 3.2.2): dropped in silence.
    RejectSilent = 14, "reject_silent", Drop;
    /// A Local policy without a local endpoint, while other nodes have some.
    NoLocalEndpoint = 15, "no_local_endpoint", Drop;
    /// An address of the service CIDR that belongs to no Service.
    Unallocated = 16, "unallocated", Drop;
    /// Left the node still addressed to a ClusterIP.
    Untranslated = 17, "untranslated", Drop;
    /// A fragment whose first has not been seen, or not been sent on, to an address that nobody here
    /// has: it cannot be put together on this node.
    Fragment = 18, "fragment", Drop;
    /// No free source port for a flow whose translated tuple is taken.
    PortsExhausted = 19, "ports_exhausted", Drop;
    /// The flow could not be entered in the map (no memory).
    FlowInsert = 20, "flow_insert", Drop;
    /// A TTL or hop limit that ends here, where we forward.
    TtlExceeded = 21, "ttl_exceeded", Drop;
    /// The kernel refused to change the packet.
    RewriteFailed = 22, "rewrite_failed", Drop;
    /// The service named a backend or a slot that is not there: a bug or a damaged map.
    BadBackend = 23, "bad_backend", Drop;
    /// Not admitted by loadBalancerSourceRanges.
    SourceRange = 24, "source_range", Drop;
    /// For a frontend, from a source that no packet may have: unspecified, loopback, multicast or
    /// broadcast. No flow is opened; the stack drops it.
    Martian = 25, "martian", Pass;
    /// Translated along a flow with this node's address as the source and sent on, by the client.
    ForwardRemote = 26, "forward_remote", Pass;
    /// A backend's answer to this node's address, translated back and sent on.
    ReverseRemote = 27, "reverse_remote", Pass;
    /// XDP cannot finish it (an unresolved neighbour, an interface without XDP, a tag, no room for an
    /// answer): tc does.
    LeftToTc = 28, "left_to_tc", Pass;
    /// No route, or forwarding is off on the interface it came in by, where we forward.
    NoRoute = 29, "no_route", Drop;
    /// Too big for its way: an ICMP error with the right size went back in its place.
    TooBig = 30, "too_big", Pass;
    /// Its TTL or hop limit ended where we forward: an ICMP error went back in its place.
    TimeExceeded = 31, "time_exceeded", Pass;
    /// Would leave with this node's address, by an interface that has none or is no edge of
    /// svc-lb's, where its answers would not be turned back.
    NoSource = 32, "no_source", Drop;
    /// Along a TCP connection whose backend, a pod of this node, has vanished: a RST went back in its place.
    Reset = 33, "reset", Pass;
    /// An ICMP error about a flow's packet, translated for who sent that packet.
    IcmpError = 34, "icmp_error", Pass;
    /// An ICMP redirect about a flow's packet: the shorter way is not the sender's.
    IcmpRedirect = 35, "icmp_redirect", Drop;
    /// A fragment whose first has not been seen, to an address that somebody here may have: the
    /// stack knows.
    FragmentToStack = 36, "fragment_to_stack", Pass;
    /// The first fragment of an SCTP packet whose ports would change: its checksum covers a length
    /// that is not known yet.
    FragmentSctp = 37, "fragment_sctp", Drop;
}

/// Number of outcomes.
pub const OUTCOMES: u32 = Outcome::ALL.len() as u32;

/// Where a packet is met; the counter's row.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "user", derive(Debug))]
#[repr(u32)]
pub enum Hook {
    /// XDP on an uplink.
    XdpIngress = 0,
    /// tc ingress of an edge.
    TcIngress = 1,
    /// tc egress of an edge.
    TcEgress = 2,
}

impl Hook {
    /// All of them, by number.
    pub const ALL: &[Self] = &[Self::XdpIngress, Self::TcIngress, Self::TcEgress];

    /// The program's and the metric's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::XdpIngress => "xdp_ingress",
            Self::TcIngress => "tc_ingress",
            Self::TcEgress => "tc_egress",
        }
    }
}

/// Number of hooks.
pub const HOOKS: u32 = Hook::ALL.len() as u32;

/// Events that are not a packet's fate; they have their own rows after the outcomes' in the same
/// counters array, one for all hooks.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "user", derive(Debug))]
#[repr(u32)]
pub enum Event {
    /// A flow's source port was translated because its tuple behind the frontend was taken.
    PortTranslated = 0,
    /// A flow moved from `opening` to `established`.
    Promoted = 1,
    /// A UDP flow moved because its backend no longer serves (SEMANTICS G1).
    Moved = 2,
    /// A value's check word was not its key's: another CPU had reused the element.
    CheckMismatch = 3,
    /// A direct connection to a backend took the tuple of a live flow after its SYN had passed:
    /// the order that cannot be detected beforehand.
    Clash = 4,
    /// A flow's entry was made again: it had been evicted, its counterpart had not.
    Mended = 5,
    /// A socket was given a backend: what it sends meets no program that translates.
    SocketTranslated = 6,
    /// A socket was refused: nothing serves where it wants to go.
    SocketRefused = 7,
    /// A socket was left to the packet path, which alone knows the client's address (affinity, source
    /// ranges) or stays silent.
    SocketLeft = 8,
    /// A UDP socket's datagrams moved because their backend no longer serves (SEMANTICS G1).
    SocketMoved = 9,
    /// A socket was left to the packet path because there was no memory to remember it.
    SocketForgotten = 10,
}

impl Event {
    /// All of them, by number.
    pub const ALL: &[Self] = &[
        Self::PortTranslated,
        Self::Promoted,
        Self::Moved,
        Self::CheckMismatch,
        Self::Clash,
        Self::Mended,
        Self::SocketTranslated,
        Self::SocketRefused,
        Self::SocketLeft,
        Self::SocketMoved,
        Self::SocketForgotten,
    ];

    /// The metric's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PortTranslated => "port_translated",
            Self::Promoted => "promoted",
            Self::Moved => "moved",
            Self::CheckMismatch => "check_mismatch",
            Self::Clash => "clash",
            Self::Mended => "mended",
            Self::SocketTranslated => "socket_translated",
            Self::SocketRefused => "socket_refused",
            Self::SocketLeft => "socket_left",
            Self::SocketMoved => "socket_moved",
            Self::SocketForgotten => "socket_forgotten",
        }
    }

    /// Index into the counters array.
    #[must_use]
    #[inline(always)]
    pub const fn index(self) -> u32 {
        HOOKS * OUTCOMES + self as u32
    }
}

/// Entries of the counters array: hook by outcome, then the events, then the [`Tally`] of each map.
pub const COUNTERS: u32 = TALLIES + (Lru::ALL.len() * FAMILIES * Tally::ALL.len()) as u32;

/// Number of families.
const FAMILIES: usize = 2;

/// Where the tallies begin.
const TALLIES: u32 = HOOKS * OUTCOMES + Event::ALL.len() as u32;

/// A kind of map that evicts when it is full, which nobody is told of.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "user", derive(Debug))]
#[repr(u32)]
pub enum Lru {
    /// Flows of which the client has proved nothing.
    Opening = 0,
    /// TCP connections.
    Established = 1,
    /// UDP streams.
    Streams = 2,
    /// Clients' pins.
    Affinity = 3,
    /// Fragmented datagrams.
    Fragments = 4,
}

impl Lru {
    /// All of them, by number.
    pub const ALL: [Self; 5] = [
        Self::Opening,
        Self::Established,
        Self::Streams,
        Self::Affinity,
        Self::Fragments,
    ];

    /// The map of one family.
    #[must_use]
    pub const fn name(self, family: Family) -> &'static str {
        let [v4, v6] = match self {
            Self::Opening => name::OPENING,
            Self::Established => name::ESTABLISHED,
            Self::Streams => name::STREAMS,
            Self::Affinity => name::AFFINITY,
            Self::Fragments => name::FRAGMENTS,
        };
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }
}

/// What the programs count of the entries of an [`Lru`] map, so that its evictions can be estimated.
#[derive(Clone, Copy, Eq, PartialEq)]
#[cfg_attr(feature = "user", derive(Debug))]
#[repr(u32)]
pub enum Tally {
    /// Entries that were not there before.
    Inserted = 0,
    /// Entries that were there until then.
    Removed = 1,
}

impl Tally {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Inserted, Self::Removed];

    /// Index into the counters array.
    #[must_use]
    #[inline(always)]
    pub const fn index(self, map: Lru, family: Family) -> u32 {
        let second = matches!(family, Family::V6) as u32;
        let of_family = map as u32 * FAMILIES as u32 + second;
        TALLIES + of_family * Self::ALL.len() as u32 + self as u32
    }
}

/// Index of a counter: per-CPU u64, packets.
#[must_use]
#[inline(always)]
pub const fn counter(hook: Hook, outcome: Outcome) -> u32 {
    hook as u32 * OUTCOMES + outcome as u32
}

const _: () = {
    let mut i = 0;
    while i < Outcome::ALL.len() {
        assert!(
            Outcome::ALL[i] as usize == i,
            "outcomes are numbered without gaps, in order"
        );
        i += 1;
    }
};
