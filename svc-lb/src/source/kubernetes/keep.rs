//! The API server's own Service never loses its last endpoint.
//!
//! Who says that there is no API server is one. A young or mistaken one must not cut this node, or any pod that
//! comes by the Service, off all the others: what would leave the Service without an endpoint is held back
//! until it has one again.

use std::collections::BTreeMap;

use tracing::warn;

use crate::model::{Change, EndpointSlice, Kind, Object, ObjectKey, ObjectName};

/// Holds such changes back.
#[derive(Debug, Default)]
pub(super) struct Keep {
    /// The Service's slices as they were passed on.
    passed: BTreeMap<ObjectName, EndpointSlice>,
    /// What was held back since, by slice; none where it is to be deleted.
    held: BTreeMap<ObjectName, Option<EndpointSlice>>,
}

fn of_the_api_server(slice: &EndpointSlice) -> bool {
    slice.name.namespace == "default" && slice.service.as_deref() == Some("kubernetes")
}

fn usable(slice: &EndpointSlice) -> bool {
    slice
        .endpoints
        .iter()
        .any(|endpoint| endpoint.conditions.ready || endpoint.conditions.serving)
}

impl Keep {
    /// What of a change may take effect now.
    pub(super) fn pass(&mut self, change: Change) -> Vec<Change> {
        match change {
            Change::Upsert(Object::EndpointSlice(slice)) if of_the_api_server(&slice) => {
                self.held.insert(slice.name.clone(), Some(slice));
                self.release()
            }
            Change::Delete(ObjectKey {
                kind: Kind::EndpointSlice,
                name,
            }) if self.passed.contains_key(&name) || self.held.contains_key(&name) => {
                self.held.insert(name, None);
                self.release()
            }
            Change::Replace {
                kind: Kind::EndpointSlice,
                objects,
                unreadable,
            } => vec![self.replace(objects, unreadable)],
            other @ (Change::Resync
            | Change::InitialListComplete
            | Change::Replace { .. }
            | Change::Unreadable(_)
            | Change::Upsert(_)
            | Change::Delete(_)
            | Change::Triggered(_)) => vec![other],
        }
    }

    fn replace(&mut self, mut objects: Vec<Object>, unreadable: Vec<ObjectKey>) -> Change {
        let mut ours = BTreeMap::new();
        for object in &objects {
            if let Object::EndpointSlice(slice) = object
                && of_the_api_server(slice)
            {
                ours.insert(slice.name.clone(), slice.clone());
            }
        }
        self.held.clear();
        if ours.values().any(usable) || !self.passed.values().any(usable) {
            self.passed = ours;
        } else {
            warn!(
                "the API server lists itself without an endpoint; its endpoints stay as they were"
            );
            objects.retain(|object| !matches!(object, Object::EndpointSlice(slice) if of_the_api_server(slice)));
            objects.extend(self.passed.values().cloned().map(Object::EndpointSlice));
            for name in self.passed.keys() {
                self.held.entry(name.clone()).or_insert(None);
            }
            for (name, slice) in ours {
                self.held.insert(name, Some(slice));
            }
        }
        Change::Replace {
            kind: Kind::EndpointSlice,
            objects,
            unreadable,
        }
    }

    /// Lets go of what is held, if an endpoint remains or there was none.
    fn release(&mut self) -> Vec<Change> {
        let mut then = self.passed.clone();
        for (name, slice) in &self.held {
            match slice {
                Some(slice) => then.insert(name.clone(), slice.clone()),
                None => then.remove(name),
            };
        }
        if self.passed.values().any(usable) && !then.values().any(usable) {
            warn!("the API server is said to have no endpoint; its endpoints stay as they were");
            return Vec::new();
        }
        self.passed = then;
        let change = |(name, slice)| match slice {
            Some(slice) => Change::Upsert(Object::EndpointSlice(slice)),
            None => Change::Delete(ObjectKey {
                kind: Kind::EndpointSlice,
                name,
            }),
        };
        // What is there comes before what goes.
        let (there, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|(_, slice)| slice.is_some());
        there.into_iter().chain(gone).map(change).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build::{endpoint, slice};

    fn servers(name: &str, addresses: &[&str]) -> Object {
        let endpoints = addresses.iter().map(|address| endpoint(address, "m"));
        Object::EndpointSlice(slice(name, "kubernetes", endpoints.collect()))
    }

    fn list(objects: Vec<Object>) -> Change {
        Change::Replace {
            kind: Kind::EndpointSlice,
            objects,
            unreadable: Vec::new(),
        }
    }

    /// G8, I15: the last endpoint of the API server stays until there is another one.
    #[test]
    fn the_last_api_server_stays() {
        let full = servers("kubernetes", &["192.0.2.1"]);
        let empty = servers("kubernetes", &[]);
        let other = servers("kubernetes-2", &["192.0.2.2"]);
        let mut keep = Keep::default();
        assert_eq!(
            keep.pass(list(vec![full.clone()])),
            [list(vec![full.clone()])]
        );
        assert_eq!(keep.pass(Change::Upsert(empty.clone())), []);
        assert_eq!(keep.pass(Change::Delete(empty.key())), []);
        // The deletion came last, and takes effect behind its successor.
        assert_eq!(
            keep.pass(Change::Upsert(other.clone())),
            [Change::Upsert(other.clone()), Change::Delete(full.key())]
        );
        // A list that has none does not take it away either.
        assert_eq!(keep.pass(list(vec![])), [list(vec![other.clone()])]);
        assert_eq!(
            keep.pass(list(vec![full.clone()])),
            [list(vec![full.clone()])]
        );
    }

    /// What has no endpoint from the start is nothing to keep, and other Services are left alone.
    #[test]
    fn nothing_else_is_held_back() {
        let mut keep = Keep::default();
        let empty = servers("kubernetes", &[]);
        assert_eq!(
            keep.pass(Change::Upsert(empty.clone())),
            [Change::Upsert(empty)]
        );
        let web = Object::EndpointSlice(slice("web-1", "web", vec![]));
        for change in [Change::Upsert(web.clone()), Change::Delete(web.key())] {
            assert_eq!(keep.pass(change.clone()), [change]);
        }
    }
}
