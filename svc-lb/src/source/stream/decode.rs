//! Watch events and lists to changes.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    model::{Change, Kind, Object, ObjectKey},
    source::{
        convert::{self, Meaning},
        json::{Header, Unusable, convert, key, parse, unusable},
    },
};

/// `ERROR` with this code: the watch is too old, a list follows.
const GONE: i64 = 410;

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
                    Ok(object) => {
                        changes.push(Change::Upsert(object));
                        // What was there before this agent is no change that it was slow with.
                        if self.listed() {
                            changes.extend(header.triggered().map(Change::Triggered));
                        }
                    }
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
