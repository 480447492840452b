//! Validated cluster state: Services, endpoints, node facts, indexed by what a change concerns.
//!
//! Imports neither aya nor kube (`cargo xtask lint` checks).
