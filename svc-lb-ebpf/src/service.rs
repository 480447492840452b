//! Which Service a packet is for.

use svc_lb_common::Protocol;
use svc_lb_common::config::{DROP_UNALLOCATED, EXTERNAL_IPS_OUTSIDE, REJECT_UNDEFINED_PORT};
use svc_lb_common::conntrack::FlowKey;
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_common::service::{Frontend, FrontendKey, Service, kind};

use crate::config::enabled;
use crate::family::Family;
use crate::guard::{self, Concern};
use crate::maps::{SERVICES, read, snapshot};
use crate::met::Met;
use crate::packet::Step;
use crate::stats;

/// A frontend's service.
#[repr(C)]
pub(crate) struct Target {
    /// The service.
    pub(crate) service: Service,
    /// Index of the service.
    pub(crate) index: u32,
    /// What the client's address is: see `service::kind`.
    pub(crate) kind: u32,
}

/// What a packet that may be for a frontend is for. As wide as [`Outcome`], and the service lies in
/// the caller's hands: what is returned beside an outcome is undefined where there is one.
#[repr(u32)]
pub(crate) enum Aim {
    /// The service that was found.
    Service,
    /// An undefined port of a ClusterIP: to be rejected.
    UndefinedPort,
}

/// Finds the service: by address, port and protocol, then by NodePort. Puts it into `target`.
///
/// `inside`: the client is a pod, or the node itself.
#[inline(always)]
pub(crate) fn find<F: Family>(
    key: &FlowKey<F::Addr>,
    concern: Concern,
    inside: bool,
    target: &mut Target,
) -> Step<Aim> {
    let (address, port) = (key.destination, key.destination_port);
    let protocol = key.protocol;
    if let Some(frontend) = lookup::<F>(&FrontendKey::new(address, port, protocol))
        && !hidden(&frontend, inside)
    {
        return set(target, &frontend);
    }
    if !concern.frontend() {
        return Err(Outcome::NoFrontend);
    }
    let entry = lookup::<F>(&FrontendKey::address(address));
    match entry {
        Some(entry) if entry.kind == kind::NODE_PORT as u32 => {
            if !concern.node() {
                return Err(Outcome::NoFrontend);
            }
            node_port::<F>(key, target)
        }
        Some(entry) if entry.kind == kind::CLUSTER_IP as u32 && enabled(REJECT_UNDEFINED_PORT) => {
            Ok(Aim::UndefinedPort)
        }
        None if F::in_service_net(address) && enabled(DROP_UNALLOCATED) => {
            Err(Outcome::Unallocated)
        }
        Some(_) | None => Err(Outcome::NoFrontend),
    }
}

/// Finds the service of a NodePort, whichever address it was reached at.
#[inline(always)]
pub(crate) fn node_port<F: Family>(key: &FlowKey<F::Addr>, target: &mut Target) -> Step<Aim> {
    let transport = Protocol::from_number(key.protocol).ok_or(Outcome::NoFrontend)?;
    if !guard::node_port(transport, key.destination_port) {
        return Err(Outcome::NoFrontend);
    }
    let at = FrontendKey::node_port(key.destination_port, key.protocol);
    set(target, &lookup::<F>(&at).ok_or(Outcome::NoFrontend)?)
}

/// Whether a frontend is none to this client: external IPs can be kept from pods and from the node,
/// as whoever may write Services can claim any address there (CVE-2020-8554).
#[inline(always)]
fn hidden(frontend: &Frontend, inside: bool) -> bool {
    inside && enabled(EXTERNAL_IPS_OUTSIDE) && frontend.kind == kind::EXTERNAL_IP as u32
}

/// Whether an address is a ClusterIP.
#[inline(always)]
pub(crate) fn is_cluster_ip<F: Family>(address: F::Addr) -> bool {
    lookup::<F>(&FrontendKey::address(address))
        .is_some_and(|entry| entry.kind == kind::CLUSTER_IP as u32)
}

/// What becomes of a later fragment to a frontend's address whose ports are not known: dropped where
/// nobody has the address, ClusterIPs or load balancers' that are not this node's.
#[inline(always)]
pub(crate) fn stray<F: Family>(met: &Met<F::Addr>) -> Outcome {
    const CLUSTER_IP: u32 = kind::CLUSTER_IP as u32;
    const LOAD_BALANCER: u32 = kind::LOAD_BALANCER as u32;
    let address = met.key.destination;
    match lookup::<F>(&FrontendKey::address(address)).map(|entry| entry.kind) {
        Some(CLUSTER_IP) => Outcome::Fragment,
        Some(LOAD_BALANCER) if !met.concern.node() => Outcome::Fragment,
        None if F::in_service_net(address) && enabled(DROP_UNALLOCATED) => Outcome::Unallocated,
        Some(_) | None => Outcome::FragmentToStack,
    }
}

#[inline(always)]
fn lookup<F: Family>(key: &FrontendKey<F::Addr>) -> Option<Frontend> {
    let value = F::frontends().get_ptr(key)?;
    // SAFETY: the element stays mapped while the program runs; that it may be given to another
    // key under us is what the check word is for.
    let frontend = unsafe { snapshot(value) };
    if !frontend.belongs_to(key) {
        stats::event(Event::CheckMismatch);
        return None;
    }
    Some(frontend)
}

#[inline(always)]
fn set(target: &mut Target, frontend: &Frontend) -> Step<Aim> {
    *target = Target {
        service: read(&SERVICES, frontend.service).ok_or(Outcome::BadBackend)?,
        index: frontend.service,
        kind: frontend.kind,
    };
    Ok(Aim::Service)
}
