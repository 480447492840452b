//! What the kernel holds, for "leaves nothing behind".

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use aya::maps::{MapInfo, loaded_maps};
use aya::programs::links::{FdLink, LinkInfo, PinnedLink};
use aya::programs::{ProgramInfo, loaded_links, loaded_programs};
use futures::TryStreamExt as _;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::tc::TcAttribute;
use svc_lb::dataplane::sys::{self, ObjectKind};

use super::run::{BPFFS, NAMESPACES, PREFIX};

/// A snapshot: BPF programs, maps and links of the whole kernel, pins, network namespaces by name, and the calling
/// thread's namespace's interfaces, qdiscs and routes. Each entry is a line of text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelState {
    entries: BTreeSet<String>,
}

impl KernelState {
    /// Takes the snapshot.
    pub fn take() -> Result<Self> {
        let mut entries = BTreeSet::new();
        bpf_objects(&mut entries)?;
        pins(Path::new(BPFFS), &mut entries);
        for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
            entries.insert(format!("namespace {}", entry.file_name().display()));
        }
        network(&mut entries)?;
        Ok(Self { entries })
    }

    /// The programs, maps and links pinned under `dir`, with the maps the programs use.
    pub fn of_pins(dir: &Path) -> Result<Self> {
        let mut paths = BTreeSet::new();
        pins(dir, &mut paths);
        let mut entries = BTreeSet::new();
        for path in &paths {
            let path = Path::new(path.strip_prefix(PIN).unwrap_or(path));
            if path.is_dir() {
                continue;
            }
            let what = || format!("read {}", path.display());
            let pin = sys::open_pin(path).with_context(what)?;
            match sys::object_kind(pin.as_fd()).with_context(what)? {
                ObjectKind::Map => {
                    entries.insert(map_line(&MapInfo::from_pin(path)?));
                }
                ObjectKind::Program => {
                    let program = ProgramInfo::from_pin(path)?;
                    entries.insert(program_line(&program));
                    for id in program.map_ids()?.unwrap_or_default() {
                        entries.insert(map_line(&MapInfo::from_id(id)?));
                    }
                }
                ObjectKind::Link => {
                    let link = FdLink::from(PinnedLink::from_pin(path)?);
                    entries.insert(link_line(&link.info()?));
                }
                ObjectKind::Other => bail!("{} is no BPF object", path.display()),
            }
        }
        Ok(Self { entries })
    }

    /// The entries of one kind: `program`, `map`, `link`, `pin`, `namespace`, `interface`, `qdisc` or `route`.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a str> {
        self.entries
            .iter()
            .map(String::as_str)
            .filter(move |entry| entry.split(' ').next() == Some(kind))
    }

    /// The entries without programs, maps and links, which others on the machine make and free at any time, and
    /// without others' namespaces and pins.
    #[must_use]
    pub fn settings(mut self) -> Self {
        self.entries.retain(|entry| match entry.split_once(' ') {
            Some(("program" | "map" | "link", _)) => false,
            Some(("namespace", name)) => name.starts_with(PREFIX),
            Some(("pin", path)) => path.contains("/svc-lb"),
            _ => true,
        });
        self
    }

    /// What changed from this snapshot to a later one.
    #[must_use]
    pub fn diff(&self, later: &Self) -> Diff {
        Diff {
            gone: self.entries.difference(&later.entries).cloned().collect(),
            new: later.entries.difference(&self.entries).cloned().collect(),
        }
    }

    /// Waits until these settings are what they were, and nothing of `held` exists, at most for `limit`; returns
    /// what is different.
    ///
    /// The kernel frees programs, maps and namespaces some time after their last user is gone.
    pub fn settle(&self, held: &Self, limit: Duration) -> Result<Diff> {
        let deadline = Instant::now() + limit;
        loop {
            let now = Self::take()?;
            let left = now.entries.intersection(&held.entries).cloned();
            let mut diff = self.diff(&now.clone().settings());
            diff.new.extend(left);
            if diff.is_empty() || Instant::now() >= deadline {
                return Ok(diff);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The difference of two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    /// Was there, is no longer.
    pub gone: Vec<String>,
    /// Was not there, is now.
    pub new: Vec<String>,
}

impl Diff {
    /// Whether the snapshots are equal.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.new.is_empty()
    }
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for entry in &self.gone {
            writeln!(f, "- {entry}")?;
        }
        for entry in &self.new {
            writeln!(f, "+ {entry}")?;
        }
        Ok(())
    }
}

/// Objects that vanish between their listing and their look-up are left out.
fn bpf_objects(entries: &mut BTreeSet<String>) -> Result<()> {
    // An unprivileged caller sees no ids at all, which must not look like an empty kernel.
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "listing BPF objects needs root"
    );
    entries.extend(loaded_programs().flatten().map(|info| program_line(&info)));
    entries.extend(loaded_maps().flatten().map(|info| map_line(&info)));
    entries.extend(loaded_links().flatten().map(|info| link_line(&info)));
    Ok(())
}

fn program_line(info: &ProgramInfo) -> String {
    let name = info.name_as_str().unwrap_or_default();
    format!("program {} {name}", info.id())
}

fn map_line(info: &MapInfo) -> String {
    let name = info.name_as_str().unwrap_or_default();
    format!("map {} {name}", info.id())
}

/// Without the program, which an update may replace.
fn link_line(info: &LinkInfo) -> String {
    format!("link {}", info.id())
}

/// How the line of a pin begins.
const PIN: &str = "pin ";

fn pins(dir: &Path, entries: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        entries.insert(format!("{PIN}{}", path.display()));
        if path.is_dir() {
            pins(&path, entries);
        }
    }
}

fn network(entries: &mut BTreeSet<String>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("build a runtime")?;
    runtime.block_on(async {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("open a netlink socket")?;
        tokio::spawn(connection);
        let links: Vec<_> = handle.link().get().execute().try_collect().await?;
        for link in links {
            entries.insert(format!("interface {}", link.header.index));
        }
        let qdiscs: Vec<_> = handle.qdisc().get().execute().try_collect().await?;
        for qdisc in qdiscs {
            let kind = qdisc.attributes.iter().find_map(|attribute| {
                if let TcAttribute::Kind(kind) = attribute {
                    return Some(kind.as_str());
                }
                None
            });
            entries.insert(format!(
                "qdisc {} {:?} {}",
                qdisc.header.index,
                qdisc.header.parent,
                kind.unwrap_or_default()
            ));
        }
        for family in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let routes: Vec<RouteMessage> =
                handle.route().get(family).execute().try_collect().await?;
            for route in routes {
                entries.insert(route_line(&route));
            }
        }
        Ok(())
    })
}

/// The route without what changes by itself (timers, counters).
fn route_line(route: &RouteMessage) -> String {
    use rtnetlink::packet_route::route::RouteAttribute;
    let mut parts: Vec<String> = route
        .attributes
        .iter()
        .filter(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)))
        .map(|attribute| format!("{attribute:?}"))
        .collect();
    parts.sort();
    format!(
        "route {:?} /{} {}",
        route.header.kind,
        route.header.destination_prefix_length,
        parts.join(" ")
    )
}
