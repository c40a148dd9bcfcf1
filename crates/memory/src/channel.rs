//! A stream between an agent and a process that fills: messages as their length in bytes (u32, little-endian) and that many bytes. A
//! descriptor comes with the first byte of its message.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// No message is longer, in bytes: the index of 6 TiB of memory.
const LONGEST: usize = 256 << 20;
/// What is made room for at once, in bytes: not what a damaged length claims.
const STEP: usize = 64 << 10;

/// Sends one message.
pub(crate) fn send(stream: &UnixStream, message: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let length = u32::try_from(message.len()).ok().filter(|n| *n as usize <= LONGEST);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a message too long to send"))?;
    let framed = [&length.to_le_bytes(), message].concat();
    let fds: Vec<_> = fd.into_iter().collect();
    let mut sent = 0;
    while sent < framed.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        match sendmsg(stream, &[io::IoSlice::new(&framed[sent..])], &mut control, SendFlags::NOSIGNAL) {
            Ok(bytes) => sent += bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The next message and its descriptor; `None` once the other end is closed.
pub(crate) fn receive(stream: &UnixStream) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut fd = None;
    match receive_some(stream, &mut length, &mut fd)? {
        0 => return Ok(None),
        got => receive_all(stream, &mut length[got..], &mut fd)?,
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message too long to be one"));
    }
    let mut message = Vec::new();
    while message.len() < length {
        let from = message.len();
        message.resize(length.min(from + STEP), 0);
        receive_all(stream, &mut message[from..], &mut fd)?;
    }
    Ok(Some((message, fd)))
}

fn receive_all(stream: &UnixStream, mut bytes: &mut [u8], fd: &mut Option<OwnedFd>) -> io::Result<()> {
    while !bytes.is_empty() {
        match receive_some(stream, bytes, fd)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            got => bytes = &mut bytes[got..],
        }
    }
    Ok(())
}

fn receive_some(stream: &UnixStream, bytes: &mut [u8], fd: &mut Option<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(stream, &mut [io::IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            for one in fds {
                fd.get_or_insert(one);
            }
        }
    }
    Ok(got.bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_as_they_were_sent() {
        let (one, other) = UnixStream::pair().unwrap();
        let long: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                let file = std::fs::File::open("/dev/null").unwrap();
                send(&one, &[], None).unwrap();
                send(&one, &long, Some(file.as_fd())).unwrap();
                send(&one, &[7], None).unwrap();
                drop(one);
            });
            assert!(matches!(receive(&other).unwrap(), Some((m, None)) if m.is_empty()));
            assert!(matches!(receive(&other).unwrap(), Some((m, Some(_))) if m == long));
            assert!(matches!(receive(&other).unwrap(), Some((m, None)) if m == [7]));
            assert!(receive(&other).unwrap().is_none());
        });
    }

    #[test]
    fn damaged_streams_are_errors() {
        for bytes in [&[1u8, 0][..], &[9, 0, 0, 0, 1], &[0xff; 64]] {
            let (mut one, other) = UnixStream::pair().unwrap();
            one.write_all(bytes).unwrap();
            drop(one);
            assert!(receive(&other).is_err(), "{bytes:?}");
        }
    }
}
