//! Which Pods each Service selects, kept up to date change by change.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::model::{ObjectName, Pod, Service};

/// The Pods that selectors select.
#[derive(Debug, Default)]
pub(super) struct Members {
    selecting: BTreeMap<ObjectName, Arc<Service>>,
    /// Services by namespace and the first label that they select: a Pod needs to be compared
    /// with those of its own labels only.
    by_label: BTreeMap<Label, Vec<String>>,
    pods: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
}

/// Namespace, key and value.
type Label = (String, String, String);

impl Members {
    /// The Pods of a Service, by name.
    pub(super) fn of(&self, service: &ObjectName) -> impl Iterator<Item = &ObjectName> {
        self.pods.get(service).into_iter().flatten()
    }

    /// Takes a Service whose selector may be new.
    pub(super) fn set_service(&mut self, service: &Arc<Service>, pods: &BTreeMap<ObjectName, Pod>) {
        let name = &service.name;
        if self
            .selecting
            .get(name)
            .is_some_and(|known| known.selector == service.selector)
        {
            return;
        }
        self.remove_service(name);
        let Some(label) = first_label(service) else {
            return;
        };
        self.selecting.insert(name.clone(), Arc::clone(service));
        self.by_label
            .entry(label)
            .or_default()
            .push(name.name.clone());
        let first = ObjectName::new(name.namespace.clone(), "");
        let selected: BTreeSet<ObjectName> = pods
            .range(first..)
            .take_while(|(pod, _)| pod.namespace == name.namespace)
            .filter(|(_, pod)| pod.labels.match_all_of(&service.selector))
            .map(|(pod, _)| pod.clone())
            .collect();
        if !selected.is_empty() {
            self.pods.insert(name.clone(), selected);
        }
    }

    pub(super) fn remove_service(&mut self, name: &ObjectName) {
        let Some(service) = self.selecting.remove(name) else {
            return;
        };
        self.pods.remove(name);
        let Some(label) = first_label(&service) else {
            return;
        };
        if let Some(services) = self.by_label.get_mut(&label) {
            services.retain(|service| *service != name.name);
            if services.is_empty() {
                self.by_label.remove(&label);
            }
        }
    }

    /// Takes a Pod that is new, has changed or is gone; adds the Services that it concerns, as it
    /// was and as it is, to `touched`.
    pub(super) fn change_pod(
        &mut self,
        old: Option<&Pod>,
        new: Option<&Pod>,
        touched: &mut BTreeSet<ObjectName>,
    ) {
        if let Some(pod) = old {
            for service in self.selecting(pod) {
                if let Some(pods) = self.pods.get_mut(&service) {
                    pods.remove(&pod.name);
                }
                touched.insert(service);
            }
        }
        if let Some(pod) = new {
            for service in self.selecting(pod) {
                self.pods
                    .entry(service.clone())
                    .or_default()
                    .insert(pod.name.clone());
                touched.insert(service);
            }
        }
    }

    fn selecting(&self, pod: &Pod) -> Vec<ObjectName> {
        let namespace = &pod.name.namespace;
        let mut services = Vec::new();
        for (key, value) in pod.labels.iter() {
            let label = (namespace.clone(), key.to_owned(), value.to_owned());
            for service in self.by_label.get(&label).into_iter().flatten() {
                let name = ObjectName::new(namespace.clone(), service.clone());
                let service = self.selecting.get(&name);
                if service.is_some_and(|service| pod.labels.match_all_of(&service.selector)) {
                    services.push(name);
                }
            }
        }
        services
    }
}

fn first_label(service: &Service) -> Option<Label> {
    let (key, value) = service.selector.iter().next()?;
    Some((
        service.name.namespace.clone(),
        key.to_owned(),
        value.to_owned(),
    ))
}
