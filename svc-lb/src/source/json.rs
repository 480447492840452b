//! One object in JSON, as the API server writes it, to the model's.

use std::{borrow::Cow, time::SystemTime};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::convert::{self, Author, Failure, Meaning};
use crate::model::{Kind, Object, ObjectKey, ObjectName};

/// A value that says nothing that can be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Unusable {
    /// Kind and name, where they could be read.
    pub(super) object: Option<String>,
    /// Path of the field, where it is one.
    pub(super) field: Option<String>,
    pub(super) message: String,
    /// It is well-formed and no mistake of the sender's.
    pub(super) benign: bool,
}

/// What every object says of itself, and what `Status` says.
#[derive(Deserialize)]
pub(super) struct Header<'a> {
    #[serde(borrow)]
    pub(super) kind: Option<Cow<'a, str>>,
    #[serde(rename = "apiVersion", borrow)]
    pub(super) api_version: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    pub(super) metadata: Metadata<'a>,
    pub(super) code: Option<i64>,
    #[serde(borrow)]
    pub(super) message: Option<Cow<'a, str>>,
}

#[derive(Default, Deserialize)]
pub(super) struct Metadata<'a> {
    #[serde(borrow)]
    pub(super) name: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) namespace: Option<Cow<'a, str>>,
    #[serde(rename = "resourceVersion", borrow)]
    pub(super) resource_version: Option<Cow<'a, str>>,
    #[serde(default)]
    pub(super) annotations: Option<Annotations>,
}

#[derive(Deserialize)]
pub(super) struct Annotations {
    /// "true" on the bookmark that ends the initial events of a watch.
    #[serde(rename = "k8s.io/initial-events-end")]
    pub(super) initial_events_end: Option<String>,
    /// On an EndpointSlice: when what it says became so in the cluster.
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    pub(super) trigger_time: Option<String>,
}

impl Header<'_> {
    pub(super) fn meaning(&self) -> Meaning {
        let text = |field: &Option<Cow<'_, str>>| field.as_deref().unwrap_or_default().to_owned();
        convert::meaning(&text(&self.api_version), &text(&self.kind))
    }

    /// When what the object says became so, where it says so in a way that can be read.
    pub(super) fn triggered(&self) -> Option<SystemTime> {
        let text = self
            .metadata
            .annotations
            .as_ref()?
            .trigger_time
            .as_deref()?;
        Some(text.parse::<jiff::Timestamp>().ok()?.into())
    }

    pub(super) fn described(&self) -> String {
        let kind = self.kind.as_deref().unwrap_or("object without kind");
        match (&self.metadata.namespace, &self.metadata.name) {
            (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
            (None, Some(name)) => format!("{kind} {name}"),
            (_, None) => kind.to_owned(),
        }
    }
}

pub(super) fn parse<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, Unusable> {
    serde_json::from_slice(text).map_err(|error| unusable(error.to_string()))
}

pub(super) fn unusable(message: String) -> Unusable {
    Unusable {
        object: None,
        field: None,
        message,
        benign: false,
    }
}

pub(super) fn convert(
    kind: Kind,
    header: &Header<'_>,
    object: &RawValue,
) -> Result<Object, Unusable> {
    let text = object.get();
    // Keeping track of the path costs as much as reading does: only where something is wrong.
    let mut json = serde_json::Deserializer::from_str(text);
    if let Ok(object) = convert::object(kind, Author::ApiServer, &mut json) {
        return Ok(object);
    }
    let mut json = serde_json::Deserializer::from_str(text);
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
pub(super) fn key(kind: Kind, header: &Header<'_>) -> Result<ObjectKey, Unusable> {
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
