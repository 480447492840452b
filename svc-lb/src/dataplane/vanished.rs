//! The `vanished4` and `vanished6` maps: pods of this node that are gone, whose connections are to be reset.

use std::collections::BTreeMap;
use std::net::IpAddr;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use svc_lb_common::limits::name;
use svc_lb_common::{Addr4, Addr6, Family, HostAddress};
use thiserror::Error;

use super::clock::boot_seconds;
use super::pins::Pins;
use super::{PerFamily, map_name};

/// Why a map is not what it should be.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum VanishedError {
    #[error("open the pinned map {map}")]
    Open { map: &'static str, source: MapError },
    #[error("write pod {address} to the map {map}")]
    Write {
        address: IpAddr,
        map: &'static str,
        source: MapError,
    },
}

/// The maps and what they hold: since which second after the machine's start each pod is gone.
#[derive(Debug)]
pub struct Vanished {
    v4: HashMap<MapData, Addr4, u64>,
    v6: HashMap<MapData, Addr6, u64>,
    since: BTreeMap<IpAddr, u64>,
    limits: PerFamily<usize>,
}

impl Vanished {
    /// Takes over what an earlier agent left.
    ///
    /// # Errors
    /// A map that is not there or not ours.
    pub fn open(pins: &Pins) -> Result<Self, VanishedError> {
        let (v4, first) = open::<Addr4>(pins)?;
        let (v6, second) = open::<Addr6>(pins)?;
        let mut since = BTreeMap::new();
        read(&v4, &mut since)?;
        read(&v6, &mut since)?;
        let limits = PerFamily {
            v4: first,
            v6: second,
        };
        Ok(Self {
            v4,
            v6,
            since,
            limits,
        })
    }

    /// The pods in the maps.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.since.keys().copied()
    }

    /// A pod is gone: its connections are reset from now on. Where there is no room the one that is gone longest makes
    /// some; what is left of its connections then meets silence.
    ///
    /// # Errors
    /// The kernel's refusal; it can be repeated.
    pub fn insert(&mut self, address: IpAddr) -> Result<(), VanishedError> {
        let family = Family::of(address);
        let mut of_family = self
            .since
            .iter()
            .filter(|(at, _)| Family::of(**at) == family);
        if of_family.clone().count() >= *self.limits.of(family)
            && let Some((oldest, _)) = of_family.by_ref().min_by_key(|(_, since)| **since)
        {
            let oldest = *oldest;
            self.remove(oldest)?;
        }
        let now = boot_seconds();
        match address {
            IpAddr::V4(at) => self.v4.insert(Addr4::from(at), now, 0),
            IpAddr::V6(at) => self.v6.insert(Addr6::from(at), now, 0),
        }
        .map_err(|source| failed(address, source))?;
        self.since.insert(address, now);
        Ok(())
    }

    /// The address is in use again.
    ///
    /// # Errors
    /// The kernel's refusal; it can be repeated.
    pub fn remove(&mut self, address: IpAddr) -> Result<(), VanishedError> {
        let removed = match address {
            IpAddr::V4(at) => self.v4.remove(&Addr4::from(at)),
            IpAddr::V6(at) => self.v6.remove(&Addr6::from(at)),
        };
        match removed {
            Ok(()) | Err(MapError::KeyNotFound) => {
                self.since.remove(&address);
                Ok(())
            }
            Err(source) => Err(failed(address, source)),
        }
    }
}

fn failed(address: IpAddr, source: MapError) -> VanishedError {
    VanishedError::Write {
        address,
        map: map_name(name::VANISHED, Family::of(address)),
        source,
    }
}

fn open<A: HostAddress + Pod>(
    pins: &Pins,
) -> Result<(HashMap<MapData, A, u64>, usize), VanishedError> {
    let map = map_name(name::VANISHED, A::FAMILY);
    let refused = |source| VanishedError::Open { map, source };
    let data = MapData::from_pin(pins.map(map)).map_err(refused)?;
    let limit = data.info().map_err(refused)?.max_entries();
    let map = Map::HashMap(data).try_into().map_err(refused)?;
    Ok((map, usize::try_from(limit).unwrap_or(usize::MAX)))
}

fn read<A: HostAddress + Pod>(
    map: &HashMap<MapData, A, u64>,
    since: &mut BTreeMap<IpAddr, u64>,
) -> Result<(), VanishedError> {
    for entry in map {
        let (address, when) = entry.map_err(|source| VanishedError::Open {
            map: map_name(name::VANISHED, A::FAMILY),
            source,
        })?;
        since.insert(address.to_ip(), when);
    }
    Ok(())
}
