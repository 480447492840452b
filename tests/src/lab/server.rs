//! Servers that run in pods: small own ones that name themselves, and real ones as processes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::task::JoinHandle;

use super::client::Client;
use super::netns::Namespace;
use super::process::{Process, collected};

/// Enough for a thousand connections at once.
const BACKLOG: u32 = 4096;

/// A running server; dropping it closes its sockets.
#[derive(Debug)]
pub struct Server {
    /// What it served: HTTP requests, TCP connections, datagrams, bytes.
    served: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Server {
    /// Number of HTTP requests, TCP connections, datagrams, or for [`sink`] bytes served so far.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// HTTP/1.1 with keep-alive. `/` answers `You've hit <id>`, `/whoami` answers `<id> <client address>`.
pub fn http(namespace: &Namespace, id: &str, port: u16) -> Result<Server> {
    let id: Arc<str> = id.into();
    tcp(namespace, port, move |stream, peer, served| {
        http_connection(stream, peer, Arc::clone(&id), served)
    })
}

/// Says `<id> <client address:port>` on connect, then echoes what it gets.
pub fn tcp_echo(namespace: &Namespace, id: &str, port: u16) -> Result<Server> {
    let id: Arc<str> = id.into();
    tcp(namespace, port, move |mut stream, peer, served| {
        let id = Arc::clone(&id);
        served.fetch_add(1, Ordering::Relaxed);
        async move {
            stream.set_nodelay(true)?;
            stream
                .write_all(format!("{id} {peer}\n").as_bytes())
                .await?;
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await?;
            Ok(())
        }
    })
}

/// Reads and forgets; counts bytes.
pub fn sink(namespace: &Namespace, port: u16) -> Result<Server> {
    tcp(namespace, port, |mut stream, _, served| async move {
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok(()),
                n => served.fetch_add(n as u64, Ordering::Relaxed),
            };
        }
    })
}

/// Answers every datagram with `<id> <client address:port> <datagram>`.
pub fn udp_echo(namespace: &Namespace, id: &str, port: u16) -> Result<Server> {
    udp_echo_at(namespace, id, (Ipv6Addr::UNSPECIFIED, port).into())
}

/// The same at one address, which a server on a host with several needs: its answers come from there.
pub fn udp_echo_at(namespace: &Namespace, id: &str, at: SocketAddr) -> Result<Server> {
    let id = id.to_owned();
    let socket = namespace
        .run(|| std::net::UdpSocket::bind(at))
        .with_context(|| format!("bind UDP {at} in {}", namespace.name()))?;
    socket.set_nonblocking(true)?;
    let served = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&served);
    let task = namespace.spawn(async move {
        let Ok(socket) = UdpSocket::from_std(socket) else {
            return;
        };
        let mut buffer = vec![0; super::MAX_DATAGRAM];
        loop {
            // An ICMP error of an earlier answer is not a reason to stop.
            let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
                continue;
            };
            count.fetch_add(1, Ordering::Relaxed);
            let mut answer = format!("{id} {} ", canonical(peer)).into_bytes();
            answer.extend(buffer.iter().take(length));
            let _sent = socket.send_to(&answer, peer).await;
        }
    });
    Ok(Server { served, task })
}

fn tcp<F, C>(namespace: &Namespace, port: u16, connection: F) -> Result<Server>
where
    F: Fn(TcpStream, SocketAddr, Arc<AtomicU64>) -> C + Send + 'static,
    C: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let served = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&served);
    let (ready, listening) = std::sync::mpsc::channel();
    let task = namespace.spawn(async move {
        let listener = match listen(port) {
            Ok(listener) => {
                let _sent = ready.send(Ok(()));
                listener
            }
            Err(error) => {
                let _sent = ready.send(Err(error));
                return;
            }
        };
        // A JoinSet, so that the connections end with the server.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                Ok((stream, peer)) = listener.accept() => {
                    connections.spawn(connection(stream, canonical(peer), Arc::clone(&count)));
                }
                Some(_ended) = connections.join_next() => {}
            }
        }
    });
    listening
        .recv()
        .context("the server ended")?
        .with_context(|| format!("listen on TCP port {port} in {}", namespace.name()))?;
    Ok(Server { served, task })
}

/// One socket for both families.
fn listen(port: u16) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    socket.listen(BACKLOG)
}

fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

async fn http_connection(
    stream: TcpStream,
    peer: SocketAddr,
    id: Arc<str>,
    served: Arc<AtomicU64>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    loop {
        let Some(request) = http_request(&mut stream).await? else {
            return Ok(());
        };
        served.fetch_add(1, Ordering::Relaxed);
        let (status, body) = match request.path.as_str() {
            "/whoami" => ("200 OK", format!("{id} {}\n", peer.ip())),
            path if path.starts_with("/missing") => ("404 Not Found", "no such page\n".to_owned()),
            _ => ("200 OK", format!("You've hit {id}\n")),
        };
        let connection = if request.close { "close" } else { "keep-alive" };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await?;
        if request.close {
            return stream.shutdown().await;
        }
    }
}

struct Request {
    path: String,
    close: bool,
}

/// The next request without a body; none at the end of the connection.
async fn http_request(stream: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
    let mut close = line.contains("HTTP/1.0");
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        let header = line.trim().to_ascii_lowercase();
        if header.is_empty() {
            return Ok(Some(Request { path, close }));
        }
        if let Some(value) = header.strip_prefix("connection:") {
            close = value.trim() == "close";
        }
    }
}

/// A DNS server (dnsmasq) on UDP and TCP port 53: `TXT whoami.test` is its `id`, `A`/`AAAA` of `records` as given.
pub fn dns(
    namespace: &Namespace,
    id: &str,
    records: &BTreeMap<String, std::net::IpAddr>,
) -> Result<Process> {
    let mut command = quiet("dnsmasq");
    command
        .args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file",
        ])
        .args([
            "--no-resolv",
            "--no-hosts",
            "--user=root",
            "--log-facility=-",
        ])
        .arg(format!("--txt-record=whoami.test,{id}"));
    for (name, addr) in records {
        command.arg(format!("--host-record={name},{addr}"));
    }
    let server = namespace.start(command)?;
    // It listens on TCP as well, which can be waited for.
    wait_listening(namespace, 53)?;
    Ok(server)
}

/// One rule of an ingress: requests for `host` whose path starts with `path` go to `upstream`.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Host name of the request.
    pub host: String,
    /// Path prefix.
    pub path: String,
    /// Where to: usually a ClusterIP and its port.
    pub upstream: SocketAddr,
}

/// nginx as an ingress: HTTP on port 80, TLS on port 443 with a certificate of its own, host and path rules.
///
/// Writes its files to `dir`; the certificate is `dir/tls.crt`, for `curl --cacert`. The header `Ingress` of every
/// answer is `id`, `Client` is the address that nginx saw.
pub fn ingress(namespace: &Namespace, id: &str, rules: &[Rule], dir: &Path) -> Result<Process> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let mut hosts: BTreeMap<&str, Vec<&Rule>> = BTreeMap::new();
    for rule in rules {
        hosts.entry(&rule.host).or_default().push(rule);
    }
    certificate(dir, hosts.keys().copied())?;
    let conf = dir.join("nginx.conf");
    fs::write(&conf, nginx_conf(id, &hosts, dir)?)
        .with_context(|| format!("write {}", conf.display()))?;
    let mut command = quiet("nginx");
    command
        .arg("-p")
        .arg(dir)
        .arg("-c")
        .arg(&conf)
        .arg("-e")
        .arg(dir.join("error.log"));
    let server = namespace.start(command)?;
    wait_listening(namespace, 443)?;
    Ok(server)
}

fn nginx_conf(id: &str, hosts: &BTreeMap<&str, Vec<&Rule>>, dir: &Path) -> Result<String> {
    let dir = dir.display();
    // One process without a master, so that killing it leaves none behind.
    let mut conf = format!(
        "daemon off;\nmaster_process off;\nuser root;\npid {dir}/nginx.pid;\nevents {{}}\nhttp {{\n  \
         access_log {dir}/access.log;\n  client_body_temp_path {dir}/body;\n  proxy_temp_path {dir}/proxy;\n  \
         fastcgi_temp_path {dir}/fastcgi;\n  uwsgi_temp_path {dir}/uwsgi;\n  scgi_temp_path {dir}/scgi;\n  \
         ssl_certificate {dir}/tls.crt;\n  ssl_certificate_key {dir}/tls.key;\n  \
         add_header Ingress {id} always;\n  add_header Client $remote_addr always;\n"
    );
    let listen =
        "    listen 80;\n    listen [::]:80;\n    listen 443 ssl;\n    listen [::]:443 ssl;\n";
    for (host, rules) in hosts {
        write!(conf, "  server {{\n{listen}    server_name {host};\n")?;
        for rule in rules {
            writeln!(
                conf,
                "    location {} {{ proxy_pass http://{}/; }}",
                rule.path, rule.upstream
            )?;
        }
        conf.push_str("  }\n");
    }
    conf.push_str("}\n");
    Ok(conf)
}

/// A self-signed certificate for `hosts`.
fn certificate<'a>(dir: &Path, hosts: impl Iterator<Item = &'a str>) -> Result<()> {
    let names: Vec<String> = hosts.map(|host| format!("DNS:{host}")).collect();
    let mut openssl = collected("openssl");
    openssl
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
        ])
        .args(["-nodes", "-days", "2", "-subj", "/CN=svc-lb lab", "-addext"])
        .arg(format!("subjectAltName={}", names.join(",")))
        .arg("-keyout")
        .arg(dir.join("tls.key"))
        .arg("-out")
        .arg(dir.join("tls.crt"));
    let output = super::process::keep(openssl, None, None)?.output(Duration::from_secs(20))?;
    if !output.status.success() {
        bail!("openssl: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn wait_listening(namespace: &Namespace, port: u16) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let client = Client::of(namespace);
    while client.connect((Ipv6Addr::LOCALHOST, port).into()).is_err() {
        if Instant::now() > deadline {
            bail!("nothing listens on port {port} in {}", namespace.name());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
