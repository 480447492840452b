//! Logs go to standard error; `--log` says which.

use std::io::{self, IsTerminal as _};

use clap::ValueEnum;
use thiserror::Error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// What a log line looks like.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object to a line.
    Json,
}

/// Why logging cannot be set up.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LogError {
    #[error("--log {filter:?} is no filter, such as debug or warn,svc_lb::plan=debug")]
    Filter { filter: String, source: ParseError },
    #[error("logging is set up already")]
    Twice(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Libraries that would fill a debug log with what nobody looks for; a filter can name them.
const QUIET: &str = "aya=info,aya_obj=info,netlink_proto=info";

/// Sends the process's log to standard error. Records of the `log` crate come along: aya's, and
/// those of the programs.
pub fn start(filter: &str, format: LogFormat) -> Result<(), LogError> {
    let filter =
        EnvFilter::try_new(format!("{QUIET},{filter}")).map_err(|source| LogError::Filter {
            filter: filter.to_owned(),
            source,
        })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(LogError::Twice)
}
