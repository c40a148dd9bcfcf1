//! A stream that counts and hashes what passes, up to a limit.

use super::tar::Skip;
use crate::digest::{Digest, Hasher};
use std::cell::RefCell;
use std::io::{self, Read};
use std::rc::Rc;

/// Stays in hand while a decoder owns a [`MeterReader`] of it.
pub(super) struct Meter<R>(Rc<RefCell<State<R>>>);

pub(super) struct MeterReader<R>(Rc<RefCell<State<R>>>);

struct State<R> {
    inner: R,
    hasher: Hasher,
    bytes: u64,
    limit: u64,
    over_limit: bool,
    failed: bool,
}

impl<R: Read> Meter<R> {
    /// At most `limit` bytes pass; one more is an error.
    pub fn new(inner: R, limit: u64) -> Meter<R> {
        let hasher = Hasher::default();
        Meter(Rc::new(RefCell::new(State { inner, hasher, bytes: 0, limit, over_limit: false, failed: false })))
    }

    pub fn reader(&self) -> MeterReader<R> {
        MeterReader(Rc::clone(&self.0))
    }

    pub fn drain(&self) -> io::Result<()> {
        io::copy(&mut io::BufReader::with_capacity(128 << 10, self.reader()), &mut io::sink()).map(drop)
    }

    pub fn digest(&self) -> Digest {
        self.0.borrow().hasher.digest()
    }

    pub fn bytes(&self) -> u64 {
        self.0.borrow().bytes
    }

    /// The source had more than the limit.
    pub fn over_limit(&self) -> bool {
        self.0.borrow().over_limit
    }

    /// The source reported an error of its own.
    pub fn failed(&self) -> bool {
        self.0.borrow().failed
    }
}

impl<R: Read> Read for MeterReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let state = &mut *self.0.borrow_mut();
        let left = state.limit - state.bytes;
        if left == 0 && !buffer.is_empty() {
            // The end must be here.
            let mut one = [0];
            let got = state.read_inner(&mut one)?;
            state.over_limit |= got > 0;
            return if got == 0 { Ok(0) } else { Err(io::Error::other("more bytes than allowed")) };
        }
        let want = left.min(buffer.len() as u64) as usize;
        let got = state.read_inner(&mut buffer[..want])?;
        state.hasher.update(&buffer[..got]);
        state.bytes += got as u64;
        Ok(got)
    }
}

impl<R: Read> Skip for MeterReader<R> {}

impl<R: Read> State<R> {
    fn read_inner(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.inner.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => {
                    self.failed |= result.is_err();
                    return result;
                }
            }
        }
    }
}
