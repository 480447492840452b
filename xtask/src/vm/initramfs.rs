//! The initramfs: our init, the agent, the shared libraries they name, the modules.

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

/// Writes the archive. Modules are `modules/<number>-<name>.ko`, to be loaded by number.
pub(super) fn write(to: &Path, kernel: &Kernel, init: &Path, agent: &Path) -> Result<()> {
    let file = File::create(to).with_context(|| format!("create {}", to.display()))?;
    let mut archive = Archive {
        out: BufWriter::new(file),
        directories: BTreeSet::new(),
    };
    for directory in DIRECTORIES {
        archive.directory(Path::new(directory))?;
    }
    for (path, program) in [("init", init), ("bin/svc-lb", agent)] {
        let content = fs::read(program).with_context(|| format!("read {}", program.display()))?;
        archive.file(path, &content)?;
    }
    for library in libraries(&[init, agent])? {
        let content = fs::read(&library).with_context(|| format!("read {library}"))?;
        archive.file(library.trim_start_matches('/'), &content)?;
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
