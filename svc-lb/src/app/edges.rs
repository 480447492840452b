//! The task that keeps the programs on the edges.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::dataplane::attach::{Attacher, EdgeStatus};
use crate::dataplane::edges::{EdgeSettings, Refused, choose};
use crate::dataplane::links::{self, Links};
use crate::dataplane::sockets::SocketsStatus;
use crate::node::Node;

/// How often everything attached is looked at: somebody may have removed it.
const VERIFY: Duration = Duration::from_secs(30);
/// Pause before an edge that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The task's part of the status.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    /// The edges were attached once.
    pub(super) attached: bool,
    pub(super) edges: Vec<EdgeStatus>,
    pub(super) refused: Vec<Refused>,
    pub(super) sockets: SocketsStatus,
}

/// Runs until it is cancelled, or until the node is no longer watched.
///
/// Begins when `begin` says so: programs over empty maps would drop what they take for
/// unallocated service addresses.
pub(super) async fn run(
    mut attacher: Attacher,
    mut links: Links,
    settings: EdgeSettings,
    mut node: watch::Receiver<Arc<Node>>,
    mut begin: watch::Receiver<bool>,
    report: watch::Sender<Report>,
    cancel: CancellationToken,
) {
    tokio::select! {
        () = cancel.cancelled() => return,
        told = begin.wait_for(|begin| *begin) => if told.is_err() { return },
    }
    let mut refused = Vec::new();
    let mut alone = false;
    let mut verify_at = Instant::now() + VERIFY;
    loop {
        let now = Instant::now();
        let verify = now >= verify_at;
        if verify {
            verify_at = now + VERIFY;
        }
        let current = Arc::clone(&node.borrow_and_update());
        let choice = choose(&current, &settings);
        for new in choice.refused.iter().filter(|new| !refused.contains(*new)) {
            warn!(
                interface = new.name,
                reason = new.reason,
                "interface refused"
            );
        }
        refused.clone_from(&choice.refused);
        attacher.apply(&choice, verify).await;
        let runs_xdp = attacher.runs_xdp();
        let linked = links.apply(&links::wanted(
            &current,
            |ifindex| choice.turns_answers(ifindex),
            |ifindex| runs_xdp.contains(&ifindex),
        ));
        if let Err(error) = &linked {
            warn!(
                error = error as &dyn std::error::Error,
                "interface not entered; tried again"
            );
        }
        report.send_replace(Report {
            attached: true,
            edges: attacher.status().cloned().collect(),
            refused: choice.refused,
            sockets: attacher.sockets().clone(),
        });
        if !alone && !attacher.incomplete() {
            match attacher.remove_other_layouts() {
                Ok(()) => alone = true,
                Err(error) => warn!(%error, "pins of another layout not removed; tried again"),
            }
        }
        let next = if attacher.incomplete() || linked.is_err() {
            verify_at.min(Instant::now() + RETRY)
        } else {
            verify_at
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = node.changed() => if changed.is_err() { return },
            () = sleep_until(next) => {}
        }
    }
}
