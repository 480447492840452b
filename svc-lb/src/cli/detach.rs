//! `svc-lb detach`.

use std::process::ExitCode;

use anyhow::{Context as _, Result};

use super::{Global, output};
use crate::dataplane::attach::detach_everything;
use crate::dataplane::reserve;
use crate::node;

/// Remove every program, map, link, filter and directory of the agent: the node is as it was.
///
/// Connections through services break. Works when the agent is dead; refuses while one runs. Filters
/// are looked for in the network namespace it is run in, so run it where the agent ran.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  nothing of ours is left
  1  something is, see the message

Examples:
  svc-lb detach
  svc-lb detach --pin-dir /sys/fs/bpf/svc-lb-2")]
pub(super) struct Args {}

pub(super) fn run(_: &Args, global: &Global) -> Result<ExitCode> {
    let pins = global.pins();
    // Without the file system there are no pins, but there may be filters.
    let lock = pins.base().is_dir().then(|| pins.lock()).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let removed = runtime.block_on(async {
        let netlink = node::requests()?;
        let node = node::read(&netlink).await?;
        anyhow::Ok(detach_everything(&pins, &netlink, node.links.into_keys()).await?)
    })?;
    reserve::release(&pins)?;
    drop(lock);
    pins.remove_base()
        .with_context(|| format!("clean up {}", pins.base().display()))?;
    output::print(&match removed {
        0 => format!("nothing was pinned under {}", pins.base().display()),
        pins => format!("removed {pins} pins; the node is as it was"),
    })?;
    Ok(ExitCode::SUCCESS)
}
