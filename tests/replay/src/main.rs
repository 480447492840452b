//! Puts a frame back before each run of a program on the bench; no part of the agent.
//!
//! `BPF_PROG_TEST_RUN` with a repeat count gives every run what the one before made of the packet, so from the
//! second run on it would time a program's reaction to its own output. These programs write the next frame of a list
//! over the packet and jump to the program under test. Their own cost is what the same takes with an empty program.
#![no_std]
#![no_main]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "reading a field behind the context pointer counts as two"
)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "frames are short"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the entry macros pass the context by value"
)]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md};
use aya_ebpf::helpers::generated::{bpf_skb_change_tail, bpf_skb_store_bytes, bpf_xdp_adjust_tail};
use aya_ebpf::macros::{classifier, map, xdp};
use aya_ebpf::maps::{Array, ProgramArray};
use aya_ebpf::programs::{TcContext, XdpContext};

/// 64-bit words of a frame: IPv4's are 64 bytes long, IPv6's 80.
const WORDS: usize = 10;
/// Words of an IPv4 frame.
const SHORT: usize = 8;

/// What is replayed.
#[repr(C)]
#[derive(Clone, Copy)]
struct Plan {
    /// Frames in the list, at least one.
    frames: u32,
    /// Length of each in bytes: 64 or 80.
    length: u32,
    /// Which program comes next, by its place in `target`.
    target: u32,
    /// The frame whose turn it is.
    next: u32,
}

#[map(name = "plan")]
static PLAN: Array<Plan> = Array::with_max_entries(1, 0);
#[map(name = "frames")]
static FRAMES: Array<[u64; WORDS]> = Array::with_max_entries(1, 0);
#[map(name = "xdp_target")]
static XDP_TARGET: ProgramArray = ProgramArray::with_max_entries(2, 0);
#[map(name = "tc_target")]
static TC_TARGET: ProgramArray = ProgramArray::with_max_entries(2, 0);

/// The frame whose turn it is, and the plan.
#[inline(always)]
fn next() -> Option<(Plan, *const [u64; WORDS])> {
    let plan = PLAN.get_ptr_mut(0)?;
    // SAFETY: array elements live as long as the map, and one CPU runs the bench.
    let now = unsafe { *plan };
    let following = if now.next + 1 >= now.frames {
        0
    } else {
        now.next + 1
    };
    // SAFETY: as above.
    unsafe { (*plan).next = following };
    Some((now, FRAMES.get_ptr(now.next)?))
}

/// XDP.
#[xdp]
pub(crate) fn replay_xdp(ctx: XdpContext) -> u32 {
    // What comes back has not jumped.
    let _not_jumped = xdp_frame(&ctx);
    xdp_action::XDP_ABORTED
}

#[inline(always)]
fn xdp_frame(ctx: &XdpContext) -> Option<()> {
    let (plan, frame) = next()?;
    let raw: *mut xdp_md = ctx.as_ptr().cast();
    let length = ctx.data_end() - ctx.data();
    let delta = plan.length as i32 - length as i32;
    // SAFETY: the context is the one the kernel passed.
    if delta != 0 && unsafe { bpf_xdp_adjust_tail(raw, delta) } != 0 {
        return None;
    }
    let data = ctx.data();
    if data + SHORT * 8 > ctx.data_end() {
        return None;
    }
    let (from, to) = (frame.cast::<u64>(), data as *mut u64);
    let mut word = 0;
    while word < SHORT {
        // SAFETY: the first bytes of the packet, as just compared, and of a live element.
        unsafe { to.add(word).write_unaligned(*from.add(word)) };
        word += 1;
    }
    if data + WORDS * 8 <= ctx.data_end() {
        while word < WORDS {
            // SAFETY: as above.
            unsafe { to.add(word).write_unaligned(*from.add(word)) };
            word += 1;
        }
    }
    // SAFETY: a program of the same kind.
    unsafe { XDP_TARGET.tail_call(ctx, plan.target) };
    None
}

/// tc, both directions.
#[classifier]
pub(crate) fn replay_tc(ctx: TcContext) -> i32 {
    // What comes back has not jumped.
    let _not_jumped = skb_frame(&ctx);
    TC_ACT_SHOT
}

#[inline(always)]
fn skb_frame(ctx: &TcContext) -> Option<()> {
    let (plan, frame) = next()?;
    let raw: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: the context is the one the kernel passed.
    if unsafe { (*raw).len } != plan.length {
        // SAFETY: as above.
        let status = unsafe { bpf_skb_change_tail(raw, plan.length, 0) };
        if status != 0 {
            return None;
        }
    }
    let bytes = if plan.length > 64 { 80 } else { 64 };
    // SAFETY: the element is 80 bytes long.
    let status = unsafe { bpf_skb_store_bytes(raw, 0, frame.cast(), bytes, 0) };
    if status != 0 {
        return None;
    }
    // SAFETY: a program of the same kind.
    unsafe { TC_TARGET.tail_call(ctx, plan.target) };
    None
}

/// Does nothing.
#[xdp]
pub(crate) fn empty_xdp(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Does nothing.
#[classifier]
pub(crate) fn empty_tc(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// The loader demands a licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: the build fails if a panic survives optimisation.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
