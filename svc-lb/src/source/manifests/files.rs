//! The files of a path, what each said last, and what that changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::parse::parse;
use crate::{
    model::{Change, Object, ObjectKey},
    source::{Problem, Severity},
};

/// The manifests under one path, as they were last read.
#[derive(Debug)]
pub struct Files {
    path: PathBuf,
    known: BTreeMap<PathBuf, File>,
    /// The path itself could not be read.
    unreadable: Option<Problem>,
    announced: bool,
}

/// One file.
#[derive(Debug)]
struct File {
    fingerprint: Fingerprint,
    /// What it named when it last parsed; none if it never did.
    named: Option<BTreeSet<ObjectKey>>,
    problems: Vec<Problem>,
}

/// Changes whenever the file's content may have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Fingerprint {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

impl Files {
    /// Nothing read yet.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            known: BTreeMap::new(),
            unreadable: None,
            announced: false,
        }
    }

    /// The path as it was given.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Every file has parsed at least once.
    pub(super) fn complete(&self) -> bool {
        let all_parsed = self.known.values().all(|file| file.named.is_some());
        self.announced || (self.unreadable.is_none() && all_parsed)
    }

    /// What is wrong with the files as they are.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.unreadable
            .iter()
            .chain(self.known.values().flat_map(|file| &file.problems))
    }

    /// Reads what may have changed: new and different files, and those named in `touched`.
    ///
    /// Upserts name every object of a file that was read again, changed or not.
    pub(super) fn scan(&mut self, touched: &BTreeSet<OsString>) -> Vec<Change> {
        let found = match self.list() {
            Ok(found) => found,
            Err(error) => {
                self.unreadable = Some(unreadable(&self.path, &error));
                return Vec::new();
            }
        };
        self.unreadable = None;
        let mut dropped = self.forget_missing(&found);
        let mut read = BTreeMap::new();
        for (path, fingerprint) in found {
            let known = self
                .known
                .get(&path)
                .is_some_and(|file| file.fingerprint == fingerprint);
            let written = path.file_name().is_some_and(|name| touched.contains(name));
            if !known || written {
                self.read(path, fingerprint, &mut read, &mut dropped);
            }
        }
        self.reread_shadowed(&dropped, &mut read);
        self.changes(&dropped, read)
    }

    /// The files that count, with what tells whether they changed.
    fn list(&self) -> io::Result<BTreeMap<PathBuf, Fingerprint>> {
        if !fs::metadata(&self.path)?.is_dir() {
            let fingerprint = Fingerprint::of(&self.path)?;
            return Ok(BTreeMap::from([(self.path.clone(), fingerprint)]));
        }
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            // Gone again, or a link to nothing: not a file now.
            let Ok(fingerprint) = Fingerprint::of(&path) else {
                continue;
            };
            if counts(&path) {
                found.insert(path, fingerprint);
            }
        }
        Ok(found)
    }

    /// Returns what only the files that are gone had named.
    fn forget_missing(&mut self, found: &BTreeMap<PathBuf, Fingerprint>) -> BTreeSet<ObjectKey> {
        let gone = self
            .known
            .extract_if(.., |path, _| !found.contains_key(path));
        gone.filter_map(|(_, file)| file.named).flatten().collect()
    }

    fn read(
        &mut self,
        path: PathBuf,
        fingerprint: Fingerprint,
        read: &mut BTreeMap<PathBuf, Vec<Object>>,
        dropped: &mut BTreeSet<ObjectKey>,
    ) {
        let previous = self.known.remove(&path).and_then(|file| file.named);
        let parsed = match fs::read(&path) {
            Ok(bytes) => parse(&path, &bytes),
            Err(error) => {
                let problems = vec![unreadable(&path, &error)];
                self.known.insert(
                    path,
                    File {
                        fingerprint,
                        named: previous,
                        problems,
                    },
                );
                return;
            }
        };
        if parsed.has_errors() {
            let problems = parsed.problems;
            self.known.insert(
                path,
                File {
                    fingerprint,
                    named: previous,
                    problems,
                },
            );
            return;
        }
        let mut problems = parsed.problems;
        let mut named = BTreeSet::new();
        for key in parsed.objects.iter().map(Object::key) {
            if let Some(twice) = named.replace(key) {
                problems.push(defined_twice(&twice, &path, &path));
            }
        }
        dropped.extend(
            previous
                .into_iter()
                .flatten()
                .filter(|key| !named.contains(key)),
        );
        read.insert(path.clone(), parsed.objects);
        self.known.insert(
            path,
            File {
                fingerprint,
                named: Some(named),
                problems,
            },
        );
    }

    /// What one file no longer names another may still: that one is read again.
    fn reread_shadowed(
        &mut self,
        dropped: &BTreeSet<ObjectKey>,
        read: &mut BTreeMap<PathBuf, Vec<Object>>,
    ) {
        let names_any = |file: &File| file.named.iter().flatten().any(|key| dropped.contains(key));
        let shadowed: Vec<(PathBuf, Fingerprint)> = self
            .known
            .iter()
            .filter(|(path, file)| !read.contains_key(*path) && names_any(file))
            .map(|(path, file)| (path.clone(), file.fingerprint))
            .collect();
        for (path, fingerprint) in shadowed {
            self.read(path, fingerprint, read, &mut BTreeSet::new());
        }
    }

    /// Where two files name one object, the later path stands.
    fn changes(
        &mut self,
        dropped: &BTreeSet<ObjectKey>,
        read: BTreeMap<PathBuf, Vec<Object>>,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for (path, objects) in read {
            for object in objects {
                let key = object.key();
                let Some(other) = self.later_file_with(&path, &key) else {
                    changes.push(Change::Upsert(object));
                    continue;
                };
                let problem = defined_twice(&key, &path, &other);
                if let Some(file) = self.known.get_mut(&path) {
                    file.problems.push(problem);
                }
            }
        }
        let named = |key: &ObjectKey| {
            self.known
                .values()
                .any(|file| file.named.as_ref().is_some_and(|n| n.contains(key)))
        };
        changes.extend(
            dropped
                .iter()
                .filter(|key| !named(key))
                .cloned()
                .map(Change::Delete),
        );
        if self.complete() && !self.announced {
            self.announced = true;
            changes.push(Change::InitialListComplete);
        }
        changes
    }

    fn later_file_with(&self, path: &Path, key: &ObjectKey) -> Option<PathBuf> {
        self.known
            .range::<Path, _>((std::ops::Bound::Excluded(path), std::ops::Bound::Unbounded))
            .find(|(_, file)| file.named.as_ref().is_some_and(|named| named.contains(key)))
            .map(|(path, _)| path.clone())
    }
}

/// Editors' and volumes' own files are hidden or have other endings.
fn counts(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let ending = path.extension().and_then(|extension| extension.to_str());
    !hidden && path.is_file() && matches!(ending, Some("yaml" | "yml" | "json"))
}

fn unreadable(path: &Path, error: &io::Error) -> Problem {
    Problem {
        severity: Severity::Error,
        place: path.display().to_string(),
        object: None,
        field: None,
        message: format!("cannot be read: {error}"),
    }
}

fn defined_twice(key: &ObjectKey, ignored: &Path, used: &Path) -> Problem {
    let message = if ignored == used {
        "defined more than once in this file: the last one is used".to_owned()
    } else {
        format!("also defined in {}, which is used", used.display())
    };
    Problem {
        severity: Severity::Warning,
        place: ignored.display().to_string(),
        object: Some(key.to_string()),
        field: None,
        message,
    }
}
