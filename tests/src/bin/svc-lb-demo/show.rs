//! What the demo prints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use svc_lb_tests::lab::Lab;

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const BAR: Style = AnsiColor::Cyan.on_default();

/// Width of a bar that stands for every call.
const BAR_WIDTH: u64 = 24;

/// How often each server was hit.
pub(crate) type Hits = BTreeMap<String, u64>;

/// The demo's output and its count of met expectations.
#[derive(Debug, Default)]
pub(crate) struct Show {
    met: u32,
    failed: Vec<String>,
    section: String,
}

impl Show {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Starts the part about one service.
    pub(crate) fn section(&mut self, name: &str, what: &str) {
        name.clone_into(&mut self.section);
        line(&format!("\n{BOLD}{name}{BOLD:#}  {DIM}{what}{DIM:#}"));
    }

    /// One caller's calls: met if exactly the expected servers were hit.
    pub(crate) fn hits(
        &mut self,
        caller: &str,
        target: &str,
        hits: Result<Hits>,
        expected: &[&str],
    ) {
        let hits = match hits {
            Ok(hits) => hits,
            Err(error) => return self.check(&format!("{caller:<16} {target:<30}"), Err(error)),
        };
        let wanted: BTreeSet<&str> = expected.iter().copied().collect();
        let got: BTreeSet<&str> = hits.keys().map(String::as_str).collect();
        let mut text = format!("{caller:<16} {target:<30}");
        let total: u64 = hits.values().sum();
        for (server, count) in &hits {
            let width = (count * BAR_WIDTH).div_ceil(total.max(1));
            let bar = "▇".repeat(usize::try_from(width).unwrap_or_default());
            let _written = write!(text, " {server} {BAR}{bar}{BAR:#} {count}");
        }
        if got == wanted {
            self.met(&text);
        } else {
            self.failed(&text, &format!("expected {}", expected.join(", ")));
        }
    }

    /// Any other expectation.
    pub(crate) fn check(&mut self, what: &str, result: Result<()>) {
        match result {
            Ok(()) => self.met(what),
            Err(error) => self.failed(what, &format!("{error:#}")),
        }
    }

    /// `svc-lb status`, indented.
    pub(crate) fn status(&mut self, text: &str) {
        self.section("svc-lb status", "");
        for status in text.lines() {
            line(&format!("  {status}"));
        }
    }

    /// The last line; whether everything was met.
    pub(crate) fn summary(&self) -> bool {
        for failed in &self.failed {
            line(&format!("{BAD}✗{BAD:#} {failed}"));
        }
        let style = if self.failed.is_empty() { GOOD } else { BAD };
        line(&format!(
            "\n{style}{} expectations met, {} failed{style:#}",
            self.met,
            self.failed.len()
        ));
        self.failed.is_empty()
    }

    fn met(&mut self, text: &str) {
        self.met += 1;
        line(&format!("  {GOOD}✓{GOOD:#} {text}"));
    }

    fn failed(&mut self, text: &str, why: &str) {
        line(&format!("  {BAD}✗{BAD:#} {text} {BAD}{why}{BAD:#}"));
        let text = anstream::adapter::strip_str(text);
        self.failed.push(format!(
            "{}: {}: {why}",
            self.section,
            text.to_string().trim()
        ));
    }
}

/// The cluster in one line.
pub(crate) fn title(lab: &Lab, took: Duration) {
    let on_nodes: BTreeSet<_> = lab.pods().map(|pod| pod.node().as_str()).collect();
    line(&format!(
        "{BOLD}svc-lb demo{BOLD:#}  {} pods on {}, outside clients, dual stack {DIM}(made in {:.1} s){DIM:#}",
        lab.pods().count(),
        on_nodes.into_iter().collect::<Vec<_>>().join(" and "),
        took.as_secs_f32()
    ));
}

/// A remark.
pub(crate) fn note(text: &str) {
    line(&format!("  {DIM}{text}{DIM:#}"));
}

/// Colours only where a terminal wants them.
fn line(text: &str) {
    // A closed pipe is no reason to leave the cluster standing.
    let _written = writeln!(anstream::stdout(), "{text}");
}
