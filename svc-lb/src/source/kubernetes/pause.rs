//! How long to wait after a failure.

use std::time::Duration;

use kube::runtime::watcher::Error;

/// Nobody answers: asking again costs the network a packet, and the node is told within a second when
/// somebody does.
const UNREACHABLE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// The server answers that it cannot: every node that asks again makes it worse.
const REFUSED: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// Pauses that grow with every failure in a row, with jitter.
#[derive(Debug, Default)]
pub(super) struct Pause {
    failures: u32,
}

impl Pause {
    /// Something came.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait now.
    pub(super) fn after(&mut self, error: &Error) -> Duration {
        let status = status(error);
        // A list that must begin again is nobody's failure the first time.
        if self.failures == 0 && status.is_some_and(|status| status.code == super::GONE) {
            self.failures = 1;
            return Duration::ZERO;
        }
        let range = if status.is_some() {
            REFUSED
        } else {
            UNREACHABLE
        };
        let wanted = status
            .and_then(|status| status.details.as_ref())
            .map(|details| Duration::from_secs(details.retry_after_seconds.into()));
        self.next(range).max(wanted.unwrap_or_default())
    }

    /// How long to wait before another watch, where the last one was over too soon.
    pub(super) fn after_short_watch(&mut self) -> Duration {
        self.next(UNREACHABLE)
    }

    fn next(&mut self, (first, longest): (Duration, Duration)) -> Duration {
        let grown = first
            .saturating_mul(1 << self.failures.min(10))
            .min(longest);
        self.failures = self.failures.saturating_add(1);
        // All nodes of a cluster lose the same server at the same time.
        grown.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

/// What the server says, if it said something.
pub(super) fn status(error: &Error) -> Option<&kube::core::Status> {
    match error {
        Error::WatchError(status)
        | Error::InitialListFailed(kube::Error::Api(status))
        | Error::WatchStartFailed(kube::Error::Api(status))
        | Error::WatchFailed(kube::Error::Api(status)) => Some(status),
        Error::InitialListFailed(_)
        | Error::WatchStartFailed(_)
        | Error::WatchFailed(_)
        | Error::NoResourceVersion => None,
    }
}
