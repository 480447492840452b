//! Many TCP connections at once that talk all the time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::netns::Namespace;

/// Longer than any retransmission a working path needs.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection rests between two messages.
const REST: Duration = Duration::from_millis(400);

/// A crowd of connections from one namespace to one [`super::server::tcp_echo`] address.
#[derive(Debug)]
pub struct Crowd {
    members: Vec<Arc<Member>>,
    shared: Arc<Shared>,
}

/// One connection.
#[derive(Debug, Default)]
struct Member {
    /// Messages that came back.
    messages: AtomicU64,
    ended: AtomicBool,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    open: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Connections by server.
    servers: BTreeMap<String, u64>,
    broken: Vec<Broken>,
}

/// A connection that ended before it was told to.
#[derive(Debug, Clone)]
pub struct Broken {
    /// Its server, empty if it never got that far.
    pub server: String,
    /// Why.
    pub reason: String,
}

impl Crowd {
    /// Opens `size` connections and waits until each has reached a server.
    pub fn open(namespace: &Namespace, to: SocketAddr, size: u64) -> Result<Self> {
        let crowd = Self {
            members: (0..size).map(|_| Arc::default()).collect(),
            shared: Arc::default(),
        };
        for member in &crowd.members {
            let member = Arc::clone(member);
            let shared = Arc::clone(&crowd.shared);
            namespace.spawn(async move {
                let mut server = String::new();
                let result = converse(to, &shared, &member, &mut server).await;
                member.ended.store(true, Ordering::Relaxed);
                if let Err(error) = result {
                    let reason = format!("{error:#}");
                    shared.state().broken.push(Broken { server, reason });
                }
            });
        }
        let deadline = Instant::now() + PATIENCE * 2;
        while crowd.shared.open.load(Ordering::Relaxed) < size {
            if let Some(broken) = crowd.broken().first() {
                bail!("a connection to {to} broke at once: {broken:?}");
            }
            if Instant::now() > deadline {
                let open = crowd.shared.open.load(Ordering::Relaxed);
                bail!(
                    "{open} of {size} connections to {to} are open after {:?}",
                    PATIENCE * 2
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(crowd)
    }

    /// Number of connections by server.
    #[must_use]
    pub fn servers(&self) -> BTreeMap<String, u64> {
        self.shared.state().servers.clone()
    }

    /// What broke so far.
    #[must_use]
    pub fn broken(&self) -> Vec<Broken> {
        self.shared.state().broken.clone()
    }

    /// Waits until every connection that lives has had two more messages back, then gives what broke.
    ///
    /// The second of two was sent after this call. A path that lost a connection shows: its message times out.
    #[must_use]
    pub fn verify(&self) -> Vec<Broken> {
        let deadline = Instant::now() + PATIENCE * 2;
        let messages = |member: &Member| member.messages.load(Ordering::Relaxed);
        let before: Vec<u64> = self.members.iter().map(|member| messages(member)).collect();
        for (member, before) in self.members.iter().zip(before) {
            while !member.ended.load(Ordering::Relaxed)
                && messages(member) < before + 2
                && Instant::now() < deadline
            {
                thread::sleep(Duration::from_millis(5));
            }
        }
        self.broken()
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn converse(
    to: SocketAddr,
    shared: &Shared,
    member: &Member,
    server: &mut String,
) -> Result<()> {
    let stream = timeout(PATIENCE, TcpStream::connect(to))
        .await
        .context("connect")?
        .context("connect")?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let greeting = line(&mut stream).await?;
    greeting
        .split(' ')
        .next()
        .unwrap_or_default()
        .clone_into(server);
    *shared.state().servers.entry(server.clone()).or_default() += 1;
    shared.open.fetch_add(1, Ordering::Relaxed);
    let mut number = 0_u64;
    while !shared.stop.load(Ordering::Relaxed) {
        number += 1;
        let text = format!("message {number}");
        stream
            .get_mut()
            .write_all(format!("{text}\n").as_bytes())
            .await
            .with_context(|| format!("send {text}"))?;
        let answer = line(&mut stream).await?;
        if answer != text {
            bail!("sent {text:?}, got {answer:?}");
        }
        member.messages.fetch_add(1, Ordering::Relaxed);
        sleep(REST).await;
    }
    Ok(())
}

async fn line(stream: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    let read = timeout(PATIENCE, stream.read_line(&mut line))
        .await
        .context("wait for an answer")?
        .context("read an answer")?;
    if read == 0 {
        bail!("the server closed the connection");
    }
    Ok(line.trim_end().to_owned())
}
