//! What the agent tells people: logs, findings, status.

pub mod finding;
pub mod logging;
pub mod metrics;
pub mod outcomes;
pub mod programming;
pub mod status;
pub mod tools;
