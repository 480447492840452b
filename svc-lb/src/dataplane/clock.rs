//! The programs' clock: jiffies64, and how many of them a second has.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya_obj::generated::{bpf_func_id, bpf_prog_type};
use nix::time::{ClockId, clock_getres, clock_gettime};

use super::FlowClock;
use super::sys::{self, insn};

/// Reads the programs' clock.
#[derive(Debug)]
pub struct Clock {
    program: OwnedFd,
    hz: u32,
}

impl Clock {
    /// Loads a program that reads the clock.
    pub fn new() -> io::Result<Self> {
        let program = sys::prog_load(
            bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS,
            &[insn::call(bpf_func_id::BPF_FUNC_jiffies64), insn::exit()],
        )?;
        Ok(Self {
            program,
            hz: jiffies_per_second()?,
        })
    }

    /// What a program would read now.
    pub fn now(&self) -> io::Result<FlowClock> {
        Ok(FlowClock {
            jiffies: sys::run_once(self.program.as_fd())?,
            hz: self.hz,
        })
    }
}

/// The kernel's CONFIG_HZ. The resolution of the coarse clocks is one tick exactly
/// (`LOW_RES_NSEC`), so nothing needs measuring.
pub fn jiffies_per_second() -> io::Result<u32> {
    const NANOSECONDS: i64 = 1_000_000_000;
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)?.tv_nsec();
    let hz = if tick > 0 {
        (NANOSECONDS + tick / 2) / tick
    } else {
        0
    };
    u32::try_from(hz)
        .ok()
        .filter(|hz| (24..=10_000).contains(hz))
        .ok_or_else(|| io::Error::other(format!("a tick of {tick} ns")))
}

/// Seconds since the machine's start.
#[must_use]
pub fn boot_seconds() -> u64 {
    // The clock is there, and its time positive.
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .ok()
        .and_then(|time| u64::try_from(time.tv_sec()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tick_is_a_known_configuration() {
        let hz = jiffies_per_second().unwrap();
        assert!([100, 250, 300, 1000].contains(&hz), "{hz}");
    }
}
