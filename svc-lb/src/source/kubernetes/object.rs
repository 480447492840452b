//! What arrives from the API server, trimmed while it is read.

use std::{borrow::Cow, fmt::Debug, marker::PhantomData, time::SystemTime};

use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::Resource;
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::value::RawValue;

use crate::{
    model::{Kind, Object, ObjectKey},
    source::json::{self, Header, Unusable},
};

/// A kind that is watched.
pub(super) trait Watched: Resource<DynamicType = ()> + Debug + 'static {
    const KIND: Kind;
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
}

impl Watched for Node {
    const KIND: Kind = Kind::Node;
}

/// An object of the model's, read in one go with the API server's: of that, nothing is kept. `K` is
/// the API server's type.
#[derive(Debug)]
pub(super) struct Arrived<K> {
    /// Name and resource version only.
    meta: Box<ObjectMeta>,
    pub(super) content: Content,
    kind: PhantomData<fn() -> K>,
}

/// What became of it.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) key: ObjectKey,
    pub(super) object: Result<Object, Unusable>,
    /// When it became so.
    pub(super) triggered: Option<SystemTime>,
}

impl<K> Clone for Arrived<K> {
    fn clone(&self) -> Self {
        Self {
            meta: self.meta.clone(),
            content: self.content.clone(),
            kind: PhantomData,
        }
    }
}

impl<'de, K: Watched> Deserialize<'de> for Arrived<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Twice read, but one that is not as it should be does not spoil the list it is in.
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let mut header: Header<'_> = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
        let kind = K::kind(&());
        header.kind.get_or_insert(kind);
        let key = json::key(K::KIND, &header).map_err(|error| D::Error::custom(error.message))?;
        let object = json::convert(K::KIND, &header, &text);
        let owned = |text: &Option<Cow<'_, str>>| text.as_deref().map(str::to_owned);
        let triggered = header.triggered();
        let metadata = header.metadata;
        Ok(Self {
            meta: Box::new(ObjectMeta {
                name: owned(&metadata.name),
                namespace: owned(&metadata.namespace),
                resource_version: owned(&metadata.resource_version),
                ..ObjectMeta::default()
            }),
            content: Content {
                key,
                object,
                triggered,
            },
            kind: PhantomData,
        })
    }
}

impl<K: Watched> Resource for Arrived<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
