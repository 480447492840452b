//! Where the bytes of a stream come from: standard input, a file or fifo, a unix socket.

use std::{
    fmt,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read},
    os::unix::{
        fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _},
        net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use tokio::{
    io::AsyncReadExt as _,
    net::{UnixListener, UnixStream},
    sync::mpsc,
};
use tracing::warn;

const CHUNK: usize = 64 << 10;

/// `-`, `PATH` or `unix:PATH`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    /// Standard input, once.
    Stdin,
    /// A file, read once, or a fifo, opened again after each end.
    File(PathBuf),
    /// A socket that the agent listens on.
    Unix(PathBuf),
}

impl FromStr for Target {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match (text, text.strip_prefix("unix:")) {
            ("-", _) => Self::Stdin,
            (_, Some(path)) => Self::Unix(path.into()),
            (path, None) => Self::File(path.into()),
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("-"),
            Self::File(path) => path.display().fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What a stream's transport does.
#[derive(Debug)]
pub(super) enum Input {
    /// A sender is there; what follows is a new stream.
    Connected,
    /// The next bytes.
    Bytes(Vec<u8>),
    /// The sender is gone.
    Ended,
}

/// Bytes of a target.
#[derive(Debug)]
pub(super) enum Inputs {
    /// From a thread: files and standard input cannot be waited for.
    Thread {
        received: mpsc::Receiver<Input>,
        /// Path of a fifo, whose reader may be waiting for a writer.
        fifo: Option<PathBuf>,
    },
    /// From whoever connected last.
    Socket {
        listener: UnixListener,
        path: PathBuf,
        connection: Option<UnixStream>,
    },
}

impl Inputs {
    pub(super) fn open(target: &Target) -> io::Result<Self> {
        match target {
            Target::Stdin => Ok(Self::thread(None, || Ok(io::stdin()), false)),
            Target::File(path) => {
                let fifo = fs::metadata(path)?.file_type().is_fifo();
                if !fifo {
                    // Opened here, so that a file that cannot be read is refused.
                    let mut file = Some(File::open(path)?);
                    let once = move || file.take().ok_or_else(|| io::ErrorKind::NotFound.into());
                    return Ok(Self::thread(None, once, false));
                }
                let opened = path.clone();
                Ok(Self::thread(
                    Some(path.clone()),
                    move || File::open(&opened),
                    true,
                ))
            }
            Target::Unix(path) => {
                let listener = listen(path)?;
                Ok(Self::Socket {
                    listener,
                    path: path.clone(),
                    connection: None,
                })
            }
        }
    }

    fn thread<R: Read>(
        fifo: Option<PathBuf>,
        open: impl FnMut() -> io::Result<R> + Send + 'static,
        again: bool,
    ) -> Self {
        // A few chunks ahead at most: the sender waits while changes are being applied.
        let (sender, received) = mpsc::channel(4);
        std::thread::spawn(move || read_all(open, again, &sender));
        Self::Thread { received, fifo }
    }

    /// What happens next; none once nothing can come any more.
    ///
    /// Whoever connects to a socket takes the place of who was connected before, so that a sender
    /// that restarts is heard although its predecessor was never seen to go.
    pub(super) async fn next(&mut self) -> Option<Input> {
        match self {
            Self::Thread { received, .. } => received.recv().await,
            Self::Socket {
                listener,
                connection,
                ..
            } => loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                tokio::select! {
                    biased;
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => {
                            *connection = Some(stream);
                            return Some(Input::Connected);
                        }
                        Err(error) => {
                            warn!(%error, "stream: accept");
                            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                        }
                    },
                    read = receive(connection.as_mut(), &mut chunk) => {
                        if read.is_ok_and(|count| count > 0) {
                            return Some(Input::Bytes(chunk));
                        }
                        *connection = None;
                        return Some(Input::Ended);
                    }
                }
            },
        }
    }
}

impl Drop for Inputs {
    fn drop(&mut self) {
        match self {
            Self::Thread {
                received,
                fifo: Some(path),
            } => {
                received.close();
                // Wakes the reader if it waits for a writer; nobody waits if this fails.
                let _woken = OpenOptions::new()
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path);
            }
            Self::Thread { fifo: None, .. } => {}
            Self::Socket { path, .. } => {
                if let Err(error) = fs::remove_file(&*path) {
                    warn!(path = %path.display(), %error, "stream: socket not removed");
                }
            }
        }
    }
}

async fn receive(connection: Option<&mut UnixStream>, chunk: &mut Vec<u8>) -> io::Result<usize> {
    match connection {
        Some(stream) => stream.read_buf(chunk).await,
        None => std::future::pending().await,
    }
}

/// Reads until nobody listens, or until the end where there is only one.
fn read_all<R: Read>(
    mut open: impl FnMut() -> io::Result<R>,
    again: bool,
    sender: &mpsc::Sender<Input>,
) {
    loop {
        let mut reader = match open() {
            Ok(reader) => reader,
            Err(error) => {
                warn!(%error, "stream: open");
                return;
            }
        };
        if sender.blocking_send(Input::Connected).is_err() {
            return;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            match reader.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => {
                    let bytes = chunk.get(..count).unwrap_or_default().to_vec();
                    if sender.blocking_send(Input::Bytes(bytes)).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    warn!(%error, "stream: read");
                    break;
                }
            }
        }
        if sender.blocking_send(Input::Ended).is_err() || !again {
            return;
        }
    }
}

/// Listens on a socket of mode 0600, in place of one that nobody listens on any more.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "exists and is no socket",
            ));
        }
        Ok(_) => {
            if StdUnixStream::connect(path).is_ok() {
                let message = "another process listens on it";
                return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
            }
            fs::remove_file(path)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}
