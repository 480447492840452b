//! The programs: one entry per hook, each a context, the pipeline, and the outcome.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "offsets and helper arguments are small; the kernel's types are narrower than usize"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the entry macros pass the context by value"
)]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "reading a field behind the context pointer counts as two"
)]

mod admit;
mod config;
mod conntrack;
mod family;
mod forward;
mod fragment;
mod guard;
mod maps;
mod met;
mod open;
mod outcome;
mod packet;
mod parse;
mod pipeline;
mod reject;
mod reset;
mod rewrite;
mod select;
mod service;
mod sock;
mod stats;

use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};
use svc_lb_common::outcome::Hook;

use crate::packet::{SkbPacket, XdpPacket};
use crate::sock::{Call, Name4, over6};

/// XDP on an uplink: packets from the network.
#[xdp]
pub(crate) fn xdp_ingress(ctx: XdpContext) -> u32 {
    let packet = XdpPacket::new(&ctx);
    outcome::xdp(&packet, pipeline::ingress(&packet))
}

/// tc ingress of an edge: packets from a client, or a pod's answers to itself.
#[classifier]
pub(crate) fn tc_ingress(ctx: TcContext) -> i32 {
    let packet = SkbPacket::new(&ctx, Hook::TcIngress);
    outcome::tc(&packet, pipeline::ingress(&packet))
}

/// tc egress of an edge: backends' answers on their way to the client.
#[classifier]
pub(crate) fn tc_egress(ctx: TcContext) -> i32 {
    let packet = SkbPacket::new(&ctx, Hook::TcEgress);
    outcome::tc(&packet, pipeline::egress(&packet))
}

/// connect(2) over IPv4: a frontend becomes a backend.
#[cgroup_sock_addr(connect4)]
pub(crate) fn sock_connect4(ctx: SockAddrContext) -> i32 {
    sock::connect::<Name4>(&Call::new(&ctx))
}

/// connect(2) over IPv6.
#[cgroup_sock_addr(connect6)]
pub(crate) fn sock_connect6(ctx: SockAddrContext) -> i32 {
    over6!(connect, Call::new(&ctx))
}

/// sendmsg(2) of datagrams with an address, over IPv4.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    sock::sendmsg::<Name4>(&Call::new(&ctx))
}

/// sendmsg(2) over IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    over6!(sendmsg, Call::new(&ctx))
}

/// recvmsg(2) of datagrams, over IPv4: a backend's address becomes the frontend's.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    sock::recvmsg::<Name4>(&Call::new(&ctx))
}

/// recvmsg(2) over IPv6.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    over6!(recvmsg, Call::new(&ctx))
}

/// getpeername(2) over IPv4.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn sock_getpeer4(ctx: SockAddrContext) -> i32 {
    sock::tell::<Name4>(&Call::new(&ctx))
}

/// getpeername(2) over IPv6.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn sock_getpeer6(ctx: SockAddrContext) -> i32 {
    over6!(tell, Call::new(&ctx))
}

/// The loader and helpers such as `bpf_l4_csum_replace` demand a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: the build fails if a panic survives optimisation.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
