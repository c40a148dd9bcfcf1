//! The keeper's end of the agent's connection: whole messages out of a stream, never blocking.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::fds;
use super::protocol::{Call, MAX_MESSAGE_BYTES, Message};

/// Output an agent may leave unread before it is taken for dead.
const MAX_QUEUED_BYTES: usize = 4 * MAX_MESSAGE_BYTES;
const READ_BYTES: usize = 64 * 1024;

pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: VecDeque<Outgoing>,
    queued_bytes: usize,
}

struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Only root may command a container.
    pub fn accept(stream: UnixStream) -> io::Result<Connection> {
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        if !peer.uid.is_root() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("peer is user {}", peer.uid.as_raw())));
        }
        stream.set_nonblocking(true)?;
        Ok(Connection { stream, input: Vec::new(), output: VecDeque::new(), queued_bytes: 0 })
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub fn wants_to_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// The calls that have arrived in full; an error ends the connection.
    pub fn read(&mut self) -> io::Result<Vec<Call>> {
        let mut buffer = vec![0; READ_BYTES];
        let count = match fds::receive(&self.stream, &mut buffer) {
            // Descriptors are nothing an agent has to send; they are closed here.
            Ok((count, _fds)) => count,
            Err(rustix::io::Errno::AGAIN) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.input.extend_from_slice(&buffer[..count]);
        let mut calls = Vec::new();
        while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            calls.push(serde_json::from_slice(&line)?);
        }
        if self.input.len() > MAX_MESSAGE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "message too long"));
        }
        Ok(calls)
    }

    /// Queues a message and sends what goes without waiting; an error ends the connection.
    pub fn send(&mut self, message: &Message, fds: Vec<OwnedFd>) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(message)?;
        bytes.push(b'\n');
        self.queued_bytes += bytes.len();
        if self.queued_bytes > MAX_QUEUED_BYTES {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the agent does not read"));
        }
        self.output.push_back(Outgoing { bytes, sent: 0, fds });
        self.flush()
    }

    pub fn flush(&mut self) -> io::Result<()> {
        while let Some(next) = self.output.front_mut() {
            let borrowed: Vec<_> = next.fds.iter().map(AsFd::as_fd).collect();
            let sent = match fds::send(&self.stream, &next.bytes[next.sent..], &borrowed) {
                Ok(sent) => sent,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            next.fds.clear();
            next.sent += sent;
            if next.sent == next.bytes.len() {
                self.queued_bytes -= next.bytes.len();
                self.output.pop_front();
            }
        }
        Ok(())
    }
}
