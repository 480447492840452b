//! Which addresses of a Service clients can use (SEMANTICS 2.A and 2.B).

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use svc_lb_common::Family;

use super::{
    CompileOptions,
    desired::{Frontend, FrontendAddress, FrontendKind},
    notes::{Notes, Reason},
};
use crate::model::{IpMode, NodeFacts, Service, ServicePort, ServiceType, family_of};

/// Why nothing at all is programmed for a Service.
pub(super) fn why_skipped(service: &Service, options: &CompileOptions) -> Option<Reason> {
    if service.proxy_name != options.proxy_name {
        return Some(Reason::ForeignProxy {
            label: service.proxy_name.clone(),
        });
    }
    if service.service_type == ServiceType::ExternalName {
        return Some(Reason::ExternalName);
    }
    if service.headless {
        return Some(Reason::Headless);
    }
    if service.cluster_ips.is_empty() {
        return Some(Reason::NoClusterIp);
    }
    if service.ports.is_empty() {
        return Some(Reason::NoPorts);
    }
    None
}

/// A Service exists in the families it has a ClusterIP of (SEMANTICS A9).
pub(super) fn serves(service: &Service, family: Family) -> bool {
    cluster_ip(service, family).is_some()
}

fn cluster_ip(service: &Service, family: Family) -> Option<IpAddr> {
    service
        .cluster_ips
        .iter()
        .copied()
        .find(|ip| family_of(*ip) == family)
}

/// All frontends of one port in one family, sorted, unique by address and port.
pub(super) fn of_port(
    service: &Service,
    port: &ServicePort,
    family: Family,
    options: &CompileOptions,
) -> Vec<Frontend> {
    let mut frontends = BTreeMap::new();
    let mut add = |address, port: u16, kind| {
        // The first kind stands: an address that is both a load balancer's and external keeps
        // the load balancer's source ranges.
        frontends.entry((address, port)).or_insert(Frontend {
            address,
            port,
            kind,
        });
    };
    if let Some(ip) = cluster_ip(service, family) {
        add(
            FrontendAddress::Ip(ip),
            port.port.get(),
            FrontendKind::ClusterIp,
        );
    }
    if let Some(node_port) = port.node_port {
        add(
            FrontendAddress::Node,
            node_port.get(),
            FrontendKind::NodePort,
        );
    }
    for ingress in &service.load_balancer {
        if ingress.mode == IpMode::Vip && family_of(ingress.ip) == family {
            add(
                FrontendAddress::Ip(ingress.ip),
                port.port.get(),
                FrontendKind::LoadBalancer,
            );
        }
    }
    let external_ips = service.external_ips.iter();
    let external_ips = external_ips.filter(|_| !options.ignore_external_ips);
    for ip in external_ips.filter(|ip| family_of(**ip) == family) {
        add(
            FrontendAddress::Ip(*ip),
            port.port.get(),
            FrontendKind::ExternalIp,
        );
    }
    frontends.into_values().collect()
}

/// externalTrafficPolicy matters: some frontend is not a ClusterIP.
pub(super) fn externally_accessible(frontends: &[Frontend]) -> bool {
    frontends
        .iter()
        .any(|frontend| frontend.kind != FrontendKind::ClusterIp)
}

/// Whom the load balancer's frontends admit, sorted: everyone where there is no range of the family
/// (SEMANTICS B7).
pub(super) fn source_ranges(
    service: &Service,
    frontends: &[Frontend],
    family: Family,
    node: &NodeFacts,
) -> Option<Vec<IpNet>> {
    let mut ranges: Vec<IpNet> = ranges_of(service, family).map(IpNet::trunc).collect();
    let balanced: Vec<IpAddr> = frontends.iter().filter_map(balanced_ip).collect();
    if ranges.is_empty() || balanced.is_empty() {
        return None;
    }
    // Where a load balancer's address is one of the node's too, the node's own packets to it have
    // it as their source.
    let holds = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
    if node.addresses.iter().any(holds) {
        ranges.extend(balanced.into_iter().map(IpNet::from));
    }
    ranges.sort_unstable();
    ranges.dedup();
    Some(ranges)
}

fn ranges_of(service: &Service, family: Family) -> impl Iterator<Item = &IpNet> {
    let ranges = service.source_ranges.iter();
    ranges.filter(move |range| family_of(range.addr()) == family)
}

fn balanced_ip(frontend: &Frontend) -> Option<IpAddr> {
    match (frontend.kind, frontend.address) {
        (FrontendKind::LoadBalancer, FrontendAddress::Ip(ip)) => Some(ip),
        _ => None,
    }
}

/// Says what a served family leaves out.
pub(super) fn note_family(
    service: &Service,
    family: Family,
    options: &CompileOptions,
    notes: &mut Notes,
) {
    let external_ips = service.external_ips.iter().copied();
    let ignored = external_ips.filter(|ip| options.ignore_external_ips && family_of(*ip) == family);
    for ip in ignored {
        notes.family(family, Reason::ExternalIpsOff { ip });
    }
    let mut balanced = false;
    for ingress in service
        .load_balancer
        .iter()
        .filter(|i| family_of(i.ip) == family)
    {
        match ingress.mode {
            IpMode::Vip => balanced = true,
            IpMode::Proxy => notes.family(family, Reason::ProxiedLoadBalancer { ip: ingress.ip }),
        }
    }
    let ranges_of_other_family =
        !service.source_ranges.is_empty() && ranges_of(service, family).next().is_none();
    if balanced && ranges_of_other_family {
        notes.family(family, Reason::SourceRangesOfOtherFamily);
    }
    let host_name_only = service.load_balancer.is_empty() && service.load_balancer_hostname;
    if host_name_only && service.cluster_ips.first().map(|ip| family_of(*ip)) == Some(family) {
        notes.service(Reason::HostNameLoadBalancer);
    }
    if service.service_type == ServiceType::LoadBalancer
        && service.load_balancer.is_empty()
        && !service.load_balancer_hostname
    {
        notes.service(Reason::LoadBalancerPending);
    }
}

/// Says what an unserved family would have had: addresses that clients may well try.
pub(super) fn note_unserved(service: &Service, family: Family, notes: &mut Notes) {
    let external = service.external_ips.iter().copied();
    let balanced = service.load_balancer.iter().map(|ingress| ingress.ip);
    for ip in external
        .chain(balanced)
        .filter(|ip| family_of(*ip) == family)
    {
        notes.family(family, Reason::NoClusterIpInFamily { ip });
    }
}
