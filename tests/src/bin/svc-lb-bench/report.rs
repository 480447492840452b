//! Figures for people and for the next run.

use std::fs;
use std::io::{Write as _, stdout};
use std::path::Path;

use anyhow::Result;

use crate::figures::Figure;

/// Prints the figures, and their ratios to an earlier run's.
pub(crate) fn table(figures: &[Figure], baseline: Option<&[Figure]>) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(
        out,
        "{:52} {:>8} {:>8} {:>8}  {:>7}  unit",
        "case", "least", "median", "most", "quiet"
    )?;
    for figure in figures {
        let Figure {
            case,
            unit,
            least,
            median,
            most,
            quiet,
            rounds,
        } = figure;
        let before = baseline
            .and_then(|all| all.iter().find(|before| before.case == *case))
            .map(|before| format!("  {:.2} of before", median / before.median));
        writeln!(
            out,
            "{case:52} {} {} {}  {quiet:3}/{rounds:<3}  {unit}{}",
            digits(*least),
            digits(*median),
            digits(*most),
            before.unwrap_or_default()
        )?;
    }
    Ok(())
}

/// A value with as many digits as say something.
fn digits(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:8.3}"),
        10.0..1_000.0 => format!("{value:8.1}"),
        _ => format!("{value:8.0}"),
    }
}

/// Reads what [`write()`] has written.
pub(crate) fn read(path: &Path) -> Result<Vec<Figure>> {
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// Writes figures as JSON.
pub(crate) fn write(path: &Path, figures: &[Figure]) -> Result<()> {
    Ok(fs::write(path, serde_json::to_string_pretty(figures)?)?)
}
