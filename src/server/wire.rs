//! A client's connection, read strictly and under clocks of ours: what it sends is scanned before the HTTP library
//! sees it, a head that has begun must end within `limits.header_time`, and a client that takes nothing for
//! `limits.write_stall` is cut. Timers exist only while something waits.

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

use super::frames::Meter;
use super::framing::{Scanned, Scanner};
use super::interim::Interims;
use super::linger::Lingering;
use crate::config::Limits;
use crate::proxy::respond::Rejection;

/// What the HTTP library is given to read in place of a head that was refused: in its turn, behind requests that
/// came before it. Should a client use this method itself, it is one that nobody knows, like any other.
pub(super) const REFUSED: &str = "~refused~";
const REFUSED_HEAD: &[u8] = b"~refused~ / HTTP/1.1\r\n\r\n";

/// What the one who serves a connection and its wire tell each other.
#[derive(Debug, Default)]
pub(super) struct Word {
    refused: OnceLock<Rejection>,
    lingers: AtomicBool,
    leaves: AtomicBool,
    tunnel: AtomicBool,
    answered: AtomicBool,
    /// What goes ahead of answers.
    pub(super) interims: Arc<Interims>,
    /// Who waits to hear which of the two it is.
    reader: AtomicWaker,
}

impl Word {
    /// Why the head was refused that [`REFUSED`] stands for.
    pub(super) fn refused(&self) -> Option<&Rejection> {
        self.refused.get()
    }

    /// The client is sent away while it may still be sending.
    pub(super) fn linger(&self) {
        self.lingers.store(true, Ordering::Relaxed);
    }

    /// The connection is asked to make room.
    pub(super) fn leaves(&self) {
        self.leaves.store(true, Ordering::Relaxed);
    }

    /// What comes from now on is another protocol.
    pub(super) fn tunnel(&self) {
        self.tunnel.store(true, Ordering::Release);
        self.reader.wake();
    }

    /// A request that asked for another protocol is answered, and this was not the answer.
    pub(super) fn stays(&self) {
        self.answered.store(true, Ordering::Release);
        self.reader.wake();
    }
}

/// What the bytes are.
#[derive(Debug)]
pub(super) enum Speech {
    Http1(Scanner),
    Http2(Meter),
}

/// The connection.
#[derive(Debug)]
pub(super) struct Wire<S> {
    stream: S,
    speech: Speech,
    word: Arc<Word>,
    /// What came, and was not given on yet.
    held: BytesMut,
    /// So much of it may be.
    passed: usize,
    /// Some of the rest was not looked at.
    unseen: bool,
    /// What follows them is refused.
    refusal: Option<Rejection>,
    header_time: Duration,
    write_stall: Duration,
    head_due: Option<Pin<Box<Sleep>>>,
    write_due: Option<Pin<Box<Sleep>>>,
    lingering: Option<Lingering>,
}

impl<S> Wire<S> {
    /// A connection of which the `first` bytes were read already.
    pub(super) fn new(stream: S, speech: Speech, first: BytesMut, limits: &Limits) -> (Wire<S>, Arc<Word>) {
        let word = Arc::new(Word::default());
        let unseen = !first.is_empty();
        let (header_time, write_stall) = (limits.header_time, limits.write_stall);
        let wire = Wire {
            stream,
            speech,
            word: word.clone(),
            held: first,
            passed: 0,
            unseen,
            refusal: None,
            header_time,
            write_stall,
            head_due: None,
            write_due: None,
            lingering: None,
        };
        (wire, word)
    }

    fn look(&mut self, bytes: &[u8]) -> io::Result<Scanned> {
        match &mut self.speech {
            Speech::Http1(scanner) => {
                let scanned = scanner.scan(bytes);
                if scanned.passed > 0 {
                    // A head was whole: the next one has all of its time.
                    self.head_due = None;
                }
                Ok(scanned)
            }
            Speech::Http2(meter) => {
                meter.count(bytes).map(|()| Scanned { passed: bytes.len(), refused: None }).map_err(invalid)
            }
        }
    }

    /// Instead of a head, its refusal is read. A body just ends: its request is being answered already.
    fn refuse(&mut self, rejection: Rejection) -> io::Result<()> {
        self.word.linger();
        let in_body = self.in_body();
        self.held.clear();
        let code = rejection.code;
        let first = self.word.refused.set(rejection).is_ok();
        if in_body || !first {
            return Err(invalid(code));
        }
        self.held.extend_from_slice(REFUSED_HEAD);
        self.passed = self.held.len();
        Ok(())
    }

    /// Looks at what is held.
    fn look_at_held(&mut self) -> io::Result<()> {
        self.unseen = false;
        let held = std::mem::take(&mut self.held);
        let scanned = self.look(&held);
        self.held = held;
        let Scanned { passed, refused } = scanned?;
        self.passed = passed;
        self.refusal = refused;
        Ok(())
    }

    fn in_body(&self) -> bool {
        matches!(&self.speech, Speech::Http1(scanner) if scanner.in_body())
    }

    fn head_is_partial(&self) -> bool {
        match &self.speech {
            Speech::Http1(scanner) => !self.held.is_empty() && !scanner.in_body() && !scanner.waits(),
            Speech::Http2(meter) => meter.in_head(),
        }
    }

    fn nothing_comes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.head_is_partial() {
            self.head_due = None;
            return Poll::Pending;
        }
        let limit = self.header_time;
        let due = self.head_due.get_or_insert_with(|| Box::pin(sleep(limit)));
        due.as_mut().poll(cx).map(|()| Err(timed_out("the request head took too long")))
    }

    fn wrote<T>(&mut self, polled: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.write_due = None;
            return polled;
        }
        let limit = self.write_stall;
        let due = self.write_due.get_or_insert_with(|| Box::pin(sleep(limit)));
        due.as_mut().poll(cx).map(|()| Err(timed_out("the client takes nothing")))
    }
}

impl<S: AsyncRead + Unpin> Wire<S> {
    /// The usual way: into the reader's own buffer, all of which passes. What does not is held. True once there is
    /// something for the reader, or nothing more at all.
    fn poll_straight(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let came = &buf.filled()[before..];
        if came.is_empty() {
            return Poll::Ready(Ok(true));
        }
        let scanned = self.look(came)?;
        if scanned.passed < came.len() {
            self.held.extend_from_slice(&came[scanned.passed..]);
            buf.set_filled(before + scanned.passed);
        }
        self.refusal = scanned.refused;
        Poll::Ready(Ok(buf.filled().len() > before))
    }

    /// While a request for another protocol is being answered, nothing more is read; after a 101 everything passes.
    fn poll_undecided(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Option<Poll<io::Result<()>>> {
        let Speech::Http1(scanner) = &mut self.speech else { return None };
        if !scanner.waits() || self.passed > 0 {
            return None;
        }
        self.word.reader.register(cx.waker());
        if self.word.answered.swap(false, Ordering::Acquire) {
            scanner.go_on();
            self.unseen = !self.held.is_empty();
            return None;
        }
        let tunnel = self.word.tunnel.load(Ordering::Acquire);
        match (tunnel, self.held.is_empty()) {
            (true, true) => Some(Pin::new(&mut self.stream).poll_read(cx, buf)),
            (true, false) => {
                self.passed = self.held.len();
                None
            }
            // That the client leaves is still noticed.
            (false, true) => None,
            (false, false) => Some(Poll::Pending),
        }
    }

    /// Reads what a line or head still lacks. True at the end.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut space = [0; 4096];
        let mut came = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut came))?;
        self.held.extend_from_slice(came.filled());
        self.unseen = true;
        Poll::Ready(Ok(came.filled().is_empty()))
    }
}

fn timed_out(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, message)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(polled) = this.poll_undecided(cx, buf) {
            return polled;
        }
        loop {
            if this.passed > 0 {
                let given = this.passed.min(buf.remaining());
                buf.put_slice(&this.held[..given]);
                this.held.advance(given);
                this.passed -= given;
                return Poll::Ready(Ok(()));
            }
            if let Some(rejection) = this.refusal.take() {
                this.refuse(rejection)?;
                continue;
            }
            if this.unseen {
                this.look_at_held()?;
                continue;
            }
            if this.word.refused.get().is_some() {
                // What follows a refused head is nobody's request.
                return Poll::Pending;
            }
            let read = if this.held.is_empty() { this.poll_straight(cx, buf) } else { this.poll_more(cx) };
            match read {
                Poll::Pending => return this.nothing_comes(cx),
                Poll::Ready(Ok(false)) => {}
                Poll::Ready(done) => return Poll::Ready(done.map(drop)),
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(polled, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        // The library flushes when nothing of its own is left to write.
        let mut polled = this.word.interims.poll_write(&mut this.stream, cx);
        if matches!(polled, Poll::Ready(Ok(()))) {
            polled = Pin::new(&mut this.stream).poll_flush(cx);
        }
        this.wrote(polled, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let leaves = this.word.leaves.load(Ordering::Relaxed);
        if let Some(lingering) = &mut this.lingering {
            return lingering.poll(&mut this.stream, leaves, cx).map(Ok);
        }
        let polled = Pin::new(&mut this.stream).poll_shutdown(cx);
        ready!(this.wrote(polled, cx))?;
        let lingering = match (this.word.lingers.load(Ordering::Relaxed), this.in_body()) {
            (false, false) => return Poll::Ready(Ok(())),
            (false, true) if !leaves => Lingering::answered(),
            (true, _) | (false, true) => Lingering::refused(),
        };
        this.lingering.insert(lingering).poll(&mut this.stream, leaves, cx).map(Ok)
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
        self.stream.is_write_vectored()
    }
}
