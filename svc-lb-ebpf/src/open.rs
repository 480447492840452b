//! Opening a flow: its translation, its two entries, and a source port where the tuple is taken.

use svc_lb_common::conntrack::{Flow, flow, state};
use svc_lb_common::hash::{M1, mix, scale};
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_common::{Address, Be16};

use crate::config::config;
use crate::conntrack;
use crate::family::Family;
use crate::guard;
use crate::met::Met;
use crate::packet::Step;
use crate::stats;

/// BPF_NOEXIST of bpf_map_update_elem.
const NOEXIST: u64 = 1;

/// Source ports that are tried for one flow. The range is shared only by flows of one client address
/// to one backend whose tuples met; when half of it is taken, 8 tries fail for 1 flow in 256.
const PORT_TRIES: u32 = 8;

/// Enters `met.flow`, as it is or with a translated source port, which is then in it too.
///
/// The reverse entry goes in first and only where there is none: what a client is told to use is
/// always what answers are translated with.
#[inline(never)]
pub(crate) fn enter<F: Family>(met: &mut Met<F::Addr>) -> Step<Outcome> {
    met.flow.seen = conntrack::now();
    if met.translate_port == 0 && claim::<F>(met) {
        return insert_forward::<F>(met);
    }
    let first = config!(snat_first) as u32;
    let ports = config!(snat_last) as u32 - first + 1;
    let mut attempt = 0;
    while attempt < PORT_TRIES {
        let start = mix((met.hash as u64).wrapping_add((attempt as u64).wrapping_mul(M1)));
        let port = first + scale((start >> 32) as u32, ports);
        met.flow.source_port = Be16::new(port as u16);
        if claim::<F>(met) {
            stats::event(Event::PortTranslated);
            if met.flow.traits & flow::DIRECT != 0 {
                guard::set_direct(met.key.destination);
            }
            return insert_forward::<F>(met);
        }
        attempt += 1;
    }
    Err(Outcome::PortsExhausted)
}

/// Claims the tuple behind the frontend by its reverse entry; false where it is taken. A live entry
/// that names this client and frontend is ours, with its state; a closed connection's is taken over.
#[inline(never)]
fn claim<F: Family>(met: &mut Met<F::Addr>) -> bool {
    met.flow.state = 0;
    conntrack::set_reverse(met);
    let Met {
        flow,
        reverse_key,
        reverse,
        other,
        ..
    } = met;
    if conntrack::find::<F>(reverse_key, other).is_some() {
        if !state::closed(other.state) {
            flow.state = other.state;
            return names_same_client(other, reverse);
        }
        let mut peer = *reverse_key;
        conntrack::forget::<F>(reverse_key, other, &mut peer);
    }
    F::opening()
        .insert(&*reverse_key, &*reverse, NOEXIST)
        .is_ok()
}

#[inline(always)]
fn names_same_client<A: Address>(found: &Flow<A>, reverse: &Flow<A>) -> bool {
    found.source == reverse.source
        && found.destination == reverse.destination
        && found.source_port == reverse.source_port
        && found.destination_port == reverse.destination_port
        && found.traits & flow::DIRECT == reverse.traits & flow::DIRECT
}

#[inline(always)]
fn insert_forward<F: Family>(met: &mut Met<F::Addr>) -> Step<Outcome> {
    met.flow.check = met.flow.expected_check(&met.key);
    match F::opening().insert(&met.key, &met.flow, 0) {
        Ok(()) => Ok(Outcome::Open),
        Err(_) => Err(Outcome::FlowInsert),
    }
}
