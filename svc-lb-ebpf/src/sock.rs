//! Socket hooks: a socket that asks for a frontend is given a backend, and told of the frontend.
//!
//! There is no packet here: programs run in the context of the calling process, which anything may
//! interrupt, so nothing is kept per CPU. Who the client is follows from the socket: the node's own
//! are in its network namespace, all others in the programs' cgroup are pods'.
//!
//! connect -> client -> service -> left to the packets? -> select -> remember -> translate

use core::arch::asm;
use core::mem::offset_of;

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval,
};
use aya_ebpf::programs::SockAddrContext;
use svc_lb_common::config::{MASQUERADE_ALL, SET_RETVAL, SOCKETS_OF_PODS};
use svc_lb_common::conntrack::{FlowKey, INBOUND};
use svc_lb_common::outcome::{Event, Outcome};
use svc_lb_common::service::{Range, Service, flag, kind};
use svc_lb_common::socket::{BACKEND_OF, FRONTEND_OF, SocketEntry, SocketKey};
use svc_lb_common::{Addr4, Addr6, Address, Be16, Protocol};

use crate::config::{config, enabled};
use crate::family::{Family, V4, V6};
use crate::guard;
use crate::maps::snapshot;
use crate::select::{self, Choice};
use crate::service::{self, Aim, Target};
use crate::stats;

/// The program lets the call go on.
const GO_ON: i32 = 1;
/// The program fails the call.
const FAIL: i32 = 0;
/// ECONNREFUSED.
const REFUSED: i32 = 111;
/// Where the context has an IPv4 address.
const IP4: usize = offset_of!(bpf_sock_addr, user_ip4);
/// Where it has an IPv6 address.
const IP6: usize = offset_of!(bpf_sock_addr, user_ip6);

/// A socket's call with an address in it.
pub(crate) struct Call(*mut bpf_sock_addr);

impl Call {
    /// Wraps the program's context.
    #[inline(always)]
    pub(crate) fn new(ctx: &SockAddrContext) -> Self {
        Self(ctx.sock_addr)
    }

    /// Reads a word of the context. The verifier wants the offset in the instruction, from where LLVM
    /// would take it to reuse a pointer into the context.
    #[inline(always)]
    fn read<const OFFSET: usize>(&self) -> u32 {
        let value: u64;
        // SAFETY: callers name words of the context that the kernel passed to this program.
        unsafe {
            asm!(
                "{0} = *(u32 *)({1} + {2})",
                lateout(reg) value,
                in(reg) self.0,
                const OFFSET,
                options(readonly, preserves_flags, nostack)
            );
        }
        value as u32
    }

    /// Writes a word of the context.
    #[inline(always)]
    fn write<const OFFSET: usize>(&self, value: u32) {
        // SAFETY: as above.
        unsafe {
            asm!(
                "*(u32 *)({0} + {2}) = {1}",
                in(reg) self.0,
                in(reg) value as u64,
                const OFFSET,
                options(preserves_flags, nostack)
            );
        }
    }

    /// TCP or UDP; other protocols' sockets are left alone.
    #[inline(always)]
    fn protocol(&self) -> Option<Protocol> {
        match self.read::<{ offset_of!(bpf_sock_addr, protocol) }>() {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            _ => None,
        }
    }

    #[inline(always)]
    fn port(&self) -> Be16 {
        Be16(self.read::<{ offset_of!(bpf_sock_addr, user_port) }>() as u16)
    }

    #[inline(always)]
    fn set_port(&self, port: Be16) {
        self.write::<{ offset_of!(bpf_sock_addr, user_port) }>(port.0 as u32);
    }

    #[inline(always)]
    fn ip6(&self) -> [u32; 4] {
        [
            self.read::<IP6>(),
            self.read::<{ IP6 + 4 }>(),
            self.read::<{ IP6 + 8 }>(),
            self.read::<{ IP6 + 12 }>(),
        ]
    }

    /// Whether the address is an IPv4 one in IPv6's clothes.
    #[inline(always)]
    pub(crate) fn is_mapped(&self) -> bool {
        let [a, b, c, _] = self.ip6();
        a | b == 0 && c == 0xffff_u32.to_be()
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { bpf_get_socket_cookie(self.0.cast()) }
    }

    /// Whether the socket is in the node's own network namespace.
    #[inline(always)]
    fn of_node(&self) -> bool {
        // SAFETY: as above.
        let cookie = unsafe { bpf_get_netns_cookie(self.0.cast()) };
        cookie == config!(netns)
    }
}

/// How the context holds an address.
pub(crate) trait Name {
    /// Whose services it may name.
    type Family: Family;
    /// The address.
    fn load(call: &Call) -> <Self::Family as Family>::Addr;
    /// Replaces it.
    fn store(call: &Call, address: <Self::Family as Family>::Addr);
}

/// An IPv4 address.
pub(crate) enum Name4 {}
/// An IPv6 address.
pub(crate) enum Name6 {}
/// An IPv4 address of an IPv6 socket.
pub(crate) enum Mapped {}

impl Name for Name4 {
    type Family = V4;

    #[inline(always)]
    fn load(call: &Call) -> Addr4 {
        Addr4(call.read::<IP4>())
    }

    #[inline(always)]
    fn store(call: &Call, address: Addr4) {
        call.write::<IP4>(address.0);
    }
}

impl Name for Mapped {
    type Family = V4;

    #[inline(always)]
    fn load(call: &Call) -> Addr4 {
        Addr4(call.read::<{ IP6 + 12 }>())
    }

    #[inline(always)]
    fn store(call: &Call, address: Addr4) {
        call.write::<{ IP6 + 12 }>(address.0);
    }
}

impl Name for Name6 {
    type Family = V6;

    #[inline(always)]
    fn load(call: &Call) -> Addr6 {
        Addr6(call.ip6())
    }

    #[inline(always)]
    fn store(call: &Call, address: Addr6) {
        let [a, b, c, d] = address.0;
        call.write::<IP6>(a);
        call.write::<{ IP6 + 4 }>(b);
        call.write::<{ IP6 + 8 }>(c);
        call.write::<{ IP6 + 12 }>(d);
    }
}

/// Runs one of the steps below with the address's own kind of name.
macro_rules! over6 {
    ($step:ident, $call:expr) => {{
        let call = $call;
        if call.is_mapped() {
            $crate::sock::$step::<$crate::sock::Mapped>(&call)
        } else {
            $crate::sock::$step::<$crate::sock::Name6>(&call)
        }
    }};
}
pub(crate) use over6;

type AddrOf<N> = <<N as Name>::Family as Family>::Addr;

/// connect(2): a TCP connection's backend is chosen once and for all, at random; a UDP socket's too,
/// and the agent closes it once its backend is gone.
#[inline(always)]
pub(crate) fn connect<N: Name>(call: &Call) -> i32 {
    let Some(protocol) = call.protocol() else {
        return GO_ON;
    };
    let Some(node) = client(call, protocol) else {
        return GO_ON;
    };
    let key = destination::<N>(call, protocol);
    match decide::<N::Family>(&key, node) {
        Fate::Refused if protocol == Protocol::Tcp => return refuse(),
        // A datagram's refusal comes to each, as long as nothing serves.
        Fate::Left | Fate::Refused => {}
        Fate::Given(choice, service) => {
            if remember::<N>(
                call.cookie(),
                &key,
                &entry(&choice, service),
                Some(FRONTEND_OF),
            ) {
                give::<N>(call, &choice);
            }
        }
    }
    GO_ON
}

/// sendmsg(2) with an address: all datagrams of one socket to one frontend go to one backend
/// (SEMANTICS F7), until it no longer serves and another one does (G1).
#[inline(always)]
pub(crate) fn sendmsg<N: Name>(call: &Call) -> i32 {
    let Some(true) = client(call, Protocol::Udp) else {
        return GO_ON;
    };
    let key = destination::<N>(call, Protocol::Udp);
    let address = key.destination;
    if !N::Family::has_loopback_node_ports(address)
        && !guard::destination::<N::Family>(address).is_ok_and(guard::Concern::frontend)
    {
        return GO_ON;
    }
    let cookie = call.cookie();
    let forward = SocketKey::new(cookie, address, key.destination_port, BACKEND_OF);
    let known = find::<N::Family>(&forward);
    if let Some(known) = known
        && select::still_serves::<N::Family>(known.backend, known.generation)
    {
        // The other entry may have been evicted.
        let back = SocketKey::new(cookie, known.address, known.port, FRONTEND_OF);
        if find::<N::Family>(&back).is_some()
            || remember::<N>(cookie, &key, &known, Some(FRONTEND_OF))
        {
            N::store(call, known.address);
            call.set_port(known.port);
        }
        return GO_ON;
    }
    if let Fate::Given(choice, service) = decide::<N::Family>(&key, true) {
        if remember::<N>(cookie, &key, &entry(&choice, service), None) {
            if known.is_some() {
                stats::event(Event::SocketMoved);
            }
            give::<N>(call, &choice);
        }
    } else if let Some(known) = known {
        // Better an unwilling backend than none.
        N::store(call, known.address);
        call.set_port(known.port);
    }
    GO_ON
}

/// recvmsg(2) and getpeername(2): the backend's address stands for the frontend's.
#[inline(always)]
pub(crate) fn tell<N: Name>(call: &Call) -> i32 {
    let key = SocketKey::new(call.cookie(), N::load(call), call.port(), FRONTEND_OF);
    if let Some(frontend) = find::<N::Family>(&key) {
        N::store(call, frontend.address);
        call.set_port(frontend.port);
    }
    GO_ON
}

/// recvmsg(2): as [`tell`], and only the node's sockets were given backends.
#[inline(always)]
pub(crate) fn recvmsg<N: Name>(call: &Call) -> i32 {
    if call.of_node() {
        return tell::<N>(call);
    }
    GO_ON
}

/// Whose socket it is: the node's, or not; `None` if it is left alone. Pods' datagrams are, so that
/// they never stick to a backend that is gone.
#[inline(always)]
fn client(call: &Call, protocol: Protocol) -> Option<bool> {
    let node = call.of_node();
    let ours = node || enabled(SOCKETS_OF_PODS) && protocol == Protocol::Tcp;
    ours.then_some(node)
}

/// What the packets of the call would look like, but for their source, which nobody knows yet.
#[inline(always)]
fn destination<N: Name>(call: &Call, protocol: Protocol) -> FlowKey<AddrOf<N>> {
    FlowKey::new(
        AddrOf::<N>::UNSPECIFIED,
        N::load(call),
        Be16(0),
        call.port(),
        protocol as u8,
        INBOUND,
    )
}

/// What becomes of a call.
enum Fate<A: Address> {
    /// Its packets are met as they come.
    Left,
    /// Nothing serves.
    Refused,
    /// It is for this backend, of the service with this index.
    Given(Choice<A>, u32),
}

#[inline(always)]
fn decide<F: Family>(key: &FlowKey<F::Addr>, node: bool) -> Fate<F::Addr> {
    let mut target = Target {
        service: Service::new(Range::default(), Range::default(), 0, 0),
        index: 0,
        kind: 0,
    };
    let aim = if node && F::has_loopback_node_ports(key.destination) {
        service::node_port::<F>(key, &mut target)
    } else {
        match guard::destination::<F>(key.destination) {
            Ok(concern) if concern.frontend() => {
                service::find::<F>(key, concern, true, &mut target)
            }
            _ => return Fate::Left,
        }
    };
    match aim {
        Ok(Aim::Service) => {}
        Ok(Aim::UndefinedPort) => return Fate::Refused,
        Err(_) => return Fate::Left,
    }
    if needs_source(&target, node) {
        stats::event(Event::SocketLeft);
        return Fate::Left;
    }
    // SAFETY: a helper without arguments.
    let hash = unsafe { bpf_get_prandom_u32() };
    match select::backend::<F>(true, key, &target, hash) {
        Ok(Some(choice)) => Fate::Given(choice, target.index),
        Ok(None) if select::nobody(&target) == Outcome::Rejected => Fate::Refused,
        Ok(None) | Err(_) => {
            // A socket cannot be met with silence: its packets are.
            stats::event(Event::SocketLeft);
            Fate::Left
        }
    }
}

/// Whether the service decides by the client's address, or changes it: a socket has none yet.
#[inline(always)]
fn needs_source(target: &Target, node: bool) -> bool {
    let restricted = target.kind == kind::LOAD_BALANCER as u32
        && target.service.flags() & flag::SOURCE_RANGES != 0;
    let masqueraded = !node && target.kind == kind::CLUSTER_IP as u32 && enabled(MASQUERADE_ALL);
    restricted || masqueraded || target.service.affinity_seconds() != 0
}

/// Fails the call with ECONNREFUSED, where the kernel can say so; else its packets are rejected.
#[inline(always)]
fn refuse() -> i32 {
    if !enabled(SET_RETVAL) {
        stats::event(Event::SocketLeft);
        return GO_ON;
    }
    // SAFETY: a helper without pointers.
    let _ = unsafe { bpf_set_retval(-REFUSED) };
    stats::event(Event::SocketRefused);
    FAIL
}

#[inline(always)]
fn find<F: Family>(key: &SocketKey<F::Addr>) -> Option<SocketEntry<F::Addr>> {
    let value = F::sockets().get_ptr(key)?;
    // SAFETY: the element stays mapped while the program runs; that it may be given to another
    // key under us is what the check word is for.
    let entry = unsafe { snapshot(value) };
    if !entry.belongs_to(key) {
        stats::event(Event::CheckMismatch);
        return None;
    }
    Some(entry)
}

/// A backend as it is remembered.
#[inline(always)]
fn entry<A: Address>(choice: &Choice<A>, service: u32) -> SocketEntry<A> {
    SocketEntry {
        address: choice.backend.address,
        port: choice.backend.port(),
        generation: choice.backend.generation(),
        backend: choice.id,
        service,
        check: 0,
    }
}

/// Remembers that `backend` stands for the frontend in `key`; both ways, if not told which alone.
/// Without memory for it, the call is left to the packets: an answer must come from where the
/// question went.
#[inline(always)]
fn remember<N: Name>(
    cookie: u64,
    key: &FlowKey<AddrOf<N>>,
    backend: &SocketEntry<AddrOf<N>>,
    only: Option<u16>,
) -> bool {
    let sockets = N::Family::sockets();
    let back = SocketKey::new(cookie, backend.address, backend.port, FRONTEND_OF);
    let frontend = SocketEntry {
        address: key.destination,
        port: key.destination_port,
        ..*backend
    };
    let mut done = sockets.insert(back, frontend.sealed(&back), 0).is_ok();
    if only != Some(FRONTEND_OF) {
        let there = SocketKey::new(cookie, key.destination, key.destination_port, BACKEND_OF);
        done &= sockets.insert(there, backend.sealed(&there), 0).is_ok();
    }
    if !done {
        stats::event(Event::SocketForgotten);
    }
    done
}

/// Puts the backend into the call, and counts it.
#[inline(always)]
fn give<N: Name>(call: &Call, choice: &Choice<AddrOf<N>>) {
    N::store(call, choice.backend.address);
    call.set_port(choice.backend.port());
    stats::event(Event::SocketTranslated);
    if let Some(hits) = N::Family::socket_hits().get_ptr_mut(choice.id) {
        // SAFETY: an aligned u64 of a live array, changed by atomic addition alone.
        unsafe {
            asm!(
                "lock *(u64 *)({0} + 0) += {1}",
                in(reg) hits,
                in(reg) 1_u64,
                options(preserves_flags, nostack)
            );
        }
    }
}
