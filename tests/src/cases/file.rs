//! The files of cases: what they say, and how what is expected is written into them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use svc_lb::compile::{CompileOptions, MaglevOptions};

/// One file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Case {
    /// `<area>/<name>`, from the path.
    #[serde(skip)]
    pub(super) name: String,
    /// The rows of `docs/semantics.md` that it proves; read by `cargo xtask semantics` as well, so on one line.
    pub(super) rows: Vec<String>,
    /// What it shows.
    pub(super) about: String,
    /// The node as the system tells.
    #[serde(default)]
    pub(super) node: Node,
    /// The operator's settings.
    #[serde(default)]
    pub(super) settings: Settings,
    /// In order.
    pub(super) steps: Vec<Step>,
}

/// The node: its name, and its addresses at first.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Those of the default route.
    pub(super) primary: BTreeSet<IpAddr>,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: "here".to_owned(),
            addresses: BTreeSet::from([IpAddr::from([192, 0, 2, 1])]),
            primary: BTreeSet::new(),
        }
    }
}

/// Settings that the compile step knows.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Settings {
    /// `--service-proxy-name`.
    proxy_name: Option<String>,
    /// `--external-ips`, other than `off`.
    external_ips: bool,
    /// `--nodeport-addresses`.
    pub(super) node_ports: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            proxy_name: None,
            external_ips: true,
            node_ports: vec!["all".to_owned()],
        }
    }
}

impl Settings {
    pub(super) fn options(&self) -> CompileOptions {
        CompileOptions {
            proxy_name: self.proxy_name.clone(),
            ignore_external_ips: !self.external_ips,
            // Tables that fit into small maps.
            maglev: MaglevOptions {
                slots: MaglevOptions::SIZES[0],
                ..MaglevOptions::default()
            },
            ..CompileOptions::default()
        }
    }
}

/// What happens, and what is programmed after it. Objects come, then change, then go.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Step {
    /// What happens.
    pub(super) about: String,
    /// The agent ends, and the next one begins with the objects of before, less those deleted in this step.
    #[serde(default)]
    pub(super) restart: bool,
    /// Objects that are new or replaced, as in a manifest; `apiVersion` may be left out.
    #[serde(default)]
    pub(super) apply: Vec<Value>,
    /// What changes of objects that are there: JSON merge patches (RFC 7386).
    #[serde(default)]
    pub(super) patch: Vec<Value>,
    /// Objects that go, as `Service default/web`.
    #[serde(default)]
    pub(super) delete: Vec<String>,
    /// The node's addresses from now on.
    pub(super) addresses: Option<BTreeSet<IpAddr>>,
    /// Lists that are complete with this step; both in the first one and after a restart, unless this says otherwise.
    pub(super) listed: Option<Vec<List>>,
    /// What is programmed, for people.
    pub(super) tables: String,
    /// What is programmed, as it lies in the maps; where numbers and bits are the point.
    pub(super) maps: Option<String>,
}

/// The objects of one source.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "lowercase")]
pub(super) enum List {
    /// All objects but slices.
    Services,
    /// EndpointSlices.
    Endpoints,
}

impl List {
    pub(super) const ALL: [Self; 2] = [Self::Services, Self::Endpoints];
}

impl Step {
    pub(super) fn title(&self) -> String {
        format!("step \"{}\"", self.about)
    }
}

impl Case {
    /// Reads a file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let case: Self = serde_saphyr::from_str(&text)
            .with_context(|| format!("{} is no case", path.display()))?;
        let part = |path: Option<&Path>| {
            let stem = path.and_then(Path::file_stem).unwrap_or_default();
            stem.to_string_lossy().into_owned()
        };
        let name = format!("{}/{}", part(path.parent()), part(Some(path)));
        ensure!(!case.rows.is_empty(), "{name}: which rows does it prove?");
        ensure!(!case.about.is_empty(), "{name}: what does it show?");
        ensure!(!case.steps.is_empty(), "{name}: no steps");
        Ok(Self { name, ..case })
    }
}

/// Writes what each step's `tables` and `maps` are to be into a file; everything else stays as it is.
pub(super) fn rewrite(path: &Path, found: &[(String, Option<String>)]) -> Result<()> {
    let old = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let tables: Vec<&str> = found.iter().map(|(tables, _)| tables.as_str()).collect();
    let maps: Vec<&str> = found
        .iter()
        .filter_map(|(_, maps)| maps.as_deref())
        .collect();
    let mut left = BTreeMap::from([
        ("  tables:", tables.as_slice()),
        ("  maps:", maps.as_slice()),
    ]);
    let mut text = String::new();
    let mut lines = old.lines().peekable();
    while let Some(line) = lines.next() {
        let key = left.iter_mut().find(|(key, _)| line.starts_with(**key));
        let Some((key, values)) = key else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        let (value, rest) = values.split_first().context("more keys than steps")?;
        *values = rest;
        text.push_str(key);
        text.push_str(" |\n");
        for line in value.lines() {
            text.push_str("    ");
            text.push_str(line);
            text.push('\n');
        }
        while lines
            .next_if(|line| line.is_empty() || line.starts_with("    "))
            .is_some()
        {}
    }
    ensure!(
        left.values().all(|left| left.is_empty()),
        "steps' tables and maps are written with two spaces before them"
    );
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
