//! `--stream -|PATH|unix:PATH`: Kubernetes watch events as concatenated JSON values.
//!
//! `{"type":"ADDED","object":{...}}` and so on, exactly as the API server sends them, with
//! anything or nothing between them; a `*List` is all objects of its kind at once. The bookmark
//! annotated `k8s.io/initial-events-end` ends the initial list.
//!
//! A stream owns what it named. A new connection, and `ERROR` with code 410, begin a new list:
//! what it does not name is removed at its end, and everything stays as it is until then.

mod decode;
mod input;
mod split;

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, io, time::Duration};

use tokio::{
    sync::{mpsc, watch as channel},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::input::Target;
use self::{
    decode::{Decoder, Output},
    input::{Input, Inputs},
    split::{MAX_VALUE, Piece, Splitter},
};
use super::{Health, Problem, Severity, json::Unusable};
use crate::model::{Batch, SourceId};

/// How many of the latest problems are shown.
const SHOWN: usize = 16;

/// Why a target cannot be a source.
#[derive(Debug, thiserror::Error)]
#[error("--stream {target}: {source}")]
pub struct Error {
    /// The target.
    pub target: Target,
    /// What the system says.
    pub source: io::Error,
}

/// Reads a stream and sends its changes.
#[derive(Debug)]
pub struct Stream {
    id: SourceId,
    target: Target,
    initial_quiet: Option<Duration>,
    inputs: Inputs,
}

impl Stream {
    /// Opens the target; must be called within a tokio runtime.
    ///
    /// `initial_quiet` ends an initial list that has begun when nothing came for so long, for
    /// senders that send no bookmark.
    ///
    /// # Errors
    /// When a file cannot be read, or a socket cannot be listened on.
    pub fn open(
        id: SourceId,
        target: Target,
        initial_quiet: Option<Duration>,
    ) -> Result<Self, Error> {
        match Inputs::open(&target) {
            Ok(inputs) => Ok(Self {
                id,
                target,
                initial_quiet,
                inputs,
            }),
            Err(source) => Err(Error { target, source }),
        }
    }

    /// Runs until `cancel`, or until nothing can come any more: the state stays then.
    pub async fn run(
        self,
        batches: mpsc::Sender<Batch>,
        health: channel::Sender<Health>,
        cancel: CancellationToken,
    ) {
        let Self {
            id,
            target,
            initial_quiet,
            mut inputs,
        } = self;
        let mut reader = Reader::new(target, initial_quiet, health);
        loop {
            let quiet = reader.quiet_at();
            let input = tokio::select! {
                () = cancel.cancelled() => return,
                input = inputs.next() => input,
                () = sleep_until(quiet.unwrap_or_else(Instant::now)), if quiet.is_some() => {
                    reader.quiet();
                    if !reader.send(id, &batches).await {
                        return;
                    }
                    continue;
                }
            };
            let Some(input) = input else { return };
            reader.take(input);
            if !reader.send(id, &batches).await {
                return;
            }
        }
    }
}

/// Everything but the input and the output.
#[derive(Debug)]
struct Reader {
    target: Target,
    initial_quiet: Option<Duration>,
    health: channel::Sender<Health>,
    splitter: Splitter,
    decoder: Decoder,
    output: Output,
    /// When something came last.
    heard: Instant,
    /// What came last was malformed: what else of it looks like a value is not reported again.
    in_garbage: bool,
    problems: VecDeque<Problem>,
    malformed: u64,
}

impl Reader {
    fn new(
        target: Target,
        initial_quiet: Option<Duration>,
        health: channel::Sender<Health>,
    ) -> Self {
        Self {
            target,
            initial_quiet,
            health,
            splitter: Splitter::new(MAX_VALUE),
            decoder: Decoder::new(),
            output: Output::default(),
            heard: Instant::now(),
            in_garbage: false,
            problems: VecDeque::new(),
            malformed: 0,
        }
    }

    /// When the list ends by itself.
    fn quiet_at(&self) -> Option<Instant> {
        let quiet = self
            .initial_quiet
            .filter(|_| self.decoder.listing_begun())?;
        Some(self.heard + quiet)
    }

    fn quiet(&mut self) {
        info!(stream = %self.target, "initial list complete: nothing came for a while");
        self.decoder.complete(&mut self.output.changes);
    }

    fn take(&mut self, input: Input) {
        self.heard = Instant::now();
        match input {
            Input::Connected => {
                debug!(stream = %self.target, "connected");
                self.cut();
                self.in_garbage = false;
                self.decoder.begin(&mut self.output.changes);
            }
            Input::Bytes(bytes) => {
                self.splitter.feed(&bytes);
                while let Some(piece) = self.splitter.next_piece() {
                    self.piece(piece);
                }
            }
            Input::Ended => self.ended(),
        }
    }

    /// Whatever is unfinished stays so.
    fn cut(&mut self) {
        if let Some(piece) = self.splitter.end() {
            self.piece(piece);
        }
    }

    fn ended(&mut self) {
        self.cut();
        if self.initial_quiet.is_some() && self.decoder.listing_begun() {
            self.quiet();
        }
        if self.decoder.listed() {
            info!(stream = %self.target, "ended, its objects stay");
        } else {
            warn!(
                stream = %self.target,
                "ended before its initial list was complete, nothing of it is used: send the \
                 bookmark annotated k8s.io/initial-events-end, or set --stream-initial-quiet"
            );
        }
    }

    fn piece(&mut self, piece: Piece) {
        match piece {
            Piece::Value { offset, text } => self.value(offset, &text),
            Piece::Malformed { offset, problem } => {
                self.in_garbage = true;
                let message = format!("{problem}, skipped");
                let unusable = Unusable {
                    object: None,
                    field: None,
                    message,
                    benign: false,
                };
                self.report(offset, unusable);
            }
        }
    }

    fn value(&mut self, offset: u64, text: &[u8]) {
        self.decoder.value(text, &mut self.output);
        let unusable = std::mem::take(&mut self.output.unusable);
        let fragment = unusable.iter().any(|unusable| unusable.object.is_none());
        if self.in_garbage && fragment {
            // A part of what was malformed that looks like a value of its own.
            self.splitter.distrust();
            return;
        }
        self.in_garbage = false;
        for unusable in unusable {
            self.report(offset, unusable);
        }
    }

    fn report(&mut self, offset: u64, unusable: Unusable) {
        let Unusable {
            object,
            field,
            message,
            benign,
        } = unusable;
        let severity = if benign {
            Severity::Warning
        } else {
            Severity::Error
        };
        let place = format!("--stream {} at byte {offset}", self.target);
        let problem = Problem {
            severity,
            place,
            object,
            field,
            message,
        };
        warn!(%problem, "stream");
        self.malformed += u64::from(!benign);
        self.problems.push_back(problem);
        if self.problems.len() > SHOWN {
            self.problems.pop_front();
        }
    }

    /// Sends what has come; false once nobody listens.
    async fn send(&mut self, id: SourceId, batches: &mpsc::Sender<Batch>) -> bool {
        let changes = std::mem::take(&mut self.output.changes);
        let count = changes.len() as u64;
        self.health.send_if_modified(|health| {
            let before = health.clone();
            health.listed = self.decoder.listed();
            health.malformed = self.malformed;
            health.changes += count;
            if !self.problems.iter().eq(&health.problems) {
                health.problems = self.problems.iter().cloned().collect();
            }
            *health != before
        });
        changes.is_empty()
            || batches
                .send(Batch {
                    source: id,
                    changes,
                })
                .await
                .is_ok()
    }
}
