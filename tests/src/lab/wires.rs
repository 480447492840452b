//! What may pass the lab's wires while outside clients and pods use services: no address where it does not belong,
//! no wrong checksum.
//!
//! Towards clients a frontend's address is all there is; between the nodes a client's address means nothing; a
//! ClusterIP leaves a node only for the client that asked for it. One rule for all scenarios without connections that
//! go around the services.

use std::fmt;
use std::net::IpAddr;

use anyhow::Result;

use super::addresses::{BRIDGED, DualNet, EXTERNAL, LB_POOL, NODE_A, NODE_B, OUTSIDE, SERVICES};
use super::capture::{Capture, Seen};
use super::overlay;
use super::topology::{Lab, NodeName, Pod, UPLINK};

/// Captures on all wires of a lab.
#[derive(Debug)]
pub struct Wires<'a> {
    lab: &'a Lab,
    taps: Vec<(Wire<'a>, Capture)>,
}

/// A place where packets are seen.
#[derive(Debug, Clone, Copy)]
enum Wire<'a> {
    /// An outside client's.
    Client,
    /// Between the network and a node.
    Node(NodeName),
    /// The overlay's interface of node-a.
    Overlay,
    /// A pod's.
    Pod(&'a Pod),
}

/// Whose address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Client,
    /// Of no machine: a frontend's.
    Virtual,
    Node(NodeName),
    Pod(NodeName),
}

impl fmt::Display for Wire<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client => f.write_str("a client's wire"),
            Self::Node(name) => write!(f, "the wire of {}", name.as_str()),
            Self::Overlay => write!(f, "{}", overlay::INTERFACE),
            Self::Pod(pod) => write!(f, "the wire of pod {}", pod.name()),
        }
    }
}

impl<'a> Wires<'a> {
    /// Starts to watch.
    pub fn watch(lab: &'a Lab) -> Result<Self> {
        let mut taps = vec![(
            Wire::Node(NodeName::A),
            Capture::start(lab.router(), NodeName::A.as_str())?,
        )];
        if lab.has_node_b() {
            let port = Capture::start(lab.router(), NodeName::B.as_str())?;
            taps.push((Wire::Node(NodeName::B), port));
        }
        if lab.has_overlay() {
            let capture = Capture::start(lab.node_a(), overlay::INTERFACE)?;
            taps.push((Wire::Overlay, capture));
        }
        for client in lab.clients() {
            taps.push((Wire::Client, Capture::start(client.ns(), UPLINK)?));
        }
        for pod in lab.pods() {
            taps.push((Wire::Pod(pod), Capture::start(pod.ns(), UPLINK)?));
        }
        Ok(Self { lab, taps })
    }

    /// Ends it.
    ///
    /// # Panics
    /// If a packet was where it does not belong, or if there was none at all.
    pub fn check(self) {
        let Self { lab, taps } = self;
        let mut packets = 0;
        for (wire, capture) in taps {
            let seen = match capture.stop() {
                Ok(seen) => seen,
                Err(error) => panic!("{wire}: {error:#}"),
            };
            for packet in seen.iter().filter(|seen| has_ports(seen)) {
                let (Some(from), Some(to)) =
                    (whose(lab, packet.from.ip()), whose(lab, packet.to.ip()))
                else {
                    continue;
                };
                packets += 1;
                assert!(
                    belongs(wire, packet, from, to) || belongs(wire, packet, to, from),
                    "{wire}: {from:?} -> {to:?} does not belong there: {packet:?}"
                );
                assert!(
                    packet.checksums_ok || !computed(wire),
                    "{wire}: wrong checksum: {packet:?}"
                );
            }
        }
        assert!(packets > 0, "nothing was sent");
    }
}

fn has_ports(seen: &Seen) -> bool {
    matches!(seen.protocol, 6 | 17)
}

/// Whether checksums are complete there. A pod's own packets leave it without, and what a driver has merged (GRO, which
/// native XDP brings on a veth) has none either.
fn computed(wire: Wire<'_>) -> bool {
    matches!(wire, Wire::Client | Wire::Node(NodeName::B))
}

/// Nobody's: multicast, link-local, the router.
fn whose(lab: &Lab, address: IpAddr) -> Option<Whose> {
    let within = |net: DualNet| net.contains(address);
    if let Some(pod) = lab.pods().find(|pod| pod.addr().contains(address)) {
        return Some(Whose::Pod(pod.node()));
    }
    let node_a = [NODE_A, BRIDGED.nth(1), overlay::ADDRESS_A];
    if node_a.iter().any(|own| own.contains(address)) {
        return Some(Whose::Node(NodeName::A));
    }
    if [NODE_B, overlay::ADDRESS_B]
        .iter()
        .any(|own| own.contains(address))
    {
        return Some(Whose::Node(NodeName::B));
    }
    if within(OUTSIDE) {
        return Some(Whose::Client);
    }
    [SERVICES, LB_POOL, EXTERNAL]
        .into_iter()
        .any(within)
        .then_some(Whose::Virtual)
}

/// Whether packets between `one` and `other` may be there, one way; who asks tries both.
fn belongs(wire: Wire<'_>, packet: &Seen, one: Whose, other: Whose) -> bool {
    use NodeName::{A, B};
    let frontend = matches!(other, Whose::Virtual | Whose::Node(A));
    match wire {
        Wire::Client => one == Whose::Client && frontend,
        Wire::Node(node) => match one {
            Whose::Client => node == A && frontend,
            // To a backend as this node, as the pod itself, or as a client of frontends here.
            Whose::Pod(B) => frontend || other == Whose::Pod(A),
            // The overlay's own packets.
            Whose::Node(B) => other == Whose::Node(A),
            Whose::Virtual | Whose::Node(A) | Whose::Pod(A) => false,
        },
        Wire::Overlay => one == Whose::Pod(B) && matches!(other, Whose::Node(A) | Whose::Pod(A)),
        Wire::Pod(pod) => {
            let own = pod.addr().contains(packet.from.ip()) || pod.addr().contains(packet.to.ip());
            own && (pod.node() == A || other != Whose::Client && one != Whose::Client)
        }
    }
}
