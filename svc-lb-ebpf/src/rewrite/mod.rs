//! Changing a packet: addresses, ports, TTL, MAC addresses.

mod icmp;
mod mac;
mod nat;
mod ttl;

pub(crate) use self::icmp::relate;
pub(crate) use self::mac::{set_both, set_destination, swap};
pub(crate) use self::nat::translate;
pub(crate) use self::ttl::TimeToLive;
