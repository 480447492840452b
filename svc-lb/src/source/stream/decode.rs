//! Watch events and lists to changes.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    model::{Change, Kind, Object, ObjectKey, ObjectName},
    source::convert::{self, Author, Failure, Meaning},
};

/// `ERROR` with this code: the watch is too old, a list follows.
const GONE: i64 = 410;

/// A value that says nothing that can be used.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Unusable {
    /// Kind and name, where they could be read.
    pub(super) object: Option<String>,
    /// Path of the field, where it is one.
    pub(super) field: Option<String>,
    pub(super) message: String,
    /// It is well-formed and no mistake of the sender's.
    pub(super) benign: bool,
}

/// What values come to.
#[derive(Debug, Default)]
pub(super) struct Output {
    pub(super) changes: Vec<Change>,
    pub(super) unusable: Vec<Unusable>,
}

/// Understands one stream.
#[derive(Debug)]
pub(super) struct Decoder {
    /// Kinds of the current list that are not closed; none once it is complete.
    listing: Option<Listing>,
    /// Kinds that are not ours, each said once.
    foreign: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Listing {
    open: BTreeSet<Kind>,
    /// Something was said at all.
    begun: bool,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(rename = "type", borrow)]
    event: Option<Cow<'a, str>>,
    #[serde(borrow)]
    object: Option<&'a RawValue>,
    #[serde(borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(rename = "apiVersion", borrow)]
    api_version: Option<Cow<'a, str>>,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

/// What every object says of itself, and what `Status` says.
#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(rename = "apiVersion", borrow)]
    api_version: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    metadata: Metadata<'a>,
    code: Option<i64>,
    #[serde(borrow)]
    message: Option<Cow<'a, str>>,
}

#[derive(Default, Deserialize)]
struct Metadata<'a> {
    #[serde(borrow)]
    name: Option<Cow<'a, str>>,
    #[serde(borrow)]
    namespace: Option<Cow<'a, str>>,
    #[serde(default)]
    annotations: Option<Annotations>,
}

#[derive(Deserialize)]
struct Annotations {
    /// "true" on the bookmark that ends the initial events of a watch.
    #[serde(rename = "k8s.io/initial-events-end")]
    initial_events_end: Option<String>,
}

impl Header<'_> {
    fn meaning(&self) -> Meaning {
        let text = |field: &Option<Cow<'_, str>>| field.as_deref().unwrap_or_default().to_owned();
        convert::meaning(&text(&self.api_version), &text(&self.kind))
    }

    fn described(&self) -> String {
        let kind = self.kind.as_deref().unwrap_or("object without kind");
        match (&self.metadata.namespace, &self.metadata.name) {
            (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
            (None, Some(name)) => format!("{kind} {name}"),
            (_, None) => kind.to_owned(),
        }
    }
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            listing: Some(Listing::default()),
            foreign: BTreeSet::new(),
        }
    }

    /// A new list begins, with a connection or because the sender lost its place.
    pub(super) fn begin(&mut self, changes: &mut Vec<Change>) {
        self.listing = Some(Listing::default());
        changes.push(Change::Resync);
    }

    /// The current list is complete.
    pub(super) fn listed(&self) -> bool {
        self.listing.is_none()
    }

    /// The current list is not complete, and something was said already.
    pub(super) fn listing_begun(&self) -> bool {
        self.listing.as_ref().is_some_and(|listing| listing.begun)
    }

    /// Ends the current list, whatever it has named.
    pub(super) fn complete(&mut self, changes: &mut Vec<Change>) {
        if self.listing.take().is_some() {
            changes.push(Change::InitialListComplete);
        }
    }

    /// Takes one JSON object.
    pub(super) fn value(&mut self, text: &[u8], output: &mut Output) {
        if let Err(unusable) = self.envelope(text, output) {
            output.unusable.push(unusable);
        }
    }

    fn envelope(&mut self, text: &[u8], output: &mut Output) -> Result<(), Unusable> {
        let envelope: Envelope<'_> = parse(text)?;
        if let Some(listing) = &mut self.listing {
            listing.begun = true;
        }
        match (envelope.event.as_deref(), envelope.object) {
            (Some(event), Some(object)) => self.event(event, object, &mut output.changes),
            (Some(event), None) => Err(unusable(format!("event {event} without object"))),
            (None, _) => self.list(&envelope, output),
        }
    }

    fn event(
        &mut self,
        event: &str,
        object: &RawValue,
        changes: &mut Vec<Change>,
    ) -> Result<(), Unusable> {
        let header: Header<'_> = parse(object.get().as_bytes())?;
        match event {
            "ADDED" | "MODIFIED" => {
                let Some(kind) = self.kind(&header)? else {
                    return Ok(());
                };
                self.named(kind);
                match convert(kind, &header, object) {
                    Ok(object) => changes.push(Change::Upsert(object)),
                    Err(unusable) => {
                        changes.extend(key(kind, &header).map(Change::Unreadable));
                        return Err(unusable);
                    }
                }
                Ok(())
            }
            "DELETED" => {
                let Some(kind) = self.kind(&header)? else {
                    return Ok(());
                };
                self.named(kind);
                changes.push(Change::Delete(key(kind, &header)?));
                Ok(())
            }
            "BOOKMARK" => {
                let annotations = header.metadata.annotations.as_ref();
                let end = annotations.and_then(|a| a.initial_events_end.as_deref());
                if end == Some("true") {
                    self.close(&header, changes);
                }
                Ok(())
            }
            "ERROR" if header.code == Some(GONE) => {
                self.begin(changes);
                Ok(())
            }
            "ERROR" => {
                let message = header.message.as_deref().unwrap_or("no message");
                let code = header
                    .code
                    .map(|code| format!(" {code}"))
                    .unwrap_or_default();
                Err(Unusable {
                    benign: true,
                    ..unusable(format!("the sender reports error{code}: {message}"))
                })
            }
            other => Err(unusable(format!(
                "{other:?} is not an event: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR"
            ))),
        }
    }

    /// The kind of an object; none if it is not ours, which is said once.
    fn kind(&mut self, header: &Header<'_>) -> Result<Option<Kind>, Unusable> {
        match header.meaning() {
            Meaning::One(kind) => Ok(Some(kind)),
            Meaning::OtherVersion(ours) => Err(Unusable {
                object: Some(header.described()),
                field: Some("apiVersion".to_owned()),
                ..unusable(format!("not supported, send {ours}"))
            }),
            Meaning::List(_) | Meaning::Foreign => {
                let kind = header
                    .kind
                    .as_deref()
                    .unwrap_or("an object without kind")
                    .to_owned();
                if !self.foreign.insert(kind.clone()) {
                    return Ok(None);
                }
                let message = format!("{kind} is not for a service proxy, ignored from here on");
                Err(Unusable {
                    benign: true,
                    ..unusable(message)
                })
            }
        }
    }

    fn list(&mut self, envelope: &Envelope<'_>, output: &mut Output) -> Result<(), Unusable> {
        let (Some(kind), Some(version)) = (&envelope.kind, &envelope.api_version) else {
            return Err(unusable("neither a watch event nor a List".to_owned()));
        };
        let Meaning::List(of) = convert::meaning(version, kind) else {
            let message = format!("{kind} is neither a watch event nor a List of ours");
            return Err(unusable(message));
        };
        let mut lists: BTreeMap<Kind, (Vec<Object>, Vec<ObjectKey>)> = of
            .into_iter()
            .map(|kind| (kind, Default::default()))
            .collect();
        for item in envelope.items.iter().flatten() {
            if let Err(unusable) = self.item(of, item, &mut lists) {
                output.unusable.push(unusable);
            }
        }
        for (kind, (objects, unreadable)) in lists {
            output.changes.push(Change::Replace {
                kind,
                objects,
                unreadable,
            });
            if let Some(listing) = &mut self.listing {
                listing.open.remove(&kind);
            }
        }
        self.complete_if_closed(&mut output.changes);
        Ok(())
    }

    fn item(
        &mut self,
        of: Option<Kind>,
        item: &RawValue,
        lists: &mut BTreeMap<Kind, (Vec<Object>, Vec<ObjectKey>)>,
    ) -> Result<(), Unusable> {
        let header: Header<'_> = parse(item.get().as_bytes())?;
        // Items of a typed list do not repeat their kind.
        let kind = match of.filter(|_| header.kind.is_none()) {
            Some(kind) => Some(kind),
            None => self.kind(&header)?,
        };
        let Some(kind) = kind else { return Ok(()) };
        let (objects, unreadable) = lists.entry(kind).or_default();
        match convert(kind, &header, item) {
            Ok(object) => objects.push(object),
            Err(error) => {
                unreadable.extend(key(kind, &header));
                return Err(error);
            }
        }
        Ok(())
    }

    fn named(&mut self, kind: Kind) {
        if let Some(listing) = &mut self.listing {
            listing.open.insert(kind);
        }
    }

    /// A bookmark closes its own kind: one stream may carry several watches. One that does not
    /// say its kind closes all.
    fn close(&mut self, header: &Header<'_>, changes: &mut Vec<Change>) {
        if let Some(listing) = &mut self.listing {
            match header.meaning() {
                Meaning::One(kind) => {
                    listing.open.remove(&kind);
                }
                Meaning::List(_) | Meaning::OtherVersion(_) | Meaning::Foreign => {
                    listing.open.clear();
                }
            }
        }
        self.complete_if_closed(changes);
    }

    fn complete_if_closed(&mut self, changes: &mut Vec<Change>) {
        if self
            .listing
            .as_ref()
            .is_some_and(|listing| listing.open.is_empty())
        {
            self.complete(changes);
        }
    }
}

fn parse<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, Unusable> {
    serde_json::from_slice(text).map_err(|error| unusable(error.to_string()))
}

fn unusable(message: String) -> Unusable {
    Unusable {
        object: None,
        field: None,
        message,
        benign: false,
    }
}

fn convert(kind: Kind, header: &Header<'_>, object: &RawValue) -> Result<Object, Unusable> {
    let mut json = serde_json::Deserializer::from_str(object.get());
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let failure = match convert::object(kind, Author::ApiServer, tracked) {
        Ok(object) => return Ok(object),
        Err(failure) => failure,
    };
    let (field, message) = match failure {
        Failure::Shape(error) => (track.path().to_string(), error.to_string()),
        Failure::Field(invalid) => (invalid.field, invalid.problem),
    };
    Err(Unusable {
        object: Some(header.described()),
        field: Some(field),
        message,
        benign: false,
    })
}

/// What a deleted object was called; the rest of it does not matter.
fn key(kind: Kind, header: &Header<'_>) -> Result<ObjectKey, Unusable> {
    let Some(name) = header
        .metadata
        .name
        .as_deref()
        .filter(|name| !name.is_empty())
    else {
        return Err(Unusable {
            object: Some(header.described()),
            field: Some("metadata.name".to_owned()),
            ..unusable("required".to_owned())
        });
    };
    let namespace = match kind {
        Kind::Node => "",
        Kind::Service | Kind::EndpointSlice | Kind::Endpoints | Kind::Pod => {
            header.metadata.namespace.as_deref().unwrap_or("default")
        }
    };
    Ok(ObjectKey {
        kind,
        name: ObjectName::new(namespace, name),
    })
}
