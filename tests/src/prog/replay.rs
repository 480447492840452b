//! Timing a program that rewrites its packets: each run gets the next frame of a list.
//!
//! See `tests/replay/src/main.rs` for why. What the replay itself costs is measured the same way with an empty
//! program in place of the one under test, in turn with it, and taken off.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use aya::maps::{Array, ProgramArray};
use aya::programs::{ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use svc_lb_common::outcome::Hook;

use super::Frame;
use super::rig::{self, Rig};

/// Length of an IPv4 frame and of an IPv6 one, in bytes: what they share is that they are whole cache lines or nearly.
pub const LENGTHS: [usize; 2] = [64, 80];

/// Bytes of an element of the map `frames`.
const ELEMENT: usize = 80;
/// Place of the program under test, and of the empty one.
const TESTED: u32 = 0;
const EMPTY: u32 = 1;

#[derive(Clone, Copy)]
#[repr(C)]
struct Plan {
    frames: u32,
    length: u32,
    target: u32,
    next: u32,
}
// SAFETY: four u32, any bytes are one.
unsafe impl Pod for Plan {}

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Element([u8; ELEMENT]);
// SAFETY: bytes, as many as its alignment divides.
unsafe impl Pod for Element {}

/// The programs of a [`Rig`] behind a replay.
pub struct Replay {
    ebpf: Ebpf,
    plan: Plan,
    hook: Hook,
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").finish_non_exhaustive()
    }
}

impl Replay {
    /// Puts a replay with room for so many frames in front of one of the rig's programs.
    ///
    /// # Panics
    /// If the object that `cargo xtask bench` builds is missing or does not load.
    #[must_use]
    pub fn new(rig: &Rig, hook: Hook, frames: u32) -> Self {
        let object = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/replay");
        let bytes = std::fs::read(&object)
            .unwrap_or_else(|error| panic!("{}: {error}; run cargo xtask bench", object.display()));
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("frames", frames);
        let mut ebpf = loader.load(&bytes).expect("maps are created");
        let (map, empty) = if hook == Hook::XdpIngress {
            for name in ["replay_xdp", "empty_xdp"] {
                xdp(&mut ebpf, name).load().expect("it loads");
            }
            ("xdp_target", "empty_xdp")
        } else {
            for name in ["replay_tc", "empty_tc"] {
                classifier(&mut ebpf, name).load().expect("it loads");
            }
            ("tc_target", "empty_tc")
        };
        let fds = [(TESTED, rig.program_fd(hook)), (EMPTY, fd(&ebpf, empty))];
        let map = ebpf.map_mut(map).expect("the map is there");
        let mut map = ProgramArray::try_from(map).expect("a program array");
        for (place, fd) in &fds {
            map.set(*place, fd, 0).expect("a program is put");
        }
        Self {
            ebpf,
            plan: Plan {
                frames: 1,
                length: 64,
                target: EMPTY,
                next: 0,
            },
            hook,
        }
    }

    /// Replays these frames from now on, one a run, from the first one on and over again.
    ///
    /// # Panics
    /// If they are not all of one of [`LENGTHS`], or too many.
    pub fn frames(&mut self, frames: &[Frame]) {
        let map = self.ebpf.map_mut("frames").expect("the map is there");
        let mut map: Array<_, Element> = map.try_into().expect("an array");
        let mut length = 0;
        for (index, frame) in (0..).zip(frames) {
            let bytes = frame.to_bytes();
            assert!(LENGTHS.contains(&bytes.len()), "{} bytes", bytes.len());
            assert!(length == 0 || length == bytes.len(), "of one length");
            length = bytes.len();
            let mut element = Element([0; ELEMENT]);
            element.0[..length].copy_from_slice(&bytes);
            map.set(index, element, 0).expect("a frame is put");
        }
        self.plan.frames = u32::try_from(frames.len()).expect("counted");
        self.plan.length = u32::try_from(length).expect("short");
        self.plan.next = 0;
    }

    /// Runs the program under test on so many frames; how long each took, the replay included.
    pub fn run(&mut self, interface: u32, runs: u32) -> Duration {
        self.go(interface, runs, TESTED)
    }

    /// The same with an empty program.
    pub fn run_empty(&mut self, interface: u32, runs: u32) -> Duration {
        self.go(interface, runs, EMPTY)
    }

    fn go(&mut self, interface: u32, runs: u32, target: u32) -> Duration {
        let start = self.plan.next;
        let plan = Plan {
            target,
            ..self.plan
        };
        let map = self.ebpf.map_mut("plan").expect("the map is there");
        let mut map: Array<_, Plan> = map.try_into().expect("an array");
        map.set(0, plan, 0).expect("the plan is set");
        if target == TESTED {
            self.plan.next = (start + runs) % plan.frames;
        }
        let frame = vec![0x45; plan.length as usize];
        let options = |context| TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(context),
            repeat: runs,
            ..TestRunOptions::default()
        };
        let result = if self.hook == Hook::XdpIngress {
            let context = rig::xdp_context(interface, frame.len());
            xdp(&mut self.ebpf, "replay_xdp").test_run(options(&context))
        } else {
            let context = rig::skb_context(interface);
            classifier(&mut self.ebpf, "replay_tc").test_run(options(&context))
        };
        result.expect("a program runs").duration
    }
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    let program = ebpf.program_mut(name).expect("the program is there");
    program.try_into().expect("an XDP program")
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    let program = ebpf.program_mut(name).expect("the program is there");
    program.try_into().expect("a classifier")
}

fn fd(ebpf: &Ebpf, name: &str) -> ProgramFd {
    let program = ebpf.program(name).expect("the program is there");
    let fd = program.fd().expect("it is loaded");
    fd.try_clone().expect("a descriptor is cloned")
}
