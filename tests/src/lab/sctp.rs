//! SCTP servers and clients, where the kernel has SCTP: Debian's as a module.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns::Namespace;

/// Limit for an association to be made, and for its answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves until the process ends: tells each client the server's name and how it sees the client.
pub fn serve(namespace: &Namespace, name: &str, at: SocketAddr) -> Result<()> {
    let listener = namespace
        .run(|| -> std::io::Result<Socket> {
            let socket = one_to_one(at)?;
            socket.bind(&at.into())?;
            socket.listen(64)?;
            Ok(socket)
        })
        .with_context(|| format!("listen on {at} in {}", namespace.name()))?;
    // Its calls are the same for every protocol.
    let listener = TcpListener::from(listener);
    let name = name.to_owned();
    thread::spawn(move || {
        while let Ok((mut client, from)) = listener.accept() {
            // A client that is gone needs no answer.
            let _told = client.write_all(format!("{name} {from}").as_bytes());
        }
    });
    Ok(())
}

/// What a server tells of an association with it: its name, and who it sees.
pub fn ask(namespace: &Namespace, to: SocketAddr) -> Result<(String, SocketAddr)> {
    let what = || format!("ask {to} from {}", namespace.name());
    let socket = namespace.run(|| one_to_one(to)).with_context(what)?;
    socket
        .connect_timeout(&to.into(), PATIENCE)
        .with_context(what)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = [0; 256];
    let length = stream.read(&mut answer).with_context(what)?;
    let text = String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned();
    let (name, seen_as) = text
        .split_once(' ')
        .with_context(|| format!("{to} says {text:?}"))?;
    Ok((name.to_owned(), seen_as.parse()?))
}

fn one_to_one(family_of: SocketAddr) -> std::io::Result<Socket> {
    Socket::new(
        Domain::for_address(family_of),
        Type::STREAM,
        Some(Protocol::SCTP),
    )
}
