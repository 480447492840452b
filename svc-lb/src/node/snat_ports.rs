//! Whose the ports of translated sources are: ours alone, or also those of the node's own connections.

use std::fs;
use std::io;
use std::ops::RangeInclusive;

use thiserror::Error;

const LOCAL_RANGE: &str = "net.ipv4.ip_local_port_range";
const RESERVED: &str = "net.ipv4.ip_local_reserved_ports";

/// Why ports cannot be used.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PortsError {
    #[error("read {name}")]
    Read {
        name: &'static str,
        source: io::Error,
    },
    #[error("{name} says {text:?}, which is no list of ports")]
    Malformed { name: &'static str, text: String },
    #[error(
        "--snat-ports {}-{}: this node's own connections may have port {port} \
         ({LOCAL_RANGE} is {}-{}); choose others, or add them to {RESERVED}",
        ports.start(), ports.end(), local.start(), local.end()
    )]
    Shared {
        ports: RangeInclusive<u16>,
        local: RangeInclusive<u16>,
        port: u16,
    },
}

/// Makes sure that the kernel gives none of `ports` to a connection of the node's own.
pub fn check(ports: &RangeInclusive<u16>) -> Result<(), PortsError> {
    let local = read(LOCAL_RANGE)?;
    let reserved = read(RESERVED)?;
    unshared(ports, &local, &reserved)
}

fn read(name: &'static str) -> Result<String, PortsError> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    fs::read_to_string(path).map_err(|source| PortsError::Read { name, source })
}

/// `local` is two numbers, `reserved` a list such as "8080,9000-9100".
fn unshared(ports: &RangeInclusive<u16>, local: &str, reserved: &str) -> Result<(), PortsError> {
    let malformed = |name, text: &str| PortsError::Malformed {
        name,
        text: text.trim().to_owned(),
    };
    let local = local
        .trim()
        .split_once(char::is_whitespace)
        .and_then(|(first, last)| Some(first.parse().ok()?..=last.trim().parse().ok()?))
        .ok_or_else(|| malformed(LOCAL_RANGE, local))?;
    let reserved = parse_list(reserved).ok_or_else(|| malformed(RESERVED, reserved))?;
    let shared = ports
        .clone()
        .find(|port| local.contains(port) && !reserved.iter().any(|range| range.contains(port)));
    match shared {
        None => Ok(()),
        Some(port) => Err(PortsError::Shared {
            ports: ports.clone(),
            local,
            port,
        }),
    }
}

fn parse_list(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    let ends = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim()
        .split(',')
        .filter(|part| !part.is_empty())
        .map(ends)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: &str = "32768\t60999\n";

    #[test]
    fn ports_of_the_nodes_own_connections_are_refused_unless_reserved() {
        unshared(&(61_000..=65_535), LOCAL, "\n").unwrap();
        let error = unshared(&(60_000..=65_535), LOCAL, "8080,60000-60500\n").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("port 60501"), "{text}");
        assert!(text.contains("32768-60999"), "{text}");
        unshared(&(60_000..=65_535), LOCAL, "8080,60000-60999\n").unwrap();
    }

    #[test]
    fn what_the_kernel_never_says_is_an_error() {
        assert!(matches!(
            unshared(&(1..=2), "32768", ""),
            Err(PortsError::Malformed {
                name: LOCAL_RANGE,
                ..
            })
        ));
        assert!(matches!(
            unshared(&(1..=2), LOCAL, "a-b"),
            Err(PortsError::Malformed { name: RESERVED, .. })
        ));
    }
}
