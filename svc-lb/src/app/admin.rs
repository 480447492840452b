//! The admin socket: one JSON request to a line, one JSON answer to a line.
//!
//! ```text
//! {"get":"status"}   -> {"status":{...}}
//! {"get":"names"}    -> {"names":[[1,{"namespace":"default",...}], ...]}
//! {"get":"verify","repair":false} -> {"drifts":[{"map":"slots",...}, ...]}
//! anything else      -> {"error":"..."}
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::status::Gatherer;
use crate::compile::desired::PortKey;
use crate::observe::status::Status;
use crate::plan::Drift;

/// The longest request.
const MAX_REQUEST: u64 = 4_096;

/// Why the agent cannot listen.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum AdminError {
    #[error("--admin-socket {path}: {operation}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("--admin-socket {path}: another agent listens there; give each agent its own")]
    Taken { path: PathBuf },
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "get", rename_all = "lowercase")]
pub enum Request {
    /// [`Answer::Status`].
    Status,
    /// [`Answer::Names`].
    Names,
    /// [`Answer::Drifts`].
    Verify {
        /// Write again what differs.
        repair: bool,
    },
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// How the agent is.
    Status(Box<Status>),
    /// Which service port has which index.
    Names(Vec<(u32, PortKey)>),
    /// What in the maps is not as it was written.
    Drifts(Vec<Drift>),
    /// The request was not understood, or the agent is about to end.
    Error(String),
}

/// A socket that only its owner can use; removed when dropped.
#[derive(Debug)]
pub(super) struct Admin {
    path: PathBuf,
    listener: UnixListener,
}

impl Admin {
    /// Listens. A socket that a killed agent left is replaced.
    pub(super) async fn open(path: &Path) -> Result<Self, AdminError> {
        let failed = |operation| {
            let path = path.to_owned();
            move |source| AdminError::Io {
                operation,
                path,
                source,
            }
        };
        if UnixStream::connect(path).await.is_ok() {
            return Err(AdminError::Taken {
                path: path.to_owned(),
            });
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove what an earlier agent left")(error));
            }
            Ok(()) | Err(_) => {}
        }
        if let Some(parent) = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(failed("create its directory"))?;
        }
        // Bound under another name, so that nobody connects before only the owner can.
        let fresh = path.with_extension("new");
        drop(fs::remove_file(&fresh));
        let listener = UnixListener::bind(&fresh).map_err(failed("listen"))?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))
            .map_err(failed("set its permissions"))?;
        fs::rename(&fresh, path).map_err(failed("rename into place"))?;
        Ok(Self {
            path: path.to_owned(),
            listener,
        })
    }

    /// Serves until it is cancelled.
    pub(super) async fn run(self, gatherer: Arc<Gatherer>, cancel: CancellationToken) {
        loop {
            let stream = tokio::select! {
                () = cancel.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            match stream {
                Ok((stream, _)) => {
                    let gatherer = Arc::clone(&gatherer);
                    let cancel = cancel.clone();
                    tokio::spawn(async move {
                        let served = cancel.run_until_cancelled(serve(stream, &gatherer)).await;
                        if let Some(Err(error)) = served {
                            debug!(%error, "admin connection");
                        }
                    });
                }
                Err(error) => {
                    warn!(%error, "admin socket");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // Gone already is fine.
        drop(fs::remove_file(&self.path));
    }
}

async fn serve(stream: UnixStream, gatherer: &Gatherer) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(MAX_REQUEST);
        if limited.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_slice(&line) {
            Ok(request) => gatherer.answer(request).await,
            Err(error) => Answer::Error(format!(
                "{error}; ask for {{\"get\":\"status\"}} or {{\"get\":\"names\"}}"
            )),
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        writer.write_all(&text).await?;
    }
}
