//! The dataplane in plain Rust: what a packet must see, written from the rules and not from the programs.
//!
//! A flow is one `Connection` here, found by what its client sends and by what its backend answers; the programs keep
//! two map entries that must always say the same. Headers are read and changed in a byte slice; checksums are kept right
//! by arithmetic modulo 65,535, so that a frame that came with a wrong one leaves with one as wrong.
//!
//! Shared with the programs are only the records of the tables and the hashes that select: what they are for is that both
//! sides agree. Evictions and clocks are left out; who uses this keeps the maps large, and says when pins have aged and
//! how many packets may still be generated.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use svc_lb::dataplane::{
    BackendRecord, FrontendAt, FrontendValue, GuardBit, Snapshot, SourceRange,
};
use svc_lb_common::backend::{GONE, IN_CLUSTER, IN_LOCAL, LOCAL, SERVING};
use svc_lb_common::config::{
    Config, DROP_UNALLOCATED, EXTERNAL_IPS_OUTSIDE, MASQUERADE_ALL, REJECT_NO_LOCAL,
    REJECT_UNDEFINED_PORT, RESET_VANISHED, SNAT_ALWAYS,
};
use svc_lb_common::edge::{self, Edge};
use svc_lb_common::guard::{self, BACKEND, FRONTEND, NODE};
use svc_lb_common::hash::{M1, flow_hash, mix, scale};
use svc_lb_common::link::{self, Link};
use svc_lb_common::outcome::{Event, Fate, Hook, Outcome};
use svc_lb_common::service::{Range, Service, flag, kind};
use svc_lb_common::{Addr4, Addr6, Be16, Family, Protocol};

use super::frame::{
    ETHERNET, QINQ, VLAN, crc32c, flags, next, octets, pseudo_sum, sctp_flags, word,
};
use super::network::{BRIDGE_SOURCES, Hop, MTU, NEIGHBOURS, Out, hop};
use super::rig::Verdict;
use crate::lab::netlink::Mac;

/// What becomes of a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Answer {
    /// The verdict.
    pub verdict: Verdict,
    /// The frame as it comes out; none where it is dropped.
    pub bytes: Option<Vec<u8>>,
    /// The outcome, not counted if it is "not ours".
    pub outcome: Outcome,
    /// What else is counted.
    pub events: Vec<Event>,
}

/// Offset in a frame beyond which nothing is read.
const REACH: usize = 1_024;
/// IPv6 headers that are looked at, the transport's included.
const CHAIN: usize = 6;
/// How far from what the backend said an acknowledgement may lie, before or behind.
const PROOF: i32 = 65_536;
/// Source ports that are tried for a flow.
const PORT_TRIES: u64 = 128;
/// Ethernet's shortest frame, which XDP sends no shorter one than.
const SHORTEST: usize = 60;
/// At most so much of a packet is quoted in an ICMP error.
const QUOTE: usize = 128;

/// The dataplane.
#[derive(Debug)]
pub struct Reference {
    config: Config,
    edges: BTreeMap<u32, Edge>,
    links: BTreeMap<u32, Link>,
    tables: Tables,
    flows: Flows,
    pins: HashMap<(IpAddr, u32), Pin>,
    direct: BTreeSet<u32>,
    /// Pods of this node that are gone.
    pub vanished: BTreeSet<IpAddr>,
    /// What first fragments said, for those that follow.
    datagrams: HashMap<Datagram, First>,
    /// Packets that may still be sent.
    pub tokens: u32,
}

/// What the agent has programmed.
#[derive(Debug, Default)]
struct Tables {
    frontends: HashMap<FrontendAt, FrontendValue>,
    services: HashMap<u32, Service>,
    slots: Vec<u32>,
    backends: HashMap<(Family, u32), BackendRecord>,
    hints: Vec<u64>,
    ports: Vec<u64>,
    source_ranges: Vec<SourceRange>,
}

/// A client's choice that holds.
#[derive(Clone, Copy, Debug)]
struct Pin {
    backend: u32,
    generation: u16,
    expired: bool,
}

/// What the fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Datagram {
    way: Way,
    source: IpAddr,
    destination: IpAddr,
    id: u32,
    /// Of IPv4 alone.
    protocol: Option<u8>,
}

/// The rest of a fragmented datagram's tuple.
#[derive(Clone, Copy, Debug)]
struct First {
    protocol: u8,
    ports: [u16; 2],
}

/// All flows, by what matches them.
#[derive(Debug, Default)]
struct Flows {
    connections: HashMap<u64, Connection>,
    by_tuple: HashMap<Tuple, (u64, Side)>,
    made: u64,
}

/// Where a packet is met.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Way {
    /// On its way in at an edge.
    In,
    /// On its way out.
    Out,
}

/// Whose packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Side {
    Client,
    Backend,
}

/// What an entry matches.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Tuple {
    /// Where the packet is met.
    pub way: Way,
    /// IANA protocol number.
    pub protocol: u8,
    /// The packet's source.
    pub source: SocketAddr,
    /// Its destination.
    pub destination: SocketAddr,
}

#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts about a flow"
)]
struct Connection {
    protocol: u8,
    client: SocketAddr,
    /// What the client sends to.
    asked: SocketAddr,
    /// Who the backend sees.
    seen: SocketAddr,
    backend: SocketAddr,
    /// Id, generation and service; none of a direct connection.
    member: Option<(u32, u16, u32)>,
    hairpin: bool,
    /// The backend sees this node as the client.
    snat: bool,
    bridged: bool,
    affine: bool,
    /// Began with a SYN.
    syn: bool,
    established: bool,
    answered: bool,
    fin: [bool; 2],
    reset: bool,
    /// What the backend's latest segment must be acknowledged with, while the flow opens.
    heard: u32,
    /// Opened so long ago that a datagram proves something.
    aged: bool,
    /// Whose packets no longer find the flow, because their entry was evicted.
    evicted: Option<Side>,
    /// No packet for so long that the next one refreshes the flow.
    stale: bool,
}

impl Connection {
    const fn is_closed(&self) -> bool {
        self.reset || (self.fin[0] && self.fin[1])
    }

    const fn client_tuple(&self) -> Tuple {
        Tuple {
            way: Way::In,
            protocol: self.protocol,
            source: self.client,
            destination: self.asked,
        }
    }

    const fn backend_tuple(&self) -> Tuple {
        Tuple {
            way: if self.hairpin || self.snat {
                Way::In
            } else {
                Way::Out
            },
            protocol: self.protocol,
            source: self.backend,
            destination: self.seen,
        }
    }

    const fn tuple(&self, side: Side) -> Tuple {
        match side {
            Side::Client => self.client_tuple(),
            Side::Backend => self.backend_tuple(),
        }
    }

    /// Source and destination of a side's packets after translation.
    const fn translation(&self, side: Side) -> [SocketAddr; 2] {
        match side {
            Side::Client => [self.seen, self.backend],
            Side::Backend => [self.asked, self.client],
        }
    }
}

impl Flows {
    fn find(&self, tuple: &Tuple) -> Option<(u64, Side)> {
        self.by_tuple.get(tuple).copied()
    }

    fn insert(&mut self, connection: Connection) -> u64 {
        self.made += 1;
        let id = self.made;
        self.by_tuple
            .insert(connection.backend_tuple(), (id, Side::Backend));
        self.by_tuple
            .insert(connection.client_tuple(), (id, Side::Client));
        self.connections.insert(id, connection);
        id
    }

    fn remove(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        for side in [Side::Client, Side::Backend] {
            let tuple = connection.tuple(side);
            if self.find(&tuple) == Some((id, side)) {
                self.by_tuple.remove(&tuple);
            }
        }
    }

    /// Gives a flow the entry back that it lost, unless another flow has the tuple now.
    fn mend(&mut self, id: u64) -> bool {
        let connection = self.connections.get_mut(&id).expect("it was found");
        let Some(side) = connection.evicted else {
            return false;
        };
        let tuple = connection.tuple(side);
        if self.by_tuple.contains_key(&tuple) {
            return false;
        }
        connection.evicted = None;
        self.by_tuple.insert(tuple, (id, side));
        true
    }
}

/// A packet as it was read.
#[derive(Clone, Copy, Debug)]
struct Read {
    l3: usize,
    /// What the network header says.
    length: u16,
    l4: usize,
    tuple: Tuple,
    flags: u8,
    /// TCP's numbers.
    /// SCTP: the initiate tag of an INIT or INIT ACK, if it is there.
    sequence: Option<u32>,
    /// SCTP: the verification tag.
    acknowledges: u32,
    piece: Option<Piece>,
}

impl Read {
    const fn is_sctp(&self) -> bool {
        self.tuple.protocol == next::SCTP
    }

    const fn is_udp(&self) -> bool {
        self.tuple.protocol == next::UDP
    }

    const fn opens(&self) -> bool {
        opens(self.flags)
    }

    /// A fragment without a transport header.
    fn is_later(&self) -> bool {
        self.piece.is_some_and(|piece| !piece.first)
    }

    fn datagram(&self, piece: Piece) -> Datagram {
        let source = self.tuple.source.ip();
        Datagram {
            way: self.tuple.way,
            source,
            destination: self.tuple.destination.ip(),
            id: piece.id,
            protocol: source.is_ipv4().then_some(piece.protocol),
        }
    }
}

const fn opens(tcp: u8) -> bool {
    tcp & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN
}

/// What ends a packet's way before anything is translated.
type Step<T> = Result<T, Outcome>;

/// How a packet goes on.
enum Exit {
    /// Translated along a flow.
    Along(u64, Side, Outcome),
    /// Not at all, and its sender is told why.
    Tell(Told),
    /// Not at all, and its sender's connection is reset.
    Reset,
}

/// What a sender is told by an ICMP error.
#[derive(Clone, Copy)]
enum Told {
    Rejected,
    TimeExceeded,
    /// Too big for this MTU.
    TooBig(u16),
}

/// The frame and where it is met.
#[derive(Clone, Copy)]
struct At<'a> {
    hook: Hook,
    interface: u32,
    frame: &'a [u8],
}

/// The network header's addresses.
#[derive(Clone, Copy)]
struct Ip {
    l3: usize,
    source: IpAddr,
    destination: IpAddr,
}

/// What follows the network header.
struct Payload {
    l4: usize,
    protocol: u8,
    /// None of what is whole.
    piece: Option<Piece>,
}

/// Part of a fragmented datagram.
#[derive(Clone, Copy, Debug)]
struct Piece {
    first: bool,
    /// The identification as it lies in the packet.
    id: u32,
    /// What the header in front of it says is next.
    protocol: u8,
}

impl Reference {
    /// A dataplane without services and flows.
    #[must_use]
    pub fn new(
        config: Config,
        edges: impl IntoIterator<Item = (u32, Edge)>,
        links: impl IntoIterator<Item = (u32, Link)>,
    ) -> Self {
        Self {
            config,
            edges: edges.into_iter().collect(),
            links: links.into_iter().collect(),
            tables: Tables::default(),
            flows: Flows::default(),
            pins: HashMap::new(),
            direct: BTreeSet::new(),
            vanished: BTreeSet::new(),
            datagrams: HashMap::new(),
            tokens: config.generate_burst,
        }
    }

    /// Takes the tables as they are programmed now.
    pub fn set_tables(&mut self, snapshot: &Snapshot) {
        let backends = [
            (Family::V4, &snapshot.backends.v4),
            (Family::V6, &snapshot.backends.v6),
        ];
        self.tables = Tables {
            frontends: snapshot.frontends.iter().copied().collect(),
            services: snapshot.services.iter().copied().collect(),
            slots: snapshot.slots.clone(),
            backends: backends
                .into_iter()
                .flat_map(|(family, records)| {
                    records
                        .iter()
                        .map(move |(id, record)| ((family, *id), *record))
                })
                .collect(),
            hints: snapshot.guard.clone(),
            ports: snapshot.guard_port.clone(),
            source_ranges: snapshot.source_ranges.clone(),
        };
    }

    /// Every pin is older than any timeout.
    pub fn age_pins(&mut self) {
        self.pins.values_mut().for_each(|pin| pin.expired = true);
    }

    /// Every UDP flow is old enough for a client's datagram to confirm it.
    pub fn age_datagrams(&mut self) {
        for connection in self.flows.connections.values_mut() {
            connection.aged = true;
        }
    }

    /// Every fragmented datagram is too old to be put together.
    pub fn age_fragments(&mut self) {
        self.datagrams.clear();
    }

    /// Loses one entry of some flow, which then has had no packet for long; which one `seed` decides. Returns what
    /// the lost entry matched and what the other one matches.
    pub fn evict(&mut self, seed: u64) -> Option<[Tuple; 2]> {
        let whole = self.flows.connections.iter_mut();
        let (_, connection) = whole
            .filter(|(_, connection)| connection.evicted.is_none())
            .min_by_key(|(id, _)| mix(seed ^ **id))?;
        let [lost, kept] = match seed % 2 {
            0 => [Side::Client, Side::Backend],
            _ => [Side::Backend, Side::Client],
        };
        connection.evicted = Some(lost);
        connection.stale = true;
        let tuples = [lost, kept].map(|side| connection.tuple(side));
        self.flows.by_tuple.remove(&tuples[0]);
        Some(tuples)
    }

    /// Forgets all flows.
    pub fn clear_flows(&mut self) {
        self.flows = Flows::default();
    }

    /// Number of flows.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.flows.connections.len()
    }

    /// What becomes of a packet at a hook of an interface.
    pub fn handle(&mut self, hook: Hook, interface: u32, frame: &[u8]) -> Answer {
        let at = At {
            hook,
            interface,
            frame,
        };
        let mut events = Vec::new();
        let result = match hook {
            Hook::XdpIngress | Hook::TcIngress => self.enters(at, &mut events),
            Hook::TcEgress => self.leaves(at, &mut events),
        };
        let (verdict, outcome, bytes) = match result {
            Ok((verdict, outcome, bytes)) => (verdict, outcome, Some(bytes)),
            Err(outcome) if outcome.fate() == Fate::Drop => (Verdict::Dropped, outcome, None),
            Err(outcome) => (Verdict::On, outcome, Some(frame.to_vec())),
        };
        Answer {
            verdict,
            bytes,
            outcome,
            events,
        }
    }

    fn enters(&mut self, at: At<'_>, events: &mut Vec<Event>) -> Step<(Verdict, Outcome, Vec<u8>)> {
        let ip = network(at.frame)?;
        let hints = if self.is_service_address(ip.destination) {
            FRONTEND
        } else {
            self.hints(ip.destination)
        };
        if hints == 0 {
            return Err(Outcome::NotOurs);
        }
        let payload = payload(at.frame, &ip)?;
        if payload.protocol == icmp(ip.source) {
            if at.hook == Hook::XdpIngress {
                return Err(Outcome::LeftToTc);
            }
            return self.related(at, &ip, &payload, Way::In);
        }
        let (read, exit) = if payload.piece.is_some_and(|piece| !piece.first) {
            let to_frontend = hints & (FRONTEND | NODE) != 0;
            if !to_frontend && !self.direct.contains(&direct_position(ip.destination)) {
                return Err(Outcome::NotOurs);
            }
            let found = self.recall(at, &ip, &payload, Way::In);
            let (read, id, side) = found.ok_or_else(|| self.stray(at.hook, hints, &ip))?;
            (read, self.follow(id, side, &read, events))
        } else {
            let read = transport(at, &ip, &payload, Way::In)?;
            self.guard_ports(hints, &read)?;
            (read, self.route(at, hints, &read, events)?)
        };
        match exit {
            Exit::Tell(told) => self.tell(at, &read, told),
            Exit::Reset => self.reset(at, &read),
            Exit::Along(id, side, outcome) => {
                self.remember(&read, id, side)?;
                if self.flows.connections[&id].snat {
                    self.send_away(at, &read, id, side, outcome)
                } else {
                    self.send_on(at, &read, id, side, outcome)
                }
            }
        }
    }

    /// Notes the ports of a first fragment; those of SCTP must stay.
    fn remember(&mut self, read: &Read, id: u64, side: Side) -> Step<()> {
        let Some(piece) = read.piece.filter(|piece| piece.first) else {
            return Ok(());
        };
        let [source, destination] = self.flows.connections[&id].translation(side);
        let ports = [read.tuple.source.port(), read.tuple.destination.port()];
        if read.is_sctp() && ports != [source.port(), destination.port()] {
            return Err(Outcome::FragmentSctp);
        }
        let first = First {
            protocol: read.tuple.protocol,
            ports,
        };
        self.datagrams.insert(read.datagram(piece), first);
        Ok(())
    }

    /// The flow that a later fragment's datagram belongs to.
    fn recall(
        &self,
        at: At<'_>,
        ip: &Ip,
        payload: &Payload,
        way: Way,
    ) -> Option<(Read, u64, Side)> {
        let piece = payload.piece.expect("a fragment");
        let mut read = Read {
            l3: ip.l3,
            length: length(at.frame, ip).expect("it has a header"),
            l4: payload.l4,
            tuple: Tuple {
                way,
                protocol: 0,
                source: SocketAddr::new(ip.source, 0),
                destination: SocketAddr::new(ip.destination, 0),
            },
            flags: 0,
            sequence: None,
            acknowledges: 0,
            piece: Some(piece),
        };
        let first = self.datagrams.get(&read.datagram(piece))?;
        read.tuple.protocol = first.protocol;
        read.tuple.source.set_port(first.ports[0]);
        read.tuple.destination.set_port(first.ports[1]);
        let (id, side) = self.flows.find(&read.tuple)?;
        Some((read, id, side))
    }

    /// What becomes of a later fragment of no flow.
    fn stray(&self, hook: Hook, hints: u8, ip: &Ip) -> Outcome {
        if hints & (FRONTEND | NODE) == 0 {
            return Outcome::NotOurs;
        }
        if hook == Hook::XdpIngress {
            return Outcome::LeftToTc;
        }
        let address = FrontendAt::address(ip.destination);
        let entry = self.tables.frontends.get(&address);
        match entry.map(|entry| entry.kind) {
            Some(kind::CLUSTER_IP) => Outcome::Fragment,
            Some(kind::LOAD_BALANCER) if hints & NODE == 0 => Outcome::Fragment,
            None if self.is_service_address(ip.destination) && self.is_on(DROP_UNALLOCATED) => {
                Outcome::Unallocated
            }
            _ => Outcome::FragmentToStack,
        }
    }

    /// Translates a packet of a flow whose backend sees this node, and sends it out by the routes.
    fn send_away(
        &mut self,
        at: At<'_>,
        read: &Read,
        id: u64,
        side: Side,
        outcome: Outcome,
    ) -> Step<(Verdict, Outcome, Vec<u8>)> {
        let translation = self.flows.connections[&id].translation(side);
        let xdp = at.hook == Hook::XdpIngress;
        let (mac, router, interface, mtu) = match hop(translation[1].ip()) {
            Hop::None => return Err(Outcome::NoRoute),
            Hop::Router(out) => (out.mac, out.router, self.interface_of(&out), out.mtu),
            Hop::Bridge(_) | Hop::Sourceless => (Mac::default(), Mac::default(), 0, MTU),
        };
        if read.length > mtu {
            return self.tell(at, read, Told::TooBig(mtu));
        }
        let same = interface == at.interface;
        let takes = || {
            self.links
                .get(&interface)
                .is_some_and(|link| link.bits & link::XDP != 0)
        };
        if xdp && !same && !takes() {
            return Err(Outcome::LeftToTc);
        }
        let mut frame = at.frame.to_vec();
        translate(&mut frame, read, translation);
        if !hop_taken(&mut frame, read.l3, read.tuple.source.is_ipv4()) {
            return self.tell(at, read, Told::TimeExceeded);
        }
        if !xdp {
            // The neighbour's address comes later.
            return Ok((Verdict::Back, outcome, frame));
        }
        put(&mut frame, 0, &[router, mac].concat());
        let verdict = if same { Verdict::Back } else { Verdict::Away };
        Ok((verdict, outcome, frame))
    }

    /// The interface that has these sources.
    fn interface_of(&self, out: &Out) -> u32 {
        let has = |link: &Link| IpAddr::from(Ipv4Addr::from(link.v4)) == out.sources[0];
        self.links
            .iter()
            .find(|(_, link)| has(link))
            .map_or(0, |(index, _)| *index)
    }

    /// Leaves the node's own traffic and ordinary packets to pods alone.
    fn guard_ports(&self, hints: u8, read: &Read) -> Step<()> {
        let destination = read.tuple.destination;
        let ours = hints & FRONTEND != 0
            || hints & NODE != 0 && self.is_node_port(read.tuple.protocol, destination.port())
            || hints & BACKEND != 0
                && (read.opens() || self.direct.contains(&direct_position(destination.ip())));
        if ours { Ok(()) } else { Err(Outcome::NotOurs) }
    }

    /// Finds or opens the packet's flow.
    fn route(&mut self, at: At<'_>, hints: u8, read: &Read, events: &mut Vec<Event>) -> Step<Exit> {
        let found = self.flows.find(&read.tuple);
        let ended = found.filter(|(id, side)| self.has_ended(*id, *side, read));
        match (found, ended) {
            (Some((id, _)), None) if self.has_vanished(found, read) => {
                let reset = Read {
                    flags: read.flags | flags::RST,
                    ..*read
                };
                self.note(id, Side::Client, &reset, events);
                Ok(Exit::Reset)
            }
            (Some((id, side)), None) => Ok(self.follow(id, side, read, events)),
            (Some((id, side)), Some(_)) => self.open(at, hints, read, Some((id, side)), events),
            (None, _) => self.open(at, hints, read, None, events),
        }
    }

    /// Whether the packet along a flow wants a new one.
    fn has_ended(&self, id: u64, side: Side, read: &Read) -> bool {
        let connection = self.flows.connections[&id];
        if side == Side::Backend {
            return false;
        }
        let Some((backend, generation, _)) = connection.member else {
            return read.opens() && connection.is_closed();
        };
        let family = Family::of(connection.backend.ip());
        let serves = self
            .tables
            .backends
            .get(&(family, backend))
            .is_some_and(|record| {
                record.generation == generation && record.bits & (SERVING | GONE) == SERVING
            });
        if read.is_udp() {
            !serves
        } else {
            read.opens() && (connection.is_closed() || !serves)
        }
    }

    /// Whether a client's segment goes to a pod of this node that is gone, endpoint and all.
    fn has_vanished(&self, found: Option<(u64, Side)>, read: &Read) -> bool {
        let Some((id, Side::Client)) = found else {
            return false;
        };
        let Connection {
            member: Some((backend, generation, _)),
            backend: pod,
            ..
        } = self.flows.connections[&id]
        else {
            return false;
        };
        let family = Family::of(pod.ip());
        let record = self.tables.backends.get(&(family, backend));
        let is_endpoint =
            record.is_some_and(|record| record.generation == generation && record.bits & GONE == 0);
        self.is_on(RESET_VANISHED)
            && read.tuple.protocol == next::TCP
            && read.flags & flags::RST == 0
            && !is_endpoint
            && self.vanished.contains(&pod.ip())
    }

    /// Notes a packet along a flow; a client's after the backend's answer confirms it.
    fn follow(&mut self, id: u64, side: Side, read: &Read, events: &mut Vec<Event>) -> Exit {
        let connection = self.flows.connections.get_mut(&id).expect("it was found");
        let outcome = match (connection.snat, side) {
            (true, Side::Client) => Outcome::ForwardRemote,
            (true, Side::Backend) => Outcome::ReverseRemote,
            (false, _) if connection.established => Outcome::Forward,
            (false, _) => Outcome::ForwardOpening,
        };
        self.note(id, side, read, events);
        let connection = self.flows.connections[&id];
        let backends_tuple = self.flows.find(&connection.backend_tuple());
        if side == Side::Client
            && connection.is_proved_by(read)
            && backends_tuple.is_none_or(|found| found == (id, Side::Backend))
        {
            self.flows.mend(id);
            let connection = self.flows.connections.get_mut(&id).expect("it was found");
            connection.established = true;
            events.push(Event::Promoted);
            if let (true, Some((backend, generation, service))) =
                (connection.affine, connection.member)
            {
                let pin = Pin {
                    backend,
                    generation,
                    expired: false,
                };
                self.pins.insert((connection.client.ip(), service), pin);
            }
        }
        Exit::Along(id, side, outcome)
    }

    /// Notes what a packet says about its flow.
    fn note(&mut self, id: u64, side: Side, read: &Read, events: &mut Vec<Event>) {
        let connection = self.flows.connections.get_mut(&id).expect("it was found");
        let before = (connection.answered, connection.fin, connection.reset);
        let reset = read.flags & flags::RST != 0;
        let answers = side == Side::Backend && !reset && !read.is_later();
        if !read.is_later() {
            connection.reset = reset;
        }
        connection.answered |= answers;
        connection.fin[usize::from(side == Side::Backend)] |= read.flags & flags::FIN != 0;
        if side == Side::Client && read.opens() {
            connection.fin = [false; 2];
        }
        let proves = answers && !read.is_udp() && !connection.established;
        if proves {
            let syn = read.flags & flags::SYN != 0;
            match read.sequence {
                Some(sequence) if !read.is_sctp() => {
                    connection.heard = sequence.wrapping_add(u32::from(syn));
                }
                Some(tag) if syn => connection.heard = tag,
                _ => {}
            }
        }
        let after = (connection.answered, connection.fin, connection.reset);
        if proves || after != before || connection.stale {
            connection.stale = false;
            if self.flows.mend(id) {
                events.push(Event::Mended);
            }
        }
    }

    /// Opens a flow for a packet that has none, or whose flow has ended.
    fn open(
        &mut self,
        at: At<'_>,
        hints: u8,
        read: &Read,
        ended: Option<(u64, Side)>,
        events: &mut Vec<Event>,
    ) -> Step<Exit> {
        let edge = self.edges.get(&at.interface).copied();
        let bits = edge.map_or(edge::UPLINK, |edge| edge.bits);
        let at_pod = bits & edge::POD != 0;
        let from_pod = at_pod || self.is_pods(read.tuple.source.ip());
        let (index, used) = match self.service(hints, &read.tuple, from_pod) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(Exit::Tell(Told::Rejected)),
            Err(Outcome::NoFrontend) => {
                return self.open_direct(at.hook, bits, hints, read, ended, events);
            }
            Err(outcome) => return Err(outcome),
        };
        let service = self.tables.services.get(&index).copied();
        let service = service.unwrap_or(Service::new(Range(0), Range(0), 0, 0));
        self.admit(index, &service, used, read.tuple.source.ip())?;
        let Some((id, backend)) = self.select(index, &service, used, from_pod, &read.tuple)? else {
            return match ended {
                Some((id, side)) if read.is_udp() => Ok(self.follow(id, side, read, events)),
                _ if service.flags() & flag::HAS_ANY != 0 && !self.is_on(REJECT_NO_LOCAL) => {
                    Err(Outcome::NoLocalEndpoint)
                }
                _ => Ok(Exit::Tell(Told::Rejected)),
            };
        };
        if let Some((id, _)) = ended {
            self.flows.remove(id);
            if read.is_udp() {
                events.push(Event::Moved);
            }
        }
        let (client, asked) = (read.tuple.source, read.tuple.destination);
        let itself = backend.address.ip() == client.ip();
        let hairpin = at_pod && itself;
        let mut seen_ip = if hairpin { asked.ip() } else { client.ip() };
        let mut snat = false;
        let answers_past_us = !at_pod && (itself || backend.bits & LOCAL == 0);
        if !hairpin && (answers_past_us || self.wants_source(&service, used, from_pod)) {
            let way = match hop(backend.address.ip()) {
                Hop::Router(out) => Some((Some(out.sources), out.mtu)),
                Hop::Bridge(_) => Some((Some(BRIDGE_SOURCES), MTU)),
                Hop::Sourceless => Some((None, MTU)),
                // The stack may know.
                Hop::None => None,
            };
            if let Some((_, mtu)) = way.filter(|(_, mtu)| read.length > *mtu) {
                return Ok(Exit::Tell(Told::TooBig(mtu)));
            }
            if let Some((sources, _)) = way {
                let [v4, v6] = sources.ok_or(Outcome::NoSource)?;
                snat = true;
                seen_ip = if client.is_ipv4() { v4 } else { v6 };
            }
        }
        let connection = Connection {
            protocol: read.tuple.protocol,
            client,
            asked,
            seen: SocketAddr::new(seen_ip, client.port()),
            backend: backend.address,
            member: Some((id, backend.generation, index)),
            hairpin,
            snat,
            bridged: edge.is_some_and(|edge| edge.bridge != 0),
            affine: service.affinity_seconds() != 0,
            syn: read.opens(),
            established: false,
            answered: false,
            fin: [false; 2],
            reset: false,
            heard: 0,
            aged: false,
            evicted: None,
            stale: false,
        };
        let may_keep_port = !(snat || hairpin && used == kind::NODE_PORT);
        self.enter(connection, may_keep_port, events)
    }

    /// Whether a backend that answers by way of this node must see it as the client all the same.
    const fn wants_source(&self, service: &Service, used: u8, from_pod: bool) -> bool {
        if from_pod {
            return used == kind::CLUSTER_IP && self.is_on(MASQUERADE_ALL);
        }
        let kept = used != kind::CLUSTER_IP && service.flags() & flag::EXTERNAL_LOCAL != 0;
        !kept && self.is_on(SNAT_ALWAYS)
    }

    /// Whether an address is a pod's by its range.
    fn is_pods(&self, address: IpAddr) -> bool {
        let config = &self.config;
        let holds = |net: IpAddr, mask: IpAddr| {
            let net = ipnet::IpNet::with_netmask(net, mask).expect("a mask");
            net.prefix_len() > 0 && net.contains(&address)
        };
        let (nets4, masks4) = (config.pod_nets4, config.pod_masks4);
        let (nets6, masks6) = (config.pod_nets6, config.pod_masks6);
        match address {
            IpAddr::V4(_) => nets4
                .into_iter()
                .zip(masks4)
                .any(|(net, mask)| holds(Ipv4Addr::from(net).into(), Ipv4Addr::from(mask).into())),
            IpAddr::V6(_) => nets6
                .into_iter()
                .zip(masks6)
                .any(|(net, mask)| holds(Ipv6Addr::from(net).into(), Ipv6Addr::from(mask).into())),
        }
    }

    /// A SYN straight to a backend, where a flow has its tuple.
    fn open_direct(
        &mut self,
        hook: Hook,
        bits: u32,
        hints: u8,
        read: &Read,
        ended: Option<(u64, Side)>,
        events: &mut Vec<Event>,
    ) -> Step<Exit> {
        let translated_before = bits & edge::XDP != 0 && hook == Hook::TcIngress;
        if hints & BACKEND == 0 || !read.opens() || translated_before {
            return Err(Outcome::NoFrontend);
        }
        if let Some((id, _)) = ended {
            self.flows.remove(id);
        }
        let (client, backend) = (read.tuple.source, read.tuple.destination);
        let connection = Connection {
            protocol: read.tuple.protocol,
            client,
            asked: backend,
            seen: client,
            backend,
            member: None,
            hairpin: false,
            snat: false,
            bridged: false,
            affine: false,
            syn: true,
            established: false,
            answered: false,
            fin: [false; 2],
            reset: false,
            heard: 0,
            aged: false,
            evicted: None,
            stale: false,
        };
        let Some((id, _)) = self.flows.find(&connection.backend_tuple()) else {
            return Err(Outcome::NotOurs);
        };
        if self.flows.connections[&id].is_closed() {
            self.flows.remove(id);
            return Err(Outcome::NotOurs);
        }
        self.enter(connection, false, events)
    }

    /// Enters a flow, with its client's port if it may have that and nobody else does, else with a free one.
    fn enter(
        &mut self,
        mut connection: Connection,
        may_keep_port: bool,
        events: &mut Vec<Event>,
    ) -> Step<Exit> {
        if may_keep_port && self.make_way(&connection) {
            return Ok(self.entered(connection));
        }
        let hash = u64::from(hash(
            self.config.seed,
            connection.client,
            connection.asked,
            connection.protocol,
        ));
        let (first, last) = (self.config.snat_first, self.config.snat_last);
        let ports = u32::from(last) - u32::from(first) + 1;
        for attempt in 0..PORT_TRIES {
            let draw = mix(hash.wrapping_add(attempt.wrapping_mul(M1))) >> 32;
            let offset = scale(u32::try_from(draw).expect("32 bits"), ports);
            let port = first + u16::try_from(offset).expect("less than the ports there are");
            connection.seen.set_port(port);
            if self.make_way(&connection) {
                events.push(Event::PortTranslated);
                if connection.member.is_none() {
                    self.direct.insert(direct_position(connection.asked.ip()));
                }
                return Ok(self.entered(connection));
            }
        }
        Err(Outcome::PortsExhausted)
    }

    /// Enters a flow whose way is free, or one again whose client's entry was lost: with all that was known of it, but
    /// for how the last connection from that port ended.
    fn entered(&mut self, mut connection: Connection) -> Exit {
        if let Some((id, _)) = self.flows.find(&connection.backend_tuple()) {
            let known = self.flows.connections[&id];
            connection.established = known.established;
            connection.answered = known.answered;
            connection.heard = known.heard;
            connection.aged = known.aged;
            if !connection.syn {
                connection.fin = known.fin;
            }
            self.flows.remove(id);
        }
        Exit::Along(self.flows.insert(connection), Side::Client, Outcome::Open)
    }

    /// Whether the tuple behind the frontend is free, or the same flow's; one whose connection is over is made so.
    fn make_way(&mut self, connection: &Connection) -> bool {
        let Some((id, _)) = self.flows.find(&connection.backend_tuple()) else {
            return true;
        };
        let other = self.flows.connections[&id];
        if other.is_closed() {
            self.flows.remove(id);
            return true;
        }
        let same = (other.client, other.asked) == (connection.client, connection.asked);
        assert!(
            !same || other.evicted == Some(Side::Client),
            "the client's packet would have found it: {other:?}"
        );
        same
    }

    /// The service a packet is for, and what its client's address is; none for an undefined port of a ClusterIP.
    fn service(&self, hints: u8, tuple: &Tuple, from_pod: bool) -> Step<Option<(u32, u8)>> {
        let destination = tuple.destination;
        let key = |address, port, protocol| FrontendAt {
            address,
            port,
            protocol,
        };
        let frontend = |at| self.tables.frontends.get(&at).copied();
        let kept_from = if from_pod && self.is_on(EXTERNAL_IPS_OUTSIDE) {
            Some(kind::EXTERNAL_IP)
        } else {
            None
        };
        let found = frontend(key(destination.ip(), destination.port(), tuple.protocol));
        if let Some(found) = found.filter(|found| kept_from != Some(found.kind)) {
            return Ok(Some((found.service, found.kind)));
        }
        if hints & (FRONTEND | NODE) == 0 {
            return Err(Outcome::NoFrontend);
        }
        match frontend(FrontendAt::address(destination.ip())).map(|entry| entry.kind) {
            Some(kind::NODE_PORT) => {
                if hints & NODE == 0 || !self.is_node_port(tuple.protocol, destination.port()) {
                    return Err(Outcome::NoFrontend);
                }
                let any = match destination {
                    SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                    SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
                };
                let found = frontend(key(any, destination.port(), tuple.protocol));
                let found = found.ok_or(Outcome::NoFrontend)?;
                Ok(Some((found.service, found.kind)))
            }
            Some(kind::CLUSTER_IP) if self.is_on(REJECT_UNDEFINED_PORT) => Ok(None),
            None if self.is_service_address(destination.ip()) && self.is_on(DROP_UNALLOCATED) => {
                Err(Outcome::Unallocated)
            }
            _ => Err(Outcome::NoFrontend),
        }
    }

    /// Whether a client may have a flow: anyone who is one host, but for what source ranges say about load balancers'
    /// addresses.
    fn admit(&self, index: u32, service: &Service, used: u8, client: IpAddr) -> Step<()> {
        let nobody = match client {
            IpAddr::V4(client) => {
                client.octets()[0] == 0
                    || client.is_loopback()
                    || client.is_multicast()
                    || client.is_broadcast()
            }
            IpAddr::V6(client) => {
                client.is_unspecified() || client.is_loopback() || client.is_multicast()
            }
        };
        if nobody {
            return Err(Outcome::Martian);
        }
        let open = used != kind::LOAD_BALANCER || service.flags() & flag::SOURCE_RANGES == 0;
        let mut ranges = self.tables.source_ranges.iter();
        if open || ranges.any(|range| range.service == index && range.net.contains(&client)) {
            Ok(())
        } else {
            Err(Outcome::SourceRange)
        }
    }

    /// The backend a new flow gets; none where its set is empty.
    fn select(
        &self,
        index: u32,
        service: &Service,
        used: u8,
        from_pod: bool,
        tuple: &Tuple,
    ) -> Step<Option<(u32, BackendRecord)>> {
        let flags = service.flags();
        let outside = !from_pod;
        let by_policy = match used {
            kind::CLUSTER_IP => flags & flag::INTERNAL_LOCAL != 0,
            _ => outside && flags & flag::EXTERNAL_LOCAL != 0,
        };
        let (range, bit) = if by_policy {
            (service.local, IN_LOCAL)
        } else {
            (service.cluster, IN_CLUSTER)
        };
        if range.length() == 0 {
            return Ok(None);
        }
        let (client, family) = (tuple.source, Family::of(tuple.source.ip()));
        let affine = service.affinity_seconds() != 0;
        if let (true, Some(pin)) = (affine, self.pins.get(&(client.ip(), index))) {
            let record = self.tables.backends.get(&(family, pin.backend));
            let eligible = record.filter(|record| {
                !pin.expired
                    && record.bits & bit != 0
                    && record.bits & GONE == 0
                    && record.generation == pin.generation
                    && record.service == index
            });
            if let Some(record) = eligible {
                return Ok(Some((pin.backend, *record)));
            }
        }
        // With Maglev nothing decides that only this node knows.
        let maglev = flags & flag::MAGLEV != 0;
        let (node_seed, cluster_seed) = (self.config.seed, self.config.maglev_seed);
        let hash = match (affine, maglev) {
            (true, _) => {
                let only_client = SocketAddr::new(client.ip(), 0);
                let of_service = node_seed ^ u64::from(index);
                let seed = if maglev { cluster_seed } else { of_service };
                hash(seed, only_client, only_client, 0)
            }
            (false, true) => hash(cluster_seed, client, tuple.destination, tuple.protocol),
            (false, false) => hash(node_seed, client, tuple.destination, tuple.protocol),
        };
        let position = range.start() + scale(hash, range.length());
        let id = self
            .tables
            .slots
            .get(position as usize)
            .copied()
            .unwrap_or(0);
        match self.tables.backends.get(&(family, id)) {
            Some(record) if id != 0 && record.bits & GONE == 0 => Ok(Some((id, *record))),
            // An element that was never written reads as zero, as the map's does.
            _ => Err(Outcome::BadBackend),
        }
    }

    /// Translates a packet that came in and sends it on: up the stack, along the bridge, or back to the pod.
    fn send_on(
        &self,
        at: At<'_>,
        read: &Read,
        id: u64,
        side: Side,
        outcome: Outcome,
    ) -> Step<(Verdict, Outcome, Vec<u8>)> {
        let connection = &self.flows.connections[&id];
        let mut frame = at.frame.to_vec();
        let translation = connection.translation(side);
        translate(&mut frame, read, translation);
        if connection.hairpin {
            if !hop_taken(&mut frame, read.l3, read.tuple.source.is_ipv4()) {
                return Err(Outcome::TtlExceeded);
            }
            turn(&mut frame);
            let outcome = match side {
                Side::Client => Outcome::Hairpin,
                Side::Backend => Outcome::HairpinReverse,
            };
            return Ok((Verdict::Back, outcome, frame));
        }
        let bridge = self
            .edges
            .get(&at.interface)
            .is_some_and(|edge| edge.bridge != 0);
        if connection.bridged && bridge && at.hook == Hook::TcIngress {
            let [source, backend] = translation.map(|end| end.ip());
            let neighbour = NEIGHBOURS.iter().find(|(address, _)| *address == backend);
            // The kernel finds no way for a frame that is too long for the bridge, but for a tag.
            let fits = at.frame.len() <= usize::from(MTU) + ETHERNET + 4;
            if let Some((_, mac)) = neighbour.filter(|_| fits && is_routed(source)) {
                put(&mut frame, 0, mac);
            }
        }
        Ok((Verdict::On, outcome, frame))
    }

    fn leaves(&mut self, at: At<'_>, events: &mut Vec<Event>) -> Step<(Verdict, Outcome, Vec<u8>)> {
        let ip = network(at.frame)?;
        let uplink = self
            .edges
            .get(&at.interface)
            .is_some_and(|edge| edge.bits & edge::UPLINK != 0);
        if uplink && self.may_be_cluster_ip(ip.destination) {
            let entry = self
                .tables
                .frontends
                .get(&FrontendAt::address(ip.destination));
            if entry.is_some_and(|entry| entry.kind == kind::CLUSTER_IP) {
                return Err(Outcome::Untranslated);
            }
        }
        let from_backend = self.hints(ip.source) & BACKEND != 0;
        let protocol = at.frame[ip.l3 + if ip.source.is_ipv4() { 9 } else { 6 }];
        if !from_backend && protocol != icmp(ip.source) {
            return Err(Outcome::NotOurs);
        }
        let payload = payload(at.frame, &ip)?;
        if payload.protocol == icmp(ip.source) {
            return match self.related(at, &ip, &payload, Way::Out) {
                Err(Outcome::OtherProtocol) if !from_backend => Err(Outcome::NotOurs),
                result => result,
            };
        }
        let (read, id, side) = if payload.piece.is_some_and(|piece| !piece.first) {
            let found = self.recall(at, &ip, &payload, Way::Out);
            found.ok_or(Outcome::NotOurs)?
        } else {
            let read = transport(at, &ip, &payload, Way::Out)?;
            let (id, side) = self.flows.find(&read.tuple).ok_or(Outcome::NotOurs)?;
            (read, id, side)
        };
        let connection = self.flows.connections[&id];
        let says_hello = read.flags & (flags::SYN | flags::RST) != 0;
        let waits = connection.syn && !connection.answered && !connection.established;
        if waits && !read.is_udp() && !says_hello && !read.is_later() {
            events.push(Event::Clash);
            return Err(Outcome::NotOurs);
        }
        self.remember(&read, id, side)?;
        self.note(id, side, &read, events);
        let mut frame = at.frame.to_vec();
        translate(&mut frame, &read, connection.translation(side));
        Ok((Verdict::On, Outcome::Reverse, frame))
    }

    /// An ICMP message: what it quotes of a flow becomes what the sender of that packet knows.
    fn related(
        &self,
        at: At<'_>,
        ip: &Ip,
        payload: &Payload,
        way: Way,
    ) -> Step<(Verdict, Outcome, Vec<u8>)> {
        let start = payload.l4;
        if start + 8 > at.frame.len() {
            return Err(Outcome::Malformed);
        }
        let [kind, _] = bytes::<2>(at.frame, start)?;
        let v4 = ip.source.is_ipv4();
        let redirects = v4 && kind == 5;
        let tells = if v4 {
            [3, 4, 5, 11, 12].contains(&kind)
        } else {
            (1..=4).contains(&kind)
        };
        if payload.piece.is_some() || !tells {
            return Err(Outcome::OtherProtocol);
        }
        let quote = quote(at.frame, start + 8, v4, way);
        let (inner, l4, tuple) = quote.ok_or(Outcome::OtherProtocol)?;
        if inner.source != ip.destination {
            return Err(Outcome::OtherProtocol);
        }
        let (id, side) = self.flows.find(&tuple).ok_or(Outcome::OtherProtocol)?;
        if redirects {
            return Err(Outcome::IcmpRedirect);
        }
        let connection = &self.flows.connections[&id];
        let [from, to] = connection.translation(side);
        let masked = connection.snat && side == Side::Client;
        let speaker = if masked || ip.source == tuple.source.ip() {
            from.ip()
        } else {
            ip.source
        };
        if connection.snat {
            let mtu = match hop(to.ip()) {
                Hop::None => return Err(Outcome::NoRoute),
                Hop::Router(out) => out.mtu,
                Hop::Bridge(_) | Hop::Sourceless => MTU,
            };
            let length =
                word(at.frame, ip.l3 + if v4 { 2 } else { 4 }).ok_or(Outcome::Malformed)?;
            let length = if v4 {
                length
            } else {
                length.saturating_add(40)
            };
            if length > mtu || !is_routed(speaker) {
                return Err(Outcome::NoRoute);
            }
        }

        let mut frame = at.frame.to_vec();
        let sums = |a: IpAddr, b: IpAddr| u64::from(pseudo_sum(a, b));
        let ports = |a: SocketAddr, b: SocketAddr| {
            u64::from(a.port().to_be()) + u64::from(b.port().to_be())
        };
        let old = sums(tuple.source.ip(), tuple.destination.ip());
        let new = sums(from.ip(), to.ip());
        let addresses = if v4 { 12 } else { 8 };
        if v4 {
            adjust(&mut frame, inner.l3 + 10, old, new, false);
        }
        let check = match tuple.protocol {
            next::TCP => Some(l4 + 16),
            next::UDP => Some(l4 + 6),
            _ => None,
        };
        let length = word(at.frame, ip.l3 + if v4 { 2 } else { 4 }).ok_or(Outcome::Malformed)?;
        let end = ip.l3 + usize::from(length) + if v4 { 0 } else { 40 };
        let quoted = |check: &usize| check + 2 <= end && bytes::<2>(&frame, *check).is_ok();
        if let Some(check) = check.filter(quoted) {
            let old = old + ports(tuple.source, tuple.destination);
            let new = new + ports(from, to);
            adjust(&mut frame, check, old, new, tuple.protocol == next::UDP);
        }
        // The quoted packet went the other way.
        let both = [octets(to.ip()), octets(from.ip())].concat();
        put(&mut frame, inner.l3 + addresses, &both);
        put(&mut frame, l4, &to.port().to_be_bytes());
        put(&mut frame, l4 + 2, &from.port().to_be_bytes());

        let (outer, now) = (sums(ip.source, ip.destination), sums(speaker, to.ip()));
        let whole = |frame: &[u8]| u64::from(svc_lb_common::checksum::sum(0, &frame[start..]));
        let (mut before, mut after) = (whole(at.frame), whole(&frame));
        if v4 {
            adjust(&mut frame, ip.l3 + 10, outer, now, false);
        } else {
            before += outer;
            after += now;
        }
        adjust(&mut frame, start + 2, before, after, false);
        let both = [octets(speaker), octets(to.ip())].concat();
        put(&mut frame, ip.l3 + addresses, &both);

        let outcome = Outcome::IcmpError;
        if !connection.snat && !connection.hairpin {
            return Ok((Verdict::On, outcome, frame));
        }
        if !hop_taken(&mut frame, ip.l3, v4) {
            return Err(Outcome::TtlExceeded);
        }
        if connection.hairpin {
            turn(&mut frame);
        }
        Ok((Verdict::Back, outcome, frame))
    }

    /// Turns the packet into the ICMP error that tells its sender of the outcome.
    fn tell(&mut self, at: At<'_>, read: &Read, told: Told) -> Step<(Verdict, Outcome, Vec<u8>)> {
        let frame = at.frame;
        let (source, destination) = (read.tuple.source.ip(), read.tuple.destination.ip());
        self.may_answer(frame, read)?;
        let own = self.links.get(&at.interface).map(|link| match destination {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::from(link.v4)),
            IpAddr::V6(_) => IpAddr::from(Ipv6Addr::from(link.v6)),
        });
        let speaker = match (told, own) {
            (Told::TimeExceeded | Told::TooBig(_), Some(own)) => own,
            _ => destination,
        };
        let quoted = (read.l4 - read.l3 + 8).min(QUOTE);
        let quote = &frame[read.l3..read.l3 + quoted];
        let length = u16::try_from(8 + quoted).expect("a short quote");
        let v4 = source.is_ipv4();
        let number = if v4 { next::ICMP } else { next::ICMP6 };
        let mut out = back(&frame[..read.l3], [speaker, source], (0xc0, number), length);
        let (kind, code) = match (told, v4) {
            (Told::TimeExceeded, true) => (11, 0),
            (Told::TimeExceeded, false) => (3, 0),
            (Told::TooBig(_), true) => (3, 4),
            (Told::TooBig(_), false) => (2, 0),
            (Told::Rejected, true) => (3, 3),
            (Told::Rejected, false) => (1, 4),
        };
        let mtu = match told {
            Told::TooBig(mtu) => mtu,
            Told::Rejected | Told::TimeExceeded => 0,
        };
        let mut message = vec![kind, code, 0, 0, 0, 0];
        message.extend(mtu.to_be_bytes());
        message.extend(quote);
        let pseudo = if v4 {
            Vec::new()
        } else {
            let mut pseudo = [octets(speaker), octets(source)].concat();
            pseudo.extend(length.to_be_bytes());
            pseudo.extend([0, next::ICMP6]);
            pseudo
        };
        let check = checksum(&[&pseudo, &message]);
        put(&mut message, 2, &check);
        out.extend(message);
        let outcome = match told {
            Told::Rejected => Outcome::Rejected,
            Told::TimeExceeded => Outcome::TimeExceeded,
            Told::TooBig(_) => Outcome::TooBig,
        };
        Ok((Verdict::Back, outcome, out))
    }

    /// Turns a segment into the reset of its connection (RFC 9293 3.10.7.1).
    fn reset(&mut self, at: At<'_>, read: &Read) -> Step<(Verdict, Outcome, Vec<u8>)> {
        let frame = at.frame;
        self.may_answer(frame, read)?;
        let Tuple {
            source,
            destination,
            ..
        } = read.tuple;
        let (flags, numbers) = if read.flags & flags::ACK != 0 {
            (flags::RST, [read.acknowledges, 0])
        } else {
            let headers = read.l4 - read.l3 + usize::from(frame[read.l4 + 12] >> 4) * 4;
            let data = u32::from(read.length)
                .saturating_sub(u32::try_from(headers).expect("headers are short"));
            let ends = [flags::SYN, flags::FIN].map(|end| u32::from(read.flags & end != 0));
            let next = read.sequence.expect("a segment has one");
            let next = next.wrapping_add(data).wrapping_add(ends.iter().sum());
            (flags::RST | flags::ACK, [0, next])
        };
        let mut segment = [destination.port(), source.port()]
            .map(u16::to_be_bytes)
            .concat();
        segment.extend(numbers.map(u32::to_be_bytes).concat());
        segment.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
        let ends = [destination.ip(), source.ip()];
        let pseudo = [ends.map(octets).concat(), vec![0, next::TCP, 0, 20]].concat();
        let check = checksum(&[&pseudo, &segment]);
        put(&mut segment, 16, &check);
        let mut out = back(&frame[..read.l3], ends, (0, next::TCP), 20);
        out.extend(segment);
        if at.hook == Hook::XdpIngress {
            out.resize(out.len().max(SHORTEST), 0);
        }
        Ok((Verdict::Back, Outcome::Reset, out))
    }

    /// Whether a packet may be answered by one that nobody asked for.
    fn may_answer(&mut self, frame: &[u8], read: &Read) -> Step<()> {
        let ends = [read.tuple.source, read.tuple.destination];
        let silent = frame[0] & 1 != 0 || read.is_later();
        if silent || !ends.iter().all(|end| is_one_host(end.ip())) {
            return Err(Outcome::RejectSilent);
        }
        if self.tokens == 0 {
            return Err(Outcome::RejectLimited);
        }
        self.tokens -= 1;
        Ok(())
    }

    const fn is_on(&self, bit: u32) -> bool {
        self.config.bits & bit != 0
    }

    fn hints(&self, address: IpAddr) -> u8 {
        let set = |bit: &u8| {
            let (word, mask) = GuardBit::address(address, *bit, self.config.guard_words).position();
            self.tables
                .hints
                .get(word as usize)
                .is_some_and(|word| word & mask != 0)
        };
        [FRONTEND, NODE, BACKEND].into_iter().filter(set).sum()
    }

    /// A NodePort of the protocol, or a port that translated sources have.
    fn is_node_port(&self, protocol: u8, port: u16) -> bool {
        let protocol = Protocol::from_number(protocol).expect("TCP, UDP or SCTP");
        let (word, mask) = GuardBit::Port { protocol, port }.position();
        let programmed = self
            .tables
            .ports
            .get(word as usize)
            .is_some_and(|word| word & mask != 0);
        programmed || (self.config.snat_first..=self.config.snat_last).contains(&port)
    }

    fn is_service_address(&self, address: IpAddr) -> bool {
        let (net, mask) = match address {
            IpAddr::V4(_) => (
                IpAddr::from(Ipv4Addr::from(self.config.service_net4)),
                IpAddr::from(Ipv4Addr::from(self.config.service_mask4)),
            ),
            IpAddr::V6(_) => (
                IpAddr::from(Ipv6Addr::from(self.config.service_net6)),
                IpAddr::from(Ipv6Addr::from(self.config.service_mask6)),
            ),
        };
        let (address, net, mask) = (octets(address), octets(net), octets(mask));
        mask.iter().any(|byte| *byte != 0)
            && address
                .iter()
                .zip(&mask)
                .map(|(byte, mask)| byte & mask)
                .eq(net)
    }

    /// A hint; where the service CIDR is known it is the only one.
    fn may_be_cluster_ip(&self, address: IpAddr) -> bool {
        let masked = match address {
            IpAddr::V4(_) => self.config.service_mask4 != Addr4(0),
            IpAddr::V6(_) => self.config.service_mask6 != Addr6([0; 4]),
        };
        if masked {
            self.is_service_address(address)
        } else {
            self.hints(address) & FRONTEND != 0
        }
    }
}

impl Connection {
    /// Whether a client's packet shows that it gets the backend's answers, where that was not known yet.
    fn is_proved_by(&self, read: &Read) -> bool {
        if self.established || !self.answered || self.is_closed() || read.is_later() {
            return false;
        }
        if read.is_udp() {
            return self.aged;
        }
        if read.is_sctp() {
            return read.flags & flags::ACK != 0
                && read.acknowledges == self.heard
                && self.heard != 0;
        }
        let distance = read.acknowledges.wrapping_sub(self.heard).cast_signed();
        read.flags & flags::ACK != 0 && (-PROOF..PROOF).contains(&distance)
    }
}

fn direct_position(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => guard::direct_position(Addr4::from(address)),
        IpAddr::V6(address) => guard::direct_position(Addr6::from(address)),
    }
}

/// The hash that a flow's choices start from.
fn hash(seed: u64, source: SocketAddr, destination: SocketAddr, protocol: u8) -> u32 {
    let ports = [source, destination].map(|end| Be16::new(end.port()));
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => flow_hash(
            seed,
            Addr4::from(a),
            Addr4::from(b),
            ports[0],
            ports[1],
            protocol,
        ),
        (IpAddr::V6(a), IpAddr::V6(b)) => flow_hash(
            seed,
            Addr6::from(a),
            Addr6::from(b),
            ports[0],
            ports[1],
            protocol,
        ),
        mixed => panic!("a tuple has one family: {mixed:?}"),
    }
}

/// A frame that goes back where one with this link-layer header came from, up to its network header: from the first
/// address to the second, type of service and protocol, and what follows.
fn back(link: &[u8], ends: [IpAddr; 2], (service, protocol): (u8, u8), length: u16) -> Vec<u8> {
    let mut out = link.to_vec();
    turn(&mut out);
    let addresses = ends.map(octets).concat();
    if ends[0].is_ipv4() {
        let mut header = vec![0x45, service];
        header.extend((20 + length).to_be_bytes());
        header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
        header.extend(addresses);
        let check = checksum(&[&header]);
        put(&mut header, 10, &check);
        out.extend(header);
    } else {
        out.extend([0x60, 0, 0, 0]);
        out.extend(length.to_be_bytes());
        out.extend([protocol, 64]);
        out.extend(addresses);
    }
    out
}

/// Whether an ICMP error may be sent to the address (RFC 1122 3.2.2).
fn is_one_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [first, ..] = address.octets();
            (1..224).contains(&first) && first != 127
        }
        IpAddr::V6(address) => {
            !address.is_unspecified() && !address.is_loopback() && !address.is_multicast()
        }
    }
}

/// Whether the kernel routes packets of that source at all.
const fn is_routed(source: IpAddr) -> bool {
    match source {
        IpAddr::V4(_) => true,
        IpAddr::V6(source) => !source.is_loopback() && !source.is_multicast(),
    }
}

/// `N` bytes within reach.
fn bytes<const N: usize>(frame: &[u8], at: usize) -> Step<[u8; N]> {
    let bytes = frame.get(at..at + N).filter(|_| at <= REACH);
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(Outcome::Malformed)
}

/// IANA's number of a family's ICMP.
const fn icmp(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => next::ICMP,
        IpAddr::V6(_) => next::ICMP6,
    }
}

/// The packet that an ICMP message quotes, where its transport header lies, and what an answer to it would be.
fn quote(frame: &[u8], l3: usize, v4: bool, way: Way) -> Option<(Ip, usize, Tuple)> {
    let inner = addresses(frame, l3, v4).ok()?;
    let payload = payload(frame, &inner).ok()?;
    let l4 = payload.l4;
    let later = payload.piece.is_some_and(|piece| !piece.first);
    if later || l4 + 8 > frame.len() {
        return None;
    }
    let port = |at| bytes::<2>(frame, at).ok().map(u16::from_be_bytes);
    let tuple = Tuple {
        way,
        protocol: payload.protocol,
        source: SocketAddr::new(inner.destination, port(l4 + 2)?),
        destination: SocketAddr::new(inner.source, port(l4)?),
    };
    Some((inner, l4, tuple))
}

/// Finds the addresses of an untagged frame.
fn network(frame: &[u8]) -> Step<Ip> {
    let l3 = ETHERNET;
    let ether_type = word(frame, 12).ok_or(Outcome::Malformed)?;
    if [VLAN, QINQ].contains(&ether_type) {
        return Err(Outcome::Vlan);
    }
    match ether_type {
        0x0800 => addresses(frame, l3, true),
        0x86dd => addresses(frame, l3, false),
        _ => Err(Outcome::NotIp),
    }
}

/// The addresses of a network header.
fn addresses(frame: &[u8], l3: usize, v4: bool) -> Step<Ip> {
    let (source, destination) = if v4 {
        let header: [u8; 20] = bytes(frame, l3)?;
        let address = |at| -> IpAddr {
            let octets: [u8; 4] = header[at..at + 4].try_into().expect("four bytes");
            octets.into()
        };
        (address(12), address(16))
    } else {
        let header: [u8; 40] = bytes(frame, l3)?;
        let address = |at| -> IpAddr {
            let octets: [u8; 16] = header[at..at + 16].try_into().expect("sixteen bytes");
            octets.into()
        };
        (address(8), address(24))
    };
    Ok(Ip {
        l3,
        source,
        destination,
    })
}

/// Finds the transport header.
fn payload(frame: &[u8], ip: &Ip) -> Step<Payload> {
    let l3 = ip.l3;
    if ip.source.is_ipv4() {
        let header: [u8; 20] = bytes(frame, l3)?;
        let words = usize::from(header[0] & 15);
        if header[0] >> 4 != 4 || words < 5 {
            return Err(Outcome::Malformed);
        }
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        return Ok(Payload {
            l4: l3 + 4 * words,
            protocol: header[9],
            piece: part(fragment & 0x1fff, fragment & 0x2000 != 0).map(|first| Piece {
                first,
                id: u16::from_ne_bytes([header[4], header[5]]).into(),
                protocol: header[9],
            }),
        });
    }
    if frame[l3] >> 4 != 6 {
        return Err(Outcome::Malformed);
    }
    let mut protocol = frame[l3 + 6];
    let mut l4 = l3 + 40;
    let mut found = None;
    for _ in 0..CHAIN {
        match protocol {
            next::HOP_BY_HOP | next::ROUTING | next::DESTINATION => {
                let [after, length] = bytes(frame, l4)?;
                (protocol, l4) = (after, l4 + 8 + 8 * usize::from(length));
            }
            next::AUTHENTICATION => {
                let [after, length] = bytes(frame, l4)?;
                (protocol, l4) = (after, l4 + 8 + 4 * usize::from(length));
            }
            next::FRAGMENT => {
                let [after, _, a, b] = bytes(frame, l4)?;
                let id = u32::from_ne_bytes(bytes(frame, l4 + 4)?);
                let fragment = u16::from_be_bytes([a, b]);
                (protocol, l4) = (after, l4 + 8);
                let this = part(fragment >> 3, fragment & 1 != 0).map(|first| Piece {
                    first,
                    id,
                    protocol,
                });
                // A second header does not make a fragment whole again.
                found = this.or(found);
                if found.is_some_and(|piece| !piece.first) {
                    return Ok(Payload {
                        l4,
                        protocol,
                        piece: found,
                    });
                }
            }
            _ => {
                return Ok(Payload {
                    l4,
                    protocol,
                    piece: found,
                });
            }
        }
    }
    Err(Outcome::Malformed)
}

/// None of a whole datagram; else whether it is the first part.
const fn part(offset: u16, more: bool) -> Option<bool> {
    match (offset, more) {
        (0, false) => None,
        (0, true) => Some(true),
        _ => Some(false),
    }
}

/// Reads ports and flags of what we translate.
fn transport(at: At<'_>, ip: &Ip, payload: &Payload, way: Way) -> Step<Read> {
    let (frame, l4) = (at.frame, payload.l4);
    let (tcp, sequence, acknowledges) = match payload.protocol {
        next::TCP => {
            let [_, flags, ..] = bytes::<8>(frame, l4 + 12)?;
            let number = |at| Ok(u32::from_be_bytes(bytes::<4>(frame, l4 + at)?));
            (flags, Some(number(4)?), number(8)?)
        }
        next::UDP => {
            let _checksum = bytes::<2>(frame, l4 + 6)?;
            (0, None, 0)
        }
        next::SCTP => {
            let [chunk, ..] = bytes::<4>(frame, l4 + 12)?;
            let number = |at| bytes::<4>(frame, l4 + at).map(u32::from_be_bytes);
            (sctp_flags(chunk), number(16).ok(), number(4)?)
        }
        _ => return Err(Outcome::OtherProtocol),
    };
    let port = |offset| word(frame, l4 + offset).ok_or(Outcome::Malformed);
    Ok(Read {
        l3: ip.l3,
        length: length(frame, ip).ok_or(Outcome::Malformed)?,
        l4,
        tuple: Tuple {
            way,
            protocol: payload.protocol,
            source: SocketAddr::new(ip.source, port(0)?),
            destination: SocketAddr::new(ip.destination, port(2)?),
        },
        flags: tcp,
        sequence,
        acknowledges,
        piece: payload.piece,
    })
}

/// The packet's length as its network header says.
fn length(frame: &[u8], ip: &Ip) -> Option<u16> {
    match ip.source {
        IpAddr::V4(_) => word(frame, ip.l3 + 2),
        IpAddr::V6(_) => Some(word(frame, ip.l3 + 4)?.saturating_add(40)),
    }
}

/// Gives a frame new addresses and ports.
fn translate(frame: &mut [u8], read: &Read, [source, destination]: [SocketAddr; 2]) {
    let (old_source, old_destination) = (read.tuple.source, read.tuple.destination);
    let old = u64::from(pseudo_sum(old_source.ip(), old_destination.ip()));
    let new = u64::from(pseudo_sum(source.ip(), destination.ip()));
    let ports =
        |a: SocketAddr, b: SocketAddr| u64::from(a.port().to_be()) + u64::from(b.port().to_be());
    let (at, udp) = if read.is_udp() {
        (6, true)
    } else {
        (16, false)
    };
    if read.is_later() {
        // No transport header.
    } else if read.is_sctp() {
        adjust_sctp(frame, read, [source.port(), destination.port()]);
    } else {
        adjust(
            frame,
            read.l4 + at,
            old + ports(old_source, old_destination),
            new + ports(source, destination),
            udp,
        );
    }
    let addresses = if source.is_ipv4() {
        adjust(frame, read.l3 + 10, old, new, false);
        12
    } else {
        8
    };
    let both = [octets(source.ip()), octets(destination.ip())].concat();
    put(frame, read.l3 + addresses, &both);
    if !read.is_later() {
        put(frame, read.l4, &source.port().to_be_bytes());
        put(frame, read.l4 + 2, &destination.port().to_be_bytes());
    }
}

/// Keeps an SCTP packet's checksum as right or wrong as it was when its ports become others: the checksum is
/// linear, so whatever else is in the packet cancels out.
fn adjust_sctp(frame: &mut [u8], read: &Read, new: [u16; 2]) {
    let length = usize::from(read.length)
        .saturating_sub(read.l4 - read.l3)
        .max(12);
    let old = [read.tuple.source.port(), read.tuple.destination.port()];
    let crc = |ports: [u16; 2]| {
        let mut packet = vec![0; length];
        put(&mut packet, 0, &ports.map(u16::to_be_bytes).concat());
        crc32c(&packet)
    };
    let field = bytes::<4>(frame, read.l4 + 8).expect("it was read");
    // 0: not computed yet.
    if old != new && field != [0; 4] {
        let check = u32::from_le_bytes(field) ^ crc(old) ^ crc(new);
        put(frame, read.l4 + 8, &check.to_le_bytes());
    }
}

/// Keeps a checksum as right or wrong as it was when what it covers changes in sum from `old` to `new`.
fn adjust(frame: &mut [u8], at: usize, old: u64, new: u64, udp: bool) {
    const MODULUS: u64 = 65_535;
    let field = u16::from_ne_bytes([frame[at], frame[at + 1]]);
    if udp && field == 0 {
        return;
    }
    let covered = u64::from(!field) + MODULUS - old % MODULUS + new;
    // Ones' complement has two zeros; a sum of anything but nothing is the one with all bits set.
    let covered = match covered % MODULUS {
        0 => 0xffff,
        sum => u16::try_from(sum).expect("less than the modulus"),
    };
    let check = match !covered {
        0 if udp => 0xffff,
        check => check,
    };
    put(frame, at, &check.to_ne_bytes());
}

/// Takes one hop off, as a router does; false if none is left.
fn hop_taken(frame: &mut [u8], l3: usize, v4: bool) -> bool {
    let at = l3 + if v4 { 8 } else { 7 };
    if frame[at] <= 1 {
        return false;
    }
    let before = frame[at];
    frame[at] -= 1;
    if v4 {
        let word = |hops| u64::from(u16::from_ne_bytes([hops, frame[at + 1]]));
        let (old, new) = (word(before), word(before - 1));
        adjust(frame, l3 + 10, old, new, false);
    }
    true
}

/// Swaps the MAC addresses.
fn turn(frame: &mut [u8]) {
    let [destination, source]: [Mac; 2] = [
        frame[..6].try_into().expect("six bytes"),
        frame[6..12].try_into().expect("six bytes"),
    ];
    put(frame, 0, &[source, destination].concat());
}

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The checksum of the concatenation of parts of even length but the last.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let sum = parts
        .iter()
        .fold(0, |sum, part| svc_lb_common::checksum::sum(sum, part));
    (!svc_lb_common::checksum::fold(sum)).to_ne_bytes()
}
