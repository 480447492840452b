//! `svc-lb completions`.

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, output};

/// Print a shell's completions.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  printed

Examples:
  svc-lb completions bash > /etc/bash_completion.d/svc-lb
  svc-lb completions zsh > \"${fpath[1]}/_svc-lb\"")]
pub(super) struct Args {
    /// The shell.
    shell: Shell,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "svc-lb", &mut text);
    output::print(String::from_utf8(text)?.trim_end())?;
    Ok(ExitCode::SUCCESS)
}
