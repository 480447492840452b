//! Watches: what happened after a version, event by event, for as long as it goes well.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures::{Stream, stream};
use tokio::sync::watch as channel;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::serve::{Parameters, body, status, status_object};
use super::store::{Resource, Selector, Stored};

const GONE: &str = "too old resource version";

/// Answers a request for a watch.
pub(super) fn answer(
    shared: Arc<Shared>,
    resource: Resource,
    selector: Selector,
    parameters: &Parameters,
) -> Response {
    let text = |key: &str| parameters.get(key).map(String::as_str);
    let version: u64 = text("resourceVersion")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let initial = text("sendInitialEvents") == Some("true");
    if initial && text("resourceVersionMatch") != Some("NotOlderThan") {
        let message = "resourceVersionMatch: Forbidden: sendInitialEvents requires setting it to NotOlderThan";
        return status(422, "Invalid", message, None);
    }
    let seconds = text("timeoutSeconds").and_then(|text| text.parse().ok());
    let mut watch = Watch {
        resource,
        selector,
        version,
        changed: shared.version.subscribe(),
        until: Instant::now() + Duration::from_secs(seconds.unwrap_or(1_800)),
        ready: VecDeque::new(),
        over: None,
        shared,
    };
    let gone = watch.shared.chance(|faults| faults.gone);
    if gone.is_some() || (version > 0 && watch.shared.store().is_compacted(version)) {
        if gone.unwrap_or_default().is_multiple_of(2) {
            return status(410, "Expired", GONE, None);
        }
        let object = status_object(410, "Expired", GONE, None);
        watch
            .ready
            .push_back(format!("{{\"type\":\"ERROR\",\"object\":{object}}}\n"));
        watch.over = Some(Over::Ended);
    } else if version == 0 {
        watch.begin(initial);
    }
    body(Body::from_stream(watch.pieces()))
}

struct Watch {
    shared: Arc<Shared>,
    resource: Resource,
    selector: Selector,
    /// Everything up to here was told.
    version: u64,
    changed: channel::Receiver<u64>,
    until: Instant,
    /// Lines, or parts of lines, to be sent.
    ready: VecDeque<String>,
    /// Nothing more is sent after them.
    over: Option<Over>,
}

#[derive(Clone, Copy)]
enum Over {
    Ended,
    Torn,
}

impl Watch {
    /// All objects as they are, as events.
    fn begin(&mut self, mark: bool) {
        let snapshot = self.shared.store().snapshot(self.resource, &self.selector);
        for stored in snapshot.objects.iter() {
            let line = self.line("ADDED", stored);
            self.ready.push_back(line);
        }
        self.version = snapshot.version;
        if mark {
            let annotations = r#","annotations":{"k8s.io/initial-events-end":"true"}"#;
            let line = self.bookmark(annotations);
            self.ready.push_back(line);
        }
    }

    fn pieces(self) -> impl Stream<Item = io::Result<Bytes>> {
        stream::unfold(Some(self), |watch| async {
            let mut watch = watch?;
            match watch.next().await {
                Ok(Some(piece)) => Some((Ok(Bytes::from(piece)), Some(watch))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            match self.over {
                Some(Over::Ended) => return Ok(None),
                Some(Over::Torn) => return Err(io::ErrorKind::ConnectionReset.into()),
                None => {}
            }
            let next = {
                let store = self.shared.store();
                if store.is_compacted(self.version) {
                    // It does not know what it missed.
                    return Ok(None);
                }
                store.next(self.version)
            };
            let Some(logged) = next else {
                let Ok(Ok(())) = timeout_at(self.until, self.changed.changed()).await else {
                    return Ok(None);
                };
                continue;
            };
            self.version = logged.version;
            if logged.resource != self.resource {
                continue;
            }
            if let Some((event, stored)) = logged.told(&self.selector) {
                self.shared.late().await;
                let line = self.line(event, stored);
                self.send(line);
            }
        }
    }

    /// Gets a line ready, if nothing goes wrong with it.
    fn send(&mut self, line: String) {
        let shared = Arc::clone(&self.shared);
        if shared.chance(|faults| faults.ended).is_some() {
            self.over = Some(Over::Ended);
            return;
        }
        let cut = |at: u32| {
            let at = at as usize % line.len();
            (0..=at)
                .rev()
                .find(|at| line.is_char_boundary(*at))
                .unwrap_or(0)
        };
        if let Some(at) = shared.chance(|faults| faults.torn) {
            let (half, _) = line.split_at(cut(at));
            self.ready.push_back(half.to_owned());
            self.over = Some(Over::Torn);
            return;
        }
        if let Some(at) = shared.chance(|faults| faults.split) {
            let (first, second) = line.split_at(cut(at));
            self.ready.extend([first.to_owned(), second.to_owned()]);
        } else {
            self.ready.push_back(line);
        }
        if shared.chance(|faults| faults.bookmarks).is_some() {
            let line = self.bookmark("");
            self.ready.push_back(line);
        }
    }

    fn line(&self, event: &str, stored: &Stored) -> String {
        let (kind, version) = (self.resource.kind(), self.resource.api_version());
        let rest = stored.text.get(1..).unwrap_or_default();
        format!(
            "{{\"type\":\"{event}\",\"object\":{{\"kind\":\"{kind}\",\"apiVersion\":\"{version}\",{rest}}}\n"
        )
    }

    fn bookmark(&self, annotations: &str) -> String {
        let (kind, version) = (self.resource.kind(), self.resource.api_version());
        let at = self.version;
        format!(
            "{{\"type\":\"BOOKMARK\",\"object\":{{\"kind\":\"{kind}\",\"apiVersion\":\"{version}\",\
             \"metadata\":{{\"resourceVersion\":\"{at}\"{annotations}}}}}}}\n"
        )
    }
}
