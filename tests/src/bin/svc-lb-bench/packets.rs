//! The programs alone: what a packet of each kind costs.
//!
//! Frames of 64 bytes (IPv6: 80), one service with 512 backends, maps of their default sizes' order, the kernel's own
//! routes. Each case checks by the counters that the packets met what its name says.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use svc_lb::compile::desired::DesiredPort;
use svc_lb::dataplane::clock::jiffies_per_second;
use svc_lb::dataplane::map_name;
use svc_lb_common::config::Config;
use svc_lb_common::conntrack::flow;
use svc_lb_common::limits::name;
use svc_lb_common::outcome::{Event, Hook, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::frame::flags::{ACK, SYN};
use svc_lb_tests::prog::network::{self, STRANGER, UPLINK, XDP_BACKENDS, XDP_CLIENTS, XDP_UPLINK};
use svc_lb_tests::prog::replay::Replay;
use svc_lb_tests::prog::rig::{Count, Setup};
use svc_lb_tests::prog::tables::{Describe as _, port};
use svc_lb_tests::prog::{Frame, Network, Rig};

use crate::figures::{Figure, Round};

/// Frames that a case may have.
const MOST: u32 = 1 << 20;
/// Entries of each map of flows, two to a flow: what katran and Cilium were measured with (PEERS), and what holds a
/// million flows.
const ENTRIES: u32 = 1 << 19;
const MANY_ENTRIES: u32 = 5 << 19;
/// Backends: each has 4,536 ports of translated sources, and a search that must try twice is another case.
const BACKENDS: u32 = 512;
const NODE_PORT: u16 = 30_080;
/// Number of the ClusterIP in its range, behind those of the other services.
const CLUSTER_IP: u32 = 40_000;
/// Packets of a round: some milliseconds, so that most rounds are not interrupted.
const RUNS: u32 = 10_000;
/// New flows of a round: of each there is one.
const NEW: u32 = 5_000;

/// Where a packet is met.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum At {
    /// At the uplink, from an outside client to a NodePort and on to another node.
    Xdp,
    /// The same at tc.
    Tc,
    /// At a pod's interface, from a pod to a ClusterIP and on to a pod here.
    Pod,
}

impl At {
    /// Where clients' packets are met.
    const fn hook(self) -> Hook {
        match self {
            Self::Xdp => Hook::XdpIngress,
            Self::Tc | Self::Pod => Hook::TcIngress,
        }
    }

    /// Where the answers are.
    const fn answers(self) -> Hook {
        match self {
            Self::Xdp => Hook::XdpIngress,
            Self::Tc => Hook::TcIngress,
            Self::Pod => Hook::TcEgress,
        }
    }

    const fn interface(self, network: &Network) -> u32 {
        match self {
            Self::Xdp => network.xdp_uplink,
            Self::Tc => network.uplink,
            Self::Pod => network.pod,
        }
    }

    /// What becomes of a confirmed flow's packets, and of its answers.
    const fn outcomes(self) -> [Outcome; 2] {
        match self {
            Self::Xdp | Self::Tc => [Outcome::ForwardRemote, Outcome::ReverseRemote],
            Self::Pod => [Outcome::Forward, Outcome::Reverse],
        }
    }

    /// What becomes of the packet that confirms a flow.
    const fn confirms(self) -> Outcome {
        match self {
            Self::Xdp | Self::Tc => Outcome::ForwardRemote,
            Self::Pod => Outcome::ForwardOpening,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
            Self::Pod => "pod",
        }
    }
}

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Only cases whose name contains this.
    pub(crate) only: String,
    /// Rounds of each case.
    pub(crate) rounds: usize,
}

/// Measures every case that is wanted.
pub(crate) fn run(options: &Options) -> Vec<Figure> {
    let mut figures = Vec::new();
    for at in [At::Xdp, At::Tc, At::Pod] {
        for family in [Family::V4, Family::V6] {
            let mut measure = |entries, cases: &(dyn Fn(&mut Bench<'_>) + Sync)| {
                let some = network::private(|network| {
                    let mut bench = Bench::new(*network, at, family, entries, options);
                    cases(&mut bench);
                    bench.figures
                });
                figures.extend(some);
            };
            measure(ENTRIES, &|bench| bench.cases());
            if at != At::Pod && family == Family::V4 {
                measure(MANY_ENTRIES, &|bench| bench.a_million());
            }
        }
    }
    figures
}

struct Bench<'a> {
    rig: Rig,
    /// Before the program that clients' packets meet, and before the one that answers do.
    replay: Replay,
    answer: Replay,
    network: Network,
    at: At,
    family: Family,
    options: &'a Options,
    figures: Vec<Figure>,
}

impl<'a> Bench<'a> {
    fn new(network: Network, at: At, family: Family, entries: u32, options: &'a Options) -> Self {
        let plain = Setup::default();
        let flows =
            [name::OPENING, name::ESTABLISHED, name::STREAMS].map(|names| map_name(names, family));
        let sizes = flows.map(|name| (name, entries)).into_iter().chain([
            (name::GUARD, 1 << 16),
            (name::SERVICES, 1 << 14),
            (name::SLOTS, 1 << 16),
            (map_name(name::FRONTENDS, family), 1 << 15),
            (map_name(name::BACKENDS, family), 1 << 16),
        ]);
        let setup = Setup {
            config: Config {
                hz: jiffies_per_second().expect("the kernel's clock is known"),
                // No reject is one too many here.
                generate_rate: 1 << 30,
                generate_burst: 1 << 30,
                ..plain.config
            },
            sizes: sizes.collect(),
            ..plain
        };
        let mut rig = Rig::with(&network, &setup);
        rig.planner
            .set_node_addresses([node(Family::V4), node(Family::V6)]);
        let outs = [UPLINK, XDP_UPLINK, STRANGER].map(|out| out.sources);
        rig.planner.set_sources(outs.into_iter().flatten());
        rig.apply();
        let replay = Replay::new(&rig, at.hook(), MOST);
        let answer = Replay::new(&rig, at.answers(), MOST);
        Self {
            rig,
            replay,
            answer,
            network,
            at,
            family,
            options,
            figures: Vec::new(),
        }
    }

    fn cases(&mut self) {
        self.program(1);
        self.case("not ours", |bench| {
            let frames = [bench.frame(0, bench.stranger(), Protocol::Tcp, ACK)];
            bench.replay.frames(&frames);
            bench.repeat(RUNS, Expected::Ignored)
        });
        for flows in [1, 16_384, 131_072] {
            self.established(flows);
        }
        for flows in [1, 16_384] {
            self.case(
                &format!("established UDP, {} flows", count(flows)),
                |bench| {
                    bench.open(flows, Protocol::Udp);
                    bench.repeat(RUNS, Expected::Outcome(bench.at.outcomes()[0]))
                },
            );
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            self.case(&format!("new flow {protocol}"), |bench| {
                bench.rig.clear_flows();
                let frames = bench.frames(bench.once(), bench.frontend(), protocol, SYN);
                bench.replay.frames(&frames);
                bench.repeat(NEW, Expected::Outcome(Outcome::Open))
            });
        }
        self.case("packet that confirms TCP", |bench| {
            bench.rig.clear_flows();
            let flows = bench.once().min(ENTRIES / 2);
            bench.begin(flows, Protocol::Tcp);
            let frames = bench.frames(flows, bench.frontend(), Protocol::Tcp, ACK);
            bench.replay.frames(&frames);
            let runs = flows / u32::try_from(bench.options.rounds).expect("counted");
            bench.repeat(runs, Expected::Outcome(bench.at.confirms()))
        });
        self.case("established TCP, 16 k flows, 10 k services", |bench| {
            bench.program(10_000);
            bench.open(16_384, Protocol::Tcp);
            bench.repeat(RUNS, Expected::Outcome(bench.at.outcomes()[0]))
        });
        self.case("reject", |bench| {
            let at = SocketAddr::new(node(bench.family), NODE_PORT + 1);
            let port = port("nobody", Protocol::Tcp, bench.family).node_port(NODE_PORT + 1);
            bench.rig.set("nobody", vec![port]);
            bench.rig.clear_flows();
            let frames = [bench.frame(0, at, Protocol::Tcp, SYN)];
            bench.replay.frames(&frames);
            bench.repeat(NEW, Expected::Outcome(Outcome::Rejected))
        });
    }

    fn a_million(&mut self) {
        self.program(1);
        self.established(1_000_000);
    }

    /// Packets of TCP connections both ways.
    fn established(&mut self, flows: u32) {
        let many = count(flows);
        self.case(&format!("established TCP, {many} flows"), |bench| {
            bench.open(flows, Protocol::Tcp);
            bench.repeat(RUNS, Expected::Outcome(bench.at.outcomes()[0]))
        });
        self.case(&format!("answer TCP, {many} flows"), |bench| {
            bench.open(flows, Protocol::Tcp);
            let answers = bench.answers(flows, Protocol::Tcp, ACK);
            bench.answer.frames(&answers);
            bench.repeat_answers(RUNS)
        });
    }

    /// Measures one case if it is wanted.
    fn case(&mut self, name: &str, rounds: impl FnOnce(&mut Self) -> Vec<Round>) {
        let name = format!("{} {} {name}", self.at.name(), self.family);
        if !name.contains(&self.options.only) {
            return;
        }
        let rounds = rounds(self);
        let figure = Figure::new(name, &rounds);
        eprintln!("  {:44} {:8.1} ns", figure.case, figure.median);
        self.figures.push(figure);
    }

    /// Rounds of so many of the clients' packets each.
    fn repeat(&mut self, runs: u32, expected: Expected) -> Vec<Round> {
        let hook = self.at.hook();
        self.count(hook, runs, expected, |bench| &mut bench.replay)
    }

    /// Rounds of so many answers each.
    fn repeat_answers(&mut self, runs: u32) -> Vec<Round> {
        let [_, outcome] = self.at.outcomes();
        let hook = self.at.answers();
        self.count(hook, runs, Expected::Outcome(outcome), |bench| {
            &mut bench.answer
        })
    }

    /// Rounds of one replay, in turn with its own cost alone, first one and then the other.
    fn count(
        &mut self,
        hook: Hook,
        runs: u32,
        expected: Expected,
        of: impl Fn(&mut Self) -> &mut Replay,
    ) -> Vec<Round> {
        let interface = self.at.interface(&self.network);
        let before = self.rig.counters();
        let rounds = self.options.rounds;
        let replay = of(self);
        let rounds: Vec<_> = (0..rounds)
            .map(|round| {
                if round % 2 == 0 {
                    let tested = nanoseconds(replay.run(interface, runs));
                    let empty = nanoseconds(replay.run_empty(interface, runs));
                    Round { tested, empty }
                } else {
                    let empty = nanoseconds(replay.run_empty(interface, runs));
                    let tested = nanoseconds(replay.run(interface, runs));
                    Round { tested, empty }
                }
            })
            .collect();
        let counted = self.rig.counters().since(&before);
        let packets = u64::from(runs) * rounds.len() as u64;
        match expected {
            Expected::Ignored => {
                assert_eq!(counted.iter().count(), 0, "not ignored: {counted:?}");
            }
            Expected::Outcome(outcome) => {
                let met = counted.get(Count::Outcome(hook, outcome));
                assert!(
                    met >= packets - packets / 1_000,
                    "{met} of {packets} packets were {}: {counted:?}",
                    outcome.name()
                );
            }
        }
        rounds
    }

    /// Programs one NodePort with all backends, and so many services in all.
    fn program(&mut self, services: u32) {
        let backends: Vec<_> = (0..BACKENDS).map(|n| backend(self.family, n)).collect();
        let of = |protocol| {
            let port = port("web", protocol, self.family).node_port(NODE_PORT);
            match self.at {
                At::Xdp | At::Tc => port.backends(&backends),
                At::Pod => port.cluster_ip(self.frontend()).local_backends(&backends),
            }
        };
        self.rig
            .set("web", vec![of(Protocol::Tcp), of(Protocol::Udp)]);
        for n in 1..services {
            let at = SocketAddr::new(nth(service_net(self.family), n), 80);
            let port: DesiredPort = port("other", Protocol::Tcp, self.family)
                .cluster_ip(at)
                .backends(&[backend(self.family, n % BACKENDS)]);
            self.rig.set(&format!("other-{n}"), vec![port]);
        }
    }

    fn frontend(&self) -> SocketAddr {
        match self.at {
            At::Xdp | At::Tc => SocketAddr::new(node(self.family), NODE_PORT),
            At::Pod => SocketAddr::new(nth(service_net(self.family), CLUSTER_IP), 80),
        }
    }

    /// As many flows as there are packets in all rounds.
    fn once(&self) -> u32 {
        let rounds = u32::try_from(self.options.rounds).expect("counted");
        (NEW * rounds).min(MOST)
    }

    /// An address that no map knows.
    fn stranger(&self) -> SocketAddr {
        let at: IpAddr = match self.family {
            Family::V4 => Ipv4Addr::new(203, 0, 113, 77).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 0x77).into(),
        };
        SocketAddr::new(at, 80)
    }

    fn frames(&self, count: u32, to: SocketAddr, protocol: Protocol, flags: u8) -> Vec<Frame> {
        (0..count)
            .map(|n| self.frame(n, to, protocol, flags))
            .collect()
    }

    /// A packet of client `n`.
    fn frame(&self, n: u32, to: SocketAddr, protocol: Protocol, flags: u8) -> Frame {
        let port = 1_024 + u16::try_from(n % 50_000).expect("a port");
        let from = SocketAddr::new(nth(of(self.family, XDP_CLIENTS), n / 16 + 1), port);
        whole(protocol, from, to, flags)
    }

    /// Opens flows of as many clients, has them answered, and confirms them; leaves the clients' packets as what is
    /// replayed.
    fn open(&mut self, flows: u32, protocol: Protocol) {
        self.rig.clear_flows();
        let before = self.rig.counters();
        self.begin(flows, protocol);
        if protocol == Protocol::Udp {
            self.rig.age_datagrams();
        }
        let frames = self.frames(flows, self.frontend(), protocol, ACK);
        self.replay.frames(&frames);
        let _duration = self.replay.run(self.at.interface(&self.network), flows);
        let counted = self.rig.counters().since(&before);
        let confirmed = counted.get(Count::Event(Event::Promoted));
        let wanted = u64::from(flows);
        assert!(
            confirmed >= wanted - wanted / 1_000,
            "{confirmed} of {flows} flows were confirmed: {counted:?}"
        );
    }

    /// Opens flows and has them answered.
    fn begin(&mut self, flows: u32, protocol: Protocol) {
        let interface = self.at.interface(&self.network);
        let frames = self.frames(flows, self.frontend(), protocol, SYN);
        self.replay.frames(&frames);
        let _duration = self.replay.run(interface, flows);
        let answers = self.answers(flows, protocol, SYN | ACK);
        self.answer.frames(&answers);
        let answers = u32::try_from(answers.len()).expect("counted");
        let _duration = self.answer.run(interface, answers);
    }

    /// The backends' answers to the flows there are.
    fn answers(&self, flows: u32, protocol: Protocol, flags: u8) -> Vec<Frame> {
        let reverse =
            self.rig.flows().into_iter().filter(|entry| {
                entry.traits & flow::REVERSE != 0 && entry.protocol == protocol as u8
            });
        let frame = |from, to| {
            let mut frame = whole(protocol, from, to, flags);
            // From where the clients' packets acknowledge.
            let [sent, expected] = frame.numbers;
            frame.numbers = [expected, sent];
            frame
        };
        let frames: Vec<_> = reverse
            .map(|entry| frame(entry.source, entry.destination))
            .take(flows as usize)
            .collect();
        assert!(
            frames.len() >= flows as usize - flows as usize / 1_000,
            "{} flows",
            frames.len()
        );
        frames
    }
}

/// A round's nanoseconds a packet.
#[expect(clippy::cast_precision_loss, reason = "nanoseconds a packet are few")]
fn nanoseconds(duration: std::time::Duration) -> f64 {
    duration.as_nanos() as f64
}

/// What a case's packets must meet.
#[derive(Clone, Copy, Debug)]
enum Expected {
    Ignored,
    Outcome(Outcome),
}

/// A frame of 64 bytes, IPv6: 80.
fn whole(protocol: Protocol, from: SocketAddr, to: SocketAddr, flags: u8) -> Frame {
    let mut frame = match protocol {
        Protocol::Udp => Frame::udp(from, to),
        Protocol::Tcp | Protocol::Sctp => Frame::tcp(from, to, flags),
    };
    let wanted = if from.is_ipv4() { 64 } else { 80 };
    frame.payload.clear();
    let missing = wanted - frame.to_bytes().len();
    frame.payload = vec![0x2a; missing];
    frame
}

/// One family's of a pair, IPv4's first.
fn of(family: Family, [v4, v6]: [IpAddr; 2]) -> IpAddr {
    match family {
        Family::V4 => v4,
        Family::V6 => v6,
    }
}

fn node(family: Family) -> IpAddr {
    of(family, XDP_UPLINK.sources)
}

fn backend(family: Family, n: u32) -> SocketAddr {
    SocketAddr::new(nth(of(family, XDP_BACKENDS), 256 + n), 8_080)
}

/// Where ClusterIPs lie on the bench.
fn service_net(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, 0).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0).into(),
    }
}

fn nth(net: IpAddr, host: u32) -> IpAddr {
    match net {
        IpAddr::V4(net) => Ipv4Addr::from(u32::from(net) + host).into(),
        IpAddr::V6(net) => Ipv6Addr::from(u128::from(net) + u128::from(host)).into(),
    }
}

fn count(flows: u32) -> String {
    match flows {
        0..1_000 => flows.to_string(),
        1_000..1_000_000 => format!("{} k", flows / 1_000),
        _ => format!("{} M", flows / 1_000_000),
    }
}
