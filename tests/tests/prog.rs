//! The programs on made-up packets, in the order of a packet's life: what one program puts out is what the next one gets.
//!
//! Each test names the rule it proves: a row of the decision table (ClusterIP or external frontend, source, policy), or a
//! rule of ARCHITECTURE.md.

#![expect(
    clippy::unwrap_used,
    reason = "what helpers of tests unwrap fails the test"
)]

#[path = "prog/admission.rs"]
mod admission;
#[path = "prog/bench.rs"]
mod bench;
#[path = "prog/clashes.rs"]
mod clashes;
#[path = "prog/collect.rs"]
mod collect;
#[path = "prog/endings.rs"]
mod endings;
#[path = "prog/eviction.rs"]
mod eviction;
#[path = "prog/floods.rs"]
mod floods;
#[path = "prog/fragments.rs"]
mod fragments;
#[path = "prog/headers.rs"]
mod headers;
#[path = "prog/icmp.rs"]
mod icmp;
#[path = "prog/policies.rs"]
mod policies;
#[path = "prog/refusals.rs"]
mod refusals;
#[path = "prog/remote.rs"]
mod remote;
#[path = "prog/walks.rs"]
mod walks;
