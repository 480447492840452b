//! Sockets that were given a backend in place of the frontend they asked for.

use crate::hash::{M1, M2, M3};
use crate::layout::record;
use crate::{Address, Be16};

/// Where a program meets a socket's call.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "user", derive(Debug))]
pub enum SocketHook {
    /// connect(2), IPv4.
    Connect4,
    /// connect(2), IPv6.
    Connect6,
    /// sendmsg(2) and its like with an address, UDP over IPv4.
    Sendmsg4,
    /// The same over IPv6.
    Sendmsg6,
    /// recvmsg(2) and its like that ask for the address, UDP over IPv4.
    Recvmsg4,
    /// The same over IPv6.
    Recvmsg6,
    /// getpeername(2), IPv4.
    Getpeername4,
    /// getpeername(2), IPv6.
    Getpeername6,
}

impl SocketHook {
    /// All of them. What tells a socket's owner of the frontend comes first, so that no socket
    /// gets a backend whose address it is then shown.
    pub const ALL: [Self; 8] = [
        Self::Getpeername4,
        Self::Getpeername6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Connect4,
        Self::Connect6,
    ];

    /// The program's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect4 => "sock_connect4",
            Self::Connect6 => "sock_connect6",
            Self::Sendmsg4 => "sock_sendmsg4",
            Self::Sendmsg6 => "sock_sendmsg6",
            Self::Recvmsg4 => "sock_recvmsg4",
            Self::Recvmsg6 => "sock_recvmsg6",
            Self::Getpeername4 => "sock_getpeer4",
            Self::Getpeername6 => "sock_getpeer6",
        }
    }
}

/// The entry tells which frontend a backend's address stands for.
pub const FRONTEND_OF: u16 = 0;
/// The entry tells which backend a frontend's datagrams go to.
pub const BACKEND_OF: u16 = 1;

record! {
    /// Key: a socket and an address that it, or the wire, knows.
    pub struct SocketKey<A> = (16, 28) {
        /// The socket's cookie, low half first: no other socket ever has it.
        pub cookie: [u32; 2],
        /// Address.
        pub address: A,
        /// Port.
        pub port: Be16,
        /// [`FRONTEND_OF`] or [`BACKEND_OF`].
        pub direction: u16,
    }
}

record! {
    /// What the address stands for. Made by [`SocketEntry::sealed`].
    pub struct SocketEntry<A> = (20, 32) {
        /// The frontend's address, or the backend's.
        pub address: A,
        /// Its port.
        pub port: Be16,
        /// The backend's generation when it was chosen.
        pub generation: u16,
        /// Backend id.
        pub backend: u32,
        /// Index of the service.
        pub service: u32,
        /// Belongs to the key and the other fields: the kernel may show a reader an element that
        /// was just given to another key.
        pub check: u32,
    }
}

impl<A: Address> SocketKey<A> {
    /// A key.
    #[must_use]
    #[inline(always)]
    pub const fn new(cookie: u64, address: A, port: Be16, direction: u16) -> Self {
        Self {
            cookie: [cookie as u32, (cookie >> 32) as u32],
            address,
            port,
            direction,
        }
    }

    /// The socket's cookie.
    #[must_use]
    #[inline(always)]
    pub const fn cookie(&self) -> u64 {
        let [low, high] = self.cookie;
        low as u64 | (high as u64) << 32
    }
}

impl<A: Address> SocketEntry<A> {
    #[inline(always)]
    fn expected_check(&self, key: &SocketKey<A>) -> u32 {
        let ports = key.port.0 as u64 | (key.direction as u64) << 16 | (self.port.0 as u64) << 32;
        let identity =
            self.backend as u64 | (self.generation as u64) << 32 | (self.service as u64) << 48;
        let sum = (key.cookie().wrapping_mul(M1))
            .wrapping_add(key.address.fold().wrapping_mul(M2))
            .wrapping_add(ports.wrapping_mul(M3))
            .wrapping_add(self.address.fold().wrapping_mul((M1 ^ M2) | 1))
            .wrapping_add(identity.wrapping_mul((M2 ^ M3) | 1));
        (sum >> 32) as u32 ^ sum as u32
    }

    /// The value with its check word set for `key`.
    #[must_use]
    #[inline(always)]
    pub fn sealed(mut self, key: &SocketKey<A>) -> Self {
        self.check = self.expected_check(key);
        self
    }

    /// Whether this copy really is `key`'s value.
    #[must_use]
    #[inline(always)]
    pub fn belongs_to(&self, key: &SocketKey<A>) -> bool {
        self.check == self.expected_check(key)
    }
}
