//! `cargo xtask semantics`: which tests prove which row of `docs/semantics.md`.
//!
//! A test says so itself. In the documentation of a test function every name of a row (`/// G1: ...`) is a claim, and a
//! case of `tests/cases` has its `rows:`. This command writes them into the last column of the document's tables; what
//! stands in the other columns is written by people. `cargo xtask lint` fails where document and claims differ, and
//! `cargo xtask test` where a test that claims a row did not run and pass. So a row is proved, or nobody says it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::test::suite_of;
use crate::tidy::{self, SourceFile};

/// The document.
const DOCUMENT: &str = "docs/semantics.md";
/// Where cases lie.
const CASES: &str = "tests/cases/";
/// The tests that each case is, by the store they run against.
const STORES: [&str; 3] = ["memory", "faulty", "kernel"];
/// The first cells of a table that this command completes.
const HEADER: &str = "| row | feature | svc-lb | state | proved by |";

/// Write into docs/semantics.md which tests prove which row.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask semantics          after rows were added to tests or cases\n  cargo xtask semantics --check  as `cargo xtask lint` does"
)]
pub(crate) struct Args {
    /// Change nothing; fail where the document is not what the tests say.
    #[arg(long)]
    check: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.check {
        return check();
    }
    let (_, new) = document()?;
    fs::write(DOCUMENT, new).with_context(|| format!("write {DOCUMENT}"))
}

/// Fails where the document is not what the tests say.
pub(crate) fn check() -> Result<()> {
    let (old, new) = document()?;
    let difference = (1..)
        .zip(old.lines().zip(new.lines()))
        .find(|(_, (old, new))| old != new);
    match difference {
        None => Ok(()),
        Some((number, (_, new))) => bail!(
            "{DOCUMENT}:{number}: not what the tests say; run `cargo xtask semantics`. It should be\n{new}"
        ),
    }
}

/// The document as it is and as it should be.
fn document() -> Result<(String, String)> {
    let old = fs::read_to_string(DOCUMENT).with_context(|| format!("read {DOCUMENT}"))?;
    let new = filled(&old, &claims()?)?;
    Ok((old, new))
}

/// A test that says which rows it proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    /// The suite of `cargo xtask test` that runs it.
    pub(crate) suite: String,
    /// What the test programs call it, or them.
    pub(crate) tests: Vec<String>,
    /// What people call it.
    title: String,
    rows: BTreeSet<String>,
}

impl Claim {
    /// The rows, in a line.
    pub(crate) fn rows(&self) -> String {
        self.rows
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// All claims of the repository.
pub(crate) fn claims() -> Result<Vec<Claim>> {
    let mut claims = Vec::new();
    for file in tidy::files()? {
        if file.is_rust() {
            claims.extend(of_source(&file));
        } else if let Some(name) = case_name(&file.path) {
            claims.push(of_case(name, &file)?);
        }
    }
    Ok(claims)
}

/// `area/name` of a case's file.
fn case_name(path: &str) -> Option<&str> {
    path.strip_prefix(CASES)?.strip_suffix(".yaml")
}

fn of_case(name: &str, file: &SourceFile) -> Result<Claim> {
    let rows = file
        .text
        .lines()
        .find_map(|line| line.strip_prefix("rows: ["));
    let rows = rows.with_context(|| format!("{}: lacks a line `rows: [...]`", file.path))?;
    Ok(Claim {
        suite: "cases".to_owned(),
        tests: STORES.map(|store| format!("{name}::{store}")).into(),
        title: Path::new(name)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        rows: row_names(rows).collect(),
    })
}

/// The claims of the test functions of a source file, formatted by rustfmt.
fn of_source(file: &SourceFile) -> Vec<Claim> {
    let Some((suite, mut path)) = suite_of(&file.path) else {
        return Vec::new();
    };
    let mut claims = Vec::new();
    // Modules that are open, by the indentation of their braces.
    let mut modules: Vec<&str> = Vec::new();
    let mut rows = BTreeSet::new();
    let mut is_test = false;
    let mut in_attribute = false;
    for (_, line) in file.lines() {
        let code = line.trim_start();
        let indentation = &line[..line.len() - code.len()];
        if in_attribute {
            in_attribute = !code.ends_with(']');
        } else if let Some(text) = code.strip_prefix("///") {
            rows.extend(row_names(text));
        } else if code.starts_with("#[") {
            is_test |= code == "#[test]" || code.starts_with("#[tokio::test");
            in_attribute = !code.ends_with(']');
        } else {
            if let Some(name) = function_name(code).filter(|_| is_test && !rows.is_empty()) {
                let tests = vec![
                    path.iter()
                        .copied()
                        .chain([name])
                        .collect::<Vec<_>>()
                        .join("::"),
                ];
                claims.push(Claim {
                    suite: suite.to_owned(),
                    tests,
                    title: name.to_owned(),
                    rows: rows.clone(),
                });
            } else if let Some(name) = module_name(code) {
                modules.push(indentation);
                path.push(name);
            } else if code == "}" && modules.last() == Some(&indentation) {
                modules.pop();
                path.pop();
            }
            rows.clear();
            is_test = false;
        }
    }
    claims
}

fn function_name(code: &str) -> Option<&str> {
    let code = code.strip_prefix("async ").unwrap_or(code);
    code.strip_prefix("fn ")?.split(['(', '<']).next()
}

fn module_name(code: &str) -> Option<&str> {
    code.strip_prefix("mod ")?.strip_suffix(" {")
}

/// The names of rows in a text: `A1` to `G99`.
fn row_names(text: &str) -> impl Iterator<Item = String> {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| is_row(word)).map(str::to_owned)
}

fn is_row(word: &str) -> bool {
    let number = word.strip_prefix(|c| matches!(c, 'A'..='G'));
    number.is_some_and(|number| {
        matches!(number.len(), 1 | 2) && number.bytes().all(|digit| digit.is_ascii_digit())
    })
}

/// One row of a table.
struct Cells<'a> {
    row: &'a str,
    state: &'a str,
    /// All but the last cell.
    written: &'a str,
}

impl<'a> Cells<'a> {
    fn of(line: &'a str) -> Option<Self> {
        let (written, _) = line.strip_suffix('|')?.rsplit_once('|')?;
        let cells: Vec<&str> = written.split('|').map(str::trim).collect();
        let (row, state) = match cells.as_slice() {
            ["", row, _, _, state] => (*row, *state),
            // Said to have a state that is none.
            ["", row, ..] => (*row, "not in five cells"),
            _ => return None,
        };
        is_row(row).then_some(Self {
            row,
            state,
            written,
        })
    }
}

/// The document with its last column written anew.
fn filled(document: &str, claims: &[Claim]) -> Result<String> {
    let mut proofs: BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    for claim in claims {
        for row in &claim.rows {
            let of_row = proofs.entry(row).or_default();
            of_row.entry(&claim.suite).or_default().insert(&claim.title);
        }
    }
    let mut text = String::new();
    let mut in_table = false;
    let mut problems = Vec::new();
    for (number, line) in (1..).zip(document.lines()) {
        in_table = line == HEADER || (in_table && line.starts_with('|'));
        let Some(cells) = Cells::of(line).filter(|_| in_table) else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        let Cells {
            row,
            state,
            written,
        } = cells;
        let proof = proofs.remove(row).unwrap_or_default();
        let listed = listed(&proof);
        let mut problem =
            |what: String| problems.push(format!("{DOCUMENT}:{number}: {row} {what}"));
        match (state, proof.is_empty()) {
            ("yes" | "partly", true) => problem(format!("is {state}, but no test claims it")),
            ("planned" | "no", false) => {
                problem(format!("is {state}, but tests claim it: {listed}"));
            }
            ("yes" | "partly", false) | ("planned" | "no", true) => {}
            _ => problem(format!("is {state:?}, not yes, partly, planned or no")),
        }
        text.extend([written, "| ", &listed, " |\n"]);
    }
    for (row, proof) in proofs {
        problems.push(format!(
            "{DOCUMENT} has no row {row}, but tests claim it: {}",
            listed(&proof)
        ));
    }
    if !problems.is_empty() {
        bail!("{}", problems.join("\n"));
    }
    Ok(text)
}

/// `cases a1, a2; netns b`, or a dash.
fn listed(proof: &BTreeMap<&str, BTreeSet<&str>>) -> String {
    if proof.is_empty() {
        return "-".to_owned();
    }
    let suite = |(suite, titles): (&&str, &BTreeSet<&str>)| {
        let titles: Vec<String> = titles.iter().map(|title| format!("`{title}`")).collect();
        format!("{suite}: {}", titles.join(", "))
    };
    proof.iter().map(suite).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> SourceFile {
        SourceFile {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    /// The plus signs keep these from being claims of this file itself.
    const SOURCE: &str = "\
+/// A1, and B12's first half.
#[test]
fn one() {}

+/// C1: a helper claims nothing.
fn helper() {}

mod inner {
    proptest! {
        +/// Not a row: E2E, A1x, H3, A123. SEMANTICS D4:
        #[test]
        #[expect(
            clippy::unwrap_used,
            reason = \"test\"
        )]
        fn two(x in 0..3) {}
    }
}

+/// E5: later.
#[tokio::test(flavor = \"current_thread\")]
async fn three() {}

+/// No row.
#[test]
fn four() {}
";

    #[test]
    fn tests_claim_the_rows_of_their_documentation() {
        let claims = of_source(&file(
            "svc-lb/src/plan/tests/more.rs",
            &SOURCE.replace('+', ""),
        ));
        let claims: Vec<_> = claims
            .iter()
            .map(|claim| {
                (
                    claim.suite.as_str(),
                    claim.tests.join(" "),
                    claim.rows.clone(),
                )
            })
            .collect();
        let rows = |rows: &[&str]| rows.iter().map(|&row| row.to_owned()).collect();
        assert_eq!(
            claims,
            [
                (
                    "unit",
                    "plan::tests::more::one".to_owned(),
                    rows(&["A1", "B12"])
                ),
                (
                    "unit",
                    "plan::tests::more::inner::two".to_owned(),
                    rows(&["D4"])
                ),
                ("unit", "plan::tests::more::three".to_owned(), rows(&["E5"])),
            ]
        );
    }

    #[test]
    fn a_case_is_a_test_for_each_store() {
        let case = file("tests/cases/area/x1.yaml", "# Why.\nrows: [A1, A2]\n");
        let claim = of_case("area/x1", &case).unwrap();
        assert_eq!(
            claim.tests,
            ["area/x1::memory", "area/x1::faulty", "area/x1::kernel"]
        );
        assert_eq!(claim.rows.len(), 2);
        assert!(of_case("area/x1", &file("tests/cases/area/x1.yaml", "steps: []\n")).is_err());
    }

    fn claim(suite: &str, title: &str, row: &str) -> Claim {
        Claim {
            suite: suite.to_owned(),
            tests: vec![title.to_owned()],
            title: title.to_owned(),
            rows: BTreeSet::from([row.to_owned()]),
        }
    }

    fn table(rows: &str) -> String {
        format!("Text | A9 |\n\n{HEADER}\n| --- | --- | --- | --- | --- |\n{rows}\nMore.\n")
    }

    #[test]
    fn the_last_column_is_written_and_nothing_else() {
        let claims = [
            claim("netns", "b", "A1"),
            claim("cases", "x", "A1"),
            claim("netns", "a", "A1"),
        ];
        let old = table("| A1 | one | so | yes | old |\n| A2 | two | - | planned | |\n");
        let new = table(
            "| A1 | one | so | yes | cases: `x`; netns: `a`, `b` |\n| A2 | two | - | planned | - |\n",
        );
        assert_eq!(filled(&old, &claims).unwrap(), new);
        assert_eq!(filled(&new, &claims).unwrap(), new);
    }

    #[test]
    fn claims_without_tests_and_tests_without_rows_are_named() {
        let claimed = [claim("netns", "a", "A1")];
        for (rows, claims, message) in [
            (
                "| A1 | one | so | yes | |\n",
                &[][..],
                "A1 is yes, but no test claims it",
            ),
            (
                "| A1 | one | so | planned | |\n",
                &claimed,
                "A1 is planned, but tests claim it: netns: `a`",
            ),
            (
                "| A2 | one | so | no | |\n",
                &claimed,
                "has no row A1, but tests claim it: netns: `a`",
            ),
            (
                "| A1 | one | so | done | |\n",
                &claimed,
                "not yes, partly, planned or no",
            ),
            ("| A1 | one | yes | |\n", &claimed, "not in five cells"),
        ] {
            let error = filled(&table(rows), claims).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
