//! The file that keeps what was handed out.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::allocate::Kept;

const NAME: &str = "allocations.json";
const VERSION: u32 = 1;

/// Why values cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be made or used.
    #[error("--state-dir {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("reading {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error(
        "{} is damaged: {source}; remove it to hand out addresses and ports afresh",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// The file is another version's.
    #[error(
        "{} has version {found}, this is version {VERSION}; remove it to hand out addresses and \
         ports afresh",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file cannot be written.
    #[error("writing {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    version: u32,
    allocations: Kept,
}

#[derive(Debug, Deserialize)]
struct Header {
    version: u32,
}

/// Where it is.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// Makes the directory if it is not there.
    pub(super) fn open(directory: &Path) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(|source| Error::Directory {
            path: directory.to_owned(),
            source,
        })?;
        Ok(Self {
            path: directory.join(NAME),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What was saved last; nothing if nothing was.
    pub(super) fn load(&self) -> Result<Kept, Error> {
        let path = || self.path.clone();
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Kept::new()),
            Err(source) => {
                return Err(Error::Read {
                    path: path(),
                    source,
                });
            }
        };
        let damaged = |source| Error::Damaged {
            path: path(),
            source,
        };
        let Header { version } = serde_json::from_slice(&bytes).map_err(damaged)?;
        if version != VERSION {
            return Err(Error::Version {
                path: path(),
                found: version,
            });
        }
        let content: Content = serde_json::from_slice(&bytes).map_err(damaged)?;
        Ok(content.allocations)
    }

    /// Replaces the file: whenever the machine stops, the old or the new one is there.
    pub(super) fn save(&self, kept: &Kept) -> Result<(), Error> {
        self.replace(kept).map_err(|source| Error::Write {
            path: self.path.clone(),
            source,
        })
    }

    fn replace(&self, kept: &Kept) -> io::Result<()> {
        let content = Content {
            version: VERSION,
            allocations: kept.clone(),
        };
        let mut bytes = serde_json::to_vec_pretty(&content)?;
        bytes.push(b'\n');
        let temporary = self.path.with_extension("json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        let directory = self.path.parent().unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    }
}
