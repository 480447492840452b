//! Which Pods each Service selects, kept up to date change by change.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{ObjectName, Pod, Service};

/// The Pods that selectors select.
#[derive(Debug, Default)]
pub(super) struct Members {
    selectors: BTreeMap<ObjectName, BTreeMap<String, String>>,
    /// Services by namespace and the first label that they select: a Pod needs to be compared
    /// with those of its own labels only.
    by_label: BTreeMap<(String, String, String), BTreeSet<String>>,
    pods: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
}

impl Members {
    /// The Pods of a Service, by name.
    pub(super) fn of(&self, service: &ObjectName) -> impl Iterator<Item = &ObjectName> {
        self.pods.get(service).into_iter().flatten()
    }

    /// Takes a Service whose selector may be new.
    pub(super) fn set_service(&mut self, service: &Service, pods: &BTreeMap<ObjectName, Pod>) {
        let name = &service.name;
        if self.selectors.get(name) == Some(&service.selector) {
            return;
        }
        self.remove_service(name);
        let Some(label) = first_label(name, &service.selector) else {
            return;
        };
        self.selectors
            .insert(name.clone(), service.selector.clone());
        self.by_label
            .entry(label)
            .or_default()
            .insert(name.name.clone());
        let first = ObjectName::new(name.namespace.clone(), "");
        let selected: BTreeSet<ObjectName> = pods
            .range(first..)
            .take_while(|(pod, _)| pod.namespace == name.namespace)
            .filter(|(_, pod)| selects(&service.selector, pod))
            .map(|(pod, _)| pod.clone())
            .collect();
        self.pods.insert(name.clone(), selected);
    }

    pub(super) fn remove_service(&mut self, name: &ObjectName) {
        let Some(selector) = self.selectors.remove(name) else {
            return;
        };
        self.pods.remove(name);
        let Some(label) = first_label(name, &selector) else {
            return;
        };
        if let Some(services) = self.by_label.get_mut(&label) {
            services.remove(&name.name);
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
        for (key, value) in &pod.labels {
            let label = (namespace.clone(), key.clone(), value.clone());
            for service in self.by_label.get(&label).into_iter().flatten() {
                let name = ObjectName::new(namespace.clone(), service.clone());
                if self
                    .selectors
                    .get(&name)
                    .is_some_and(|selector| selects(selector, pod))
                {
                    services.push(name);
                }
            }
        }
        services
    }
}

fn first_label(
    name: &ObjectName,
    selector: &BTreeMap<String, String>,
) -> Option<(String, String, String)> {
    let (key, value) = selector.first_key_value()?;
    Some((name.namespace.clone(), key.clone(), value.clone()))
}

fn selects(selector: &BTreeMap<String, String>, pod: &Pod) -> bool {
    selector
        .iter()
        .all(|(key, value)| pod.labels.get(key) == Some(value))
}
