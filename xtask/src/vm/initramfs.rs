//! The initramfs: our init, the agent, the scenarios, the shared libraries they name, the modules.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use cpio::newc;

use super::kernel::Kernel;
use crate::proc;

/// Directories the init mounts onto or writes to.
const DIRECTORIES: &[&str] = &["dev", "proc", "sys", "run", "tmp", "var", "etc"];
const DIRECTORY_MODE: u32 = 0o040_755;
const FILE_MODE: u32 = 0o100_755;

/// What runs in the machine.
pub(super) struct Programs<'a> {
    pub(super) init: &'a Path,
    pub(super) agent: &'a Path,
    /// The scenarios of `tests/tests/netns.rs`.
    pub(super) scenarios: &'a Path,
    /// The programs that the lab loads itself; found where they are on this machine.
    pub(super) object: &'a Path,
}

/// Tools that scenarios call; where the init looks for programs.
const TOOLS: &[(&str, &str)] = &[("bin/ip", "/usr/sbin/ip"), ("bin/nft", "/usr/sbin/nft")];

/// Writes the archive. Modules are `modules/<number>-<name>.ko`, to be loaded by number.
pub(super) fn write(to: &Path, kernel: &Kernel, programs: &Programs<'_>) -> Result<()> {
    let file = File::create(to).with_context(|| format!("create {}", to.display()))?;
    let mut archive = Archive {
        out: BufWriter::new(file),
        directories: BTreeSet::new(),
    };
    for directory in DIRECTORIES {
        archive.directory(Path::new(directory))?;
    }
    let Programs {
        init,
        agent,
        scenarios,
        object,
    } = programs;
    let ours = [
        ("init", *init),
        ("bin/svc-lb", agent),
        ("bin/scenarios", scenarios),
    ];
    for (path, program) in ours {
        archive.file(path, &stripped(program)?)?;
    }
    let tools = TOOLS.iter().map(|(path, tool)| (*path, Path::new(tool)));
    for (path, tool) in tools.clone() {
        archive.file(path, &read(tool)?)?;
    }
    let object_path = object.to_string_lossy();
    archive.file(object_path.trim_start_matches('/'), &read(object)?)?;
    let programs: Vec<&Path> = ours
        .into_iter()
        .chain(tools)
        .map(|(_, path)| path)
        .collect();
    for library in libraries(&programs)? {
        archive.file(library.trim_start_matches('/'), &read(Path::new(&library))?)?;
    }
    for (number, module) in kernel.modules.iter().enumerate() {
        archive.file(
            &format!("modules/{number:03}-{}.ko", module.name),
            &module.image,
        )?;
    }
    newc::trailer(&mut archive.out)?;
    archive
        .out
        .flush()
        .with_context(|| format!("write {}", to.display()))
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("read {}", file.display()))
}

/// A program without what debuggers need, which is most of it: all of it lies in the machine's memory.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let to = tempfile::NamedTempFile::new()?;
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(to.path());
    proc::run(strip.arg(program))?;
    read(to.path())
}

struct Archive {
    out: BufWriter<File>,
    directories: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory and those above it, each once.
    fn directory(&mut self, path: &Path) -> Result<()> {
        let name = path.to_string_lossy().into_owned();
        if name.is_empty() || self.directories.contains(&name) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        newc::Builder::new(&name)
            .mode(DIRECTORY_MODE)
            .write(&mut self.out, 0)
            .finish()?;
        self.directories.insert(name);
        Ok(())
    }

    /// Adds a file that anybody may run, below directories that are added as needed.
    fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        if let Some(parent) = Path::new(path).parent() {
            self.directory(parent)?;
        }
        let size = u32::try_from(content.len()).with_context(|| format!("{path} is too big"))?;
        let mut entry = newc::Builder::new(path)
            .mode(FILE_MODE)
            .write(&mut self.out, size);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }
}

/// The shared libraries, and the loader, that the programs name: their paths on this machine.
fn libraries(programs: &[&Path]) -> Result<BTreeSet<String>> {
    let mut libraries = BTreeSet::new();
    for program in programs {
        let listing = proc::capture(Command::new("ldd").arg(program))?;
        // "libc.so.6 => /lib/libc.so.6 (0x...)", "/lib64/ld-linux-x86-64.so.2 (0x...)", "linux-vdso.so.1 (0x...)"
        libraries.extend(
            listing
                .split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(str::to_owned),
        );
    }
    Ok(libraries)
}
