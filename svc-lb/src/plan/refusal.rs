//! What could not be programmed, and what to do about it.

use std::net::IpAddr;

use serde::Serialize;
use svc_lb_common::limits::name;
use svc_lb_common::{Family, Protocol};

use crate::compile::desired::PortKey;
use crate::dataplane::{FrontendAt, map_name};

/// A table with a limit.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Table {
    /// Frontends of one family.
    Frontends(Family),
    /// Services.
    Services,
    /// Slots.
    Slots,
    /// Backends of one family.
    Backends(Family),
    /// Source ranges of one family.
    SourceRanges(Family),
}

impl Table {
    /// The map's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Frontends(family) => map_name(name::FRONTENDS, family),
            Self::Services => name::SERVICES,
            Self::Slots => name::SLOTS,
            Self::Backends(family) => map_name(name::BACKENDS, family),
            Self::SourceRanges(family) => map_name(name::SOURCE_RANGES, family),
        }
    }
}

/// Why something desired is not programmed, or not as desired.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// No room. A port that was programmed before keeps what it has, less what left it; of source
    /// ranges that do not fit it admits those that were there, even if that is nobody.
    #[error(
        "{} needs {needed} more in table {name}, where {free} of {limit} are free; raise it with \
         --map-size {name}=ENTRIES",
        Port(port), name = table.name()
    )]
    TableFull {
        /// Whose.
        port: PortKey,
        /// Which table.
        table: Table,
        /// Elements that are missing.
        needed: u64,
        /// Elements that are free; for slots perhaps not in one piece.
        free: u64,
        /// Elements the table has.
        limit: u32,
    },
    /// More endpoints than a range can hold.
    #[error(
        "{} has {endpoints} endpoints in one set; the limit is 65535",
        Port(port)
    )]
    TooManyEndpoints {
        /// Whose.
        port: PortKey,
        /// How many.
        endpoints: u64,
    },
    /// Another service has the same address, port and protocol, and comes first: ClusterIPs before
    /// load balancers' addresses, external IPs last, then by namespace and name.
    #[error(
        "{} does not get {}: {} has it and comes first (ClusterIPs do, then load balancers' addresses, \
         then external IPs; among equals the first by namespace and name); change one of them",
        Port(port),
        At(at),
        Port(winner)
    )]
    Conflict {
        /// Who does not get it.
        port: PortKey,
        /// Who has it.
        winner: PortKey,
        /// What both want.
        at: FrontendAt,
    },
    /// No room for one of the node's own addresses: NodePorts do not work on it.
    #[error(
        "node address {address} does not serve NodePorts: table {name} is full with {limit}; raise \
         it with --map-size {name}=ENTRIES",
        name = table.name()
    )]
    NodeAddress {
        /// Which.
        address: IpAddr,
        /// Which table.
        table: Table,
        /// Elements the table has.
        limit: u32,
    },
}

/// What is missing, before it is said for whom.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shortage {
    /// [`Refusal::TableFull`].
    Table {
        table: Table,
        needed: u64,
        free: u64,
        limit: u32,
    },
    /// [`Refusal::TooManyEndpoints`].
    Endpoints(u64),
}

impl Shortage {
    /// The refusal of a port.
    pub(super) fn of(self, port: &PortKey) -> Refusal {
        let port = port.clone();
        match self {
            Self::Table {
                table,
                needed,
                free,
                limit,
            } => Refusal::TableFull {
                port,
                table,
                needed,
                free,
                limit,
            },
            Self::Endpoints(endpoints) => Refusal::TooManyEndpoints { port, endpoints },
        }
    }
}

/// A service port for people.
struct Port<'a>(&'a PortKey);

impl std::fmt::Display for Port<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = self.0;
        write!(f, "service {}/{}", key.namespace, key.service)?;
        if key.port_name.is_empty() {
            return write!(f, " ({}, {})", key.protocol, key.family);
        }
        write!(
            f,
            " port {} ({}, {})",
            key.port_name, key.protocol, key.family
        )
    }
}

/// A frontend for people.
struct At<'a>(&'a FrontendAt);

impl std::fmt::Display for At<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let FrontendAt {
            address,
            port,
            protocol,
        } = self.0;
        if address.is_unspecified() {
            write!(f, "node port {port}")?;
        } else {
            write!(f, "{}", std::net::SocketAddr::new(*address, *port))?;
        }
        match Protocol::from_number(*protocol) {
            Some(protocol) => write!(f, "/{protocol}"),
            None => write!(f, "/{protocol}"),
        }
    }
}
