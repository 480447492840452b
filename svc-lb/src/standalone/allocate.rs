//! ClusterIPs, node ports and load balancer addresses for Services that have none.
//!
//! What users wrote is reserved first. Everything else comes from a hash of the Service's name;
//! where two hash alike the first by name goes first, and what was given stays given.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use svc_lb_common::Family;

use super::{
    Config,
    pool::{Pool, to_number},
};
use crate::{
    model::{
        IpFamilyPolicy, IpMode, LoadBalancerIngress, ObjectName, Service, ServiceType,
        TrafficPolicy, family_name, family_of, protocol_name,
    },
    source::{Problem, Severity},
};

/// One value that a Service needs.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Claim {
    ClusterIp(Family),
    /// Of the port called so, as name/protocol.
    NodePort(String),
    LoadBalancer(Family),
    /// Where load balancers ask for endpoints on the node.
    HealthCheckNodePort,
}

impl Claim {
    /// Its name in the state file and in the hash.
    fn label(&self) -> String {
        match self {
            Self::ClusterIp(family) => format!("clusterIP/{}", family_name(*family)),
            Self::NodePort(port) => format!("nodePort/{port}"),
            Self::LoadBalancer(family) => format!("loadBalancer/{}", family_name(*family)),
            Self::HealthCheckNodePort => "healthCheckNodePort".to_owned(),
        }
    }

    fn field(&self) -> &'static str {
        match self {
            Self::ClusterIp(_) => "spec.clusterIPs",
            Self::NodePort(_) => "spec.ports.nodePort",
            Self::LoadBalancer(_) => "status.loadBalancer",
            Self::HealthCheckNodePort => "spec.healthCheckNodePort",
        }
    }
}

/// A value that was handed out, as it is kept.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Value {
    Port(NonZeroU16),
    Ip(IpAddr),
}

impl Value {
    fn number(self) -> u128 {
        match self {
            Self::Port(port) => port.get().into(),
            Self::Ip(ip) => to_number(ip),
        }
    }
}

/// What was handed out: Service as namespace/name, then the claim's label.
pub(super) type Kept = BTreeMap<String, BTreeMap<String, Value>>;

/// Hands out values and remembers whose they are.
#[derive(Debug)]
pub(super) struct Allocator {
    /// Families of `--service-cidr`, the first one is preferred.
    families: Vec<Family>,
    cluster_ips: BTreeMap<Family, Pool>,
    node_ports: Pool,
    load_balancers: BTreeMap<Family, Pool>,
    /// Values written by users, by Service.
    explicit: BTreeMap<ObjectName, Vec<(Claim, u128)>>,
    kept: Kept,
    /// Services that could not be given all they need, and why.
    unmet: BTreeMap<ObjectName, Vec<Problem>>,
    changed: bool,
}

impl Allocator {
    /// Starts with what an earlier run handed out.
    pub(super) fn new(config: &Config, kept: Kept) -> Self {
        let mut families = Vec::new();
        for family in config.service_cidrs.iter().map(|net| family_of(net.addr())) {
            if !families.contains(&family) {
                families.push(family);
            }
        }
        let (first, last) = (*config.node_ports.start(), *config.node_ports.end());
        let name = format!("--node-port-range {first}-{last}");
        Self {
            families,
            cluster_ips: pools("--service-cidr", &config.service_cidrs),
            node_ports: Pool::of_ports(name, first, last),
            load_balancers: pools("--lb-pool", &config.lb_pools),
            explicit: BTreeMap::new(),
            kept,
            unmet: BTreeMap::new(),
            changed: false,
        }
    }

    /// Forgets what Services had that are no longer there. For the start, when all are known.
    pub(super) fn forget_all_but(&mut self, names: &BTreeSet<ObjectName>) {
        let names: BTreeSet<String> = names.iter().map(ToString::to_string).collect();
        let before = self.kept.len();
        self.kept.retain(|name, _| names.contains(name));
        self.changed |= self.kept.len() != before;
    }

    /// Takes Services that are new, have changed or are gone (none), all known ones at first.
    ///
    /// Returns those whose values may now be others: them, and those whose value was wanted by
    /// a user or that now get what they lacked.
    pub(super) fn update<'a>(
        &mut self,
        changed: &BTreeSet<ObjectName>,
        lookup: impl Fn(&ObjectName) -> Option<&'a Service>,
    ) -> BTreeSet<ObjectName> {
        let mut todo = changed.clone();
        for name in changed {
            self.release(name, lookup(name));
        }
        for name in changed {
            if let Some(service) = lookup(name) {
                self.reserve(service, &mut todo);
            }
        }
        // What is free again may be what others waited for.
        todo.extend(self.unmet.keys().cloned());
        for name in &todo {
            if let Some(service) = lookup(name) {
                self.retake(service);
            }
        }
        for name in &todo {
            self.unmet.remove(name);
            if let Some(service) = lookup(name) {
                self.provide(service);
            }
        }
        todo
    }

    /// The Service with the values it was given; the same one if it was given none.
    pub(super) fn complete(&self, service: &Arc<Service>) -> Arc<Service> {
        let Some(kept) = self.kept.get(&service.name.to_string()) else {
            return Arc::clone(service);
        };
        let mut complete = Service::clone(service);
        for claim in self.claims(service).unwrap_or_default() {
            match (kept.get(&claim.label()), claim) {
                (Some(Value::Ip(ip)), Claim::ClusterIp(_)) => complete.cluster_ips.push(*ip),
                (Some(Value::Ip(ip)), Claim::LoadBalancer(_)) => {
                    let ingress = LoadBalancerIngress {
                        ip: *ip,
                        mode: IpMode::Vip,
                    };
                    complete.load_balancer.push(ingress);
                }
                (Some(Value::Port(number)), Claim::NodePort(name)) => {
                    for port in complete.ports.iter_mut().filter(|p| port_name(p) == name) {
                        port.node_port = Some(*number);
                    }
                }
                (Some(Value::Port(number)), Claim::HealthCheckNodePort) => {
                    complete.health_check_node_port = Some(*number);
                }
                _ => {}
            }
        }
        Arc::new(complete)
    }

    /// Services that lack something, and explicit values that two Services wrote.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.unmet.values().flatten()
    }

    /// What was handed out, if that changed since it was last asked for.
    pub(super) fn take_changed(&mut self) -> Option<&Kept> {
        std::mem::take(&mut self.changed).then_some(&self.kept)
    }

    /// What could not be kept is still to be.
    pub(super) fn keep_again(&mut self) {
        self.changed = true;
    }

    fn pool(&mut self, claim: &Claim) -> Option<&mut Pool> {
        match claim {
            Claim::ClusterIp(family) => self.cluster_ips.get_mut(family),
            Claim::NodePort(_) | Claim::HealthCheckNodePort => Some(&mut self.node_ports),
            Claim::LoadBalancer(family) => self.load_balancers.get_mut(family),
        }
    }

    /// Gives back what a Service no longer needs, or all it has.
    fn release(&mut self, name: &ObjectName, service: Option<&Service>) {
        for (claim, value) in self.explicit.remove(name).unwrap_or_default() {
            if let Some(pool) = self.pool(&claim) {
                pool.release(value, name);
            }
        }
        let needed: BTreeSet<String> = service
            .and_then(|service| self.claims(service).ok())
            .into_iter()
            .flatten()
            .map(|claim| claim.label())
            .collect();
        let Some(mut kept) = self.kept.remove(&name.to_string()) else {
            return;
        };
        let before = kept.len();
        let unneeded: Vec<(String, Value)> = kept
            .extract_if(.., |label, _| !needed.contains(label))
            .collect();
        for (label, value) in unneeded {
            self.give_back(&label, value, name);
        }
        self.changed |= kept.len() != before;
        if !kept.is_empty() {
            self.kept.insert(name.to_string(), kept);
        }
    }

    fn give_back(&mut self, label: &str, value: Value, name: &ObjectName) {
        let pools = match label.split('/').next() {
            Some("clusterIP") => &mut self.cluster_ips,
            Some("loadBalancer") => &mut self.load_balancers,
            _ => return self.node_ports.release(value.number(), name),
        };
        if let Value::Ip(ip) = value
            && let Some(pool) = pools.get_mut(&family_of(ip))
        {
            pool.release(value.number(), name);
        }
    }

    /// Reserves what the Service's author wrote; who had it by hash needs another.
    fn reserve(&mut self, service: &Service, todo: &mut BTreeSet<ObjectName>) {
        let name = &service.name;
        let mut explicit = Vec::new();
        for ip in &service.cluster_ips {
            explicit.push((Claim::ClusterIp(family_of(*ip)), to_number(*ip)));
        }
        for ingress in &service.load_balancer {
            explicit.push((
                Claim::LoadBalancer(family_of(ingress.ip)),
                to_number(ingress.ip),
            ));
        }
        for port in &service.ports {
            if let Some(node_port) = port.node_port {
                explicit.push((Claim::NodePort(port_name(port)), node_port.get().into()));
            }
        }
        if let Some(port) = service.health_check_node_port {
            explicit.push((Claim::HealthCheckNodePort, port.get().into()));
        }
        for (claim, value) in &explicit {
            let Some(loser) = self.pool(claim).and_then(|pool| pool.reserve(*value, name)) else {
                continue;
            };
            if let Some(kept) = self.kept.get_mut(&loser.to_string()) {
                kept.retain(|_, kept| kept.number() != *value);
                self.changed = true;
            }
            todo.insert(loser);
        }
        if !explicit.is_empty() {
            explicit.shrink_to_fit();
            self.explicit.insert(name.clone(), explicit);
        }
    }

    /// Makes sure that what was handed out to a Service earlier is still its own.
    fn retake(&mut self, service: &Service) {
        let name = &service.name;
        let Some(mut kept) = self.kept.remove(&name.to_string()) else {
            return;
        };
        for claim in self.claims(service).unwrap_or_default() {
            let Some(value) = kept.get(&claim.label()).copied() else {
                continue;
            };
            let wished = wish(service, &claim).is_none_or(|ip| value == Value::Ip(ip));
            let Some(pool) = self.pool(&claim) else {
                continue;
            };
            let number = value.number();
            if !wished || !(pool.gave(number, name) || pool.retake(number, name)) {
                pool.release(number, name);
                kept.remove(&claim.label());
                self.changed = true;
            }
        }
        self.kept.insert(name.to_string(), kept);
    }

    /// Hands out what a Service still lacks.
    fn provide(&mut self, service: &Service) {
        let name = &service.name;
        let mut problems = self.rivals(service);
        let claims = match self.claims(service) {
            Ok(claims) => claims,
            Err(problem) => {
                problems.push(problem);
                Vec::new()
            }
        };
        for claim in claims {
            let label = claim.label();
            let has = |kept: &Kept| {
                kept.get(&name.to_string())
                    .is_some_and(|kept| kept.contains_key(&label))
            };
            if has(&self.kept) {
                continue;
            }
            match self.allocate(service, &claim) {
                Ok(value) => {
                    self.kept
                        .entry(name.to_string())
                        .or_default()
                        .insert(label, value);
                    self.changed = true;
                }
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            self.unmet.insert(name.clone(), problems);
        }
    }

    fn allocate(&mut self, service: &Service, claim: &Claim) -> Result<Value, Problem> {
        let name = &service.name;
        let seed = format!("{} {name}", claim.label());
        let Some(pool) = self.pool(claim) else {
            let message = "no range of this family is given".to_owned();
            return Err(problem(service, claim.field(), "--service-cidr", message));
        };
        if let Some(ip) = wish(service, claim) {
            if pool.retake(to_number(ip), name) {
                return Ok(Value::Ip(ip));
            }
            let message = format!("{ip} is taken, or not in the pool");
            return Err(problem(service, "spec.loadBalancerIP", &pool.name, message));
        }
        let Some(number) = pool.allocate(&seed, name) else {
            let message = format!("all {} are in use: enlarge the pool", pool.size());
            return Err(problem(service, claim.field(), &pool.name, message));
        };
        Ok(match claim {
            Claim::NodePort(_) | Claim::HealthCheckNodePort => {
                let port = u16::try_from(number).ok().and_then(NonZeroU16::new);
                Value::Port(port.unwrap_or(NonZeroU16::MAX))
            }
            Claim::ClusterIp(family) | Claim::LoadBalancer(family) => {
                Value::Ip(from_number(number, *family))
            }
        })
    }

    /// Explicit values that another Service wrote too.
    fn rivals(&mut self, service: &Service) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (claim, value) in self
            .explicit
            .get(&service.name)
            .cloned()
            .unwrap_or_default()
        {
            let Some(pool) = self.pool(&claim) else {
                continue;
            };
            if let Some(rival) = pool.rival(value, &service.name) {
                let text = match &claim {
                    Claim::NodePort(_) | Claim::HealthCheckNodePort => value.to_string(),
                    Claim::ClusterIp(family) | Claim::LoadBalancer(family) => {
                        from_number(value, *family).to_string()
                    }
                };
                let message = format!("{text} is also Service {rival}'s");
                problems.push(problem(service, claim.field(), &pool.name, message));
            }
        }
        problems
    }

    /// The values that a Service needs and its author did not write.
    fn claims(&self, service: &Service) -> Result<Vec<Claim>, Problem> {
        if service.headless || service.service_type == ServiceType::ExternalName {
            return Ok(Vec::new());
        }
        let families = self.families(service)?;
        let has = |family: &Family| {
            service
                .cluster_ips
                .iter()
                .any(|ip| family_of(*ip) == *family)
        };
        let mut claims: Vec<Claim> = families
            .iter()
            .filter(|f| !has(f))
            .copied()
            .map(Claim::ClusterIp)
            .collect();
        if needs_node_ports(service) {
            let missing = service.ports.iter().filter(|port| port.node_port.is_none());
            claims.extend(missing.map(|port| Claim::NodePort(port_name(port))));
        }
        if needs_health_check(service) && service.health_check_node_port.is_none() {
            claims.push(Claim::HealthCheckNodePort);
        }
        let pending = service.load_balancer.is_empty() && !service.load_balancer_hostname;
        if service.service_type == ServiceType::LoadBalancer && pending {
            // Without a pool it stays pending, as in a cluster without load balancers.
            let pooled = families
                .iter()
                .filter(|f| self.load_balancers.contains_key(f));
            claims.extend(pooled.copied().map(Claim::LoadBalancer));
        }
        Ok(claims)
    }

    /// The families of a Service, the first one preferred.
    fn families(&self, service: &Service) -> Result<Vec<Family>, Problem> {
        let written: Vec<Family> = service
            .cluster_ips
            .iter()
            .map(|ip| family_of(*ip))
            .collect();
        if !written.is_empty() && service.ip_families.iter().all(|f| written.contains(f)) {
            let one_wanted = service
                .ip_family_policy
                .is_none_or(|p| p == IpFamilyPolicy::SingleStack);
            // An object from the API server has all it will get.
            if one_wanted || !service.ip_families.is_empty() {
                return Ok(written);
            }
        }
        let mut order = written;
        let wished = service.ip_families.iter().chain(&self.families);
        for family in wished {
            if !order.contains(family) {
                order.push(*family);
            }
        }
        let count = match service.ip_family_policy {
            Some(IpFamilyPolicy::RequireDualStack) => 2,
            Some(IpFamilyPolicy::PreferDualStack) => order.len().min(self.families.len().max(1)),
            Some(IpFamilyPolicy::SingleStack) => 1,
            None => service.ip_families.len().max(1),
        };
        order.truncate(count);
        let available = |family: &Family| {
            self.families.contains(family)
                || service
                    .cluster_ips
                    .iter()
                    .any(|ip| family_of(*ip) == *family)
        };
        if let Some(missing) = order.iter().find(|family| !available(family)) {
            let message = format!("no range of {} is given", family_name(*missing));
            return Err(problem(
                service,
                "spec.ipFamilies",
                "--service-cidr",
                message,
            ));
        }
        if order.len() < count {
            let message = if order.is_empty() {
                "no range is given to take an address from".to_owned()
            } else {
                "RequireDualStack needs a range of each family".to_owned()
            };
            return Err(problem(
                service,
                "spec.clusterIPs",
                "--service-cidr",
                message,
            ));
        }
        Ok(order)
    }
}

/// One pool for each family among `nets`.
fn pools(option: &str, nets: &[IpNet]) -> BTreeMap<Family, Pool> {
    let mut by_family: BTreeMap<Family, Vec<IpNet>> = BTreeMap::new();
    for net in nets {
        by_family
            .entry(family_of(net.addr()))
            .or_default()
            .push(*net);
    }
    let pool = |(family, nets): (Family, Vec<IpNet>)| {
        let texts: Vec<String> = nets.iter().map(ToString::to_string).collect();
        (
            family,
            Pool::of_addresses(format!("{option} {}", texts.join(",")), nets),
        )
    };
    by_family.into_iter().map(pool).collect()
}

/// The address that the author asked for.
fn wish(service: &Service, claim: &Claim) -> Option<IpAddr> {
    let ip = service.requested_load_balancer_ip?;
    (*claim == Claim::LoadBalancer(family_of(ip))).then_some(ip)
}

fn needs_node_ports(service: &Service) -> bool {
    match service.service_type {
        ServiceType::NodePort => true,
        ServiceType::LoadBalancer => service.allocate_node_ports,
        ServiceType::ClusterIP | ServiceType::ExternalName => false,
    }
}

fn needs_health_check(service: &Service) -> bool {
    service.service_type == ServiceType::LoadBalancer
        && service.external_policy == TrafficPolicy::Local
}

fn port_name(port: &crate::model::ServicePort) -> String {
    format!("{}/{}", port.name, protocol_name(port.protocol))
}

fn from_number(number: u128, family: Family) -> IpAddr {
    match family {
        // Numbers of this pool come from addresses of this family.
        Family::V4 => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(0)).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

fn problem(service: &Service, field: &str, pool: &str, message: String) -> Problem {
    Problem {
        severity: Severity::Error,
        place: pool.to_owned(),
        object: Some(format!("Service {}", service.name)),
        field: Some(field.to_owned()),
        message,
    }
}
