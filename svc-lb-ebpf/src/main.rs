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
mod stats;

use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use svc_lb_common::outcome::Hook;

use crate::packet::{SkbPacket, XdpPacket};

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

/// The loader and helpers such as `bpf_l4_csum_replace` demand a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: the build fails if a panic survives optimisation.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
