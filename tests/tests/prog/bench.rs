//! What the fixtures share: a small world, and a packet's run with all that came of it.

use std::net::SocketAddr;

use svc_lb::compile::desired::DesiredPort;
use svc_lb_common::outcome::{Event, Fate, Hook, Outcome};
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::lab::privileged;
use svc_lb_tests::prog::network::{STRANGER, UPLINK, XDP_UPLINK};
use svc_lb_tests::prog::rig::{Count, Counters, Setup};
use svc_lb_tests::prog::tables::{Describe as _, at, port};
use svc_lb_tests::prog::{Frame, Network, Rig, Verdict, network};

pub(crate) use svc_lb_common::outcome::Hook::{TcEgress, TcIngress, XdpIngress};
pub(crate) use svc_lb_tests::prog::frame::flags::{ACK, FIN, PSH, RST, SYN};

/// Both families.
pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The addresses of one family that the fixtures use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    pub(crate) family: Family,
    /// A pod's socket.
    pub(crate) client: SocketAddr,
    /// A socket outside of the node.
    pub(crate) outside: SocketAddr,
    /// ClusterIPs of different services.
    pub(crate) vip: SocketAddr,
    pub(crate) other_vip: SocketAddr,
    /// A load balancer's address.
    pub(crate) balancer: SocketAddr,
    /// An external IP.
    pub(crate) external: SocketAddr,
    /// The node's address; its port is that of a NodePort.
    pub(crate) node: SocketAddr,
    /// A backend on this node, and one elsewhere.
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
}

/// The world of one family.
pub(crate) fn world(family: Family) -> World {
    let pick = |v4: &str, v6: &str| match family {
        Family::V4 => at(v4),
        Family::V6 => at(v6),
    };
    World {
        family,
        client: pick("10.244.1.5:40000", "[fd00:10:244:1::5]:40000"),
        outside: pick("203.0.113.9:51000", "[2001:db8:9::9]:51000"),
        vip: pick("10.96.0.10:80", "[fd00:10:96::a]:80"),
        other_vip: pick("10.96.0.11:80", "[fd00:10:96::b]:80"),
        balancer: pick("198.51.100.10:80", "[2001:db8:5::10]:80"),
        external: pick("198.51.100.20:80", "[2001:db8:5::20]:80"),
        node: pick("192.0.2.1:30080", "[2001:db8:2::1]:30080"),
        local: pick("10.244.1.7:8080", "[fd00:10:244:1::7]:8080"),
        remote: pick("10.244.2.8:8080", "[fd00:10:244:2::8]:8080"),
    }
}

impl World {
    /// A service port of this family behind its ClusterIP.
    pub(crate) fn port(&self, protocol: Protocol) -> DesiredPort {
        port("web", protocol, self.family).cluster_ip(self.vip)
    }
}

/// Runs a test on loaded programs.
pub(crate) fn on_bench(test: impl FnOnce(&mut Bench) + Send) {
    with_setup(&Setup::default(), test);
}

/// Runs a test on programs loaded as `setup` says.
pub(crate) fn with_setup(setup: &Setup, test: impl FnOnce(&mut Bench) + Send) {
    if !privileged() {
        return;
    }
    network::private(|network| {
        let mut rig = Rig::with(network, setup);
        rig.planner
            .set_node_addresses(FAMILIES.map(|family| world(family).node.ip()));
        let outs = [UPLINK, XDP_UPLINK, STRANGER].map(|out| out.sources);
        rig.planner.set_sources(outs.into_iter().flatten());
        rig.apply();
        test(&mut Bench {
            rig,
            network: *network,
        });
    });
}

/// Runs a test for each family.
pub(crate) fn for_families(test: impl Fn(&mut Bench, &World) + Sync) {
    on_bench(|bench| {
        for family in FAMILIES {
            test(bench, &world(family));
            bench.rig.clear_flows();
        }
    });
}

/// Programs, interfaces.
pub(crate) struct Bench {
    pub(crate) rig: Rig,
    pub(crate) network: Network,
}

/// What came of a packet.
#[derive(Debug)]
pub(crate) struct Ran {
    hook: Hook,
    pub(crate) sent: Frame,
    pub(crate) verdict: Verdict,
    pub(crate) bytes: Vec<u8>,
    pub(crate) counted: Counters,
}

impl Bench {
    /// Programs the only port of the service "web".
    pub(crate) fn program(&mut self, port: DesiredPort) {
        self.rig.set("web", vec![port]);
    }

    /// Runs a hook's program on a frame at an interface.
    pub(crate) fn run(&mut self, hook: Hook, interface: u32, frame: &Frame) -> Ran {
        let before = self.rig.counters();
        let (verdict, bytes) = self.rig.run(hook, interface, &frame.to_bytes());
        Ran {
            hook,
            sent: frame.clone(),
            verdict,
            bytes,
            counted: self.rig.counters().since(&before),
        }
    }

    /// A frame comes in from the routed pod.
    pub(crate) fn pod_sends(&mut self, frame: &Frame) -> Ran {
        self.run(TcIngress, self.network.pod, frame)
    }

    /// A frame leaves towards the routed pod.
    pub(crate) fn pod_gets(&mut self, frame: &Frame) -> Ran {
        self.run(TcEgress, self.network.pod, frame)
    }

    /// A frame comes in from the network.
    pub(crate) fn outside_sends(&mut self, frame: &Frame) -> Ran {
        self.run(TcIngress, self.network.uplink, frame)
    }

    /// A frame leaves towards the network.
    pub(crate) fn outside_gets(&mut self, frame: &Frame) -> Ran {
        self.run(TcEgress, self.network.uplink, frame)
    }

    /// Opens a flow from the routed pod and answers it; returns the translated first frame.
    pub(crate) fn open(&mut self, frame: &Frame) -> Frame {
        let out = self.pod_sends(frame).opened();
        let answer = out.answer(SYN | ACK);
        let _answered = self.pod_gets(&answer).translated(Outcome::Reverse, &[]);
        out
    }
}

impl Ran {
    /// The outcome was counted once, these events once each, and nothing else.
    pub(crate) fn counted(&self, outcome: Outcome, events: &[Event]) {
        let mut expected = Counters::default();
        if outcome != Outcome::NotOurs {
            expected.add(Count::Outcome(self.hook, outcome), 1);
        }
        for event in events {
            expected.add(Count::Event(*event), 1);
        }
        assert_eq!(self.counted, expected, "{self:x?}");
    }

    /// It went on, a different frame with every length and checksum right; that frame.
    pub(crate) fn translated(&self, outcome: Outcome, events: &[Event]) -> Frame {
        self.counted(outcome, events);
        assert_eq!(self.verdict, Verdict::On, "{self:x?}");
        let out = self.parsed();
        assert_ne!(out, self.sent, "nothing was translated");
        out
    }

    /// It opened a flow and went on translated.
    pub(crate) fn opened(&self) -> Frame {
        self.translated(Outcome::Open, &[])
    }

    /// The frame that came out, every length and checksum of which is right.
    pub(crate) fn parsed(&self) -> Frame {
        Frame::parse(&self.bytes).unwrap_or_else(|| panic!("not well-formed: {self:x?}"))
    }

    /// It went on as exactly this frame.
    pub(crate) fn became(&self, outcome: Outcome, frame: &Frame) {
        self.counted(outcome, &[]);
        assert_eq!(self.verdict, Verdict::On, "{self:x?}");
        assert_eq!(
            self.bytes,
            frame.to_bytes(),
            "{:x?}\nexpected {frame:x?}",
            self.parsed()
        );
    }

    /// It went on as it was.
    pub(crate) fn passed(&self, outcome: Outcome) {
        assert_eq!(outcome.fate(), Fate::Pass);
        self.became(outcome, &self.sent);
    }

    /// It was left alone, and not even counted.
    pub(crate) fn ignored(&self) {
        self.passed(Outcome::NotOurs);
    }

    /// It was dropped.
    pub(crate) fn dropped(&self, outcome: Outcome) {
        self.counted(outcome, &[]);
        assert_eq!(self.verdict, Verdict::Dropped, "{self:x?}");
    }

    /// It went back as exactly these bytes.
    pub(crate) fn returned(&self, outcome: Outcome, bytes: &[u8]) {
        self.counted(outcome, &[]);
        assert_eq!(self.verdict, Verdict::Back, "{self:x?}");
        assert_eq!(self.bytes, bytes, "{self:x?}");
    }
}
