//! Debian packages from suites the machine does not use itself.
//!
//! A private apt configuration (own sources, lists, cache and an empty status file, all under `target/apt`)
//! leaves the system's own apt untouched. Packages are verified with Debian's archive keys, then only unpacked.

use std::fs;
use std::path::{Path, PathBuf, absolute};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::proc;

/// Names a Debian mirror where the machine's own apt sources have none (Ubuntu), or where a suite has
/// moved to the archive of old releases.
const MIRROR: &str = "SVC_LB_DEBIAN_MIRROR";
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One Debian suite, with a state of its own under `target/apt/<suite>`.
#[derive(Debug)]
pub(crate) struct Suite {
    name: String,
    dir: PathBuf,
}

impl Suite {
    /// Writes the private configuration for `name` (for example `trixie-backports`) and fetches its package lists.
    pub(crate) fn open(name: &str) -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: install the package debian-archive-keyring");
        }
        let suite = Self {
            name: name.to_owned(),
            dir: absolute(Path::new("target/apt").join(name))?,
        };
        for dir in [
            "sources",
            "state/lists/partial",
            "cache/archives/partial",
            "debs",
        ] {
            let dir = suite.dir.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        suite.update(&mirror()?)?;
        Ok(suite)
    }

    /// Points the suite to `mirror` and fetches its package lists.
    fn update(&self, mirror: &str) -> Result<()> {
        let source = format!(
            "Types: deb\nURIs: {mirror}\nSuites: {}\nComponents: main\nSigned-By: {KEYRING}\n\
             Check-Valid-Until: no\n",
            self.name,
        );
        fs::write(self.dir.join("sources/debian.sources"), source)
            .context("write the private apt source")?;
        proc::run_quiet(
            &format!("package lists of Debian {}", self.name),
            self.apt("apt-get").arg("update"),
        )
    }

    /// What the newest `package` depends on; of alternatives, the first.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let listing = proc::capture(self.apt("apt-cache").args(["depends", package]))?;
        Ok(listing
            .lines()
            .filter_map(|line| {
                line.trim_start_matches([' ', '|'])
                    .strip_prefix("Depends: ")
            })
            .map(str::to_owned)
            .collect())
    }

    /// Downloads the newest `package` whose version starts with `version` (any if empty); returns the file.
    pub(crate) fn download(&self, package: &str, version: &str) -> Result<PathBuf> {
        let listing = proc::capture(self.apt("apt-cache").args(["madison", package]))?;
        // Lines are "package | version | source", newest first.
        let full = listing
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(str::trim)
            .find(|full| full.starts_with(version))
            .with_context(|| format!("Debian {} has no package {package} {version}", self.name))?;
        let debs = self.dir.join("debs");
        let wanted = format!("{package}_{}_", full.replace(':', "%3a"));
        let find = || -> Result<Option<PathBuf>> {
            for entry in fs::read_dir(&debs)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if name.starts_with(&wanted) && name.ends_with(".deb") {
                    return Ok(Some(path));
                }
            }
            Ok(None)
        };
        if let Some(file) = find()? {
            return Ok(file);
        }
        proc::run_quiet(
            &format!("fetch {package} {full}"),
            self.apt("apt-get")
                .args(["download", &format!("{package}={full}")])
                .current_dir(&debs),
        )?;
        find()?.with_context(|| format!("apt-get download left no {wanted}*.deb"))
    }

    /// `tool` (apt-get, apt-cache) bound to the private configuration.
    fn apt(&self, tool: &str) -> Command {
        let mut cmd = Command::new(tool);
        let dir = self.dir.display();
        for option in [
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            format!("Dir::Etc::SourceParts={dir}/sources"),
            format!("Dir::State={dir}/state"),
            format!("Dir::Cache={dir}/cache"),
            "Dir::State::status=/dev/null".to_owned(),
            // The unprivileged download user may not reach this directory.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            // Some desktops make apt fetch catalogues of applications too.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ] {
            cmd.args(["-o", &option]);
        }
        cmd
    }
}

/// Unpacks the package file `deb` into `into`: all of it, or only `subtree`, a path inside the package.
///
/// The first `strip` components of each path are left out.
pub(crate) fn unpack(deb: &Path, subtree: &str, strip: usize, into: &Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("create {}", into.display()))?;
    let mut dpkg = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("start dpkg-deb")?;
    let tar = dpkg.stdout.take().context("dpkg-deb has no output")?;
    // Member names start with "./", which counts as a component.
    let extracted = proc::run(
        Command::new("tar")
            .args(["-x", "--no-same-owner", "-C"])
            .arg(into)
            .arg(format!("--strip-components={}", strip + 1))
            .arg(format!("./{subtree}"))
            .stdin(tar),
    );
    let status = dpkg.wait().context("wait for dpkg-deb")?;
    extracted.with_context(|| format!("unpack {}", deb.display()))?;
    if !status.success() {
        bail!("dpkg-deb --fsys-tarfile {} failed: {status}", deb.display());
    }
    Ok(())
}

/// The Debian mirror that [`MIRROR`] names, else the one this machine uses.
fn mirror() -> Result<String> {
    if let Ok(named) = std::env::var(MIRROR) {
        return Ok(named);
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.flatten().map(|entry| entry.path()));
    }
    files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .find_map(|text| debian_mirror(&text))
        .with_context(|| format!("no Debian mirror among apt's sources: name one in {MIRROR}"))
}

/// The first URI of a Debian archive (not the security one) in the text of an apt source file of either format.
fn debian_mirror(text: &str) -> Option<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"))
        .flat_map(str::split_whitespace)
        .find(|word| word.contains("://") && word.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
}

/// Installs packages with the system's apt, without recommendations and without starting any service.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let _no_services = NoServices::new()?;
    let mut cmd = Command::new("apt-get");
    cmd.args(["install", "-y", "-q", "--no-install-recommends"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    if proc::run_quiet(&format!("install {}", packages.join(", ")), &mut cmd).is_ok() {
        return Ok(());
    }
    // Package lists may be missing or old.
    proc::run_quiet(
        "refresh package lists",
        Command::new("apt-get").args(["update", "-q"]),
    )?;
    proc::run_quiet(&format!("install {}", packages.join(", ")), &mut cmd)
}

/// While it lives, package scripts start no service: Debian's policy-rc.d says "forbidden".
struct NoServices {
    ours: bool,
}

impl NoServices {
    const POLICY: &'static str = "/usr/sbin/policy-rc.d";
    const TEXT: &'static str = "#!/bin/sh\n# Written by svc-lb's `cargo xtask setup` while it installs packages; safe to remove.\nexit 101\n";

    fn new() -> Result<Self> {
        // An administrator's policy is respected; one left behind by a killed setup is ours to remove.
        let present = fs::read_to_string(Self::POLICY).ok();
        if present.as_deref().is_some_and(|text| text != Self::TEXT) {
            return Ok(Self { ours: false });
        }
        fs::write(Self::POLICY, Self::TEXT).with_context(|| format!("write {}", Self::POLICY))?;
        make_executable(Path::new(Self::POLICY))?;
        Ok(Self { ours: true })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(Self::POLICY)
        {
            eprintln!("warning: remove {}: {error}", Self::POLICY);
        }
    }
}

fn make_executable(file: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("make {} executable", file.display()))
}

#[cfg(test)]
mod tests {
    use super::debian_mirror;

    #[test]
    fn mirror_is_found_in_both_formats() {
        let deb822 = "Types: deb\n# http://snapshot/x\nURIs: http://mirror.example/debian\nSuites: bookworm\n";
        assert_eq!(
            debian_mirror(deb822).as_deref(),
            Some("http://mirror.example/debian")
        );
        let one_line = "deb [signed-by=/k] https://m.example/debian/ bookworm main\n";
        assert_eq!(
            debian_mirror(one_line).as_deref(),
            Some("https://m.example/debian/")
        );
    }

    #[test]
    fn other_archives_are_not_taken_for_debian() {
        for text in [
            "URIs: http://mirror.example/debian-security\n",
            "deb http://archive.ubuntu.com/ubuntu noble main\n",
            "# deb http://mirror.example/debian bookworm main\n",
        ] {
            assert_eq!(debian_mirror(text), None, "{text}");
        }
    }
}
