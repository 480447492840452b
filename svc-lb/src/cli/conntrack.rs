//! `svc-lb conntrack`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{Subcommand, builder::PossibleValuesParser};
use ipnet::IpNet;
use serde::Serialize;
use svc_lb_common::Protocol;
use svc_lb_common::conntrack::flow;

use super::Global;
use super::dump::{names, service_name};
use super::output::{self, Format};
use crate::compile::desired::PortKey;
use crate::dataplane::clock::Clock;
use crate::dataplane::kernel::Flows;
use crate::dataplane::{FlowClock, FlowEntry, FlowState, loader};

/// Print or end flows, one line each. Works without a running agent; names of Services come from one.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  done, also where there was nothing to do
  1  nothing is pinned, or the maps cannot be read

Examples:
  svc-lb conntrack list --client 10.244.1.7
  svc-lb conntrack list --protocol tcp --frontend 10.96.0.10:53 -o json
  svc-lb conntrack list --service default/web --state tcp-opening
  svc-lb conntrack flush --backend 10.244.2.9
  svc-lb conntrack flush --all")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print flows
    List {
        #[command(flatten)]
        filter: Filter,
        /// How to print
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Forget flows, both entries of each. The next packet of a client opens a new flow, perhaps to
    /// another backend; a TCP connection does not survive that
    Flush {
        #[command(flatten)]
        filter: Filter,
        /// All flows
        #[arg(long, conflicts_with_all = ["protocol", "client", "frontend", "backend", "service", "state"])]
        all: bool,
    },
}

/// Which flows; all that is said must hold.
#[derive(Debug, clap::Args)]
struct Filter {
    /// tcp, udp or sctp
    #[arg(short, long, value_parser = protocol)]
    protocol: Option<Protocol>,
    /// Client: ADDRESS, ADDRESS:PORT or CIDR
    #[arg(short, long, value_name = "ENDPOINT")]
    client: Option<End>,
    /// Frontend: ADDRESS, ADDRESS:PORT or CIDR
    #[arg(short, long, value_name = "ENDPOINT")]
    frontend: Option<End>,
    /// Backend: ADDRESS, ADDRESS:PORT or CIDR
    #[arg(short, long, value_name = "ENDPOINT")]
    backend: Option<End>,
    /// Service: NAMESPACE/NAME, where an agent runs, or the number of a service port
    #[arg(short, long, value_name = "SERVICE")]
    service: Option<String>,
    /// State, by whose timeout it ends
    #[arg(long, value_parser = PossibleValuesParser::new(FlowState::ALL.map(FlowState::name)))]
    state: Option<String>,
}

fn protocol(text: &str) -> Result<Protocol, &'static str> {
    match text {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "sctp" => Ok(Protocol::Sctp),
        _ => Err("write tcp, udp or sctp"),
    }
}

/// One side of a flow.
#[derive(Clone, Copy, Debug)]
enum End {
    Socket(SocketAddr),
    Net(IpNet),
}

impl std::str::FromStr for End {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address = |text: &str| text.parse::<IpAddr>().ok().map(IpNet::from);
        text.parse()
            .ok()
            .map(Self::Socket)
            .or_else(|| text.parse().ok().map(Self::Net))
            .or_else(|| address(text).map(Self::Net))
            .ok_or("write an address, ADDRESS:PORT (as in [fd00::1]:80) or a CIDR")
    }
}

impl End {
    fn is(self, at: SocketAddr) -> bool {
        match self {
            Self::Socket(socket) => socket == at,
            Self::Net(net) => net.contains(&at.ip()),
        }
    }
}

/// What both entries of a flow agree on.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Identity {
    protocol: u8,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
}

impl Identity {
    fn of(entry: &FlowEntry) -> Self {
        let (client, frontend, backend) = if entry.traits & flow::REVERSE == 0 {
            (entry.source, entry.destination, entry.to_destination)
        } else {
            (entry.to_destination, entry.to_source, entry.source)
        };
        Self {
            protocol: entry.protocol,
            client,
            frontend,
            backend,
        }
    }
}

#[derive(Serialize)]
struct Row {
    protocol: String,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
    /// The source that the backend sees.
    seen_as: Option<SocketAddr>,
    service: u32,
    name: Option<PortKey>,
    state: &'static str,
    /// Entries of the two that were met: half a flow is mended by its next packet.
    entries: u8,
    idle_seconds: u32,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<ExitCode> {
    let pins = global.pins();
    if !pins.exist() {
        bail!(
            "nothing is pinned under {}: no agent has run here, or it was detached",
            pins.base().display()
        );
    }
    let flows = Flows::new(&mut loader::open_maps(&pins)?)
        .with_context(|| format!("open the maps pinned under {}", pins.base().display()))?;
    let names = names(global);
    match &args.command {
        Command::List { filter, output } => list(&flows, filter, &names, *output),
        Command::Flush { filter, all } => flush(&flows, filter, *all, &names),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn list(
    flows: &Flows,
    filter: &Filter,
    names: &BTreeMap<u32, PortKey>,
    format: Format,
) -> Result<()> {
    let rows: Vec<Row> = rows(flows, filter, names)?.into_values().collect();
    if format == Format::Json {
        return output::json(&rows);
    }
    let mut table = output::table(&[
        "PROTO", "CLIENT", "FRONTEND", "BACKEND", "SEEN AS", "SERVICE", "STATE", "IDLE",
    ]);
    for row in &rows {
        table.add_row([
            row.protocol.clone(),
            row.client.to_string(),
            row.frontend.to_string(),
            row.backend.to_string(),
            row.seen_as.map_or("-".to_owned(), |seen| seen.to_string()),
            service_name(row.service, row.name.as_ref()),
            row.state.to_owned(),
            format!("{} s", row.idle_seconds),
        ]);
    }
    output::print(&output::text(&table))
}

/// Takes the forward entry of each flow first: who finds only the reverse one goes on with it.
fn flush(flows: &Flows, filter: &Filter, all: bool, names: &BTreeMap<u32, PortKey>) -> Result<()> {
    if !all && filter.is_empty() {
        bail!("this would end every connection; say which flows, or --all");
    }
    let chosen: BTreeSet<Identity> = rows(flows, filter, names)?.into_keys().collect();
    let mut entries = Vec::new();
    flows
        .visit(&mut |entry| {
            if chosen.contains(&Identity::of(entry)) {
                entries.push(*entry);
            }
        })
        .context("read the flows")?;
    entries.sort_by_key(|entry| entry.traits & flow::REVERSE);
    for entry in &entries {
        flows.delete(entry).context("delete a flow")?;
    }
    output::print(&format!("{} flows ended", chosen.len()))
}

/// One row to a flow, by what its entries agree on.
fn rows(
    flows: &Flows,
    filter: &Filter,
    names: &BTreeMap<u32, PortKey>,
) -> Result<BTreeMap<Identity, Row>> {
    let clock = Clock::new()
        .and_then(|clock| clock.now())
        .context("read the programs' clock")?;
    let mut rows: BTreeMap<Identity, Row> = BTreeMap::new();
    flows
        .visit(&mut |entry| {
            let identity = Identity::of(entry);
            if !filter.admits(&identity, entry, names) {
                return;
            }
            let row = Row::new(&identity, entry, clock, names);
            rows.entry(identity)
                .and_modify(|known| known.merge(&row, entry))
                .or_insert(row);
        })
        .context("read the flows")?;
    if let Some(state) = &filter.state {
        rows.retain(|_, row| row.state == state);
    }
    Ok(rows)
}

impl Filter {
    fn is_empty(&self) -> bool {
        let Self {
            protocol,
            client,
            frontend,
            backend,
            service,
            state,
        } = self;
        protocol.is_none()
            && client.is_none()
            && frontend.is_none()
            && backend.is_none()
            && service.is_none()
            && state.is_none()
    }

    /// All but the state, which is the whole flow's.
    fn admits(
        &self,
        identity: &Identity,
        entry: &FlowEntry,
        names: &BTreeMap<u32, PortKey>,
    ) -> bool {
        let end = |wanted: Option<End>, at| wanted.is_none_or(|wanted| wanted.is(at));
        let is_service = |wanted: &String| {
            let index = wanted.parse() == Ok(entry.service);
            let name = names.get(&entry.service);
            index || name.is_some_and(|key| format!("{}/{}", key.namespace, key.service) == *wanted)
        };
        self.protocol
            .is_none_or(|protocol| protocol as u8 == identity.protocol)
            && end(self.client, identity.client)
            && end(self.frontend, identity.frontend)
            && end(self.backend, identity.backend)
            && self.service.as_ref().is_none_or(is_service)
    }
}

impl Row {
    fn new(
        identity: &Identity,
        entry: &FlowEntry,
        clock: FlowClock,
        names: &BTreeMap<u32, PortKey>,
    ) -> Self {
        let reverse = entry.traits & flow::REVERSE != 0;
        let seen = if reverse {
            entry.destination
        } else {
            entry.to_source
        };
        Self {
            protocol: Protocol::from_number(entry.protocol)
                .map_or_else(|| entry.protocol.to_string(), |p| p.to_string()),
            client: identity.client,
            frontend: identity.frontend,
            backend: identity.backend,
            seen_as: (seen != identity.client).then_some(seen),
            service: entry.service,
            name: names.get(&entry.service).cloned(),
            state: entry.flow_state().name(),
            entries: 1,
            idle_seconds: entry.idle_seconds(clock),
        }
    }

    /// The forward entry tells the state, the younger one how long nothing was met.
    fn merge(&mut self, other: &Self, entry: &FlowEntry) {
        if entry.traits & flow::REVERSE == 0 {
            self.state = other.state;
        }
        self.entries += other.entries;
        self.idle_seconds = self.idle_seconds.min(other.idle_seconds);
    }
}
