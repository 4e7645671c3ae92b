//! The body type of requests and responses. Bodies of hyper are wrapped on receipt and not used beyond that point.

pub mod fanout;
pub mod tee;
pub mod tunnel;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use tokio::time::{Instant, timeout_at};

use crate::policy::outcome::Failure;
use fanout::Reader;

/// Maximum number of bytes that [`Body::begun`] reads, plus a chunk.
const MAX_BEGINNING: usize = 64 << 10;

/// The body of a request or response.
#[derive(Debug)]
pub enum Body {
    /// No data, or none left.
    Empty,
    /// The complete body.
    Full(Bytes),
    /// A stream from the network.
    Stream(UnsyncBoxBody<Bytes, BodyError>),
    /// A stream from a shared fetch.
    Shared(Reader),
}

/// The reason why a body ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyError {
    /// The upstream failed.
    Upstream(Failure),
    /// The client's connection broke, or the client sent invalid HTTP.
    Client,
    /// The request body is larger than `limits.request_body`.
    TooLarge,
    /// The client sends more slowly than the minimum rate.
    TooSlow,
    /// This reader delayed other readers for longer than `limits.shared_write_stall`.
    Stalled,
}

impl std::fmt::Display for BodyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BodyError::Upstream(failure) => failure.code(),
            BodyError::Client => "the client went away",
            BodyError::TooLarge => "the request body is too large",
            BodyError::TooSlow => "the request body arrives too slowly",
            BodyError::Stalled => "the client reads too slowly",
        })
    }
}

impl std::error::Error for BodyError {}

impl Body {
    /// Wraps a body from the network.
    pub fn stream(body: impl HttpBody<Data = Bytes, Error = BodyError> + Send + 'static) -> Body {
        if body.is_end_stream() { Body::Empty } else { Body::Stream(body.boxed_unsync()) }
    }

    /// Returns a body of `first` followed by `rest`, for a body whose beginning was read in advance.
    pub fn prefixed(mut first: Vec<Bytes>, rest: Body) -> Body {
        match first.len() {
            0 => rest,
            1 if rest.is_end_stream() => Body::Full(first.remove(0)),
            _ => Body::Stream(Prefixed { first: first.into(), rest }.boxed_unsync()),
        }
    }

    /// Reads the beginning of a body: what has arrived, and what arrives within `patience`. Returns the body with what was
    /// read, or the error that ended it: then nothing of it has been sent to anybody.
    pub async fn begun(mut self, patience: Duration) -> Result<Body, BodyError> {
        if let Body::Full(_) | Body::Shared(_) = self {
            return Ok(self);
        }
        let (mut first, mut size, mut deadline) = (Vec::new(), 0, None);
        while size < MAX_BEGINNING && !self.is_end_stream() {
            let mut next = poll_fn(|cx| Poll::Ready(pin!(self.next()).poll(cx))).await;
            if next.is_pending() && !patience.is_zero() {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + patience);
                next = timeout_at(deadline, self.next()).await.map_or(Poll::Pending, Poll::Ready);
            }
            match next {
                Poll::Ready(Some(Ok(chunk))) if first.is_empty() && self.is_end_stream() => {
                    return Ok(Body::Full(chunk));
                }
                Poll::Ready(Some(Ok(chunk))) => {
                    size += chunk.len();
                    first.push(chunk);
                }
                Poll::Ready(Some(Err(error))) => return Err(error),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Ok(Body::prefixed(first, self))
    }

    /// Returns true if the length of the body is known and small.
    pub fn is_small(&self) -> bool {
        self.size_hint().exact().is_some_and(|length| length <= MAX_BEGINNING as u64)
    }

    /// Returns a copy for a retry, or `None` for a stream.
    pub fn try_clone(&self) -> Option<Body> {
        match self {
            Body::Empty => Some(Body::Empty),
            Body::Full(bytes) => Some(Body::Full(bytes.clone())),
            Body::Stream(_) | Body::Shared(_) => None,
        }
    }

    /// Returns the next chunk of data. Trailers are skipped.
    pub async fn next(&mut self) -> Option<Result<Bytes, BodyError>> {
        loop {
            match self.frame().await? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(Ok(data)),
                    Err(_trailers) => {}
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Body::Empty => Poll::Ready(None),
            Body::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Body::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Body::Stream(stream) => Pin::new(stream).poll_frame(cx),
            Body::Shared(reader) => reader.poll_next(cx).map(|next| next.map(|chunk| chunk.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Empty => true,
            Body::Full(bytes) => bytes.is_empty(),
            Body::Stream(stream) => stream.is_end_stream(),
            Body::Shared(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Empty => SizeHint::with_exact(0),
            Body::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::Stream(stream) => stream.size_hint(),
            Body::Shared(reader) => reader.size_hint(),
        }
    }
}

/// See [`Body::prefixed`].
struct Prefixed {
    first: VecDeque<Bytes>,
    rest: Body,
}

impl HttpBody for Prefixed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.first.pop_front() {
            Some(first) => Poll::Ready(Some(Ok(Frame::data(first)))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    /// True as soon as the last frame was read, if `rest` knows its end: a response is then stored before its client
    /// has received all of it.
    fn is_end_stream(&self) -> bool {
        self.first.is_empty() && self.rest.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn prefixed_body_yields_the_prefix_first_and_ends_with_the_last_chunk() {
        let mut body = Body::prefixed(vec![Bytes::from_static(b"ab")], Body::Full(Bytes::from_static(b"cd")));
        assert_eq!(body.next().await, Some(Ok(Bytes::from_static(b"ab"))));
        assert!(!body.is_end_stream());
        assert_eq!(body.next().await, Some(Ok(Bytes::from_static(b"cd"))));
        assert!(body.is_end_stream());
    }
}
