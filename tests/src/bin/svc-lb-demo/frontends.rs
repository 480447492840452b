//! The addresses of services, as the agent programmed them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use svc_lb_tests::lab::addresses::NODE_A;
use svc_lb_tests::lab::{AgentProcess, Family};

/// Frontends of all services, by `namespace/name`.
#[derive(Debug)]
pub(crate) struct Frontends {
    services: BTreeMap<String, Vec<Row>>,
}

/// What an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
}

/// A row of `svc-lb dump frontends -o json`.
#[derive(Debug, Deserialize)]
struct Row {
    name: Whose,
    address: Address,
    port: u16,
    kind: Kind,
}

/// Which port of which service.
#[derive(Debug, Deserialize)]
struct Whose {
    namespace: String,
    service: String,
    port_name: String,
    family: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Address {
    /// Every address of the node.
    Node,
    Ip(IpAddr),
}

impl Frontends {
    /// Asks the agent.
    pub(crate) fn ask(agent: &AgentProcess) -> Result<Self> {
        let rows: Vec<Row> =
            serde_json::from_value(agent.dump("frontends")?).context("read dump frontends")?;
        let mut services: BTreeMap<String, Vec<Row>> = BTreeMap::new();
        for row in rows {
            let service = format!("{}/{}", row.name.namespace, row.name.service);
            services.entry(service).or_default().push(row);
        }
        Ok(Self { services })
    }

    /// Number of frontends of one service, 0 if nothing is programmed for it.
    pub(crate) fn count(&self, service: &str) -> usize {
        self.services.get(service).map_or(0, Vec::len)
    }

    /// One frontend of a service.
    pub(crate) fn one(
        &self,
        service: &str,
        kind: Kind,
        family: Family,
        port_name: &str,
    ) -> Result<SocketAddr> {
        let family_name = match family {
            Family::V4 => "v4",
            Family::V6 => "v6",
        };
        self.services
            .get(service)
            .into_iter()
            .flatten()
            .find(|row| {
                row.kind == kind
                    && row.name.family == family_name
                    && row.name.port_name == port_name
            })
            .map(|row| match row.address {
                Address::Node => NODE_A.socket(family, row.port),
                Address::Ip(ip) => SocketAddr::new(ip, row.port),
            })
            .with_context(|| {
                format!("{service} has no {kind:?} of {family} for port {port_name:?}")
            })
    }
}
