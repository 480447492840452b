//! Answering a packet with the ICMP error about itself, which it turns into and goes back as.

use core::ptr::null_mut;

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_jiffies64};
use network_types::icmp::Icmpv4Hdr;
use network_types::ip::Ipv4Hdr;
use svc_lb_common::Address;
use svc_lb_common::checksum::{fold, sum};
use svc_lb_common::outcome::Outcome;

use crate::config::config;
use crate::family::{Family, V4, V6};
use crate::forward;
use crate::maps::BUCKET;
use crate::met::Met;
use crate::outcome::Verdict;
use crate::packet::{MAX_QUOTED_WORDS, Packet, Step, Wire, opaque};
use crate::parse::icmp;
use crate::rewrite;

/// Length of an ICMP header, both versions.
const ICMP: usize = icmp::HEADER;
/// What follows the offending packet's headers in an error (RFC 792: 64 bits).
const TRANSPORT: usize = 8;
/// Hop count of what we send (RFC 1700's IPDEFTTL).
const HOPS: u8 = 64;

/// A family's ICMP errors.
pub(crate) trait Unreachable: Family {
    /// Type and code of the error that tells a sender of the outcome.
    fn error(outcome: Outcome) -> [u8; 2];
    /// The second word of the error that says which size would do.
    fn size_word(mtu: u16) -> [u8; 4];
    /// Writes the network header of a packet of ours at `l3`, but for the addresses: `length` bytes of `protocol` follow.
    fn write_header<P: Packet>(
        packet: &P,
        l3: usize,
        addresses: (Self::Addr, Self::Addr),
        protocol: u8,
        length: usize,
    ) -> Step<()>;
    /// What the ICMP checksum covers beside the message.
    fn pseudo_sum(met: &Met<Self::Addr>, quoted: usize) -> u32;
}

impl Unreachable for V4 {
    #[inline(always)]
    fn error(outcome: Outcome) -> [u8; 2] {
        if outcome == Outcome::TooBig {
            return [3, 4];
        }
        if outcome == Outcome::TimeExceeded {
            return [11, 0];
        }
        // Port unreachable.
        [3, 3]
    }

    #[inline(always)]
    fn size_word(mtu: u16) -> [u8; 4] {
        let [high, low] = mtu.to_be_bytes();
        [0, 0, high, low]
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &P,
        l3: usize,
        (source, destination): (Self::Addr, Self::Addr),
        protocol: u8,
        length: usize,
    ) -> Step<()> {
        let [l0, l1] = ((Ipv4Hdr::LEN + length) as u16).to_be_bytes();
        // Precedence: internetwork control, as Linux marks its errors (RFC 1812 4.3.2.5).
        let service = if protocol == Self::ICMP { 0xc0 } else { 0 };
        // Don't fragment: an atomic datagram needs no id (RFC 6864).
        let mut start = [0x45, service, l0, l1, 0, 0, 0x40, 0, HOPS, protocol, 0, 0];
        let addresses = source.word_sum() + destination.word_sum();
        let check = !fold(sum(addresses, &start));
        [start[10], start[11]] = check.to_ne_bytes();
        packet.store(l3, &start)
    }

    #[inline(always)]
    fn pseudo_sum(_met: &Met<Self::Addr>, _quoted: usize) -> u32 {
        0
    }
}

impl Unreachable for V6 {
    #[inline(always)]
    fn error(outcome: Outcome) -> [u8; 2] {
        if outcome == Outcome::TooBig {
            return [2, 0];
        }
        if outcome == Outcome::TimeExceeded {
            return [3, 0];
        }
        // Port unreachable.
        [1, 4]
    }

    #[inline(always)]
    fn size_word(mtu: u16) -> [u8; 4] {
        (mtu as u32).to_be_bytes()
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &P,
        l3: usize,
        _addresses: (Self::Addr, Self::Addr),
        protocol: u8,
        length: usize,
    ) -> Step<()> {
        let [l0, l1] = (length as u16).to_be_bytes();
        packet.store(l3, &[0x60, 0, 0, 0, l0, l1, protocol, HOPS])
    }

    #[inline(always)]
    fn pseudo_sum(met: &Met<Self::Addr>, quoted: usize) -> u32 {
        let [l0, l1] = ((ICMP + quoted) as u16).to_be_bytes();
        sum(
            met.key.source.word_sum() + met.complaint.speaker.word_sum(),
            &[l0, l1, 0, Self::ICMP],
        )
    }
}

/// An ICMP error in the making.
#[repr(C)]
pub(crate) struct Complaint<A: Address> {
    /// Whose address it comes from.
    speaker: A,
    /// Type, code, no checksum yet, and the second word.
    header: Icmpv4Hdr,
    /// The outcome that it tells of.
    outcome: u32,
}

/// Answers a packet whose outcome its sender is to be told: [`Outcome::Rejected`], from the address it was
/// sent to; [`Outcome::TooBig`], with the size that the kernel has put into `met.route`, and
/// [`Outcome::TimeExceeded`], from this node's.
///
/// The limit of generated packets or RFC 1122 3.2.2 may forbid it.
#[inline(never)]
pub(crate) fn answer<P: Packet, F: Unreachable<Addr: Wire>>(
    packet: &P,
    met: &mut Met<F::Addr>,
    outcome: Outcome,
) -> Step<Verdict> {
    let (source, destination) = (met.key.source, met.key.destination);
    may_answer::<P, F>(packet, met)?;
    let [type_, code] = F::error(outcome);
    let mut data = [0; 4];
    let mut speaker = destination;
    if outcome != Outcome::Rejected {
        // As a router would. An interface without an address speaks for the frontend.
        speaker = forward::address_on::<F>(packet.interface()).unwrap_or(destination);
    }
    if outcome == Outcome::TooBig {
        // SAFETY: integers of one size.
        data = F::size_word(unsafe { met.route.__bindgen_anon_1.mtu_result });
    }
    met.complaint = Complaint {
        speaker,
        header: Icmpv4Hdr {
            type_,
            code,
            check: [0; 2],
            data,
        },
        outcome: outcome as u32,
    };
    let met = met.settle();
    let l3 = met.l3 as usize;
    let length = (met.l4 as usize).saturating_sub(l3) + TRANSPORT;
    // What the verifier must know of the length, whatever the offsets were.
    // One is added last: verifiers before 6.8 learn nothing from a comparison with 0.
    let words = opaque(length / 4 - 1).min(MAX_QUOTED_WORDS - 1) + 1;
    let quoted = words * 4;
    let start = l3 + F::HEADER;
    let message = start + ICMP;
    packet.resize((message + quoted) as u32)?;
    packet.copy_out(l3, &mut met.quoted, words)?;
    packet.copy_in(message, &met.quoted, words)?;
    // SAFETY: `quoted` is at most the buffer's size.
    let body = unsafe {
        bpf_csum_diff(
            null_mut(),
            0,
            met.quoted.as_mut_ptr(),
            opaque(quoted) as u32,
            0,
        )
    };
    let body = u32::from(fold(body.cast_unsigned() as u32));
    let mut header = met.complaint.header;
    let Icmpv4Hdr {
        type_, code, data, ..
    } = header;
    let total = sum(body + F::pseudo_sum(met, quoted), &[type_, code]);
    header.check = (!fold(sum(total, &data))).to_ne_bytes();
    packet.store(start, &header)?;
    let addresses = (met.complaint.speaker, source);
    F::write_header(packet, l3, addresses, F::ICMP, ICMP + quoted)?;
    packet.store(l3 + F::SOURCE, &met.complaint.speaker)?;
    packet.store(l3 + F::SOURCE + size_of::<F::Addr>(), &source)?;
    rewrite::swap(packet)?;
    Ok(Verdict::Back(match met.complaint.outcome {
        TOO_BIG => Outcome::TooBig,
        TIME_EXCEEDED => Outcome::TimeExceeded,
        _ => Outcome::Rejected,
    }))
}

const TOO_BIG: u32 = Outcome::TooBig as u32;
const TIME_EXCEEDED: u32 = Outcome::TimeExceeded as u32;

/// Whether a packet may be answered by one of ours: it is from one host to one host and no later fragment
/// (RFC 1122 3.2.2), and the limit is not used up.
#[inline(always)]
pub(crate) fn may_answer<P: Packet, F: Family>(packet: &P, met: &Met<F::Addr>) -> Step<()> {
    let [first, _] = packet.load::<[u8; 2]>(0)?;
    let silent = first & 1 != 0 || met.is_later();
    if silent || !F::is_unicast(met.key.source) || !F::is_unicast(met.key.destination) {
        return Err(Outcome::RejectSilent);
    }
    if !take_token() {
        return Err(Outcome::RejectLimited);
    }
    Ok(())
}

/// Takes one packet from the CPU's bucket.
#[inline(always)]
fn take_token() -> bool {
    let hz = config!(hz) as u64;
    let full = config!(generate_burst) as u64 * hz;
    let Some(bucket) = BUCKET.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_jiffies64() };
    // SAFETY: a per-CPU element that no other program on this CPU changes at the same time.
    let bucket = unsafe { &mut *bucket };
    let idle = now.wrapping_sub(bucket.filled);
    // A bucket idle long enough to be full is full; this also bounds the product.
    let gained = if idle >= full {
        full
    } else {
        idle * config!(generate_rate) as u64
    };
    bucket.filled = now;
    bucket.tokens = bucket.tokens.saturating_add(gained).min(full);
    if bucket.tokens < hz {
        return false;
    }
    bucket.tokens -= hz;
    true
}
