//! Tells when to look at the files again: soon after an edit is finished, and now and then.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::warn;

/// Quiet time after which several edits count as one.
const SETTLE: Duration = Duration::from_millis(20);
/// The same while a file is open for writing: it may be half there.
const SETTLE_WRITING: Duration = Duration::from_secs(1);
/// An edit that goes on for longer is looked at in between.
const PATIENCE: Duration = Duration::from_secs(5);
/// Links out of the directory and file systems without events are found this late.
const POLL: Duration = Duration::from_secs(10);
/// The same without any events at all.
const POLL_ONLY: Duration = Duration::from_secs(2);

/// File system events about a path.
#[derive(Debug)]
pub(super) struct Watch {
    events: mpsc::UnboundedReceiver<notify::Result<Event>>,
    /// Events stop when it is dropped.
    watcher: Option<RecommendedWatcher>,
}

impl Watch {
    /// Watches a directory, or the directories around a file and around what it links to:
    /// editors and volumes replace files rather than change them.
    pub(super) fn new(path: &Path) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let watcher = watch(path, sender)
            .inspect_err(|error| {
                warn!(path = %path.display(), %error, "cannot watch manifests, polling instead");
            })
            .ok();
        Self { events, watcher }
    }

    /// Waits for the end of an edit, or for the time to look anyway; returns the names of files
    /// that were written to.
    pub(super) async fn next(&mut self) -> BTreeSet<OsString> {
        let poll = if self.watcher.is_some() {
            POLL
        } else {
            POLL_ONLY
        };
        let mut edit = Edit::default();
        let mut deadline = Instant::now() + poll;
        loop {
            tokio::select! {
                biased;
                Some(event) = self.events.recv() => {
                    if let Some(settle) = edit.take(event) {
                        let begun = *edit.begun.get_or_insert_with(Instant::now);
                        deadline = (Instant::now() + settle).min(begun + PATIENCE);
                    }
                }
                () = sleep_until(deadline) => return edit.touched,
            }
        }
    }
}

fn watch(
    path: &Path,
    sender: mpsc::UnboundedSender<notify::Result<Event>>,
) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event| {
        // Nobody listens any more: the watcher is about to go.
        let _gone = sender.send(event);
    })?;
    let directories: BTreeSet<PathBuf> = if path.is_dir() {
        BTreeSet::from([path.to_owned()])
    } else {
        let given = std::path::absolute(path).map_err(notify::Error::io)?;
        let real = path.canonicalize().map_err(notify::Error::io)?;
        [given, real]
            .iter()
            .filter_map(|file| file.parent())
            .map(Path::to_owned)
            .collect()
    };
    for directory in directories {
        watcher.watch(&directory, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

/// Events that belong together.
#[derive(Debug, Default)]
struct Edit {
    /// When its first event came.
    begun: Option<Instant>,
    /// Names of files whose content may have changed.
    touched: BTreeSet<OsString>,
    /// Written to and not closed yet.
    open: BTreeSet<PathBuf>,
}

impl Edit {
    /// Returns how long to wait from now on; none where the event says nothing about content.
    fn take(&mut self, event: notify::Result<Event>) -> Option<Duration> {
        let Event { kind, paths, .. } = match event {
            Ok(event) => event,
            Err(error) => {
                warn!(%error, "manifest watch");
                return Some(SETTLE);
            }
        };
        match kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Remove(_) => {
                self.closed(paths);
            }
            EventKind::Access(_) => return None,
            EventKind::Modify(ModifyKind::Data(_)) | EventKind::Create(_) => {
                self.open.extend(paths.iter().cloned());
                self.touched
                    .extend(paths.iter().filter_map(|path| name(path)));
            }
            EventKind::Modify(
                ModifyKind::Name(_) | ModifyKind::Metadata(_) | ModifyKind::Any | ModifyKind::Other,
            )
            | EventKind::Any
            | EventKind::Other => self.closed(paths),
        }
        Some(if self.open.is_empty() {
            SETTLE
        } else {
            SETTLE_WRITING
        })
    }

    fn closed(&mut self, paths: Vec<PathBuf>) {
        for path in paths {
            self.open.remove(&path);
            self.touched.extend(name(&path));
        }
    }
}

fn name(path: &Path) -> Option<OsString> {
    path.file_name().map(ToOwned::to_owned)
}
