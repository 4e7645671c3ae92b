//! The stream of a client connection, with request scanning and timeouts below the HTTP library.
//!
//! Received bytes are scanned before the HTTP library reads them, a head that has begun must be complete within
//! `limits.header_time`, and a client that reads nothing for `limits.write_stall` is disconnected. A timer exists only
//! while an operation is pending.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use atomic_waker::AtomicWaker;
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::framing::{RequestScanner, ScanResult};
use super::h2_flood::FrameRate;
use super::informational::InformationalQueue;
use super::linger::LingeringClose;
use crate::policy::client_limits::ClientLimits;
use crate::policy::rejection::Rejection;

/// Method of the placeholder head that the HTTP library reads in place of a refused head, in order after the requests
/// before it. A client that sends this method gets the treatment of any unknown method.
pub(super) const REFUSED_METHOD: &str = "~refused~";
const REFUSED_HEAD: &[u8] = b"~refused~ / HTTP/1.1\r\n\r\n";

/// State shared between a connection's [`GuardedStream`] and the code that serves its requests.
#[derive(Debug, Default)]
pub(super) struct ConnectionFlags {
    refused: OnceLock<Rejection>,
    lingers: AtomicBool,
    evicted: AtomicBool,
    is_tunnel: AtomicBool,
    upgrade_declined: AtomicBool,
    /// Informational responses that are to be sent before the final responses.
    pub(super) informational: Arc<InformationalQueue>,
    /// The reading task, which waits until the upgrade has succeeded or failed.
    reader: AtomicWaker,
}

impl ConnectionFlags {
    /// Returns the rejection of the head that [`REFUSED_METHOD`] stands for.
    pub(super) fn refused(&self) -> Option<&Rejection> {
        self.refused.get()
    }

    /// Requests a lingering close: the client is rejected while it may still be sending.
    pub(super) fn set_linger(&self) {
        self.lingers.store(true, Ordering::Relaxed);
    }

    /// Marks the connection as evicted.
    pub(super) fn set_evicted(&self) {
        self.evicted.store(true, Ordering::Relaxed);
    }

    /// Marks the connection as a tunnel: all following bytes belong to another protocol.
    pub(super) fn set_tunnel(&self) {
        self.is_tunnel.store(true, Ordering::Release);
        self.reader.wake();
    }

    /// Records that a request for an upgrade got a response without a switch of protocols.
    pub(super) fn set_no_upgrade(&self) {
        self.upgrade_declined.store(true, Ordering::Release);
        self.reader.wake();
    }
}

/// The protocol of a connection, with the state of its scanner.
#[derive(Debug)]
pub(super) enum Protocol {
    Http1(RequestScanner),
    Http2(FrameRate),
}

/// A client connection whose reads are scanned and whose reads and writes have timeouts.
#[derive(Debug)]
pub(super) struct GuardedStream<S> {
    stream: S,
    protocol: Protocol,
    flags: Arc<ConnectionFlags>,
    /// Bytes that were received and not yet passed to the reader.
    buffered: BytesMut,
    /// How many bytes of `buffered` may be passed to the reader.
    passed: usize,
    /// True if the bytes after those contain some that were not scanned.
    unscanned: bool,
    /// The rejection of what follows the bytes that may pass.
    refusal: Option<Rejection>,
    header_time: Duration,
    write_stall: Duration,
    head_due: Option<Pin<Box<Sleep>>>,
    write_due: Option<Pin<Box<Sleep>>>,
    lingering: Option<LingeringClose>,
}

impl<S> GuardedStream<S> {
    /// Wraps a connection whose `first` bytes were already read.
    pub(super) fn new(
        stream: S,
        protocol: Protocol,
        first: BytesMut,
        limits: &ClientLimits,
    ) -> (GuardedStream<S>, Arc<ConnectionFlags>) {
        let flags = Arc::new(ConnectionFlags::default());
        let unseen = !first.is_empty();
        let (header_time, write_stall) = (limits.header_time, limits.write_stall);
        let guarded = GuardedStream {
            stream,
            protocol,
            flags: flags.clone(),
            buffered: first,
            passed: 0,
            unscanned: unseen,
            refusal: None,
            header_time,
            write_stall,
            head_due: None,
            write_due: None,
            lingering: None,
        };
        (guarded, flags)
    }

    fn scan_bytes(&mut self, bytes: &[u8]) -> io::Result<ScanResult> {
        match &mut self.protocol {
            Protocol::Http1(scanner) => {
                let scanned = scanner.scan(bytes);
                if scanned.passed > 0 {
                    // A head is complete: the timeout starts anew for the next one.
                    self.head_due = None;
                }
                Ok(scanned)
            }
            Protocol::Http2(meter) => {
                meter.count(bytes).map(|()| ScanResult { passed: bytes.len(), refused: None }).map_err(invalid)
            }
        }
    }

    /// Replaces a refused head by the placeholder head. Returns an error within a body, because its request is already
    /// being served.
    fn refuse(&mut self, rejection: Rejection) -> io::Result<()> {
        self.flags.set_linger();
        let in_body = self.in_body();
        self.buffered.clear();
        let code = rejection.code;
        let first = self.flags.refused.set(rejection).is_ok();
        if in_body || !first {
            return Err(invalid(code));
        }
        self.buffered.extend_from_slice(REFUSED_HEAD);
        self.passed = self.buffered.len();
        Ok(())
    }

    /// Scans the buffered bytes.
    fn scan_buffered(&mut self) -> io::Result<()> {
        self.unscanned = false;
        let held = std::mem::take(&mut self.buffered);
        let scanned = self.scan_bytes(&held);
        self.buffered = held;
        let ScanResult { passed, refused } = scanned?;
        self.passed = passed;
        self.refusal = refused;
        Ok(())
    }

    fn in_body(&self) -> bool {
        matches!(&self.protocol, Protocol::Http1(scanner) if scanner.in_body())
    }

    fn head_is_partial(&self) -> bool {
        match &self.protocol {
            Protocol::Http1(scanner) => !self.buffered.is_empty() && !scanner.in_body() && !scanner.awaits_upgrade(),
            Protocol::Http2(meter) => meter.in_head(),
        }
    }

    fn poll_head_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.head_is_partial() {
            self.head_due = None;
            return Poll::Pending;
        }
        let limit = self.header_time;
        let due = self.head_due.get_or_insert_with(|| Box::pin(sleep(limit)));
        due.as_mut().poll(cx).map(|()| Err(timed_out("the request head took too long")))
    }

    fn poll_write_timeout<T>(&mut self, polled: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.write_due = None;
            return polled;
        }
        let limit = self.write_stall;
        let due = self.write_due.get_or_insert_with(|| Box::pin(sleep(limit)));
        due.as_mut().poll(cx).map(|()| Err(timed_out("the client does not read")))
    }
}

impl<S: AsyncRead + Unpin> GuardedStream<S> {
    /// Fast path: reads into the reader's own buffer, and moves the bytes that may not pass yet to `buffered`.
    /// Returns true if there is data for the reader, or at the end of the stream.
    fn poll_direct(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let came = &buf.filled()[before..];
        if came.is_empty() {
            return Poll::Ready(Ok(true));
        }
        let scanned = self.scan_bytes(came)?;
        if scanned.passed < came.len() {
            self.buffered.extend_from_slice(&came[scanned.passed..]);
            buf.set_filled(before + scanned.passed);
        }
        self.refusal = scanned.refused;
        Poll::Ready(Ok(buf.filled().len() > before))
    }

    /// Passes no bytes while the response to an upgrade request is pending, and all bytes after a 101.
    fn poll_upgrade_pending(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Option<Poll<io::Result<()>>> {
        let Protocol::Http1(scanner) = &mut self.protocol else { return None };
        if !scanner.awaits_upgrade() || self.passed > 0 {
            return None;
        }
        self.flags.reader.register(cx.waker());
        if self.flags.upgrade_declined.swap(false, Ordering::Acquire) {
            scanner.resume();
            self.unscanned = !self.buffered.is_empty();
            return None;
        }
        let tunnel = self.flags.is_tunnel.load(Ordering::Acquire);
        match (tunnel, self.buffered.is_empty()) {
            (true, true) => Some(Pin::new(&mut self.stream).poll_read(cx, buf)),
            (true, false) => {
                self.passed = self.buffered.len();
                None
            }
            // Keep reading, so that a disconnect of the client is noticed.
            (false, true) => None,
            (false, false) => Some(Poll::Pending),
        }
    }

    /// Reads more bytes of an incomplete line or head. Returns true at the end of the stream.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut space = [0; 4096];
        let mut came = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut came))?;
        self.buffered.extend_from_slice(came.filled());
        self.unscanned = true;
        Poll::Ready(Ok(came.filled().is_empty()))
    }
}

fn timed_out(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, message)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<S: AsyncRead + Unpin> AsyncRead for GuardedStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(polled) = this.poll_upgrade_pending(cx, buf) {
            return polled;
        }
        loop {
            if this.passed > 0 {
                let given = this.passed.min(buf.remaining());
                buf.put_slice(&this.buffered[..given]);
                this.buffered.advance(given);
                this.passed -= given;
                return Poll::Ready(Ok(()));
            }
            if let Some(rejection) = this.refusal.take() {
                this.refuse(rejection)?;
                continue;
            }
            if this.unscanned {
                this.scan_buffered()?;
                continue;
            }
            if this.flags.refused.get().is_some() {
                // Bytes after a refused head are not a request.
                return Poll::Pending;
            }
            let read = if this.buffered.is_empty() { this.poll_direct(cx, buf) } else { this.poll_more(cx) };
            match read {
                Poll::Pending => return this.poll_head_timeout(cx),
                Poll::Ready(Ok(false)) => {}
                Poll::Ready(done) => return Poll::Ready(done.map(drop)),
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for GuardedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.poll_write_timeout(polled, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        // The HTTP library flushes when it has nothing left to write itself.
        let mut polled = this.flags.informational.poll_write(&mut this.stream, cx);
        if matches!(polled, Poll::Ready(Ok(()))) {
            polled = Pin::new(&mut this.stream).poll_flush(cx);
        }
        this.poll_write_timeout(polled, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let leaves = this.flags.evicted.load(Ordering::Relaxed);
        if let Some(lingering) = &mut this.lingering {
            return lingering.poll(&mut this.stream, leaves, cx).map(Ok);
        }
        let polled = Pin::new(&mut this.stream).poll_shutdown(cx);
        ready!(this.poll_write_timeout(polled, cx))?;
        let lingering = match (this.flags.lingers.load(Ordering::Relaxed), this.in_body()) {
            (false, false) => return Poll::Ready(Ok(())),
            (false, true) if !leaves => LingeringClose::answered(),
            (true, _) | (false, true) => LingeringClose::refused(),
        };
        this.lingering.insert(lingering).poll(&mut this.stream, leaves, cx).map(Ok)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.poll_write_timeout(polled, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
