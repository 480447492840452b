//! A cluster's objects in little memory: names of nodes and zones once each, and nothing that no compile asks for.

use std::{collections::BTreeSet, sync::Arc};

use crate::model::{Labels, Object};

/// Names that are kept; of more than a cluster can have, further ones are not shared.
const LIMIT: usize = 20_000;

/// The names that were met.
#[derive(Debug, Default)]
pub(super) struct Names(BTreeSet<Arc<str>>);

impl Names {
    /// Trims an object that nobody else has yet.
    pub(super) fn trim(&mut self, object: &mut Object) {
        match object {
            Object::EndpointSlice(slice) => {
                for endpoint in &mut slice.endpoints {
                    let hints = endpoint.hints.iter_mut();
                    let hints =
                        hints.flat_map(|hints| hints.nodes.iter_mut().chain(&mut hints.zones));
                    for name in endpoint.node.iter_mut().chain(hints) {
                        self.share(name);
                    }
                }
            }
            Object::Service(service) => {
                // The cluster's own controllers select.
                if let Some(service) = Arc::get_mut(service) {
                    service.selector = Labels::default();
                }
            }
            Object::Endpoints(_) | Object::Pod(_) | Object::Node(_) => {}
        }
    }

    fn share(&mut self, name: &mut Arc<str>) {
        if let Some(known) = self.0.get(name) {
            *name = Arc::clone(known);
        } else if self.0.len() < LIMIT {
            self.0.insert(Arc::clone(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build::{endpoint, slice};

    #[test]
    fn names_are_kept_once() {
        let mut names = Names::default();
        let mut nodes = Vec::new();
        for host in ["10.0.0.1", "10.0.0.2"] {
            let mut object = Object::EndpointSlice(slice("a", "web", vec![endpoint(host, "here")]));
            names.trim(&mut object);
            let Object::EndpointSlice(slice) = object else {
                unreachable!("it was one");
            };
            nodes.extend(
                slice
                    .endpoints
                    .into_iter()
                    .filter_map(|endpoint| endpoint.node),
            );
        }
        assert!(Arc::ptr_eq(&nodes[0], &nodes[1]));
    }
}
