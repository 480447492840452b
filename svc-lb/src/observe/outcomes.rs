//! What to do about each outcome: the last column of `docs/outcomes.md`, which is written from here and from the list
//! itself.

use std::fmt::Write as _;

use svc_lb_common::outcome::{Event, Fate, Outcome};

/// What an operator does about packets with an outcome, by outcome; a test misses those that are forgotten.
const ADVICE: &[(&[Outcome], &str)] = &[
    (
        &[
            Outcome::NotOurs,
            Outcome::NotIp,
            Outcome::Vlan,
            Outcome::Forward,
            Outcome::ForwardOpening,
            Outcome::Open,
            Outcome::Reverse,
            Outcome::Hairpin,
            Outcome::HairpinReverse,
            Outcome::ForwardRemote,
            Outcome::ReverseRemote,
            Outcome::OtherProtocol,
            Outcome::IcmpError,
            Outcome::IcmpRedirect,
        ],
        "Nothing.",
    ),
    (
        &[Outcome::NoFrontend],
        "Nothing, unless clients complain: then the Service has no such port, or is not programmed; see `svc-lb status --services`.",
    ),
    (
        &[Outcome::Malformed],
        "Look for the sender with tcpdump; many of them are a broken device or an attack.",
    ),
    (
        &[Outcome::Rejected],
        "A Service without a ready endpoint, or a port that it does not have: look at its pods' readiness and at `svc-lb dump services`.",
    ),
    (
        &[Outcome::RejectLimited, Outcome::RejectSilent],
        "As for `rejected`; clients wait for their timeouts instead of being refused at once.",
    ),
    (
        &[Outcome::NoLocalEndpoint],
        "A load balancer sends to a node without a local endpoint: let it check healthCheckNodePort, or set the policy to Cluster.",
    ),
    (
        &[Outcome::Unallocated],
        "Clients use the address of a Service that is gone, or scan: find them with tcpdump.",
    ),
    (
        &[Outcome::Untranslated],
        "A client whose interface has no program yet: if it goes on, `svc-lb status` must list its interface as an edge.",
    ),
    (
        &[Outcome::Fragment],
        "Fragments come out of order, or their first was dropped: look at the other outcomes of its sender; smaller datagrams need no fragments.",
    ),
    (
        &[Outcome::FragmentToStack],
        "Nothing: the stack puts together what is the node's own.",
    ),
    (
        &[Outcome::FragmentSctp],
        "Let port and targetPort of the SCTP Service be the same, or lower the MTU of its clients' associations.",
    ),
    (
        &[Outcome::PortsExhausted],
        "Widen --snat-ports, or give the Service more backends: each has a range of its own.",
    ),
    (
        &[Outcome::FlowInsert],
        "The kernel is out of memory: look at `free` and the node's limits.",
    ),
    (
        &[Outcome::TtlExceeded, Outcome::TimeExceeded],
        "traceroute does this; in number it is a routing loop: look at `ip route`.",
    ),
    (
        &[Outcome::RewriteFailed],
        "Report it, with the kernel's version and the interface's driver.",
    ),
    (
        &[Outcome::BadBackend],
        "The agent repairs damaged maps; if it goes on, report it with `svc-lb dump services`.",
    ),
    (
        &[Outcome::SourceRange],
        "Somebody outside loadBalancerSourceRanges; add the client's address if it ought to be served.",
    ),
    (
        &[Outcome::Martian],
        "Find the sender with tcpdump: no packet may have such a source.",
    ),
    (
        &[Outcome::LeftToTc],
        "Nothing; if all packets do it, XDP has no use here: `svc-lb check` says why.",
    ),
    (
        &[Outcome::NoRoute],
        "The node has no route to the backend, or forwarding is off: look at `ip route get` and `sysctl net.ipv4.ip_forward`.",
    ),
    (
        &[Outcome::NoSource],
        "The interface towards the backend has no address of the flow's family that clients' sources could become: give it one.",
    ),
    (
        &[Outcome::TooBig],
        "Nothing while clients heed ICMP; else somebody drops ICMP between them and here, or MTUs differ.",
    ),
    (
        &[Outcome::Reset],
        "A backend pod went with its connections, and clients are told so: nothing, unless pods vanish that should not.",
    ),
];

/// What an event means and asks for, by event; a test misses those that are forgotten.
const EVENTS: &[(Event, &str)] = &[
    (
        Event::PortTranslated,
        "A flow's source port was translated because its tuple behind the frontend was taken. Nothing to do.",
    ),
    (
        Event::Promoted,
        "A flow moved from `opening` to `established` or `streams`. Nothing to do.",
    ),
    (
        Event::Moved,
        "A UDP flow moved because its backend no longer serves. Nothing to do.",
    ),
    (
        Event::CheckMismatch,
        "An entry was reused while it was read, and treated as a miss. In number: the flow maps are full, enlarge them.",
    ),
    (
        Event::Clash,
        "A direct connection to a backend took the tuple of a live flow. Rare; clients that do it often should use one way only.",
    ),
    (
        Event::Mended,
        "A flow's entry was made again after it had been evicted. In number: the flow maps are full, enlarge them.",
    ),
    (
        Event::SocketTranslated,
        "A socket was given a backend: its packets meet no program that translates. Nothing to do.",
    ),
    (
        Event::SocketRefused,
        "A socket was refused as nothing serves there: look at the Service's endpoints, as for `rejected`.",
    ),
    (
        Event::SocketLeft,
        "A socket was left to the packet path: affinity or source ranges need the client's address, or silence is right. Nothing to do.",
    ),
    (
        Event::SocketMoved,
        "A UDP socket's datagrams moved because their backend no longer serves. Nothing to do.",
    ),
    (
        Event::SocketForgotten,
        "There was no memory to remember a socket, which the packet path serves instead: enlarge the map `sockets4` or `sockets6`.",
    ),
];

/// What an operator does about packets with this outcome.
#[must_use]
pub fn advice(outcome: Outcome) -> Option<&'static str> {
    let entry = ADVICE.iter().find(|(of, _)| of.contains(&outcome));
    entry.map(|(_, advice)| *advice)
}

/// What an event means and asks for.
#[must_use]
pub fn event(event: Event) -> Option<&'static str> {
    let entry = EVENTS.iter().find(|(of, _)| *of == event);
    entry.map(|(_, meaning)| *meaning)
}

/// `docs/outcomes.md`.
#[must_use]
pub fn documentation() -> String {
    let mut text = "# Outcomes\n\n\
        What can become of a packet, as `svc-lb dump counters` and the metric `svc_lb_packets_total` count it, and what to\n\
        do about it. This page is written from `svc-lb-common/src/outcome.rs` and `svc-lb/src/observe/outcomes.rs`;\n\
        `SVC_LB_BLESS=1 cargo test -p svc-lb --test docs` does it.\n\n\
        | outcome | fate | meaning | what to do |\n| --- | --- | --- | --- |\n"
        .to_owned();
    for outcome in Outcome::ALL {
        let fate = match outcome.fate() {
            Fate::Pass => "pass",
            Fate::Drop => "drop",
        };
        // Writing to a String does not fail.
        let _written = writeln!(
            text,
            "| `{}` | {fate} | {} | {} |",
            outcome.name(),
            outcome.explanation(),
            advice(*outcome).unwrap_or_default()
        );
    }
    text.push_str(
        "\n## Events\n\nWhat else the programs count, as `svc_lb_events_total`.\n\n\
        | event | meaning and what to do |\n| --- | --- |\n",
    );
    for one in Event::ALL {
        let _written = writeln!(
            text,
            "| `{}` | {} |",
            one.name(),
            event(*one).unwrap_or_default()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_explained() {
        for outcome in Outcome::ALL {
            assert!(advice(*outcome).is_some(), "{}", outcome.name());
        }
        for one in Event::ALL {
            assert!(event(*one).is_some(), "{}", one.name());
        }
    }
}
