//! `svc-lb verify`.

use std::process::ExitCode;

use anyhow::{Result, bail};

use super::output::{self, Format};
use super::{Global, client, exit};
use crate::app::admin::{Answer, Request};
use crate::plan::Drift;

/// Compare the maps with what the agent wrote, element by element.
///
/// The agent does so by itself every minute, and repairs what differs; this does it now.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  all is as it was written
  1  it could not be compared
  3  something differs
  5  no agent answers

Examples:
  svc-lb verify
  svc-lb verify --repair
  svc-lb verify -o json | jq -r '.[].map' | sort | uniq -c")]
pub(super) struct Args {
    /// Write again what differs
    #[arg(long)]
    repair: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<ExitCode> {
    let Args { repair, output } = *args;
    let Some(answer) = client::ask(&global.admin_socket, Request::Verify { repair })? else {
        super::complain(&format!(
            "no agent answers at {}",
            global.admin_socket.display()
        ));
        return Ok(exit::NO_AGENT.into());
    };
    let Answer::Drifts(drifts) = answer else {
        bail!("the agent answered something else");
    };
    match output {
        Format::Json => output::json(&drifts)?,
        Format::Table => print(&drifts)?,
    }
    Ok(if drifts.is_empty() {
        ExitCode::SUCCESS
    } else {
        exit::DEGRADED.into()
    })
}

fn print(drifts: &[Drift]) -> Result<()> {
    if drifts.is_empty() {
        return output::print("the maps are as they were written");
    }
    let mut table = output::table(&["MAP", "ELEMENT", "EXPECTED", "FOUND"]);
    for drift in drifts {
        let Drift {
            map,
            element,
            expected,
            found,
        } = drift;
        table.add_row([map, element, expected, found]);
    }
    output::print(&output::text(&table))
}
