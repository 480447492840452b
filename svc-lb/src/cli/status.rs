//! `svc-lb status`.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{Result, bail};

use super::output::{self, Format};
use super::{Global, client, exit};
use crate::app::admin::{Answer, Request};
use crate::dataplane::attach::EdgeStatus;
use crate::dataplane::sockets::SocketsStatus;
use crate::health::proxy::ProxyStatus;
use crate::health::services::ServiceHealthStatus;
use crate::observe::programming::Programming;
use crate::observe::status::{
    FlowsStatus, HealthStatus, MapStatus, ServiceNotes, ServicesStatus, SourceStatus, Status,
};

/// Show how the running agent is: sources, services and why some are not programmed, interfaces,
/// maps.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  the agent is ready: its sources' lists are complete and programmed, the interfaces attached
  1  it could not be asked
  3  it runs, but is not ready yet
  5  no agent answers; `svc-lb dump` reads the maps without one

Examples:
  svc-lb status
  svc-lb status --services
  svc-lb status -o json | jq .services.not_programmed")]
pub(super) struct Args {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Show also what there is to say about Services that are programmed
    #[arg(long)]
    services: bool,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<ExitCode> {
    let Args { output, services } = args;
    let Some(answer) = client::ask(&global.admin_socket, Request::Status)? else {
        super::complain(&format!(
            "no agent answers at {}",
            global.admin_socket.display()
        ));
        return Ok(exit::NO_AGENT.into());
    };
    let Answer::Status(status) = answer else {
        bail!("the agent answered something else");
    };
    if let Some(note) = other_version(&status.version) {
        super::complain(&note);
    }
    match output {
        Format::Json => output::json(&status)?,
        Format::Table => output::print(&text(&status, *services)?)?,
    }
    Ok(if status.ready {
        ExitCode::SUCCESS
    } else {
        exit::DEGRADED.into()
    })
}

/// What to say where the agent is not of this command's version.
fn other_version(agent: &str) -> Option<String> {
    let ours = env!("CARGO_PKG_VERSION");
    (agent != ours).then(|| {
        format!("the agent that runs is {agent}, this command {ours}: restart the agent, or use its own svc-lb")
    })
}

fn text(status: &Status, all: bool) -> Result<String> {
    let Status {
        version,
        layout,
        kernel,
        pid,
        uptime_seconds,
        ready,
        waiting_for,
        limits,
        node,
        sources,
        services,
        health,
        edges,
        refused,
        sockets,
        programs,
        flows,
        maps,
    } = status;
    let mut out = String::new();
    writeln!(
        out,
        "svc-lb {version} (layout {layout}) on Linux {kernel}: {}, process {pid}, up {uptime_seconds} s",
        if *ready { "ready" } else { "not ready" },
    )?;
    for waiting in waiting_for {
        writeln!(out, "waiting for {waiting}")?;
    }
    for limit in limits {
        writeln!(out, "note: {limit}")?;
    }
    let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
    writeln!(
        out,
        "node {}{}, NodePorts on {}",
        node.name,
        node.zone
            .as_ref()
            .map(|zone| format!(" in zone {zone}"))
            .unwrap_or_default(),
        if addresses.is_empty() {
            "no address".to_owned()
        } else {
            addresses.join(" ")
        },
    )?;

    section(&mut out, "Sources", &source_table(sources))?;
    for source in sources {
        for problem in &source.problems {
            writeln!(out, "{}: {problem}", source.name)?;
        }
    }
    write_services(&mut out, services, all)?;
    write_health(&mut out, health, all)?;
    section(&mut out, "Interfaces", &edge_table(edges))?;
    for edge in edges {
        if let Some(error) = &edge.error {
            writeln!(out, "{}: {error}; tried again", edge.interface)?;
        }
    }
    for refused in refused {
        writeln!(out, "{}: refused: {}", refused.name, refused.reason)?;
    }

    write_sockets(&mut out, sockets)?;

    let mut table = output::table(&["NAME", "ID", "INSTRUCTIONS VERIFIED"]);
    for program in programs {
        let instructions = program
            .verified_instructions
            .map_or("-".to_owned(), |n| n.to_string());
        table.add_row([program.name.clone(), program.id.to_string(), instructions]);
    }
    section(&mut out, "Programs", &output::text(&table))?;
    section(&mut out, "Flows and affinity", &flow_table(flows))?;
    section(&mut out, "Maps", &map_table(maps))?;
    Ok(out.trim_end().to_owned())
}

fn write_sockets(out: &mut String, sockets: &SocketsStatus) -> Result<()> {
    let SocketsStatus {
        mode,
        cgroup,
        notes,
        error,
    } = sockets;
    let place = cgroup.as_ref().map(|cgroup| format!(" at {cgroup}"));
    writeln!(out, "\nSocket hooks\n{mode}{}", place.unwrap_or_default())?;
    for note in notes {
        writeln!(out, "{note}")?;
    }
    if let Some(error) = error {
        writeln!(out, "{error}; tried again")?;
    }
    Ok(())
}

fn section(out: &mut String, title: &str, body: &str) -> Result<()> {
    Ok(writeln!(out, "\n{title}\n{body}")?)
}

fn source_table(sources: &[SourceStatus]) -> String {
    let mut table = output::table(&["SOURCE", "LIST", "CHANGES", "UNREADABLE", "PROBLEMS"]);
    for source in sources {
        table.add_row([
            source.name.clone(),
            if source.listed {
                "complete"
            } else {
                "incomplete"
            }
            .to_owned(),
            source.changes.to_string(),
            source.malformed.to_string(),
            source.problems.len().to_string(),
        ]);
    }
    output::text(&table)
}

fn write_services(out: &mut String, services: &ServicesStatus, all: bool) -> Result<()> {
    let ServicesStatus {
        known,
        programmed,
        ports,
        not_programmed,
        notes,
        refusals,
        control_plane,
        programming,
        pending,
        writes,
        failures,
        last_error,
        damaged_at_start,
        audit,
    } = services;
    writeln!(
        out,
        "\nServices\n{programmed} of {known} programmed, {ports} ports; {writes} writes to the maps, \
         {failures} failed{}",
        if *pending {
            ", something is pending"
        } else {
            ""
        },
    )?;
    let Programming { count, sum, .. } = programming;
    if *count > 0 {
        #[expect(clippy::cast_precision_loss, reason = "a mean for people")]
        let mean = sum / *count as f64;
        writeln!(
            out,
            "{count} changes of endpoints, programmed {mean:.3} s after the cluster's on average"
        )?;
    }
    if let Some(error) = last_error {
        writeln!(out, "writing fails: {error}; tried again")?;
    }
    if let Some(damage) = damaged_at_start {
        writeln!(out, "repaired at start: {damage}")?;
    }
    for (map, count) in &audit.repaired {
        writeln!(
            out,
            "repaired: {count} elements of {map} were not as they were written; the log names them"
        )?;
    }
    for refusal in refusals.iter().chain(control_plane) {
        writeln!(out, "{refusal}")?;
    }
    if !not_programmed.is_empty() {
        writeln!(out, "not programmed:")?;
        write_notes(out, not_programmed)?;
    }
    if notes.is_empty() {
        return Ok(());
    }
    if all {
        writeln!(out, "notes:")?;
        return write_notes(out, notes);
    }
    writeln!(
        out,
        "{} more have notes (--services shows them)",
        notes.len()
    )?;
    Ok(())
}

fn write_notes(out: &mut String, services: &[ServiceNotes]) -> Result<()> {
    for ServiceNotes { service, notes } in services {
        for note in notes {
            writeln!(out, "  {service}: {note}")?;
        }
    }
    Ok(())
}

/// Health checks of Services that fail always; all of them where asked for.
fn write_health(out: &mut String, health: &HealthStatus, all: bool) -> Result<()> {
    let HealthStatus {
        proxy:
            ProxyStatus {
                healthy,
                node_eligible,
                proxy_healthz_total: healthz,
                proxy_livez_total: livez,
            },
        healthz_address,
        healthz_failures,
        services,
    } = health;
    writeln!(
        out,
        "\nHealth\nproxy {}, node {}; {}; answers 200/503: healthz {}/{}, livez {}/{}",
        if *healthy {
            "healthy"
        } else {
            "unhealthy: updates wait"
        },
        if *node_eligible {
            "eligible"
        } else {
            "about to be deleted"
        },
        healthz_address.map_or("healthz and livez off".to_owned(), |address| {
            format!("healthz and livez at {address}")
        }),
        healthz.ok,
        healthz.unavailable,
        livez.ok,
        livez.unavailable,
    )?;
    for failure in healthz_failures {
        writeln!(out, "healthz: {failure}; tried again")?;
    }
    for (service, health) in services {
        let ServiceHealthStatus {
            port,
            local_endpoints,
            failures,
        } = health;
        if all {
            writeln!(
                out,
                "  {service}: healthCheckNodePort {port}: {local_endpoints} ready here"
            )?;
        }
        for failure in failures {
            writeln!(
                out,
                "  {service}: healthCheckNodePort {port}: {failure}; tried again"
            )?;
        }
    }
    if !all && !services.is_empty() {
        writeln!(
            out,
            "{} Services with a healthCheckNodePort (--services shows them)",
            services.len()
        )?;
    }
    Ok(())
}

fn edge_table(edges: &[EdgeStatus]) -> String {
    let mut table = output::table(&["INTERFACE", "INDEX", "ROLE", "TC", "XDP", "BRIDGE", "WHY"]);
    for edge in edges {
        let tc = match (&edge.error, edge.tc) {
            (Some(_), _) => "failed".to_owned(),
            (None, hook) => format!("{hook:?}").to_lowercase(),
        };
        table.add_row([
            edge.interface.clone(),
            edge.ifindex.to_string(),
            edge.role.clone(),
            tc,
            edge.xdp.mode.clone(),
            edge.bridge
                .map_or("-".to_owned(), |bridge| bridge.to_string()),
            if edge.role == "uplink" {
                edge.xdp.reason.clone()
            } else {
                String::new()
            },
        ]);
    }
    output::text(&table)
}

fn flow_table(flows: &FlowsStatus) -> String {
    if flows.passes == 0 {
        return "not looked through yet".to_owned();
    }
    let mut table = output::table(&["MAP", "ENTRIES", "USED", "EVICTED", "COLLECTED"]);
    for map in &flows.maps {
        let collected: Vec<String> = map
            .collected
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        table.add_row([
            map.name.clone(),
            map.entries.to_string(),
            percent(map.entries, map.limit),
            map.evicted.to_string(),
            collected.join(", "),
        ]);
    }
    output::text(&table)
}

/// How full a map is.
fn percent(entries: u64, limit: u32) -> String {
    format!("{} %", entries * 100 / u64::from(limit.max(1)))
}

fn map_table(maps: &[MapStatus]) -> String {
    let mut table = output::table(&["MAP", "ENTRIES", "LIMIT", "USED", "KERNEL MEMORY"]);
    for map in maps {
        let used = map.entries.map(|entries| percent(entries, map.limit));
        table.add_row([
            map.name.clone(),
            map.entries
                .map_or("-".to_owned(), |entries| entries.to_string()),
            map.limit.to_string(),
            used.unwrap_or("-".to_owned()),
            map.bytes.map_or("-".to_owned(), bytes),
        ]);
    }
    let total: u64 = maps.iter().filter_map(|map| map.bytes).sum();
    table.add_row(["total", "", "", "", &bytes(total)]);
    output::text(&table)
}

fn bytes(bytes: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    if bytes < MIB {
        return format!("{} KiB", bytes.div_ceil(KIB));
    }
    format!("{}.{} MiB", bytes / MIB, bytes % MIB * 10 / MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_told() {
        assert_eq!(other_version(env!("CARGO_PKG_VERSION")), None);
        let note = other_version("0.0.1").unwrap();
        assert!(note.contains("0.0.1") && note.contains("restart the agent"));
    }

    #[test]
    fn memory_is_shown_in_units() {
        assert_eq!(bytes(0), "0 KiB");
        assert_eq!(bytes(1), "1 KiB");
        assert_eq!(bytes(1 << 20), "1.0 MiB");
        assert_eq!(bytes((3 << 20) + (1 << 19)), "3.5 MiB");
    }
}
