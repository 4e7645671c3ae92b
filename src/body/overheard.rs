//! A body that passes by, and what it was in all.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::fanout::{Held, Purse};
use super::{Body, BodyError};

type Hear = Box<dyn FnOnce(Bytes) + Send>;

struct Overheard {
    body: Body,
    heard: BytesMut,
    most: usize,
    held: Option<Held>,
    /// None: it has become too large, or has been told.
    hear: Option<Hear>,
}

/// The same body; when the last of it has passed, and it was not more than `most` bytes, `hear` is told all of it.
/// Meanwhile it is held at the cost of `purse`.
pub fn overheard(body: Body, most: usize, purse: &Arc<Purse>, hear: impl FnOnce(Bytes) + Send + 'static) -> Body {
    let hear: Option<Hear> = Some(Box::new(hear));
    let mut overheard = Overheard { body, heard: BytesMut::new(), most, held: Some(Held::of(purse)), hear };
    if overheard.body.is_end_stream() {
        overheard.ended();
        return overheard.body;
    }
    Body::stream(overheard)
}

impl Overheard {
    fn hears(&mut self, data: &Bytes) {
        let Some(held) = &mut self.held else { return };
        if self.heard.len() + data.len() > self.most || !held.take(data.len() as u64) {
            return self.deaf();
        }
        self.heard.extend_from_slice(data);
    }

    fn ended(&mut self) {
        if let Some(hear) = self.hear.take() {
            // In as many bytes as it has: it may be kept for long.
            hear(Bytes::copy_from_slice(&self.heard));
        }
        self.deaf();
    }

    /// Hears nothing more, and gives back what that cost.
    fn deaf(&mut self) {
        self.hear = None;
        self.held = None;
        self.heard = BytesMut::new();
    }
}

impl HttpBody for Overheard {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.hears(data);
                }
                if self.body.is_end_stream() {
                    self.ended();
                }
            }
            Poll::Ready(Some(Err(_))) => self.deaf(),
            Poll::Ready(None) => self.ended(),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    async fn heard_of(body: Body, most: usize) -> Option<Bytes> {
        let told = Arc::new(Mutex::new(None));
        let tell = told.clone();
        let mut body =
            overheard(body, most, &Purse::new(1000), move |all| *tell.lock().expect("no panic") = Some(all));
        while let Some(Ok(_)) = body.next().await {}
        let mut told = told.lock().expect("no panic");
        told.take()
    }

    #[tokio::test]
    async fn what_passed_is_told_if_it_was_whole_and_small() {
        let body = || Body::prefixed(Bytes::from_static(b"ab"), Body::Full(Bytes::from_static(b"cd")));
        assert_eq!(heard_of(body(), 4).await.as_deref(), Some(&b"abcd"[..]));
        assert_eq!(heard_of(body(), 3).await, None);
        assert_eq!(heard_of(Body::Empty, 3).await.as_deref(), Some(&b""[..]));
    }
}
