//! First of all: may this packet concern us? What may not leaves after one array read.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use svc_lb_common::guard::{self, BACKEND, FRONTEND, NODE};
use svc_lb_common::outcome::Outcome;
use svc_lb_common::{Address, Be16, Protocol};

use crate::config::config;
use crate::family::Family;
use crate::maps::{GUARD, GUARD_DIRECT, GUARD_PORT, read};
use crate::met::is_bare_syn;
use crate::packet::Step;
use crate::parse::{Ip, Transport};

/// Why a packet may concern us. Hints: the exact maps decide.
#[derive(Clone, Copy)]
pub(crate) struct Concern {
    bits: u8,
}

impl Concern {
    /// None: of a packet on its way out.
    pub(crate) const NONE: Self = Self { bits: 0 };

    /// It may be addressed to a frontend: one of its own address, or a NodePort's.
    #[inline(always)]
    pub(crate) fn frontend(self) -> bool {
        self.bits & (FRONTEND | NODE) != 0
    }

    /// Its destination may be one of the node's addresses.
    #[inline(always)]
    pub(crate) fn node(self) -> bool {
        self.bits & NODE != 0
    }

    /// Its destination may be a backend.
    #[inline(always)]
    pub(crate) fn backend(self) -> bool {
        self.bits & BACKEND != 0
    }
}

/// Hint bits of an address.
#[inline(always)]
fn hints<A: Address>(address: A) -> u8 {
    let (word, shift) = guard::address_position(address, config!(guard_words));
    read(&GUARD, word).map_or(0, |word| (word >> shift) as u8 & 0xf)
}

/// A packet that comes in at an edge.
#[inline(always)]
pub(crate) fn inbound<F: Family>(ip: &Ip<F>) -> Step<Concern> {
    destination::<F>(ip.destination)
}

/// Where a client wants to go: may it concern us?
#[inline(always)]
pub(crate) fn destination<F: Family>(address: F::Addr) -> Step<Concern> {
    if F::in_service_net(address) {
        return Ok(Concern { bits: FRONTEND });
    }
    match hints(address) {
        0 => Err(Outcome::NotOurs),
        bits => Ok(Concern { bits }),
    }
}

/// A packet that comes in at an edge, once its ports are known: leaves out what is only the
/// node's own traffic, or an ordinary packet to a pod that is a backend.
#[inline(always)]
pub(crate) fn ports<F: Family>(concern: Concern, ip: &Ip<F>, transport: &Transport) -> Step<()> {
    if concern.bits & FRONTEND != 0 {
        return Ok(());
    }
    if concern.node() && node_port(transport.protocol, transport.destination_port) {
        return Ok(());
    }
    if !concern.backend() {
        return Err(Outcome::NotOurs);
    }
    if is_bare_syn(transport.flags) || direct(ip.destination) {
        return Ok(());
    }
    Err(Outcome::NotOurs)
}

/// A later fragment that comes in at an edge; its ports are not in it.
#[inline(always)]
pub(crate) fn later<F: Family>(concern: Concern, ip: &Ip<F>) -> Step<()> {
    if concern.frontend() || direct(ip.destination) {
        return Ok(());
    }
    Err(Outcome::NotOurs)
}

/// Whether the port is a NodePort or one that translated sources have.
#[inline(always)]
pub(crate) fn node_port(protocol: Protocol, port: Be16) -> bool {
    if (config!(snat_first)..=config!(snat_last)).contains(&port.get()) {
        return true;
    }
    let (word, bit) = guard::port_position(protocol, port.get());
    read(&GUARD_PORT, word).is_some_and(|word| word >> bit & 1 != 0)
}

/// Whether direct flows with a translated source port go to this address.
#[inline(always)]
fn direct<A: Address>(address: A) -> bool {
    read(&GUARD_DIRECT, guard::direct_position(address)).is_some_and(|flows| flows != 0)
}

/// From now on direct flows with a translated source port go to this address. The time tells who
/// clears positions that nobody needs whether there was another such flow meanwhile.
#[inline(always)]
pub(crate) fn set_direct<A: Address>(address: A) {
    if let Some(flows) = GUARD_DIRECT.get_ptr_mut(guard::direct_position(address)) {
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_jiffies64() };
        // SAFETY: an aligned u64 of a live array.
        unsafe { flows.write_volatile(now) };
    }
}

/// A packet that leaves through an edge: is its source a backend?
#[inline(always)]
pub(crate) fn outbound_source<F: Family>(ip: &Ip<F>) -> bool {
    hints(ip.source) & BACKEND != 0
}

/// A packet that leaves through an edge: is it still addressed to a frontend?
#[inline(always)]
pub(crate) fn outbound_destination<F: Family>(ip: &Ip<F>) -> bool {
    if F::has_service_net() {
        return F::in_service_net(ip.destination);
    }
    hints(ip.destination) & FRONTEND != 0
}
