//! Reading of request bodies: size limit, minimum rate, and buffering before the request is sent upstream.
//!
//! The first 1 MiB is buffered, so that a body that fails early never reaches the upstream.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use crate::body::fanout::{InflightBudget, InflightGuard};
use crate::body::{Body, BodyError};
use crate::policy::client_limits::ClientLimits;

/// Number of bytes that are buffered before the request is sent upstream.
const BUFFER_BYTES: usize = 1 << 20;

/// Minimum average rate of a body in bytes per second, enforced after [`RATE_GRACE`].
const MIN_BYTES_PER_SECOND: u64 = 1024;
const RATE_GRACE: Duration = Duration::from_secs(5);

/// Reads the body of a request. Returns an empty body, the complete body, or its beginning followed by a stream.
pub(super) async fn read_body(
    incoming: Incoming,
    limits: &ClientLimits,
    budget: &Arc<InflightBudget>,
) -> Result<Body, BodyError> {
    let (left, now) = (limits.request_body, Instant::now());
    let paced =
        RateLimitedBody { incoming, left, taken: 0, since: now, last: now, stall: limits.write_stall, pause: None };
    let mut body = Body::stream(paced);
    let (mut buffer, mut held) = (BytesMut::new(), InflightGuard::new(budget));
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        buffer.extend_from_slice(&chunk);
        // The bytes that all connections buffer together are bounded too.
        if buffer.len() >= BUFFER_BYTES || !held.take(chunk.len() as u64) {
            return Ok(Body::prefixed(vec![buffer.freeze()], body));
        }
    }
    Ok(if buffer.is_empty() { Body::Empty } else { Body::Full(buffer.freeze()) })
}

struct RateLimitedBody {
    incoming: Incoming,
    left: u64,
    taken: u64,
    since: Instant,
    last: Instant,
    stall: Duration,
    pause: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for RateLimitedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(Err(_))) => Poll::Ready(Some(Err(BodyError::Client))),
            Poll::Ready(Some(Ok(frame))) => {
                self.pause = None;
                self.last = Instant::now();
                let size = frame.data_ref().map_or(0, |data| data.len() as u64);
                let Some(left) = self.left.checked_sub(size) else {
                    return Poll::Ready(Some(Err(BodyError::TooLarge)));
                };
                self.left = left;
                self.taken += size;
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Pending => {
                let on_average = self.since + RATE_GRACE + Duration::from_secs(self.taken / MIN_BYTES_PER_SECOND);
                let due = on_average.min(self.last + self.stall);
                let pause = self.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
                pause.as_mut().poll(cx).map(|()| Some(Err(BodyError::TooSlow)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
