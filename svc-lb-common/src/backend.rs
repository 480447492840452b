//! Backends: one endpoint of one service port.

use crate::layout::record;
use crate::{Address, Be16};

record! {
    /// A backend. Belongs to one service port and one endpoint; id 0 is never used.
    ///
    /// The address is written only while the backend is [`GONE`] and no flow can name its
    /// generation; everything that changes under traffic lies in `meta`, one aligned u64.
    pub struct Backend<A> = (24, 32) {
        /// Port, generation and bits; see [`meta`].
        pub meta: u64,
        /// Address.
        pub address: A,
        /// Index of the service it belongs to, so that a restarted agent can tell whose it is.
        pub service: u32,
        /// Index into `next_hops`; 0 for none known.
        pub next_hop: u32,
        /// Zero.
        pub reserved: A::Fill,
    }
}

/// In the Cluster set.
pub const IN_CLUSTER: u32 = 1 << 0;
/// In the Local set.
pub const IN_LOCAL: u32 = 1 << 1;
/// Serves its service, policy and topology aside: a UDP flow may stay (SEMANTICS G1).
pub const SERVING: u32 = 1 << 2;
/// The endpoint is no longer an endpoint of the service.
pub const GONE: u32 = 1 << 3;
/// The endpoint is on this node.
pub const LOCAL: u32 = 1 << 4;

/// Packs port, generation and bits into [`Backend::meta`].
#[must_use]
#[inline(always)]
pub const fn meta(port: Be16, generation: u16, bits: u32) -> u64 {
    port.0 as u64 | (generation as u64) << 16 | (bits as u64) << 32
}

/// The generation in a [`Backend::meta`].
#[must_use]
#[inline(always)]
pub const fn generation_of(meta: u64) -> u16 {
    (meta >> 16) as u16
}

impl<A: Address> Backend<A> {
    /// A backend.
    #[must_use]
    pub fn new(address: A, port: Be16, generation: u16, bits: u32, service: u32) -> Self {
        Self {
            meta: meta(port, generation, bits),
            address,
            service,
            next_hop: 0,
            reserved: A::Fill::default(),
        }
    }

    /// Its port.
    #[must_use]
    #[inline(always)]
    pub const fn port(&self) -> Be16 {
        Be16(self.meta as u16)
    }

    /// How often the id was given to another endpoint, modulo 2^16.
    #[must_use]
    #[inline(always)]
    pub const fn generation(&self) -> u16 {
        generation_of(self.meta)
    }

    /// Its bits.
    #[must_use]
    #[inline(always)]
    pub const fn bits(&self) -> u32 {
        (self.meta >> 32) as u32
    }
}
