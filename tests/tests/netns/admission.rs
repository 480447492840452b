//! Whom a service serves, and at which addresses.

use serde_json::Value;
use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::{Family, Lab, eventually, privileged};

use crate::cluster::{
    CLUSTER_IP, EXTERNAL_IP, LOAD_BALANCER, NODE_PORT, SOON, Source, everywhere, reaches,
    serve_all, start,
};
use crate::refusal::{ports, silent};

/// Ranges that hold these addresses and no others.
fn only(sources: &[Source<'_>]) -> Value {
    let ranges = sources.iter().flat_map(|source| {
        let [v4, v6] = source.addr.both();
        [format!("{v4}/32"), format!("{v6}/128")]
    });
    ranges.collect::<Vec<_>>().into()
}

/// B7: a load balancer's address serves the clients in loadBalancerSourceRanges, and is silent to others, pods included.
/// Every other frontend serves everyone. A change of the ranges counts for the next connection; one that is open stays.
#[test]
fn source_ranges() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("r1")
        .routed("pod-in")
        .bridged("pod-out")
        .clients(2)
        .build()
        .unwrap();
    let _servers = serve_all(&lab);
    let inside = [Source::outside(&lab, 0), Source::pod(&lab, "pod-in")];
    let outside = [Source::outside(&lab, 1), Source::pod(&lab, "pod-out")];
    let service = || everywhere("web").pods([lab.pod("r1")]);
    let restricted =
        |sources: &[Source<'_>]| service().spec("loadBalancerSourceRanges", only(sources));
    let (manifests, _agent) = start(&lab, &[restricted(&inside)]);
    for family in Family::BOTH {
        let (tcp, udp) = ports(LOAD_BALANCER, family);
        for source in inside {
            reaches(source, LOAD_BALANCER, family, &["r1"]);
        }
        for source in outside {
            silent(Client::of(source.ns), tcp, udp);
        }
        for frontend in [NODE_PORT, EXTERNAL_IP] {
            for source in inside.into_iter().chain(outside) {
                reaches(source, frontend, family, &["r1"]);
            }
        }
        reaches(Source::pod(&lab, "pod-out"), CLUSTER_IP, family, &["r1"]);
    }

    let (to, _) = ports(LOAD_BALANCER, Family::V4);
    let mut open = Client::of(inside[0].ns).echo(to).unwrap();
    open.ping("still in").unwrap();
    manifests.write(&[restricted(&outside)]).unwrap();
    eventually("the other clients are admitted", SOON, || {
        Client::of(outside[0].ns).echo(to).map(drop)
    });
    open.ping("out, but open").unwrap();
    for family in Family::BOTH {
        let (tcp, udp) = ports(LOAD_BALANCER, family);
        for source in inside {
            silent(Client::of(source.ns), tcp, udp);
        }
        for source in outside {
            reaches(source, LOAD_BALANCER, family, &["r1"]);
        }
    }

    manifests.write(&[service()]).unwrap();
    eventually("everyone is admitted", SOON, || {
        Client::of(inside[0].ns).echo(to).map(drop)
    });
    for family in Family::BOTH {
        for source in inside.into_iter().chain(outside) {
            reaches(source, LOAD_BALANCER, family, &["r1"]);
        }
    }
}
