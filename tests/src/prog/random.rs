//! Random services and random packets, made to meet: few addresses, few ports, all kinds of both.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fastrand::Rng;
use ipnet::IpNet;
use svc_lb::compile::desired::{Backend, DesiredPort, FrontendKind, Selection};
use svc_lb_common::config::{
    Config, DROP_UNALLOCATED, EXTERNAL_IPS_OUTSIDE, MASQUERADE_ALL, REJECT_NO_LOCAL,
    REJECT_UNDEFINED_PORT, RESET_VANISHED, SNAT_ALWAYS,
};
use svc_lb_common::outcome::Hook;
use svc_lb_common::{Addr4, Addr6, Family, Protocol};

use super::frame::{ETHERNET, Frame, Icmp, Part, QINQ, Transport, VLAN, flags, next, word};
use super::network::{NEIGHBOURS, Network, UNKNOWN_NEIGHBOURS};
use super::rig::{Setup, Verdict};
use super::tables::{Describe as _, port};

/// Services there may be at once.
pub const SERVICES: usize = 10;
/// Exchanges that go on at once.
const EXCHANGES: usize = 64;

/// Something to send.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Where it is met.
    pub hook: Hook,
    /// At which interface.
    pub interface: u32,
    /// The frame's bytes.
    pub bytes: Vec<u8>,
    /// What it was before it was damaged; an exchange goes on only from what was not.
    frame: Option<Frame>,
    /// Of a part of a datagram all of whose parts are sent, and no others: which one of all, and of how many parts.
    pub piece: Option<(u64, usize)>,
}

/// Makes packets, and answers to what became of them.
#[derive(Debug)]
pub struct Traffic {
    network: Network,
    exchanges: Vec<Exchange>,
    /// ICMP messages that were made.
    pub messages: u64,
    /// Fragments that were made.
    pub fragments: u64,
    /// Parts of datagrams that are on their way.
    pieces: VecDeque<Packet>,
    /// How many datagrams were cut.
    cut: u64,
}

/// What a client sent, and what its backend saw of it.
#[derive(Clone, Debug)]
struct Exchange {
    hook: Hook,
    interface: u32,
    sent: Frame,
    /// None until it was translated.
    seen: Option<Frame>,
}

/// A family's addresses by the role they have.
#[derive(Clone, Copy, Debug)]
enum Role {
    Pod,
    Outside,
    Service,
    External,
    Node,
    Strange,
}

/// Settings of one run: what a node may be told, in all combinations, and few source ports to run out of.
#[must_use]
pub fn setup(rng: &mut Rng) -> Setup {
    let plain = Setup::default();
    let mut bits = 0;
    for bit in [REJECT_UNDEFINED_PORT, DROP_UNALLOCATED] {
        bits |= if rng.u8(..4) > 0 { bit } else { 0 };
    }
    for bit in [
        REJECT_NO_LOCAL,
        SNAT_ALWAYS,
        MASQUERADE_ALL,
        EXTERNAL_IPS_OUTSIDE,
    ] {
        bits |= if rng.u8(..3) == 0 { bit } else { 0 };
    }
    let mut config = Config {
        bits,
        seed: rng.u64(..),
        maglev_seed: rng.u64(..),
        snat_first: 61_000,
        snat_last: 61_000 + rng.u16(..5),
        ..plain.config
    };
    if rng.u8(..8) > 0 {
        config.bits |= RESET_VANISHED;
    }
    if rng.bool() {
        // All clients outside but one, or one alone, in the last place.
        let mask: u32 = rng.choice([!0, !1]).expect("a mask");
        let outside = |family| address(family, Role::Outside, 0);
        if let (IpAddr::V4(v4), IpAddr::V6(v6)) = (outside(Family::V4), outside(Family::V6)) {
            let at = rng.usize(..config.pod_nets4.len());
            config.pod_nets4[at] = v4.into();
            config.pod_masks4[at] = Ipv4Addr::from(mask).into();
            config.pod_nets6[at] = v6.into();
            config.pod_masks6[at] = Ipv6Addr::from(!0 << 32 | u128::from(mask)).into();
        }
    }
    if rng.u8(..3) == 0 {
        config.service_mask4 = Addr4(0);
        config.service_mask6 = Addr6([0; 4]);
    }
    Setup { config, ..plain }
}

/// The node's addresses that serve NodePorts.
#[must_use]
pub fn node_addresses() -> Vec<IpAddr> {
    [Family::V4, Family::V6]
        .into_iter()
        .flat_map(|family| (0..2).map(move |n| address(family, Role::Node, n)))
        .collect()
}

/// Most of the pods that services may have.
#[must_use]
pub fn pods(rng: &mut Rng) -> BTreeSet<IpAddr> {
    let all = [Family::V4, Family::V6]
        .into_iter()
        .flat_map(|family| (0..8).map(move |n| address(family, Role::Pod, n)));
    all.filter(|_| rng.u8(..8) > 0).collect()
}

/// The port of one service, or none: then the service is gone.
#[must_use]
pub fn service(rng: &mut Rng, number: usize) -> Option<DesiredPort> {
    if rng.u8(..8) == 0 {
        return None;
    }
    let n = u8::try_from(number).expect("few services");
    let (family, protocol) = kind_of(n);
    let mut described = port(&format!("s{n}"), protocol, family);
    // Frontends are each service's own, or the planner would refuse one of two; addresses are shared.
    let service_port = 80 + u16::from(n);
    let at = |role, host| SocketAddr::new(address(family, role, host), service_port);
    if rng.u8(..8) > 0 {
        described = described.cluster_ip(at(Role::Service, n % 4));
    }
    if rng.bool() {
        described = described.node_port(30_080 + u16::from(n));
    }
    if rng.bool() {
        described = described.frontend(FrontendKind::LoadBalancer, at(Role::External, n % 3));
    }
    if rng.bool() {
        // An address of the node, or of a pod that serves, too.
        let role = [Role::External, Role::External, Role::Node, Role::Pod];
        let role = rng.choice(role).expect("a role");
        let host = if matches!(role, Role::External) {
            3 + n % 3
        } else {
            n % 2
        };
        described = described.frontend(FrontendKind::ExternalIp, at(role, host));
    }
    described.internal_local = rng.u8(..4) == 0;
    described.external_local = rng.u8(..3) == 0;
    described.affinity_seconds = (rng.u8(..3) == 0).then_some(10);
    if rng.u8(..3) == 0 {
        // The seed of the table is no part of what the programs know.
        described.selection = Selection::Maglev { seed: 7, slots: 13 };
    }
    described.source_ranges = (rng.u8(..3) == 0).then(|| ranges(rng, family));
    let all_at_once = rng.u8(..6) == 0;
    for host in 0..8 {
        if all_at_once || rng.u8(..3) > 0 {
            continue;
        }
        let at = SocketAddr::new(address(family, Role::Pod, host), 8_080 + rng.u16(..2));
        let serving = rng.u8(..8) > 0;
        let local = rng.u8(..3) == 0;
        described.backends.push(Backend {
            address: at,
            in_cluster: serving && rng.u8(..8) > 0,
            in_local: serving && local,
            serving,
            local,
            weight: rng.u16(1..4),
        });
    }
    described.has_any = !described.backends.is_empty() || rng.u8(..4) == 0;
    Some(described)
}

/// Ranges that hold some of the clients: all outside, few of them, single ones, or everyone.
fn ranges(rng: &mut Rng, family: Family) -> Vec<IpNet> {
    let longest = if family == Family::V4 { 32 } else { 128 };
    let range = |rng: &mut Rng| {
        let role = if rng.bool() { Role::Outside } else { Role::Pod };
        let wider = rng.choice([0, 0, 1, 2, 8, longest]).expect("a width");
        let client = address(family, role, rng.u8(..4));
        let net = IpNet::new(client, longest - wider).expect("not too long");
        net.trunc()
    };
    (0..rng.u8(..4)).map(|_| range(rng)).collect()
}

/// A service's family and protocol, which it keeps.
const fn kind_of(service: u8) -> (Family, Protocol) {
    let family = if service % 3 == 2 {
        Family::V6
    } else {
        Family::V4
    };
    let protocol = if service >= 7 && service < 9 {
        Protocol::Sctp
    } else if service.is_multiple_of(2) {
        Protocol::Tcp
    } else {
        Protocol::Udp
    };
    (family, protocol)
}

fn address(family: Family, role: Role, n: u8) -> IpAddr {
    let behind_bridge = || {
        let known = NEIGHBOURS.into_iter().map(|(address, _)| address);
        known
            .chain(UNKNOWN_NEIGHBOURS)
            .filter(move |address| Family::of(*address) == family)
    };
    if let (Role::Pod, 5..8) = (role, n) {
        return behind_bridge()
            .nth(usize::from(n - 5))
            .expect("three of each family");
    }
    let (third, low) = match role {
        Role::Pod => (1, 10 + n),
        Role::Outside => (2, 20 + n),
        Role::Service => (3, 30 + n),
        Role::External => (4, 40 + n),
        Role::Node => (5, 50 + n),
        Role::Strange => (6, 60 + n),
    };
    let (service, net) = (matches!(role, Role::Service), u16::from(third));
    match family {
        Family::V4 if service => Ipv4Addr::new(10, 96, 0, low).into(),
        Family::V4 => Ipv4Addr::new(172, 16, third, low).into(),
        Family::V6 if service => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, low.into()).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, low.into()).into(),
    }
}

/// Sources that stand for no single host.
fn nobody(rng: &mut Rng, family: Family) -> IpAddr {
    match family {
        Family::V4 => rng
            .choice([
                Ipv4Addr::UNSPECIFIED,
                Ipv4Addr::LOCALHOST,
                Ipv4Addr::BROADCAST,
                Ipv4Addr::new(224, 0, 0, 5),
                Ipv4Addr::new(240, 0, 0, 5),
            ])
            .map(IpAddr::from),
        Family::V6 => rng
            .choice([
                Ipv6Addr::UNSPECIFIED,
                Ipv6Addr::LOCALHOST,
                Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
            ])
            .map(IpAddr::from),
    }
    .expect("there are some")
}

impl Traffic {
    /// Nobody has sent anything yet.
    #[must_use]
    pub const fn new(network: Network) -> Self {
        Self {
            network,
            exchanges: Vec::new(),
            messages: 0,
            fragments: 0,
            pieces: VecDeque::new(),
            cut: 0,
        }
    }

    /// The next packet.
    pub fn next(&mut self, rng: &mut Rng) -> Packet {
        if rng.u8(..3) > 0
            && let Some(piece) = self.pieces.pop_front()
        {
            return piece;
        }
        let mut packet = match rng.u8(..100) {
            0..12 if !self.exchanges.is_empty() => self.complain(rng),
            12..54 if !self.exchanges.is_empty() => self.go_on(rng),
            0..82 => self.begin(rng),
            82..91 => self.leave(rng),
            _ => self.direct(rng),
        };
        if rng.u8(..12) == 0 {
            decorate(rng, &mut packet);
        }
        if rng.u8(..8) == 0 && self.cut(rng, &packet) {
            return self.pieces.pop_front().expect("two at least");
        }
        if rng.u8(..25) == 0 {
            damage(rng, &mut packet);
        }
        packet
    }

    /// Cuts a packet, and has its parts follow, in order or not; false where it cannot be.
    fn cut(&mut self, rng: &mut Rng, packet: &Packet) -> bool {
        // What is longer no test run takes.
        let whole = packet.frame.as_ref().filter(|frame| {
            frame.part.is_none() && !matches!(frame.transport, Transport::Other(_))
        });
        let Some(frame) = whole.filter(|_| packet.bytes.len() < 1_600) else {
            return false;
        };
        let mut frame = frame.clone();
        let more = rng.choice([0, 7, 40, 40, 1_400, 1_400]);
        let longer = frame.payload.len() + more.expect("a length");
        frame.payload.resize(longer, 0x5a);
        let body = frame.payload.len() + 8;
        // Headers of TCP end in the second or third part then.
        let first = rng.choice([8, 8, 16, 24, 24, 48, 1_240, 1_400]);
        let mut cuts = vec![first.expect("a cut")];
        for _ in 0..rng.u8(..4) {
            let step = rng.choice([8, 8, 64, 1_400]).expect("a step");
            cuts.extend(cuts.last().map(|cut| cut + step));
        }
        cuts.retain(|cut| *cut < body);
        if cuts.is_empty() {
            return false;
        }
        // Few, so that they are used again.
        let id = 1 + rng.u32(..3);
        let mut pieces = frame.pieces(id, &cuts);
        let parts = pieces.len();
        let mut complete = true;
        if rng.u8(..8) == 0 {
            // One that overlaps all others, or is a first one again.
            let part = Part {
                offset: rng.u16(..4),
                more: rng.bool(),
                id,
            };
            let payload = payload(rng);
            let part = Some(part);
            let overlapping = Frame {
                part,
                payload,
                ..frame
            };
            pieces.push(overlapping.to_bytes());
            complete = false;
        }
        match rng.u8(..8) {
            0 => rng.shuffle(&mut pieces),
            1 => pieces.reverse(),
            2 => {
                let lost = rng.usize(..pieces.len());
                pieces.remove(lost);
                complete = false;
            }
            _ => {}
        }
        self.cut += 1;
        self.fragments += pieces.len() as u64;
        // One part may close the gap that another has left: that is no datagram.
        let piece = complete.then_some((self.cut, parts));
        self.pieces.extend(pieces.into_iter().map(|bytes| Packet {
            bytes,
            frame: None,
            piece,
            ..packet.clone()
        }));
        !self.pieces.is_empty()
    }

    /// What became of a packet.
    pub fn came_of(
        &mut self,
        rng: &mut Rng,
        packet: &Packet,
        verdict: Verdict,
        bytes: Option<&[u8]>,
    ) {
        let (Some(sent), Some(bytes)) = (&packet.frame, bytes) else {
            return;
        };
        if packet.hook == Hook::TcEgress || verdict == Verdict::Dropped {
            return;
        }
        let Some(seen) = Frame::parse(bytes) else {
            return;
        };
        let seen =
            (seen.source != sent.source || seen.destination != sent.destination).then_some(seen);
        let exchange = Exchange {
            hook: packet.hook,
            interface: packet.interface,
            sent: sent.clone(),
            seen,
        };
        let same = |other: &&mut Exchange| {
            (other.sent.source, other.sent.destination) == (sent.source, sent.destination)
        };
        if let Some(known) = self.exchanges.iter_mut().find(same) {
            *known = exchange;
        } else if self.exchanges.len() < EXCHANGES {
            self.exchanges.push(exchange);
        } else {
            let place = rng.usize(..EXCHANGES);
            self.exchanges[place] = exchange;
        }
    }

    /// A client's packet to a frontend, or near one.
    fn begin(&self, rng: &mut Rng) -> Packet {
        let n = rng.u8(..u8::try_from(SERVICES).expect("few services"));
        let (family, protocol) = if rng.u8(..8) > 0 {
            kind_of(n)
        } else {
            (family(rng), protocol(rng))
        };
        let role = rng.choice([
            Role::Service,
            Role::Service,
            Role::External,
            Role::External,
            Role::Node,
            Role::Node,
            Role::Pod,
            Role::Strange,
        ]);
        let role = role.expect("there are roles");
        let (host, mut port) = match role {
            Role::Service => (n % 4, 80 + u16::from(n)),
            Role::External => (n % 3 + 3 * rng.u8(..2), 80 + u16::from(n)),
            Role::Node if rng.u8(..4) == 0 => (n % 2, 80 + u16::from(n)),
            Role::Node => (rng.u8(..2), 30_080 + u16::from(n)),
            Role::Pod => (n % 2, 80 + u16::from(n)),
            Role::Outside | Role::Strange => (rng.u8(..40), 80),
        };
        let host = if rng.u8(..20) == 0 { rng.u8(..8) } else { host };
        if rng.u8(..8) == 0 {
            port = rng.choice([22, 80, 81, 30_085, 61_001]).expect("a port");
        }
        let destination = SocketAddr::new(address(family, role, host), port);
        let source = Self::client(rng, family);
        self.send(rng, source, destination, protocol)
    }

    /// A client's packet straight to a pod.
    fn direct(&self, rng: &mut Rng) -> Packet {
        let family = family(rng);
        let host = address(family, Role::Pod, rng.u8(..8));
        let destination = SocketAddr::new(host, 8_080 + rng.u16(..2));
        let source = match rng.u8(..3) {
            // As a client of a service has it.
            0 => self
                .exchanges
                .get(rng.usize(..EXCHANGES))
                .and_then(|exchange| exchange.seen.as_ref())
                .filter(|seen| seen.family() == family)
                .map_or_else(|| Self::client(rng, family), |seen| seen.source),
            _ => Self::client(rng, family),
        };
        let protocol = protocol(rng);
        self.send(rng, source, destination, protocol)
    }

    fn client(rng: &mut Rng, family: Family) -> SocketAddr {
        let ip = match rng.u8(..16) {
            0..9 => address(family, Role::Pod, rng.u8(..8)),
            9..15 => address(family, Role::Outside, rng.u8(..4)),
            _ => nobody(rng, family),
        };
        let ports = [40_000, 40_000, 40_000, 40_000, 40_001, 8_080, 61_000];
        SocketAddr::new(ip, rng.choice(ports).expect("a port"))
    }

    fn send(
        &self,
        rng: &mut Rng,
        source: SocketAddr,
        destination: SocketAddr,
        protocol: Protocol,
    ) -> Packet {
        let transport = match protocol {
            _ if rng.u8(..40) == 0 => Transport::Other(rng.choice([1, 58, 132, 47]).expect("one")),
            Protocol::Tcp => Transport::Tcp {
                flags: if rng.bool() {
                    flags::SYN
                } else {
                    tcp_flags(rng)
                },
            },
            Protocol::Sctp => Transport::Sctp {
                flags: if rng.bool() {
                    flags::SYN
                } else {
                    tcp_flags(rng)
                },
            },
            Protocol::Udp => Transport::Udp {
                checksum: rng.u8(..8) > 0,
            },
        };
        let mut frame = Frame::new(source, destination, transport);
        frame.payload = payload(rng);
        let (hook, interface) = self.entrance(rng, source.ip());
        Packet {
            hook,
            interface,
            bytes: frame.to_bytes(),
            frame: Some(frame),
            piece: None,
        }
    }

    /// Where packets of that source come in.
    fn entrance(&self, rng: &mut Rng, source: IpAddr) -> (Hook, u32) {
        let Network {
            uplink,
            xdp_uplink,
            pod,
            other_pod,
            bridged_pod,
            stranger,
            bridge: _,
        } = self.network;
        let last = *super::frame::octets(source).last().expect("an address");
        let usual = match last {
            10..14 => (Hook::TcIngress, pod),
            14 => (Hook::TcIngress, other_pod),
            129.. => (Hook::TcIngress, bridged_pod),
            20 => (Hook::XdpIngress, xdp_uplink),
            21 => (Hook::TcIngress, xdp_uplink),
            _ => (Hook::TcIngress, uplink),
        };
        if rng.u8(..12) > 0 {
            return usual;
        }
        let hook = if rng.bool() {
            Hook::TcIngress
        } else {
            Hook::XdpIngress
        };
        let interface = rng.choice([uplink, xdp_uplink, pod, other_pod, bridged_pod, stranger]);
        (hook, interface.expect("an interface"))
    }

    /// A packet of an exchange: the client's next, or an answer to what its backend saw.
    fn go_on(&self, rng: &mut Rng) -> Packet {
        let exchange = rng.choice(&self.exchanges).expect("there are some");
        let Exchange {
            hook,
            interface,
            sent,
            seen,
        } = exchange;
        let flags = tcp_flags(rng);
        let (hook, interface, frame) = match seen {
            Some(seen) if rng.bool() => {
                let mut answer = seen.answer(match rng.u8(..4) {
                    0 => flags,
                    _ => flags::SYN | flags::ACK,
                });
                answer.hops = hops(rng);
                miscount(rng, &mut answer);
                let (hook, interface) = self.back(rng, exchange, seen);
                (hook, interface, answer)
            }
            _ => {
                let mut again = match sent.transport {
                    Transport::Tcp { .. } | Transport::Sctp { .. } => sent.with_flags(flags),
                    Transport::Udp { .. } | Transport::Other(_) => sent.clone(),
                };
                again.hops = hops(rng);
                miscount(rng, &mut again);
                again.payload = payload(rng);
                (*hook, *interface, again)
            }
        };
        Packet {
            hook,
            interface,
            bytes: frame.to_bytes(),
            frame: Some(frame),
            piece: None,
        }
    }

    /// Where what comes back from an exchange's backend is met.
    fn back(&self, rng: &mut Rng, exchange: &Exchange, seen: &Frame) -> (Hook, u32) {
        let sent = &exchange.sent;
        let hairpin = seen.source.ip() == sent.destination.ip();
        if hairpin {
            return (exchange.hook, exchange.interface);
        }
        let Network {
            uplink,
            xdp_uplink,
            pod,
            ..
        } = self.network;
        if seen.source.ip() != sent.source.ip() {
            let comes = [
                (Hook::XdpIngress, xdp_uplink),
                (Hook::TcIngress, uplink),
                (Hook::TcIngress, pod),
            ];
            return rng.choice(comes).expect("an edge");
        }
        let leaves = [uplink, pod, exchange.interface];
        (Hook::TcEgress, rng.choice(leaves).expect("an interface"))
    }

    /// An ICMP message about a packet of an exchange: about what the backend saw, or about what came back to the client.
    fn complain(&mut self, rng: &mut Rng) -> Packet {
        self.messages += 1;
        let drawn = (0..4).map(|_| rng.choice(&self.exchanges).expect("there are some"));
        // Mostly about a flow.
        let drawn: Vec<_> = drawn.collect();
        let exchange = drawn.iter().find(|exchange| exchange.seen.is_some());
        let exchange = exchange.unwrap_or(&drawn[0]);
        let sent = &exchange.sent;
        let (about, (hook, interface)) = match &exchange.seen {
            Some(seen) if rng.bool() => {
                let mut seen = seen.clone();
                seen.padding = 0;
                let back = self.back(rng, exchange, &seen);
                (seen, back)
            }
            _ => {
                let answer = sent.answer(tcp_flags(rng));
                (answer, (exchange.hook, exchange.interface))
            }
        };
        let family = about.family();
        // XDP leaves them to tc.
        let hook = if hook == Hook::XdpIngress && rng.u8(..4) > 0 {
            Hook::TcIngress
        } else {
            hook
        };
        let kinds = match family {
            Family::V4 => [3, 3, 3, 3, 11, 12, 4, 5, 0, 8],
            Family::V6 => [1, 1, 2, 2, 3, 4, 2, 137, 128, 129],
        };
        let kind = [rng.choice(kinds).expect("a type"), rng.u8(..5)];
        let from = match rng.u8(..4) {
            // Who the packet was for, or a router on its way.
            0 | 1 => about.destination.ip(),
            2 => address(family, Role::Strange, rng.u8(..8)),
            _ => address(family, Role::Pod, rng.u8(..8)),
        };
        let quoted = rng.choice([8, 8, 12, 20, 28, 1_000, 7]).expect("a length");
        let mut about = about;
        if rng.u8(..6) == 0 {
            match family {
                Family::V4 => about.options = vec![1; 4 * rng.usize(1..11)],
                Family::V6 => about.extensions = extensions(rng),
            }
        }
        if rng.u8(..12) == 0 {
            about.part = Some(Part {
                offset: rng.choice([0, 0, 185]).expect("an offset"),
                more: rng.bool(),
                id: 1 + rng.u32(..3),
            });
        }
        let mut message = Icmp::about(&about, kind, from, quoted);
        message.data = rng.u32(..).to_be_bytes();
        message.hops = hops(rng);
        if rng.u8(..24) == 0 {
            message.destination = address(family, Role::Node, rng.u8(..2));
        }
        if rng.u8(..8) == 0 && !message.body.is_empty() {
            let at = rng.usize(..message.body.len());
            message.body[at] ^= 1 << rng.u8(..8);
        }
        let mut bytes = message.to_bytes();
        if rng.u8(..12) == 0 {
            // What is behind the packet is not its.
            bytes.resize(bytes.len() + rng.usize(1..20), 0x55);
        }
        Packet {
            hook,
            interface,
            bytes,
            frame: None,
            piece: None,
        }
    }

    /// A packet on its way out that answers nothing we know of.
    fn leave(&self, rng: &mut Rng) -> Packet {
        let family = family(rng);
        let source = SocketAddr::new(
            address(family, Role::Pod, rng.u8(..8)),
            8_080 + rng.u16(..2),
        );
        let role = rng.choice([
            Role::Service,
            Role::Service,
            Role::External,
            Role::Outside,
            Role::Pod,
        ]);
        let to = address(family, role.expect("a role"), rng.u8(..8));
        let port = rng.choice([80, 82, 40_000, 61_000]).expect("a port");
        let protocol = protocol(rng);
        let mut packet = self.send(rng, source, SocketAddr::new(to, port), protocol);
        packet.hook = Hook::TcEgress;
        if rng.bool() {
            packet.interface = self.network.uplink;
        }
        packet
    }
}

fn family(rng: &mut Rng) -> Family {
    if rng.u8(..3) == 0 {
        Family::V6
    } else {
        Family::V4
    }
}

fn protocol(rng: &mut Rng) -> Protocol {
    let all = [
        Protocol::Tcp,
        Protocol::Tcp,
        Protocol::Udp,
        Protocol::Udp,
        Protocol::Sctp,
    ];
    rng.choice(all).expect("a protocol")
}

fn hops(rng: &mut Rng) -> u8 {
    rng.choice([0, 1, 2, 63, 64, 255, 63, 64])
        .expect("a number")
}

/// Now and then another of TCP's numbers, often at the edge of what proves that a client hears.
fn miscount(rng: &mut Rng, frame: &mut Frame) {
    if !matches!(frame.transport, Transport::Tcp { .. }) || rng.u8(..3) > 0 {
        return;
    }
    let (near, far) = (0xffff_u32, 0x1_0000_u32);
    let steps = [1, near, far, far.wrapping_neg(), !far, rng.u32(..)];
    let which = rng.usize(..2);
    frame.numbers[which] = frame.numbers[which].wrapping_add(rng.choice(steps).expect("a step"));
}

fn payload(rng: &mut Rng) -> Vec<u8> {
    let usual = [0, 1, 2, 3, 8, 33, 90];
    // Now and then more than the smallest MTU.
    let length = if rng.u8(..8) == 0 {
        1_300
    } else {
        rng.choice(usual).expect("a length")
    };
    std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
}

fn tcp_flags(rng: &mut Rng) -> u8 {
    const USUAL: [u8; 12] = [
        flags::SYN,
        flags::SYN,
        flags::SYN,
        flags::ACK,
        flags::ACK,
        flags::ACK | flags::PSH,
        flags::SYN | flags::ACK,
        flags::FIN | flags::ACK,
        flags::FIN | flags::ACK,
        flags::FIN,
        flags::RST,
        flags::SYN | flags::PSH,
    ];
    match rng.u8(..20) {
        0 => rng.u8(..),
        _ => rng.choice(USUAL).expect("flags"),
    }
}

/// Adds what may stand around the ports.
fn decorate(rng: &mut Rng, packet: &mut Packet) {
    let Some(frame) = &mut packet.frame else {
        return;
    };
    match rng.u8(..7) {
        0 => {
            frame.tags = (0..rng.u8(1..4))
                .map(|_| (if rng.bool() { VLAN } else { QINQ }, rng.u16(..)))
                .collect();
        }
        1 | 2 => match frame.family() {
            Family::V4 => frame.options = vec![1; 4 * rng.usize(1..11)],
            Family::V6 => frame.extensions = extensions(rng),
        },
        3 => {
            frame.part = Some(Part {
                offset: rng.choice([0, 0, 1, 185]).expect("an offset"),
                more: rng.bool(),
                id: 1 + rng.u32(..3),
            });
        }
        4 => {
            frame.macs[0] = rng
                .choice([[0xff; 6], [1, 0, 0x5e, 0, 0, 1]])
                .expect("a group");
        }
        5 => frame.padding = rng.usize(1..20),
        _ => frame.hops = hops(rng),
    }
    packet.bytes = frame.to_bytes();
}

fn extensions(rng: &mut Rng) -> Vec<(u8, Vec<u8>)> {
    let long = rng.u8(..8) == 0;
    (0..rng.u8(1..8))
        .map(|_| {
            let kinds = [
                next::HOP_BY_HOP,
                next::ROUTING,
                next::DESTINATION,
                next::AUTHENTICATION,
            ];
            let kind = rng.choice(kinds).expect("a kind");
            // Chains end well before or well behind the last byte that is read.
            let units = if long { 32 } else { rng.usize(..4) };
            (kind, vec![0; 6 + 8 * units])
        })
        .collect()
}

/// Damages a packet: cut off, overwritten, or noise.
fn damage(rng: &mut Rng, packet: &mut Packet) {
    packet.frame = None;
    let length = packet.bytes.len();
    match rng.u8(..8) {
        0..3 => packet.bytes.truncate(rng.usize(14..=length)),
        3..7 => {
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(..length.min(80));
                packet.bytes[at] = rng.u8(..);
            }
        }
        _ => rng.fill(&mut packet.bytes[12..]),
    }
    // The kernel does not test-run skbs that end within their IP header, unless a tag hides it.
    let header = match word(&packet.bytes, 12) {
        Some(0x0800) => 20,
        Some(0x86dd) => 40,
        _ => 0,
    };
    if packet.bytes.len() < ETHERNET + header {
        packet.hook = Hook::XdpIngress;
    }
}
