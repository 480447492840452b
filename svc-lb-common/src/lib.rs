//! Every byte that the kernel programs and the agent share.
#![no_std]
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]

#[cfg(feature = "user")]
extern crate std;

mod addr;

pub use addr::{Family, Protocol};
