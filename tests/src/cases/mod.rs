//! Cases: Kubernetes objects in, tables out. One readable file each, under `tests/cases/<area>/<name>.yaml`.
//!
//! A case names the rows of `docs/semantics.md` that it proves, and has steps: objects that come, change and go, and
//! what is programmed after each. Everything between is the agent's own: reading of manifests, model, compile, plan
//! and apply (`world`); what is programmed is read back and written down as text (`text`).
//!
//! Each case is three tests, `<area>/<name>::<store>`: against the maps in memory; against maps whose writes fail, by
//! several seeds, which end the same; and against the kernel's, which hold byte for byte what the maps in memory do.
//! `SVC_LB_BLESS=1` writes what is programmed into the files, for review.

mod file;
mod text;
mod world;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::{Arguments, Conclusion, Trial};
use similar::TextDiff;
use svc_lb::app::reconcile::Reconciler;
use svc_lb::dataplane::memory::Memory;
use svc_lb::dataplane::{Dataplane, Snapshot};
use svc_lb::plan::view::Tables;

use self::file::{Case, Step};
use self::world::World;
use crate::lab::privileged;
use crate::prog::rig;

/// Environment variable that has the files of cases rewritten.
pub const BLESS: &str = "SVC_LB_BLESS";
/// Seeds of the store that fails. Those that are odd also let the agent die in the middle of each step.
const SEEDS: u64 = 8;
/// How many of 1,024 writes fail.
const RATE: u32 = 300;

/// Runs the cases as tests, by the command line of a test program.
///
/// # Errors
/// When a file cannot be read, or is no case.
pub fn main() -> Result<Conclusion> {
    let arguments = Arguments::from_args();
    let bless = env::var_os(BLESS).is_some_and(|value| value == "1");
    if bless && !arguments.list {
        for path in files()? {
            let chosen = arguments.filter.as_ref();
            if chosen.is_none_or(|part| path.to_string_lossy().contains(part)) {
                rewrite(&path).with_context(|| path.display().to_string())?;
            }
        }
    }
    let root = arguments.list || privileged();
    let mut trials = Vec::new();
    for path in files()? {
        let case = Case::read(&path)?;
        let name = case.name.clone();
        let trial = |store: &str, run: fn(&Case) -> Result<()>| {
            let case = case.clone();
            Trial::test(format!("{name}::{store}"), move || {
                run(&case).map_err(|error| format!("{error:#}").into())
            })
        };
        trials.push(trial("memory", in_memory));
        trials.push(trial("faulty", in_failing_memory));
        trials.push(trial("kernel", in_the_kernel).with_ignored_flag(!root));
    }
    Ok(libtest_mimic::run(&arguments, trials))
}

/// The files of all cases, sorted.
fn files() -> Result<Vec<PathBuf>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let mut files = Vec::new();
    for area in fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))? {
        let area = area?.path();
        for file in fs::read_dir(&area).with_context(|| format!("read {}", area.display()))? {
            let file = file?.path();
            ensure!(
                file.extension().is_some_and(|ending| ending == "yaml"),
                "{}: a case is a .yaml file",
                file.display()
            );
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn in_memory(case: &Case) -> Result<()> {
    let mut world = World::new(case, Memory::new(rig::map_sizes()), 0)?;
    for step in &case.steps {
        world.step(step)?;
        world.settle()?;
        compare(step, &world)?;
    }
    Ok(())
}

fn in_failing_memory(case: &Case) -> Result<()> {
    for seed in 0..SEEDS {
        let mut world = World::new(case, Memory::new(rig::map_sizes()), seed)?;
        for step in &case.steps {
            world.step(step)?;
            world.stumble(RATE);
            if seed % 2 == 1 {
                world.restart()?;
                world.stumble(RATE);
            }
            world.settle()?;
            // Numbers are given out anew where an agent died in between; what they are used for stays the same.
            same("tables", &step.tables, &world.tables()?)
                .with_context(|| format!("{}, faults of seed {seed}", step.title()))?;
        }
    }
    Ok(())
}

fn in_the_kernel(case: &Case) -> Result<()> {
    let kernel = rig::maps();
    let mut memory = World::new(case, Memory::new(kernel.sizes()), 0)?;
    let mut world = World::new(case, kernel, 0)?;
    for step in &case.steps {
        memory.step(step)?;
        memory.settle()?;
        world.step(step)?;
        world.settle()?;
        compare(step, &world)?;
        let (memory, kernel) = (written(memory.snapshot()?), written(world.snapshot()?));
        ensure!(
            memory == kernel,
            "{}: the kernel holds\n{kernel:#?}\nthe maps in memory\n{memory:#?}",
            step.title()
        );
    }
    Ok(())
}

/// What a reconciler has programmed, for people and for comparison: numbers that it gave out are left out.
///
/// # Errors
/// When the maps cannot be read.
pub fn programmed<D: Dataplane>(reconciler: &Reconciler<D>) -> Result<String> {
    let tables = Tables::new(&reconciler.dataplane().snapshot()?, &reconciler.names());
    Ok(text::tables(
        &tables,
        &reconciler.services(),
        &BTreeMap::new(),
    ))
}

/// Elements that are all zero cannot be told from those never written, in the kernel.
fn written(mut snapshot: Snapshot) -> Snapshot {
    snapshot
        .services
        .retain(|(_, words)| words.cluster.0 != 0 || words.local.0 != 0 || words.options != 0);
    let last = snapshot.slots.iter().rposition(|id| *id != 0);
    snapshot.slots.truncate(last.map_or(0, |last| last + 1));
    snapshot
}

fn compare<D: Dataplane>(step: &Step, world: &World<'_, D>) -> Result<()> {
    same("tables", &step.tables, &world.tables()?).with_context(|| step.title())?;
    if let Some(maps) = &step.maps {
        same("maps", maps, &world.maps()?).with_context(|| step.title())?;
    }
    Ok(())
}

fn same(what: &str, expected: &str, found: &str) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let diff = TextDiff::from_lines(expected, found);
    let diff = diff
        .unified_diff()
        .header("expected", "programmed")
        .to_string();
    bail!("{what} differ; if they are right, {BLESS}=1 writes them into the file\n{diff}")
}

/// Runs a case against the maps in memory and writes what came of it into its file.
fn rewrite(path: &Path) -> Result<()> {
    let case = Case::read(path)?;
    let mut world = World::new(&case, Memory::new(rig::map_sizes()), 0)?;
    let mut found = Vec::new();
    for step in &case.steps {
        world.step(step)?;
        world.settle()?;
        let maps = step.maps.is_some().then(|| world.maps()).transpose()?;
        found.push((world.tables()?, maps));
    }
    file::rewrite(path, &found)
}
