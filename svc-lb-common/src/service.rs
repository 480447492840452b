//! Frontends, services and slots.

use crate::hash::{M1, M2, M3};
use crate::layout::record;
use crate::{Address, Be16};

record! {
    /// Key of a frontend: where clients send to.
    ///
    /// Three kinds share the map: a frontend (address, port, protocol); a NodePort (address
    /// unspecified, port, protocol); and an address entry (address, port 0, protocol 0), which
    /// tells what an address is when no port matches.
    pub struct FrontendKey<A> = (8, 20) {
        /// Address, or [`Address::UNSPECIFIED`] for any NodePort address of this node.
        pub address: A,
        /// Port.
        pub port: Be16,
        /// IANA protocol number.
        pub protocol: u8,
        /// Zero.
        pub reserved: u8,
    }
}

impl<A: Address> FrontendKey<A> {
    /// The key of a frontend.
    #[must_use]
    #[inline(always)]
    pub const fn new(address: A, port: Be16, protocol: u8) -> Self {
        Self {
            address,
            port,
            protocol,
            reserved: 0,
        }
    }

    /// The key of a NodePort, on whichever of the node's addresses.
    #[must_use]
    #[inline(always)]
    pub const fn node_port(port: Be16, protocol: u8) -> Self {
        Self::new(A::UNSPECIFIED, port, protocol)
    }

    /// The key of an address entry.
    #[must_use]
    #[inline(always)]
    pub const fn address(address: A) -> Self {
        Self::new(address, Be16(0), 0)
    }
}

/// What a frontend (or an address entry) is; [`Frontend::kind`].
pub mod kind {
    /// A ClusterIP: internalTrafficPolicy applies.
    pub const CLUSTER_IP: u8 = 1;
    /// A NodePort: externalTrafficPolicy applies.
    pub const NODE_PORT: u8 = 2;
    /// A load balancer's address: externalTrafficPolicy and source ranges apply.
    pub const LOAD_BALANCER: u8 = 3;
    /// An external IP: externalTrafficPolicy applies.
    pub const EXTERNAL_IP: u8 = 4;
}

record! {
    /// Value of a frontend. Made by [`Frontend::new`].
    pub struct Frontend = 12 {
        /// Index into `services`; 0 in an address entry.
        pub service: u32,
        /// One of [`kind`]. An address entry holds [`kind::NODE_PORT`] for an address of this
        /// node, and a frontend's kind for a frontend's address.
        pub kind: u32,
        /// Belongs to the key and the other fields: the kernel may show a reader an element that
        /// was just freed and given to another key.
        pub check: u32,
    }
}

impl Frontend {
    /// The value for `key`.
    #[must_use]
    #[inline(always)]
    pub fn new<A: Address>(key: &FrontendKey<A>, service: u32, kind: u8) -> Self {
        let kind = kind as u32;
        Self {
            service,
            kind,
            check: Self::expected_check(key, service, kind),
        }
    }

    /// Whether this copy really is `key`'s value.
    #[must_use]
    #[inline(always)]
    pub fn belongs_to<A: Address>(&self, key: &FrontendKey<A>) -> bool {
        self.check == Self::expected_check(key, self.service, self.kind)
    }

    #[inline(always)]
    fn expected_check<A: Address>(key: &FrontendKey<A>, service: u32, kind: u32) -> u32 {
        let port = (key.port.0 as u64) << 8 | key.protocol as u64;
        let value = (service as u64) << 8 | kind as u64;
        let sum = (key.address.fold().wrapping_mul(M1))
            .wrapping_add(port.wrapping_mul(M2))
            .wrapping_add(value.wrapping_mul(M3));
        (sum >> 32) as u32
    }
}

/// A run of slots, published in one u64 store: start (32 bits), length (16), sequence (16).
#[repr(transparent)]
#[derive(Clone, Copy, Default, Eq, PartialEq)]
#[cfg_attr(feature = "user", derive(Debug))]
pub struct Range(pub u64);

impl Range {
    /// Packs a range. `sequence` counts the times this service's range was published.
    #[must_use]
    #[inline(always)]
    pub const fn new(start: u32, length: u16, sequence: u16) -> Self {
        Self(start as u64 | (length as u64) << 32 | (sequence as u64) << 48)
    }

    /// Position of the first slot.
    #[must_use]
    #[inline(always)]
    pub const fn start(self) -> u32 {
        self.0 as u32
    }

    /// Number of slots; 0 where the set is empty.
    #[must_use]
    #[inline(always)]
    pub const fn length(self) -> u32 {
        (self.0 >> 32) as u32 & 0xffff
    }

    /// How often the range was published, modulo 2^16.
    #[must_use]
    #[inline(always)]
    pub const fn sequence(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

record! {
    /// One service port of one family. Each field is one aligned u64: user space can publish
    /// nothing wider without tearing.
    pub struct Service = 24 {
        /// The Cluster set.
        pub cluster: Range,
        /// The Local set.
        pub local: Range,
        /// Low 32 bits: [`flag`]s; high 32 bits: affinity timeout in seconds, 0 for none.
        pub options: u64,
    }
}

/// Flags of a [`Service`].
pub mod flag {
    /// internalTrafficPolicy: Local.
    pub const INTERNAL_LOCAL: u32 = 1 << 0;
    /// externalTrafficPolicy: Local.
    pub const EXTERNAL_LOCAL: u32 = 1 << 1;
    /// Some endpoint of the cluster is ready or serving: an empty set is met with silence
    /// instead of a reject (SEMANTICS 1.1).
    pub const HAS_ANY: u32 = 1 << 2;
    /// Load balancer frontends admit only the addresses in `source_ranges`.
    pub const SOURCE_RANGES: u32 = 1 << 3;
    /// Every node picks the same backend for the same tuple: the hash is that of the cluster's
    /// seed, and depends on nothing that only this node knows.
    pub const MAGLEV: u32 = 1 << 4;
}

impl Service {
    /// Packs a service.
    #[must_use]
    pub const fn new(cluster: Range, local: Range, flags: u32, affinity_seconds: u32) -> Self {
        Self {
            cluster,
            local,
            options: flags as u64 | (affinity_seconds as u64) << 32,
        }
    }

    /// Its [`flag`]s.
    #[must_use]
    #[inline(always)]
    pub const fn flags(&self) -> u32 {
        self.options as u32
    }

    /// Affinity timeout in seconds; 0 where the service has no affinity.
    #[must_use]
    #[inline(always)]
    pub const fn affinity_seconds(&self) -> u32 {
        (self.options >> 32) as u32
    }
}

/// Backend ids in one element of the `slots` array.
pub const SLOTS_PER_WORD: u32 = 2;

/// The backend id at `position`, given the word that holds it (`position / SLOTS_PER_WORD`).
#[must_use]
#[inline(always)]
pub const fn slot(word: u64, position: u32) -> u32 {
    (word >> ((position & 1) * 32)) as u32
}
