//! Informational responses (RFC 9110 §15.2) to HTTP/1.1 clients.
//!
//! The HTTP library's server can't send them. The stream below it writes them when the library flushes, because then
//! the library has no partially written response.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use atomic_waker::AtomicWaker;
use bytes::{Buf, BufMut, BytesMut};
use http::StatusCode;
use http::header::{CONTENT_LENGTH, HeaderMap};
use tokio::io::AsyncWrite;

use crate::policy::http::hop_by_hop::strip_hop_by_hop;
use crate::upstream::InformationalSink;

/// Maximum size of the informational responses to one request, in bytes; further ones are not forwarded.
const MAX_BYTES: usize = 16 << 10;

/// The informational responses that are to be sent before the final responses on one connection.
#[derive(Debug, Default)]
pub(super) struct InformationalQueue {
    state: Mutex<QueueState>,
    /// True if there are bytes to be written.
    waiting: AtomicBool,
    /// The task that drives the connection.
    driver: AtomicWaker,
}

#[derive(Debug, Default)]
struct QueueState {
    /// Number of the request whose response is pending, counted per connection.
    current_request: u64,
    so_far: usize,
    unwritten: BytesMut,
}

impl InformationalQueue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Awaits the final response, and returns it once the informational responses before it are written.
    pub(super) async fn deliver_before<T>(&self, answer: impl Future<Output = T>) -> T {
        let mut answer = pin!(answer);
        let answer = poll_fn(|cx| {
            self.driver.register(cx.waker());
            answer.as_mut().poll(cx)
        })
        .await;
        poll_fn(|cx| {
            self.driver.register(cx.waker());
            if self.waiting.load(Ordering::Acquire) { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        // Informational responses from now on belong to a request that has its final response: they are dropped.
        let mut state = self.state();
        state.current_request += 1;
        state.so_far = 0;
        state.unwritten.clear();
        self.waiting.store(false, Ordering::Release);
        answer
    }

    /// Writes the queued bytes.
    pub(super) fn poll_write<S: AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.waiting.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.state();
        while !state.unwritten.is_empty() {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, &state.unwritten))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            state.unwritten.advance(written);
        }
        self.waiting.store(false, Ordering::Release);
        drop(state);
        self.driver.wake();
        Poll::Ready(Ok(()))
    }
}

impl InformationalSink for InformationalQueue {
    fn current_request(&self) -> u64 {
        self.state().current_request
    }

    fn send_informational(&self, turn: u64, status: StatusCode, headers: &HeaderMap) {
        let head = head(status, headers);
        let mut state = self.state();
        if state.current_request != turn || state.so_far + head.len() > MAX_BYTES {
            return;
        }
        state.so_far += head.len();
        state.unwritten.extend_from_slice(&head);
        self.waiting.store(true, Ordering::Release);
        drop(state);
        self.driver.wake();
    }
}

fn head(status: StatusCode, headers: &HeaderMap) -> BytesMut {
    let mut headers = headers.clone();
    strip_hop_by_hop(&mut headers);
    headers.remove(CONTENT_LENGTH);
    let mut head = BytesMut::new();
    let reason = status.canonical_reason().unwrap_or_default();
    head.put_slice(format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).as_bytes());
    for (name, value) in &headers {
        let mut begins = true;
        for byte in name.as_str().bytes() {
            head.put_u8(if begins { byte.to_ascii_uppercase() } else { byte });
            begins = byte == b'-';
        }
        head.put_slice(b": ");
        head.put_slice(value.as_bytes());
        head.put_slice(b"\r\n");
    }
    head.put_slice(b"\r\n");
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use http::header::LINK;

    fn links() -> HeaderMap {
        HeaderMap::from_iter([
            (LINK, HeaderValue::from_static("</a>")),
            (CONTENT_LENGTH, HeaderValue::from_static("3")),
        ])
    }

    #[test]
    fn informational_response_has_no_content_length() {
        let head = head(StatusCode::EARLY_HINTS, &links());
        assert_eq!(&head[..], b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
    }

    #[tokio::test]
    async fn informational_response_to_a_completed_request_is_not_sent() {
        let interims = InformationalQueue::default();
        let turn = interims.current_request();
        interims.deliver_before(async {}).await;
        interims.send_informational(turn, StatusCode::EARLY_HINTS, &links());
        assert!(!interims.waiting.load(Ordering::Relaxed));
        interims.send_informational(interims.current_request(), StatusCode::EARLY_HINTS, &links());
        let mut sent = Vec::new();
        poll_fn(|cx| interims.poll_write(&mut sent, cx)).await.expect("a vector takes all");
        assert_eq!(sent, head(StatusCode::EARLY_HINTS, &links()));
    }

    #[test]
    fn unwritten_informational_responses_are_limited_in_size() {
        let interims = InformationalQueue::default();
        for _ in 0..10_000 {
            interims.send_informational(0, StatusCode::EARLY_HINTS, &links());
        }
        assert!(interims.state().unwritten.len() <= MAX_BYTES);
    }
}
