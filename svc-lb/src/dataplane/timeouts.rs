//! When a flow without packets is over. This alone says so: to who collects entries, and to who clears
//! guard bits behind which no flow is left.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use svc_lb_common::Protocol;
use svc_lb_common::conntrack::state;
use thiserror::Error;

use super::FlowTable;

/// What is known of a flow's life. An SCTP association has TCP's states: INIT, SHUTDOWN and ABORT are
/// its SYN, FIN and RST.
#[derive(
    Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum FlowState {
    /// The client has not proved yet that it gets answers.
    TcpOpening,
    /// A connection.
    TcpEstablished,
    /// One side has sent FIN.
    TcpClosing,
    /// Both sides have sent FIN, or one RST.
    TcpClosed,
    /// Packets one way, or both ways for less than two seconds.
    UdpOpening,
    /// A stream both ways.
    UdpEstablished,
}

impl FlowState {
    /// All of them, in the order of a life.
    pub const ALL: [Self; 6] = [
        Self::TcpOpening,
        Self::TcpEstablished,
        Self::TcpClosing,
        Self::TcpClosed,
        Self::UdpOpening,
        Self::UdpEstablished,
    ];

    /// The state of an entry: its map, IANA's number of its protocol, and its
    /// [state bits](svc_lb_common::conntrack::state).
    #[must_use]
    pub const fn of(table: FlowTable, protocol: u8, bits: u32) -> Self {
        let opening = matches!(table, FlowTable::Opening);
        if protocol == Protocol::Udp as u8 {
            return if opening {
                Self::UdpOpening
            } else {
                Self::UdpEstablished
            };
        }
        if state::closed(bits) {
            Self::TcpClosed
        } else if opening {
            Self::TcpOpening
        } else if bits & (state::CLIENT_FIN | state::BACKEND_FIN) != 0 {
            Self::TcpClosing
        } else {
            Self::TcpEstablished
        }
    }

    /// As on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TcpOpening => "tcp-opening",
            Self::TcpEstablished => "tcp-established",
            Self::TcpClosing => "tcp-closing",
            Self::TcpClosed => "tcp-closed",
            Self::UdpOpening => "udp-opening",
            Self::UdpEstablished => "udp-established",
        }
    }

    /// Seconds where nothing else is said (SEMANTICS G5).
    const fn default_seconds(self) -> u32 {
        match self {
            // netfilter's for a SYN that was answered, and Cilium's.
            Self::TcpOpening => 60,
            // kube-proxy sets these two: 24 hours, and 1 hour for CLOSE_WAIT.
            Self::TcpEstablished => 86_400,
            Self::TcpClosing => 3_600,
            // Cilium's: dead entries must go before a full map evicts living ones.
            Self::TcpClosed => 10,
            // netfilter's.
            Self::UdpOpening => 30,
            Self::UdpEstablished => 120,
        }
    }
}

impl fmt::Display for FlowState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Seconds without a packet after which a flow is over, by its state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timeouts([u32; FlowState::ALL.len()]);

impl Default for Timeouts {
    fn default() -> Self {
        Self(FlowState::ALL.map(FlowState::default_seconds))
    }
}

impl Timeouts {
    /// The defaults but for what is said.
    #[must_use]
    pub fn with(said: &[StateTimeout]) -> Self {
        let Self(mut seconds) = Self::default();
        for one in said {
            if let Some(place) = seconds.get_mut(one.state as usize) {
                *place = one.seconds;
            }
        }
        Self(seconds)
    }

    /// Seconds of one state.
    #[must_use]
    pub fn of(&self, state: FlowState) -> u32 {
        let Self(seconds) = self;
        seconds.get(state as usize).copied().unwrap_or(u32::MAX)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (FlowState, u32)> {
        FlowState::ALL
            .map(|state| (state, self.of(state)))
            .into_iter()
    }
}

/// One `--timeout`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StateTimeout {
    state: FlowState,
    seconds: u32,
}

/// Why a timeout cannot be.
#[derive(Debug, Error, Eq, PartialEq)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum TimeoutError {
    #[error("{0:?} is not STATE=DURATION, for example tcp-established=2h")]
    Syntax(String),
    #[error("no flow has the state {name:?}; these exist: {known}")]
    Unknown { name: String, known: String },
    #[error("{state}={value:?}: write a duration from 1s to 14d, such as 90s or 2h")]
    Duration { state: FlowState, value: String },
}

impl StateTimeout {
    /// Entries tell time by 32 bits of jiffies, of which the past gets half: 24 days at 1,000 a
    /// second.
    const MAX: Duration = Duration::from_hours(14 * 24);
}

impl FromStr for StateTimeout {
    type Err = TimeoutError;

    fn from_str(text: &str) -> Result<Self, TimeoutError> {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| TimeoutError::Syntax(text.to_owned()))?;
        let state = FlowState::ALL
            .into_iter()
            .find(|state| state.name() == name)
            .ok_or_else(|| TimeoutError::Unknown {
                name: name.to_owned(),
                known: FlowState::ALL.map(FlowState::name).join(", "),
            })?;
        let seconds = humantime::parse_duration(value)
            .ok()
            .filter(|duration| (Duration::from_secs(1)..=Self::MAX).contains(duration))
            .and_then(|duration| u32::try_from(duration.as_secs()).ok())
            .ok_or_else(|| TimeoutError::Duration {
                state,
                value: value.to_owned(),
            })?;
        Ok(Self { state, seconds })
    }
}

/// The help of `--timeout`: every state with what it means and its default.
#[must_use]
pub fn help() -> String {
    let states = FlowState::ALL.map(|state| {
        let meaning = state
            .to_possible_value()
            .and_then(|value| value.get_help().map(ToString::to_string))
            .unwrap_or_default();
        let default = Duration::from_secs(state.default_seconds().into());
        let default = humantime::format_duration(default).to_string();
        format!("  {:<16} {default:>4}  {meaning}", state.name())
    });
    format!(
        "How long a flow in a state may be without packets until it is over; may be repeated\n\n\
         States and defaults:\n{}",
        states.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use svc_lb_common::conntrack::state::{ANSWERED, BACKEND_FIN, CLIENT_FIN, RESET};

    use super::*;

    const TCP: u8 = Protocol::Tcp as u8;
    const UDP: u8 = Protocol::Udp as u8;

    #[test]
    fn states_follow_map_and_bits() {
        for (table, protocol, bits, state) in [
            (FlowTable::Opening, TCP, 0, FlowState::TcpOpening),
            (FlowTable::Opening, TCP, ANSWERED, FlowState::TcpOpening),
            (FlowTable::Opening, TCP, RESET, FlowState::TcpClosed),
            (
                FlowTable::Established,
                TCP,
                ANSWERED,
                FlowState::TcpEstablished,
            ),
            (
                FlowTable::Established,
                TCP,
                ANSWERED | CLIENT_FIN,
                FlowState::TcpClosing,
            ),
            (
                FlowTable::Established,
                TCP,
                ANSWERED | BACKEND_FIN,
                FlowState::TcpClosing,
            ),
            (
                FlowTable::Established,
                TCP,
                CLIENT_FIN | BACKEND_FIN,
                FlowState::TcpClosed,
            ),
            (
                FlowTable::Established,
                TCP,
                ANSWERED | RESET,
                FlowState::TcpClosed,
            ),
            (FlowTable::Opening, UDP, ANSWERED, FlowState::UdpOpening),
            (FlowTable::Streams, UDP, ANSWERED, FlowState::UdpEstablished),
        ] {
            assert_eq!(
                FlowState::of(table, protocol, bits),
                state,
                "{table:?} {bits:b}"
            );
        }
    }

    #[test]
    fn what_is_said_replaces_a_default() {
        let said = ["tcp-established=2h", "udp-opening=1s"].map(|text| text.parse().unwrap());
        let timeouts = Timeouts::with(&said);
        assert_eq!(timeouts.of(FlowState::TcpEstablished), 7_200);
        assert_eq!(timeouts.of(FlowState::UdpOpening), 1);
        assert_eq!(timeouts.of(FlowState::TcpClosing), 3_600);
    }

    #[test]
    fn wrong_timeouts_say_what_is_wrong() {
        let error = |text: &str| text.parse::<StateTimeout>().unwrap_err().to_string();
        assert!(error("tcp-opening").contains("STATE=DURATION"));
        assert!(error("tcp=1s").contains("udp-established"));
        for value in ["0s", "15d", "soon", ""] {
            assert!(error(&format!("tcp-closed={value}")).contains("1s to 14d"));
        }
    }

    #[test]
    fn the_help_lists_every_state_with_its_meaning() {
        let help = help();
        for state in FlowState::ALL {
            assert!(help.contains(state.name()), "{help}");
        }
        assert!(help.contains("One side has sent FIN"), "{help}");
        assert!(help.contains("1day") && help.contains("10s"), "{help}");
    }
}
