//! How many entries each map gets.

use std::collections::BTreeMap;
use std::io;
use std::str::FromStr;

use svc_lb_common::limits::{self, name};
use thiserror::Error;

/// An entry of `established` takes this many bytes of kernel memory, both families and the other
/// flow maps together: element header, key, value and bucket of one IPv4 and one IPv6 entry, and a
/// quarter of that again for each of `opening` and `streams`.
const BYTES_PER_ENTRY: u64 = 432;
/// `established` has at most this part of the machine's memory, both families together.
const MEMORY_SHARE: u64 = 50;
const ESTABLISHED_MIN: u32 = 32_768;
const ESTABLISHED_MAX: u32 = 4_194_304;

/// Entries of the maps whose size is a setting.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MapSizes(BTreeMap<&'static str, u32>);

/// One `--map-size`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SizeOverride {
    name: &'static str,
    entries: u32,
}

/// Why a size cannot be.
#[derive(Debug, Error, Eq, PartialEq)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SizeError {
    #[error("{0:?} is not MAP=ENTRIES, for example established4=1048576")]
    Syntax(String),
    #[error("no map {name:?} has a size to set; these have: {known}")]
    Unknown { name: String, known: String },
    #[error("{name}={value:?}: entries are a number from {min} to {max}")]
    Range {
        name: &'static str,
        value: String,
        min: u32,
        max: u32,
    },
    #[error("{name}={entries}: must be a power of two")]
    PowerOfTwo { name: &'static str, entries: u32 },
}

impl MapSizes {
    /// Defaults for a machine with that much memory: the flow maps follow it, in steps of a power
    /// of two between one and two hundredths; what the agent writes is sized by the cluster.
    #[must_use]
    pub fn for_memory(bytes: u64) -> Self {
        let entries = bytes / MEMORY_SHARE / BYTES_PER_ENTRY;
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        let established = previous_power_of_two(entries).clamp(ESTABLISHED_MIN, ESTABLISHED_MAX);
        let mut sizes = BTreeMap::from([
            (name::GUARD, limits::GUARD_WORDS),
            (name::SERVICES, limits::SERVICES),
            (name::SLOTS, limits::SLOT_WORDS),
            (name::EDGES, limits::EDGES),
            (name::LINKS, limits::LINKS),
        ]);
        let families = [
            (name::FRONTENDS, limits::FRONTENDS),
            (name::BACKENDS, limits::BACKENDS),
            (name::OPENING, established / 4),
            (name::ESTABLISHED, established),
            (name::STREAMS, established / 4),
            (name::AFFINITY, limits::AFFINITY),
            (name::FRAGMENTS, limits::FRAGMENTS),
            (name::SOURCE_RANGES, limits::SOURCE_RANGES),
            (name::VANISHED, limits::VANISHED),
            (name::SOCKETS, limits::SOCKETS),
            (name::SOCKET_HITS, limits::BACKENDS),
        ];
        for (names, entries) in families {
            sizes.extend(names.map(|name| (name, entries)));
        }
        Self(sizes)
    }

    /// The least that each map can have: to try the programs.
    #[must_use]
    pub fn smallest() -> Self {
        let Self(sizes) = Self::for_memory(0);
        let smallest = sizes.into_keys().map(|name| (name, range(name).0));
        Self(smallest.collect())
    }

    /// Defaults for this machine with `overrides` applied.
    pub fn for_this_machine(overrides: &[SizeOverride]) -> io::Result<Self> {
        let mut sizes = Self::for_memory(machine_memory()?);
        for SizeOverride { name, entries } in overrides {
            sizes.0.insert(name, *entries);
        }
        Ok(sizes)
    }

    /// Entries of a map; `None` where its size is no setting.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u32> {
        self.0.get(name).copied()
    }

    /// Maps and entries, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.0.iter().map(|(name, entries)| (*name, *entries))
    }
}

impl FromStr for SizeOverride {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| SizeError::Syntax(text.to_owned()))?;
        let defaults = MapSizes::for_memory(0);
        let Some((name, _)) = defaults.iter().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = defaults.iter().map(|(name, _)| name).collect();
            return Err(SizeError::Unknown {
                name: name.to_owned(),
                known: known.join(", "),
            });
        };
        let (min, max) = range(name);
        let entries = value
            .parse()
            .ok()
            .filter(|entries| (min..=max).contains(entries))
            .ok_or_else(|| SizeError::Range {
                name,
                value: value.to_owned(),
                min,
                max,
            })?;
        if name == name::GUARD && !entries.is_power_of_two() {
            return Err(SizeError::PowerOfTwo { name, entries });
        }
        Ok(Self { name, entries })
    }
}

/// Least and most entries of a map.
fn range(name: &str) -> (u32, u32) {
    match name {
        // A guard position is 32 bits of hash, 16 positions to a word.
        name::GUARD => (1 << 6, 1 << 27),
        // Smaller LRU maps evict entries that are in use: the kernel keeps up to 128 free ones
        // for each CPU.
        _ if [
            name::OPENING,
            name::ESTABLISHED,
            name::STREAMS,
            name::FRAGMENTS,
            name::SOCKETS,
        ]
        .concat()
        .contains(&name) =>
        {
            (1_024, 1 << 26)
        }
        _ => (16, 1 << 26),
    }
}

fn previous_power_of_two(n: u32) -> u32 {
    if n == 0 { 0 } else { 1 << n.ilog2() }
}

/// The machine's memory in bytes.
fn machine_memory() -> io::Result<u64> {
    // SAFETY: plain integers, for which zero is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is writable and of the type that the call fills.
    if unsafe { libc::sysinfo(&raw mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.totalram * u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn flow_maps_follow_the_machines_memory() {
        for (memory, established) in [
            (GIB / 2, 32_768),
            (4 * GIB, 131_072),
            (24 * GIB, 1_048_576),
            (64 * GIB, 2_097_152),
            (4_096 * GIB, 4_194_304),
        ] {
            let sizes = MapSizes::for_memory(memory);
            assert_eq!(sizes.get("established4"), Some(established), "{memory}");
            assert_eq!(sizes.get("established6"), Some(established), "{memory}");
            assert_eq!(sizes.get("opening4"), Some(established / 4), "{memory}");
            assert_eq!(sizes.get("streams6"), Some(established / 4), "{memory}");
        }
    }

    #[test]
    fn overrides_are_checked() {
        let parse = |text: &str| {
            text.parse::<SizeOverride>()
                .map_err(|error| error.to_string())
        };
        assert_eq!(
            parse("established4=2048").unwrap(),
            SizeOverride {
                name: "established4",
                entries: 2048
            }
        );
        assert!(parse("established4").unwrap_err().contains("MAP=ENTRIES"));
        assert!(parse("flows=9").unwrap_err().contains("established4"));
        assert!(parse("established4=9").unwrap_err().contains("1024 to"));
        assert!(parse("established4=many").unwrap_err().contains("many"));
        assert!(parse("guard=100").unwrap_err().contains("power of two"));
        assert!(parse("counters=100").unwrap_err().contains("no map"));
    }

    #[test]
    fn every_sized_map_is_pinned() {
        for (name, _) in MapSizes::for_memory(0).iter() {
            assert!(name::PINNED.contains(&name), "{name}");
        }
    }
}
