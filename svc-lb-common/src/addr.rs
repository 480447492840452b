//! Addresses, ports, families and transport protocols as the records hold them.

/// An address family.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "user", derive(Debug, serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "user", serde(rename_all = "lowercase"))]
#[repr(u8)]
pub enum Family {
    /// IPv4.
    V4 = 4,
    /// IPv6.
    V6 = 6,
}

/// A transport protocol that Services know; the value is IANA's number.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "user", derive(Debug, serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "user", serde(rename_all = "UPPERCASE"))]
#[repr(u8)]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp = 6,
    /// User Datagram Protocol.
    Udp = 17,
    /// Stream Control Transmission Protocol.
    Sctp = 132,
}

impl Protocol {
    /// The protocol with this IANA number, if Services know it.
    #[must_use]
    #[inline(always)]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// A port in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Default, Eq, PartialEq)]
pub struct Be16(pub u16);

impl Be16 {
    /// From a port in host byte order.
    #[must_use]
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    /// The port in host byte order.
    #[must_use]
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// An IPv4 address, network byte order in memory.
#[repr(transparent)]
#[derive(Clone, Copy, Default, Eq, PartialEq)]
pub struct Addr4(pub u32);

/// An IPv6 address as four words, network byte order in memory.
///
/// Words, not one `[u8; 16]`: they are compared and hashed word by word on the packet path.
#[repr(transparent)]
#[derive(Clone, Copy, Default, Eq, PartialEq)]
pub struct Addr6(pub [u32; 4]);

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Addr4 {}
    impl Sealed for super::Addr6 {}
}

/// An address of one family: what makes a record generic over both.
pub trait Address: sealed::Sealed + Copy + Eq + 'static {
    /// Which family.
    const FAMILY: Family;
    /// The unspecified address, which no packet can name as a frontend: keys use it for "any
    /// NodePort address of this node".
    const UNSPECIFIED: Self;
    /// Fills [`crate::backend::Backend`] up to a multiple of 8 bytes.
    type Fill: Copy + Eq + Default + FillBytes;

    /// The address folded into 64 bits, for hashing; bijective for IPv4.
    fn fold(self) -> u64;

    /// The sum of the address's 16-bit words as they lie in memory, for Internet checksums; not
    /// folded: at most 8 * 0xffff.
    fn word_sum(self) -> u32;
}

/// What a [`Address::Fill`] must be able to do under the feature `user`.
#[cfg(feature = "user")]
pub trait FillBytes: core::fmt::Debug {}
/// What a [`Address::Fill`] must be able to do under the feature `user`: nothing here.
#[cfg(not(feature = "user"))]
pub trait FillBytes {}
impl<const N: usize> FillBytes for [u8; N] {}

#[inline(always)]
const fn words(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

impl Address for Addr4 {
    const FAMILY: Family = Family::V4;
    const UNSPECIFIED: Self = Self(0);
    type Fill = [u8; 4];

    #[inline(always)]
    fn fold(self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    fn word_sum(self) -> u32 {
        words(self.0)
    }
}

impl Address for Addr6 {
    const FAMILY: Family = Family::V6;
    const UNSPECIFIED: Self = Self([0; 4]);
    type Fill = [u8; 0];

    #[inline(always)]
    fn fold(self) -> u64 {
        let [a, b, c, d] = self.0;
        let high = (a as u64) << 32 | b as u64;
        let low = (c as u64) << 32 | d as u64;
        high.wrapping_mul(crate::hash::M1) ^ low.wrapping_mul(crate::hash::M2)
    }

    #[inline(always)]
    fn word_sum(self) -> u32 {
        let [a, b, c, d] = self.0;
        words(a) + words(b) + words(c) + words(d)
    }
}

#[cfg(feature = "user")]
mod user {
    use core::fmt;
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::{Addr4, Addr6, Be16, Family, Protocol};

    impl fmt::Display for Family {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(match self {
                Self::V4 => "IPv4",
                Self::V6 => "IPv6",
            })
        }
    }

    impl Family {
        /// The family of an address.
        #[must_use]
        pub const fn of(address: IpAddr) -> Self {
            match address {
                IpAddr::V4(_) => Self::V4,
                IpAddr::V6(_) => Self::V6,
            }
        }
    }

    impl fmt::Display for Protocol {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(match self {
                Self::Tcp => "TCP",
                Self::Udp => "UDP",
                Self::Sctp => "SCTP",
            })
        }
    }

    impl fmt::Debug for Be16 {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Display::fmt(&self.get(), f)
        }
    }

    impl From<Ipv4Addr> for Addr4 {
        fn from(address: Ipv4Addr) -> Self {
            Self(u32::from_ne_bytes(address.octets()))
        }
    }

    impl From<Addr4> for Ipv4Addr {
        fn from(address: Addr4) -> Self {
            Self::from(address.0.to_ne_bytes())
        }
    }

    impl fmt::Debug for Addr4 {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Display::fmt(&Ipv4Addr::from(*self), f)
        }
    }

    impl From<Ipv6Addr> for Addr6 {
        fn from(address: Ipv6Addr) -> Self {
            let bytes = address.octets();
            let (words, _) = bytes.as_chunks::<4>();
            let mut out = [0; 4];
            for (slot, word) in out.iter_mut().zip(words) {
                *slot = u32::from_ne_bytes(*word);
            }
            Self(out)
        }
    }

    impl From<Addr6> for Ipv6Addr {
        fn from(address: Addr6) -> Self {
            let mut bytes = [0; 16];
            for (slot, word) in bytes.chunks_exact_mut(4).zip(address.0) {
                slot.copy_from_slice(&word.to_ne_bytes());
            }
            Self::from(bytes)
        }
    }

    impl fmt::Debug for Addr6 {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Display::fmt(&Ipv6Addr::from(*self), f)
        }
    }

    /// An address that user space can turn into and make from `std`'s.
    pub trait HostAddress: super::Address + fmt::Debug + aya::Pod + Send {
        /// To `std`'s.
        fn to_ip(self) -> IpAddr;
        /// From `std`'s; `None` for the other family.
        fn from_ip(address: IpAddr) -> Option<Self>;
    }

    // SAFETY: transparent over plain integers.
    unsafe impl aya::Pod for Addr4 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Addr6 {}

    impl HostAddress for Addr4 {
        fn to_ip(self) -> IpAddr {
            IpAddr::V4(self.into())
        }

        fn from_ip(address: IpAddr) -> Option<Self> {
            match address {
                IpAddr::V4(address) => Some(address.into()),
                IpAddr::V6(_) => None,
            }
        }
    }

    impl HostAddress for Addr6 {
        fn to_ip(self) -> IpAddr {
            IpAddr::V6(self.into())
        }

        fn from_ip(address: IpAddr) -> Option<Self> {
            match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(address) => Some(address.into()),
            }
        }
    }
}

#[cfg(feature = "user")]
pub use user::HostAddress;
