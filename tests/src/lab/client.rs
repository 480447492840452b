//! Clients with real sockets.
//!
//! Sockets are made inside the client's namespace and stay there; the calls on them may come from any thread.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns::Namespace;
use super::patient;
use super::process::collected;

/// How long a client waits by default.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// A client in a namespace.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    namespace: &'a Namespace,
    port: u16,
    patience: Duration,
}

/// An HTTP answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: String,
}

impl<'a> Client<'a> {
    /// A client with any source port.
    #[must_use]
    pub const fn of(namespace: &'a Namespace) -> Self {
        Self {
            namespace,
            port: 0,
            patience: PATIENCE,
        }
    }

    /// The same with a fixed source port, which several of its sockets may share.
    #[must_use]
    pub const fn from_port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// The same with another time limit for each step.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Connects over TCP.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to.ip(), Type::STREAM, Protocol::TCP)?;
        socket.connect_timeout(&to.into(), patient(self.patience))?;
        socket.set_tcp_nodelay(true)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(patient(self.patience)))?;
        stream.set_write_timeout(Some(patient(self.patience)))?;
        Ok(stream)
    }

    /// Connects to a [`super::server::tcp_echo`] and reads who it is.
    pub fn echo(&self, to: SocketAddr) -> Result<Echo> {
        let stream = self
            .connect(to)
            .with_context(|| format!("connect to {to}"))?;
        let mut echo = Echo {
            stream: BufReader::new(stream),
            server: String::new(),
            seen_as: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        };
        let greeting = echo.line()?;
        let (server, seen_as) = greeting
            .split_once(' ')
            .with_context(|| format!("{to} greets with {greeting:?}"))?;
        server.clone_into(&mut echo.server);
        echo.seen_as = seen_as
            .parse()
            .with_context(|| format!("{to} greets with {greeting:?}"))?;
        Ok(echo)
    }

    /// One HTTP request over a connection of its own.
    pub fn get(&self, to: SocketAddr, path: &str) -> Result<Answer> {
        self.http(to)?.request(path, true)
    }

    /// One HTTP request for `/`, and which pod answered.
    pub fn hit(&self, to: SocketAddr) -> Result<String> {
        pod_of(&self.get(to, "/")?)
    }

    /// A connection for many HTTP requests.
    pub fn http(&self, to: SocketAddr) -> Result<Http> {
        let stream = self
            .connect(to)
            .with_context(|| format!("connect to {to}"))?;
        Ok(Http {
            stream: BufReader::new(stream),
        })
    }

    /// A UDP socket.
    pub fn udp(&self, family_of: IpAddr) -> io::Result<Udp> {
        let socket = UdpSocket::from(self.socket(family_of, Type::DGRAM, Protocol::UDP)?);
        if self.port == 0 {
            let any: IpAddr = match family_of {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            socket2::SockRef::from(&socket).bind(&SocketAddr::new(any, 0).into())?;
        }
        socket.set_read_timeout(Some(patient(self.patience)))?;
        Ok(Udp { socket })
    }

    /// A UDP socket connected to `to`.
    pub fn udp_connected(&self, to: SocketAddr) -> io::Result<Udp> {
        let udp = self.udp(to.ip())?;
        udp.socket.connect(to)?;
        Ok(udp)
    }

    /// Runs curl with the arguments given and `--max-time`; the output is curl's.
    pub fn curl(&self, args: &[&str]) -> Result<Output> {
        let mut curl = collected("curl");
        curl.args(["--silent", "--show-error", "--max-time"])
            .arg(self.patience.as_secs_f32().to_string())
            .args(args);
        self.namespace
            .start(curl)?
            .output(self.patience + Duration::from_secs(5))
    }

    /// curl's output for a URL, or its complaint.
    pub fn curl_ok(&self, args: &[&str]) -> Result<String> {
        let output = self.curl(args)?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn socket(&self, family_of: IpAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        let (domain, any): (_, IpAddr) = match family_of {
            IpAddr::V4(_) => (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
            IpAddr::V6(_) => (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()),
        };
        let socket = self
            .namespace
            .run(|| Socket::new(domain, kind, Some(protocol)))?;
        if self.port != 0 {
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(any, self.port).into())?;
        }
        Ok(socket)
    }
}

/// Asks a DNS server with dig; the answer as `+short` prints it.
pub fn dig(namespace: &Namespace, args: &[&str]) -> Result<String> {
    let mut dig = collected("dig");
    dig.args(["+short", "+time=2", "+tries=1"]).args(args);
    let output = namespace.start(dig)?.output(PATIENCE * 2)?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() {
        bail!("dig {}: {text}", args.join(" "));
    }
    Ok(text)
}

/// Which pod wrote an HTTP answer.
pub fn pod_of(answer: &Answer) -> Result<String> {
    match answer.body.trim().strip_prefix("You've hit ") {
        Some(pod) => Ok(pod.to_owned()),
        None => bail!("not a pod's answer: {answer:?}"),
    }
}

/// A TCP connection to an echo server.
#[derive(Debug)]
pub struct Echo {
    stream: BufReader<TcpStream>,
    server: String,
    seen_as: SocketAddr,
}

impl Echo {
    /// Who answered.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The client's address and port as the server saw them.
    #[must_use]
    pub fn seen_as(&self) -> SocketAddr {
        self.seen_as
    }

    /// The connection's own ends: local and peer address.
    pub fn ends(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        let stream = self.stream.get_ref();
        Ok((stream.local_addr()?, stream.peer_addr()?))
    }

    /// Sends nothing more, then reads what the server still says; it must be `text`.
    pub fn half_close(&mut self, text: &str) -> Result<()> {
        writeln!(self.stream.get_ref(), "{text}").context("send the last line")?;
        self.stream
            .get_ref()
            .shutdown(std::net::Shutdown::Write)
            .context("shut down")?;
        let mut rest = String::new();
        self.stream
            .read_to_string(&mut rest)
            .with_context(|| format!("read from {:?}", self.server))?;
        if rest.trim_end_matches('\n') != text {
            bail!("after a half close {} bytes came back", rest.len());
        }
        Ok(())
    }

    /// Ends the connection with a reset, so that its port is free at once.
    pub fn abort(self) -> io::Result<()> {
        socket2::SockRef::from(self.stream.get_ref()).set_linger(Some(Duration::ZERO))
    }

    /// Sends a line and checks that it comes back.
    pub fn ping(&mut self, text: &str) -> Result<()> {
        writeln!(self.stream.get_ref(), "{text}").with_context(|| format!("send {text:?}"))?;
        let answer = self.line()?;
        if answer != text {
            let (sent, got) = (text.len(), answer.len());
            bail!("sent {sent} bytes, got {got} others from {}", self.server);
        }
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self
            .stream
            .read_line(&mut line)
            .with_context(|| format!("read from {:?}", self.server))?;
        if read == 0 {
            bail!("{:?} closed the connection", self.server);
        }
        Ok(line.trim_end_matches('\n').to_owned())
    }
}

/// A connection for HTTP requests.
#[derive(Debug)]
pub struct Http {
    stream: BufReader<TcpStream>,
}

impl Http {
    /// One request; `close` asks the server to end the connection after it.
    pub fn request(&mut self, path: &str, close: bool) -> Result<Answer> {
        let connection = if close { "close" } else { "keep-alive" };
        write!(
            self.stream.get_ref(),
            "GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: {connection}\r\n\r\n"
        )
        .context("send a request")?;
        let status = self.line()?;
        let status = status
            .split_whitespace()
            .nth(1)
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("not a status line: {status:?}"))?;
        let mut length = 0;
        loop {
            let header = self.line()?.to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().context("content-length")?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).context("read the body")?;
        Ok(Answer {
            status,
            body: String::from_utf8(body).context("the body is not text")?,
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("read an answer")? == 0 {
            bail!("the connection ended");
        }
        Ok(line.trim_end().to_owned())
    }
}

/// A UDP socket.
#[derive(Debug)]
pub struct Udp {
    socket: UdpSocket,
}

/// What a [`super::server::udp_echo`] answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Who answered.
    pub server: String,
    /// The client's address and port as the server saw them.
    pub seen_as: SocketAddr,
    /// What was echoed.
    pub text: String,
    /// Source address of the answer; the peer of a connected socket.
    pub from: SocketAddr,
}

impl Udp {
    /// Sends to `to` and waits for one answer from anybody.
    pub fn ask_at(&self, to: SocketAddr, text: &str) -> io::Result<Datagram> {
        self.socket.send_to(text.as_bytes(), to)?;
        self.answer()
    }

    /// Sends to the connected peer and waits for one answer.
    pub fn ask(&self, text: &str) -> io::Result<Datagram> {
        self.socket.send(text.as_bytes())?;
        self.answer()
    }

    /// Waits for one answer.
    pub fn answer(&self) -> io::Result<Datagram> {
        let mut buffer = vec![0; super::MAX_DATAGRAM];
        let (length, from) = self.socket.recv_from(&mut buffer)?;
        let bytes = buffer.get(..length).unwrap_or_default();
        let text = String::from_utf8_lossy(bytes);
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, text.clone().into_owned());
        let mut words = text.splitn(3, ' ');
        let (Some(server), Some(seen_as), Some(echo)) = (words.next(), words.next(), words.next())
        else {
            return Err(malformed());
        };
        Ok(Datagram {
            server: server.to_owned(),
            seen_as: seen_as.parse().map_err(|_error| malformed())?,
            text: echo.to_owned(),
            from,
        })
    }

    /// Sends `text` in pieces of `size` bytes by one call (UDP_SEGMENT): one long packet until it is cut.
    pub fn send_segments(&self, text: &str, size: u16) -> io::Result<()> {
        self.set_option(libc::SOL_UDP, libc::UDP_SEGMENT, size.into())?;
        self.socket.send(text.as_bytes()).map(drop)
    }

    /// Has datagrams sent whole or not at all; the path's MTU then counts.
    pub fn never_cut(&self) -> io::Result<()> {
        match self.socket.local_addr()? {
            SocketAddr::V4(_) => self.set_option(
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                libc::IP_PMTUDISC_DO,
            ),
            SocketAddr::V6(_) => self.set_option(
                libc::IPPROTO_IPV6,
                libc::IPV6_MTU_DISCOVER,
                libc::IPV6_PMTUDISC_DO,
            ),
        }
    }

    /// The MTU of the path to the peer of a connected socket, as far as the client's kernel knows it.
    pub fn path_mtu(&self) -> io::Result<i32> {
        let (level, name) = match self.socket.local_addr()? {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
        };
        let mut value: libc::c_int = 0;
        let mut length =
            libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
        // SAFETY: the value is an int that outlives the call, with its length.
        let got = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                level,
                name,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(value)
    }

    /// Has datagrams that end after so many hops sent, and what is said about them kept for [`Udp::told_by`].
    pub fn hops(&self, hops: u8) -> io::Result<()> {
        let hops = hops.into();
        match self.socket.local_addr()? {
            SocketAddr::V4(_) => {
                self.set_option(libc::IPPROTO_IP, libc::IP_RECVERR, 1)?;
                self.set_option(libc::IPPROTO_IP, libc::IP_TTL, hops)
            }
            SocketAddr::V6(_) => {
                self.set_option(libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1)?;
                self.set_option(libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, hops)
            }
        }
    }

    /// Who sent the next ICMP error about a datagram of this socket; an error where there is none yet.
    pub fn told_by(&self) -> Result<IpAddr> {
        let mut space = nix::cmsg_space!([u8; 64]);
        let mut bytes = [0; 2048];
        let mut parts = [io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::Ipv4RecvErr(_, Some(from)) = control {
                return Ok(Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr)).into());
            }
            if let ControlMessageOwned::Ipv6RecvErr(_, Some(from)) = control {
                return Ok(Ipv6Addr::from(from.sin6_addr.s6_addr).into());
            }
        }
        bail!("an error that nobody sent")
    }

    fn set_option(&self, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
        let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
        // SAFETY: the value is an int that outlives the call, with its length.
        let set = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                length,
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The socket itself.
    #[must_use]
    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }
}
