//! The lab itself, without the agent.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use svc_lb_tests::lab::capture::{Capture, SYN};
use svc_lb_tests::lab::client::{Client, dig};
use svc_lb_tests::lab::crowd::Crowd;
use svc_lb_tests::lab::run::{LOCKS, NAMESPACES};
use svc_lb_tests::lab::server::{self, Rule};
use svc_lb_tests::lab::wires::Wires;
use svc_lb_tests::lab::{Family, Lab, privileged, run};

use crate::cluster::{ECHO, HTTP, UDP, serve_all};

/// The lab's own routing, over which every other scenario runs.
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
    let _servers = serve_all(&lab);
    let mut sources: Vec<_> = lab.pods().map(|pod| (pod.ns(), pod.addr())).collect();
    sources.push((lab.client(0).ns(), lab.client(0).addr()));
    for (source, addr) in sources {
        let client = Client::of(source);
        for pod in lab.pods() {
            for family in Family::BOTH {
                let what = format!("{} -> {} over {family}", source.name(), pod.name());
                let hit = client.hit(pod.addr().socket(family, HTTP)).expect(&what);
                assert_eq!(hit, pod.name(), "{what}");
                let mut echo = client.echo(pod.addr().socket(family, ECHO)).expect(&what);
                assert_eq!(echo.seen_as().ip(), addr.of(family), "{what}");
                echo.ping("hello").expect(&what);
                let udp = client.udp(addr.of(family)).expect(&what);
                let answer = udp
                    .ask_at(pod.addr().socket(family, UDP), "x")
                    .expect(&what);
                assert_eq!(answer.server, pod.name(), "{what}");
                assert_eq!(answer.seen_as.ip(), addr.of(family), "{what}");
            }
        }
    }
}

/// What captures say of plain traffic: the right ends, and right checksums where the outside world computes them.
#[test]
fn captures_tell_addresses_and_checksums() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let (client, pod) = (lab.client(0).addr(), lab.pod("r1").addr());
    for family in Family::BOTH {
        let wire = Capture::start(lab.router(), "node-a").unwrap();
        let mut echo = Client::of(lab.client(0).ns())
            .echo(pod.socket(family, ECHO))
            .unwrap();
        echo.ping(&"long ".repeat(4000)).unwrap();
        drop(echo);
        thread::sleep(Duration::from_millis(50));
        let seen = wire.stop().unwrap();
        let tcp: Vec<_> = seen.iter().filter(|seen| seen.protocol == 6).collect();
        assert!(tcp.iter().map(|seen| seen.payload).sum::<usize>() > 40_000);
        assert!(tcp.iter().any(|seen| seen.flags & SYN != 0));
        for seen in tcp {
            let (from, to) = (seen.from.ip(), seen.to.ip());
            assert!(client.contains(from) || pod.contains(from), "{seen:?}");
            assert!(client.contains(to) || pod.contains(to), "{seen:?}");
            assert!(seen.checksums_ok, "{seen:?}");
        }
    }
}

/// What every scenario's wires are held to tells a connection around the services, and nothing sent at all.
#[test]
#[should_panic(expected = "does not belong there")]
fn wires_tell_what_does_not_belong() {
    assert!(privileged(), "does not belong there");
    let lab = Lab::builder().routed("r1").clients(1).build().unwrap();
    let _servers = serve_all(&lab);
    let wires = Wires::watch(&lab).unwrap();
    let pod = lab.pod("r1").addr().socket(Family::V4, ECHO);
    Client::of(lab.client(0).ns()).echo(pod).unwrap();
    wires.check();
}

/// A crowd reports connections whose path is cut, and no others.
#[test]
fn crowds_notice_what_breaks() {
    if !privileged() {
        return;
    }
    let mut lab = Lab::builder()
        .routed("stays")
        .bridged("goes")
        .routed("client-r")
        .build()
        .unwrap();
    let servers = serve_all(&lab);
    let open = |name: &str| {
        let to = lab.pod(name).addr().socket(Family::V4, ECHO);
        Crowd::open(lab.pod("client-r").ns(), to, 500).unwrap()
    };
    let (stays, goes) = (open("stays"), open("goes"));
    assert!(stays.verify().is_empty() && goes.verify().is_empty());
    lab.remove_pod("goes").unwrap();
    assert_eq!(goes.verify().len(), 500);
    assert!(stays.verify().is_empty());
    assert_eq!(stays.servers().into_keys().collect::<Vec<_>>(), ["stays"]);
    drop(servers);
}

/// The real servers answer at their pods' own addresses: nginx with TLS, dnsmasq over UDP and TCP.
#[test]
fn real_servers_answer() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder()
        .routed("nginx")
        .bridged("dns")
        .routed("app")
        .clients(1)
        .build()
        .unwrap();
    let _app = serve_all(&lab);
    let app = lab.pod("app").addr();
    let records = BTreeMap::from([("app.test".to_owned(), app.of(Family::V4))]);
    let _dns = server::dns(lab.pod("dns").ns(), "dns-1", &records).unwrap();
    let rules = [Rule {
        host: "app.test".to_owned(),
        path: "/deep/".to_owned(),
        upstream: app.socket(Family::V6, HTTP),
    }];
    let dir = lab.dir().join("nginx");
    let _nginx = server::ingress(lab.pod("nginx").ns(), "nginx-1", &rules, &dir).unwrap();
    let crt = dir.join("tls.crt").display().to_string();
    let client = lab.client(0).ns();
    for family in Family::BOTH {
        let addr = lab.pod("nginx").addr().socket(family, 443).to_string();
        let ip = addr.strip_suffix(":443").unwrap();
        let resolve = format!("app.test:443:{ip}");
        let url = "https://app.test/deep/page";
        let answer = Client::of(client)
            .curl_ok(&["--include", "--cacert", &crt, "--resolve", &resolve, url])
            .unwrap();
        assert!(answer.contains("You've hit app"), "{answer}");
        assert!(answer.contains("Ingress: nginx-1"), "{answer}");
        let server = format!("@{}", lab.pod("dns").addr().of(family));
        for transport in ["+notcp", "+tcp"] {
            let answer = dig(client, &[&server, transport, "app.test", "A"]).unwrap();
            assert_eq!(answer, app.v4.to_string());
        }
        let who = dig(client, &[&server, "whoami.test", "TXT"]).unwrap();
        assert_eq!(who, "\"dns-1\"");
    }
}

/// Nothing answers at a service's addresses while no agent runs: the scenarios measure the agent.
#[test]
fn services_do_not_exist_without_the_agent() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").routed("r2").build().unwrap();
    let _servers = serve_all(&lab);
    let client = Client::of(lab.pod("r1").ns()).patience(Duration::from_millis(300));
    for frontend in crate::cluster::FROM_PODS {
        for family in Family::BOTH {
            let to = frontend.addr.socket(family, frontend.echo);
            assert!(client.connect(to).is_err(), "{to}");
        }
    }
}

/// A lab leaves no name behind, and what a killed run left is swept by the next.
#[test]
fn killed_runs_are_swept() {
    if !privileged() {
        return;
    }
    // What a killed process leaves: names without a lock holder, and a namespace that lives by its name alone.
    let dead = format!("dead-{}", std::process::id());
    let name = Path::new(NAMESPACES).join(format!("{}{dead}-pod", run::PREFIX));
    fs::create_dir_all(LOCKS).unwrap();
    fs::create_dir_all(NAMESPACES).unwrap();
    fs::write(&name, "").unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            nix::mount::mount(
                Some("/proc/thread-self/ns/net"),
                &name,
                None::<&str>,
                nix::mount::MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
        });
    });
    // Last: from here on any lab on this machine may sweep it.
    fs::write(Path::new(LOCKS).join(format!("{dead}.lock")), "").unwrap();

    let lab = Lab::builder().routed("r1").build().unwrap();
    assert!(!name.exists(), "the dead run's namespace was not swept");
    assert!(!Path::new(LOCKS).join(format!("{dead}.lock")).exists());

    let path = lab.pod("r1").ns().path().to_owned();
    let id = lab.run().id().to_owned();
    assert!(path.exists(), "a living run must not be swept");
    run::sweep().unwrap();
    assert!(path.exists(), "a living run must not be swept");
    drop(lab);
    assert!(!path.exists(), "the lab left {}", path.display());
    assert!(!Path::new(LOCKS).join(format!("{id}.lock")).exists());
}
