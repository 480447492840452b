//! Datagrams longer than a link takes.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::ensure;
use socket2::{Domain, Socket, Type};
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{AgentProcess, Family, Lab, eventually, privileged};
use svc_lb_tests::prog::Frame;
use svc_lb_tests::prog::frame::ETHERNET;

use crate::cluster::{
    BRIEF, FROM_OUTSIDE, FROM_PODS, Frontend, LOAD_BALANCER, NODE_PORT, SOON, Source, each_mode,
    everywhere, serve_all, start_in,
};

const ALL: [&str; 3] = ["r1", "b1", "far"];
/// Six fragments over a link with an MTU of 1500.
const LENGTH: usize = 8_000;

fn lab() -> Lab {
    Lab::builder()
        .routed("r1")
        .bridged("b1")
        .remote("far")
        .routed("client-r")
        .bridged("client-b")
        .clients(1)
        .build()
        .unwrap()
}

/// E7: datagrams of several fragments reach every backend through every frontend, and so do their answers the client:
/// each end's kernel puts them together and finds the checksum right.
#[test]
fn long_datagrams_go_both_ways() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let services = [everywhere("web").pods(ALL.map(|name| lab.pod(name)))];
        let (_manifests, agent) = start_in(&lab, &services, mode);
        for family in Family::BOTH {
            for frontend in FROM_OUTSIDE {
                asks_at_length(Source::outside(&lab, 0), frontend, family);
            }
            for frontend in FROM_PODS {
                asks_at_length(Source::pod(&lab, "client-r"), frontend, family);
                asks_at_length(Source::pod(&lab, "client-b"), frontend, family);
                // A pod that may reach itself.
                asks_at_length(Source::pod(&lab, "r1"), frontend, family);
            }
        }
        assert_eq!(packets(&agent, "fragment"), 0, "all came in order");
    });
}

fn asks_at_length(source: Source<'_>, frontend: Frontend, family: Family) {
    let what = format!("{} -> {} over {family}", source.ns.name(), frontend.kind);
    let to = frontend.addr.socket(family, frontend.udp);
    let text: String = ('a'..='z').cycle().take(LENGTH).collect();
    let client = Client::of(source.ns);
    let mut seen = BTreeSet::new();
    for _ in 0..150 {
        let answer = client
            .udp(to.ip())
            .and_then(|socket| socket.ask_at(to, &text))
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(answer.from, to, "{what}: the answer's source");
        assert!(answer.text == text, "{what}: another text");
        seen.insert(answer.server);
        if seen.len() == ALL.len() {
            return;
        }
    }
    panic!("{what}: reached only {seen:?}");
}

fn packets(agent: &AgentProcess, name: &str) -> u64 {
    let counters = agent.dump("counters").unwrap();
    let counters = counters.as_array().unwrap().iter();
    counters
        .filter(|counter| counter["name"] == name)
        .filter_map(|counter| counter["packets"].as_u64())
        .sum()
}

/// E7: fragments ahead of their first one are dropped at a load balancer's address and left to the node's stack at the
/// node's own, counted, and answered by nobody; in order they are. The status says how many datagrams are held.
#[test]
fn fragments_out_of_order_are_lost() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let _servers = serve_all(&lab);
    each_mode(|mode| {
        let services = [everywhere("web").pods([lab.pod("r1")])];
        let (_manifests, agent) = start_in(&lab, &services, mode);
        let client = lab.client(0);
        let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(libc::IPPROTO_RAW.into()));
        let raw = client.ns().run(raw).unwrap();
        for (n, (frontend, lost)) in [
            (LOAD_BALANCER, "fragment"),
            (NODE_PORT, "fragment_to_stack"),
        ]
        .into_iter()
        .enumerate()
        {
            let to = frontend.addr.socket(Family::V4, frontend.udp);
            let socket = Client::of(client.ns()).udp(to.ip()).unwrap();
            socket.socket().set_read_timeout(Some(BRIEF)).unwrap();
            let port = socket.socket().local_addr().unwrap().port();
            let from = SocketAddr::new(client.addr().of(Family::V4), port);
            let sent = Frame {
                payload: vec![b'x'; 2_000],
                ..Frame::udp(from, to)
            };
            let put_out = |id, order: [usize; 2]| {
                let pieces = sent.pieces(id, &[1_200]);
                for piece in order.map(|which| &pieces[which]) {
                    let at = SocketAddr::new(to.ip(), 0).into();
                    raw.send_to(&piece[ETHERNET..], &at).unwrap();
                }
            };
            let id = 100 + 10 * u32::try_from(n).unwrap();
            let before = packets(&agent, lost);
            put_out(id, [1, 0]);
            let answer = socket.answer();
            assert!(answer.is_err(), "{to}: {answer:?}");
            assert_eq!(packets(&agent, lost), before + 1, "{to}");
            put_out(id + 1, [0, 1]);
            let answer = socket.answer().unwrap();
            assert_eq!(answer.text.len(), 2_000, "{to}");
        }
        eventually("the status knows of fragments", SOON * 4, || {
            let status = agent.ask(&["status"])?;
            let line = status.lines().find(|line| line.contains("fragments4"));
            ensure!(line.is_some(), "{status}");
            Ok(())
        });
    });
}
