//! The test harness of svc-lb: a small network made of namespaces, with real servers and clients in it.
//!
//! See [`lab`] for how a test builds the network it needs, and [`prog`] for how it runs single programs on made-up
//! packets, [`cases`] for objects in, tables out, and [`apiserver`] for a cluster's API server.

pub mod apiserver;
pub mod cases;
pub mod lab;
pub mod prog;
