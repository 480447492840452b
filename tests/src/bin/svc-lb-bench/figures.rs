//! What a case took, round by round.

use serde::{Deserialize, Serialize};

/// A case and what its rounds took.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) case: String,
    /// In what.
    pub(crate) unit: String,
    /// The least round.
    pub(crate) least: f64,
    /// The median of the quiet rounds; see [`QUIET`].
    pub(crate) median: f64,
    /// The most.
    pub(crate) most: f64,
    /// Rounds that were quiet.
    pub(crate) quiet: usize,
    /// All rounds.
    pub(crate) rounds: usize,
}

/// One round: the program with the replay, and the replay alone, in nanoseconds a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    pub(crate) tested: f64,
    pub(crate) empty: f64,
}

/// How much more than in the best round the replay alone may cost in a quiet one. A busy neighbour on the same core
/// makes everything cost about twice.
const QUIET: f64 = 1.25;

impl Figure {
    /// The figure of these rounds, the replay's cost taken off.
    pub(crate) fn new(case: String, rounds: &[Round]) -> Self {
        let best = rounds
            .iter()
            .map(|round| round.empty)
            .fold(f64::MAX, f64::min);
        let quiet = rounds.iter().filter(|round| round.empty <= best * QUIET);
        let net = |round: &Round| round.tested - round.empty;
        let quiet: Vec<f64> = quiet.map(net).collect();
        let all: Vec<f64> = rounds.iter().map(net).collect();
        Self {
            median: median(&quiet),
            quiet: quiet.len(),
            ..Self::of(case, "ns/packet", &all)
        }
    }

    /// The figure of values that are what they are.
    pub(crate) fn of(case: String, unit: &str, values: &[f64]) -> Self {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Self {
            case,
            unit: unit.to_owned(),
            least,
            median: median(values),
            most,
            quiet: values.len(),
            rounds: values.len(),
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
