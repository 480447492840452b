//! `svc-lb check`.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use anyhow::Result;
use aya::programs::{SchedClassifier, TcAttachType};
use rtnetlink::Handle;
use serde::Serialize;

use super::args::EdgeArgs;
use super::output::{self, Format};
use super::{Global, exit};
use crate::dataplane::clsact;
use crate::dataplane::edges::{Choice, Role, choose};
use crate::dataplane::pins::{Linked, Pins};
use crate::dataplane::{probe, sys};
use crate::node::{self, Node, health};
use crate::observe::finding::{Finding, Level, verdict};

/// Say whether this node can run svc-lb, what degrades, and what to do about it.
///
/// Looks at the kernel's features, tries to load the programs, and reads the node's settings, its
/// interfaces and what other programs are on them. Changes nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  usable
  3  degraded: it works, but not all of it
  4  unusable
  1  the check itself failed

Examples:
  svc-lb check
  svc-lb check --uplink 'ens*' --pod-interface 'cali*'
  svc-lb check -o json | jq '.findings[] | select(.level != \"ok\")'")]
pub(super) struct Args {
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Show also what is as it should be.
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    edges: EdgeArgs,
}

#[derive(Serialize)]
struct Report {
    verdict: Level,
    findings: Vec<Finding>,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<ExitCode> {
    let Args { output, all, edges } = args;
    let mut findings = probe::kernel();
    findings.extend(probe::programs());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (node, choice, others) = runtime.block_on(async {
        let netlink = node::requests()?;
        let node = node::read(&netlink).await?;
        let choice = choose(&node, &edges.settings());
        let others = other_programs(&netlink, &global.pins(), &choice).await;
        anyhow::Ok((node, choice, others))
    })?;
    findings.extend(interfaces(&node, &choice));
    findings.extend(others);
    let names: Vec<&str> = choice
        .edges
        .values()
        .map(|edge| edge.link.name.as_str())
        .collect();
    findings.extend(health::findings(&node, &names));

    let report = Report {
        verdict: verdict(&findings),
        findings,
    };
    match output {
        Format::Json => output::json(&report)?,
        Format::Table => output::print(&table(&report, *all))?,
    }
    Ok(match report.verdict {
        Level::Ok | Level::Note => ExitCode::SUCCESS,
        Level::Degraded => exit::DEGRADED.into(),
        Level::Unusable => exit::UNUSABLE.into(),
    })
}

fn table(report: &Report, all: bool) -> String {
    let mut table = output::table(&["LEVEL", "SUBJECT", "FOUND", "WHAT FOLLOWS"]);
    let mut hidden = 0;
    for finding in &report.findings {
        if finding.level == Level::Ok && !all {
            hidden += 1;
            continue;
        }
        let mut follows = finding.effect.clone().unwrap_or_default();
        if let Some(fix) = &finding.fix {
            follows = format!("{follows}\nfix: {fix}");
        }
        table.add_row([
            finding.level.name(),
            &finding.subject,
            &finding.found,
            &follows,
        ]);
    }
    let verdict = match report.verdict {
        Level::Ok | Level::Note => "usable",
        Level::Degraded => "degraded",
        Level::Unusable => "unusable",
    };
    let rest = if hidden > 0 {
        format!(", {hidden} more as they should be (--all shows them)")
    } else {
        String::new()
    };
    format!("{}\n\n{verdict}{rest}", output::text(&table))
}

fn interfaces(node: &Node, choice: &Choice) -> Vec<Finding> {
    let mut findings: Vec<Finding> = choice
        .refused
        .iter()
        .map(|refused| {
            Finding::new(
                Level::Degraded,
                format!("interface {}", refused.name),
                "refused",
                &refused.reason,
            )
        })
        .collect();
    let names = |role| {
        let edges = choice.edges.values().filter(|edge| edge.role == role);
        let names: Vec<&str> = edges.map(|edge| edge.link.name.as_str()).collect();
        names.join(", ")
    };
    let uplinks = names(Role::Uplink);
    findings.push(if uplinks.is_empty() {
        Finding::new(
            Level::Degraded,
            "uplinks",
            format!("none of {} interfaces", node.links.len()),
            "clients outside the node cannot use services here",
        )
        .fix("name them: --uplink 'eth*'")
    } else {
        Finding::ok("uplinks", uplinks)
    });
    let pods = names(Role::Pod);
    findings.push(if pods.is_empty() {
        Finding::new(
            Level::Note,
            "pod interfaces",
            "none",
            "they are attached as pods come",
        )
    } else {
        Finding::ok("pod interfaces", pods)
    });
    findings
}

/// Names the programs of others on the edges.
async fn other_programs(netlink: &Handle, pins: &Pins, choice: &Choice) -> Vec<Finding> {
    let ours = our_programs(pins);
    let mut findings = Vec::new();
    for edge in choice.edges.values() {
        let interface = &edge.link.name;
        let subject = format!("programs on {interface}");
        for (direction, attach_type) in [
            ("ingress", TcAttachType::Ingress),
            ("egress", TcAttachType::Egress),
        ] {
            let Ok((_, programs)) = SchedClassifier::query_tcx(interface, attach_type) else {
                continue;
            };
            for program in programs
                .iter()
                .filter(|program| !ours.contains(&program.id()))
            {
                findings.push(Finding::new(
                    Level::Note,
                    &subject,
                    format!(
                        "tcx {direction}: {} (id {})",
                        program.name_as_str().unwrap_or("?"),
                        program.id()
                    ),
                    "it sees clients' packets after svc-lb (ingress) or answers before it (egress), \
                     and may end them",
                ));
            }
        }
        match clsact::filters(netlink, edge.link.index).await {
            Ok(filters) => {
                for filter in filters.iter().filter(|filter| !filter.ours) {
                    findings.push(Finding::new(
                        Level::Note,
                        &subject,
                        format!(
                            "{:?} filter: {} {} (priority {})",
                            filter.direction, filter.kind, filter.name, filter.priority
                        ),
                        "filters run in the order of their priorities; one that ends a packet \
                         ends it for those behind",
                    ));
                }
            }
            Err(error) => findings.push(Finding::new(
                Level::Note,
                &subject,
                error.to_string(),
                "filters of others are not known",
            )),
        }
        if let Some(xdp) = edge.link.xdp.filter(|xdp| !ours.contains(&xdp.program)) {
            findings.push(Finding::new(
                Level::Note,
                &subject,
                format!("XDP (id {})", xdp.program),
                "it sees packets first, and svc-lb serves this interface by tc alone",
            ));
        }
    }
    findings
}

fn our_programs(pins: &Pins) -> BTreeSet<u32> {
    let links = pins.links().unwrap_or_default();
    links
        .into_iter()
        .filter(|link| link.what != Linked::Clsact)
        .filter_map(|link| {
            let fd = sys::open_pin(&pins.link(link)).ok()?;
            Some(sys::link_info(fd.as_fd()).ok()?.program)
        })
        .collect()
}
