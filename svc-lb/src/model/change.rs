//! What sources report and what remains of it once ownership is settled.

use std::{fmt, sync::Arc, time::SystemTime};

use serde::Serialize;

use super::object::{EndpointSlice, Endpoints, Node, ObjectName, Pod, Service};

/// The kinds of object that matter here.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Kind {
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// v1 Endpoints.
    Endpoints,
    /// v1 Pod.
    Pod,
    /// v1 Node.
    Node,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
            Self::Pod => "Pod",
            Self::Node => "Node",
        })
    }
}

/// Names one object among all kinds.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ObjectKey {
    /// What.
    pub kind: Kind,
    /// Who.
    pub name: ObjectName,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// One object of any kind.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Object {
    /// v1 Service.
    Service(Arc<Service>),
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice(EndpointSlice),
    /// v1 Endpoints.
    Endpoints(Endpoints),
    /// v1 Pod.
    Pod(Box<Pod>),
    /// v1 Node.
    Node(Node),
}

impl Object {
    /// Names it.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let (kind, name) = match self {
            Self::Service(service) => (Kind::Service, service.name.clone()),
            Self::EndpointSlice(slice) => (Kind::EndpointSlice, slice.name.clone()),
            Self::Endpoints(endpoints) => (Kind::Endpoints, endpoints.name.clone()),
            Self::Pod(pod) => (Kind::Pod, pod.name.clone()),
            Self::Node(node) => (Kind::Node, ObjectName::new("", node.name.clone())),
        };
        ObjectKey { kind, name }
    }
}

/// What a source reports about its own list of objects.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// A new list begins: what follows up to `InitialListComplete` replaces all that the source
    /// named so far. Every source begins with one, implicitly.
    Resync,
    /// The list that began with the source or with `Resync` is complete.
    InitialListComplete,
    /// All objects of one kind that the source has from now on, at once.
    Replace {
        /// The kind.
        kind: Kind,
        /// The objects.
        objects: Vec<Object>,
        /// Objects that the source named but that could not be read: they stay as they were.
        unreadable: Vec<ObjectKey>,
    },
    /// The source named the object, but it could not be read: it stays as it was.
    Unreadable(ObjectKey),
    /// The object is new or has changed.
    Upsert(Object),
    /// The object is gone.
    Delete(ObjectKey),
    /// When what the change before says became so in the cluster (SEMANTICS H3).
    Triggered(SystemTime),
}

/// One effective change of the cluster's state, whichever source it came from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Edit {
    /// The object is new or has changed.
    Upsert(Object),
    /// The object is gone.
    Delete(ObjectKey),
}

/// Names one source, in the order of the command line.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct SourceId(pub u32);

/// Changes of one source that belong together: applied as a whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Batch {
    /// Whose.
    pub source: SourceId,
    /// In order.
    pub changes: Vec<Change>,
}
