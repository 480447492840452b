//! `--source kubernetes`: lists and watches of Services, EndpointSlices and this Node.
//!
//! A list takes effect as a whole, the first ones together; while the API server is away, everything stays as
//! it is. Objects are trimmed one by one while a page is read (`object`).

mod client;
mod keep;
mod names;
mod object;
mod pause;
mod watch;

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Client, runtime::watcher};
use tokio::sync::{mpsc, watch as channel};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::client::{Access, AccessError};
use self::{
    client::Servers,
    keep::Keep,
    names::Names,
    object::Content,
    watch::{News, What, watch},
};
use super::{Health, Problem, Severity, json::Unusable};
use crate::model::{Batch, Change, Kind, Object, ObjectKey, SourceId};

/// The code with which the API server says that a list must begin again.
const GONE: u16 = 410;
/// What is watched.
const KINDS: [Kind; 3] = [Kind::Service, Kind::EndpointSlice, Kind::Node];
/// How many problems are shown.
const SHOWN: usize = 16;
/// Objects of a page of a list: of real size, a few MB.
const PAGE: u32 = 500;
/// Seconds that a watch lasts. One that says nothing for longer is taken for dead.
const WATCH: u32 = 120;

const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// What is watched, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// The way to the API server.
    pub access: Access,
    /// The Node that is watched.
    pub node_name: String,
    /// Services of this service proxy, in place of those of none (SEMANTICS A4).
    pub proxy_name: Option<String>,
    /// `--api-list stream`: lists come as watches, object by object, in place of pages.
    pub streaming_lists: bool,
}

/// Watches a cluster and sends its changes.
pub struct Kubernetes {
    id: SourceId,
    settings: Settings,
    client: Client,
    servers: std::sync::Arc<Servers>,
}

impl Kubernetes {
    /// Reads the credentials; must be called within a tokio runtime. Nobody is connected to yet.
    ///
    /// # Errors
    /// When there are no credentials, or none that can be used.
    pub async fn open(id: SourceId, settings: Settings) -> Result<Self, AccessError> {
        let (client, servers) = settings.access.client().await?;
        Ok(Self {
            id,
            settings,
            client,
            servers,
        })
    }

    /// Runs until `cancel`.
    pub async fn run(
        self,
        batches: mpsc::Sender<Batch>,
        health: channel::Sender<Health>,
        cancel: CancellationToken,
    ) {
        let Self {
            id,
            settings,
            client,
            servers,
        } = self;
        let config = || {
            let config = watcher::Config::default().page_size(PAGE).timeout(WATCH);
            if settings.streaming_lists {
                config.streaming_lists()
            } else {
                config
            }
        };
        let ours = match &settings.proxy_name {
            Some(name) => format!("{PROXY_NAME}={name}"),
            None => format!("!{PROXY_NAME}"),
        };
        let this_node = format!("metadata.name={}", settings.node_name);
        let mut news = stream::select_all([
            watch::<Service>(client.clone(), config().labels(&ours)).boxed(),
            watch::<EndpointSlice>(
                client.clone(),
                config().labels(&format!("{ours},!{HEADLESS}")),
            )
            .boxed(),
            watch::<Node>(client, config().fields(&this_node)).boxed(),
        ]);
        info!(server = %servers.current(), "the API server is asked");
        let mut state = State::new(health);
        loop {
            let news = tokio::select! {
                () = cancel.cancelled() => return,
                news = news.next() => news,
            };
            // A watch never ends.
            let Some(news) = news else { return };
            let changes = state.take(news, &servers);
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
        }
    }
}

/// Where the lists are, and what does not work.
struct State {
    health: channel::Sender<Health>,
    /// Lists that are not complete.
    lists: BTreeMap<Kind, List>,
    /// Kinds whose first list is not complete.
    missing: BTreeSet<Kind>,
    keep: Keep,
    failures: BTreeMap<Kind, Problem>,
    unreadable: BTreeMap<ObjectKey, Problem>,
    names: Names,
    malformed: u64,
}

/// What a list named so far.
#[derive(Default)]
struct List {
    objects: Vec<Object>,
    unreadable: Vec<ObjectKey>,
}

impl State {
    fn new(health: channel::Sender<Health>) -> Self {
        Self {
            health,
            lists: BTreeMap::new(),
            missing: KINDS.into(),
            keep: Keep::default(),
            failures: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            names: Names::default(),
            malformed: 0,
        }
    }

    /// What comes of news.
    fn take(&mut self, News { kind, what }: News, servers: &Servers) -> Vec<Change> {
        // What was listed is told with its list's end.
        let silent = matches!(what, What::Begun | What::Listed(_));
        let changes = self.changes(kind, what, servers);
        if !silent {
            self.report(changes.len() as u64);
        }
        changes
    }

    fn changes(&mut self, kind: Kind, what: What, servers: &Servers) -> Vec<Change> {
        match what {
            What::Begun => {
                self.lists.insert(kind, List::default());
                Vec::new()
            }
            What::Listed(content) => {
                let key = content.key.clone();
                let object = self.readable(content);
                let list = self.lists.entry(kind).or_default();
                match object {
                    Some(object) => list.objects.push(object),
                    None => list.unreadable.push(key),
                }
                Vec::new()
            }
            What::Complete => {
                self.works(kind);
                self.complete(kind)
            }
            What::Applied(content) => {
                self.works(kind);
                let key = content.key.clone();
                let triggered = content.triggered.map(Change::Triggered);
                let Some(object) = self.readable(content) else {
                    return vec![Change::Unreadable(key)];
                };
                let mut changes = self.keep.pass(Change::Upsert(object));
                changes.extend(triggered);
                changes
            }
            What::Deleted(content) => {
                self.works(kind);
                self.unreadable.remove(&content.key);
                self.keep.pass(Change::Delete(content.key))
            }
            What::Failed(error) => {
                self.fails(kind, &error, servers);
                Vec::new()
            }
        }
    }

    fn complete(&mut self, kind: Kind) -> Vec<Change> {
        let List {
            objects,
            unreadable,
        } = self.lists.remove(&kind).unwrap_or_default();
        info!(%kind, objects = objects.len(), "list complete");
        let named: BTreeSet<&ObjectKey> = unreadable.iter().collect();
        self.unreadable
            .retain(|key, _| key.kind != kind || named.contains(key));
        let mut changes = self.keep.pass(Change::Replace {
            kind,
            objects,
            unreadable,
        });
        if self.missing.remove(&kind) && self.missing.is_empty() {
            changes.push(Change::InitialListComplete);
        }
        changes
    }

    /// The object, or none if it cannot be read, which is noted.
    fn readable(&mut self, content: Content) -> Option<Object> {
        let Unusable {
            object,
            field,
            message,
            ..
        } = match content.object {
            Ok(mut object) => {
                self.unreadable.remove(&content.key);
                self.names.trim(&mut object);
                return Some(object);
            }
            Err(unusable) => unusable,
        };
        let problem = Problem {
            severity: Severity::Error,
            place: "API server".to_owned(),
            object,
            field,
            message,
        };
        warn!(%problem, "kubernetes");
        self.malformed += 1;
        self.unreadable.insert(content.key, problem);
        None
    }

    fn works(&mut self, kind: Kind) {
        if self.failures.remove(&kind).is_some() {
            info!(%kind, "the API server answers again");
        }
    }

    fn fails(&mut self, kind: Kind, error: &watcher::Error, servers: &Servers) {
        let gone = pause::status(error).is_some_and(|status| status.code == GONE);
        if gone && !self.failures.contains_key(&kind) {
            debug!(%kind, "the watch is too old, a list follows");
            return;
        }
        let severity = if self.missing.contains(&kind) {
            Severity::Error
        } else {
            Severity::Warning
        };
        let stays = match severity {
            Severity::Error => "nothing is programmed until it can",
            Severity::Warning => "what is programmed stays",
        };
        let problem = Problem {
            severity,
            place: format!("API server {}", servers.current()),
            object: None,
            field: None,
            message: format!("{kind} cannot be watched, {stays}: {}", described(error)),
        };
        // Said once, and again where something else is wrong.
        if self.failures.get(&kind).map(|known| &known.message) != Some(&problem.message) {
            warn!(%problem, "kubernetes");
        }
        self.failures.insert(kind, problem);
    }

    fn report(&self, changes: u64) {
        self.health.send_if_modified(|health| {
            let before = health.clone();
            health.listed = self.missing.is_empty();
            health.malformed = self.malformed;
            health.changes += changes;
            let problems = self.failures.values().chain(self.unreadable.values());
            health.problems = problems.take(SHOWN).cloned().collect();
            *health != before
        });
    }
}

/// An error with its causes; for what the API server refuses, what it takes to be allowed.
fn described(error: &watcher::Error) -> String {
    if let Some(status) = pause::status(error) {
        let allow = match status.code {
            401 => ": the credentials are not valid",
            403 => ": the ClusterRole must allow list and watch, see deploy/rbac.yaml",
            _ => "",
        };
        return format!("{} {}{allow}", status.code, status.message);
    }
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}
