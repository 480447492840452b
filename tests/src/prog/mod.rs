//! The programs on made-up packets: loaded over small maps, filled by the agent's own planner, run by
//! BPF_PROG_TEST_RUN.
//!
//! [`network::private`] gives a test the interfaces, [`Rig`] the programs and maps, [`Frame`] the packets.
//! [`mod@reference`] is the same dataplane in plain Rust, and [`differential`] runs [`random`] packets through both.

#![expect(
    clippy::missing_panics_doc,
    clippy::indexing_slicing,
    reason = "a harness: whatever goes wrong is a failed test and panics with its reason"
)]

pub mod differential;
pub mod frame;
pub mod network;
pub mod race;
pub mod random;
pub mod reference;
pub mod replay;
pub mod rig;
pub mod tables;

pub use frame::Frame;
pub use network::Network;
pub use rig::{Rig, Verdict};
