//! What really passes an interface: packets seen by an AF_PACKET socket.

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::netns::Namespace;

const ETH_P_ALL: u16 = 0x0003;
const ETH_HEADER: usize = 14;

/// A TCP, UDP or ICMP packet as it was on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Source address; port 0 for ICMP.
    pub from: SocketAddr,
    /// Destination address; port 0 for ICMP.
    pub to: SocketAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// IPv4 TTL or IPv6 hop limit.
    pub ttl: u8,
    /// TCP flags, the ICMP type, else 0.
    pub flags: u8,
    /// Bytes of TCP or UDP payload.
    pub payload: usize,
    /// Whether the IPv4 header's and the transport's checksums are right. Only meaningful where the sender's
    /// interface computes them, see `LabBuilder::uplink_offload`.
    pub checksums_ok: bool,
}

/// TCP flag SYN.
pub const SYN: u8 = 0x02;

/// A running capture; [`Capture::stop`] gives what it saw.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Seen>>,
}

impl Capture {
    /// Starts to capture on one interface, both directions.
    pub fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let what = || format!("capture on {interface} in {}", namespace.name());
        let index = namespace.netlink().index(interface)?;
        let mut socket = namespace
            .run(|| {
                Socket::new(
                    Domain::PACKET,
                    Type::RAW,
                    Some(Protocol::from(i32::from(ETH_P_ALL.to_be()))),
                )
            })
            .with_context(what)?;
        socket.bind(&link_address(index)?).with_context(what)?;
        // A thousand connections at once must not overflow it.
        socket.set_recv_buffer_size(16 << 20)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut seen = Vec::new();
            let mut buffer = vec![0; 1 << 17];
            loop {
                match socket.read(&mut buffer) {
                    Ok(length) => {
                        let frame = buffer.get(..length).unwrap_or_default();
                        seen.extend(parse(frame));
                    }
                    // Only an empty queue ends it, so that nothing sent before `stop` is lost.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if stopped.load(Ordering::Relaxed) {
                            return seen;
                        }
                    }
                    Err(_) => return seen,
                }
            }
        });
        Ok(Self { stop, thread })
    }

    /// Ends the capture.
    pub fn stop(self) -> Result<Vec<Seen>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_panic| anyhow::anyhow!("the capture's thread panicked"))
    }
}

fn link_address(index: u32) -> Result<SockAddr> {
    let index = i32::try_from(index).context("interface index")?;
    let link = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).context("address family")?,
        sll_protocol: ETH_P_ALL.to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a sockaddr_ll is one of the types the storage stands for.
    *unsafe { storage.view_as::<libc::sockaddr_ll>() } = link;
    let length = libc::socklen_t::try_from(size_of_val(&link)).context("address length")?;
    // SAFETY: the storage holds a sockaddr_ll of this length.
    Ok(unsafe { SockAddr::new(storage, length) })
}

/// A frame's packet; none for what is neither TCP, UDP nor ICMP, and for later fragments.
fn parse(frame: &[u8]) -> Option<Seen> {
    let packet = frame.get(ETH_HEADER..)?;
    match (be16(frame, 12)?, packet.first()? >> 4) {
        (0x0800, 4) => parse_v4(packet),
        (0x86dd, 6) => parse_v6(packet),
        _ => None,
    }
}

fn parse_v4(packet: &[u8]) -> Option<Seen> {
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    let total = usize::from(be16(packet, 2)?);
    if be16(packet, 6)? & 0x1fff != 0 {
        return None;
    }
    let header = packet.get(..header_len)?;
    let body = packet.get(header_len..total)?;
    let source: [u8; 4] = header.get(12..16)?.try_into().ok()?;
    let target: [u8; 4] = header.get(16..20)?.try_into().ok()?;
    let mut seen = transport(
        Ipv4Addr::from(source).into(),
        Ipv4Addr::from(target).into(),
        *header.get(9)?,
        body,
    )?;
    seen.ttl = *header.get(8)?;
    seen.checksums_ok &= sum(header) == 0xffff;
    Some(seen)
}

fn parse_v6(packet: &[u8]) -> Option<Seen> {
    let length = usize::from(be16(packet, 4)?);
    let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
    let target: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
    let mut seen = transport(
        Ipv6Addr::from(source).into(),
        Ipv6Addr::from(target).into(),
        *packet.get(6)?,
        packet.get(40..40 + length)?,
    )?;
    seen.ttl = *packet.get(7)?;
    Some(seen)
}

fn transport(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> Option<Seen> {
    let ports = || Some((be16(body, 0)?, be16(body, 2)?));
    let ((from_port, to_port), flags, header_len) = match protocol {
        6 => (
            ports()?,
            *body.get(13)?,
            usize::from(body.get(12)? >> 4) * 4,
        ),
        17 => (ports()?, 0, 8),
        1 | 58 => ((0, 0), *body.first()?, body.len()),
        _ => return None,
    };
    Some(Seen {
        from: SocketAddr::new(from, from_port),
        to: SocketAddr::new(to, to_port),
        protocol,
        ttl: 0,
        flags,
        payload: body.len().checked_sub(header_len)?,
        checksums_ok: transport_sum_ok(from, to, protocol, body),
    })
}

fn transport_sum_ok(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> bool {
    let mut bytes = Vec::with_capacity(body.len() + 40);
    match (from, to) {
        // ICMPv4 has no pseudo header; UDP over IPv4 may go without a checksum.
        (IpAddr::V4(_), IpAddr::V4(_)) if protocol == 1 => {}
        (IpAddr::V4(_), IpAddr::V4(_)) if protocol == 17 && be16(body, 6) == Some(0) => {
            return true;
        }
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            bytes.extend(from.octets());
            bytes.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            bytes.extend(from.octets());
            bytes.extend(to.octets());
        }
        _ => return false,
    }
    if !bytes.is_empty() {
        bytes.extend((body.len() as u64).to_be_bytes());
        bytes.extend([0, protocol]);
    }
    bytes.extend(body);
    sum(&bytes) == 0xffff
}

/// The Internet checksum's sum, folded to 16 bits; 0xffff over data with a right checksum.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| {
            let high = u64::from(pair.first().copied().unwrap_or_default());
            let low = u64::from(pair.get(1).copied().unwrap_or_default());
            high << 8 | low
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or_default()
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let pair: [u8; 2] = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(pair))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP datagram 192.168.0.1:1000 -> 192.168.0.199:2000 "hi", checksums computed by hand.
    #[test]
    fn right_and_wrong_checksums_are_told_apart() {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        frame.extend([
            0x45, 0, 0, 30, 0, 0, 0x40, 0, 64, 17, 0xb8, 0xb6, 192, 168, 0, 1, 192, 168, 0, 199,
        ]);
        frame.extend([0x03, 0xe8, 0x07, 0xd0, 0, 10, 0, 0, b'h', b'i']);
        let seen = parse(&frame).unwrap();
        assert!(seen.checksums_ok, "no UDP checksum is fine: {seen:?}");
        assert_eq!(
            (seen.from.port(), seen.to.port(), seen.payload),
            (1000, 2000, 2)
        );

        // 0x03e8+0x07d0+10+0x6869 + pseudo (c0a8+0001+c0a8+00c7+0x11+10) = 0x1f6aa + ... , complemented.
        let total: u32 = 0x03e8 + 0x07d0 + 10 + 0x6869 + 0xc0a8 + 1 + 0xc0a8 + 0xc7 + 0x11 + 10;
        let folded = (total & 0xffff) + (total >> 16);
        let check = u16::try_from(0xffff - folded).unwrap().to_be_bytes();
        frame[40..42].copy_from_slice(&check);
        assert!(parse(&frame).unwrap().checksums_ok);
        frame[43] ^= 1;
        assert!(!parse(&frame).unwrap().checksums_ok);
        frame[43] ^= 1;
        frame[22] -= 1;
        assert!(!parse(&frame).unwrap().checksums_ok, "IPv4 header");
    }
}
