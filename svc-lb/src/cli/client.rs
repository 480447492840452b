//! Asks a running agent.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::app::admin::{Answer, Request};

/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks one thing; `None` if no agent listens.
pub(super) fn ask(socket: &Path, request: Request) -> Result<Option<Answer>> {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return Ok(None);
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(&request)?;
    line.push(b'\n');
    stream.write_all(&line).context("ask the agent")?;
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .with_context(|| format!("the agent did not answer within {PATIENCE:?}"))?;
    match serde_json::from_str(&answer).context("the agent is of another version")? {
        Answer::Error(error) => bail!("the agent says: {error}"),
        answer @ (Answer::Status(_) | Answer::Names(_) | Answer::Drifts(_)) => Ok(Some(answer)),
    }
}
