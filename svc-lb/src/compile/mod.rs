//! Service, endpoints and node facts in; logical tables out. Pure, synchronous, deterministic.
//!
//! Knows all of SEMANTICS section 1. Imports neither aya nor kube (`cargo xtask lint` checks).

pub mod desired;
