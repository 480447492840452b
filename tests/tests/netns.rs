//! Scenarios with real sockets in the lab.

use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{Family, Lab, privileged, server};

/// Without the agent: the lab's own routing, over which every other scenario runs.
#[test]
fn plain_routing_reaches_every_pod() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("r2")
        .bridged("b1")
        .bridged("b2")
        .remote("far")
        .clients(1)
        .build()
        .unwrap();
    let servers: Vec<_> = lab
        .pods()
        .map(|pod| {
            (
                server::http(pod.ns(), pod.name(), 8080).unwrap(),
                server::udp_echo(pod.ns(), pod.name(), 53).unwrap(),
                server::tcp_echo(pod.ns(), pod.name(), 7).unwrap(),
            )
        })
        .collect();
    let mut sources: Vec<_> = lab.pods().map(|pod| (pod.ns(), pod.addr())).collect();
    sources.push((lab.client(0).ns(), lab.client(0).addr()));
    for (source, addr) in sources {
        let client = Client::of(source);
        for pod in lab.pods() {
            for family in Family::BOTH {
                let from = source.name();
                let what = format!("{from} -> {} over {family}", pod.name());
                let hit = client.hit(pod.addr().socket(family, 8080)).expect(&what);
                assert_eq!(hit, pod.name(), "{what}");
                let mut echo = client.echo(pod.addr().socket(family, 7)).expect(&what);
                assert_eq!(echo.seen_as().ip(), addr.of(family), "{what}");
                echo.ping("hello").expect(&what);
                let udp = client.udp(addr.of(family)).expect(&what);
                let answer = udp.ask_at(pod.addr().socket(family, 53), "x").expect(&what);
                assert_eq!(answer.server, pod.name(), "{what}");
                assert_eq!(answer.seen_as.ip(), addr.of(family), "{what}");
            }
        }
    }
    drop(servers);
}
