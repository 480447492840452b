//! The ports of translated sources on the kernel's list of reserved ports, so that it gives none of them to a
//! connection of the node's own.
//!
//! What was not on the list before is noted beside the pins; `detach` takes that off again, and nothing else.

use std::ops::RangeInclusive;

use thiserror::Error;
use tracing::{info, warn};

use super::pins::{PinError, Pins};
use crate::node::snat_ports::{self, PortsError};

/// Why ports are not reserved, or still are.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ReserveError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Ports(#[from] PortsError),
}

/// Reserves `ports`, and none of those that an earlier agent reserved beside them. Where the list cannot be written, as
/// in a container that may not, they must be nobody else's without it.
pub fn reserve(pins: &Pins, ports: &RangeInclusive<u16>) -> Result<(), ReserveError> {
    for earlier in pins.reserved()? {
        if !ports.contains(earlier.start()) || !ports.contains(earlier.end()) {
            give_back(pins, &earlier)?;
        }
    }
    let reserved = snat_ports::reserve(ports, |range| {
        info!(
            first = range.start(),
            last = range.end(),
            "ports reserved for translated sources"
        );
        pins.note_reserved(range).map_err(ReserveError::from)
    });
    match reserved {
        Err(ReserveError::Ports(error @ PortsError::Write { .. })) => {
            snat_ports::check(ports)?;
            warn!(
                error = &error as &dyn std::error::Error,
                "ports of translated sources not reserved; the kernel's own range has none of them"
            );
            Ok(())
        }
        result => result,
    }
}

/// Takes off the list what agents with these pins put there.
pub fn release(pins: &Pins) -> Result<(), ReserveError> {
    for ports in pins.reserved()? {
        give_back(pins, &ports)?;
    }
    Ok(())
}

fn give_back(pins: &Pins, ports: &RangeInclusive<u16>) -> Result<(), ReserveError> {
    snat_ports::release(ports)?;
    Ok(pins.forget_reserved(ports)?)
}
