//! `svc-lb dump`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use ipnet::IpNet;
use serde::Serialize;
use svc_lb_common::conntrack::{self, flow, state};
use svc_lb_common::outcome::{Event, Hook, Outcome, counter};

use super::output::{self, Format};
use super::{Global, client};
use crate::app::admin::{Answer, Request};
use crate::compile::desired::PortKey;
use crate::dataplane::clock::Clock;
use crate::dataplane::kernel::Kernel;
use crate::dataplane::{Dataplane as _, FlowClock, FlowEntry, FlowState, FlowTable, loader};
use crate::plan::view::{FrontendView, Member, ServiceView, Tables};

/// Print what the maps hold. Works without a running agent; names of Services come from one.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  printed
  1  nothing is pinned, or the maps cannot be read

Examples:
  svc-lb dump services
  svc-lb dump backends -o json | jq '.[] | select(.local)'
  svc-lb dump conntrack
  svc-lb dump counters --all")]
pub(super) struct Args {
    /// What to print
    what: What,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// counters: also those that are zero
    #[arg(short, long)]
    all: bool,
}

/// What to print.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum What {
    /// Service ports with the backends of their sets.
    Services,
    /// Addresses and ports that clients use.
    Frontends,
    /// Backends of all services.
    Backends,
    /// Whom services admit at load balancer addresses, where not everyone.
    SourceRanges,
    /// Flows, both maps: what a packet's addresses are and become.
    Conntrack,
    /// Packets by hook and outcome, and events.
    Counters,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<ExitCode> {
    let Args { what, output, all } = args;
    let pins = global.pins();
    if !pins.exist() {
        bail!(
            "nothing is pinned under {}: no agent has run here, or it was detached",
            pins.base().display()
        );
    }
    let kernel = Kernel::new(loader::open_maps(&pins)?)
        .with_context(|| format!("open the maps pinned under {}", pins.base().display()))?;
    match what {
        What::Services => services(&tables(&kernel, global)?, *output),
        What::Frontends => frontends(&tables(&kernel, global)?, *output),
        What::Backends => backends(&tables(&kernel, global)?, *output),
        What::SourceRanges => source_ranges(&tables(&kernel, global)?, *output),
        What::Conntrack => flows(&kernel, &names(global), *output),
        What::Counters => counters(&kernel, *all, *output),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn tables(kernel: &Kernel, global: &Global) -> Result<Tables> {
    let snapshot = kernel.snapshot().context("read the maps")?;
    Ok(Tables::new(&snapshot, &names(global)))
}

/// Names by service index, from a running agent; none without one.
pub(super) fn names(global: &Global) -> BTreeMap<u32, PortKey> {
    match client::ask(&global.admin_socket, Request::Names) {
        Ok(Some(Answer::Names(names))) => names.into_iter().collect(),
        Ok(None | Some(Answer::Status(_) | Answer::Drifts(_) | Answer::Error(_))) => {
            BTreeMap::new()
        }
        Err(error) => {
            super::complain(&format!("services go without names: {error:#}"));
            BTreeMap::new()
        }
    }
}

/// A service's name as `kubectl` would write it, or its index.
pub(super) fn service_name(index: u32, name: Option<&PortKey>) -> String {
    let Some(PortKey {
        namespace,
        service,
        port_name,
        protocol,
        family: _,
    }) = name
    else {
        return format!("#{index}");
    };
    let colon = if port_name.is_empty() { "" } else { ":" };
    format!("{namespace}/{service}{colon}{port_name}/{protocol}")
}

fn name(service: &ServiceView) -> String {
    service_name(service.index, service.name.as_ref())
}

fn services(tables: &Tables, format: Format) -> Result<()> {
    if format == Format::Json {
        return output::json(&tables.services);
    }
    let mut table = output::table(&[
        "INDEX",
        "SERVICE",
        "FAMILY",
        "FRONTENDS",
        "POLICY",
        "CLUSTER SET",
        "LOCAL SET",
    ]);
    for service in &tables.services {
        let frontends: Vec<String> = service.frontends.iter().map(frontend).collect();
        table.add_row([
            service.index.to_string(),
            name(service),
            service
                .family
                .map_or("-".to_owned(), |family| family.to_string()),
            frontends.join("\n"),
            policy(service),
            members(&service.cluster),
            members(&service.local),
        ]);
    }
    output::print(&output::text(&table))
}

fn policy(service: &ServiceView) -> String {
    let mut parts = Vec::new();
    if service.internal_local {
        parts.push("internal: Local".to_owned());
    }
    if service.external_local {
        parts.push("external: Local".to_owned());
    }
    if service.maglev {
        parts.push("maglev".to_owned());
    }
    if let Some(seconds) = service.affinity_seconds {
        parts.push(format!("affinity {seconds} s"));
    }
    if let Some(ranges) = &service.source_ranges {
        parts.push(format!("{} source ranges", ranges.len()));
    }
    parts.join("\n")
}

fn members(members: &[Member]) -> String {
    let line = |member: &Member| {
        let address = member
            .address
            .map_or("missing".to_owned(), |address| address.to_string());
        format!("{address} {:.0} %", member.share * 100.0)
    };
    members.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn frontend(frontend: &FrontendView) -> String {
    use crate::compile::desired::{FrontendAddress, FrontendKind};
    let address = match frontend.address {
        FrontendAddress::Node => "node".to_owned(),
        FrontendAddress::Ip(std::net::IpAddr::V6(address)) => format!("[{address}]"),
        FrontendAddress::Ip(address) => address.to_string(),
    };
    let kind = match frontend.kind {
        Some(FrontendKind::ClusterIp) => "ClusterIP",
        Some(FrontendKind::NodePort) => "NodePort",
        Some(FrontendKind::LoadBalancer) => "LoadBalancer",
        Some(FrontendKind::ExternalIp) => "externalIP",
        None => "damaged",
    };
    let protocol = frontend
        .protocol
        .map_or("?".to_owned(), |protocol| protocol.to_string());
    format!("{kind} {address}:{} {protocol}", frontend.port)
}

#[derive(Serialize)]
struct FrontendRow<'a> {
    service: u32,
    name: Option<&'a PortKey>,
    #[serde(flatten)]
    frontend: &'a FrontendView,
}

fn frontends(tables: &Tables, format: Format) -> Result<()> {
    let rows: Vec<FrontendRow<'_>> = tables
        .services
        .iter()
        .flat_map(|service| {
            service.frontends.iter().map(|frontend| FrontendRow {
                service: service.index,
                name: service.name.as_ref(),
                frontend,
            })
        })
        .collect();
    if format == Format::Json {
        return output::json(&rows);
    }
    let mut table = output::table(&["FRONTEND", "SERVICE"]);
    for row in rows {
        table.add_row([frontend(row.frontend), service_name(row.service, row.name)]);
    }
    output::print(&output::text(&table))?;
    let addresses: Vec<String> = tables
        .node_addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    output::print(&format!("\nnode: {}", addresses.join(" ")))
}

#[derive(Serialize)]
struct BackendRow<'a> {
    service: u32,
    name: Option<&'a PortKey>,
    #[serde(flatten)]
    backend: &'a crate::plan::view::BackendView,
}

fn backends(tables: &Tables, format: Format) -> Result<()> {
    let rows: Vec<BackendRow<'_>> = tables
        .services
        .iter()
        .flat_map(|service| {
            service.backends.iter().map(|backend| BackendRow {
                service: service.index,
                name: service.name.as_ref(),
                backend,
            })
        })
        .collect();
    if format == Format::Json {
        return output::json(&rows);
    }
    let mut table = output::table(&["ID", "ADDRESS", "SERVICE", "SETS", "STATE", "GENERATION"]);
    for BackendRow {
        service,
        name,
        backend,
    } in rows
    {
        let sets = [("cluster", backend.in_cluster), ("local", backend.in_local)];
        let state = [
            ("serving", backend.serving),
            ("on this node", backend.local),
        ];
        table.add_row([
            backend.id.to_string(),
            backend.address.to_string(),
            service_name(service, name),
            set_names(sets),
            set_names(state),
            backend.generation.to_string(),
        ]);
    }
    output::print(&output::text(&table))
}

#[derive(Serialize)]
struct SourceRangeRow<'a> {
    service: u32,
    name: Option<&'a PortKey>,
    /// None: nobody is admitted.
    range: Option<&'a IpNet>,
}

fn source_ranges(tables: &Tables, format: Format) -> Result<()> {
    let mut rows = Vec::new();
    for service in &tables.services {
        let row = |range| SourceRangeRow {
            service: service.index,
            name: service.name.as_ref(),
            range,
        };
        match &service.source_ranges {
            Some(ranges) if ranges.is_empty() => rows.push(row(None)),
            Some(ranges) => rows.extend(ranges.iter().map(|range| row(Some(range)))),
            None => {}
        }
    }
    if format == Format::Json {
        return output::json(&rows);
    }
    let mut table = output::table(&["SERVICE", "ADMITS"]);
    for row in rows {
        let range = row.range.map_or("nobody".to_owned(), ToString::to_string);
        table.add_row([service_name(row.service, row.name), range]);
    }
    output::print(&output::text(&table))
}

/// The names whose condition holds.
fn set_names<const N: usize>(names: [(&str, bool); N]) -> String {
    let set = names.into_iter().filter(|(_, set)| *set);
    set.map(|(name, _)| name).collect::<Vec<_>>().join(", ")
}

/// One flow entry, for people and programs.
#[derive(Serialize)]
struct FlowRow {
    table: &'static str,
    protocol: String,
    direction: &'static str,
    source: std::net::SocketAddr,
    destination: std::net::SocketAddr,
    to_source: std::net::SocketAddr,
    to_destination: std::net::SocketAddr,
    service: u32,
    name: Option<PortKey>,
    backend: u32,
    generation: u16,
    traits: Vec<&'static str>,
    state: Vec<&'static str>,
    idle_seconds: u32,
    /// Which timeout counts.
    timeout: FlowState,
}

impl FlowRow {
    fn new(entry: &FlowEntry, clock: FlowClock, names: &BTreeMap<u32, PortKey>) -> Self {
        let reverse = entry.traits & flow::REVERSE != 0;
        let bits = |bits: &[(bool, &'static str)]| {
            bits.iter()
                .filter(|(set, _)| *set)
                .map(|(_, name)| *name)
                .collect()
        };
        Self {
            table: match entry.table {
                FlowTable::Opening => "opening",
                FlowTable::Established => "established",
                FlowTable::Streams => "streams",
            },
            protocol: svc_lb_common::Protocol::from_number(entry.protocol).map_or_else(
                || entry.protocol.to_string(),
                |protocol| protocol.to_string(),
            ),
            direction: match (reverse, entry.direction) {
                (false, _) => "forward",
                (true, conntrack::INBOUND) => "reverse, inbound",
                (true, _) => "reverse",
            },
            source: entry.source,
            destination: entry.destination,
            to_source: entry.to_source,
            to_destination: entry.to_destination,
            service: entry.service,
            name: names.get(&entry.service).cloned(),
            backend: entry.backend,
            generation: entry.generation,
            traits: bits(&[
                (entry.traits & flow::HAIRPIN != 0, "hairpin"),
                (entry.traits & flow::BRIDGED != 0, "bridged"),
                (entry.traits & flow::DIRECT != 0, "direct"),
            ]),
            state: bits(&[
                (entry.state & state::ANSWERED != 0, "answered"),
                (entry.state & state::CLIENT_FIN != 0, "client-fin"),
                (entry.state & state::BACKEND_FIN != 0, "backend-fin"),
                (entry.state & state::RESET != 0, "reset"),
            ]),
            idle_seconds: entry.idle_seconds(clock),
            timeout: entry.flow_state(),
        }
    }
}

fn flows(kernel: &Kernel, names: &BTreeMap<u32, PortKey>, format: Format) -> Result<()> {
    let clock = Clock::new()
        .and_then(|clock| clock.now())
        .context("read the programs' clock")?;
    let mut rows = Vec::new();
    kernel
        .visit_flows(&mut |entry| rows.push(FlowRow::new(entry, clock, names)))
        .context("read the flows")?;
    rows.sort_by_key(|row| (row.table, row.source, row.destination, row.direction));
    if format == Format::Json {
        return output::json(&rows);
    }
    let mut table = output::table(&[
        "MAP",
        "PROTO",
        "DIRECTION",
        "SOURCE",
        "DESTINATION",
        "BECOMES",
        "SERVICE",
        "BACKEND",
        "STATE",
        "IDLE",
    ]);
    for row in rows {
        let mut states = vec![row.timeout.name()];
        states.extend(row.state);
        states.extend(row.traits);
        table.add_row([
            row.table.to_owned(),
            row.protocol,
            row.direction.to_owned(),
            row.source.to_string(),
            row.destination.to_string(),
            format!("{} -> {}", row.to_source, row.to_destination),
            service_name(row.service, row.name.as_ref()),
            row.backend.to_string(),
            states.join(", "),
            format!("{} s", row.idle_seconds),
        ]);
    }
    output::print(&output::text(&table))
}

#[derive(Serialize)]
struct CounterRow {
    /// A hook, or "event".
    hook: &'static str,
    name: &'static str,
    packets: u64,
    explanation: &'static str,
}

fn counters(kernel: &Kernel, all: bool, format: Format) -> Result<()> {
    let values = kernel.counters().context("read the counters")?;
    let value = |index: u32| values.get(index as usize).copied().unwrap_or(0);
    let outcomes = Hook::ALL.iter().flat_map(|hook| {
        Outcome::ALL.iter().map(move |outcome| CounterRow {
            hook: hook.name(),
            name: outcome.name(),
            packets: value(counter(*hook, *outcome)),
            explanation: outcome.explanation(),
        })
    });
    let events = Event::ALL.iter().map(|event| CounterRow {
        hook: "event",
        name: event.name(),
        packets: value(event.index()),
        explanation: "",
    });
    let rows = outcomes.chain(events).filter(|row| all || row.packets > 0);
    if format == Format::Json {
        return output::json(&rows.collect::<Vec<_>>());
    }
    let mut table = output::table(&["HOOK", "OUTCOME", "PACKETS", "MEANING"]);
    for row in rows {
        table.add_row([
            row.hook,
            row.name,
            &row.packets.to_string(),
            row.explanation,
        ]);
    }
    output::print(&output::text(&table))
}
