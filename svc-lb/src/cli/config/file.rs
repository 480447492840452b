//! The file itself: keys, values and their lines.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::kube_proxy;
use crate::source::located::Located;

/// One setting of a file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: u64,
    pub(super) values: Vec<String>,
}

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct File {
    pub(super) entries: Vec<Entry>,
    /// What it says that has no counterpart here, and why.
    pub(super) ignored: Vec<String>,
}

impl File {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let root: Located = match serde_saphyr::from_str(&text) {
            Ok(root) => root,
            Err(error) => bail!("{}: {}", path.display(), error.without_snippet()),
        };
        let place = |line: u64| format!("{}:{line}", path.display());
        if root.text("kind") == Some(kube_proxy::KIND) {
            return Ok(kube_proxy::read(&root, &place));
        }
        let Some(fields) = root.fields() else {
            if root.is_null() {
                return Ok(Self::default());
            }
            bail!(
                "{}: settings and their values are wanted, as in \"xdp: off\"",
                place(root.line)
            );
        };
        let mut entries = Vec::new();
        for (key, line, value) in fields {
            let Some(values) = value.scalars() else {
                bail!(
                    "{}: {key}: a value or a list of values is wanted",
                    place(line)
                );
            };
            entries.push(Entry {
                key: key.to_owned(),
                line,
                values,
            });
        }
        Ok(Self {
            entries,
            ignored: Vec::new(),
        })
    }
}
