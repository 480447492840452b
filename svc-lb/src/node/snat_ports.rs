//! Whose the ports of translated sources are: ours alone, or also those of the node's own connections.

use std::collections::BTreeSet;
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
    #[error("write {text:?} to {name}")]
    Write {
        name: &'static str,
        text: String,
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

/// Adds `ports` to the kernel's list of reserved ports. `note` is called with each range that was not on it, before the
/// list is written: [`release`] takes no other off.
pub fn reserve<E: From<PortsError>>(
    ports: &RangeInclusive<u16>,
    mut note: impl FnMut(&RangeInclusive<u16>) -> Result<(), E>,
) -> Result<(), E> {
    let mut reserved = reserved()?;
    let missing: BTreeSet<u16> = ports
        .clone()
        .filter(|port| !reserved.contains(port))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    for range in ranges(&missing) {
        note(&range)?;
    }
    reserved.extend(missing);
    Ok(write(&reserved)?)
}

/// Takes ports off the kernel's list of reserved ports.
pub fn release(ports: &RangeInclusive<u16>) -> Result<(), PortsError> {
    let mut reserved = reserved()?;
    let before = reserved.len();
    reserved.retain(|port| !ports.contains(port));
    if reserved.len() == before {
        return Ok(());
    }
    write(&reserved)
}

fn reserved() -> Result<BTreeSet<u16>, PortsError> {
    let text = read(RESERVED)?;
    let ranges = parse_list(&text).ok_or(PortsError::Malformed {
        name: RESERVED,
        text,
    })?;
    Ok(ranges.into_iter().flatten().collect())
}

fn write(ports: &BTreeSet<u16>) -> Result<(), PortsError> {
    let ranges = ranges(ports);
    let ranges = ranges
        .iter()
        .map(|range| format!("{}-{}", range.start(), range.end()));
    // A list of nothing is an empty line.
    let text = ranges.collect::<Vec<_>>().join(",") + "\n";
    fs::write(path(RESERVED), &text).map_err(|source| PortsError::Write {
        name: RESERVED,
        text,
        source,
    })
}

/// Ports without gaps between them, together.
fn ranges(ports: &BTreeSet<u16>) -> Vec<RangeInclusive<u16>> {
    let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some(last) if last.end().checked_add(1) == Some(*port) => *last = *last.start()..=*port,
            _ => ranges.push(*port..=*port),
        }
    }
    ranges
}

fn path(name: &str) -> String {
    format!("/proc/sys/{}", name.replace('.', "/"))
}

fn read(name: &'static str) -> Result<String, PortsError> {
    fs::read_to_string(path(name)).map_err(|source| PortsError::Read { name, source })
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
    fn ports_without_gaps_are_one_range() {
        let ports = [1, 2, 3, 7, 65_534, 65_535].into();
        assert_eq!(ranges(&ports), [1..=3, 7..=7, 65_534..=65_535]);
        assert_eq!(ranges(&BTreeSet::new()), []);
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
