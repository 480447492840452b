//! A logical description of services, short to write.

use std::net::{IpAddr, SocketAddr};

use svc_lb::compile::desired::{
    Backend, DesiredPort, Frontend, FrontendAddress, FrontendKind, PortKey, Selection,
};
use svc_lb_common::{Family, Protocol};

/// One port of a service that any node's endpoints serve.
///
/// The family is the backends' unless there are none.
#[must_use]
pub fn port(service: &str, protocol: Protocol, family: Family) -> DesiredPort {
    DesiredPort {
        key: PortKey {
            namespace: "test".to_owned(),
            service: service.to_owned(),
            port_name: format!("{protocol}-{family}"),
            protocol,
            family,
        },
        frontends: Vec::new(),
        backends: Vec::new(),
        internal_local: false,
        external_local: false,
        has_any: false,
        selection: Selection::Random,
        affinity_seconds: None,
        source_ranges: None,
    }
}

/// Fluent additions to a port.
pub trait Describe: Sized {
    /// Adds a frontend.
    #[must_use]
    fn frontend(self, kind: FrontendKind, at: SocketAddr) -> Self;
    /// Adds a ClusterIP.
    #[must_use]
    fn cluster_ip(self, at: SocketAddr) -> Self {
        self.frontend(FrontendKind::ClusterIp, at)
    }
    /// Adds a NodePort.
    #[must_use]
    fn node_port(self, port: u16) -> Self;
    /// Adds backends that are ready, somewhere in the cluster.
    #[must_use]
    fn backends(self, at: &[SocketAddr]) -> Self;
    /// Adds backends that are ready on this node.
    #[must_use]
    fn local_backends(self, at: &[SocketAddr]) -> Self;
    /// Admits the clients in these ranges at load balancers' addresses.
    #[must_use]
    fn admits(self, ranges: &[&str]) -> Self;
}

impl Describe for DesiredPort {
    fn frontend(mut self, kind: FrontendKind, at: SocketAddr) -> Self {
        self.frontends.push(Frontend {
            address: FrontendAddress::Ip(at.ip()),
            port: at.port(),
            kind,
        });
        self
    }

    fn node_port(mut self, port: u16) -> Self {
        self.frontends.push(Frontend {
            address: FrontendAddress::Node,
            port,
            kind: FrontendKind::NodePort,
        });
        self
    }

    fn backends(mut self, at: &[SocketAddr]) -> Self {
        self.backends.extend(at.iter().map(|at| ready(*at, false)));
        self.has_any |= !at.is_empty();
        self
    }

    fn local_backends(mut self, at: &[SocketAddr]) -> Self {
        self.backends.extend(at.iter().map(|at| ready(*at, true)));
        self.has_any |= !at.is_empty();
        self
    }

    fn admits(mut self, ranges: &[&str]) -> Self {
        let parse = |range: &&str| range.parse().expect("a range");
        self.source_ranges = Some(ranges.iter().map(parse).collect());
        self
    }
}

/// A ready endpoint.
#[must_use]
pub const fn ready(address: SocketAddr, local: bool) -> Backend {
    Backend {
        address,
        in_cluster: true,
        in_local: local,
        serving: true,
        local,
        weight: 1,
    }
}

/// The address and port that the text names.
///
/// # Panics
/// If it names none.
#[must_use]
pub fn at(text: &str) -> SocketAddr {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The address that the text names.
///
/// # Panics
/// If it names none.
#[must_use]
pub fn ip(text: &str) -> IpAddr {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}
