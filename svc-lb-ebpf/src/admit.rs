//! Whether a client may open a flow through the frontend it used.

use aya_ebpf::maps::lpm_trie::Key;
use svc_lb_common::outcome::Outcome;
use svc_lb_common::service::{flag, kind};
use svc_lb_common::source_range::{Source, SourceRangeKey};

use crate::family::Family;
use crate::met::Met;
use crate::packet::Step;

/// Turns away sources that no packet may have, and clients outside of loadBalancerSourceRanges:
/// pods too, and on load balancer addresses alone (SEMANTICS B7). Flows that are open stay.
#[inline(always)]
pub(crate) fn client<F: Family>(met: &Met<F::Addr>) -> Step<()> {
    let target = &met.target;
    if F::is_martian(met.key.source) {
        return Err(Outcome::Martian);
    }
    let restricted = target.kind == kind::LOAD_BALANCER as u32
        && target.service.flags() & flag::SOURCE_RANGES != 0;
    if restricted && !in_ranges::<F>(target.index, &met.key.source) {
        return Err(Outcome::SourceRange);
    }
    Ok(())
}

/// Whether a range of the service holds the address.
#[inline(never)]
fn in_ranges<F: Family>(service: u32, address: &F::Addr) -> bool {
    const {
        let key = size_of::<Key<Source<F::Addr>>>();
        assert!(key == size_of::<SourceRangeKey<F::Addr>>());
    }
    let client = Source::new(service, *address);
    F::source_ranges()
        .get(Key::new(Source::<F::Addr>::BITS, client))
        .is_some()
}
