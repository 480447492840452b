//! Packet access: all bounds, all writes, and nothing about their meaning.
//!
//! Steps pass offsets, never pointers: a helper that moves packet data invalidates pointers.

mod skb;
mod xdp;

use core::arch::asm;

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::cty::c_void;
use network_types::eth::EthHdr;
use network_types::icmp::Icmpv4Hdr;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;
use svc_lb_common::outcome::{Hook, Outcome};
use svc_lb_common::{Addr4, Addr6, Be16};

pub(crate) use self::skb::SkbPacket;
pub(crate) use self::xdp::XdpPacket;

/// What each step returns: its result, or the outcome that ends the packet's walk.
pub(crate) type Step<T> = Result<T, Outcome>;

/// The verifier forgets a packet's range beyond this offset (MAX_PACKET_OFF in
/// kernel/bpf/verifier.c is 0xffff); headers lie far before it.
const MAX_OFFSET: usize = 1024;

/// The longest part of a packet that an ICMP error quotes, in 4-byte words: the longest IPv4 header is
/// 60 bytes, and IPv6 chains beyond that are cut.
pub(crate) const MAX_QUOTED_WORDS: usize = 32;

/// Hides where a value came from, so that the register that is compared with a bound is the one
/// that is added to a pointer. LLVM would compare another one that it can derive it from, and the
/// verifier would not know the sum's bound.
#[inline(always)]
pub(crate) fn opaque(mut value: usize) -> usize {
    // SAFETY: a move of the register to itself. (A comment alone would leave two line records for
    // one instruction, which the kernel refuses.)
    unsafe { asm!("{0} = {0}", inout(reg) value, options(pure, nomem, preserves_flags, nostack)) };
    value
}

/// Types for which any bytes are a value, as they lie in a packet: at any address.
///
/// # Safety
/// Every bit pattern is valid, and there is no padding.
pub(crate) unsafe trait Wire: Copy {
    /// Reads a value.
    ///
    /// # Safety
    /// `from` points at `size_of::<Self>()` readable bytes.
    #[inline(always)]
    unsafe fn read(from: *const Self) -> Self {
        // SAFETY: the caller's promise, and any bytes are a value.
        unsafe { from.read_unaligned() }
    }

    /// Writes a value.
    ///
    /// # Safety
    /// `to` points at `size_of::<Self>()` writable bytes.
    #[inline(always)]
    unsafe fn write(self, to: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { to.write_unaligned(self) }
    }
}

/// Words by one instruction each: LLVM would put them together from bytes, since it does not know
/// that the kernels we run on (x86_64, aarch64) have efficient unaligned access. (Its feature
/// allows-misaligned-mem-access also makes it misalign the stack, which the verifier refuses.)
macro_rules! word {
    ($ty:ident, $size:literal) => {
        // SAFETY: any bytes are an integer.
        unsafe impl Wire for $ty {
            #[inline(always)]
            unsafe fn read(from: *const Self) -> Self {
                let value: u64;
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(
                        concat!("{0} = *(", $size, " *)({1} + 0)"),
                        lateout(reg) value,
                        in(reg) from,
                        options(pure, readonly, preserves_flags, nostack)
                    );
                }
                value as $ty
            }

            #[inline(always)]
            unsafe fn write(self, to: *mut Self) {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(
                        concat!("*(", $size, " *)({0} + 0) = {1}"),
                        in(reg) to,
                        in(reg) self as u64,
                        options(preserves_flags, nostack)
                    );
                }
            }
        }
    };
}
word!(u16, "u16");
word!(u32, "u32");

/// Wrappers of words.
macro_rules! wrapper {
    ($ty:ident, $inner:ty) => {
        // SAFETY: transparent over a type for which any bytes are a value.
        unsafe impl Wire for $ty {
            #[inline(always)]
            unsafe fn read(from: *const Self) -> Self {
                // SAFETY: the caller's promise; transparent.
                Self(unsafe { <$inner>::read(from.cast()) })
            }

            #[inline(always)]
            unsafe fn write(self, to: *mut Self) {
                // SAFETY: the caller's promise; transparent.
                unsafe { self.0.write(to.cast()) }
            }
        }
    };
}
wrapper!(Be16, u16);
wrapper!(Addr4, u32);
wrapper!(Addr6, Quad);

type Quad = [u32; 4];
// SAFETY: four integers.
unsafe impl Wire for Quad {
    #[inline(always)]
    unsafe fn read(from: *const Self) -> Self {
        let word = |index| {
            // SAFETY: the caller's promise covers all four words.
            unsafe { u32::read(from.cast::<u32>().add(index)) }
        };
        [word(0), word(1), word(2), word(3)]
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut Self) {
        for (index, word) in self.into_iter().enumerate() {
            // SAFETY: the caller's promise covers all four words.
            unsafe { word.write(to.cast::<u32>().add(index)) };
        }
    }
}

// SAFETY: any bytes are bytes.
unsafe impl<const N: usize> Wire for [u8; N] {}

macro_rules! header {
    ($( $ty:ty ),*) => {
        $(
            // SAFETY: bytes, and integers for which any bytes are a value; no padding.
            unsafe impl Wire for $ty {}
        )*
    };
}
header!(EthHdr, Ipv4Hdr, Ipv6Hdr, TcpHdr, UdpHdr, Icmpv4Hdr);

/// A packet at one hook, from its link-layer header on.
pub(crate) trait Packet {
    /// Where it is met.
    fn hook(&self) -> Hook;

    /// The context, as helpers take it.
    fn context(&self) -> *mut c_void;

    /// Index of the interface it came in on (ingress) or leaves through (egress).
    fn interface(&self) -> u32;

    /// Whether the kernel has taken a VLAN tag off the frame.
    fn vlan_taken_off(&self) -> bool;

    /// Makes the first `end` bytes readable where the kernel keeps them apart;
    /// [`Outcome::Malformed`] if the packet is shorter.
    fn ensure(&self, end: usize) -> Step<()>;

    /// Reads a header or field; [`Outcome::Malformed`] if the packet is too short.
    fn load<T: Wire>(&self, offset: usize) -> Step<T>;

    /// Overwrites a header or field. Does not touch checksums.
    fn store<T: Wire>(&self, offset: usize, value: &T) -> Step<()> {
        self.store_as(offset, value, Sum::Stays)
    }

    /// The same, and says what it means for the sum over the packet.
    fn store_as<T: Wire>(&self, offset: usize, value: &T, sum: Sum) -> Step<()>;

    /// Applies a `checksum::difference` to the IPv4 header checksum at `offset`.
    fn update_ip_checksum(&self, offset: usize, difference: u32) -> Step<()>;

    /// Applies the differences in the pseudo header's addresses and in the ports to the transport
    /// checksum at `offset`.
    fn update_transport_checksum(
        &self,
        offset: usize,
        kind: TransportChecksum,
        addresses: u32,
        ports: u32,
    ) -> Step<()>;

    /// Copies `words` words, at most all of `to`.
    fn copy_out(&self, offset: usize, to: &mut [u32; MAX_QUOTED_WORDS], words: usize) -> Step<()>;

    /// Writes `words` words, at most all of `from`.
    fn copy_in(&self, offset: usize, from: &[u32; MAX_QUOTED_WORDS], words: usize) -> Step<()>;

    /// Bytes of payload in each segment that the kernel will cut it into; 0 if it stays whole.
    fn segment(&self) -> u32;

    /// Sends it on by the route that the kernel has answered: to its neighbour, or, where the
    /// kernel can, to one that must be resolved first.
    fn leave(&self, route: &FibLookup) -> Step<Leaves>;

    /// Cuts or extends the frame to `length` bytes; what is added has no defined content.
    fn resize(&self, length: u32) -> Step<()>;
}

/// How a packet leaves; see `outcome::Verdict`.
#[repr(u32)]
pub(crate) enum Leaves {
    /// By the interface it came in by.
    Back,
    /// By another one: the redirect helper was told which.
    Away,
}

/// What a change of a packet does to the sum over all of it, which some drivers hand to the stack
/// (CHECKSUM_COMPLETE).
#[derive(Clone, Copy)]
pub(crate) enum Sum {
    /// Nothing: another change, of a checksum in the packet, makes up for it.
    Stays,
    /// It changes as the bytes do.
    Changes,
}

/// What differs between transport checksums.
#[derive(Clone, Copy)]
pub(crate) struct TransportChecksum {
    /// UDP: 0 means "none" and must stay 0 (over IPv6 some tunnels use it, RFC 6935), and a sum of 0 is
    /// sent as 0xffff.
    pub(crate) zero_is_none: bool,
    /// The pseudo header is IPv6's.
    pub(crate) v6: bool,
}
