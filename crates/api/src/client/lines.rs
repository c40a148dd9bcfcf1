//! Streams of JSON values, one each line.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use futures_util::{Stream, StreamExt};
use http::StatusCode;
use hyper::body::{Body, Incoming};
use serde::de::DeserializeOwned;

use super::error::ClientError;
use super::transport::{Answer, Driver};
use crate::session::MAX_MESSAGE_BYTES;
use crate::types::ErrorBody;

/// The longest line of a stream, in bytes, without its end: what fits a session's message.
pub const MAX_LINE_BYTES: usize = MAX_MESSAGE_BYTES;

/// A stream of values as the controller sends them. Dropping it closes the connection. A line that is an
/// [`ErrorBody`] ends the stream with that error.
pub struct Lines<T> {
    path: String,
    body: Incoming,
    _driver: Driver,
    splitter: Splitter,
    ended: bool,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    pub(super) fn new(path: &str, answer: Answer) -> Self {
        Self {
            path: path.to_owned(),
            body: answer.body,
            _driver: answer.driver,
            splitter: Splitter::default(),
            ended: false,
            of: PhantomData,
        }
    }

    /// The next value; `None` after the last. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<T, ClientError>> {
        StreamExt::next(self).await
    }

    fn parse(&self, line: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(line).map_err(|source| match serde_json::from_slice::<ErrorBody>(line) {
            Ok(body) => ClientError::Api { status: StatusCode::OK, body },
            Err(_) => ClientError::NotJson { path: self.path.clone(), status: StatusCode::OK, source },
        })
    }

    fn stop(&mut self, error: ClientError) -> Poll<Option<Result<T, ClientError>>> {
        self.ended = true;
        Poll::Ready(Some(Err(error)))
    }
}

impl<T: DeserializeOwned> Stream for Lines<T> {
    type Item = Result<T, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if let Some(line) = self.splitter.next() {
                return match self.parse(&line) {
                    Ok(value) => Poll::Ready(Some(Ok(value))),
                    Err(error) => self.stop(error),
                };
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data()
                        && !self.splitter.push(&data)
                    {
                        let what = format!("{} has a line of more than {MAX_LINE_BYTES} bytes", self.path);
                        return self.stop(ClientError::Protocol { what });
                    }
                }
                Some(Err(source)) => {
                    let path = self.path.clone();
                    return self.stop(ClientError::Broken { path, source: Box::new(source) });
                }
                None => match self.splitter.rest() {
                    // A last line without an end is whole: a body that is cut short is an error of the transport.
                    Some(line) => {
                        let value = self.parse(&line);
                        self.ended = true;
                        return Poll::Ready(Some(value));
                    }
                    None => return Poll::Ready(None),
                },
            }
        }
    }
}

/// Cuts bytes into lines; empty lines (keep-alives) vanish.
#[derive(Default)]
struct Splitter {
    lines: VecDeque<BytesMut>,
    part: BytesMut,
}

impl Splitter {
    /// `false` when a line is longer than [`MAX_LINE_BYTES`].
    fn push(&mut self, mut data: &[u8]) -> bool {
        while let Some(end) = data.iter().position(|b| *b == b'\n') {
            self.part.extend_from_slice(&data[..end]);
            data.advance(end + 1);
            let line = std::mem::take(&mut self.part);
            if line.len() > MAX_LINE_BYTES {
                return false;
            }
            if !line.trim_ascii().is_empty() {
                self.lines.push_back(line);
            }
        }
        self.part.extend_from_slice(data);
        self.part.len() <= MAX_LINE_BYTES
    }

    fn next(&mut self) -> Option<BytesMut> {
        self.lines.pop_front()
    }

    fn rest(&mut self) -> Option<BytesMut> {
        let rest = std::mem::take(&mut self.part);
        (!rest.trim_ascii().is_empty()).then_some(rest)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_wherever_the_frames_end() {
        let mut splitter = Splitter::default();
        for byte in b"one\n\ntwo\r\nthr" {
            assert!(splitter.push(std::slice::from_ref(byte)));
        }
        assert_eq!(splitter.next().unwrap(), "one");
        assert_eq!(splitter.next().unwrap(), "two\r");
        assert_eq!(splitter.next(), None);
        assert_eq!(splitter.rest().unwrap(), "thr");
        assert_eq!(splitter.rest(), None);
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_limit() {
        let mut splitter = Splitter::default();
        assert!(splitter.push(&vec![b'x'; MAX_LINE_BYTES]));
        assert!(!splitter.push(b"x"));
    }
}
