//! One manifest file: YAML or JSON documents to objects, all or nothing.

use std::{cell::RefCell, path::Path};

use crate::{
    model::{Kind, Object},
    source::{
        Problem, Severity,
        convert::{self, Author, Failure, KIND_NAMES, Meaning},
        located::{Located, Unknown, closest},
    },
};

/// What one file says.
#[derive(Debug, Default)]
pub struct Parsed {
    /// In order; later ones of the same name stand.
    pub objects: Vec<Object>,
    /// Errors, if any, mean that the file does not count; warnings go with the objects.
    pub problems: Vec<Problem>,
}

impl Parsed {
    pub(super) fn has_errors(&self) -> bool {
        self.problems
            .iter()
            .any(|problem| problem.severity == Severity::Error)
    }
}

/// Reads the documents of a file; `path` is for messages.
#[must_use]
pub fn parse(path: &Path, mut bytes: &[u8]) -> Parsed {
    let mut file = File {
        path,
        parsed: Parsed::default(),
    };
    // A manifest of any size is the operator's own: only nesting and aliases stay bounded.
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_reader_input_bytes: None,
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_documents: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
            max_total_comment_bytes: usize::MAX,
        },
        with_snippet: false,
    };
    for document in serde_saphyr::read_with_options::<_, Located>(&mut bytes, options) {
        match document {
            Ok(document) => file.document(&document),
            Err(error) => {
                let line = error.location().map_or(0, |location| location.line());
                let message = error.without_snippet().to_string();
                file.error(line, None, None, message);
            }
        }
    }
    file.parsed
}

struct File<'a> {
    path: &'a Path,
    parsed: Parsed,
}

impl File<'_> {
    fn document(&mut self, document: &Located) {
        if document.get("kind").is_none() && self.lb_state(document) {
            return;
        }
        let Some(kind) = document.text("kind") else {
            return self.error(
                document.line,
                None,
                Some("kind"),
                required(document, "kind"),
            );
        };
        let Some(version) = document.text("apiVersion") else {
            let message = required(document, "apiVersion");
            return self.error(document.line, Some(kind), Some("apiVersion"), message);
        };
        match convert::meaning(version, kind) {
            Meaning::One(kind) => self.object(kind, document),
            Meaning::List(of) => self.list(of, document),
            Meaning::OtherVersion(ours) => {
                let line = document.line_of("apiVersion");
                let message = format!("{version:?} is not supported, write {ours}");
                self.error(line, Some(kind), Some("apiVersion"), message);
            }
            Meaning::Foreign => {
                let message = match closest(kind, KIND_NAMES) {
                    Some(meant) if meant != kind => {
                        format!("unknown kind, ignored; did you mean {meant}?")
                    }
                    _ => format!("ignored: {version} {kind} is not for a service proxy"),
                };
                let object = Some(described(kind, document));
                self.problem(Severity::Warning, document.line, object, None, message);
            }
        }
    }

    fn list(&mut self, of: Option<Kind>, list: &Located) {
        for item in list.list("items") {
            match of {
                // Items of a typed list need not repeat their kind.
                Some(kind) if item.get("kind").is_none() => self.object(kind, item),
                _ => self.document(item),
            }
        }
    }

    /// What Cilium reads with `--lb-state-file`: two lists of objects, which need not say their kind.
    fn lb_state(&mut self, document: &Located) -> bool {
        let lists = [
            ("services", Kind::Service),
            ("endpoints", Kind::EndpointSlice),
        ];
        if !lists.iter().any(|(key, _)| document.get(key).is_some()) {
            return false;
        }
        for (key, kind) in lists {
            for item in document.list(key) {
                if item.get("kind").is_some() {
                    self.document(item);
                } else {
                    self.object(kind, item);
                }
            }
        }
        true
    }

    fn object(&mut self, kind: Kind, document: &Located) {
        let unknown = RefCell::new(Vec::new());
        let object = convert::object(kind, Author::Person, document.reader(&unknown));
        let name = Some(described(&kind.to_string(), document));
        match object {
            Ok(object) => self.parsed.objects.push(object),
            Err(Failure::Shape(mismatch)) => {
                let field = Some(mismatch.field).filter(|field| !field.is_empty());
                self.problem(
                    Severity::Error,
                    mismatch.line,
                    name.clone(),
                    field,
                    mismatch.problem,
                );
            }
            Err(Failure::Field(invalid)) => {
                let line = document.line_of(&invalid.field);
                let field = Some(invalid.field);
                self.problem(Severity::Error, line, name.clone(), field, invalid.problem);
            }
        }
        for Unknown { line, field, meant } in unknown.into_inner() {
            let message = match meant {
                Some(meant) => format!("unknown field, ignored; did you mean {meant}?"),
                None => "unknown field, ignored".to_owned(),
            };
            self.problem(Severity::Warning, line, name.clone(), Some(field), message);
        }
    }

    fn error(&mut self, line: u64, kind: Option<&str>, field: Option<&str>, message: String) {
        let field = field.map(str::to_owned);
        self.problem(
            Severity::Error,
            line,
            kind.map(str::to_owned),
            field,
            message,
        );
    }

    fn problem(
        &mut self,
        severity: Severity,
        line: u64,
        object: Option<String>,
        field: Option<String>,
        message: String,
    ) {
        let place = format!("{}:{line}", self.path.display());
        self.parsed.problems.push(Problem {
            severity,
            place,
            object,
            field,
            message,
        });
    }
}

/// Kind and name, as far as they can be read.
fn described(kind: &str, document: &Located) -> String {
    let metadata = document.get("metadata");
    let text = |key| metadata.and_then(|metadata| metadata.text(key));
    match (text("namespace"), text("name")) {
        (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (None, Some(name)) => format!("{kind} {name}"),
        (_, None) => kind.to_owned(),
    }
}

fn required(document: &Located, field: &'static str) -> String {
    if document.get(field).is_some() {
        "must be text".to_owned()
    } else {
        "required: every document is a Kubernetes object".to_owned()
    }
}
