//! The task that collects flows that are over, and old pins.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::dataplane::collect::{Collector, PassReport};

/// How often entries are looked at while a pass goes on.
const TICK: Duration = Duration::from_millis(250);
/// In how many ticks a pass goes through maps that are full.
const TICKS: usize = 120;
/// Entries that a tick looks at: where the maps are small, and at most.
const BUDGET: std::ops::RangeInclusive<usize> = 4_096..=65_536;
/// From the start of one pass to that of the next, if the first has ended by then.
const PASS: Duration = Duration::from_secs(10);
/// Hundredths of a map from which on there is no pause between passes.
const CROWDED: u64 = 75;
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(10);

/// Runs until it is cancelled; reports after each pass.
pub(super) async fn run(
    mut collector: Collector,
    report: watch::Sender<PassReport>,
    cancel: CancellationToken,
) {
    let budget = (collector.capacity() / TICKS).clamp(*BUDGET.start(), *BUDGET.end());
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut begun = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let pause_until = match collector.tick(budget) {
            Ok(None) => continue,
            Ok(Some(found)) => {
                debug!(passes = found.passes, elapsed = ?begun.elapsed(), "flows looked through");
                let crowded = found.fullest() >= CROWDED;
                report.send_replace(found);
                if crowded { begun } else { begun + PASS }
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "flows not collected; tried again"
                );
                Instant::now() + RETRY
            }
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = sleep_until(pause_until) => {}
        }
        begun = Instant::now();
    }
}
