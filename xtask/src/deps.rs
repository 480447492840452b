//! What we depend on: licences that fit ours, sources we trust, nothing that breaks a static binary.

use anyhow::{Context as _, Result, bail};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};
use spdx::{Expression, LicenseReq, ParseMode};

/// Licences whose terms a binary distribution of ours meets by shipping the notices.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// The only source besides this workspace.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Crates that must not come in, and why.
const BANNED: &[(&str, &str)] = &[
    ("openssl-sys", "the agent is one static binary: use rustls"),
    ("native-tls", "the agent is one static binary: use rustls"),
];

/// Checks every package the lock file resolves to.
pub(crate) fn check() -> Result<()> {
    let metadata = MetadataCommand::new()
        // Not what only other systems would use: it is never built.
        .other_options(
            ["--locked", "--filter-platform", "x86_64-unknown-linux-gnu"]
                .map(str::to_owned)
                .to_vec(),
        )
        .exec()
        .context("cargo metadata")?;
    let mut findings: Vec<String> = metadata.packages.iter().filter_map(finding).collect();
    findings.extend(common_stays_small(&metadata));
    if findings.is_empty() {
        eprintln!("  {} packages", metadata.packages.len());
        return Ok(());
    }
    bail!("\n  {}", findings.join("\n  "))
}

/// What is wrong with one package.
fn finding(package: &Package) -> Option<String> {
    let name = &package.name;
    if let Some((_, why)) = BANNED.iter().find(|(banned, _)| name == banned) {
        return Some(format!("{name} is banned: {why}"));
    }
    if let Some(source) = &package.source
        && source.repr != CRATES_IO
    {
        return Some(format!(
            "{name} comes from {source}: only crates.io is used"
        ));
    }
    let Some(licence) = &package.license else {
        return Some(format!("{name} {} names no licence", package.version));
    };
    match licence_fits(licence) {
        Ok(true) => None,
        Ok(false) => Some(format!(
            "{name} {} is under {licence:?}; allowed: {}",
            package.version,
            LICENCES.join(", ")
        )),
        Err(error) => Some(format!("{name}: licence {licence:?}: {error:#}")),
    }
}

/// Whether the SPDX expression can be met with allowed licences alone.
fn licence_fits(expression: &str) -> Result<bool> {
    let parsed = Expression::parse_mode(expression, ParseMode::LAX)
        .map_err(|error| anyhow::anyhow!("{}", error.reason))?;
    Ok(parsed.evaluate(allowed))
}

fn allowed(licence: &LicenseReq) -> bool {
    licence
        .license
        .id()
        .is_some_and(|id| LICENCES.contains(&id.name))
}

/// Kernel code links `svc-lb-common`: without the feature "user" it depends on nothing.
fn common_stays_small(metadata: &Metadata) -> Vec<String> {
    let Some(common) = metadata
        .workspace_packages()
        .into_iter()
        .find(|package| package.name == "svc-lb-common")
    else {
        return vec!["svc-lb-common is not in the workspace".to_owned()];
    };
    let mut findings: Vec<String> = common
        .dependencies
        .iter()
        .filter(|dependency| dependency.kind == DependencyKind::Normal && !dependency.optional)
        .map(|dependency| {
            format!(
                "svc-lb-common depends on {} always: make it optional, under the feature \"user\"",
                dependency.name
            )
        })
        .collect();
    if common
        .features
        .get("default")
        .is_some_and(|default| !default.is_empty())
    {
        findings
            .push("svc-lb-common has default features: the kernel crate would get them".to_owned());
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::licence_fits;

    #[test]
    fn choice_and_conjunction_are_told_apart() {
        for fits in [
            "MIT",
            "MIT/Apache-2.0",
            "Apache-2.0 / MIT",
            "MIT OR GPL-3.0-only",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR MIT",
        ] {
            assert!(licence_fits(fits).unwrap(), "{fits}");
        }
        for unfit in ["GPL-3.0-only", "MIT AND GPL-2.0-only", "LGPL-2.1-or-later"] {
            assert!(!licence_fits(unfit).unwrap(), "{unfit}");
        }
        assert!(licence_fits("no such licence").is_err());
    }
}
