//! Whether this node's proxy keeps up with what it is told, and whether the node takes traffic.
//!
//! kube-proxy's rules (SEMANTICS G7): unhealthy is a proxy with an update that has been waiting
//! for too long. Until its first update is through it is healthy, and it is healthy when nobody
//! tells it anything any more: what it has programmed goes on serving.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{HEADERS, listen};

/// `--healthz-bind-address`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bind {
    /// No server.
    Off,
    /// There; an unspecified address is every address of both families.
    At(SocketAddr),
}

impl FromStr for Bind {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse().map(Self::At).map_err(
            |_| "write ADDRESS:PORT, as in 0.0.0.0:10256 or [::1]:10256, or off for no server",
        )
    }
}

/// One moment, by the clock that never jumps and by the one that people read.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// For durations.
    pub steady: Instant,
    /// For people.
    pub wall: SystemTime,
}

impl Moment {
    /// This one.
    #[must_use]
    pub fn now() -> Self {
        Self {
            steady: Instant::now(),
            wall: SystemTime::now(),
        }
    }
}

/// What the apply task reports and the servers answer from.
#[derive(Debug)]
pub struct ProxyHealth {
    started: Instant,
    timeout: Duration,
    progress: Mutex<Progress>,
    healthz: Answered,
    livez: Answered,
}

#[derive(Debug, Default)]
struct Progress {
    /// The oldest update that is not through.
    queued: Option<Instant>,
    /// The latest moment at which all were.
    updated: Option<Moment>,
    node_leaves: bool,
}

/// How things are at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Verdict {
    /// No update has been waiting for too long.
    pub healthy: bool,
    /// The node takes traffic: it is not about to be deleted.
    pub node_eligible: bool,
    /// When everything was through for the last time.
    pub updated: Option<Moment>,
}

impl ProxyHealth {
    /// Unhealthy is who lets an update wait for `timeout`; kube-proxy takes two sync periods.
    #[must_use]
    pub fn new(timeout: Duration, now: Moment) -> Self {
        Self {
            started: now.steady,
            timeout,
            progress: Mutex::default(),
            healthz: Answered::default(),
            livez: Answered::default(),
        }
    }

    /// Something waits to be programmed. Counts from the first time on until
    /// [`ProxyHealth::updated`]; before the first update it does not count at all.
    pub fn queued(&self, now: Moment) {
        let mut progress = self.progress();
        if progress.updated.is_some() {
            progress.queued.get_or_insert(now.steady);
        }
    }

    /// Nothing waits any more.
    pub fn updated(&self, now: Moment) {
        let mut progress = self.progress();
        progress.queued = None;
        progress.updated = Some(now);
    }

    /// The node is about to be deleted, or is not.
    pub fn set_node_leaves(&self, leaves: bool) {
        self.progress().node_leaves = leaves;
    }

    /// How things are.
    #[must_use]
    pub fn verdict(&self, now: Moment) -> Verdict {
        let progress = self.progress();
        let waits = |queued| now.steady.saturating_duration_since(queued);
        Verdict {
            healthy: progress
                .queued
                .is_none_or(|queued| waits(queued) < self.timeout),
            node_eligible: !progress.node_leaves,
            updated: progress.updated,
        }
    }

    /// For the status.
    #[must_use]
    pub fn status(&self, now: Moment) -> ProxyStatus {
        let Verdict {
            healthy,
            node_eligible,
            ..
        } = self.verdict(now);
        ProxyStatus {
            healthy,
            node_eligible,
            proxy_healthz_total: self.healthz.counts(),
            proxy_livez_total: self.livez.counts(),
        }
    }

    /// The answer of `/healthz`: load balancers that go by it keep away from a node that leaves.
    fn healthz(&self, now: Moment) -> (StatusCode, String) {
        let verdict = self.verdict(now);
        let well = verdict.healthy && verdict.node_eligible;
        let text = format!(
            "{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\", \"nodeEligible\": {}}}",
            self.last_updated(verdict, well, now),
            self.go_time(Some(now)),
            verdict.node_eligible
        );
        (self.healthz.count(well), text)
    }

    /// The answer of `/livez`: a node that leaves is no reason to restart the proxy.
    fn livez(&self, now: Moment) -> (StatusCode, String) {
        let verdict = self.verdict(now);
        let text = format!(
            "{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\"}}",
            self.last_updated(verdict, verdict.healthy, now),
            self.go_time(Some(now))
        );
        (self.livez.count(verdict.healthy), text)
    }

    /// kube-proxy says "now" while all is well, for those who know that field only.
    fn last_updated(&self, verdict: Verdict, well: bool, now: Moment) -> GoTime {
        self.go_time(if well { Some(now) } else { verdict.updated })
    }

    fn go_time(&self, at: Option<Moment>) -> GoTime {
        GoTime {
            at,
            started: self.started,
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Each field is whole at any time, whoever panicked.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A time as Go prints it: `2026-01-02 03:04:05.678 +0000 UTC m=+12.345678901`, the last part
/// being seconds since the process started.
#[derive(Debug)]
struct GoTime {
    at: Option<Moment>,
    started: Instant,
}

impl fmt::Display for GoTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wall = self.at.and_then(|at| Timestamp::try_from(at.wall).ok());
        let (Some(at), Some(wall)) = (self.at, wall) else {
            return f.write_str("0001-01-01 00:00:00 +0000 UTC");
        };
        let running = at.steady.saturating_duration_since(self.started);
        write!(
            f,
            "{} +0000 UTC m=+{}.{:09}",
            wall.strftime("%Y-%m-%d %H:%M:%S%.f"),
            running.as_secs(),
            running.subsec_nanos()
        )
    }
}

/// Answers given, by status code.
#[derive(Debug, Default)]
struct Answered {
    ok: AtomicU64,
    unavailable: AtomicU64,
}

impl Answered {
    fn count(&self, well: bool) -> StatusCode {
        let (code, counter) = if well {
            (StatusCode::OK, &self.ok)
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, &self.unavailable)
        };
        counter.fetch_add(1, Ordering::Relaxed);
        code
    }

    fn counts(&self) -> ByCode {
        ByCode {
            ok: self.ok.load(Ordering::Relaxed),
            unavailable: self.unavailable.load(Ordering::Relaxed),
        }
    }
}

/// The part of the status that the proxy's own health is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ProxyStatus {
    /// No update has been waiting for too long.
    pub healthy: bool,
    /// The node is not about to be deleted.
    pub node_eligible: bool,
    /// Answers of `/healthz` since the start.
    pub proxy_healthz_total: ByCode,
    /// Answers of `/livez` since the start.
    pub proxy_livez_total: ByCode,
}

/// A number for each status code.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct ByCode {
    /// 200
    #[serde(rename = "200")]
    pub ok: u64,
    /// 503
    #[serde(rename = "503")]
    pub unavailable: u64,
}

/// Serves `/healthz` and `/livez` until it is dropped. `failures` says where it cannot.
pub async fn serve(health: Arc<ProxyHealth>, at: SocketAddr, failures: watch::Sender<Vec<String>>) {
    let report = |failed| drop(failures.send_replace(failed));
    listen::keep_serving("--healthz-bind-address", at, router(health), report).await;
}

fn router(health: Arc<ProxyHealth>) -> Router {
    async fn healthz(State(health): State<Arc<ProxyHealth>>) -> Response {
        answer(health.healthz(Moment::now()))
    }
    async fn livez(State(health): State<Arc<ProxyHealth>>) -> Response {
        answer(health.livez(Moment::now()))
    }
    Router::new()
        .route("/healthz", any(healthz))
        .route("/livez", any(livez))
        .with_state(health)
}

fn answer((code, text): (StatusCode, String)) -> Response {
    (code, HEADERS, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_mins(1);

    /// A clock that stands unless told otherwise.
    fn start() -> Moment {
        Moment {
            steady: Instant::now(),
            wall: SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678),
        }
    }

    fn after(moment: Moment, seconds: u64) -> Moment {
        let passed = Duration::from_secs(seconds);
        Moment {
            steady: moment.steady + passed,
            wall: moment.wall + passed,
        }
    }

    fn codes(health: &ProxyHealth, now: Moment) -> (u16, u16) {
        (health.healthz(now).0.as_u16(), health.livez(now).0.as_u16())
    }

    /// G7: an update may wait for less than the timeout, counted from the oldest one.
    #[test]
    fn g7_an_update_that_waits_too_long_is_unhealthy() {
        let start = start();
        let health = ProxyHealth::new(TIMEOUT, start);
        health.updated(start);
        health.queued(after(start, 10));
        health.queued(after(start, 60));
        assert_eq!(codes(&health, after(start, 69)), (200, 200));
        assert_eq!(codes(&health, after(start, 70)), (503, 503));
        health.updated(after(start, 71));
        assert_eq!(codes(&health, after(start, 72)), (200, 200));
        assert_eq!(
            codes(&health, after(start, 1_000_000)),
            (200, 200),
            "silence is no fault"
        );
        health.queued(after(start, 1_000_000));
        assert_eq!(codes(&health, after(start, 1_000_059)), (200, 200));
    }

    /// G7: a proxy that starts is healthy, however long its first lists take.
    #[test]
    fn g7_a_proxy_is_healthy_until_its_first_update() {
        let start = start();
        let health = ProxyHealth::new(TIMEOUT, start);
        health.queued(start);
        assert_eq!(codes(&health, after(start, 3_600)), (200, 200));
        health.updated(after(start, 3_600));
        assert_eq!(codes(&health, after(start, 3_601)), (200, 200));
    }

    /// G7: a node that leaves fails /healthz and not /livez.
    #[test]
    fn g7_a_node_that_leaves_fails_healthz_only() {
        let start = start();
        let health = ProxyHealth::new(TIMEOUT, start);
        health.updated(start);
        health.set_node_leaves(true);
        assert_eq!(codes(&health, start), (503, 200));
        health.set_node_leaves(false);
        assert_eq!(codes(&health, start), (200, 200));
        let status = health.status(start);
        let counts = |ok, unavailable| ByCode { ok, unavailable };
        assert_eq!(status.proxy_healthz_total, counts(1, 1));
        assert_eq!(status.proxy_livez_total, counts(2, 0));
    }

    /// G7: the bodies are kube-proxy's to the byte.
    #[test]
    fn g7_bodies() {
        let start = start();
        let health = ProxyHealth::new(TIMEOUT, start);
        health.updated(after(start, 1));
        let now = "2026-01-02 03:04:07.678 +0000 UTC m=+2.000000000";
        let well = after(start, 2);
        assert_eq!(
            health.healthz(well).1,
            format!(r#"{{"lastUpdated": "{now}","currentTime": "{now}", "nodeEligible": true}}"#)
        );
        assert_eq!(
            health.livez(well).1,
            format!(r#"{{"lastUpdated": "{now}","currentTime": "{now}"}}"#)
        );
        health.set_node_leaves(true);
        let then = "2026-01-02 03:04:06.678 +0000 UTC m=+1.000000000";
        assert_eq!(
            health.healthz(well).1,
            format!(r#"{{"lastUpdated": "{then}","currentTime": "{now}", "nodeEligible": false}}"#)
        );
    }

    /// Go's way of writing times: no fraction where there is none, year 1 for none.
    #[test]
    fn times_are_written_as_go_does() {
        let started = Instant::now();
        let text = |at| GoTime { at, started }.to_string();
        assert_eq!(text(None), "0001-01-01 00:00:00 +0000 UTC");
        let even = Moment {
            steady: started + Duration::from_nanos(1_000_000_001),
            wall: SystemTime::UNIX_EPOCH,
        };
        assert_eq!(
            text(Some(even)),
            "1970-01-01 00:00:00 +0000 UTC m=+1.000000001"
        );
    }

    #[test]
    fn bind_addresses() {
        assert_eq!("off".parse(), Ok(Bind::Off));
        let at = "0.0.0.0:10256".parse().unwrap();
        assert_eq!("0.0.0.0:10256".parse(), Ok(Bind::At(at)));
        assert!(
            "10256"
                .parse::<Bind>()
                .unwrap_err()
                .contains("ADDRESS:PORT")
        );
    }
}
