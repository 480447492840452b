//! Counters: per-CPU, one array, plain increments.

use svc_lb_common::Address;
use svc_lb_common::outcome::{Event, Hook, Lru, Outcome, Tally, counter};

use crate::maps::COUNTERS;

/// Counts a packet's outcome.
#[inline(always)]
pub(crate) fn outcome(hook: Hook, outcome: Outcome) {
    add(counter(hook, outcome));
}

/// Counts an event.
#[inline(always)]
pub(crate) fn event(event: Event) {
    add(event.index());
}

/// Counts an entry that came into a map, or left it.
#[inline(always)]
pub(crate) fn tally<A: Address>(tally: Tally, map: Lru) {
    add(tally.index(map, A::FAMILY));
}

#[inline(always)]
fn add(index: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a per-CPU element that no other program on this CPU changes at the same time.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}
