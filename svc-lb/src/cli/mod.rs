//! The command line: one file for each subcommand.

mod args;
mod check;
mod client;
mod cluster;
mod completions;
mod config;
mod conntrack;
mod detach;
mod dump;
mod output;
mod run;
mod status;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use self::config::Effective;
use crate::dataplane::pins::{self, Pins};
use crate::observe::logging::{self, LogFormat};

/// Exit codes. clap's own is 2: the command line is wrong.
mod exit {
    /// Something failed; the message says what.
    pub(super) const FAILED: u8 = 1;
    /// `check`: it works, but not all of it. `status`: not ready.
    pub(super) const DEGRADED: u8 = 3;
    /// `check`: services cannot work.
    pub(super) const UNUSABLE: u8 = 4;
    /// `status`: no agent answers.
    pub(super) const NO_AGENT: u8 = 5;
}

/// Node-local load balancer for Kubernetes Services, in eBPF.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Everywhere")]
struct Global {
    /// Settings in YAML, each by the name of its option, or a KubeProxyConfiguration; flags and the
    /// environment are stronger [default: /etc/svc-lb/config.yaml, where it exists]
    #[arg(long, global = true, value_name = "FILE", env = "SVC_LB_CONFIG")]
    config: Option<PathBuf>,
    /// Where programs, maps and links are pinned; each agent on a machine needs its own
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "SVC_LB_PIN_DIR",
        default_value = pins::DEFAULT_DIR
    )]
    pin_dir: PathBuf,
    /// Socket on which a running agent answers
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "SVC_LB_ADMIN_SOCKET",
        default_value = "/run/svc-lb/admin.sock"
    )]
    admin_socket: PathBuf,
    /// What to log, as tracing's filters: info, debug, warn,svc_lb::plan=debug
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "SVC_LB_LOG",
        default_value = "info"
    )]
    log: String,
    /// What a log line looks like
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        env = "SVC_LB_LOG_FORMAT",
        value_enum,
        default_value_t
    )]
    log_format: LogFormat,
}

impl Global {
    fn pins(&self) -> Pins {
        Pins::new(&self.pin_dir)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Status(status::Args),
    Dump(dump::Args),
    Conntrack(conntrack::Args),
    Verify(verify::Args),
    Check(check::Args),
    Detach(detach::Args),
    Config(config::Args),
    Completions(completions::Args),
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let result = config::parse(std::env::args_os())
        .and_then(|(Cli { global, command }, settings)| run(command, &global, &settings));
    match result {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            ExitCode::from(exit::FAILED)
        }
    }
}

fn run(command: Command, global: &Global, settings: &Effective) -> Result<ExitCode> {
    logging::start(&global.log, global.log_format)?;
    match command {
        Command::Run(args) => run::run(*args, global, settings),
        Command::Status(args) => status::run(&args, global),
        Command::Dump(args) => dump::run(&args, global),
        Command::Conntrack(args) => conntrack::run(&args, global),
        Command::Verify(args) => verify::run(&args, global),
        Command::Check(args) => check::run(&args, global),
        Command::Detach(args) => detach::run(&args, global),
        Command::Config(args) => config::run(&args, global, settings),
        Command::Completions(args) => completions::run(&args),
    }
}

/// An error with its causes, on standard error.
fn report(error: &anyhow::Error) {
    complain(&format!("{error:#}"));
}

/// A line on standard error.
fn complain(text: &str) {
    use std::io::Write as _;
    // If that fails, nobody is left to be told.
    drop(writeln!(std::io::stderr(), "svc-lb: {text}"));
}
