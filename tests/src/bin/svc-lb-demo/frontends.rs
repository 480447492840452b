//! The addresses of services, as the agent knows them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use serde_json::Value;
use svc_lb_tests::lab::addresses::NODE_A;
use svc_lb_tests::lab::{AgentProcess, Family};

/// Frontends of all services.
#[derive(Debug)]
pub(crate) struct Frontends {
    services: BTreeMap<String, Vec<Frontend>>,
}

/// One address and port a client may use.
#[derive(Debug, Clone)]
pub(crate) struct Frontend {
    pub(crate) kind: Kind,
    pub(crate) addr: SocketAddr,
    port_name: String,
}

/// What an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
}

impl Frontends {
    /// Asks the agent.
    pub(crate) fn ask(agent: &AgentProcess) -> Result<Self> {
        let dump = agent.dump("services")?;
        let mut services: BTreeMap<String, Vec<Frontend>> = BTreeMap::new();
        let records = dump.as_array().context("dump services is not an array")?;
        for record in records {
            let key = &record["key"];
            let name = format!("{}/{}", text(&key["namespace"])?, text(&key["service"])?);
            let port_name = text(&key["port_name"])?;
            let frontends = record["frontends"]
                .as_array()
                .context("a service without frontends")?;
            for frontend in frontends {
                services
                    .entry(name.clone())
                    .or_default()
                    .push(Frontend::read(frontend, key, port_name)?);
            }
        }
        Ok(Self { services })
    }

    /// The frontends of one service, none if nothing is programmed for it.
    pub(crate) fn of(&self, service: &str) -> &[Frontend] {
        self.services.get(service).map_or(&[], Vec::as_slice)
    }

    /// One frontend of a service.
    pub(crate) fn one(
        &self,
        service: &str,
        kind: Kind,
        family: Family,
        port_name: &str,
    ) -> Result<SocketAddr> {
        self.of(service)
            .iter()
            .find(|frontend| {
                frontend.kind == kind
                    && frontend.addr.is_ipv4() == (family == Family::V4)
                    && frontend.port_name == port_name
            })
            .map(|frontend| frontend.addr)
            .with_context(|| {
                format!("{service} has no {kind:?} of {family} for port {port_name:?}")
            })
    }
}

impl Frontend {
    fn read(frontend: &Value, key: &Value, port_name: &str) -> Result<Self> {
        let kind = match text(&frontend["kind"])? {
            "clusterIp" => Kind::ClusterIp,
            "nodePort" => Kind::NodePort,
            "loadBalancer" => Kind::LoadBalancer,
            _ => Kind::ExternalIp,
        };
        let family = match text(&key["family"])? {
            "IPv6" | "ipv6" | "v6" | "V6" => Family::V6,
            _ => Family::V4,
        };
        let ip: IpAddr = match frontend.pointer("/address/ip").and_then(Value::as_str) {
            Some(ip) => ip.parse().with_context(|| format!("address {ip}"))?,
            None => NODE_A.of(family),
        };
        let port = frontend["port"]
            .as_u64()
            .context("a frontend without port")?;
        Ok(Self {
            kind,
            addr: SocketAddr::new(ip, u16::try_from(port).context("port")?),
            port_name: port_name.to_owned(),
        })
    }
}

fn text(value: &Value) -> Result<&str> {
    value
        .as_str()
        .with_context(|| format!("dump services: {value} is not a text"))
}
