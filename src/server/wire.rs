//! A client's connection under two clocks of ours: a head that has begun must end within `limits.header_time`,
//! and a client that takes nothing for `limits.write_stall` is cut. Timers exist only while something waits.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use crate::body::{Body, BodyError};

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Between requests: the keep-alive limit holds.
    Idle,
    /// Bytes of a head have come.
    Head,
    /// A request is being answered.
    Busy,
}

/// The phase, set by the one who serves and read by the wire.
#[derive(Debug, Clone)]
pub(super) struct Shared(Arc<AtomicU8>);

impl Shared {
    pub(super) fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Relaxed);
    }

    fn is(&self, phase: Phase) -> bool {
        self.0.load(Ordering::Relaxed) == phase as u8
    }
}

/// The body of an answer: while it lives, the connection is busy.
#[derive(Debug)]
pub(super) struct Answering {
    pub(super) body: Body,
    pub(super) phase: Shared,
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.phase.set(Phase::Idle);
    }
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    phase: Shared,
    header_time: Duration,
    write_stall: Duration,
    head_due: Option<Pin<Box<Sleep>>>,
    write_due: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    pub(super) fn new(stream: TcpStream, header_time: Duration, write_stall: Duration) -> (Wire, Shared) {
        let phase = Shared(Arc::new(AtomicU8::new(Phase::Idle as u8)));
        let wire = Wire { stream, phase: phase.clone(), header_time, write_stall, head_due: None, write_due: None };
        (wire, phase)
    }

    fn wrote<T>(&mut self, polled: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.write_due = None;
            return polled;
        }
        let limit = self.write_stall;
        let due = self.write_due.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        due.as_mut().poll(cx).map(|()| Err(timed_out("the client takes nothing")))
    }
}

fn timed_out(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, message)
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if polled.is_ready() {
            if self.phase.is(Phase::Idle) {
                self.phase.set(Phase::Head);
            }
            return polled;
        }
        if !self.phase.is(Phase::Head) {
            self.head_due = None;
            return Poll::Pending;
        }
        let limit = self.header_time;
        let due = self.head_due.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        due.as_mut().poll(cx).map(|()| Err(timed_out("the request head took too long")))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(polled, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(polled, cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}
