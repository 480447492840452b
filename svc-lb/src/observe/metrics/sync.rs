//! What is measured of the way from a change to the maps.

use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

/// Seconds since 1970.
type Time = Gauge<f64, AtomicU64>;

/// Figures that the apply task writes and scrapes read; clones share them.
#[derive(Clone, Debug)]
pub struct SyncFigures {
    pub(super) duration: Histogram,
    pub(super) full: Histogram,
    pub(super) partial: Histogram,
    pub(super) network_programming: Histogram,
    pub(super) last: Time,
    pub(super) last_queued: Time,
    pub(super) service_changes: Counter,
    pub(super) services_pending: Gauge,
    pub(super) endpoint_changes: Counter,
    pub(super) endpoints_pending: Gauge,
}

impl Default for SyncFigures {
    fn default() -> Self {
        Self {
            duration: durations(),
            full: durations(),
            partial: durations(),
            network_programming: Histogram::new(network_programming_buckets()),
            last: Time::default(),
            last_queued: Time::default(),
            service_changes: Counter::default(),
            services_pending: Gauge::default(),
            endpoint_changes: Counter::default(),
            endpoints_pending: Gauge::default(),
        }
    }
}

impl SyncFigures {
    /// So many Services and endpoint objects came in changed.
    pub fn queued(&self, services: u32, endpoints: u32, now: SystemTime) {
        self.service_changes.inc_by(services.into());
        self.services_pending.inc_by(services.into());
        self.endpoint_changes.inc_by(endpoints.into());
        self.endpoints_pending.inc_by(endpoints.into());
        self.last_queued.set(seconds(now));
    }

    /// All that came in is written, which took so long; `triggered` says when it became so in the
    /// cluster.
    pub fn written(
        &self,
        took: Duration,
        full: bool,
        triggered: impl IntoIterator<Item = SystemTime>,
        now: SystemTime,
    ) {
        let kind = if full { &self.full } else { &self.partial };
        for histogram in [&self.duration, kind] {
            histogram.observe(took.as_secs_f64());
        }
        for at in triggered {
            // A clock that runs ahead of ours measures nothing.
            if let Ok(passed) = now.duration_since(at) {
                self.network_programming.observe(passed.as_secs_f64());
            }
        }
        self.services_pending.set(0);
        self.endpoints_pending.set(0);
        self.last.set(seconds(now));
    }
}

fn seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// kube-proxy's bounds, 1 ms to 16 s, and finer ones below.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.001 / 16.0, 2.0, 19))
}

/// kube-proxy's bounds, to five minutes, and finer ones below.
fn network_programming_buckets() -> impl Iterator<Item = f64> {
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5]
        .into_iter()
        .chain((1..60).map(f64::from))
        .chain((60..120).step_by(5).map(f64::from))
        .chain((120..=300).step_by(30).map(f64::from))
}
