//! XDP frames: direct access, checksums by hand.

use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{bpf_fib_lookup as FibLookup, xdp_md};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;
use svc_lb_common::checksum;
use svc_lb_common::outcome::{Hook, Outcome};

use super::{
    Leaves, MAX_OFFSET, MAX_QUOTED_WORDS, Packet, Step, Sum, TransportChecksum, Wire, opaque,
};
use crate::rewrite;

/// Ethernet's shortest frame, without its check sequence.
const LEAST: u32 = 60;

/// A frame at XDP.
pub(crate) struct XdpPacket {
    ctx: *mut xdp_md,
}

impl XdpPacket {
    /// Wraps the program's context.
    #[inline(always)]
    pub(crate) fn new(ctx: &XdpContext) -> Self {
        Self {
            ctx: ctx.as_ptr().cast(),
        }
    }

    /// Where `T` lies at `offset`, if the frame's linear part holds all of it.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
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
        (data + offset + size_of::<T>() <= end).then_some((data + offset) as *mut T)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        let data = unsafe { read_volatile(&raw const (*self.ctx).data) } as usize;
        // SAFETY: as above.
        let end = unsafe { read_volatile(&raw const (*self.ctx).data_end) } as usize;
        // Hidden, or LLVM would add to `data` what is added to this.
        opaque(end - data) as u32
    }

    /// What is added is zero.
    #[inline(always)]
    fn move_end(&self, delta: i32) -> Step<()> {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        match unsafe { bpf_xdp_adjust_tail(self.ctx, delta) } {
            0 => Ok(()),
            // No room behind the frame, as behind a veth's small ones. Up to its IP length it is as it came.
            _ => Err(Outcome::LeftToTc),
        }
    }

    #[inline(always)]
    fn update(&self, offset: usize, with: impl FnOnce(u16) -> u16) -> Step<()> {
        let field = self.load::<u16>(offset)?;
        self.store(offset, &with(field))
    }
}

impl Packet for XdpPacket {
    #[inline(always)]
    fn hook(&self) -> Hook {
        Hook::XdpIngress
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: `ctx` is the context the kernel passed to this program.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn vlan_taken_off(&self) -> bool {
        false
    }

    #[inline(always)]
    fn ensure(&self, _end: usize) -> Step<()> {
        // What XDP cannot reach goes up as it is, and tc finds it linear.
        Ok(())
    }

    #[inline(always)]
    fn load<T: Wire>(&self, offset: usize) -> Step<T> {
        let value = self.at::<T>(offset).ok_or(Outcome::Malformed)?;
        // SAFETY: `at` has checked the bounds, and any bytes are a `T`.
        Ok(unsafe { T::read(value) })
    }

    #[inline(always)]
    fn store_as<T: Wire>(&self, offset: usize, value: &T, _sum: Sum) -> Step<()> {
        let place = self.at::<T>(offset).ok_or(Outcome::Malformed)?;
        // SAFETY: `at` has checked the bounds.
        unsafe { value.write(place) };
        Ok(())
    }

    #[inline(always)]
    fn update_ip_checksum(&self, offset: usize, difference: u32) -> Step<()> {
        self.update(offset, |check| checksum::update(check, difference))
    }

    #[inline(always)]
    fn update_transport_checksum(
        &self,
        offset: usize,
        kind: TransportChecksum,
        addresses: u32,
        ports: u32,
    ) -> Step<()> {
        let difference = addresses + ports;
        if kind.zero_is_none {
            return self.update(offset, |check| checksum::update_udp(check, difference));
        }
        self.update(offset, |check| checksum::update(check, difference))
    }

    #[inline(always)]
    fn copy_out(&self, offset: usize, to: &mut [u32; MAX_QUOTED_WORDS], words: usize) -> Step<()> {
        for (index, word) in to.iter_mut().enumerate() {
            if index >= words {
                break;
            }
            *word = self.load(offset + index * 4)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn copy_in(&self, offset: usize, from: &[u32; MAX_QUOTED_WORDS], words: usize) -> Step<()> {
        for (index, word) in from.iter().enumerate() {
            if index >= words {
                break;
            }
            self.store(offset + index * 4, word)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn leave(&self, route: &FibLookup) -> Step<Leaves> {
        rewrite::set_both(self, route.dmac, route.smac)?;
        if route.ifindex == self.interface() {
            return Ok(Leaves::Back);
        }
        // It refuses nothing but unknown flags.
        // SAFETY: a helper without pointers.
        unsafe { bpf_redirect(route.ifindex, 0) };
        Ok(Leaves::Away)
    }

    #[inline(always)]
    fn resize(&self, length: u32) -> Step<()> {
        self.move_end(length as i32 - self.length() as i32)?;
        if length < LEAST {
            // Not every driver fills up what XDP sends.
            self.move_end((LEAST - length) as i32)?;
        }
        Ok(())
    }
}
