//! The lab itself, without the agent.

use std::fs;
use std::path::Path;
use std::thread;

use svc_lb_tests::lab::client::Client;
use svc_lb_tests::lab::run::{LOCKS, NAMESPACES};
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

/// Nothing answers at a service's addresses while no agent runs: the scenarios measure the agent.
#[test]
fn services_do_not_exist_without_the_agent() {
    if !privileged() {
        return;
    }
    let lab = Lab::builder().routed("r1").routed("r2").build().unwrap();
    let _servers = serve_all(&lab);
    let client = Client::of(lab.pod("r1").ns()).patience(std::time::Duration::from_millis(300));
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
