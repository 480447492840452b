//! The life of programs, maps and links, in a private network and mount namespace: what an agent
//! leaves, the next one adopts, and `detach` removes.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapInfo;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use svc_lb::dataplane::attach::{Attacher, EdgeStatus, TcHook, detach_everything};
use svc_lb::dataplane::clsact;
use svc_lb::dataplane::edges::{Choice, EdgeSettings, XdpMode, choose};
use svc_lb::dataplane::loader::{self, Loaded};
use svc_lb::dataplane::pins::{LinkName, Linked, Pins};
use svc_lb::dataplane::sizes::MapSizes;
use svc_lb::dataplane::sockets::SocketError;
use svc_lb::dataplane::sys;
use svc_lb::node;
use svc_lb_common::config::Config;
use svc_lb_common::limits::name;
use svc_lb_common::outcome::Hook;
use svc_lb_tests::lab::privileged;

/// Runs `test` on a thread of its own in fresh network and mount namespaces.
fn alone<F>(test: impl FnOnce(PathBuf) -> F + Send + 'static)
where
    F: Future<Output = Result<()>>,
{
    if !privileged() {
        return;
    }
    let body = move || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .context("new namespaces; this test needs root")?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let dir = tempfile::tempdir()?;
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(test(dir.path().join("bpf")))
    };
    thread::spawn(body)
        .join()
        .expect("the test ran")
        .expect("test");
}

/// A node with the uplink `up0` and the pod interface `pod0`, both veths.
async fn make_node() -> Result<Handle> {
    let netlink = node::requests()?;
    for (name, peer) in [("up0", "net0"), ("pod0", "eth0")] {
        netlink
            .link()
            .add(LinkVeth::new(name, peer).build())
            .execute()
            .await?;
        for end in [name, peer] {
            netlink
                .link()
                .set(LinkUnspec::new_with_name(end).up().build())
                .execute()
                .await?;
        }
    }
    Ok(netlink)
}

fn settings(xdp: XdpMode) -> EdgeSettings {
    EdgeSettings {
        uplinks: vec!["up*".parse().expect("pattern")],
        pods: vec!["pod*".parse().expect("pattern")],
        xdp,
    }
}

fn load(pins: &Pins) -> Result<Loaded> {
    let sizes = MapSizes::for_memory(0);
    Ok(loader::load(&loader::Settings {
        object: loader::object()?,
        pins,
        sizes: &sizes,
        config: Config::DEFAULT,
        sockets: false,
    })?)
}

async fn attach(
    pins: &Pins,
    netlink: &Handle,
    loaded: Loaded,
    tc: TcHook,
    xdp: XdpMode,
) -> Result<(Attacher, Choice)> {
    let mut attacher = Attacher::new(
        pins.clone(),
        loaded.programs,
        tc,
        netlink.clone(),
        Err(SocketError::Off),
    )?;
    let choice = choose(&node::read(netlink).await?, &settings(xdp));
    attacher.apply(&choice, false).await;
    let failed: Vec<&EdgeStatus> = attacher
        .status()
        .filter(|edge| edge.error.is_some())
        .collect();
    ensure!(failed.is_empty(), "{failed:#?}");
    Ok((attacher, choice))
}

/// Ids of the pinned maps.
fn map_ids(pins: &Pins) -> Result<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    for name in name::PINNED {
        let path = pins.map(name);
        if path.exists() {
            ids.insert(MapInfo::from_pin(&path)?.id());
        }
    }
    Ok(ids)
}

/// Link and program of each pinned link.
fn links(pins: &Pins) -> Result<Vec<(LinkName, sys::LinkInfo)>> {
    pins.links()?
        .into_iter()
        .filter(|link| link.what != Linked::Clsact)
        .map(|link| {
            let fd = sys::open_pin(&pins.link(link))?;
            Ok((link, sys::link_info(fd.as_fd())?))
        })
        .collect()
}

fn loaded_maps() -> BTreeSet<u32> {
    aya::maps::loaded_maps()
        .filter_map(|map| Some(map.ok()?.id()))
        .collect()
}

fn loaded_programs() -> BTreeSet<u32> {
    aya::programs::loaded_programs()
        .filter_map(|program| Some(program.ok()?.id()))
        .collect()
}

/// Waits for the kernel's deferred freeing of `ids`.
async fn gone(what: &str, ids: &BTreeSet<u32>, loaded: fn() -> BTreeSet<u32>) -> Result<()> {
    for _ in 0..100 {
        if loaded().is_disjoint(ids) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let left: Vec<u32> = loaded().intersection(ids).copied().collect();
    anyhow::bail!("{what} left: {left:?}")
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// G9, G10, G11: what one agent leaves the next one adopts, with new programs in the same links; removal leaves nothing.
#[test]
fn tcx_links_and_maps_are_adopted_and_removed() {
    alone(async |base| {
        let netlink = make_node().await?;
        let pins = Pins::new(&base);
        pins.prepare()?;
        let lock = pins.lock()?;
        ensure!(
            Pins::new(&base).lock().is_err(),
            "two agents got the same pins"
        );

        let first = load(&pins)?;
        let seed = first.config.seed;
        ensure!(!first.adopted && first.config.hz >= 100);
        let mut programs: BTreeSet<u32> = Hook::ALL
            .iter()
            .filter_map(|hook| first.programs.id(*hook))
            .collect();
        ensure!(programs.len() == 3);
        let (attacher, choice) =
            attach(&pins, &netlink, first, TcHook::Tcx, XdpMode::Native).await?;
        let xdp: Vec<&str> = attacher
            .status()
            .map(|edge| edge.xdp.mode.as_str())
            .collect();
        ensure!(xdp == ["native", "off"], "{xdp:?}");
        drop(attacher);
        let maps = map_ids(&pins)?;
        let before = links(&pins)?;
        ensure!(before.len() == 5, "{before:?}");
        ensure!(
            before
                .iter()
                .all(|(link, info)| info.ifindex == Some(link.ifindex))
        );
        ensure!(choice.edges.len() == 2);

        // The next agent: the same maps, the same links, other programs.
        let second = load(&pins)?;
        ensure!(second.adopted && second.config.seed == seed);
        programs.extend(
            Hook::ALL
                .iter()
                .filter_map(|hook| second.programs.id(*hook)),
        );
        ensure!(programs.len() == 6);
        let (mut attacher, choice) =
            attach(&pins, &netlink, second, TcHook::Tcx, XdpMode::Native).await?;
        ensure!(map_ids(&pins)? == maps);
        let after = links(&pins)?;
        for ((link, old), (_, new)) in before.iter().zip(&after) {
            ensure!(
                old.id == new.id && old.program != new.program,
                "{link}: {old:?} {new:?}"
            );
        }

        // An interface that goes takes its pins along.
        netlink
            .link()
            .del(*choice.edges.keys().last().context("edges")?)
            .execute()
            .await?;
        let choice = choose(&node::read(&netlink).await?, &settings(XdpMode::Off));
        attacher.apply(&choice, true).await;
        let left: Vec<Linked> = links(&pins)?.iter().map(|(link, _)| link.what).collect();
        ensure!(left == [Linked::Ingress, Linked::Egress], "{left:?}");
        drop(attacher);

        let interfaces = node::read(&netlink).await?.links;
        detach_everything(&pins, &netlink, interfaces.into_keys()).await?;
        drop(lock);
        pins.remove_base()?;
        ensure!(!exists(&base), "{} is left", base.display());
        gone("programs", &programs, loaded_programs).await?;
        gone("maps", &maps, loaded_maps).await
    });
}

/// G10: programs of another layout's maps take over the links.
#[test]
fn links_of_another_layout_are_taken_over() {
    alone(async |base| {
        let netlink = make_node().await?;
        let old = Pins::of_layout(&base, 0);
        old.prepare()?;
        let (attacher, _) = attach(&old, &netlink, load(&old)?, TcHook::Tcx, XdpMode::Off).await?;
        drop(attacher);
        let before = links(&old)?;
        let old_maps = map_ids(&old)?;

        let pins = Pins::new(&base);
        pins.prepare()?;
        let loaded = load(&pins)?;
        ensure!(!loaded.adopted, "maps of another layout were adopted");
        let (attacher, _) = attach(&pins, &netlink, loaded, TcHook::Tcx, XdpMode::Off).await?;
        attacher.remove_other_layouts()?;
        let after = links(&pins)?;
        ensure!(
            before.len() == 4 && after.len() == 4,
            "{before:?} {after:?}"
        );
        for ((link, old), (_, new)) in before.iter().zip(&after) {
            ensure!(
                old.id == new.id && old.program != new.program,
                "{link}: {old:?} {new:?}"
            );
        }
        ensure!(!exists(&base.join("v0")), "the other layout is left");
        gone("maps", &old_maps, loaded_maps).await
    });
}

/// An address that only the programs keep away: packets to it are dropped as unallocated, and the
/// node itself would take them.
const FORBIDDEN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 9), 9_999);

/// Sends datagrams to [`FORBIDDEN`] from a namespace of its own behind `pod0`, until stopped.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: thread::JoinHandle<Result<()>>,
}

impl Flood {
    async fn start(netlink: &Handle, ifindex: u32) -> Result<Self> {
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (moved, wait) = std::sync::mpsc::channel();
        let (told, ready) = tokio::sync::oneshot::channel();
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            // The thread's own namespace, for as long as it lives.
            let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
            told.send(namespace)
                .map_err(|_| anyhow::anyhow!("nobody listens"))?;
            wait.recv()?;
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(configure_peer())?;
            let socket = UdpSocket::bind("10.0.0.2:0")?;
            while !stopped.load(Ordering::Relaxed) {
                if socket.send_to(b"x", FORBIDDEN).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        let namespace = ready.await?;
        let to_namespace = LinkUnspec::new_with_index(ifindex)
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        netlink.link().set(to_namespace).execute().await?;
        moved.send(())?;
        Ok(Self { stop, sent, thread })
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the flood ran")
    }
}

async fn configure_peer() -> Result<()> {
    let netlink = node::requests()?;
    let links = node::read(&netlink).await?.links;
    let eth0 = links
        .values()
        .find(|link| link.name == "eth0")
        .context("eth0")?
        .index;
    netlink
        .address()
        .add(eth0, Ipv4Addr::new(10, 0, 0, 2).into(), 24)
        .execute()
        .await?;
    netlink
        .link()
        .set(LinkUnspec::new_with_index(eth0).up().build())
        .execute()
        .await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(Ipv4Addr::new(10, 0, 0, 1))
        .build();
    Ok(netlink.route().add(route).execute().await?)
}

fn received(socket: &UdpSocket) -> usize {
    let mut buffer = [0; 16];
    std::iter::from_fn(|| socket.recv(&mut buffer).ok()).count()
}

/// G10: there is no moment without a program.
#[test]
fn no_packet_passes_while_programs_are_replaced() {
    alone(async |base| {
        let netlink = make_node().await?;
        let links = node::read(&netlink).await?.links;
        let index = |name: &str| {
            links
                .values()
                .find(|link| link.name == name)
                .map(|link| link.index)
                .context("link")
        };
        let (lo, pod0) = (index("lo")?, index("pod0")?);
        for (link, address) in [(lo, *FORBIDDEN.ip()), (pod0, Ipv4Addr::new(10, 0, 0, 1))] {
            netlink
                .link()
                .set(LinkUnspec::new_with_index(link).up().build())
                .execute()
                .await?;
            netlink
                .address()
                .add(link, address.into(), 24)
                .execute()
                .await?;
        }
        let socket = UdpSocket::bind(FORBIDDEN)?;
        socket.set_nonblocking(true)?;
        let flood = Flood::start(&netlink, index("eth0")?).await?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while received(&socket) == 0 {
            ensure!(
                Instant::now() < deadline,
                "without programs the node takes the datagrams"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }

        let pins = Pins::new(&base);
        pins.prepare()?;
        let sizes = MapSizes::for_memory(0);
        let config = Config {
            service_net4: Ipv4Addr::new(198, 18, 0, 0).into(),
            service_mask4: Ipv4Addr::new(255, 255, 0, 0).into(),
            ..Config::DEFAULT
        };
        let load = || -> Result<Loaded> {
            Ok(loader::load(&loader::Settings {
                object: loader::object()?,
                pins: &pins,
                sizes: &sizes,
                config,
                sockets: false,
            })?)
        };
        for tc in [TcHook::Tcx, TcHook::Clsact, TcHook::Tcx] {
            let (mut one, choice) = attach(&pins, &netlink, load()?, tc, XdpMode::Off).await?;
            let (mut other, _) = attach(&pins, &netlink, load()?, tc, XdpMode::Off).await?;
            // What passed before the first attachment.
            tokio::time::sleep(Duration::from_millis(50)).await;
            if tc == TcHook::Tcx && flood.sent() > 0 {
                received(&socket);
            }
            let before = flood.sent();
            for _ in 0..100 {
                one.apply(&choice, true).await;
                other.apply(&choice, true).await;
            }
            ensure!(
                one.status()
                    .chain(other.status())
                    .all(|edge| edge.error.is_none())
            );
            let sent = flood.sent() - before;
            ensure!(
                sent > 100,
                "only {sent} datagrams were sent during 200 replacements"
            );
            let passed = received(&socket);
            ensure!(
                passed == 0,
                "{passed} of {sent} passed while {tc:?} was replaced"
            );
        }
        flood.stop()?;
        detach_everything(&pins, &netlink, [pod0]).await?;
        pins.remove_base()?;
        Ok(())
    });
}

/// G9, G10, G11 on kernels without tcx.
#[test]
fn clsact_filters_are_replaced_in_place_and_removed() {
    alone(async |base| {
        let netlink = make_node().await?;
        let pins = Pins::new(&base);
        pins.prepare()?;
        let (first, choice) =
            attach(&pins, &netlink, load(&pins)?, TcHook::Clsact, XdpMode::Off).await?;
        drop(first);
        let (&up, &pod) = (
            choice.edges.keys().next().unwrap(),
            choice.edges.keys().last().unwrap(),
        );
        let before = clsact::filters(&netlink, up).await?;
        ensure!(
            before.len() == 2 && before.iter().all(|filter| filter.ours),
            "{before:?}"
        );

        // A qdisc that was there before us stays.
        clsact::remove_qdisc(&netlink, pod).await?;
        ensure!(clsact::add_qdisc(&netlink, pod).await?);
        std::fs::remove_dir(pins.link(LinkName {
            ifindex: pod,
            what: Linked::Clsact,
        }))?;

        let second = load(&pins)?;
        let id = second.programs.id(Hook::TcIngress);
        let (second, _) = attach(&pins, &netlink, second, TcHook::Clsact, XdpMode::Off).await?;
        drop(second);
        let after = clsact::filters(&netlink, up).await?;
        ensure!(after.len() == 2, "{after:?}");
        ensure!(
            after[0].program == id && before[0].program != id,
            "{before:?} {after:?}"
        );

        // An agent that uses tcx removes what this one left.
        let (third, _) = attach(&pins, &netlink, load(&pins)?, TcHook::Tcx, XdpMode::Off).await?;
        drop(third);
        ensure!(clsact::filters(&netlink, up).await?.is_empty());
        ensure!(!clsact::has_qdisc(&netlink, up).await?);
        let (fourth, _) =
            attach(&pins, &netlink, load(&pins)?, TcHook::Clsact, XdpMode::Off).await?;
        drop(fourth);
        ensure!(links(&pins)?.is_empty());

        detach_everything(&pins, &netlink, [up, pod]).await?;
        pins.remove_base()?;
        for (ifindex, had_one) in [(up, false), (pod, true)] {
            ensure!(clsact::filters(&netlink, ifindex).await?.is_empty());
            ensure!(
                clsact::has_qdisc(&netlink, ifindex).await? == had_one,
                "{ifindex}"
            );
        }
        ensure!(!exists(&base));
        Ok(())
    });
}

#[test]
fn pins_that_do_not_fit_are_named_with_the_way_out() {
    alone(async |base| {
        let pins = Pins::new(&base);
        pins.prepare()?;
        drop(load(&pins)?);

        // A map of another shape where flows belong.
        let path = pins.map(name::ESTABLISHED[0]);
        std::fs::remove_file(&path)?;
        std::fs::rename(pins.map(name::OPENING[1]), &path)?;
        let error = load(&pins)
            .err()
            .context("a map of another shape was adopted")?;
        let text = format!("{error:#}");
        ensure!(
            text.contains("established4 has key size 40, this version needs 16"),
            "{text}"
        );
        ensure!(text.contains("svc-lb detach --pin-dir"), "{text}");

        // A program where a map belongs.
        std::fs::remove_file(&path)?;
        std::fs::rename(pins.program("tc_ingress"), &path)?;
        let text = format!("{:#}", load(&pins).err().context("a program was adopted")?);
        ensure!(text.contains("is Program, not Map"), "{text}");

        // What is worth nothing is made anew.
        std::fs::remove_file(&path)?;
        std::fs::remove_file(pins.map(name::COUNTERS))?;
        std::fs::rename(pins.map(name::BUCKET), pins.map(name::COUNTERS))?;
        drop(load(&pins)?);
        Ok(())
    });
}

#[test]
fn a_refused_program_is_named_with_the_end_of_the_verifiers_log() {
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    const NONSENSE: [u8; 8] = [0xff, 0, 0, 0, 0, 0, 0, 0];
    alone(async |base| {
        // As large as it is, the copy is aligned as an ELF file must be.
        let mut object = loader::object()?.to_vec();
        let (words, _) = object.as_chunks_mut::<8>();
        for instruction in words.iter_mut().filter(|word| **word == EXIT) {
            *instruction = NONSENSE;
        }
        let pins = Pins::new(&base);
        pins.prepare()?;
        let sizes = MapSizes::smallest();
        let result = loader::load(&loader::Settings {
            object: &object,
            pins: &pins,
            sizes: &sizes,
            config: Config::DEFAULT,
            sockets: false,
        });
        let text = format!("{:#}", result.err().context("nonsense was loaded")?);
        ensure!(text.contains("refused the program tc_ingress"), "{text}");
        ensure!(text.contains("last insn is not an exit or jmp"), "{text}");
        Ok(())
    });
}
