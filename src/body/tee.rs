//! A tee on a body: copies the data while it is streamed, and delivers the copy when the body is complete.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::fanout::{InflightBudget, InflightGuard};
use super::{Body, BodyError};

type OnComplete = Box<dyn FnOnce(Bytes) + Send>;

struct TeeBody {
    body: Body,
    copied: BytesMut,
    max_bytes: usize,
    held: Option<InflightGuard>,
    /// `None` if the body has become too large or the callback has been called.
    on_complete: Option<OnComplete>,
}

/// Returns the same body. When its last byte has passed, calls `hear` with all of it, unless it was larger than `most`
/// bytes. Until then the copied bytes are taken from `budget`; if it has none left, `hear` is not called.
pub fn tee(
    body: Body,
    max_bytes: usize,
    budget: &Arc<InflightBudget>,
    on_complete: impl FnOnce(Bytes) + Send + 'static,
) -> Body {
    let on_complete: Option<OnComplete> = Some(Box::new(on_complete));
    let mut body =
        TeeBody { body, copied: BytesMut::new(), max_bytes, held: Some(InflightGuard::new(budget)), on_complete };
    if body.body.is_end_stream() {
        body.ended();
        return body.body;
    }
    Body::stream(body)
}

impl TeeBody {
    fn copy(&mut self, data: &Bytes) {
        let Some(held) = &mut self.held else { return };
        if self.copied.len() + data.len() > self.max_bytes || !held.take(data.len() as u64) {
            return self.stop_copying();
        }
        self.copied.extend_from_slice(data);
    }

    fn ended(&mut self) {
        if let Some(on_complete) = self.on_complete.take() {
            // Copy into an allocation of the exact size, because it may be kept for long.
            on_complete(Bytes::copy_from_slice(&self.copied));
        }
        self.stop_copying();
    }

    /// Stops copying and gives the held bytes back to the budget.
    fn stop_copying(&mut self) {
        self.on_complete = None;
        self.held = None;
        self.copied = BytesMut::new();
    }
}

impl HttpBody for TeeBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.copy(data);
                }
                if self.body.is_end_stream() {
                    self.ended();
                }
            }
            Poll::Ready(Some(Err(_))) => self.stop_copying(),
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

    async fn heard_of(body: Body, max_bytes: usize) -> Option<Bytes> {
        let received = Arc::new(Mutex::new(None));
        let sender = received.clone();
        let mut body = tee(body, max_bytes, &InflightBudget::new(1000), move |all| {
            *sender.lock().expect("no panic") = Some(all);
        });
        while let Some(Ok(_)) = body.next().await {}
        let mut received = received.lock().expect("no panic");
        received.take()
    }

    #[tokio::test]
    async fn tee_reports_the_body_only_if_it_is_within_the_size_limit() {
        let body = || Body::prefixed(vec![Bytes::from_static(b"ab")], Body::Full(Bytes::from_static(b"cd")));
        assert_eq!(heard_of(body(), 4).await.as_deref(), Some(&b"abcd"[..]));
        assert_eq!(heard_of(body(), 3).await, None);
        assert_eq!(heard_of(Body::Empty, 3).await.as_deref(), Some(&b""[..]));
    }
}
