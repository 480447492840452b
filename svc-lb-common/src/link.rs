//! Links: every interface that a packet may leave through.

use crate::layout::record;
use crate::{Addr4, Addr6};

record! {
    /// Value of the `links` hash, keyed by interface index (u32, host order).
    pub struct Link = 28 {
        /// IPv4 address that translated sources get on this interface; unspecified for none.
        pub v4: Addr4,
        /// The same for IPv6.
        pub v6: Addr6,
        /// Bits of [`link`](self).
        pub bits: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// XDP can send frames out of it: our own program runs there, so its driver is ready for them.
pub const XDP: u32 = 1 << 0;
