//! Answers that are streams: JSON, one value each line.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use godwit_api::types::ErrorBody;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use super::Api;

/// Lines waiting for a slow reader.
const QUEUE_LINES: usize = 16;
/// How often an empty line says that the stream lives, in milliseconds. Clients skip it; it finds out who is gone.
const KEEP_ALIVE_MS: u64 = 15_000;
/// How long the last line may take, in milliseconds.
const LAST_LINE_TIMEOUT_MS: u64 = 1_000;

/// Where the lines of one answer go.
pub struct Lines {
    queue: mpsc::Sender<Bytes>,
}

/// Why a stream ends early.
pub enum End {
    /// Nobody reads it any more.
    Unread,
    /// To be told as the last line.
    Failed(ErrorBody),
}

impl Lines {
    pub async fn value(&self, value: &impl Serialize) -> Result<(), End> {
        self.send(line(value)?).await
    }

    /// A value that is JSON already.
    pub async fn text(&self, text: &str) -> Result<(), End> {
        self.send(Bytes::from(format!("{text}\n"))).await
    }

    async fn send(&self, line: Bytes) -> Result<(), End> {
        self.queue.send(line).await.map_err(|_| End::Unread)
    }
}

fn line(value: &impl Serialize) -> Result<Bytes, End> {
    let failed = |e: serde_json::Error| End::Failed(ErrorBody::new(format!("a value does not become JSON: {e}")));
    let mut bytes = serde_json::to_vec(value).map_err(failed)?;
    bytes.push(b'\n');
    Ok(bytes.into())
}

/// An answer whose lines `work` writes. It is dropped when the reader goes away or the controller ends.
pub fn answer<W>(api: &Api, work: impl FnOnce(Lines) -> W) -> Response
where
    W: Future<Output = Result<(), End>> + Send + 'static,
{
    let (queue, lines) = mpsc::channel(QUEUE_LINES);
    let work = work(Lines { queue: queue.clone() });
    let stop = api.stop.clone();
    api.tasks.spawn(async move {
        let mut work = pin!(work);
        let every = Duration::from_millis(KEEP_ALIVE_MS);
        let mut beat = interval_at(Instant::now() + every, every);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            tokio::select! {
                end = &mut work => break end,
                () = queue.closed() => return,
                () = stop.cancelled() => break Err(End::Failed(ErrorBody::new("the controller ends; ask again"))),
                // A full queue is being read, or its reader is found to be gone by what is in it.
                _ = beat.tick() => drop(queue.try_send(Bytes::from_static(b"\n"))),
            }
        };
        if let Err(End::Failed(body)) = end
            && let Ok(line) = line(&body)
        {
            let _ = timeout(Duration::from_millis(LAST_LINE_TIMEOUT_MS), queue.send(line)).await;
        }
    });
    let body =
        stream::unfold(lines, |mut lines| async { lines.recv().await.map(|line| (Ok::<_, Infallible>(line), lines)) });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(body)).into_response()
}
