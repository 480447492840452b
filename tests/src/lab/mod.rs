//! A network in network namespaces: the node under test, pods, a second node, outside clients.
//!
//! ```text
//!   client-0, client-1 (203.0.113.0/24) ── net (router) ──┬── eth0 node-a ──┬── veth<pod>  routed pods   10.244.1.0/25
//!                                                         │                 └── cni0 ── veth<pod>  bridged pods 10.244.1.128/25
//!                                                         └── eth0 node-b ───── veth<pod>  routed pods   10.244.2.0/24
//! ```
//!
//! The nodes may be joined by VXLAN instead ([`overlay`]), and node-a's uplink may be a VLAN interface.
//!
//! Everything is dual stack. [`Lab::builder`] makes the pieces a test names and no others; dropping the [`Lab`]
//! removes them. What a killed run leaves behind is removed by the next run ([`run::sweep`]).
//!
//! A network namespace is a property of a thread, and of a socket for its whole life. [`Namespace::run`] therefore
//! runs its closure on a thread of its own inside the namespace; sockets made there may be used anywhere.

pub mod addresses;
pub mod agent;
pub mod bpf;
pub mod capture;
pub mod cgroup;
pub mod client;
pub mod crowd;
mod ethtool;
pub mod netlink;
pub mod netns;
pub mod objects;
pub mod overlay;
pub mod process;
pub mod receiver;
pub mod run;
pub mod sctp;
pub mod server;
mod topology;
pub mod wires;

use std::time::{Duration, Instant};

pub use addresses::{Dual, Family};
pub use agent::{AgentProcess, Mode};
pub use bpf::KernelState;
pub use netns::Namespace;
pub use topology::{Attach, BRIDGE, Host, Lab, LabBuilder, NodeName, POD_INTERFACES, Pod, UPLINK};

/// The longest that UDP takes, and more.
const MAX_DATAGRAM: usize = 65_536;

/// Environment variable that lets tests which need root be skipped without it.
pub const SKIP_ROOT: &str = "SVC_LB_TEST_SKIP_ROOT";

/// Whether a test that needs root can run.
///
/// Without root it is a failure, unless `SVC_LB_TEST_SKIP_ROOT=1` asks for skipping: then `skipped` is printed and
/// the test must return at once.
///
/// # Panics
/// Without root, unless told to skip: a test that did not run must not pass by accident.
#[must_use]
pub fn privileged() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    assert!(
        std::env::var(SKIP_ROOT).is_ok_and(|value| value == "1"),
        "this test needs root; run it as root or set {SKIP_ROOT}=1 to skip it"
    );
    eprintln!("skipped: needs root");
    false
}

/// Environment variable with a factor for time limits, where the machine is slow.
pub const SLOWNESS: &str = "SVC_LB_TEST_SLOWNESS";

/// A time limit as long as the machine needs it: times [`SLOWNESS`].
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    let slowness = std::env::var(SLOWNESS).ok();
    let factor = slowness.and_then(|factor| factor.parse().ok()).unwrap_or(1);
    limit.saturating_mul(factor)
}

/// Tries until `condition` gives a value, at most for `limit`, or as long as a slow machine needs.
///
/// # Panics
/// With the last reason why not.
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> anyhow::Result<T>,
) -> T {
    let limit = patient(limit);
    let deadline = Instant::now() + limit;
    loop {
        match condition() {
            Ok(value) => return value,
            Err(error) if Instant::now() >= deadline => {
                panic!("{what}: not within {limit:?}: {error:#}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}
