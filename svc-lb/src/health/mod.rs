//! What load balancers and probes ask over HTTP, answered as kube-proxy does.
//!
//! - `proxy`: whether this node's proxy keeps up; `/healthz` and `/livez` (SEMANTICS G7).
//! - `services`: each Service's healthCheckNodePort (SEMANTICS G6).
//! - `listen`: the sockets behind both.
//!
//! Read-only and without secrets: unlike the admin socket these are meant to be reached from
//! outside the node.

mod listen;
pub mod proxy;
pub mod services;

use std::time::Duration;

use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};

pub use self::listen::ListenOn;

/// Pause before a socket that could not be bound is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What every answer carries.
const HEADERS: [(HeaderName, HeaderValue); 2] = [
    (CONTENT_TYPE, HeaderValue::from_static("application/json")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
];
