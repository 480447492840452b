//! The verifier gate: every program loads, within a budget of verified instructions.

use aya::programs::ProgramError;
use aya::{EbpfLoader, VerifierLogLevel};
use svc_lb_common::config::{self, Config};
use svc_lb_common::outcome::Hook;
use svc_lb_tests::lab::privileged;
use svc_lb_tests::prog::rig;

/// Budget of verified instructions: the kernel's limit is a million, and loading takes a millisecond for some thousand.
const fn budget(hook: Hook) -> u32 {
    match hook {
        Hook::XdpIngress => 250_000,
        Hook::TcIngress => 300_000,
        Hook::TcEgress => 100_000,
    }
}

#[test]
fn every_program_loads_within_its_budget() {
    if !privileged() {
        return;
    }
    let bytes = std::fs::read(rig::object()).expect("cargo xtask build comes first");
    // What is off is not verified.
    for bits in [Config::DEFAULT.bits, !config::DIAGNOSTICS] {
        let config = Config {
            bits,
            ..Config::DEFAULT
        };
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global("CONFIG", &config, true)
            .load(&bytes)
            .expect("maps are created");
        for hook in Hook::ALL {
            let (name, budget) = (hook.name(), budget(*hook));
            match rig::load(&mut ebpf, *hook) {
                Ok(count) => {
                    println!("{name}: {count} instructions verified, budget {budget}");
                    assert!(
                        count <= budget,
                        "{name}: {count} instructions, budget {budget}"
                    );
                }
                Err(ProgramError::LoadError {
                    io_error,
                    verifier_log,
                }) => {
                    let log = verifier_log.to_string();
                    let lines: Vec<_> = log.lines().collect();
                    let tail = lines.len().saturating_sub(150);
                    panic!("{name}: {io_error}\n{}", lines[tail..].join("\n"));
                }
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
}
