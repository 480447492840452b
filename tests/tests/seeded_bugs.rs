//! Bugs, each put into a copy of the programs: the reference and random packets find every one.
//!
//! A bug is a change of a line or two that still compiles, loads and forwards packets. The copy is a workspace of its own
//! under `target/seeded-bugs`, so that no build of the real programs can pick it up.

#![expect(
    clippy::unwrap_used,
    reason = "what helpers of tests unwrap fails the test"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use svc_lb_tests::lab::privileged;
use svc_lb_tests::prog::differential::{self, Plan};
use svc_lb_tests::prog::{network, race};

/// A bug: which text of which file becomes what.
struct Bug {
    name: &'static str,
    file: &'static str,
    is: &'static str,
    becomes: &'static str,
}

const BUGS: [Bug; 13] = [
    Bug {
        name: "a fragment's id is not the datagram's alone",
        file: "fragment.rs",
        is: "if F::fragments().insert(key, first, NOEXIST).is_ok() {",
        becomes: "if F::fragments().get_ptr(key).is_some() || F::fragments().insert(key, first, NOEXIST).is_ok() {",
    },
    Bug {
        name: "checksums forget the ports",
        file: "rewrite/nat.rs",
        is: "    if old == new {\n        return 0;",
        becomes: "    if old == new || new != 0 {\n        return 0;",
    },
    Bug {
        name: "the last slot is never picked",
        file: "select.rs",
        is: "range.start() + scale(hash, range.length());",
        becomes: "range.start() + scale(hash, range.length() - (range.length() > 1) as u32);",
    },
    Bug {
        name: "a pod gets the Local set from outside addresses",
        file: "select.rs",
        is: "!inside && flags & flag::EXTERNAL_LOCAL != 0",
        becomes: "flags & flag::EXTERNAL_LOCAL != 0",
    },
    Bug {
        name: "a client's second packet confirms its flow by itself",
        file: "conntrack.rs",
        is: "flow.traits & flow::REVERSE == 0 && flow.state & state::ANSWERED != 0",
        becomes: "flow.traits & flow::REVERSE == 0",
    },
    Bug {
        name: "the backend's FIN counts as the client's",
        file: "conntrack.rs",
        is: "gained |= if reverse {\n            state::BACKEND_FIN",
        becomes: "gained |= if reverse {\n            state::CLIENT_FIN",
    },
    Bug {
        name: "a live flow's tuple is taken over",
        file: "conntrack.rs",
        is: "(found.source.fold() ^ peer.source.fold())\n        | (found.destination",
        becomes: "(found.destination",
    },
    Bug {
        name: "what XDP translated is taken for a direct connection",
        file: "pipeline.rs",
        is: "let seen_by_xdp = edge & XDP != 0 && hook != Hook::XdpIngress;",
        becomes: "let seen_by_xdp = edge & XDP != 0 && hook == Hook::XdpIngress;",
    },
    Bug {
        name: "datagrams stay with a backend that left",
        file: "pipeline.rs",
        is: "flow.traits & flow::DIRECT == 0 && !select::still_serves",
        becomes: "flow.traits & flow::DIRECT == 0 && !met.is_udp() && !select::still_serves",
    },
    Bug {
        name: "IPv4 options are not skipped",
        file: "parse/ipv4.rs",
        is: "l4: ip.l3 + length,",
        becomes: "l4: ip.l3 + Ipv4Hdr::LEN,",
    },
    Bug {
        name: "an ICMP error's checksum misses that of the packet it quotes",
        file: "rewrite/icmp.rs",
        is: "            changes += difference(old as u32, new as u32);\n            packet.store(at, &new)?;\n        }",
        becomes: "            packet.store(at, &new)?;\n        }",
    },
    Bug {
        name: "an ICMP error is believed that went to somebody else",
        file: "pipeline.rs",
        is: "if quote.ip.source != ip.destination {",
        becomes: "if quote.ip.source != ip.destination && quote.l4 == 0 {",
    },
    Bug {
        name: "the ICMP checksum leaves out the quoted packet",
        file: "reject.rs",
        is: "sum(body + F::pseudo_sum(met, quoted), &[type_, code])",
        becomes: "sum(body / 0x10_0000 + F::pseudo_sum(met, quoted), &[type_, code])",
    },
];

/// Makes the time between finding a map element and copying it long enough for another CPU.
const SLOW: Bug = Bug {
    name: "an element is copied late",
    file: "conntrack.rs",
    is: "    // SAFETY: the element stays mapped while the program runs; that its content may change\n",
    becomes: "    let mut waited = 0;\n    while waited < 64 {\n        // SAFETY: a helper without arguments.\n        \
              unsafe { aya_ebpf::helpers::generated::bpf_ktime_get_ns() };\n        waited += 1;\n    }\n\
              // SAFETY: the element stays mapped\n",
};

/// Takes what was copied for what was looked for.
const UNCHECKED: Bug = Bug {
    name: "copies are not checked",
    file: "conntrack.rs",
    is: "if !flow.belongs_to(key) {",
    becomes: "if flow.check == 0 && !flow.belongs_to(key) {",
};

/// What each bug is searched with: a part of what the tests of the real programs do.
const PLAN: Plan = Plan {
    seed: 1,
    rounds: 4,
    packets: 24_000,
    count_each: false,
};

/// How long two CPUs fight for the elements.
const RACE: Duration = Duration::from_secs(5);

#[test]
fn every_seeded_bug_is_caught() {
    if !privileged() {
        return;
    }
    let (_turn, workspace) = copy_workspace();
    let mut missed = Vec::new();
    for bug in &BUGS {
        let begin = Instant::now();
        let object = build(&workspace, &[bug]);
        let (built, begin) = (begin.elapsed(), Instant::now());
        let result = network::private(|network| differential::run(network, &object, &PLAN));
        let found = begin.elapsed();
        match result {
            Err(mismatch) => {
                let first = mismatch.0.lines().take(2).collect::<Vec<_>>().join(" ");
                let first: String = first.chars().take(160).collect();
                println!(
                    "{}: built in {built:.1?}, caught in {found:.1?}: {first}",
                    bug.name
                );
            }
            Ok(report) => {
                println!("{}: missed in {} packets", bug.name, report.packets);
                missed.push(bug.name);
            }
        }
    }
    assert!(missed.is_empty(), "missed: {missed:?}");
}

/// A value pointer may be somebody else's entry: with a long look at each element that does happen, the check word
/// notices it, and without the check packets get another entry's translation.
#[test]
fn a_reused_element_is_noticed_by_its_check_word() {
    if !privileged() {
        return;
    }
    let (_turn, workspace) = copy_workspace();
    let run = |bugs: &[&Bug]| {
        let object = build(&workspace, bugs);
        let race = network::private(|network| race::take_turns(network, &object, RACE));
        println!("{race:?}");
        race
    };
    let checked = run(&[&SLOW]);
    assert!(checked.mismatches > 0, "{checked:?}");
    assert_eq!(checked.wrong, None);
    let unchecked = run(&[&SLOW, &UNCHECKED]);
    assert!(unchecked.wrong.is_some(), "{unchecked:?}");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Copies what the programs are built from; the programs' own sources come with each bug. One test at a time has it.
fn copy_workspace() -> (MutexGuard<'static, ()>, PathBuf) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let workspace = std::path::absolute(root().join("target/seeded-bugs")).unwrap();
    fs::create_dir_all(&workspace).unwrap();
    for file in ["Cargo.lock", "rust-toolchain.toml"] {
        fs::copy(root().join(file), workspace.join(file)).unwrap();
    }
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let only = "members = [\"svc-lb-common\", \"svc-lb-ebpf\"]";
    let lines = manifest
        .lines()
        .filter(|line| !line.starts_with("default-members"))
        .map(|line| {
            if line.starts_with("members = ") {
                only
            } else {
                line
            }
        });
    write(
        &workspace.join("Cargo.toml"),
        &(lines.collect::<Vec<_>>().join("\n") + "\n"),
    );
    for package in ["svc-lb-common", "svc-lb-ebpf"] {
        copy(
            &root().join(package),
            &workspace.join(package),
            &|_, text| text,
        );
    }
    (turn, workspace)
}

/// Puts bugs into the copy and builds it.
fn build(workspace: &Path, bugs: &[&Bug]) -> PathBuf {
    let sources = Path::new("svc-lb-ebpf").join("src");
    let from = root().join(&sources);
    copy(&from, &workspace.join(&sources), &|path, text| {
        let here = bugs.iter().filter(|bug| path == from.join(bug.file));
        here.fold(text, |text, bug| {
            let places = text.matches(bug.is).count();
            assert_eq!(places, 1, "{}: {:?} in {}", bug.name, bug.is, bug.file);
            text.replace(bug.is, bug.becomes)
        })
    });
    let status = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "xtask", "--"])
        .args(["build", "--bpf-only", "--bpf-workspace"])
        .arg(workspace)
        .current_dir(root())
        .status()
        .unwrap();
    assert!(status.success(), "the programs are not built");
    workspace.join("svc-lb")
}

/// Copies a directory of texts, each changed by `change`.
fn copy(from: &Path, to: &Path, change: &dyn Fn(&Path, String) -> String) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, copied) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy(&path, &copied, change);
        } else {
            let text = fs::read_to_string(&path).unwrap();
            write(&copied, &change(&path, text));
        }
    }
}

/// Writes a file, unless it is what it was: then its time stamp stays and nothing is built anew.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return;
    }
    fs::write(path, text).unwrap();
}
