//! `--manifests PATH`: Kubernetes YAML or JSON in a file or in a directory, watched.
//!
//! An edit is applied as a whole. A file that does not parse keeps its last good state; until
//! every file has parsed once the list is not complete, so that a broken file found at start
//! removes nothing that an earlier run programmed.

mod files;
mod parse;
mod watch;

#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, io, path::PathBuf};

use tokio::sync::{mpsc, watch as channel};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::files::Files;
pub use self::parse::{Parsed, parse};
use self::watch::Watch;
use super::{Health, Problem, Severity};
use crate::model::{Batch, SourceId};

/// Why a path cannot be a source at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, or not readable.
    #[error("--manifests {}: {source}", path.display())]
    Open {
        /// The path as it was given.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Reads manifests and sends their changes until it is cancelled or nobody listens.
#[derive(Debug)]
pub struct Manifests {
    id: SourceId,
    files: Files,
}

impl Manifests {
    /// Takes a file, whatever its name, or a directory, whose `.yaml`, `.yml` and `.json` files
    /// count (not hidden ones, not subdirectories).
    ///
    /// # Errors
    /// When the path cannot be read now: later its last state stays.
    pub fn open(id: SourceId, path: PathBuf) -> Result<Self, Error> {
        match std::fs::metadata(&path) {
            Ok(_) => Ok(Self {
                id,
                files: Files::new(path),
            }),
            Err(source) => Err(Error::Open { path, source }),
        }
    }

    /// Runs until `cancel`; `health` says how it goes.
    pub async fn run(
        self,
        batches: mpsc::Sender<Batch>,
        health: channel::Sender<Health>,
        cancel: CancellationToken,
    ) {
        let Self { id, mut files } = self;
        let mut watch = Watch::new(files.path());
        let mut touched = BTreeSet::new();
        loop {
            // Files are read away from the threads that serve everything else.
            let scanned = tokio::task::spawn_blocking(move || {
                let changes = files.scan(&touched);
                (files, changes)
            });
            let Ok((returned, changes)) = scanned.await else {
                return;
            };
            files = returned;
            report(&health, &files, changes.len());
            if !changes.is_empty()
                && batches
                    .send(Batch {
                        source: id,
                        changes,
                    })
                    .await
                    .is_err()
            {
                return;
            }
            touched = tokio::select! {
                () = cancel.cancelled() => return,
                touched = watch.next() => touched,
            };
        }
    }
}

fn report(health: &channel::Sender<Health>, files: &Files, changes: usize) {
    let problems: Vec<Problem> = files.problems().cloned().collect();
    health.send_if_modified(|health| {
        for problem in problems
            .iter()
            .filter(|problem| !health.problems.contains(problem))
        {
            match problem.severity {
                Severity::Error => warn!(%problem, "manifest not applied, last good state stays"),
                Severity::Warning => info!(%problem, "manifest"),
            }
        }
        if changes > 0 {
            debug!(path = %files.path().display(), changes, "manifests changed");
        }
        let before = health.clone();
        health.listed = files.complete();
        health.problems = problems;
        health.changes += changes as u64;
        *health != before
    });
}
