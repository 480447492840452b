//! Kubernetes objects in, tables and maps out: the cases of `tests/cases`, against the maps in memory, maps that fail
//! and the kernel's maps. The last need root.

use std::process::ExitCode;

use svc_lb_tests::cases;

fn main() -> anyhow::Result<ExitCode> {
    Ok(cases::main()?.exit_code())
}
