//! What the API server knows, and what happened to it since.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// Snapshots that pages are still taken from.
const SNAPSHOTS: usize = 8;

/// A resource that can be listed and watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// v1 Services.
    Services,
    /// discovery.k8s.io/v1 EndpointSlices.
    EndpointSlices,
    /// v1 Nodes.
    Nodes,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Services, Self::EndpointSlices, Self::Nodes];

    /// Where it is listed and watched.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Services => "/api/v1/services",
            Self::EndpointSlices => "/apis/discovery.k8s.io/v1/endpointslices",
            Self::Nodes => "/api/v1/nodes",
        }
    }

    /// The kind of its objects.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
        }
    }

    /// Their version.
    #[must_use]
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
        }
    }

    fn of(value: &Value) -> Result<Self> {
        let kind = value.get("kind").and_then(Value::as_str);
        let kind = kind.context("an object has a kind")?;
        let found = Self::ALL
            .into_iter()
            .find(|resource| resource.kind() == kind);
        found.with_context(|| format!("nobody watches {kind}"))
    }
}

/// Names one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// What.
    pub resource: Resource,
    /// Empty for a Node.
    pub namespace: String,
    /// Who.
    pub name: String,
}

impl Key {
    /// An object of namespace `default`, or a Node.
    #[must_use]
    pub fn new(resource: Resource, name: &str) -> Self {
        let namespace = if resource == Resource::Nodes {
            ""
        } else {
            "default"
        };
        Self {
            resource,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// One version of an object.
#[derive(Debug)]
pub(super) struct Stored {
    name: String,
    labels: BTreeMap<String, String>,
    /// JSON without kind and apiVersion, as in a list.
    pub(super) text: String,
}

/// What happened once.
#[derive(Debug, Clone)]
pub(super) struct Logged {
    pub(super) version: u64,
    pub(super) resource: Resource,
    pub(super) before: Option<Arc<Stored>>,
    /// None if it was deleted.
    pub(super) after: Option<Arc<Stored>>,
    /// As the watch says it: the last state, with the version of its end.
    deleted: Option<Arc<Stored>>,
}

/// All objects of a list at one moment.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) version: u64,
    pub(super) objects: Arc<[Arc<Stored>]>,
}

/// Objects and their history.
#[derive(Debug, Default)]
pub struct Store {
    version: u64,
    /// Nothing is known of what happened up to here.
    compacted: u64,
    objects: BTreeMap<Key, (Value, Arc<Stored>)>,
    log: VecDeque<Logged>,
    snapshots: VecDeque<(u64, Snapshot)>,
    next_snapshot: u64,
    /// Events that clients created, in order.
    pub(super) events: Vec<Value>,
}

impl Store {
    /// The version of the last change.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Creates or replaces an object, as the API server stores it: complete.
    ///
    /// # Errors
    /// When it is not an object of a known kind with a name.
    pub fn apply(&mut self, mut value: Value) -> Result<Key> {
        let resource = Resource::of(&value)?;
        self.version += 1;
        let version = self.version;
        let metadata = value
            .pointer_mut("/metadata")
            .and_then(Value::as_object_mut);
        let metadata = metadata.context("an object has metadata")?;
        metadata.insert("resourceVersion".to_owned(), version.to_string().into());
        let name = metadata.get("name").and_then(Value::as_str);
        let mut key = Key::new(resource, name.context("an object has a name")?);
        if resource != Resource::Nodes {
            let namespace = metadata
                .entry("namespace")
                .or_insert_with(|| "default".into());
            namespace
                .as_str()
                .unwrap_or_default()
                .clone_into(&mut key.namespace);
        }
        let stored = Arc::new(stored(&key.name, &value));
        let before = self
            .objects
            .insert(key.clone(), (value, Arc::clone(&stored)));
        self.log.push_back(Logged {
            version,
            resource,
            before: before.map(|(_, stored)| stored),
            after: Some(stored),
            deleted: None,
        });
        Ok(key)
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// When there is none.
    pub fn delete(&mut self, key: &Key) -> Result<()> {
        let Some((mut value, before)) = self.objects.remove(key) else {
            bail!("no {key:?}");
        };
        self.version += 1;
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert(
                "resourceVersion".to_owned(),
                self.version.to_string().into(),
            );
        }
        self.log.push_back(Logged {
            version: self.version,
            resource: key.resource,
            before: Some(before),
            after: None,
            deleted: Some(Arc::new(stored(&key.name, &value))),
        });
        Ok(())
    }

    /// Forgets history: who watches from before now must list again, and lists that are on their way must begin
    /// again.
    pub fn compact(&mut self) {
        self.compacted = self.version;
        self.log.clear();
        self.snapshots.clear();
    }

    /// All objects, as they were applied.
    pub fn objects(&self) -> impl Iterator<Item = (&Key, &Value)> {
        self.objects.iter().map(|(key, (value, _))| (key, value))
    }

    /// Events that clients created, in order.
    #[must_use]
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    pub(super) fn is_compacted(&self, version: u64) -> bool {
        version < self.compacted
    }

    pub(super) fn snapshot(&self, resource: Resource, selector: &Selector) -> Snapshot {
        let objects = self.objects.iter();
        let ours = objects
            .filter(|(key, (_, stored))| key.resource == resource && selector.matches(stored));
        Snapshot {
            version: self.version,
            objects: ours.map(|(_, (_, stored))| Arc::clone(stored)).collect(),
        }
    }

    /// Keeps a snapshot for its further pages; returns its number.
    pub(super) fn keep(&mut self, snapshot: Snapshot) -> u64 {
        self.next_snapshot += 1;
        self.snapshots.push_back((self.next_snapshot, snapshot));
        if self.snapshots.len() > SNAPSHOTS {
            self.snapshots.pop_front();
        }
        self.next_snapshot
    }

    /// None if it is not kept any more.
    pub(super) fn kept(&self, number: u64) -> Option<Snapshot> {
        let found = self.snapshots.iter().find(|(n, _)| *n == number);
        found.map(|(_, snapshot)| snapshot.clone())
    }

    /// The first change after `version`.
    pub(super) fn next(&self, version: u64) -> Option<Logged> {
        let at = self.log.partition_point(|logged| logged.version <= version);
        self.log.get(at).cloned()
    }
}

fn stored(name: &str, value: &Value) -> Stored {
    let mut value = value.clone();
    if let Some(fields) = value.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    let labels = value.pointer("/metadata/labels").and_then(Value::as_object);
    let labels = labels.into_iter().flatten();
    Stored {
        name: name.to_owned(),
        labels: labels
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect(),
        text: value.to_string(),
    }
}

impl Logged {
    /// How a watch with this selector tells it: type and object; nothing if it does not.
    pub(super) fn told(&self, selector: &Selector) -> Option<(&'static str, &Stored)> {
        let matches = |stored: &Option<Arc<Stored>>| {
            stored
                .as_ref()
                .is_some_and(|stored| selector.matches(stored))
        };
        let last = self.after.as_ref().or(self.deleted.as_ref())?;
        match (matches(&self.before), matches(&self.after)) {
            (false, false) => None,
            (false, true) => Some(("ADDED", last)),
            (true, true) => Some(("MODIFIED", last)),
            (true, false) => Some(("DELETED", last)),
        }
    }
}

/// `labelSelector` and `fieldSelector`.
#[derive(Debug, Clone, Default)]
pub(super) struct Selector {
    /// Key, and the value that it must have; none where it must be absent.
    labels: Vec<(String, Option<String>)>,
    name: Option<String>,
}

impl Selector {
    /// Reads what our agent sends.
    pub(super) fn parse(labels: Option<&str>, fields: Option<&str>) -> Result<Self> {
        let mut selector = Self::default();
        for term in labels
            .unwrap_or_default()
            .split(',')
            .filter(|term| !term.is_empty())
        {
            let parsed = match (term.strip_prefix('!'), term.split_once('=')) {
                (Some(key), None) => (key.to_owned(), None),
                (None, Some((key, value))) => (key.to_owned(), Some(value.to_owned())),
                _ => bail!("labelSelector {term:?} is not understood"),
            };
            selector.labels.push(parsed);
        }
        if let Some(fields) = fields {
            let name = fields.strip_prefix("metadata.name=");
            ensure!(name.is_some(), "fieldSelector {fields:?} is not understood");
            selector.name = name.map(str::to_owned);
        }
        Ok(selector)
    }

    fn matches(&self, stored: &Stored) -> bool {
        let labels = self.labels.iter();
        self.name.as_ref().is_none_or(|name| *name == stored.name)
            && labels
                .clone()
                .all(|(key, value)| stored.labels.get(key) == value.as_ref())
    }
}
