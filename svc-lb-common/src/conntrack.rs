//! Flow entries of the `opening`, `established` and `streams` maps.

use crate::hash::{M1, M2, M3};
use crate::layout::record;
use crate::{Address, Be16};

/// The entry matches packets that come in at an edge: a client's, and the answers of a hairpin.
pub const INBOUND: u8 = 0;
/// The entry matches packets that leave through an edge: a backend's answers.
pub const OUTBOUND: u8 = 1;

record! {
    /// Key of a flow entry: the packet's tuple *before* translation and where it is met.
    ///
    /// The forward entry's key holds the frontend, so that two frontends of one backend never
    /// share an entry (SEMANTICS C15).
    pub struct FlowKey<A> = (16, 40) {
        /// Source address.
        pub source: A,
        /// Destination address.
        pub destination: A,
        /// Source port.
        pub source_port: Be16,
        /// Destination port.
        pub destination_port: Be16,
        /// IANA protocol number.
        pub protocol: u8,
        /// [`INBOUND`] or [`OUTBOUND`].
        pub direction: u8,
        /// Zero.
        pub reserved: [u8; 2],
    }
}

record! {
    /// Value of a flow entry: the whole translation. Only `state`, `seen` and `proof` change after
    /// insert.
    pub struct Flow<A> = (40, 64) {
        /// [`Flow::expected_check`] of the key and of everything that does not change.
        pub check: u32,
        /// Source address after translation.
        pub source: A,
        /// Destination address after translation.
        pub destination: A,
        /// Source port after translation.
        pub source_port: Be16,
        /// Destination port after translation.
        pub destination_port: Be16,
        /// Backend id.
        pub backend: u32,
        /// Index of the service.
        pub service: u32,
        /// The backend's generation when the flow was opened.
        pub generation: u16,
        /// Traits of the flow that never change: see [`flow`].
        pub traits: u16,
        /// State bits; see [`state`].
        pub state: u32,
        /// Low 32 bits of jiffies when a packet of the flow, either way, last matched; one second
        /// coarse.
        pub seen: u32,
        /// What the client must show before the flow leaves `opening`. TCP: the sequence number
        /// that the backend last said, host byte order, of which the client must acknowledge one
        /// within [`PROOF_WINDOW`]. SCTP: the verification tag that the backend gave it, as it lies in
        /// packets. UDP: low 32 bits of jiffies when the flow was opened, of which
        /// [`PROOF_SECONDS`] must have passed.
        pub proof: u32,
    }
}

/// How far from the backend's latest sequence number an acknowledgement may lie, either way, and
/// still prove that the client gets the backend's answers. A handshake's third segment lies on it;
/// data of a first flight lies before it. Who guesses is right once in 2^15 times.
pub const PROOF_WINDOW: u32 = 1 << 16;

/// How many seconds a UDP flow must be old, with packets both ways, to be a stream. A datagram
/// proves nothing about who sent it; netfilter takes the same two seconds.
pub const PROOF_SECONDS: u32 = 2;

/// Traits of a flow, fixed when it is opened.
pub mod flow {
    /// This entry matches the backend's answers, not the client's packets.
    pub const REVERSE: u16 = 1 << 0;
    /// The client is its own backend: turned around at the edge by redirect.
    pub const HAIRPIN: u16 = 1 << 1;
    /// The client's edge is a port of a bridge: try to stay at layer 2.
    pub const BRIDGED: u16 = 1 << 2;
    /// No service: a direct connection to a backend whose tuple was taken.
    pub const DIRECT: u16 = 1 << 3;
    /// Opened by a TCP SYN: the first answer must be SYN+ACK or RST.
    pub const SYN: u16 = 1 << 4;
    /// The service has ClientIP affinity: the client is pinned when the flow is promoted.
    pub const AFFINE: u16 = 1 << 5;
    /// The source is translated to this node's address: packets leave by redirect, never by way
    /// of the stack, and answers come in at an edge.
    pub const SNAT: u16 = 1 << 6;
}

/// State bits of a flow; each entry of a pair has its own copy.
pub mod state {
    /// The backend has answered, with anything but a RST.
    pub const ANSWERED: u32 = 1 << 0;
    /// The client has sent FIN.
    pub const CLIENT_FIN: u32 = 1 << 1;
    /// The backend has sent FIN.
    pub const BACKEND_FIN: u32 = 1 << 2;
    /// Either side has sent RST, and neither anything else since.
    pub const RESET: u32 = 1 << 3;

    /// Whether a TCP connection with these bits is over, so that a SYN may open the next one.
    #[must_use]
    #[inline(always)]
    pub const fn closed(bits: u32) -> bool {
        bits & RESET != 0 || bits & (CLIENT_FIN | BACKEND_FIN) == CLIENT_FIN | BACKEND_FIN
    }
}

impl<A: Address> FlowKey<A> {
    /// A key.
    #[must_use]
    #[inline(always)]
    pub const fn new(
        source: A,
        destination: A,
        source_port: Be16,
        destination_port: Be16,
        protocol: u8,
        direction: u8,
    ) -> Self {
        Self {
            source,
            destination,
            source_port,
            destination_port,
            protocol,
            direction,
            reserved: [0; 2],
        }
    }

    #[inline(always)]
    fn ports(&self) -> u64 {
        self.source_port.0 as u64
            | (self.destination_port.0 as u64) << 16
            | (self.protocol as u64) << 32
            | (self.direction as u64) << 40
    }
}

impl<A: Address> Flow<A> {
    /// The key of the pair's other entry.
    #[must_use]
    #[inline(always)]
    pub fn peer_key(&self, protocol: u8) -> FlowKey<A> {
        let direction = match self.traits & (flow::REVERSE | flow::HAIRPIN | flow::SNAT) {
            0 => OUTBOUND,
            _ => INBOUND,
        };
        FlowKey::new(
            self.destination,
            self.source,
            self.destination_port,
            self.source_port,
            protocol,
            direction,
        )
    }

    /// Whether this is the other entry of `key`'s flow, and not another flow's that has its place.
    #[must_use]
    #[inline(always)]
    pub fn answers(&self, key: &FlowKey<A>) -> bool {
        self.source == key.destination
            && self.destination == key.source
            && self.source_port == key.destination_port
            && self.destination_port == key.source_port
    }

    /// The check word that belongs to `key` and to this value's unchanging fields.
    ///
    /// The kernel reuses freed map elements at once, so a value pointer may show somebody
    /// else's entry, or half of one and half of another. A reader copies the value and treats
    /// a check that is not the expected one as a miss. Each 64-bit word has its own odd
    /// multiplier, so a torn copy passes with a chance of 2^-32.
    #[must_use]
    #[inline(always)]
    pub fn expected_check(&self, key: &FlowKey<A>) -> u32 {
        let ports = self.source_port.0 as u64
            | (self.destination_port.0 as u64) << 16
            | (self.service as u64) << 32;
        let identity =
            self.backend as u64 | (self.generation as u64) << 32 | (self.traits as u64) << 48;
        let sum = (key.source.fold().wrapping_mul(M1))
            .wrapping_add(key.destination.fold().wrapping_mul(M2))
            .wrapping_add(key.ports().wrapping_mul(M3))
            .wrapping_add(self.source.fold().wrapping_mul((M1 ^ M2) | 1))
            .wrapping_add(self.destination.fold().wrapping_mul((M2 ^ M3) | 1))
            .wrapping_add(ports.wrapping_mul((M1 ^ M3) | 1))
            .wrapping_add(identity.wrapping_mul(M1 ^ M2 ^ M3));
        (sum >> 32) as u32 ^ sum as u32
    }

    /// The value with its check word set for `key`.
    #[must_use]
    #[inline(always)]
    pub fn sealed(mut self, key: &FlowKey<A>) -> Self {
        self.check = self.expected_check(key);
        self
    }

    /// Whether this copy really is `key`'s value.
    #[must_use]
    #[inline(always)]
    pub fn belongs_to(&self, key: &FlowKey<A>) -> bool {
        self.check == self.expected_check(key)
    }
}
