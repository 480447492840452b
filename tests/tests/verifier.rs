//! The verifier gate: every program loads, within a budget of verified instructions.

use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};

/// Name, budget of verified instructions.
const BUDGET: [(&str, u32); 3] = [
    ("xdp_ingress", 250_000),
    ("tc_ingress", 300_000),
    ("tc_egress", 30_000),
];

fn load(ebpf: &mut Ebpf, name: &str) -> Result<u32, ProgramError> {
    let program = ebpf.program_mut(name).expect("the object has the program");
    let info = if name.starts_with("xdp") {
        let program: &mut Xdp = program.try_into()?;
        program.load()?;
        program.info()?
    } else {
        let program: &mut SchedClassifier = program.try_into()?;
        program.load()?;
        program.info()?
    };
    Ok(info.verified_instruction_count().unwrap_or(0))
}

#[test]
fn every_program_loads_within_its_budget() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/svc-lb");
    let bytes = std::fs::read(path).expect("cargo xtask build comes first");
    let mut ebpf = EbpfLoader::new()
        .verifier_log_level(VerifierLogLevel::STATS)
        .load(&bytes)
        .expect("maps are created");
    for (name, budget) in BUDGET {
        match load(&mut ebpf, name) {
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
                let tail: Vec<_> = log.lines().rev().take(150).collect();
                let tail: Vec<_> = tail.into_iter().rev().collect();
                panic!("{name}: {io_error}\n{}", tail.join("\n"));
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
}
