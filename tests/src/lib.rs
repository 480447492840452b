//! The test harness of svc-lb: a small network made of namespaces, with real servers and clients in it.
//!
//! See [`lab`] for how a test builds the network it needs.

pub mod lab;
