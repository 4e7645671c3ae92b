//! Upstream connection monitor: records the case of header field names and checks response framing.
//!
//! It also detects bytes after the announced end of a response. The HTTP library reports none of this.

use std::future::Future;
use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use memchr::{memchr, memmem};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::closing_habit::{ClosingHabit, SOON};
use super::response_framing::framing_error;
use crate::policy::Tick;

/// Maximum size of a response head, in bytes. A longer one is malformed: the HTTP client refuses it too.
pub(super) const MAX_HEAD: usize = 128 << 10;

/// An idle connection is closed this long before the upstream's keep-alive timeout.
const KEEP_ALIVE_MARGIN: Duration = Duration::from_secs(1);

/// The monitor of one connection.
#[derive(Debug)]
pub(super) struct ResponseMonitor {
    /// When the connection was opened.
    pub(super) opened: Tick,
    /// Whether heads are parsed: false for HTTP/2, whose heads are not text.
    parses: bool,
    heard: Mutex<MonitorState>,
    habit: Arc<ClosingHabit>,
}

#[derive(Debug, Default)]
struct MonitorState {
    phase: ResponsePhase,
    head: Vec<u8>,
    /// Number of final response heads so far.
    responses: u64,
    /// Whether bytes of the current response have been received.
    response_started: bool,
    trailing_data: Option<TrailingData>,
    /// Whether the reader has read the last response to its end.
    finished: bool,
    /// The upstream's keep-alive timeout, if announced.
    keep_alive: Option<Duration>,
    /// When the last response head arrived.
    answered: Option<Instant>,
}

/// The kind of data received after the end of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TrailingData {
    /// Meaningless bytes, not part of the response (RFC 9112 §6.3).
    Excess,
    /// Bytes that look like another response: possibly response smuggling.
    SecondResponse,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ResponsePhase {
    #[default]
    Head,
    /// After the head. The number of body bytes left, if the head has a Content-Length.
    Body(Option<u64>),
    /// After a 101 response: the bytes belong to another protocol.
    Tunnel,
}

/// A response framing error, passed through the HTTP library as the source of an I/O error.
#[derive(Debug)]
pub(super) struct FramingError(&'static str);

impl std::fmt::Display for FramingError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for FramingError {}

impl ResponseMonitor {
    pub(super) fn new(opened: Tick, parses: bool, habit: Arc<ClosingHabit>) -> Arc<ResponseMonitor> {
        Arc::new(ResponseMonitor { opened, parses, heard: Mutex::default(), habit })
    }

    fn lock(&self) -> MutexGuard<'_, MonitorState> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the last complete response head, as received.
    pub(super) fn head(&self) -> Vec<u8> {
        let heard = self.lock();
        if heard.phase == ResponsePhase::Head { Vec::new() } else { heard.head.clone() }
    }

    /// Returns the kind of data received after the end of the last response, which makes the connection unusable.
    pub(super) fn trailing_data(&self) -> Option<TrailingData> {
        self.lock().trailing_data
    }

    /// Marks the response as read to its end.
    pub(super) fn finished(&self) {
        self.lock().finished = true;
    }

    /// Returns the idle limit of the connection, shorter than the upstream's keep-alive timeout, because a request sent
    /// while the upstream closes is lost.
    fn idle_limit(&self) -> Option<Duration> {
        let heard = self.lock();
        let limit = heard.keep_alive.filter(|_| heard.phase != ResponsePhase::Head)?;
        Some(limit.saturating_sub(KEEP_ALIVE_MARGIN))
    }

    fn is_idle(&self) -> bool {
        let heard = self.lock();
        heard.finished && heard.phase != ResponsePhase::Head
    }

    /// Returns true if the connection has served a response before, but no byte of the current one was received.
    pub(super) fn died_idle(&self) -> bool {
        let heard = self.lock();
        heard.responses > 0 && !heard.response_started
    }

    /// Notes that the upstream has closed the connection: without notice, if it did so soon after its first response, and
    /// did not announce it.
    fn on_end(&self) {
        let heard = self.lock();
        let complete = matches!(heard.phase, ResponsePhase::Body(Some(0)));
        let soon = heard.answered.is_some_and(|answered| answered.elapsed() < SOON);
        if self.parses && heard.responses == 1 && complete && soon && !closes(&heard.head) {
            self.habit.found_closed();
        }
    }

    /// Observes written bytes: a request, or the rest of one whose response has already started.
    fn on_write(&self, bytes: &[u8]) {
        if !self.parses {
            return;
        }
        let mut heard = self.lock();
        if matches!(heard.phase, ResponsePhase::Body(_)) && begins_request(bytes) {
            heard.phase = ResponsePhase::Head;
            heard.head.clear();
            heard.response_started = false;
            heard.finished = false;
        } else if heard.responses > 1 {
            self.habit.reused();
        }
    }

    /// Observes received bytes. Returns how many of them belong to the response. Fails if its framing is invalid.
    fn on_read(&self, mut bytes: &[u8]) -> Result<usize, FramingError> {
        let all = bytes.len();
        if !self.parses {
            return Ok(all);
        }
        let mut heard = self.lock();
        if heard.trailing_data.is_some() {
            return Ok(0);
        }
        heard.response_started |= !bytes.is_empty();
        while !bytes.is_empty() {
            match heard.phase {
                ResponsePhase::Body(None) | ResponsePhase::Tunnel => return Ok(all),
                ResponsePhase::Body(Some(left)) => {
                    let taken = left.min(bytes.len() as u64);
                    heard.phase = ResponsePhase::Body(Some(left - taken));
                    let rest = &bytes[usize::try_from(taken).unwrap_or(bytes.len())..];
                    if !rest.is_empty() {
                        let answer = rest.starts_with(b"HTTP/") || b"HTTP/".starts_with(rest);
                        heard.trailing_data =
                            Some(if answer { TrailingData::SecondResponse } else { TrailingData::Excess });
                    }
                    return Ok(all - rest.len());
                }
                ResponsePhase::Head => bytes = heard.head_bytes(bytes)?,
            }
        }
        Ok(all)
    }
}

impl MonitorState {
    /// Feeds bytes to the head parser. Returns the bytes after the head.
    fn head_bytes<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], FramingError> {
        // Empty lines before the head are ignored (RFC 9112 §2.2).
        let skipped = bytes.iter().take_while(|byte| self.head.is_empty() && b"\r\n".contains(byte)).count();
        let bytes = &bytes[skipped..];
        let before = self.head.len();
        self.head.extend_from_slice(bytes);
        let from = before.saturating_sub(3);
        let Some(end) = memmem::find(&self.head[from..], b"\r\n\r\n").map(|at| from + at + 4) else {
            let long = self.head.len() > MAX_HEAD;
            return if long { Err(FramingError("the response head is too large")) } else { Ok(&[]) };
        };
        self.head.truncate(end);
        let rest = &bytes[end - before..];
        match self.head.get(9..12) {
            Some(b"101") => self.phase = ResponsePhase::Tunnel,
            // Informational response: the final head follows (RFC 9110 §15.2).
            Some([b'1', ..]) => self.head.clear(),
            _ => {
                self.responses += 1;
                self.phase = ResponsePhase::Body(content_length(&self.head));
                self.keep_alive = keep_alive(&self.head);
                self.answered = Some(Instant::now());
                if let Some(error) = framing_error(self.head.starts_with(b"HTTP/1.0"), head_fields(&self.head)) {
                    return Err(FramingError(error));
                }
            }
        }
        Ok(rest)
    }
}

/// Returns true if the bytes start with a request line. A part of a request body may look like one; the only effect is
/// that the monitor takes it for one.
fn begins_request(bytes: &[u8]) -> bool {
    let line = memchr(b'\n', bytes).map_or(bytes, |end| &bytes[..end]);
    line.ends_with(b" HTTP/1.1\r") || line.ends_with(b" HTTP/1.0\r")
}

/// Returns true if a response is the last one on its connection (RFC 9112 §9.3).
fn closes(head: &[u8]) -> bool {
    let lists_close = |value: &[u8]| value.split(|byte| *byte == b',').any(|part| part.trim_ascii() == b"close");
    let mut connection = head_fields(head).filter(|(name, _)| name.eq_ignore_ascii_case(b"connection"));
    head.starts_with(b"HTTP/1.0") || connection.any(|(_, value)| lists_close(&value.to_ascii_lowercase()))
}

/// Parses the `timeout` of a `Keep-Alive` field (RFC 2068 §19.7.1.1), as Node and Apache send it, in seconds.
fn keep_alive(head: &[u8]) -> Option<Duration> {
    let line = head_fields(head).find(|(name, _)| name.eq_ignore_ascii_case(b"keep-alive"))?;
    let seconds =
        std::str::from_utf8(line.1).ok()?.split(',').find_map(|part| part.trim().strip_prefix("timeout="))?;
    // A timeout no longer than the margin is ignored: closing the connection earlier is not worthwhile.
    seconds.trim().parse().ok().map(Duration::from_secs).filter(|limit| *limit > KEEP_ALIVE_MARGIN)
}

fn content_length(head: &[u8]) -> Option<u64> {
    let line = head_fields(head).find(|(name, _)| name.eq_ignore_ascii_case(b"content-length"))?;
    std::str::from_utf8(line.1).ok()?.trim().parse().ok()
}

/// Returns the field names and values of a raw head.
pub(super) fn head_fields(head: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = head;
    let lines = std::iter::from_fn(move || {
        let (line, after) = rest.split_at(memchr(b'\n', rest)?);
        rest = &after[1..];
        Some(line)
    });
    lines.skip(1).filter_map(|line| {
        let colon = memchr(b':', line)?;
        Some((&line[..colon], &line[colon + 1..]))
    })
}

/// A connection with a monitor.
#[derive(Debug)]
pub(super) struct MonitoredStream<T> {
    pub(super) inner: T,
    pub(super) monitor: Arc<ResponseMonitor>,
    /// The idle timer.
    due: Option<Pin<Box<Sleep>>>,
}

impl<T> MonitoredStream<T> {
    pub(super) fn new(inner: T, monitor: Arc<ResponseMonitor>) -> MonitoredStream<T> {
        MonitoredStream { inner, monitor, due: None }
    }

    /// Resolves when the connection must be closed because it is idle, if the upstream announced a keep-alive timeout.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(limit) = self.monitor.idle_limit() else {
            self.due = None;
            return Poll::Pending;
        };
        loop {
            let due = self.due.get_or_insert_with(|| Box::pin(sleep(limit)));
            ready!(due.as_mut().poll(cx));
            if self.monitor.is_idle() {
                return Poll::Ready(());
            }
            self.due = None;
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for MonitoredStream<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        // Reported as closed before the pool takes the connection for idle, so that no further request is sent on it.
        if self.monitor.trailing_data().is_some() {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if polled.is_pending() {
            // The HTTP client sees a connection closed by the upstream.
            return self.poll_idle(cx).map(Ok);
        }
        self.due = None;
        if buf.filled().len() == before {
            self.monitor.on_end();
        }
        if polled.is_ready() {
            // Bytes that are not part of a response are dropped: the HTTP client sees the end of the connection.
            match self.monitor.on_read(&buf.filled()[before..]) {
                Ok(heard) => buf.set_filled(before + heard),
                Err(error) => return Poll::Ready(Err(Error::new(ErrorKind::InvalidData, error))),
            }
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for MonitoredStream<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        self.monitor.on_write(buf);
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        self.monitor.on_write(bufs.first().map_or(&[], |first| first));
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

    fn monitor() -> Arc<ResponseMonitor> {
        ResponseMonitor::new(Tick(0), true, Arc::new(ClosingHabit::new()))
    }

    #[test]
    fn final_response_head_is_recorded_at_any_split_of_the_input() {
        let bytes =
            b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nETag: a\r\nContent-Length: 3\r\n\r\nabc";
        for cut in 0..bytes.len() {
            let monitor = monitor();
            monitor.on_write(GET);
            monitor.on_read(&bytes[..cut]).expect("sound");
            monitor.on_read(&bytes[cut..]).expect("sound");
            assert_eq!(monitor.head(), b"HTTP/1.1 200 OK\r\nETag: a\r\nContent-Length: 3\r\n\r\n", "cut at {cut}");
            assert_eq!(monitor.trailing_data(), None);
        }
    }

    #[test]
    fn data_after_the_body_is_detected_and_not_passed_on() {
        let monitor = monitor();
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n";
        assert_eq!(monitor.on_read(&[&head[..], b"abcd"].concat()).ok(), Some(head.len() + 3));
        assert_eq!(monitor.trailing_data(), Some(TrailingData::Excess));
        assert_eq!(monitor.on_read(b"more").ok(), Some(0));
        for smuggled in [&b"H"[..], b"HTTP/1.1 200 OK\r\n"] {
            let monitor = ResponseMonitor::new(Tick(0), true, Arc::new(ClosingHabit::new()));
            assert_eq!(monitor.on_read(&[&head[..], b"abc"].concat()).ok(), Some(head.len() + 3));
            assert_eq!(monitor.on_read(smuggled).ok(), Some(0));
            assert_eq!(monitor.trailing_data(), Some(TrailingData::SecondResponse));
        }
    }

    #[test]
    fn response_head_with_ambiguous_framing_or_over_the_limit_is_an_error() {
        for head in ["Content-Length: 3\r\nContent-Length: 3", "Content-Length: 3\r\nTransfer-Encoding: chunked"] {
            let bytes = format!("\r\nHTTP/1.1 103 Early\r\n{head}\r\n\r\nHTTP/1.1 200 OK\r\n{head}\r\n\r\nabc");
            let monitor = monitor();
            monitor.on_write(GET);
            assert!(monitor.on_read(bytes.as_bytes()).is_err(), "{head}");
        }
        let monitor = monitor();
        monitor.on_write(GET);
        assert!(monitor.on_read(b"HTTP/1.1 200 OK\r\n").is_ok());
        assert!(monitor.on_read(&vec![b'a'; MAX_HEAD]).is_err(), "too large");
    }

    #[test]
    fn data_after_101_switching_protocols_is_not_parsed_as_a_response() {
        let monitor = monitor();
        monitor.on_write(GET);
        let frame = b"SIP/2.0 180 Ringing\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\nand more";
        assert_eq!(monitor.on_read(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").ok(), Some(36));
        for _ in 0..2 {
            assert_eq!(monitor.on_read(frame).ok(), Some(frame.len()));
            monitor.on_write(GET);
        }
        assert_eq!(monitor.trailing_data(), None);
    }

    #[test]
    fn request_body_sent_during_the_response_starts_no_new_request() {
        let monitor = monitor();
        monitor.on_write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(monitor.on_read(head).ok(), Some(head.len()));
        monitor.on_write(b"5\r\nhello\r\n");
        let echo = b"2f\r\nContent-Length: 1\r\n\r\nand much that is longer than that";
        assert_eq!(monitor.on_read(echo).ok(), Some(echo.len()));
        assert_eq!(monitor.trailing_data(), None);
        monitor.on_write(GET);
        assert_eq!(monitor.on_read(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxx").ok(), Some(39));
        assert_eq!(monitor.trailing_data(), Some(TrailingData::Excess));
    }

    #[tokio::test(start_paused = true)]
    async fn data_after_the_body_ends_the_connection() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef";
        let (mut upstream, ours) = tokio::io::duplex(1000);
        let mut tapped = MonitoredStream::new(ours, monitor());
        tapped.write_all(GET).await.expect("written");
        upstream.write_all(bytes).await.expect("written");
        let mut came = vec![0; bytes.len() - 3];
        tapped.read_exact(&mut came).await.expect("read");
        // The upstream keeps the connection open and sends nothing.
        let end = tokio::time::timeout(Duration::from_secs(9), tapped.read(&mut came)).await;
        assert_eq!(end.expect("at once").expect("the end"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_closes_before_the_keep_alive_timeout_of_upstream() {
        let head = b"HTTP/1.1 200 OK\r\nKeep-Alive: max=9, timeout=5\r\nContent-Length: 1\r\n\r\nx";
        let (mut upstream, ours) = tokio::io::duplex(1000);
        let monitor = monitor();
        let mut tapped = MonitoredStream::new(ours, monitor.clone());
        tapped.write_all(GET).await.expect("written");
        upstream.write_all(head).await.expect("written");
        let mut came = vec![0; head.len()];
        tapped.read_exact(&mut came).await.expect("read");
        let begun = tokio::time::Instant::now();
        let mut rest = [0; 9];
        let early = tokio::time::timeout(Duration::from_secs(60), tapped.read(&mut rest));
        assert!(early.await.is_err(), "its answer is still being read");
        monitor.finished();
        assert_eq!(tapped.read(&mut rest).await.expect("the end"), 0);
        assert_eq!(begun.elapsed().as_secs() % 4, 0);
    }

    #[test]
    fn died_idle_only_if_a_reused_connection_gave_no_response_byte() {
        let monitor = monitor();
        monitor.on_write(GET);
        assert!(!monitor.died_idle(), "never served");
        monitor.on_read(b"HTTP/1.1 204 No Content\r\n\r\n").expect("sound");
        monitor.on_write(GET);
        assert!(monitor.died_idle());
        monitor.on_read(b"HTTP/1.1 2").expect("sound");
        assert!(!monitor.died_idle(), "the answer had begun");
    }
}
