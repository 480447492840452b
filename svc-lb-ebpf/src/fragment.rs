//! Fragments: later ones have no transport header, and follow the first one's decision.
//!
//! What they have in common with it leads to its ports, and these to the flow. They take no part in
//! the flow's state.

use svc_lb_common::conntrack::FlowKey;
use svc_lb_common::fragment::{FirstFragment, FragmentKey, REASSEMBLY_SECONDS};
use svc_lb_common::outcome::{Event, Hook, Lru, Outcome, Tally};

use crate::config::config;
use crate::conntrack::{self, NOEXIST};
use crate::family::Family;
use crate::maps::snapshot;
use crate::met::Met;
use crate::packet::{Packet, Step};
use crate::service;
use crate::stats;

/// Remembers the ports of a datagram's first fragment, whose flow is in `met`; those of another one
/// that had the id before it are replaced.
#[inline(never)]
pub(crate) fn remember<F: Family>(met: &Met<F::Addr>) -> Step<()> {
    let Met {
        fragment_key: key,
        key: tuple,
        flow,
        ..
    } = met;
    let ports_change =
        flow.source_port != tuple.source_port || flow.destination_port != tuple.destination_port;
    if ports_change && met.is_sctp() {
        return Err(Outcome::FragmentSctp);
    }
    let first = FirstFragment::new(
        conntrack::now(),
        tuple.source_port,
        tuple.destination_port,
        tuple.protocol,
    )
    .sealed(key);
    if F::fragments().insert(key, first, NOEXIST).is_ok() {
        stats::tally::<F::Addr>(Tally::Inserted, Lru::Fragments);
        return Ok(());
    }
    // Without memory for it the fragments that follow are strays, and counted.
    let _ = F::fragments().insert(key, first, 0);
    Ok(())
}

/// Gives a later fragment the tuple of its datagram's first one; false if that has not been seen, or
/// so long ago that this is another datagram's.
#[inline(never)]
pub(crate) fn recall<F: Family>(met: &mut Met<F::Addr>) -> bool {
    let fragment_key = &met.fragment_key;
    let Some(first) = F::fragments().get_ptr(fragment_key) else {
        return false;
    };
    // SAFETY: the element stays mapped while the program runs; that it may be given to another key
    // under us is what the check word is for.
    let first = unsafe { snapshot(first) };
    if !first.belongs_to(fragment_key) {
        stats::event(Event::CheckMismatch);
        return false;
    }
    if conntrack::now().wrapping_sub(first.seen) >= REASSEMBLY_SECONDS * config!(hz) {
        return false;
    }
    let FragmentKey {
        source,
        destination,
        direction,
        ..
    } = met.fragment_key;
    met.key = FlowKey::new(
        source,
        destination,
        first.source_port,
        first.destination_port,
        first.protocol,
        direction,
    );
    true
}

/// What becomes of a later fragment that came in without a flow of its datagram's.
///
/// Netfilter would put it together with its first one behind us, where nobody translates any more: the
/// stack helps only where the address is somebody's own as well.
#[inline(never)]
pub(crate) fn stray<P: Packet, F: Family>(packet: &P, met: &Met<F::Addr>) -> Outcome {
    if !met.concern.frontend() {
        return Outcome::NotOurs;
    }
    if packet.hook() == Hook::XdpIngress {
        // The first may be on its way up.
        return Outcome::LeftToTc;
    }
    service::stray::<F>(met)
}
