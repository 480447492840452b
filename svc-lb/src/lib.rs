//! The svc-lb agent: keeps the BPF maps of one node equal to what the controller's stream says.

pub mod app;
pub mod cli;
pub mod compile;
pub mod dataplane;
pub mod health;
pub mod model;
pub mod node;
pub mod observe;
pub mod plan;
pub mod source;
pub mod standalone;
