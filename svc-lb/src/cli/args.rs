//! Arguments that several commands share.

use clap::ArgAction;
use glob::Pattern;

use crate::dataplane::edges::{EdgeSettings, XdpMode};

/// Which interfaces are edges.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Interfaces")]
pub(super) struct EdgeArgs {
    /// Names of interfaces towards the network, as a glob pattern; may be repeated
    ///
    /// [default: VXLAN and Geneve tunnels, and the interfaces of the default routes; on a node without
    /// one, eth* and en*]
    #[arg(long, value_name = "PATTERN", env = "SVC_LB_UPLINK", value_delimiter = ',', action = ArgAction::Append)]
    uplink: Vec<Pattern>,
    /// Names of interfaces towards pods, as a glob pattern; may be repeated
    ///
    /// [default: every veth and netkit device that is not an uplink]
    #[arg(long, value_name = "PATTERN", env = "SVC_LB_POD_INTERFACE", value_delimiter = ',', action = ArgAction::Append)]
    pod_interface: Vec<Pattern>,
    /// XDP on uplinks, ahead of tc
    #[arg(
        long,
        value_name = "MODE",
        env = "SVC_LB_XDP",
        value_enum,
        default_value_t
    )]
    xdp: XdpMode,
}

impl EdgeArgs {
    /// As the dataplane takes them.
    pub(super) fn settings(&self) -> EdgeSettings {
        let Self {
            uplink,
            pod_interface,
            xdp,
        } = self;
        EdgeSettings {
            uplinks: uplink.clone(),
            pods: pod_interface.clone(),
            xdp: *xdp,
        }
    }
}
