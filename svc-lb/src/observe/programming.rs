//! How long it takes from a change in the cluster until it is programmed here (SEMANTICS H3).

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// Upper bounds in seconds, kube-proxy's for `network_programming_duration_seconds`: 0.25, 0.5, 1 to 59 by one, 60 to
/// 115 by five, 120 to 300 by thirty.
#[must_use]
pub fn bounds() -> Vec<f64> {
    let seconds = (1..60)
        .chain((60..120).step_by(5))
        .chain((120..=300).step_by(30));
    [0.25, 0.5]
        .into_iter()
        .chain(seconds.map(f64::from))
        .collect()
}

/// What was measured since the start: a change counts from its trigger time, that of its EndpointSlice, until all that
/// came with it is in the maps. Clocks of two machines are compared, as by kube-proxy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Programming {
    /// Changes in each bucket, not summed up; the last one is for those above all bounds.
    pub buckets: Vec<u64>,
    /// All changes.
    pub count: u64,
    /// Seconds of all of them.
    pub sum: f64,
}

impl Default for Programming {
    fn default() -> Self {
        Self {
            buckets: vec![0; bounds().len() + 1],
            count: 0,
            sum: 0.0,
        }
    }
}

impl Programming {
    /// A change that was triggered then is programmed now.
    pub fn programmed(&mut self, triggered: SystemTime, now: SystemTime) {
        // A clock that is ahead of ours makes no negative durations.
        let took = now
            .duration_since(triggered)
            .unwrap_or(Duration::ZERO)
            .as_secs_f64();
        let bucket = bounds().partition_point(|bound| *bound < took);
        if let Some(count) = self.buckets.get_mut(bucket) {
            *count += 1;
        }
        self.count += 1;
        self.sum += took;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// H3: kube-proxy's buckets.
    #[test]
    fn h3_changes_are_measured() {
        let bounds = bounds();
        assert_eq!(bounds.len(), 2 + 59 + 12 + 7);
        assert_eq!(bounds.last(), Some(&300.0));
        let mut programming = Programming::default();
        let start = SystemTime::UNIX_EPOCH;
        for millis in [0, 250, 251, 59_500, 1_000_000] {
            programming.programmed(start, start + Duration::from_millis(millis));
        }
        programming.programmed(start + Duration::from_secs(1), start);
        assert_eq!(programming.count, 6);
        let at = |bound: f64| {
            programming.buckets[bounds
                .iter()
                .position(|b| (*b - bound).abs() < 1e-9)
                .unwrap()]
        };
        assert_eq!((at(0.25), at(0.5), at(60.0)), (3, 1, 1));
        assert_eq!(programming.buckets.last(), Some(&1));
    }
}
