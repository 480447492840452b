//! Scenarios with real sockets in the lab. Each test's documentation names the row of the semantics it shows:
//! the letters and numbers of the table of features (C10: hairpin, G1: stale UDP flows, ...).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "netns/admission.rs"]
mod admission;
#[path = "netns/clashes.rs"]
mod clashes;
#[path = "netns/cluster.rs"]
mod cluster;
#[path = "netns/conformance.rs"]
mod conformance;
#[path = "netns/endings.rs"]
mod endings;
#[path = "netns/endpoints.rs"]
mod endpoints;
#[path = "netns/errors.rs"]
mod errors;
#[path = "netns/flows.rs"]
mod flows;
#[path = "netns/fragments.rs"]
mod fragments;
#[path = "netns/harness.rs"]
mod harness;
#[path = "netns/health.rs"]
mod health;
#[path = "netns/kubernetes.rs"]
mod kubernetes;
#[path = "netns/overlay.rs"]
mod overlay;
#[path = "netns/reach.rs"]
mod reach;
#[path = "netns/refusal.rs"]
mod refusal;
#[path = "netns/remote.rs"]
mod remote;
#[path = "netns/selection.rs"]
mod selection;
#[path = "netns/servers.rs"]
mod servers;
#[path = "netns/socket_hooks.rs"]
mod socket_hooks;
#[path = "netns/sockets.rs"]
mod sockets;
#[path = "netns/stack.rs"]
mod stack;
#[path = "netns/uplinks.rs"]
mod uplinks;
