//! Where the cluster's state comes from: each source is a task that sends batches of changes.

pub mod convert;
mod json;
pub mod kubernetes;
pub(crate) mod located;
pub mod manifests;
pub mod stream;

use std::{fmt, path::PathBuf, time::Duration};

use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use self::{kubernetes::Kubernetes, manifests::Manifests, stream::Stream};
use crate::model::{Batch, SourceId};

/// One source, as the command line asks for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Spec {
    /// `--source kubernetes`.
    Kubernetes(kubernetes::Settings),
    /// `--manifests PATH`.
    Manifests(PathBuf),
    /// `--stream TARGET`.
    Stream {
        /// Where from.
        target: stream::Target,
        /// `--stream-initial-quiet`.
        initial_quiet: Option<Duration>,
    },
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubernetes(_) => f.write_str("--source kubernetes"),
            Self::Manifests(path) => write!(f, "--manifests {}", path.display()),
            Self::Stream { target, .. } => write!(f, "--stream {target}"),
        }
    }
}

/// Why a source cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--source kubernetes`.
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::AccessError),
    /// `--manifests`.
    #[error(transparent)]
    Manifests(#[from] manifests::Error),
    /// `--stream`.
    #[error(transparent)]
    Stream(#[from] stream::Error),
}

/// A source at work.
#[derive(Debug)]
pub struct Running {
    /// Marks its batches.
    pub id: SourceId,
    /// As on the command line.
    pub name: String,
    /// How it is doing.
    pub health: watch::Receiver<Health>,
    /// Ends when it is cancelled, when nobody listens, or when nothing can come any more: what it
    /// said stays in force then.
    pub task: JoinHandle<()>,
}

/// Opens a source and starts its task; must be called within a tokio runtime.
///
/// # Errors
/// When it cannot be opened now. What happens to it later is in its health.
pub async fn spawn(
    id: SourceId,
    spec: Spec,
    batches: mpsc::Sender<Batch>,
    cancel: CancellationToken,
) -> Result<Running, Error> {
    let name = spec.to_string();
    let (report, health) = watch::channel(Health::default());
    let task = match spec {
        Spec::Kubernetes(settings) => {
            let kubernetes = Kubernetes::open(id, settings).await?;
            tokio::spawn(kubernetes.run(batches, report, cancel))
        }
        Spec::Manifests(path) => {
            tokio::spawn(Manifests::open(id, path)?.run(batches, report, cancel))
        }
        Spec::Stream {
            target,
            initial_quiet,
        } => {
            let stream = Stream::open(id, target, initial_quiet)?;
            tokio::spawn(stream.run(batches, report, cancel))
        }
    };
    Ok(Running {
        id,
        name,
        health,
        task,
    })
}

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
