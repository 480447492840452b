//! skbs at tc: direct reads where the header is linear, writes only through helpers.
//!
//! A direct write would make the verifier prepend an unclone to the program, and TCP's
//! transmitted skbs are clones: every packet, ours or not, would be copied. The helpers ask for a
//! private copy only of what they write, which TCP's clones already are.

use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
    bpf_fib_lookup as FibLookup, bpf_redir_neigh as NextHop,
    bpf_redir_neigh__bindgen_ty_1 as NextHopAddress,
};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{
    bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh, bpf_skb_change_tail,
    bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use svc_lb_common::config::CSUM_IPV6;
use svc_lb_common::outcome::{Hook, Outcome};

use super::{
    Leaves, MAX_OFFSET, MAX_QUOTED_WORDS, Packet, Step, Sum, TransportChecksum, Wire, opaque,
};
use crate::config::enabled;

/// BPF_F_IPV6: the difference cancels out in a CHECKSUM_COMPLETE sum (Linux 6.16).
const BPF_F_IPV6: u64 = 1 << 7;

/// An skb at tc.
pub(crate) struct SkbPacket {
    ctx: *mut __sk_buff,
    hook: Hook,
}

impl SkbPacket {
    /// Wraps the program's context.
    #[inline(always)]
    pub(crate) fn new(ctx: &TcContext, hook: Hook) -> Self {
        Self {
            ctx: ctx.as_ptr().cast(),
            hook,
        }
    }

    /// Where `T` lies at `offset`, if the linear part holds all of it.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*const T> {
        const {
            assert!(
                size_of::<T>() > 1,
                "the verifier learns nothing from `p < data_end`"
            );
        };
        // Volatile keeps LLVM from handing `data` and `data_end` to callees as integers.
        // SAFETY: `ctx` is the context the kernel passed to this program.
        let data = unsafe { read_volatile(&raw const (*self.ctx).data) } as usize;
        // SAFETY: as above.
        let end = unsafe { read_volatile(&raw const (*self.ctx).data_end) } as usize;
        let offset = opaque(offset);
        if offset > MAX_OFFSET {
            return None;
        }
        (data + offset + size_of::<T>() <= end).then_some((data + offset) as *const T)
    }
}

/// Turns a helper's status into a step.
#[inline(always)]
fn done(status: i64) -> Step<()> {
    match status {
        0 => Ok(()),
        _ => Err(Outcome::RewriteFailed),
    }
}

impl Packet for SkbPacket {
    #[inline(always)]
    fn hook(&self) -> Hook {
        self.hook
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        unsafe { (*self.ctx).ifindex }
    }

    #[inline(always)]
    fn vlan_taken_off(&self) -> bool {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        unsafe { (*self.ctx).vlan_present != 0 }
    }

    #[inline(always)]
    fn ensure(&self, end: usize) -> Step<()> {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        let data = unsafe { read_volatile(&raw const (*self.ctx).data) } as usize;
        // SAFETY: as above.
        let data_end = unsafe { read_volatile(&raw const (*self.ctx).data_end) } as usize;
        if end <= data_end - data {
            return Ok(());
        }
        // SAFETY: as above.
        match unsafe { bpf_skb_pull_data(self.ctx, end as u32) } {
            0 => Ok(()),
            _ => Err(Outcome::Malformed),
        }
    }

    #[inline(always)]
    fn load<T: Wire>(&self, offset: usize) -> Step<T> {
        let value = self.at::<T>(offset).ok_or(Outcome::Malformed)?;
        // SAFETY: `at` has checked the bounds.
        Ok(unsafe { T::read(value) })
    }

    #[inline(always)]
    fn store_as<T: Wire>(&self, offset: usize, value: &T, sum: Sum) -> Step<()> {
        let from = core::ptr::from_ref(value).cast();
        let flags = match sum {
            Sum::Stays => 0,
            Sum::Changes => BPF_F_RECOMPUTE_CSUM as u64,
        };
        // SAFETY: `from` points at `size_of::<T>()` initialised bytes.
        done(unsafe {
            bpf_skb_store_bytes(self.ctx, offset as u32, from, size_of::<T>() as u32, flags)
        })
    }

    #[inline(always)]
    fn update_ip_checksum(&self, offset: usize, difference: u32) -> Step<()> {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        done(unsafe { bpf_l3_csum_replace(self.ctx, offset as u32, 0, difference as u64, 0) })
    }

    #[inline(always)]
    fn update_transport_checksum(
        &self,
        offset: usize,
        kind: TransportChecksum,
        addresses: u32,
        ports: u32,
    ) -> Step<()> {
        let mut flags = 0;
        if kind.zero_is_none {
            flags |= BPF_F_MARK_MANGLED_0 as u64;
        }
        if kind.v6 && enabled(CSUM_IPV6) {
            flags |= BPF_F_IPV6;
        }
        // With CHECKSUM_PARTIAL the field holds the pseudo header's sum alone: the kernel applies
        // the first and skips the second.
        let pseudo = flags | BPF_F_PSEUDO_HDR as u64;
        // SAFETY: `ctx` is the context the kernel passed to this program.
        done(unsafe { bpf_l4_csum_replace(self.ctx, offset as u32, 0, addresses as u64, pseudo) })?;
        if ports == 0 {
            return Ok(());
        }
        // SAFETY: as above.
        done(unsafe { bpf_l4_csum_replace(self.ctx, offset as u32, 0, ports as u64, flags) })
    }

    #[inline(always)]
    fn copy_out(&self, offset: usize, to: &mut [u32; MAX_QUOTED_WORDS], words: usize) -> Step<()> {
        let to = to.as_mut_ptr().cast();
        // SAFETY: the caller's word for it that `to` is long enough.
        done(unsafe { bpf_skb_load_bytes(self.ctx.cast(), offset as u32, to, words as u32 * 4) })
    }

    #[inline(always)]
    fn copy_in(&self, offset: usize, from: &[u32; MAX_QUOTED_WORDS], words: usize) -> Step<()> {
        let from = from.as_ptr().cast();
        // SAFETY: the caller's word for it that `from` is long enough.
        done(unsafe { bpf_skb_store_bytes(self.ctx, offset as u32, from, words as u32 * 4, 0) })
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        unsafe { (*self.ctx).gso_size }
    }

    #[inline(always)]
    fn leave(&self, route: &FibLookup) -> Step<Leaves> {
        // The address is where IPv4's and IPv6's both begin.
        // SAFETY: the kernel fills in all of them, or the packet's own address is in it still.
        let next = unsafe { route.__bindgen_anon_4.ipv6_dst };
        let mut hop = NextHop {
            nh_family: route.family as u32,
            __bindgen_anon_1: NextHopAddress { ipv6_nh: next },
        };
        // It refuses nothing but unknown flags.
        // SAFETY: `hop` is the helper's own type and lives through the call.
        unsafe {
            bpf_redirect_neigh(route.ifindex, &raw mut hop, size_of::<NextHop>() as i32, 0);
        }
        Ok(Leaves::Away)
    }

    #[inline(always)]
    fn resize(&self, length: u32) -> Step<()> {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        done(unsafe { bpf_skb_change_tail(self.ctx, length, 0) })
    }
}
