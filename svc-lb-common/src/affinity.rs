//! Session affinity (ClientIP).

use crate::Address;
use crate::layout::record;

record! {
    /// Key: one client and one service port, whichever frontend it used (SEMANTICS F2).
    pub struct AffinityKey<A> = (8, 20) {
        /// The client's address.
        pub client: A,
        /// Index of the service.
        pub service: u32,
    }
}

record! {
    /// Which backend the client is pinned to.
    pub struct Affinity = 16 {
        /// Backend id.
        pub backend: u32,
        /// The backend's generation.
        pub generation: u16,
        /// Zero.
        pub reserved: u16,
        /// jiffies64 of the latest new connection.
        pub seen: u64,
    }
}

impl<A: Address> AffinityKey<A> {
    /// A key.
    #[must_use]
    #[inline(always)]
    pub const fn new(client: A, service: u32) -> Self {
        Self { client, service }
    }
}
