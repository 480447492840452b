//! The only place that names the kernel's verdicts.

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_redirect};
use aya_log_ebpf::info;
use svc_lb_common::config::DIAGNOSTICS;
use svc_lb_common::outcome::{Fate, Hook, Outcome};

use crate::config::enabled;
use crate::packet::{Packet, Step};
use crate::stats;

/// How a packet that went through the pipeline leaves it.
#[derive(Clone, Copy)]
pub(crate) enum Verdict {
    /// Onwards on its way.
    On(Outcome),
    /// Out through the interface it is at.
    Back(Outcome),
    /// Out through the interface that the redirect helper was told.
    Away(Outcome),
}

impl Verdict {
    #[inline(always)]
    fn outcome(self) -> Outcome {
        match self {
            Self::On(outcome) | Self::Back(outcome) | Self::Away(outcome) => outcome,
        }
    }
}

/// Counts the outcome; what is not ours is not counted.
#[inline(always)]
fn count<P: Packet>(packet: &P, verdict: &Step<Verdict>) {
    let outcome = match verdict {
        Ok(verdict) => verdict.outcome(),
        Err(outcome) => *outcome,
    };
    if outcome != Outcome::NotOurs {
        stats::outcome(packet.hook(), outcome);
    }
    if enabled(DIAGNOSTICS) && outcome.fate() == Fate::Drop {
        diagnose(packet.hook(), packet.interface(), outcome);
    }
}

/// Tells an operator who has asked for it about one drop in sixteen. Without the setting, which is
/// frozen, the verifier removes the call.
#[inline(never)]
fn diagnose(hook: Hook, interface: u32, outcome: Outcome) {
    // SAFETY: a helper without arguments.
    if unsafe { bpf_get_prandom_u32() } & 15 != 0 {
        return;
    }
    info!(
        (),
        "dropped: hook {}, interface {}, outcome {}", hook as u32, interface, outcome as u32
    );
}

/// The verdict for XDP.
#[inline(always)]
pub(crate) fn xdp<P: Packet>(packet: &P, verdict: Step<Verdict>) -> u32 {
    count(packet, &verdict);
    match verdict {
        Ok(Verdict::On(_)) => xdp_action::XDP_PASS,
        Ok(Verdict::Back(_)) => xdp_action::XDP_TX,
        Ok(Verdict::Away(_)) => xdp_action::XDP_REDIRECT,
        Err(outcome) => match outcome.fate() {
            Fate::Pass => xdp_action::XDP_PASS,
            Fate::Drop => xdp_action::XDP_DROP,
        },
    }
}

/// The verdict for tc. A packet that goes on must end in TC_ACT_UNSPEC (tcx: TCX_NEXT):
/// TC_ACT_OK would end the chain and skip other programs.
#[inline(always)]
pub(crate) fn tc<P: Packet>(packet: &P, verdict: Step<Verdict>) -> i32 {
    count(packet, &verdict);
    match verdict {
        Ok(Verdict::On(_)) => TC_ACT_UNSPEC,
        // SAFETY: a helper without pointers.
        Ok(Verdict::Back(_)) => unsafe { bpf_redirect(packet.interface(), 0) as i32 },
        Ok(Verdict::Away(_)) => TC_ACT_REDIRECT,
        Err(outcome) => match outcome.fate() {
            Fate::Pass => TC_ACT_UNSPEC,
            Fate::Drop => TC_ACT_SHOT,
        },
    }
}
