//! Questions that are not ours: passed on to the host's resolvers byte for byte, and so are the answers.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// How long one resolver may take, in milliseconds; then the next is asked. The usual asker gives up after 5 s.
const RESOLVER_TIMEOUT_MS: u64 = 2_000;
/// How many resolvers are asked for one question.
const MAX_RESOLVERS: usize = 3;
const MAX_ANSWER_BYTES: usize = 65_535;
/// Datagrams that are not the answer which one question puts up with.
const MAX_STRAYS: usize = 16;

/// Resolvers are asked the way we were asked, so that an answer that was cut for UDP is whole over TCP.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// The first answer any resolver gives to `question` (wire form), or `None`.
pub(crate) async fn ask(resolvers: &[SocketAddr], question: &[u8], transport: Transport) -> Option<Vec<u8>> {
    let limit = Duration::from_millis(RESOLVER_TIMEOUT_MS);
    for resolver in resolvers.iter().take(MAX_RESOLVERS) {
        let attempt = async {
            match transport {
                Transport::Udp => ask_udp(*resolver, question).await,
                Transport::Tcp => ask_tcp(*resolver, question).await,
            }
        };
        match tokio::time::timeout(limit, attempt).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => tracing::debug!(%resolver, %error, "resolver failed"),
            Err(_) => tracing::debug!(%resolver, RESOLVER_TIMEOUT_MS, "resolver did not answer"),
        }
    }
    None
}

async fn ask_udp(resolver: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr =
        if resolver.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(resolver).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; MAX_ANSWER_BYTES];
    for _ in 0..MAX_STRAYS {
        let length = socket.recv(&mut buffer).await?;
        if length >= 2 && buffer[..2] == question[..2] {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
    Err(io::Error::other("only answers to other questions"))
}

async fn ask_tcp(resolver: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
