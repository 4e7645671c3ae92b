//! Detection of stalled HTTP/2 streams: clients that do not open their flow-control window.
//!
//! Such streams wait for window while the connection itself makes progress, so no write ever stalls. Each body that
//! has yielded a frame and is not polled for the next one is recorded here.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Instant;

use crate::body::{Body, BodyError};

/// Maximum size of a frame of a [`Body::Full`], in bytes: a body yielded in one piece would not be seen to wait.
const MAX_FRAME: usize = 16 << 10;

/// The response bodies of one connection that wait for the client.
#[derive(Debug, Default)]
pub(super) struct StalledStreams {
    since: Mutex<HashMap<u64, Instant>>,
    next: AtomicU64,
    open: AtomicU64,
    /// No request has come for `limits.keep_alive`.
    pub(super) idle: AtomicBool,
    /// Graceful shutdown of the connection has begun.
    pub(super) closing: AtomicBool,
}

impl StalledStreams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if one of the bodies has waited for at least `limit`.
    pub(super) fn any_stalled(&self, limit: Duration) -> bool {
        self.lock().values().any(|since| since.elapsed() >= limit)
    }

    /// Returns true if a request is in progress.
    pub(super) fn has_open_streams(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    /// Returns true if no request has come for `limits.keep_alive`.
    pub(super) fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Relaxed)
    }

    /// Registers a stream, from the arrival of its request to the end of its response.
    pub(super) fn open_stream(self: &Arc<Self>) -> OpenStream {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenStream { streams: self.clone(), id: self.next.fetch_add(1, Ordering::Relaxed) }
    }
}

/// A request in progress.
#[derive(Debug)]
pub(super) struct OpenStream {
    streams: Arc<StalledStreams>,
    id: u64,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.streams.open.fetch_sub(1, Ordering::Relaxed);
        self.streams.lock().remove(&self.id);
    }
}

/// A response body that records when it waits for the client.
#[derive(Debug)]
pub(super) struct WatchedBody {
    pub(super) body: Body,
    pub(super) open: OpenStream,
}

impl HttpBody for WatchedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = match &mut self.body {
            Body::Full(bytes) if bytes.len() > MAX_FRAME => {
                Poll::Ready(Some(Ok(Frame::data(bytes.split_to(MAX_FRAME)))))
            }
            body @ (Body::Empty | Body::Full(_) | Body::Stream(_) | Body::Shared(_)) => Pin::new(body).poll_frame(cx),
        };
        let mut waiting = self.open.streams.lock();
        if matches!(polled, Poll::Ready(Some(Ok(_)))) {
            waiting.insert(self.open.id, Instant::now());
        } else {
            waiting.remove(&self.open.id);
        }
        drop(waiting);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
