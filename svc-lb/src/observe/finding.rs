//! What `svc-lb check` finds.

use serde::Serialize;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; costs nothing that users see.
    Note,
    /// Works, but not all of it.
    Degraded,
    /// Services cannot work.
    Unusable,
}

impl Level {
    /// As JSON and the table name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Degraded => "degraded",
            Self::Unusable => "unusable",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub subject: String,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What follows from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effect: Option<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            level: Level::Ok,
            found: found.into(),
            effect: None,
            fix: None,
        }
    }

    /// Something follows from what was found.
    pub fn new(
        level: Level,
        subject: impl Into<String>,
        found: impl Into<String>,
        effect: impl Into<String>,
    ) -> Self {
        Self {
            effect: Some(effect.into()),
            level,
            ..Self::ok(subject, found)
        }
    }

    /// Says what to do.
    #[must_use]
    pub fn fix(self, fix: impl Into<String>) -> Self {
        Self {
            fix: Some(fix.into()),
            ..self
        }
    }
}

/// The worst level among findings.
pub fn verdict<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Level {
    findings
        .into_iter()
        .map(|finding| finding.level)
        .max()
        .unwrap_or(Level::Ok)
}
