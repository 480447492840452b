//! The task that sees this node's pods vanish, and says so to the programs (SEMANTICS G4).
//!
//! A pod has vanished when no slice has an endpoint with its address any more, and the interface that it was behind is gone.
//! Endpoint alone: a pod that was taken out of its Services lives on, and so do its connections. Interface alone: it may
//! still be there as an endpoint that terminates, or a new pod has its address already.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rtnetlink::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::dataplane::edges::{EdgeSettings, Role, choose};
use crate::dataplane::vanished::{Vanished, VanishedError};
use crate::node::{Node, whereabouts};

/// Pause before pods are looked for again that were not found.
const LOOK: Duration = Duration::from_secs(2);

/// Addresses of endpoints on this node; none until the first lists are programmed.
pub(super) type Endpoints = Option<Arc<BTreeSet<IpAddr>>>;

/// Runs until it is cancelled, or until nobody tells it anything any more.
pub(super) async fn run(
    mut vanished: Vanished,
    settings: EdgeSettings,
    handle: Handle,
    mut node: watch::Receiver<Arc<Node>>,
    mut endpoints: watch::Receiver<Endpoints>,
    cancel: CancellationToken,
) {
    let mut pods = Pods::default();
    loop {
        let current = Arc::clone(&node.borrow_and_update());
        let here = endpoints.borrow_and_update().clone();
        let mut again = false;
        if let Some(here) = here {
            let told = look(&mut pods, &here, &current, &settings, &handle).await;
            if let Err(error) = &told {
                warn!(
                    error = error as &dyn std::error::Error,
                    "pods not found; looked for again"
                );
            }
            let written = tell(&mut pods, &mut vanished, &here);
            if let Err(error) = &written {
                warn!(
                    error = error as &dyn std::error::Error,
                    "vanished pod not entered; tried again"
                );
            }
            again = told.is_err() || written.is_err() || pods.to_find().next().is_some();
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = node.changed() => if changed.is_err() { return },
            changed = endpoints.changed() => if changed.is_err() { return },
            () = sleep_until(Instant::now() + LOOK), if again => {}
        }
    }
}

async fn look(
    pods: &mut Pods,
    here: &BTreeSet<IpAddr>,
    node: &Node,
    settings: &EdgeSettings,
    handle: &Handle,
) -> Result<(), crate::node::NodeError> {
    pods.set_endpoints(here);
    pods.see_interfaces(|interface| node.links.contains_key(&interface));
    let wanted: Vec<IpAddr> = pods.to_find().collect();
    if !wanted.is_empty() {
        let edges = choose(node, settings).edges;
        let is_pods = |interface: &u32| {
            edges
                .get(interface)
                .is_some_and(|edge| edge.role == Role::Pod)
        };
        let mut found = whereabouts::interfaces(handle, node, &wanted).await?;
        found.retain(|_, interface| is_pods(interface));
        pods.found(&found);
    }
    pods.part();
    Ok(())
}

/// Writes which pods have vanished, and which are back.
fn tell(
    pods: &mut Pods,
    vanished: &mut Vanished,
    here: &BTreeSet<IpAddr>,
) -> Result<(), VanishedError> {
    let back: Vec<IpAddr> = vanished
        .addresses()
        .filter(|at| here.contains(at))
        .collect();
    for address in back {
        vanished.remove(address)?;
    }
    while let Some(address) = pods.gone.first().copied() {
        vanished.insert(address)?;
        debug!(%address, "pod vanished");
        pods.gone.remove(&address);
    }
    Ok(())
}

/// Where a pod is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// Not found yet.
    Unknown,
    /// Behind this interface.
    Behind(u32),
    /// Its interface is gone.
    Lost,
}

/// What is known of this node's pods, by address.
#[derive(Debug, Default)]
struct Pods {
    places: BTreeMap<IpAddr, Place>,
    endpoints: BTreeSet<IpAddr>,
    /// Vanished, and not said so yet.
    gone: BTreeSet<IpAddr>,
}

impl Pods {
    fn set_endpoints(&mut self, here: &BTreeSet<IpAddr>) {
        self.endpoints.clone_from(here);
        for address in here {
            self.gone.remove(address);
            self.places.entry(*address).or_insert(Place::Unknown);
        }
    }

    fn see_interfaces(&mut self, exists: impl Fn(u32) -> bool) {
        for place in self.places.values_mut() {
            if matches!(place, Place::Behind(interface) if !exists(*interface)) {
                *place = Place::Lost;
            }
        }
    }

    /// Addresses that may be found behind an interface now. A pod that is lost may have a successor with its address.
    fn to_find(&self) -> impl Iterator<Item = IpAddr> {
        let places = self.places.iter();
        places
            .filter(|(_, place)| !matches!(place, Place::Behind(_)))
            .map(|(address, _)| *address)
    }

    fn found(&mut self, interfaces: &BTreeMap<IpAddr, u32>) {
        for (address, interface) in interfaces {
            self.places.insert(*address, Place::Behind(*interface));
        }
    }

    /// Lets go of pods whose endpoints are gone, unless they live on. Of one that was never found nothing can be said.
    fn part(&mut self) {
        let Self {
            places,
            endpoints,
            gone,
        } = self;
        places.retain(|address, place| {
            if endpoints.contains(address) || matches!(place, Place::Behind(_)) {
                return true;
            }
            if *place == Place::Lost {
                gone.insert(*address);
            }
            false
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "10.0.0.1";
    const NOBODY: [IpAddr; 0] = [];

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    impl Pods {
        /// A round: these endpoints, these interfaces, and what is found behind which. Returns what vanished.
        fn round(
            &mut self,
            endpoints: &[&str],
            interfaces: &[u32],
            behind: &[(&str, u32)],
        ) -> Vec<IpAddr> {
            self.set_endpoints(&endpoints.iter().map(|text| ip(text)).collect());
            self.see_interfaces(|interface| interfaces.contains(&interface));
            let found = self.to_find().filter_map(|address| {
                let at = behind.iter().find(|(text, _)| ip(text) == address);
                at.map(|(_, interface)| (address, *interface))
            });
            let found = found.collect();
            self.found(&found);
            self.part();
            std::mem::take(&mut self.gone).into_iter().collect()
        }
    }

    /// G4: endpoint and interface must both be gone, in whichever order.
    #[test]
    fn a_pod_vanishes_when_endpoint_and_interface_are_gone() {
        let here = [(POD, 7)];
        let mut pods = Pods::default();
        assert_eq!(pods.round(&[POD], &[7], &here), NOBODY);
        assert_eq!(pods.round(&[POD], &[], &[]), NOBODY, "it terminates");
        assert_eq!(pods.round(&[], &[], &[]), [ip(POD)]);
        assert_eq!(pods.round(&[], &[], &[]), NOBODY, "said once");

        assert_eq!(pods.round(&[POD], &[8], &[(POD, 8)]), NOBODY);
        assert_eq!(pods.round(&[], &[8], &[(POD, 8)]), NOBODY, "it lives on");
        assert_eq!(pods.round(&[], &[8], &[]), NOBODY);
        assert_eq!(pods.round(&[], &[], &[]), [ip(POD)]);
        assert!(pods.places.is_empty());
    }

    /// G4: a successor with the same address is not mistaken for its predecessor.
    #[test]
    fn a_successor_lives() {
        let mut pods = Pods::default();
        assert_eq!(pods.round(&[POD], &[7], &[(POD, 7)]), NOBODY);
        assert_eq!(pods.round(&[POD], &[9], &[(POD, 9)]), NOBODY);
        assert_eq!(
            pods.round(&[], &[9], &[]),
            NOBODY,
            "taken out of its Service"
        );
        assert_eq!(pods.round(&[], &[], &[]), [ip(POD)]);

        // It came while nobody looked, and is no endpoint any more.
        assert_eq!(pods.round(&[POD], &[10], &[(POD, 10)]), NOBODY);
        assert_eq!(pods.round(&[], &[11], &[(POD, 11)]), NOBODY);
    }

    /// G4: of a pod that was never seen nothing is said.
    #[test]
    fn who_was_never_found_does_not_vanish() {
        let mut pods = Pods::default();
        assert_eq!(pods.round(&[POD], &[7], &[]), NOBODY);
        assert_eq!(pods.to_find().count(), 1);
        assert_eq!(pods.round(&[], &[], &[]), NOBODY);
        assert_eq!(pods.to_find().count(), 0);
    }
}
