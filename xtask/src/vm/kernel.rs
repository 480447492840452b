//! A Debian kernel: fetched, unpacked, its modules in the order they load in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _};

use crate::apt::{self, Suite};
use crate::proc;

/// What depends on the suite's current kernel for virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Modules the lab and the programs need; what they depend on is found.
const MODULES: &[&str] = &[
    "veth",
    "bridge",
    "br_netfilter",
    "8021q",
    "vxlan",
    "ipip",
    "ip6_tunnel",
    "tun",
    "dummy",
    "sctp",
    "sch_ingress",
    "cls_bpf",
    "nf_conntrack",
    "nf_tables",
    "nft_ct",
    "nft_chain_nat",
    "nft_masq",
];

/// A kernel on disk.
pub(super) struct Kernel {
    /// `uname -r`.
    pub(super) release: String,
    pub(super) image: PathBuf,
    /// Uncompressed modules in the order to load them.
    pub(super) modules: Vec<Module>,
}

/// A kernel module.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) image: Vec<u8>,
}

/// Fetches the current kernel of `suite` into `dir`, unless one is there, and reads it.
pub(super) fn fetch(suite: &str, dir: &Path, refresh: bool) -> Result<Kernel> {
    let root = dir.join("root");
    if refresh || !root.exists() {
        unpack_packages(suite, dir, &root)?;
    }
    let release_dir = release_dir(&root)?;
    let release = file_name(&release_dir);
    let image = [
        root.join(format!("boot/vmlinuz-{release}")),
        release_dir.join("vmlinuz"),
    ]
    .into_iter()
    .find(|image| image.is_file())
    .with_context(|| format!("{} holds no vmlinuz", root.display()))?;
    let modules = Modules::index(&release_dir)?.in_load_order()?;
    Ok(Kernel {
        release,
        image,
        modules,
    })
}

/// Downloads the image's packages and unpacks them into `root`, all or nothing.
fn unpack_packages(suite: &str, dir: &Path, root: &Path) -> Result<()> {
    let suite = Suite::open(suite)?;
    let image = suite
        .depends(META_PACKAGE)?
        .into_iter()
        .find(|package| is_part_of_kernel(package, &["linux-image-"]))
        .with_context(|| format!("{META_PACKAGE} depends on no kernel"))?;
    let mut packages = suite.depends(&image)?;
    // Newer suites split image, modules and configuration.
    packages.retain(|package| {
        is_part_of_kernel(package, &["linux-base-", "linux-binary-", "linux-modules-"])
    });
    packages.push(image);

    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let fresh = tempfile::tempdir_in(dir)?;
    for package in &packages {
        let deb = suite.download(package, "")?;
        apt::unpack(&deb, "", 0, fresh.path())?;
    }
    if root.exists() {
        fs::remove_dir_all(root).with_context(|| format!("remove {}", root.display()))?;
    }
    let fresh = fresh.keep();
    fs::rename(&fresh, root).with_context(|| format!("write {}", root.display()))
}

/// Whether `package` is one of `kinds` followed by a version.
fn is_part_of_kernel(package: &str, kinds: &[&str]) -> bool {
    kinds.iter().any(|kind| {
        package
            .strip_prefix(kind)
            .is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
    })
}

/// The only directory below `lib/modules`.
fn release_dir(root: &Path) -> Result<PathBuf> {
    for modules in ["usr/lib/modules", "lib/modules"] {
        if let Ok(mut entries) = fs::read_dir(root.join(modules))
            && let Some(entry) = entries.next()
        {
            return Ok(entry?.path());
        }
    }
    bail!("{} holds no modules", root.display())
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The modules of one kernel by name.
struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    fn index(release_dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut pending = vec![release_dir.join("kernel")];
        while let Some(dir) = pending.pop() {
            let entries = fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if let Some(name) = module_name(&file_name(&path)) {
                    files.insert(name, path);
                }
            }
        }
        let list = release_dir.join("modules.builtin");
        let builtin = fs::read_to_string(&list)
            .with_context(|| format!("read {}", list.display()))?
            .lines()
            .filter_map(|line| module_name(&file_name(Path::new(line))))
            .collect();
        Ok(Self { files, builtin })
    }

    /// [`MODULES`], each after those it depends on.
    fn in_load_order(&self) -> Result<Vec<Module>> {
        let mut loaded = Vec::new();
        let mut seen = BTreeSet::new();
        for name in MODULES {
            self.add(name, &mut seen, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(&self, name: &str, seen: &mut BTreeSet<String>, loaded: &mut Vec<Module>) -> Result<()> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self
            .files
            .get(name)
            .with_context(|| format!("this kernel has no module {name}"))?;
        let image = read(file)?;
        for dependency in
            dependencies(&image).with_context(|| format!("read {}", file.display()))?
        {
            self.add(&dependency, seen, loaded)?;
        }
        loaded.push(Module {
            name: name.to_owned(),
            image,
        });
        Ok(())
    }
}

/// "a-b.ko.xz" is the module "a_b".
fn module_name(file: &str) -> Option<String> {
    let (stem, suffix) = file.split_once(".ko")?;
    matches!(suffix, "" | ".xz").then(|| stem.replace('-', "_"))
}

/// The module's ELF image.
fn read(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|extension| extension == "xz") {
        return proc::capture_bytes(Command::new("xz").arg("-dc").arg(file));
    }
    fs::read(file).with_context(|| format!("read {}", file.display()))
}

/// What the module's own `.modinfo` says it needs.
fn dependencies(image: &[u8]) -> Result<Vec<String>> {
    let elf = object::File::parse(image)?;
    let info = elf.section_by_name(".modinfo").context("no .modinfo")?;
    Ok(info
        .data()?
        .split(|byte| *byte == 0)
        .filter_map(|entry| entry.strip_prefix(b"depends="))
        .flat_map(|names| names.split(|byte| *byte == b','))
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).replace('-', "_"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{is_part_of_kernel, module_name};

    #[test]
    fn module_names_are_the_kernel_s_own() {
        assert_eq!(module_name("nf-nat.ko.xz").as_deref(), Some("nf_nat"));
        assert_eq!(module_name("veth.ko").as_deref(), Some("veth"));
        assert_eq!(module_name("modules.dep"), None);
    }

    #[test]
    fn meta_packages_are_not_kernels() {
        let kinds = &["linux-image-", "linux-base-"];
        assert!(is_part_of_kernel(
            "linux-image-7.2.12+deb13-cloud-amd64",
            kinds
        ));
        for other in ["linux-base", "linux-base-cloud-amd64", "kmod"] {
            assert!(!is_part_of_kernel(other, kinds), "{other}");
        }
    }
}
