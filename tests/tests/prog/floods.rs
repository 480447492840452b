//! Floods with forged sources, and maps that are full of what is real.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use svc_lb::dataplane::clock::jiffies_per_second;
use svc_lb::dataplane::{FlowEntry, FlowTable, Timeouts};
use svc_lb_common::config::Config;
use svc_lb_common::limits::name;
use svc_lb_common::outcome::Lru;
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::frame::octets;
use svc_lb_tests::prog::rig::Setup;
use svc_lb_tests::prog::tables::{Describe as _, port};
use svc_lb_tests::prog::{Frame, Rig};

use crate::bench::*;
use crate::walks::at_port;

/// Connections that rest while the flood comes.
const CONNECTIONS: u16 = 1_000;
/// UDP streams that do.
const STREAMS: u16 = 250;
/// A flood takes no longer, on a machine that has other things to do.
const MOST: Duration = Duration::from_mins(4);
/// Of so many forged sources of a connection's packets one is answered, and sends once more.
const ANSWERED: u32 = 8;

/// Little room, so that a flood fills it in no time; the programs told the kernel's own clock.
fn small(established: u32) -> Setup {
    let setup = Setup::default();
    let mut sizes = Vec::new();
    for (names, entries) in [
        (name::OPENING, 4_096),
        (name::ESTABLISHED, established),
        (name::STREAMS, 1_024),
    ] {
        sizes.extend(names.map(|name| (name, entries)));
    }
    Setup {
        config: Config {
            hz: jiffies_per_second().unwrap(),
            ..setup.config
        },
        sizes,
        ..setup
    }
}

/// A client's flow that is to live: what it sends, and where that goes.
struct Living {
    frame: Frame,
    backend: SocketAddr,
}

impl Living {
    /// A connection with its handshake done.
    fn connection(bench: &Bench, client: SocketAddr, vip: SocketAddr) -> Self {
        let syn = Frame::tcp(client, vip, SYN);
        let backend = to_and_back(bench, &syn, SYN | ACK);
        let frame = syn.with_flags(ACK);
        assert_eq!(to_and_back(bench, &frame, ACK), backend);
        Self { frame, backend }
    }

    /// Sends a packet and has it answered: both must find their way.
    fn goes_on(&self, bench: &Bench) {
        let backend = to_and_back(bench, &self.frame, ACK);
        assert_eq!(backend, self.backend, "{:?} has moved", self.frame);
    }
}

/// Sends a frame and has it answered; returns its backend. The answer must come from where the frame was sent to.
fn to_and_back(bench: &Bench, frame: &Frame, flags: u8) -> SocketAddr {
    let pod = bench.network.pod;
    let (_, out) = bench.rig.run(TcIngress, pod, &frame.to_bytes());
    let out = Frame::parse(&out).unwrap();
    assert_eq!(out, frame.clone().to(out.destination), "{frame:?}");
    assert_ne!(
        out.destination, frame.destination,
        "{frame:?} was not translated"
    );
    let answer = out.answer(flags);
    let (_, back) = bench.rig.run(TcEgress, pod, &answer.to_bytes());
    assert_eq!(Frame::parse(&back).unwrap(), answer.from(frame.destination));
    out.destination
}

/// The n-th forged source.
fn forged(family: Family, n: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(0x6440_0000 + n).into(),
        Family::V6 => {
            let net = Ipv6Addr::new(0x2001, 0xdb8, 0xf00d, 0, 0, 0, 0, 0);
            Ipv6Addr::from_bits(net.to_bits() | u128::from(n)).into()
        }
    }
}

/// A frame of which every next one has another source. Its checksums are wrong then, which nobody looks at here.
struct Forger {
    family: Family,
    source_at: usize,
    bytes: Vec<u8>,
    made: u32,
}

impl Forger {
    fn new(family: Family, first: u32) -> Self {
        Self {
            family,
            source_at: 14 + if family == Family::V4 { 12 } else { 8 },
            bytes: Vec::new(),
            made: first,
        }
    }

    /// The frame from the next source.
    fn next(&mut self, frame: &[u8]) -> &[u8] {
        self.made += 1;
        self.bytes.clear();
        self.bytes.extend(frame);
        let source = octets(forged(self.family, self.made));
        self.bytes
            .splice(self.source_at..self.source_at + source.len(), source);
        &self.bytes
    }

    fn source(&self) -> IpAddr {
        forged(self.family, self.made)
    }
}

/// One packet of a flood comes in from the network; the frame that went on.
fn comes_in(rig: &Rig, uplink: u32, bytes: &[u8]) -> Option<Frame> {
    let (_, out) = rig.run(TcIngress, uplink, bytes);
    // Only addresses and ports matter.
    Frame::parse_unchecked(&out)
}

/// Floods a frontend from `sources` forged sources with packets of these flags; some are answered as a server would, and
/// send once more without having seen it.
fn flood_tcp(bench: &Bench, w: &World, forger: &mut Forger, sources: u32, flags: u8) {
    let (rig, uplink) = (&bench.rig, bench.network.uplink);
    let frame = Frame::tcp(w.outside, w.balancer, flags);
    let [first, again] = [flags, ACK].map(|flags| frame.with_flags(flags).to_bytes());
    let answer_flags = if flags == SYN { SYN | ACK } else { RST };
    for n in 0..sources {
        let out = comes_in(rig, uplink, forger.next(&first));
        if n % ANSWERED != 0 {
            continue;
        }
        let mut answer = out.expect("it is translated").answer(answer_flags);
        // A server's own number, which the sender does not know.
        answer.numbers[0] = n.wrapping_mul(0x9e37_79b9) | 1 << 31;
        let _went = rig.run(TcEgress, uplink, &answer.to_bytes());
        forger.made -= 1;
        let _went = rig.run(TcIngress, uplink, forger.next(&again));
    }
}

/// Floods a frontend with two datagrams from each source, each pair with an answer between.
fn flood_udp(bench: &Bench, w: &World, forger: &mut Forger, sources: u32) {
    let (rig, uplink) = (&bench.rig, bench.network.uplink);
    let datagram = Frame::udp(w.outside, w.balancer).to_bytes();
    for _ in 0..sources {
        let out = comes_in(rig, uplink, forger.next(&datagram)).expect("it is translated");
        let answer = Frame::udp(out.destination, out.source);
        assert_eq!(out.source.ip(), forger.source());
        let _went = rig.run(TcEgress, uplink, &answer.to_bytes());
        forger.made -= 1;
        let _went = rig.run(TcIngress, uplink, forger.next(&datagram));
    }
}

/// G5: a million forged sources flood a service with SYNs, with bare ACKs and with pairs of datagrams, some answered, while a
/// thousand connections and some streams rest; then these go on. None has moved, although the table has changed meanwhile so
/// that most would now be given another backend.
#[test]
fn floods_evict_no_living_flow() {
    with_setup(&small(4_096), |bench| {
        for (family, sources) in [(Family::V4, 1_000_000), (Family::V6, 50_000)] {
            flood(bench, &world(family), sources);
            bench.rig.clear_flows();
        }
    });
}

fn flood(bench: &mut Bench, w: &World, sources: u32) {
    let backends: Vec<_> = (0..64).map(|n| at_port(w.local, 8_000 + n)).collect();
    let program = |bench: &mut Bench, count: usize| {
        for (protocol, service) in [(Protocol::Tcp, "web"), (Protocol::Udp, "dns")] {
            let port = port(service, protocol, w.family)
                .cluster_ip(w.vip)
                .frontend(
                    svc_lb::compile::desired::FrontendKind::LoadBalancer,
                    w.balancer,
                )
                .local_backends(backends.get(..count).unwrap());
            bench.rig.set(service, vec![port]);
        }
    };
    program(bench, 2);
    let mut living: Vec<_> = (0..CONNECTIONS)
        .map(|n| Living::connection(bench, at_port(w.client, 1_000 + n), w.vip))
        .collect();
    let datagrams: Vec<_> = (0..STREAMS)
        .map(|n| Frame::udp(at_port(w.client, 1_000 + n), w.vip))
        .collect();
    let talk = |bench: &Bench| -> Vec<_> {
        let frames = datagrams.iter();
        frames.map(|frame| to_and_back(bench, frame, 0)).collect()
    };
    let chosen = talk(bench);
    bench.rig.age_datagrams();
    assert_eq!(talk(bench), chosen);
    let streams = datagrams.into_iter().zip(chosen);
    living.extend(streams.map(|(frame, backend)| Living { frame, backend }));
    program(bench, 64);

    let begin = Instant::now();
    let mut forger = Forger::new(w.family, 0);
    flood_tcp(bench, w, &mut forger, sources / 10 * 4, SYN);
    flood_tcp(bench, w, &mut forger, sources / 10 * 3, ACK);
    flood_udp(bench, w, &mut forger, sources / 10 * 3);
    let took = begin.elapsed();
    assert!(took < MOST, "the flood took {took:?}");
    assert_eq!(forger.made, sources);

    let entries = |bench: &Bench, table| {
        let flows = bench.rig.flows().into_iter();
        flows.filter(|flow| flow.table == table).count()
    };
    // Who guesses a number is right once in 2^15 times: of the 8th part that guess, a handful.
    let guessed = sources / 10 * 4 / ANSWERED / 8_192 + 4;
    let established = entries(bench, FlowTable::Established);
    let connections = usize::from(CONNECTIONS);
    let most = 2 * (connections + guessed as usize);
    assert!(
        (2 * connections..=most).contains(&established),
        "{established} entries"
    );
    assert_eq!(entries(bench, FlowTable::Streams), 2 * usize::from(STREAMS));
    for flow in &living {
        flow.goes_on(bench);
    }
}

/// G5, H6: more connections than their map has room for. Those used least recently are evicted, which the estimate tells;
/// each goes on with its next packet all the same, at the same backend while the table stands, and with both entries where
/// one was left. Nobody else is disturbed.
#[test]
fn a_full_map_of_connections() {
    const MANY: u16 = 2_000;
    const ROOM: u32 = 1_024;
    with_setup(&small(ROOM), |bench| {
        let w = world(Family::V4);
        let backends: Vec<_> = (0..9).map(|n| at_port(w.remote, 8_000 + n)).collect();
        bench.program(w.port(Protocol::Tcp).backends(&backends));
        let mut collector = bench.rig.collector(Timeouts::default());
        let mut pass = || {
            let report = loop {
                if let Some(report) = collector.tick(100_000).unwrap() {
                    break report;
                }
            };
            let mut maps = report.maps.into_iter();
            maps.find(|map| map.lru == Lru::Established && map.family == Family::V4)
                .unwrap()
        };
        assert_eq!(pass().evicted, 0);
        let living: Vec<_> = (0..MANY)
            .map(|n| Living::connection(bench, at_port(w.client, 1_000 + n), w.vip))
            .collect();
        let report = pass();
        assert!(report.entries <= u64::from(ROOM));
        assert_eq!(report.evicted, 2 * u64::from(MANY) - report.entries);
        let flows = bench.rig.flows();
        let has = |from: SocketAddr| flows.iter().any(|entry| entry.source == from);
        let forward = living.iter().filter(|flow| has(flow.frame.source)).count();
        let answers = |entry: &&FlowEntry| entry.to_destination.ip() == w.client.ip();
        let reverse = flows.iter().filter(answers).count();
        println!("{forward} forward and {reverse} reverse entries are left");
        let entries = u32::try_from(forward + reverse).unwrap();
        assert!((ROOM / 2..=ROOM).contains(&entries), "{entries} entries");
        // Entries a second old are refreshed with their other one.
        thread::sleep(Duration::from_millis(1_100));
        for flow in &living {
            flow.goes_on(bench);
        }
    });
}
