//! What load balancers and probes ask over HTTP, answered as kube-proxy does.
//!
//! - `proxy`: whether this node's proxy keeps up; `/healthz` and `/livez` (SEMANTICS G7).
//! - `services`: each Service's healthCheckNodePort (SEMANTICS G6).
//! - `listen`: the sockets behind both.
//!
//! Read-only and without secrets: unlike the admin socket these are meant to be reached from
//! outside the node.

pub(crate) mod listen;
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

/// A port for a test that nobody has at these addresses. Not one of those that clients get, or a
/// connection of another test might have it a moment later.
#[cfg(test)]
fn free_port<const N: usize>(addresses: [std::net::IpAddr; N]) -> u16 {
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU32, Ordering};

    static TRIED: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = std::process::id() * 16 + TRIED.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + u16::try_from(number % 20_000).expect("less than 20,000");
        let free = |address| TcpListener::bind((address, port)).is_ok();
        if addresses.into_iter().all(free) {
            return port;
        }
    }
}
