//! The one body type of the house. What hyper hands in is wrapped at the door and never seen further in.

pub mod fanout;
pub mod tee;
pub mod tunnel;

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;

use crate::policy::outcome::Failure;
use fanout::Reader;

/// A request's or an answer's body.
#[derive(Debug)]
pub enum Body {
    /// None, or none left.
    Empty,
    /// All of it, at once.
    Full(Bytes),
    /// As it comes from the network.
    Stream(UnsyncBoxBody<Bytes, BodyError>),
    /// As it comes from a fetch that others share.
    Shared(Reader),
}

/// Why a body ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyError {
    /// The upstream's fault.
    Upstream(Failure),
    /// The client's connection broke, or what it sent is not HTTP.
    Client,
    /// The client's body is larger than `limits.request_body`.
    TooLarge,
    /// The client sends less than the least rate.
    TooSlow,
    /// This reader held others up for longer than `limits.shared_write_stall`.
    Stalled,
}

impl std::fmt::Display for BodyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BodyError::Upstream(failure) => failure.code(),
            BodyError::Client => "the client went away",
            BodyError::TooLarge => "the request body is too large",
            BodyError::TooSlow => "the request body comes too slowly",
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

    /// `first`, then `rest`: for a body whose beginning was read to be looked at.
    pub fn prefixed(first: Bytes, rest: Body) -> Body {
        let rest = Prefixed { first: Some(first), rest };
        Body::Stream(rest.boxed_unsync())
    }

    /// A second copy, for a second attempt, where that is possible.
    pub fn try_clone(&self) -> Option<Body> {
        match self {
            Body::Empty => Some(Body::Empty),
            Body::Full(bytes) => Some(Body::Full(bytes.clone())),
            Body::Stream(_) | Body::Shared(_) => None,
        }
    }

    /// The next piece of data; trailers are passed over.
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
    first: Option<Bytes>,
    rest: Body,
}

impl HttpBody for Prefixed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(Ok(Frame::data(first)))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    /// Known with the last of it, as the rest knows it: what is stored is stored before its client has it whole.
    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_with_a_beginning_knows_its_end_with_the_last_of_it() {
        let mut body = Body::prefixed(Bytes::from_static(b"ab"), Body::Full(Bytes::from_static(b"cd")));
        assert_eq!(body.next().await, Some(Ok(Bytes::from_static(b"ab"))));
        assert!(!body.is_end_stream());
        assert_eq!(body.next().await, Some(Ok(Bytes::from_static(b"cd"))));
        assert!(body.is_end_stream());
    }
}
