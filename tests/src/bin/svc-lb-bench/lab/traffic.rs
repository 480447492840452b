//! A client and a server in two namespaces, on a CPU each where there are two.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use svc_lb_tests::lab::Namespace;

/// What is measured in a round.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Measure {
    /// How long connect(2) takes: the median.
    Connect,
    /// Connections that each ask once, are answered and closed, one after the other.
    Exchange,
    /// Datagrams of 64 bytes that arrive.
    Datagrams,
    /// Bytes of one TCP stream that arrive.
    Bulk,
}

/// Connections of a round, whose median counts.
const CONNECTS: usize = 200;
/// Length of a round of the other measures.
const ROUND: Duration = Duration::from_millis(100);
/// What a bulk stream may take to get going.
const START: Duration = Duration::from_millis(50);

impl Measure {
    pub(super) const ALL: &[Self] = &[Self::Connect, Self::Exchange, Self::Datagrams, Self::Bulk];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Exchange => "connect, ask, close",
            Self::Datagrams => "datagrams",
            Self::Bulk => "bulk",
        }
    }

    pub(super) const fn unit(self) -> &'static str {
        match self {
            Self::Connect => "us, p50",
            Self::Exchange => "connections/s",
            Self::Datagrams => "packets/s",
            Self::Bulk => "Gbit/s",
        }
    }
}

/// What a client says first: that it asks once, or that a stream follows.
const ASKS: u8 = b'a';
const STREAMS: u8 = b'b';
/// Length of a question, of an answer and of a datagram.
const SMALL: usize = 64;

/// TCP and UDP on one port, a thread each.
pub(super) struct Server {
    /// Bytes of streams, and datagrams, that arrived.
    bytes: Arc<AtomicU64>,
    datagrams: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts both.
    pub(super) fn start(namespace: &Namespace, port: u16) -> Result<Self> {
        let (tcp, udp) = namespace.run(|| -> Result<_> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.bind(&SockAddr::from(SocketAddr::from(([0; 4], port))))?;
            socket.listen(4_096)?;
            Ok((
                TcpListener::from(socket),
                UdpSocket::bind(("0.0.0.0", port))?,
            ))
        })?;
        tcp.set_nonblocking(false)?;
        udp.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut server = Self {
            bytes: Arc::default(),
            datagrams: Arc::default(),
            over: Arc::default(),
            threads: Vec::new(),
        };
        let (bytes, over) = (Arc::clone(&server.bytes), Arc::clone(&server.over));
        server.threads.push(thread::spawn(move || {
            pin(Cpu::Last);
            serve(&tcp, &bytes, &over);
        }));
        let (datagrams, over) = (Arc::clone(&server.datagrams), Arc::clone(&server.over));
        server.threads.push(thread::spawn(move || {
            pin(Cpu::Last);
            let mut buffer = [0; 2_048];
            while !over.load(Ordering::Relaxed) {
                if udp.recv(&mut buffer).is_ok() {
                    datagrams.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
        Ok(server)
    }

    /// One round from a namespace to an address.
    pub(super) fn measure(&self, what: Measure, client: &Namespace, to: SocketAddr) -> Result<f64> {
        client.run(|| {
            pin(Cpu::First);
            match what {
                Measure::Connect => connects(to),
                Measure::Exchange => exchanges(to),
                Measure::Datagrams => self.datagrams(to),
                Measure::Bulk => self.bulk(to),
            }
        })
    }

    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    fn datagrams(&self, to: SocketAddr) -> Result<f64> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        let (before, started) = (self.datagrams.load(Ordering::Relaxed), Instant::now());
        while started.elapsed() < ROUND {
            for _ in 0..32 {
                // A full queue is the machine's limit, not an error.
                let _sent = socket.send(&[0; SMALL]);
            }
        }
        let took = started.elapsed();
        settle(|| self.datagrams.load(Ordering::Relaxed));
        let arrived = self.datagrams.load(Ordering::Relaxed) - before;
        ensure!(arrived > 0, "no datagram arrived");
        Ok(arrived as f64 / took.as_secs_f64())
    }

    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    fn bulk(&self, to: SocketAddr) -> Result<f64> {
        let mut stream = TcpStream::connect(to).context("connect")?;
        stream.write_all(&[STREAMS])?;
        let chunk = vec![0x5a; 256 * 1_024];
        let begun = Instant::now();
        while begun.elapsed() < START {
            stream.write_all(&chunk)?;
        }
        let (before, started) = (self.bytes.load(Ordering::Relaxed), Instant::now());
        while started.elapsed() < ROUND {
            stream.write_all(&chunk)?;
        }
        let (arrived, took) = (
            self.bytes.load(Ordering::Relaxed) - before,
            started.elapsed(),
        );
        drop(stream);
        settle(|| self.bytes.load(Ordering::Relaxed));
        ensure!(arrived > 0, "nothing arrived");
        Ok(arrived as f64 * 8.0 / took.as_secs_f64() / 1e9)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _joined = thread.join();
        }
    }
}

/// Waits until a count stands still: what is under way is not the next round's.
fn settle(count: impl Fn() -> u64) {
    let mut before = count();
    loop {
        thread::sleep(Duration::from_millis(5));
        let now = count();
        if now == before {
            return;
        }
        before = now;
    }
}

/// One connection after the other; also those that only come and go.
fn serve(listener: &TcpListener, bytes: &AtomicU64, over: &AtomicBool) {
    // Wakes up to see whether it is over.
    if socket2::SockRef::from(listener)
        .set_read_timeout(Some(Duration::from_millis(50)))
        .is_err()
    {
        return;
    }
    let mut buffer = vec![0; 256 * 1_024];
    while !over.load(Ordering::Relaxed) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(_) => return,
        };
        let Ok(length @ 1..) = stream.read(&mut buffer) else {
            continue;
        };
        if buffer.first() == Some(&ASKS) {
            // Who left without the answer does not count it either.
            let _sent = stream.write_all(&[ASKS; SMALL]);
            continue;
        }
        bytes.fetch_add(length as u64, Ordering::Relaxed);
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            bytes.fetch_add(length as u64, Ordering::Relaxed);
        }
    }
}

/// A connection that leaves no TIME_WAIT behind, in which the client's ports would be used up.
fn connect(to: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    socket.connect(&SockAddr::from(to)).context("connect")?;
    Ok(socket)
}

/// Whether the way is there.
pub(super) fn reaches(client: &Namespace, to: SocketAddr) -> Result<()> {
    client.run(|| exchange(to))
}

fn exchange(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::from(connect(to)?);
    stream.write_all(&[ASKS; SMALL])?;
    let mut answer = [0; SMALL];
    stream.read_exact(&mut answer)?;
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn connects(to: SocketAddr) -> Result<f64> {
    let mut took = Vec::with_capacity(CONNECTS);
    for _ in 0..CONNECTS {
        let started = Instant::now();
        let socket = connect(to)?;
        took.push(started.elapsed().as_nanos() as f64 / 1e3);
        drop(socket);
    }
    took.sort_by(f64::total_cmp);
    took.get(CONNECTS / 2).copied().context("no connection")
}

fn exchanges(to: SocketAddr) -> Result<f64> {
    let (mut count, started) = (0_u32, Instant::now());
    while started.elapsed() < ROUND {
        exchange(to)?;
        count += 1;
    }
    Ok(f64::from(count) / started.elapsed().as_secs_f64())
}

#[derive(Clone, Copy)]
enum Cpu {
    First,
    Last,
}

/// Keeps the thread on one CPU: two that chase each other would make the figures a scheduler's.
fn pin(which: Cpu) {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else {
        return;
    };
    let usable = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
    let cpu = match which {
        Cpu::First => (0..CpuSet::count()).find(usable),
        Cpu::Last => (0..CpuSet::count()).rfind(usable),
    };
    let mut one = CpuSet::new();
    if let Some(cpu) = cpu
        && one.set(cpu).is_ok()
    {
        // Where it may not be pinned, it wanders: the figures only spread more.
        let _pinned = sched_setaffinity(Pid::from_raw(0), &one);
    }
}
