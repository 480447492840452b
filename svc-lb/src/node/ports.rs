//! Which of the node's addresses serve NodePorts (SEMANTICS B1, B2).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use svc_lb_common::Family;
use thiserror::Error;

/// One part of `--nodeport-addresses`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NodePorts {
    /// On every address.
    All,
    /// On the addresses that the node is known by, one of each family.
    Primary,
    /// On the addresses in a range.
    Within(IpNet),
}

/// Text that is no part of `--nodeport-addresses`.
#[derive(Debug, Error, Eq, PartialEq)]
#[error("{0:?} is not all, primary or a range such as 192.0.2.0/24")]
pub struct NodePortsError(String);

impl FromStr for NodePorts {
    type Err = NodePortsError;

    fn from_str(text: &str) -> Result<Self, NodePortsError> {
        match text.trim() {
            "all" => Ok(Self::All),
            "primary" => Ok(Self::Primary),
            range => range
                .parse()
                .map(Self::Within)
                .map_err(|_| NodePortsError(text.to_owned())),
        }
    }
}

impl NodePorts {
    fn serves(self, address: IpAddr, primary: &BTreeSet<IpAddr>) -> bool {
        match self {
            Self::All => true,
            Self::Primary => primary.contains(&address),
            Self::Within(range) => range.contains(&address),
        }
    }

    fn speaks_of(self, family: Family) -> bool {
        match self {
            Self::All | Self::Primary => true,
            Self::Within(range) => Family::of(range.addr()) == family,
        }
    }
}

/// The addresses that serve NodePorts. A family of which no part speaks is served on all of its
/// addresses, as in kube-proxy.
#[must_use]
pub fn select(
    parts: &[NodePorts],
    addresses: &BTreeSet<IpAddr>,
    primary: &BTreeSet<IpAddr>,
) -> BTreeSet<IpAddr> {
    let serves = |address: &&IpAddr| {
        let spoken_of = parts
            .iter()
            .any(|part| part.speaks_of(Family::of(**address)));
        !spoken_of || parts.iter().any(|part| part.serves(**address, primary))
    };
    addresses.iter().filter(serves).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
        let parse = |text: &&str| text.parse().unwrap();
        texts.iter().map(parse).collect()
    }

    fn selected(parts: &[&str]) -> Vec<String> {
        let all = addresses(&[
            "192.0.2.1",
            "192.0.2.129",
            "10.0.0.1",
            "2001:db8::1",
            "fd00::1",
        ]);
        let primary = addresses(&["10.0.0.1", "fd00::1", "fd00::9"]);
        let parts: Vec<NodePorts> = parts.iter().map(|part| part.parse().unwrap()).collect();
        let selected = select(&parts, &all, &primary);
        selected.iter().map(ToString::to_string).collect()
    }

    /// B2: ranges, `primary`, `all`, mixed; a family that nothing is said about has all.
    #[test]
    fn parts_select_addresses() {
        let all = [
            "10.0.0.1",
            "192.0.2.1",
            "192.0.2.129",
            "2001:db8::1",
            "fd00::1",
        ];
        assert_eq!(selected(&["all"]), all);
        assert_eq!(selected(&["192.0.2.0/24", "all"]), all);
        assert_eq!(selected(&[]), all);
        assert_eq!(selected(&["primary"]), ["10.0.0.1", "fd00::1"]);
        assert_eq!(
            selected(&["primary", "192.0.2.128/25"]),
            ["10.0.0.1", "192.0.2.129", "fd00::1"]
        );
        assert_eq!(
            selected(&["192.0.2.128/25"]),
            ["192.0.2.129", "2001:db8::1", "fd00::1"]
        );
        assert_eq!(
            selected(&["203.0.113.0/24", "2001:db8::/32"]),
            ["2001:db8::1"]
        );
    }

    #[test]
    fn other_texts_are_refused_by_name() {
        for text in ["192.0.2.1", "eth0", "localhost", ""] {
            let error = text.parse::<NodePorts>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
