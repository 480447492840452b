//! Ethernet frames as values: built from fields, with every length and checksum computed from scratch.
//!
//! A test states the frame it expects as a change of the one it sent; that its bytes equal what a program made of the
//! first proves the program's incremental checksums against full ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use svc_lb_common::Family;
use svc_lb_common::checksum::{fold, sum};

use crate::lab::netlink::Mac;

/// TCP flags.
pub mod flags {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Opens.
    pub const SYN: u8 = 1 << 1;
    /// Aborts.
    pub const RST: u8 = 1 << 2;
    /// Carries data to hand over.
    pub const PSH: u8 = 1 << 3;
    /// Acknowledges.
    pub const ACK: u8 = 1 << 4;
}

/// EtherType of 802.1Q.
pub const VLAN: u16 = 0x8100;
/// EtherType of 802.1ad.
pub const QINQ: u16 = 0x88a8;
/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Hop limit of frames where nothing else is said.
pub const HOPS: u8 = 63;

/// IPv6 extension headers and what else follows an IP header, by IANA's numbers.
pub mod next {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// Routing header.
    pub const ROUTING: u8 = 43;
    /// Fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMPv6.
    pub const ICMP6: u8 = 58;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// What the IP packet carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// A TCP segment.
    Tcp {
        /// Bits of [`flags`].
        flags: u8,
    },
    /// A UDP datagram.
    Udp {
        /// Without: the checksum field is 0.
        checksum: bool,
    },
    /// An SCTP packet with one chunk, which says what TCP's flags would.
    Sctp {
        /// Bits of [`flags`].
        flags: u8,
    },
    /// Anything else: its payload begins with the two ports all the same.
    Other(u8),
}

impl Transport {
    /// IANA's number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp { .. } => next::TCP,
            Self::Udp { .. } => next::UDP,
            Self::Sctp { .. } => next::SCTP,
            Self::Other(number) => number,
        }
    }
}

/// Part of a fragmented datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Part {
    /// Offset in units of 8 bytes.
    pub offset: u16,
    /// More follow.
    pub more: bool,
    /// What all parts of a datagram have in common; of IPv4 16 bits.
    pub id: u32,
}

/// An Ethernet frame with an IP packet in it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frame {
    /// Destination and source MAC address.
    pub macs: [Mac; 2],
    /// VLAN tags in the frame, outermost first: EtherType and tag control information.
    pub tags: Vec<(u16, u16)>,
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port, of the same family.
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub hops: u8,
    /// IPv4 options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: number and body after the two first bytes (6, 14, ... bytes).
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Set in fragments.
    pub part: Option<Part>,
    /// TCP, UDP or another.
    pub transport: Transport,
    /// TCP's sequence number and the one it acknowledges; SCTP's initiate and verification tags.
    pub numbers: [u32; 2],
    /// What follows the transport header.
    pub payload: Vec<u8>,
    /// Ethernet padding behind the IP packet.
    pub padding: usize,
}

/// IPv4's identification of whole packets.
const ID: u32 = 0x1234;
/// TCP's numbers where nothing else is said; of frames that are no TCP too.
const NUMBERS: [u32; 2] = [0x1122_3344, 0x5566_7788];
const CLIENT_MAC: Mac = [0x02, 0, 0, 0, 0, 0x0c];
const NODE_MAC: Mac = [0x02, 0, 0, 0, 0, 0x01];

/// The type of the chunk that says the same as TCP's flags.
const fn chunk(tcp: u8) -> u8 {
    match tcp {
        _ if tcp & flags::RST != 0 => 6,
        _ if tcp & flags::FIN != 0 => 7,
        _ if tcp & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK => 2,
        _ if tcp & flags::SYN != 0 => 1,
        _ => 0,
    }
}

/// What TCP would say in place of a chunk: INIT, INIT ACK, ABORT, SHUTDOWN and its ACK, or anything else.
#[must_use]
pub const fn sctp_flags(chunk: u8) -> u8 {
    match chunk {
        1 => flags::SYN,
        2 => flags::SYN | flags::ACK,
        6 => flags::RST | flags::ACK,
        7 | 8 => flags::FIN | flags::ACK,
        _ => flags::ACK,
    }
}

/// SCTP's checksum, bit by bit (RFC 9260, appendix A).
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |register, byte| {
        (0..8).fold(register ^ u32::from(*byte), |register, _| {
            (register >> 1) ^ ((register & 1) * 0x82f6_3b78)
        })
    })
}

impl Frame {
    /// A TCP segment.
    #[must_use]
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        Self::new(source, destination, Transport::Tcp { flags })
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        Self::new(source, destination, Transport::Udp { checksum: true })
    }

    /// A frame from a client's MAC address to the node's.
    #[must_use]
    pub fn new(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Self {
        Self {
            macs: [NODE_MAC, CLIENT_MAC],
            tags: Vec::new(),
            source,
            destination,
            hops: HOPS,
            options: Vec::new(),
            extensions: Vec::new(),
            part: None,
            transport,
            numbers: NUMBERS,
            payload: b"hello".to_vec(),
            padding: 0,
        }
    }

    /// The same with another destination.
    #[must_use]
    pub fn to(mut self, destination: SocketAddr) -> Self {
        self.destination = destination;
        self
    }

    /// The same with another source.
    #[must_use]
    pub fn from(mut self, source: SocketAddr) -> Self {
        self.source = source;
        self
    }

    /// The answer to this frame: turned around, with other TCP flags, from where it acknowledges.
    #[must_use]
    pub fn answer(&self, flags: u8) -> Self {
        let transport = match self.transport {
            Transport::Tcp { .. } => Transport::Tcp { flags },
            Transport::Sctp { .. } => Transport::Sctp { flags },
            other @ (Transport::Udp { .. } | Transport::Other(_)) => other,
        };
        let [destination, source] = self.macs;
        let numbers = match (transport, self.numbers) {
            (Transport::Tcp { .. } | Transport::Sctp { .. }, [sent, expected]) => [expected, sent],
            (Transport::Udp { .. } | Transport::Other(_), numbers) => numbers,
        };
        Self {
            macs: [source, destination],
            source: self.destination,
            destination: self.source,
            transport,
            numbers,
            hops: HOPS,
            payload: b"world!".to_vec(),
            ..self.clone()
        }
    }

    /// The same segment or packet with other flags.
    #[must_use]
    pub fn with_flags(&self, flags: u8) -> Self {
        let transport = match self.transport {
            Transport::Sctp { .. } => Transport::Sctp { flags },
            Transport::Tcp { .. } | Transport::Udp { .. } | Transport::Other(_) => {
                Transport::Tcp { flags }
            }
        };
        Self {
            transport,
            ..self.clone()
        }
    }

    /// The same, turned around at an edge: MAC addresses swapped, one hop fewer.
    #[must_use]
    pub fn turned(mut self) -> Self {
        let [destination, source] = self.macs;
        self.macs = [source, destination];
        self.hops -= 1;
        self
    }

    /// Its family.
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of(self.destination.ip())
    }

    /// Offset of the IP header.
    #[must_use]
    pub fn l3(&self) -> usize {
        ETHERNET + 4 * self.tags.len()
    }

    /// Offset of the transport header.
    #[must_use]
    pub fn l4(&self) -> usize {
        let header = match self.family() {
            Family::V4 => 20 + self.options.len(),
            Family::V6 => {
                let fragment = if self.part.is_some() { 8 } else { 0 };
                let extensions = self.extensions.iter().map(|(_, body)| body.len() + 2);
                40 + extensions.sum::<usize>() + fragment
            }
        };
        self.l3() + header
    }

    /// The frame's bytes.
    ///
    /// # Panics
    /// If source and destination are of different families.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.with_body(&self.body())
    }

    /// The frames that a router would make of this one, if it cut the IP packet behind so many bytes, each a multiple of
    /// 8.
    ///
    /// # Panics
    /// If a cut lies in no such place, or behind the end.
    #[must_use]
    pub fn pieces(&self, id: u32, cuts: &[usize]) -> Vec<Vec<u8>> {
        let body = self.body();
        let starts = std::iter::once(0).chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain([body.len()]);
        let pieces = starts.zip(ends).map(|(start, end)| {
            assert!(start % 8 == 0 && start < end, "a cut at {start}");
            let part = Part {
                offset: u16::try_from(start / 8).expect("a short datagram"),
                more: end < body.len(),
                id,
            };
            let piece = Self {
                part: Some(part),
                ..self.clone()
            };
            piece.with_body(&body[start..end])
        });
        pieces.collect()
    }

    /// Puts a datagram's parts together, as their receiver would, and reads it.
    ///
    /// `None` where parts are missing, headers are not right, or the whole has a wrong length or checksum.
    #[must_use]
    pub fn put_together(pieces: &[Vec<u8>]) -> Option<Self> {
        let mut parts = pieces
            .iter()
            .map(|bytes| Cut::of(bytes))
            .collect::<Option<Vec<_>>>()?;
        parts.sort_by_key(|part| part.offset);
        let (first, last) = (parts.first()?, parts.last()?);
        let same = |part: &Cut| part.id == first.id && part.addresses == first.addresses;
        if !parts.iter().all(same) || last.more {
            return None;
        }
        let mut body = Vec::new();
        for part in &parts {
            if part.offset != body.len() {
                return None;
            }
            body.extend(&part.body);
        }
        Self::parse(&first.whole(&body)?)
    }

    /// Whether these are all parts of one datagram, from the first to the last, with the same addresses.
    #[must_use]
    pub fn went_together(pieces: &[Vec<u8>]) -> bool {
        let parts: Option<Vec<Cut>> = pieces.iter().map(|bytes| Cut::of(bytes)).collect();
        let Some(mut parts) = parts else {
            return false;
        };
        parts.sort_by_key(|part| part.offset);
        let mut end = 0;
        let ordered = parts.iter().all(|part| {
            let follows = part.offset == end && part.addresses == parts[0].addresses;
            end += part.body.len();
            follows
        });
        // Not yet right: of a first fragment that ends before TCP's checksum (RFC 1858), padding is changed instead.
        let holds_checksum = parts.first().is_some_and(|first| first.body.len() >= 20);
        ordered && holds_checksum && parts.last().is_some_and(|last| !last.more)
    }

    fn with_body(&self, body: &[u8]) -> Vec<u8> {
        let [destination, source] = self.macs;
        let mut bytes = [destination, source].concat();
        for (kind, tag) in &self.tags {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(tag.to_be_bytes());
        }
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                bytes.extend(0x0800_u16.to_be_bytes());
                bytes.extend(self.header4(source, destination, body.len()));
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend(0x86dd_u16.to_be_bytes());
                bytes.extend(self.header6(source, destination, body.len()));
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                panic!("one family per frame")
            }
        }
        bytes.extend(body);
        bytes.resize(bytes.len() + self.padding, 0);
        bytes
    }

    fn header4(&self, source: Ipv4Addr, destination: Ipv4Addr, body: usize) -> Vec<u8> {
        let length = 20 + self.options.len();
        let part = self
            .part
            .map_or(0x4000, |part| part.offset | u16::from(part.more) << 13);
        let mut header = vec![
            0x40 | u8::try_from(length / 4).expect("at most 60 bytes"),
            0,
        ];
        header.extend(be16(length + body));
        let id = self.part.map_or(ID, |part| part.id);
        header.extend(u16::try_from(id).expect("16 bits").to_be_bytes());
        header.extend(part.to_be_bytes());
        header.extend([self.hops, self.transport.number(), 0, 0]);
        header.extend(source.octets());
        header.extend(destination.octets());
        header.extend(&self.options);
        let check = (!fold(sum(0, &header))).to_ne_bytes();
        header.splice(10..12, check);
        header
    }

    fn header6(&self, source: Ipv6Addr, destination: Ipv6Addr, body: usize) -> Vec<u8> {
        let mut chain: Vec<(u8, Vec<u8>)> = self
            .extensions
            .iter()
            .map(|(number, body)| {
                let unit = if *number == next::AUTHENTICATION {
                    4
                } else {
                    8
                };
                let less = if *number == next::AUTHENTICATION {
                    2
                } else {
                    1
                };
                let length = (body.len() + 2) / unit - less;
                let mut bytes = vec![u8::try_from(length).expect("a short header")];
                bytes.extend(body);
                (*number, bytes)
            })
            .collect();
        if let Some(part) = self.part {
            let mut bytes = vec![0];
            bytes.extend((part.offset << 3 | u16::from(part.more)).to_be_bytes());
            bytes.extend(part.id.to_be_bytes());
            chain.push((next::FRAGMENT, bytes));
        }
        let length: usize = chain.iter().map(|(_, bytes)| bytes.len() + 1).sum();
        let mut numbers: Vec<u8> = chain.iter().map(|(number, _)| *number).collect();
        numbers.push(self.transport.number());

        let mut header = vec![0x60, 0x01, 0x23, 0x45];
        header.extend(be16(length + body));
        header.extend([numbers[0], self.hops]);
        header.extend(source.octets());
        header.extend(destination.octets());
        for ((_, bytes), next) in chain.iter().zip(&numbers[1..]) {
            header.push(*next);
            header.extend(bytes);
        }
        header
    }

    /// Transport header and payload.
    fn body(&self) -> Vec<u8> {
        if self.part.is_some_and(|part| part.offset != 0) {
            return self.payload.clone();
        }
        let mut body = Vec::new();
        body.extend(self.source.port().to_be_bytes());
        body.extend(self.destination.port().to_be_bytes());
        let check = match self.transport {
            Transport::Tcp { flags } => {
                body.extend(self.numbers.map(u32::to_be_bytes).concat());
                body.extend([0x50, flags, 0xfa, 0xf0, 0, 0, 0, 0]);
                Some(16)
            }
            Transport::Sctp { flags } => {
                let [initiate, verify] = self.numbers.map(u32::to_be_bytes);
                body.extend([verify, [0; 4], [chunk(flags), 0, 0, 8], initiate].concat());
                None
            }
            Transport::Udp { checksum } => {
                body.extend(be16(8 + self.payload.len()));
                body.extend([0, 0]);
                checksum.then_some(6)
            }
            Transport::Other(_) => None,
        };
        body.extend(&self.payload);
        if let Transport::Sctp { .. } = self.transport {
            let check = crc32c(&body).to_le_bytes();
            body.splice(8..12, check);
        }
        if let Some(at) = check {
            let sums = sum(self.pseudo_sum(body.len()), &body);
            let check = match (!fold(sums), self.transport) {
                (0, Transport::Udp { .. }) => 0xffff,
                (check, _) => check,
            };
            body.splice(at..at + 2, check.to_ne_bytes());
        }
        body
    }

    fn pseudo_sum(&self, length: usize) -> u32 {
        let total = pseudo_sum(self.source.ip(), self.destination.ip());
        let [high, low] = be16(length);
        sum(total, &[high, low, 0, self.transport.number()])
    }

    /// Reads a whole, well-formed frame back.
    ///
    /// `None` for anything else: a fragment, another protocol, or one with wrong lengths or checksums.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let frame = Self::parse_unchecked(bytes)?;
        (frame.to_bytes() == bytes).then_some(frame)
    }

    /// The same, whatever its checksums are.
    #[must_use]
    pub fn parse_unchecked(bytes: &[u8]) -> Option<Self> {
        let mut tags = Vec::new();
        let mut l3 = ETHERNET;
        loop {
            match word(bytes, l3 - 2)? {
                kind @ (VLAN | QINQ) => {
                    tags.push((kind, word(bytes, l3)?));
                    l3 += 4;
                }
                0x0800 | 0x86dd => break,
                _ => return None,
            }
        }
        let mut options = Vec::new();
        let mut extensions = Vec::new();
        let (addresses, hops, mut number, mut l4, end);
        if word(bytes, l3 - 2)? == 0x0800 {
            let header: [u8; 20] = bytes.get(l3..l3 + 20)?.try_into().ok()?;
            let address = |at: usize| {
                Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3])
            };
            addresses = [IpAddr::from(address(12)), IpAddr::from(address(16))];
            (hops, number) = (header[8], header[9]);
            l4 = l3 + usize::from(header[0] & 15) * 4;
            options.extend(bytes.get(l3 + 20..l4)?);
            end = l3 + usize::from(word(bytes, l3 + 2)?);
            if word(bytes, l3 + 6)? != 0x4000 {
                return None;
            }
        } else {
            let address = |at: usize| -> Option<IpAddr> {
                let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(octets).into())
            };
            addresses = [address(l3 + 8)?, address(l3 + 24)?];
            (number, hops) = (*bytes.get(l3 + 6)?, *bytes.get(l3 + 7)?);
            l4 = l3 + 40;
            end = l4 + usize::from(word(bytes, l3 + 4)?);
            while ![next::TCP, next::UDP, next::SCTP].contains(&number) {
                let units = usize::from(*bytes.get(l4 + 1)?);
                let length = match number {
                    next::HOP_BY_HOP | next::ROUTING | next::DESTINATION => (units + 1) * 8,
                    next::AUTHENTICATION => (units + 2) * 4,
                    _ => return None,
                };
                extensions.push((number, bytes.get(l4 + 2..l4 + length)?.to_vec()));
                number = *bytes.get(l4)?;
                l4 += length;
            }
        }
        let (transport, numbers, header) = match number {
            next::TCP => {
                let flags = *bytes.get(l4 + 13)?;
                let numbers = [double_word(bytes, l4 + 4)?, double_word(bytes, l4 + 8)?];
                (Transport::Tcp { flags }, numbers, 20)
            }
            next::SCTP => {
                let numbers = [double_word(bytes, l4 + 16)?, double_word(bytes, l4 + 4)?];
                let flags = sctp_flags(*bytes.get(l4 + 12)?);
                (Transport::Sctp { flags }, numbers, 20)
            }
            next::UDP => {
                let checksum = word(bytes, l4 + 6)? != 0;
                (Transport::Udp { checksum }, NUMBERS, 8)
            }
            _ => return None,
        };
        let [source, destination] = addresses;
        let frame = Self {
            macs: [
                bytes.get(..6)?.try_into().ok()?,
                bytes.get(6..12)?.try_into().ok()?,
            ],
            tags,
            source: SocketAddr::new(source, word(bytes, l4)?),
            destination: SocketAddr::new(destination, word(bytes, l4 + 2)?),
            hops,
            options,
            extensions,
            part: None,
            transport,
            numbers,
            payload: bytes.get(l4 + header..end)?.to_vec(),
            padding: bytes.len() - end,
        };
        Some(frame)
    }

    /// The ICMP error that says "port unreachable" about this frame, as this frame's destination sends it.
    #[must_use]
    pub fn port_unreachable(&self) -> Vec<u8> {
        let kind = match self.family() {
            Family::V4 => [3, 3],
            Family::V6 => [1, 4],
        };
        let mut error = Icmp::about(self, kind, self.destination.ip(), 8);
        error.body.truncate(128);
        self.answered_with(0xc0, error.number(), error.message())
    }

    /// The reset of this segment's connection, as this segment's destination sends it when it knows nothing of it (RFC 9293
    /// 3.10.7.1).
    ///
    /// # Panics
    /// If this is no TCP segment.
    #[must_use]
    pub fn reset(&self) -> Vec<u8> {
        let Transport::Tcp { flags } = self.transport else {
            panic!("{:?} has no connection", self.transport)
        };
        let [sequence, expected] = self.numbers;
        let ends = [flags::SYN, flags::FIN].map(|end| u32::from(flags & end != 0));
        let sent = u32::try_from(self.payload.len()).expect("frames are short");
        let (flags, numbers) = if flags & flags::ACK != 0 {
            (flags::RST, [expected, 0])
        } else {
            let next = sequence.wrapping_add(sent).wrapping_add(ends.iter().sum());
            (flags::RST | flags::ACK, [0, next])
        };
        let mut segment = Vec::new();
        segment.extend(self.destination.port().to_be_bytes());
        segment.extend(self.source.port().to_be_bytes());
        segment.extend(numbers.map(u32::to_be_bytes).concat());
        segment.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
        let addresses = pseudo_sum(self.source.ip(), self.destination.ip());
        let total = sum(addresses, &[0, 20, 0, next::TCP]);
        let check = (!fold(sum(total, &segment))).to_ne_bytes();
        segment.splice(16..18, check);
        self.answered_with(0, next::TCP, segment)
    }

    /// A frame back from this one's destination, of a node's making.
    fn answered_with(&self, service: u8, number: u8, message: Vec<u8>) -> Vec<u8> {
        let [destination, source] = self.macs;
        let mut out = [source, destination].concat();
        out.extend(&self.to_bytes()[12..self.l3()]);
        let ends = [self.destination.ip(), self.source.ip()];
        out.extend(made_header(service, number, 64, ends, message.len()));
        out.extend(message);
        out
    }
}

/// The IP header of a packet of some node's making.
fn made_header(
    service: u8,
    number: u8,
    hops: u8,
    [source, destination]: [IpAddr; 2],
    length: usize,
) -> Vec<u8> {
    let mut header = Vec::new();
    if source.is_ipv4() {
        header.extend([0x45, service]);
        header.extend(be16(20 + length));
        header.extend([0, 0, 0x40, 0, hops, number, 0, 0]);
    } else {
        header.extend([0x60, 0, 0, 0]);
        header.extend(be16(length));
        header.extend([number, hops]);
    }
    header.extend([octets(source), octets(destination)].concat());
    if source.is_ipv4() {
        let check = (!fold(sum(0, &header))).to_ne_bytes();
        header.splice(10..12, check);
    }
    header
}

/// An ICMP message.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Icmp {
    /// Destination and source MAC address.
    pub macs: [Mac; 2],
    /// Who sends it.
    pub source: IpAddr,
    /// To whom, of the same family.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub hops: u8,
    /// Type and code.
    pub kind: [u8; 2],
    /// The second word.
    pub data: [u8; 4],
    /// What follows: of an error the packet that it is about.
    pub body: Vec<u8>,
}

impl Icmp {
    /// The error about a frame, of which it quotes the network header and so many bytes more, that somebody sends to who
    /// sent that frame.
    #[must_use]
    pub fn about(frame: &Frame, kind: [u8; 2], from: IpAddr, quoted: usize) -> Self {
        let [destination, source] = frame.macs;
        let bytes = frame.to_bytes();
        let end = (frame.l4() + quoted).min(bytes.len() - frame.padding);
        Self {
            macs: [source, destination],
            source: from,
            destination: frame.source.ip(),
            hops: HOPS,
            kind,
            data: [0; 4],
            body: bytes[frame.l3()..end].to_vec(),
        }
    }

    /// IANA's number.
    const fn number(&self) -> u8 {
        match self.source {
            IpAddr::V4(_) => next::ICMP,
            IpAddr::V6(_) => next::ICMP6,
        }
    }

    /// The message, with its checksum.
    fn message(&self) -> Vec<u8> {
        let mut message = [&self.kind[..], &[0; 2], &self.data, &self.body].concat();
        let total = match self.source {
            IpAddr::V4(_) => 0,
            IpAddr::V6(_) => {
                let [high, low] = be16(message.len());
                let addresses = pseudo_sum(self.source, self.destination);
                sum(addresses, &[high, low, 0, self.number()])
            }
        };
        let check = (!fold(sum(total, &message))).to_ne_bytes();
        message.splice(2..4, check);
        message
    }

    /// The frame's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let message = self.message();
        let [destination, source] = self.macs;
        let mut out = [destination, source].concat();
        out.extend(match self.source {
            IpAddr::V4(_) => [0x08, 0x00],
            IpAddr::V6(_) => [0x86, 0xdd],
        });
        let ends = [self.source, self.destination];
        out.extend(made_header(
            0xc0,
            self.number(),
            self.hops,
            ends,
            message.len(),
        ));
        out.extend(message);
        out
    }
}

/// A fragment in its parts.
struct Cut {
    /// What is in front of the piece of the datagram, less IPv6's fragment header.
    front: Vec<u8>,
    l3: usize,
    /// Where in it the number of what follows lies.
    next: usize,
    protocol: u8,
    addresses: Vec<u8>,
    id: u32,
    /// In bytes.
    offset: usize,
    more: bool,
    body: Vec<u8>,
}

impl Cut {
    fn of(bytes: &[u8]) -> Option<Self> {
        let mut l3 = ETHERNET;
        while [VLAN, QINQ].contains(&word(bytes, l3 - 2)?) {
            l3 += 4;
        }
        if word(bytes, l3 - 2)? == 0x0800 {
            let l4 = l3 + usize::from(bytes.get(l3)? & 15) * 4;
            let end = l3 + usize::from(word(bytes, l3 + 2)?);
            let front = bytes.get(..l4)?;
            let flags = word(bytes, l3 + 6)?;
            return (fold(sum(0, &front[l3..])) == 0xffff).then_some(Self {
                front: front.to_vec(),
                l3,
                next: l3 + 9,
                protocol: front[l3 + 9],
                addresses: front[l3 + 12..l3 + 20].to_vec(),
                id: word(bytes, l3 + 4)?.into(),
                offset: usize::from(flags & 0x1fff) * 8,
                more: flags & 0x2000 != 0,
                body: bytes.get(l4..end)?.to_vec(),
            });
        }
        let end = l3 + 40 + usize::from(word(bytes, l3 + 4)?);
        let (mut next, mut at) = (l3 + 6, l3 + 40);
        while *bytes.get(next)? != next::FRAGMENT {
            let units = usize::from(*bytes.get(at + 1)?);
            let length = match *bytes.get(next)? {
                next::AUTHENTICATION => (units + 2) * 4,
                next::HOP_BY_HOP | next::ROUTING | next::DESTINATION => (units + 1) * 8,
                _ => return None,
            };
            (next, at) = (at, at + length);
        }
        let flags = word(bytes, at + 2)?;
        Some(Self {
            front: bytes.get(..at)?.to_vec(),
            l3,
            next,
            protocol: *bytes.get(at)?,
            addresses: bytes.get(l3 + 8..l3 + 40)?.to_vec(),
            id: double_word(bytes, at + 4)?,
            offset: usize::from(flags & 0xfff8),
            more: flags & 1 != 0,
            body: bytes.get(at + 8..end)?.to_vec(),
        })
    }

    /// The whole packet.
    fn whole(&self, body: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = self.front.clone();
        let header = bytes.len() - self.l3;
        let length = |length| u16::try_from(length).ok().map(u16::to_be_bytes);
        let l3 = self.l3;
        if word(&bytes, l3 - 2)? == 0x0800 {
            bytes.splice(l3 + 2..l3 + 4, length(header + body.len())?);
            bytes.splice(l3 + 4..l3 + 6, u16::try_from(ID).ok()?.to_be_bytes());
            bytes.splice(l3 + 6..l3 + 8, [0x40, 0]);
            bytes.splice(l3 + 10..l3 + 12, [0, 0]);
            let check = (!fold(sum(0, &bytes[l3..]))).to_ne_bytes();
            bytes.splice(l3 + 10..l3 + 12, check);
        } else {
            bytes.splice(l3 + 4..l3 + 6, length(header - 40 + body.len())?);
            bytes[self.next] = self.protocol;
        }
        bytes.extend(body);
        Some(bytes)
    }
}

/// The sum of the addresses' words, as pseudo headers and nothing else have it.
#[must_use]
pub fn pseudo_sum(source: IpAddr, destination: IpAddr) -> u32 {
    sum(sum(0, &octets(source)), &octets(destination))
}

/// An address's bytes.
#[must_use]
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The big-endian word at an offset.
#[must_use]
pub fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let pair: [u8; 2] = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(pair))
}

/// The big-endian double word at an offset.
#[must_use]
pub fn double_word(bytes: &[u8], at: usize) -> Option<u32> {
    let four: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_be_bytes(four))
}

fn be16(length: usize) -> [u8; 2] {
    u16::try_from(length)
        .expect("frames are short")
        .to_be_bytes()
}
