//! The agent and its command line: see `svc-lb --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    svc_lb::cli::main()
}
