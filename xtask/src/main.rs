//! Everything one does with this repository, as commands: `cargo xtask --help`.
//!
//! One file per command. Each command first runs what it needs of `setup`, so that a fresh machine needs no
//! preparation beyond rustup, a C compiler and apt.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

mod apt;
mod bench;
mod build;
mod demo;
mod deps;
mod dist;
mod elf_gate;
mod lint;
mod proc;
mod semantics;
mod setup;
mod test;
mod tidy;
mod vm;

/// Build, test and try svc-lb.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    after_help = "Examples:\n  cargo xtask setup            make this machine ready, say what is done\n  cargo xtask build --release  the agent with its BPF object inside: target/release/svc-lb\n  cargo xtask dist             one static binary: target/dist/svc-lb\n  cargo xtask demo             a small cluster in namespaces; shows what hits what\n  cargo xtask test             all tests; the last line sums them up\n  cargo xtask lint             what is checked without running the code\n  cargo xtask semantics        which tests prove which row of docs/semantics.md\n  cargo xtask vm all           on four kernels, in QEMU\n  cargo xtask bench            the figures we quote"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Setup(setup::Args),
    Build(build::Args),
    Bench(bench::Args),
    Demo(demo::Args),
    Dist(dist::Args),
    Test(test::Args),
    Lint(lint::Args),
    Semantics(semantics::Args),
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    let root = project_root()?;
    env::set_current_dir(&root).with_context(|| format!("enter {}", root.display()))?;
    match command {
        Command::Setup(args) => setup::run(&args)?,
        Command::Build(args) => build::run(&args)?,
        Command::Bench(args) => bench::run(&args)?,
        Command::Demo(args) => demo::run(&args)?,
        Command::Dist(args) => dist::run(&args)?,
        Command::Test(args) => return test::run(&args),
        Command::Lint(args) => lint::run(&args)?,
        Command::Semantics(args) => semantics::run(&args)?,
        Command::Vm(args) => vm::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The directory of the workspace's `Cargo.toml`.
fn project_root() -> Result<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .context("xtask's own directory has no parent")
}
