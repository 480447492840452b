//! Every byte that the kernel programs and the agent share: map records, the numbered outcomes,
//! and the pure functions that both sides must compute alike.
//!
//! Integers in records are in host byte order unless their type says otherwise ([`Be16`],
//! [`Addr4`], [`Addr6`]: network byte order in memory). Every record is `repr(C)`, has no hidden
//! padding, and is proved so at compile time.
#![no_std]
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]
#![expect(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "records are packed and unpacked on purpose; indexing is in constants only"
)]

mod addr;
pub mod affinity;
pub mod backend;
pub mod checksum;
pub mod config;
pub mod conntrack;
pub mod crc32c;
pub mod edge;
pub mod fragment;
pub mod guard;
pub mod hash;
mod layout;
pub mod limits;
pub mod link;
pub mod outcome;
pub mod service;
pub mod socket;
pub mod source_range;

#[cfg(feature = "user")]
pub use addr::HostAddress;
pub use addr::{Addr4, Addr6, Address, Be16, Family, FillBytes, Protocol};
