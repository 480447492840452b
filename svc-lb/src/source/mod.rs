//! Where the cluster's state comes from: each source is a task that sends batches of changes.

pub mod convert;
mod located;
pub mod manifests;
pub mod stream;

use std::fmt;

use serde::Serialize;

/// How much a problem matters.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Severity {
    /// Something was left out that may not have been meant to take effect.
    Warning,
    /// Something was not taken in; what was known before stays.
    Error,
}

/// Something that a source could not take in as it was written.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// Where: `file:line`, or `stream at byte offset`.
    pub place: String,
    /// Kind and name of the object, where they could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Path of the field, as `spec.ports[0].port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// How a source is doing.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Its current list is complete.
    pub listed: bool,
    /// Problems that stand: of files as they are now, or the latest ones of a stream.
    pub problems: Vec<Problem>,
    /// Values that could not be read, since the start.
    pub malformed: u64,
    /// Changes sent, since the start.
    pub changes: u64,
}
