//! Lingering close: reads and discards the rest of a request after a refusal or an early response (RFC 9112 §9.6).
//!
//! Closing a connection with unread bytes resets it, and the client may lose the response.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// Maximum number of bytes that are discarded, with pauses of at most [`MAX_PAUSE`].
const MAX_BYTES: usize = 64 << 20;
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Maximum total duration: after a response, and (below) after a refusal.
const ANSWERED_TIMEOUT: Duration = Duration::from_secs(5);
const REFUSED_TIMEOUT: Duration = Duration::from_secs(1);

/// A lingering close in progress.
#[derive(Debug)]
pub(super) struct LingeringClose {
    pause: Pin<Box<Sleep>>,
    until: Instant,
    left: usize,
    /// True if the connection is closed at once when its slot is needed.
    evictable: bool,
}

impl LingeringClose {
    /// Returns a lingering close after a response.
    pub(super) fn answered() -> LingeringClose {
        LingeringClose { evictable: true, ..Self::for_at_most(ANSWERED_TIMEOUT) }
    }

    /// Returns a lingering close after a refusal.
    pub(super) fn refused() -> LingeringClose {
        Self::for_at_most(REFUSED_TIMEOUT)
    }

    fn for_at_most(limit: Duration) -> LingeringClose {
        LingeringClose {
            pause: Box::pin(sleep(MAX_PAUSE)),
            until: Instant::now() + limit,
            left: MAX_BYTES,
            evictable: false,
        }
    }

    /// Ready once the client has closed the connection or a limit is reached. `wanted`: the slot is needed.
    pub(super) fn poll<S>(&mut self, stream: &mut S, wanted: bool, cx: &mut Context<'_>) -> Poll<()>
    where
        S: AsyncRead + Unpin,
    {
        let mut space = [0; 16 << 10];
        while self.left > 0 && !(wanted && self.evictable) {
            let mut came = ReadBuf::new(&mut space);
            match Pin::new(&mut *stream).poll_read(cx, &mut came) {
                Poll::Ready(Ok(())) if !came.filled().is_empty() => {
                    self.left = self.left.saturating_sub(came.filled().len());
                    self.pause.as_mut().reset(self.until.min(Instant::now() + MAX_PAUSE));
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return self.pause.as_mut().poll(cx),
            }
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    /// Returns how many milliseconds a close lingers if the client writes `size` bytes every 900 ms, `times` times.
    async fn stays(goodbye: fn() -> LingeringClose, size: usize, times: usize) -> u128 {
        let (mut client, mut ours) = duplex(1 << 20);
        let mut lingering = goodbye();
        let writes = async {
            for _ in 0..times {
                let _ = client.write_all(&vec![b'x'; size]).await;
                sleep(Duration::from_millis(900)).await;
            }
            std::future::pending::<()>().await;
        };
        let begun = Instant::now();
        tokio::select! {
            () = writes => {}
            () = poll_fn(|cx| lingering.poll::<DuplexStream>(&mut ours, false, cx)) => {}
        }
        begun.elapsed().as_millis()
    }

    #[tokio::test(start_paused = true)]
    async fn lingering_close_ends_after_a_pause_or_its_total_timeout() {
        let table: [(fn() -> LingeringClose, usize, u128); 5] = [
            (LingeringClose::answered, 0, 1000),
            (LingeringClose::answered, 3, 2 * 900 + 1000),
            (LingeringClose::answered, 100, 5000),
            (LingeringClose::refused, 0, 1000),
            (LingeringClose::refused, 100, 1000),
        ];
        for (goodbye, times, expected) in table {
            let stayed = stays(goodbye, 1, times).await;
            assert!((expected..expected + 5).contains(&stayed), "{times}: {stayed}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn lingering_close_ends_at_byte_limit_client_close_or_slot_demand() {
        assert_eq!(stays(LingeringClose::answered, MAX_BYTES, 1).await, 0);
        let (client, mut ours) = duplex(10);
        let mut lingering = LingeringClose::answered();
        let wanted = poll_fn(|cx| lingering.poll(&mut ours, true, cx));
        assert!(at_once(wanted).await);
        let mut lingering = LingeringClose::refused();
        assert!(!at_once(poll_fn(|cx| lingering.poll(&mut ours, true, cx))).await, "its second is short enough");
        drop(client);
        assert!(at_once(poll_fn(|cx| lingering.poll(&mut ours, false, cx))).await);
    }

    async fn at_once(future: impl Future<Output = ()>) -> bool {
        tokio::time::timeout(Duration::ZERO, future).await.is_ok()
    }
}
