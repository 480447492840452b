//! The repository's own rules, which no compiler checks.
//!
//! Each rule is a function from the files to findings, and has a test that makes it fire.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use ignore::WalkBuilder;

/// The kernel keeps this many characters of a map's name.
const MAP_NAME_MAX: usize = 15;
/// Names files that are text and ours.
const TEXT: &[&str] = &["rs", "toml", "md", "yaml", "yml", "json", "sh", "run"];
/// This file names what it forbids.
const SELF: &str = "xtask/src/tidy.rs";

/// One text file of the repository.
pub(crate) struct SourceFile {
    /// Relative to the repository's root, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// A rule: findings as "path:line: what, and what to do".
type Rule = fn(&[SourceFile]) -> Vec<String>;

const RULES: &[Rule] = &[
    layering,
    verdicts_in_one_place,
    raw_bpf_in_one_place,
    map_names,
    whitespace,
    manifests,
    module_docs,
    nothing_of_one_machine,
    links,
];

/// Applies every rule to every file that is not ignored by git.
pub(crate) fn check() -> Result<()> {
    let files = files()?;
    let findings: Vec<String> = RULES.iter().flat_map(|rule| rule(&files)).collect();
    if findings.is_empty() {
        eprintln!("  {} files", files.len());
        return Ok(());
    }
    bail!("\n  {}", findings.join("\n  "))
}

/// Every text file that is not ignored by git.
pub(crate) fn files() -> Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    let walk = WalkBuilder::new(".")
        // .ci and .cargo are ours too.
        .hidden(false)
        .require_git(false)
        .filter_entry(|entry| entry.file_name() != ".git")
        .sort_by_file_path(Path::cmp)
        .build();
    for entry in walk {
        let path = entry.context("walk the repository")?.into_path();
        let kind = path.extension().or(path.file_name());
        if !path.is_file() || !kind.is_some_and(|kind| TEXT.iter().any(|text| kind == *text)) {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let path = path.strip_prefix(".").unwrap_or(&path);
        files.push(SourceFile {
            path: path.to_string_lossy().into_owned(),
            text,
        });
    }
    Ok(files)
}

impl SourceFile {
    pub(crate) fn is_rust(&self) -> bool {
        self.has_extension("rs")
    }

    fn has_extension(&self, wanted: &str) -> bool {
        Path::new(&self.path)
            .extension()
            .is_some_and(|extension| extension == wanted)
    }

    /// Lines with their numbers, from 1.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.split('\n'))
    }

    /// The code of each line: what stands before a comment.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines()
            .map(|(number, line)| (number, line.split_once("//").map_or(line, |(code, _)| code)))
    }

    fn at(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path)
    }
}

/// The identifiers of a piece of code.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// The pure middle of the agent knows neither the kernel's nor the cluster's interface.
fn layering(files: &[SourceFile]) -> Vec<String> {
    const PURE: &[&str] = &["model", "compile", "plan"];
    let pure = files.iter().filter(|file| {
        let inside = file.path.strip_prefix("svc-lb/src/");
        inside.is_some_and(|path| {
            PURE.iter()
                .any(|module| path.split(['/', '.']).next() == Some(module))
        })
    });
    let mut findings = Vec::new();
    for file in pure {
        for (number, code) in file.code() {
            let foreign = words(code).find(|word| {
                matches!(*word, "aya" | "kube")
                    || word.starts_with("aya_")
                    || word.starts_with("kube_")
            });
            if let Some(word) = foreign {
                findings.push(file.at(
                    number,
                    &format!("{word}: model, compile and plan use neither aya nor kube; move this to dataplane or source"),
                ));
            }
        }
    }
    findings
}

/// One exhaustive match turns outcomes into the kernel's codes.
fn verdicts_in_one_place(files: &[SourceFile]) -> Vec<String> {
    const XDP: &[&str] = &[
        "XDP_ABORTED",
        "XDP_DROP",
        "XDP_PASS",
        "XDP_TX",
        "XDP_REDIRECT",
    ];
    let mut findings = Vec::new();
    for file in kernel_code(files).filter(|file| !file.path.ends_with("/outcome.rs")) {
        for (number, code) in file.code() {
            let verdict = words(code).find(|word| {
                XDP.contains(word) || word.starts_with("TC_ACT_") || word.starts_with("TCX_")
            });
            if let Some(word) = verdict {
                findings.push(file.at(
                    number,
                    &format!(
                        "{word}: only svc-lb-ebpf/src/outcome.rs names verdicts; return an outcome"
                    ),
                ));
            }
        }
    }
    findings
}

fn kernel_code(files: &[SourceFile]) -> impl Iterator<Item = &SourceFile> {
    files
        .iter()
        .filter(|file| file.is_rust() && file.path.starts_with("svc-lb-ebpf/src/"))
}

/// What aya lacks is added in one module.
fn raw_bpf_in_one_place(files: &[SourceFile]) -> Vec<String> {
    let mut findings = Vec::new();
    let others = files.iter().filter(|file| {
        file.is_rust() && file.path != "svc-lb/src/dataplane/sys.rs" && file.path != SELF
    });
    for file in others {
        for (number, code) in file.code() {
            if words(code).any(|word| word == "SYS_bpf" || word == "__NR_bpf") {
                findings.push(file.at(
                    number,
                    "raw bpf(2) belongs into svc-lb/src/dataplane/sys.rs",
                ));
            }
        }
    }
    findings
}

/// Map names fit into the kernel's field. The gate on the object checks the same, but needs a build.
fn map_names(files: &[SourceFile]) -> Vec<String> {
    let mut findings = Vec::new();
    for file in kernel_code(files) {
        let mut in_map = false;
        for (number, code) in file.code() {
            let code = code.trim();
            in_map |= code.starts_with("#[map") || code.starts_with("#[btf_map");
            let attribute = code
                .split_once("name = \"")
                .and_then(|(_, rest)| rest.split_once('"'));
            let name = match attribute {
                Some((name, _)) if in_map => Some(name),
                _ if in_map => words(code).skip_while(|word| *word != "static").nth(1),
                _ => None,
            };
            let Some(name) = name else { continue };
            in_map = false;
            if name.len() > MAP_NAME_MAX {
                findings.push(file.at(
                    number,
                    &format!(
                        "map {name}: the kernel keeps {MAP_NAME_MAX} characters; shorten the name"
                    ),
                ));
            }
        }
    }
    findings
}

fn whitespace(files: &[SourceFile]) -> Vec<String> {
    let mut findings = Vec::new();
    for file in files {
        for (number, line) in file.lines() {
            if line.ends_with([' ', '\t', '\r']) {
                findings.push(file.at(number, "white space at the end of the line"));
            }
            if line.contains('\t') {
                findings.push(file.at(number, "a tab: indent with spaces"));
            }
        }
        if !file.text.is_empty() && (!file.text.ends_with('\n') || file.text.ends_with("\n\n")) {
            findings.push(format!("{}: must end with one line break", file.path));
        }
    }
    findings
}

/// Every package takes licence, lints and versions from the workspace.
fn manifests(files: &[SourceFile]) -> Vec<String> {
    const INHERITED: &[&str] = &[
        "version.workspace = true",
        "edition.workspace = true",
        "rust-version.workspace = true",
        "license.workspace = true",
        "publish.workspace = true",
        "[lints]\nworkspace = true",
    ];
    let mut findings = Vec::new();
    for file in files
        .iter()
        .filter(|file| file.path.ends_with("/Cargo.toml"))
    {
        for inherited in INHERITED {
            if !file.text.contains(inherited) {
                findings.push(format!(
                    "{}: lacks {:?}",
                    file.path,
                    inherited.replace('\n', " ")
                ));
            }
        }
    }
    findings
}

fn module_docs(files: &[SourceFile]) -> Vec<String> {
    files
        .iter()
        .filter(|file| file.is_rust() && !file.text.starts_with("//!"))
        .map(|file| {
            format!(
                "{}: starts without `//!`: say what the file is for",
                file.path
            )
        })
        .collect()
}

/// Paths and hosts of the machine somebody works on have no place in the repository.
fn nothing_of_one_machine(files: &[SourceFile]) -> Vec<String> {
    const LOCAL: &[&str] = &[
        "/home/",
        "/root/",
        "/work/",
        "/Users/",
        "index.crates.io",
        "static.crates.io",
        "static.rust-lang.org",
    ];
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.path != SELF) {
        for (number, line) in file.lines() {
            if let Some(local) = LOCAL.iter().find(|local| line.contains(**local)) {
                findings.push(file.at(
                    number,
                    &format!("{local}: no paths of one machine and no registry hosts"),
                ));
            }
        }
    }
    findings
}

/// Markdown links to files of the repository lead somewhere.
fn links(files: &[SourceFile]) -> Vec<String> {
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.has_extension("md")) {
        for (number, line) in file.lines() {
            for target in line.split("](").skip(1) {
                let target = target.split([')', ' ']).next().unwrap_or_default();
                let path = target.split('#').next().unwrap_or_default();
                if path.is_empty() || path.contains(':') {
                    continue;
                }
                let resolved = Path::new(&file.path)
                    .parent()
                    .unwrap_or(Path::new(""))
                    .join(path);
                if !exists(files, &resolved) {
                    findings.push(file.at(number, &format!("link to {path}: no such file")));
                }
            }
        }
    }
    findings
}

/// Whether `path` is a file we know or a directory above one, or exists beside the text files.
fn exists(files: &[SourceFile], path: &Path) -> bool {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            Component::Normal(part) => plain.push(part),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    files
        .iter()
        .any(|file| Path::new(&file.path).starts_with(&plain))
        || plain.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> Vec<SourceFile> {
        vec![SourceFile {
            path: path.to_owned(),
            text: text.to_owned(),
        }]
    }

    #[test]
    fn pure_modules_stay_pure() {
        for text in [
            "use aya::maps::Array;\n",
            "fn f(c: kube::Client) {}\n",
            "use aya_obj::Map;\n",
        ] {
            assert_eq!(
                layering(&file("svc-lb/src/plan/ids.rs", text)).len(),
                1,
                "{text}"
            );
            assert_eq!(
                layering(&file("svc-lb/src/model.rs", text)).len(),
                1,
                "{text}"
            );
            assert!(layering(&file("svc-lb/src/dataplane/kernel.rs", text)).is_empty());
        }
        let comment = "//! Imports neither aya nor kube.\nuse std::net::IpAddr; // not aya::x\n";
        assert!(layering(&file("svc-lb/src/plan/ids.rs", comment)).is_empty());
    }

    #[test]
    fn verdicts_are_named_once() {
        let text = "fn f() -> u32 { xdp_action::XDP_PASS }\n";
        assert_eq!(
            verdicts_in_one_place(&file("svc-lb-ebpf/src/guard.rs", text)).len(),
            1
        );
        assert!(verdicts_in_one_place(&file("svc-lb-ebpf/src/outcome.rs", text)).is_empty());
        assert!(verdicts_in_one_place(&file("tests/tests/prog.rs", text)).is_empty());
    }

    #[test]
    fn raw_bpf_is_called_once() {
        let text = "libc::syscall(libc::SYS_bpf, 0)\n";
        assert_eq!(
            raw_bpf_in_one_place(&file("svc-lb/src/observe/mod.rs", text)).len(),
            1
        );
        assert!(raw_bpf_in_one_place(&file("svc-lb/src/dataplane/sys.rs", text)).is_empty());
    }

    #[test]
    fn long_map_names_are_found() {
        for bad in [
            "#[map]\nstatic A_NAME_OF_SIXTEEN: Array<u32> = Array::new();\n",
            "#[btf_map(name = \"a_name_of_sixteen\")]\nstatic X: Array<u32> = Array::new();\n",
            "#[map]\npub(crate) static A_NAME_OF_SIXTEEN: Array<u32> = Array::new();\n",
        ] {
            assert_eq!(
                map_names(&file("svc-lb-ebpf/src/maps.rs", bad)).len(),
                1,
                "{bad}"
            );
        }
        let good = "#[map]\nstatic SHORT: Array<u32> = Array::new();\nstatic NOT_A_MAP_BUT_LONG: u32 = 1;\n";
        assert!(map_names(&file("svc-lb-ebpf/src/maps.rs", good)).is_empty());
    }

    #[test]
    fn stray_white_space_is_found() {
        for bad in ["a \n", "\ta\n", "a\r\n", "a", "a\n\n"] {
            assert!(!whitespace(&file("x.md", bad)).is_empty(), "{bad:?}");
        }
        assert!(whitespace(&file("x.md", "a\n  b\n")).is_empty());
    }

    #[test]
    fn packages_inherit() {
        let good = "[package]\nversion.workspace = true\nedition.workspace = true\nrust-version.workspace = true\n\
                    license.workspace = true\npublish.workspace = true\n\n[lints]\nworkspace = true\n";
        assert!(manifests(&file("a/Cargo.toml", good)).is_empty());
        let bad = good.replace("license.workspace = true\n", "license = \"MIT\"\n");
        assert_eq!(manifests(&file("a/Cargo.toml", &bad)).len(), 1);
    }

    #[test]
    fn undocumented_files_are_found() {
        assert_eq!(module_docs(&file("a/src/x.rs", "fn f() {}\n")).len(), 1);
        assert!(module_docs(&file("a/src/x.rs", "//! About x.\nfn f() {}\n")).is_empty());
    }

    #[test]
    fn local_paths_are_found() {
        for bad in ["see /home/me/x\n", "https://static.crates.io/x\n"] {
            assert_eq!(
                nothing_of_one_machine(&file("README.md", bad)).len(),
                1,
                "{bad}"
            );
        }
    }

    #[test]
    fn dead_links_are_found() {
        let mut files = file(
            "docs/a.md",
            "[x](b.md) [y](../README.md#top) [z](https://a.b/c)\n",
        );
        assert_eq!(links(&files).len(), 2);
        files.extend(file("docs/b.md", ""));
        files.extend(file("README.md", ""));
        assert!(links(&files).is_empty(), "{:?}", links(&files));
    }
}
