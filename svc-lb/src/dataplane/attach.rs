//! Attaches the programs to the edges and keeps the `edges` map in step.
//!
//! Everything outlives the agent: tcx and XDP links are pinned, clsact filters stay by themselves.
//! The next agent replaces the programs in place, so that no packet passes without one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use aya::maps::{HashMap, Map, MapData, MapError};
use clap::ValueEnum;
use rtnetlink::Handle;
use serde::{Deserialize, Serialize};
use svc_lb_common::edge::{self, Edge};
use svc_lb_common::limits::name;
use svc_lb_common::outcome::Hook;
use thiserror::Error;
use tracing::{debug, info, warn};

use super::clsact::{self, Direction};
use super::edges::{Choice, Role, Wanted, XdpMode};
use super::loader::Programs;
use super::pins::{self, LinkName, Linked, PinError, Pins};
use super::sockets::{Place, SocketError, Sockets, SocketsStatus};
use super::sys::{self, AttachPoint, ObjectKind};

/// Why an edge is not what it should be.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum AttachError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error("open the pinned map {}", name::EDGES)]
    OpenEdges(#[source] MapError),
    #[error("write {interface} to the map {}", name::EDGES)]
    WriteEdge { interface: String, source: MapError },
    #[error("attach {program} to {interface} by {via}: {source}")]
    Link {
        program: &'static str,
        interface: String,
        via: &'static str,
        source: io::Error,
    },
    #[error("attach {program} to {interface} by a clsact filter: {source}")]
    Filter {
        program: &'static str,
        interface: String,
        source: Box<rtnetlink::Error>,
    },
    #[error("remove the clsact filters of interface {ifindex}: {source}")]
    RemoveFilter {
        ifindex: u32,
        source: Box<rtnetlink::Error>,
    },
}

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TcHook {
    /// tcx links, Linux 6.6 and later.
    Tcx,
    /// Filters of a clsact qdisc.
    Clsact,
}

/// XDP as it is on one edge.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct XdpStatus {
    /// native, generic or off.
    pub mode: String,
    /// Why.
    pub reason: String,
}

/// [`XdpStatus::mode`] where it does not run.
const OFF: &str = "off";

/// One edge as it is.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct EdgeStatus {
    /// Interface index.
    pub ifindex: u32,
    /// Interface name.
    pub interface: String,
    /// uplink or pod.
    pub role: String,
    /// How the tc programs are attached.
    pub tc: TcHook,
    /// XDP.
    pub xdp: XdpStatus,
    /// The bridge it is a port of.
    pub bridge: Option<u32>,
    /// What is wrong; it is tried again.
    pub error: Option<String>,
}

/// The programs on the edges.
#[derive(Debug)]
pub struct Attacher {
    pins: Pins,
    programs: Programs,
    tc: TcHook,
    netlink: Handle,
    map: HashMap<MapData, u32, Edge>,
    /// What the map holds.
    written: BTreeMap<u32, Edge>,
    attached: BTreeMap<u32, Attached>,
    sockets: Sockets,
}

#[derive(Debug)]
struct Attached {
    wanted: Wanted,
    status: EdgeStatus,
}

impl Attacher {
    /// Takes over what an earlier agent left, of whatever layout: nothing is attached or detached
    /// yet.
    pub fn new(
        pins: Pins,
        programs: Programs,
        tc: TcHook,
        netlink: Handle,
        sockets: Result<Place, SocketError>,
    ) -> Result<Self, AttachError> {
        for other in pins.other_layouts()? {
            let links = pins.take_links_of(&other)?;
            warn!(
                from = other.version(),
                to = pins.version(),
                links,
                "another layout of the maps: connections through services do not survive this once"
            );
        }
        let map = MapData::from_pin(pins.map(name::EDGES)).map_err(AttachError::OpenEdges)?;
        let map: HashMap<_, u32, Edge> = Map::HashMap(map)
            .try_into()
            .map_err(AttachError::OpenEdges)?;
        let written = map
            .iter()
            .collect::<Result<_, _>>()
            .map_err(AttachError::OpenEdges)?;
        Ok(Self {
            sockets: Sockets::new(pins.clone(), sockets),
            pins,
            programs,
            tc,
            netlink,
            map,
            written,
            attached: BTreeMap::new(),
        })
    }

    /// Makes the edges those of `choice`. With `verify`, also looks whether those that need no
    /// change are still as they were left.
    ///
    /// An edge that fails says so in its status and leaves the others alone.
    pub async fn apply(&mut self, choice: &Choice, verify: bool) {
        self.sockets.apply(&self.programs);
        for (ifindex, wanted) in &choice.edges {
            let known = self.attached.get(ifindex);
            if !verify && known.is_some_and(|known| known.is_current(wanted)) {
                continue;
            }
            let status = self.attach(wanted, known.is_none()).await;
            let known = self.attached.get(ifindex);
            if known.is_none_or(|known| known.status != status) {
                report(&status);
            }
            let wanted = wanted.clone();
            self.attached.insert(*ifindex, Attached { wanted, status });
        }
        self.announce_xdp_below(choice);
        for ifindex in self.surplus(choice) {
            match self.detach(ifindex).await {
                Ok(()) => {
                    let interface = self
                        .attached
                        .remove(&ifindex)
                        .map(|edge| edge.status.interface);
                    info!(ifindex, interface, "edge detached");
                }
                Err(error) => warn!(ifindex, %error, "edge not detached; tried again"),
            }
        }
    }

    /// Tells VLAN interfaces about XDP on the interface below, whichever of the two came first.
    fn announce_xdp_below(&mut self, choice: &Choice) {
        for (ifindex, wanted) in &choice.edges {
            let runs = self.runs_xdp().contains(ifindex);
            if wanted.link.vlan_of.is_some()
                && let Err(error) = self.write(wanted, runs)
            {
                warn!(interface = wanted.link.name, %error, "edge not entered; tried again");
            }
        }
    }

    /// Removes maps and programs of other layouts, which no link runs any more once every edge is
    /// attached.
    pub fn remove_other_layouts(&self) -> Result<(), AttachError> {
        for other in self.pins.other_layouts()? {
            let pins = other.remove()?;
            info!(
                layout = other.version(),
                pins, "pins of another layout removed"
            );
        }
        Ok(())
    }

    /// The edges as they are, by interface index.
    pub fn status(&self) -> impl Iterator<Item = &EdgeStatus> {
        self.attached.values().map(|edge| &edge.status)
    }

    /// The socket hooks as they are.
    #[must_use]
    pub const fn sockets(&self) -> &SocketsStatus {
        self.sockets.status()
    }

    /// Whether an edge or the socket hooks failed and should be tried again.
    #[must_use]
    pub fn incomplete(&self) -> bool {
        let mut edges = self.attached.values();
        edges.any(|edge| edge.status.error.is_some()) || self.sockets().error.is_some()
    }

    /// Interfaces that `xdp_ingress` runs on.
    #[must_use]
    pub fn runs_xdp(&self) -> BTreeSet<u32> {
        self.attached
            .iter()
            .filter(|(_, edge)| edge.status.xdp.mode != OFF)
            .map(|(ifindex, _)| *ifindex)
            .collect()
    }

    /// Interfaces that have something of ours and should not.
    fn surplus(&self, choice: &Choice) -> Vec<u32> {
        let pinned = match self.pins.links() {
            Ok(links) => links,
            Err(error) => {
                warn!(%error, "cannot list the pinned links");
                Vec::new()
            }
        };
        let mut ours: Vec<u32> = self.attached.keys().copied().collect();
        ours.extend(self.written.keys());
        ours.extend(pinned.iter().map(|link| link.ifindex));
        ours.sort_unstable();
        ours.dedup();
        ours.retain(|ifindex| !choice.edges.contains_key(ifindex));
        ours
    }

    async fn attach(&mut self, wanted: &Wanted, first: bool) -> EdgeStatus {
        let mut status = EdgeStatus {
            ifindex: wanted.link.index,
            interface: wanted.link.name.clone(),
            role: match wanted.role {
                Role::Uplink => "uplink",
                Role::Pod => "pod",
            }
            .to_owned(),
            tc: self.tc,
            xdp: XdpStatus {
                mode: OFF.to_owned(),
                reason: wanted.xdp.reason.to_owned(),
            },
            bridge: wanted.bridge,
            error: None,
        };
        if let Err(error) = self.attach_all(wanted, first, &mut status).await {
            status.error = Some(error.to_string());
        }
        status
    }

    async fn attach_all(
        &mut self,
        wanted: &Wanted,
        first: bool,
        status: &mut EdgeStatus,
    ) -> Result<(), AttachError> {
        // The map first: a program that runs finds its interface. XDP is announced only where it
        // runs already.
        let had_xdp = self
            .written
            .get(&wanted.link.index)
            .is_some_and(|edge| edge.bits & edge::XDP != 0);
        self.write(wanted, had_xdp && wanted.xdp.mode != XdpMode::Off)?;

        // Egress first: an answer must find its way back once a packet was translated.
        for direction in [Direction::Egress, Direction::Ingress] {
            match self.tc {
                TcHook::Tcx => self.attach_tcx(wanted, direction)?,
                TcHook::Clsact => self.attach_clsact(wanted, direction).await?,
            }
        }
        // What an agent with the other hook left.
        match self.tc {
            TcHook::Tcx if first => self.remove_clsact(wanted.link.index).await?,
            TcHook::Clsact => self.unpin(wanted.link.index, &[Linked::Ingress, Linked::Egress])?,
            TcHook::Tcx => {}
        }

        let result = self.attach_xdp(wanted);
        self.write(wanted, matches!(result, Ok(Some(_))))?;
        match result {
            Ok(Some(point)) => {
                point.describe().clone_into(&mut status.xdp.mode);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) if wanted.xdp.mode == XdpMode::Auto => {
                status.xdp.reason = error.to_string();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn attach_tcx(&self, wanted: &Wanted, direction: Direction) -> Result<(), AttachError> {
        let (hook, point) = match direction {
            Direction::Ingress => (Hook::TcIngress, AttachPoint::TcxIngressFirst),
            Direction::Egress => (Hook::TcEgress, AttachPoint::TcxEgressLast),
        };
        self.link(wanted, hook, point, "tcx")
    }

    async fn attach_clsact(
        &self,
        wanted: &Wanted,
        direction: Direction,
    ) -> Result<(), AttachError> {
        let hook = match direction {
            Direction::Ingress => Hook::TcIngress,
            Direction::Egress => Hook::TcEgress,
        };
        let ifindex = wanted.link.index;
        let failed = |source| AttachError::Filter {
            program: hook.name(),
            interface: wanted.link.name.clone(),
            source: Box::new(source),
        };
        let program = self.program(hook)?;
        let filters = clsact::filters(&self.netlink, ifindex)
            .await
            .map_err(failed)?;
        let current = filters.iter().any(|filter| {
            filter.ours && filter.direction == direction && filter.program == self.programs.id(hook)
        });
        if current {
            return Ok(());
        }
        let marker = self.pins.link(LinkName {
            ifindex,
            what: Linked::Clsact,
        });
        // The marker first: a qdisc of ours without one would stay for ever.
        let newly = fs::create_dir(&marker).is_ok();
        let made = clsact::add_qdisc(&self.netlink, ifindex)
            .await
            .map_err(failed)?;
        if newly && !made {
            pins::remove_marker(&marker)?;
        }
        clsact::set_filter(&self.netlink, ifindex, direction, program)
            .await
            .map_err(failed)
    }

    /// Returns where it runs; `None` if it is off by choice.
    fn attach_xdp(&self, wanted: &Wanted) -> Result<Option<AttachPoint>, AttachError> {
        let ifindex = wanted.link.index;
        let point = match wanted.xdp.mode {
            XdpMode::Auto | XdpMode::Native => AttachPoint::XdpNative,
            XdpMode::Generic => AttachPoint::XdpGeneric,
            XdpMode::Off => {
                self.unpin(ifindex, &[Linked::Xdp])?;
                return Ok(None);
            }
        };
        let native = point == AttachPoint::XdpNative;
        if wanted.link.xdp.is_some_and(|xdp| xdp.native != native) {
            // A link cannot change its mode; tc serves meanwhile.
            self.unpin(ifindex, &[Linked::Xdp])?;
        }
        self.link(wanted, Hook::XdpIngress, point, point.describe())?;
        Ok(Some(point))
    }

    /// Makes the pinned link of a hook run this program: as it is, by replacing the program in
    /// one step, or by a new link.
    fn link(
        &self,
        wanted: &Wanted,
        hook: Hook,
        point: AttachPoint,
        via: &'static str,
    ) -> Result<(), AttachError> {
        let ifindex = wanted.link.index;
        let failed = |source| AttachError::Link {
            program: hook.name(),
            interface: wanted.link.name.clone(),
            via,
            source,
        };
        let program = self.program(hook)?;
        let path = self.pins.link(LinkName {
            ifindex,
            what: Linked::hook(hook),
        });
        if let Some(link) = pins::open(&path, ObjectKind::Link)? {
            let info = sys::link_info(link.as_fd()).map_err(failed)?;
            if info.ifindex == Some(ifindex) {
                if Some(info.program) != self.programs.id(hook) {
                    sys::link_update(link.as_fd(), program).map_err(failed)?;
                    debug!(
                        interface = wanted.link.name,
                        program = hook.name(),
                        "replaced"
                    );
                }
                return Ok(());
            }
            // Its interface is gone, and another one got the number.
            pins::unpin(&path)?;
        }
        let link = sys::link_create(program, ifindex, point)
            .map_err(|error| failed(explain(error, point)))?;
        sys::pin(&link, &path).map_err(failed)
    }

    fn program(&self, hook: Hook) -> Result<BorrowedFd<'_>, AttachError> {
        self.programs.of(hook).ok_or_else(|| AttachError::Link {
            program: hook.name(),
            interface: "any interface".to_owned(),
            via: "a link",
            source: io::Error::other("the kernel refused the program"),
        })
    }

    fn write(&mut self, wanted: &Wanted, xdp: bool) -> Result<(), AttachError> {
        let role = match wanted.role {
            Role::Uplink => edge::UPLINK,
            Role::Pod => edge::POD,
        };
        let below = wanted.link.vlan_of;
        let xdp = xdp || below.is_some_and(|below| self.runs_xdp().contains(&below));
        let edge = Edge {
            bits: role | if xdp { edge::XDP } else { 0 },
            bridge: wanted.bridge.unwrap_or(0),
            mac: wanted.link.mac,
            reserved: [0; 2],
        };
        let ifindex = wanted.link.index;
        if self.written.get(&ifindex) == Some(&edge) {
            return Ok(());
        }
        self.map
            .insert(ifindex, edge, 0)
            .map_err(|source| AttachError::WriteEdge {
                interface: wanted.link.name.clone(),
                source,
            })?;
        self.written.insert(ifindex, edge);
        Ok(())
    }

    async fn detach(&mut self, ifindex: u32) -> Result<(), AttachError> {
        self.unpin(ifindex, &[Linked::Xdp, Linked::Ingress, Linked::Egress])?;
        self.remove_clsact(ifindex).await?;
        if self.written.remove(&ifindex).is_some() {
            match self.map.remove(&ifindex) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(source) => {
                    return Err(AttachError::WriteEdge {
                        interface: ifindex.to_string(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn unpin(&self, ifindex: u32, links: &[Linked]) -> Result<(), AttachError> {
        for what in links {
            pins::unpin(&self.pins.link(LinkName {
                ifindex,
                what: *what,
            }))?;
        }
        Ok(())
    }

    async fn remove_clsact(&self, ifindex: u32) -> Result<(), AttachError> {
        remove_clsact(&self.netlink, &self.pins, ifindex).await
    }
}

impl Attached {
    /// Whether nothing needs doing. What runs XDP at the moment does not count: our own doing
    /// would keep us busy.
    fn is_current(&self, wanted: &Wanted) -> bool {
        let now = Wanted {
            link: crate::node::Link {
                xdp: self.wanted.link.xdp,
                ..wanted.link.clone()
            },
            ..wanted.clone()
        };
        self.status.error.is_none() && self.wanted == now
    }
}

impl AttachPoint {
    fn describe(self) -> &'static str {
        match self {
            Self::TcxIngressFirst | Self::TcxEgressLast => "tcx",
            Self::XdpNative => "native",
            Self::XdpGeneric => "generic",
        }
    }
}

/// Removes everything that agents attached in this network namespace, and their pins, also if
/// they are dead: links of all layouts, our clsact filters on any interface, the qdiscs we made.
///
/// Returns the number of pins removed. The pins must be locked.
pub async fn detach_everything(
    pins: &Pins,
    netlink: &Handle,
    interfaces: impl IntoIterator<Item = u32>,
) -> Result<usize, AttachError> {
    let mut layouts = pins.other_layouts()?;
    layouts.push(pins.clone());
    let interfaces: Vec<u32> = interfaces.into_iter().collect();
    let mut removed = 0;
    for layout in &layouts {
        for ifindex in &interfaces {
            remove_clsact(netlink, layout, *ifindex).await?;
        }
        removed += layout.remove()?;
    }
    Ok(removed)
}

/// Removes our filters from an interface, and the qdisc if we made it and nobody else uses it.
async fn remove_clsact(netlink: &Handle, pins: &Pins, ifindex: u32) -> Result<(), AttachError> {
    let failed = |source| AttachError::RemoveFilter {
        ifindex,
        source: Box::new(source),
    };
    let filters = clsact::filters(netlink, ifindex).await.map_err(failed)?;
    for filter in filters.iter().filter(|filter| filter.ours) {
        clsact::remove_filter(netlink, ifindex, filter.direction)
            .await
            .map_err(failed)?;
    }
    let marker = pins.link(LinkName {
        ifindex,
        what: Linked::Clsact,
    });
    if !marker.is_dir() {
        return Ok(());
    }
    if filters.iter().all(|filter| filter.ours) {
        clsact::remove_qdisc(netlink, ifindex)
            .await
            .map_err(failed)?;
    }
    Ok(pins::remove_marker(&marker)?)
}

/// Says what the error numbers of attaching mean.
fn explain(error: io::Error, point: AttachPoint) -> io::Error {
    let xdp = matches!(point, AttachPoint::XdpNative | AttachPoint::XdpGeneric);
    let meaning = match error.raw_os_error() {
        Some(libc::EBUSY) if xdp => "another XDP program is attached",
        Some(libc::EOPNOTSUPP) if xdp => "the driver has no native XDP",
        Some(libc::ERANGE) if xdp => "the MTU is too large for XDP without fragments",
        Some(libc::EINVAL) => "the kernel has no such link, or the driver refuses it as it is set",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{meaning} ({error})"))
}

fn report(status: &EdgeStatus) {
    let EdgeStatus {
        ifindex,
        interface,
        role,
        tc,
        xdp,
        bridge,
        error,
    } = status;
    match error {
        None => info!(
            ifindex,
            interface,
            role,
            ?tc,
            xdp = xdp.mode,
            reason = xdp.reason,
            bridge,
            "edge attached"
        ),
        Some(error) => warn!(
            ifindex,
            interface,
            role,
            ?tc,
            error,
            "edge not attached; tried again"
        ),
    }
}
