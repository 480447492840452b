//! What may stand in front of the ports, and what is too short to have any.

use svc_lb_common::outcome::Outcome;
use svc_lb_common::{Family, Protocol};
use svc_lb_tests::prog::frame::{QINQ, Transport, VLAN, next};
use svc_lb_tests::prog::tables::Describe as _;
use svc_lb_tests::prog::{Frame, Verdict};

use crate::bench::*;

/// A frame with tags is for the VLAN interface above, whichever hook sees it: it stays as it is (SEMANTICS E9).
#[test]
fn frames_with_vlan_tags_are_left_alone() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        for tags in [
            vec![(VLAN, 0x2064)],
            vec![(QINQ, 7), (VLAN, 8)],
            vec![(VLAN, 7), (VLAN, 8), (VLAN, 9)],
        ] {
            let mut syn = Frame::tcp(w.client, w.vip, SYN);
            syn.tags = tags;
            for hook in [XdpIngress, TcIngress] {
                bench
                    .run(hook, bench.network.uplink, &syn)
                    .passed(Outcome::Vlan);
            }
            let mut answer = Frame::tcp(w.remote, w.client, SYN | ACK);
            answer.tags = syn.tags;
            bench.outside_gets(&answer).passed(Outcome::Vlan);
        }
    });
}

/// IPv4 options and IPv6 extension headers do not break the parse (SEMANTICS E8).
#[test]
fn options_and_extension_headers_are_walked() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        bench.rig.set("dns", {
            let port = svc_lb_tests::prog::tables::port("dns", Protocol::Udp, w.family);
            vec![port.cluster_ip(w.vip).backends(&[w.remote])]
        });
        let with = match w.family {
            Family::V4 => [4, 20, 40]
                .map(|length| (vec![1; length], Vec::new()))
                .to_vec(),
            Family::V6 => [
                vec![(next::HOP_BY_HOP, vec![0; 6])],
                vec![
                    (next::DESTINATION, vec![0; 6]),
                    (next::ROUTING, vec![0; 22]),
                ],
                vec![(next::AUTHENTICATION, vec![0; 22])],
                vec![(next::DESTINATION, vec![0; 254]); 2],
                vec![(next::HOP_BY_HOP, vec![0; 6]); 5],
            ]
            .map(|extensions| (Vec::new(), extensions))
            .to_vec(),
        };
        for (n, (options, extensions)) in with.into_iter().enumerate() {
            let mut client = w.client;
            client.set_port(6_000 + u16::try_from(n).unwrap());
            for frame in [Frame::tcp(client, w.vip, SYN), Frame::udp(client, w.vip)] {
                let frame = Frame {
                    options: options.clone(),
                    extensions: extensions.clone(),
                    ..frame
                };
                bench
                    .pod_sends(&frame)
                    .became(Outcome::Open, &frame.clone().to(w.remote));
                let answer = frame.clone().to(w.remote).answer(SYN | ACK);
                bench
                    .pod_gets(&answer)
                    .became(Outcome::Reverse, &answer.clone().from(w.vip));
            }
        }
    });
}

/// A chain longer than any real one, headers beyond what the verifier lets us read, a header length or version that
/// cannot be: left alone, counted.
#[test]
fn malformed_headers_are_left_alone() {
    on_bench(|bench| {
        for family in FAMILIES {
            let w = world(family);
            bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
            let frame = Frame::tcp(w.client, w.vip, SYN);
            let mut cases = Vec::new();
            match family {
                Family::V4 => {
                    for first in [0x44, 0x40, 0x65, 0x05] {
                        let mut bytes = frame.to_bytes();
                        bytes[frame.l3()] = first;
                        cases.push(bytes);
                    }
                }
                Family::V6 => {
                    let mut long = frame.clone();
                    long.extensions = vec![(next::DESTINATION, vec![0; 6]); 6];
                    cases.push(long.to_bytes());
                    long.extensions = vec![(next::DESTINATION, vec![0; 1_006])];
                    cases.push(long.to_bytes());
                    let mut bytes = frame.to_bytes();
                    bytes[frame.l3()] = 0x40;
                    cases.push(bytes);
                }
            }
            for bytes in cases {
                for (hook, interface) in [
                    (TcIngress, bench.network.pod),
                    (XdpIngress, bench.network.uplink),
                ] {
                    let before = bench.rig.counters();
                    let (verdict, out) = bench.rig.run(hook, interface, &bytes);
                    assert_eq!(verdict, Verdict::On);
                    assert_eq!(out, bytes);
                    let counted = bench.rig.counters().since(&before);
                    let malformed =
                        svc_lb_tests::prog::rig::Count::Outcome(hook, Outcome::Malformed);
                    assert_eq!(counted.iter().collect::<Vec<_>>(), [(malformed, 1)]);
                }
            }
        }
    });
}

/// Protocols without ports we translate pass and are counted.
#[test]
fn other_protocols_pass() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        for number in [next::ICMP, next::ICMP6, 47, 59] {
            let frame = Frame::new(w.client, w.vip, Transport::Other(number));
            bench.pod_sends(&frame).passed(Outcome::OtherProtocol);
            let answer = Frame::new(w.remote, w.client, Transport::Other(number));
            bench.pod_gets(&answer).passed(Outcome::OtherProtocol);
        }
    });
}

/// What is no IP packet passes; it never has an address of ours.
#[test]
fn what_is_not_ip_passes() {
    on_bench(|bench| {
        let w = world(Family::V4);
        let mut bytes = Frame::tcp(w.client, w.vip, SYN).to_bytes();
        bytes[12..14].copy_from_slice(&0x0806_u16.to_be_bytes());
        for hook in [TcIngress, TcEgress, XdpIngress] {
            let before = bench.rig.counters();
            let ran = bench.rig.run(hook, bench.network.pod, &bytes);
            assert_eq!(ran, (Verdict::On, bytes.clone()));
            let counted = bench.rig.counters().since(&before);
            let not_ip = svc_lb_tests::prog::rig::Count::Outcome(hook, Outcome::NotIp);
            assert_eq!(counted.iter().collect::<Vec<_>>(), [(not_ip, 1)]);
        }
    });
}

/// Frames cut off at every length: translated where all that changes is there, left alone and counted as malformed
/// where not; never anything else.
#[test]
fn frames_cut_at_every_length() {
    for_families(|bench, w| {
        bench.program(w.port(Protocol::Tcp).backends(&[w.remote]));
        bench.rig.set("dns", {
            let port = svc_lb_tests::prog::tables::port("dns", Protocol::Udp, w.family);
            vec![port.cluster_ip(w.vip).backends(&[w.remote])]
        });
        for (mut frame, header) in [
            (Frame::tcp(w.client, w.vip, SYN), 20),
            (Frame::udp(w.client, w.vip), 8),
        ] {
            match w.family {
                Family::V4 => frame.options = vec![1; 8],
                Family::V6 => frame.extensions = vec![(next::HOP_BY_HOP, vec![1; 6])],
            }
            let whole = frame.to_bytes();
            let translated = frame.clone().to(w.remote).to_bytes();
            // The kernel test-runs no skb that ends within its IP header.
            let least = frame.l3()
                + match w.family {
                    Family::V4 => 20,
                    Family::V6 => 40,
                };
            for (hook, interface) in [
                (TcIngress, bench.network.pod),
                (XdpIngress, bench.network.uplink),
            ] {
                let shortest = if hook == XdpIngress { 14 } else { least };
                for length in shortest..=whole.len() {
                    let cut = &whole[..length];
                    let (verdict, out) = bench.rig.run(hook, interface, cut);
                    assert_eq!(verdict, Verdict::On, "{hook:?} {length}");
                    let expected = if length >= frame.l4() + header {
                        &translated[..length]
                    } else {
                        cut
                    };
                    assert_eq!(out, expected, "{hook:?} {length}");
                }
            }
            let answer = frame.clone().to(w.remote).answer(SYN | ACK);
            let whole = answer.to_bytes();
            let translated = answer.clone().from(w.vip).to_bytes();
            for length in least..=whole.len() {
                let (verdict, out) = bench.rig.run(TcEgress, bench.network.pod, &whole[..length]);
                assert_eq!(verdict, Verdict::On, "{length}");
                let whole_header = length >= frame.l4() + header;
                let expected = if whole_header { &translated } else { &whole };
                assert_eq!(out, &expected[..length], "{length}");
            }
        }
    });
}
