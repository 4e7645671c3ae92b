//! One connection: TLS where it is configured, then what its first bytes say it speaks, then requests until it
//! ends or is asked to leave.

use std::convert::Infallible;
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, interval, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::crowd::Seat;
use super::frames::{Meter, PREFACE};
use super::framing::Scanner;
use super::receive::{Desk, Meeting, tunnel};
use super::stalls::{Stalls, Watched};
use super::wire::{Speech, Wire};
use crate::config::Limits;
use crate::proxy::Handled;
use crate::proxy::face::Face;
use crate::upstream::Ear;

/// Streams at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 100;

/// How often an HTTP/2 connection is looked at.
const GLANCE: Duration = Duration::from_millis(500);

/// For so long the other side may take its leave.
const GOODBYE: Duration = Duration::from_millis(500);

/// What a listener knows.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) face: Arc<Face>,
    /// As they were when the connection came.
    pub(super) limits: Limits,
    pub(super) tls: Option<TlsAcceptor>,
}

impl Door {
    /// Serves a connection to its end.
    pub(super) async fn connection(self, stream: TcpStream, seat: Arc<Seat>) {
        let _ = stream.set_nodelay(true);
        let ended = match &self.tls {
            None => self.plain(stream, &seat).await,
            Some(tls) => match timeout(self.limits.header_time, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.plain(stream, &seat).await,
                Ok(Err(error)) => Err(format!("TLS: {error}")),
                Err(_elapsed) => Err("TLS: the handshake took too long".into()),
            },
        };
        if let Err(error) = ended {
            debug!(error, "a client's connection ended");
        }
    }

    async fn plain<S>(&self, mut stream: S, seat: &Arc<Seat>) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let first = tokio::select! {
            biased;
            first = first_bytes(&mut stream, &self.limits) => first.map_err(|e| e.to_string())?,
            () = left(seat) => return Ok(()),
        };
        if first.starts_with(PREFACE) {
            self.http2(stream, first, seat).await
        } else {
            self.http1(stream, first, seat).await
        }
    }

    async fn http1<S>(&self, stream: S, first: BytesMut, seat: &Arc<Seat>) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let head = max_head(&self.limits);
        let (wire, word) = Wire::new(stream, Speech::Http1(Scanner::new(head)), first, &self.limits);
        let meeting = Meeting::default();
        let interims = word.interims.clone();
        let ear: Option<Arc<dyn Ear>> = Some(interims.clone());
        let desk = Desk { face: self.face.clone(), word: word.clone(), meeting: meeting.clone(), interims: ear };
        let at = seat.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            at.serves();
            let (handled, interims) = (desk.receive(request), interims.clone());
            async move {
                Ok::<_, Infallible>(match handled {
                    Handled::Now(response) => response,
                    Handled::Later(answer) => interims.before(answer).await,
                })
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.keep_alive)
            .preserve_header_case(true)
            .title_case_headers(true)
            .auto_date_header(false)
            .max_buf_size(head.max(64 << 10))
            .max_header_size(head)
            .serve_connection(TokioIo::new(wire), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let mut asked = false;
        let ended = poll_fn(|cx| {
            // A request that has come is read before it is noticed that it is time to leave.
            let polled = connection.as_mut().poll(cx);
            if polled.is_ready() || asked || seat.poll_leaving(cx).is_pending() {
                return polled;
            }
            asked = true;
            word.leaves();
            connection.as_mut().graceful_shutdown();
            connection.as_mut().poll(cx)
        });
        ended.await.map_err(|e| reason(&e))?;
        tunnel(&meeting).await;
        Ok(())
    }

    async fn http2<S>(&self, stream: S, first: BytesMut, seat: &Arc<Seat>) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (wire, word) = Wire::new(stream, Speech::Http2(Meter::new()), first, &self.limits);
        // The HTTP library has no way to send interim answers on a stream.
        let desk = Desk { face: self.face.clone(), word, meeting: Meeting::default(), interims: None };
        let (at, stalls) = (seat.clone(), Arc::new(Stalls::default()));
        let streams = stalls.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            at.serves();
            let open = streams.begin();
            let handled = desk.receive(request);
            async move { Ok::<_, Infallible>(handled.response().await.map(|body| Watched { body, open })) }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .auto_date_header(false)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(u32::try_from(max_head(&self.limits)).unwrap_or(u32::MAX))
            .serve_connection(TokioIo::new(wire), service);
        let mut connection = pin!(connection);
        let mut watch = pin!(self.watch(&stalls, seat));
        poll_fn(|cx| {
            // Again at once if it was asked to end: it says goodbye.
            loop {
                if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                    return Poll::Ready(ended.map_err(|e| reason(&e)));
                }
                if let Poll::Ready(ended) = watch.as_mut().poll(cx) {
                    return Poll::Ready(ended);
                }
                let leaves = stalls.is_idle() || seat.poll_leaving(cx).is_ready();
                if !leaves || stalls.closing.swap(true, Ordering::Relaxed) {
                    return Poll::Pending;
                }
                connection.as_mut().graceful_shutdown();
            }
        })
        .await
    }

    /// Ends a connection that is closing once nothing is asked on it (a client need not answer our goodbye), and one
    /// whose client takes nothing. Notes one on which nothing was asked for `limits.keep_alive`.
    async fn watch(&self, stalls: &Stalls, seat: &Seat) -> Result<(), String> {
        let Limits { keep_alive, write_stall, .. } = self.limits;
        let mut every = interval(GLANCE.min(write_stall / 4).min(keep_alive / 4) + Duration::from_millis(1));
        let (mut served, mut since) = (seat.served(), Instant::now());
        loop {
            every.tick().await;
            if stalls.any(write_stall) {
                return Err("the client takes nothing".into());
            }
            if stalls.busy() || seat.served() != served {
                (served, since) = (seat.served(), Instant::now());
            } else if stalls.closing.load(Ordering::Relaxed) {
                if since.elapsed() >= GOODBYE {
                    return Ok(());
                }
            } else if since.elapsed() >= keep_alive {
                since = Instant::now();
                stalls.idle.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Enough of what comes first to know what is spoken: all of HTTP/2's preface, or something that is not.
async fn first_bytes<S: AsyncRead + Unpin>(stream: &mut S, limits: &Limits) -> io::Result<BytesMut> {
    let mut first = BytesMut::with_capacity(4096);
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "nothing came");
    let mut came = timeout(limits.keep_alive, stream.read_buf(&mut first)).await.map_err(late)??;
    let rest = async {
        while came > 0 && first.len() < PREFACE.len() && PREFACE.starts_with(&first) {
            came = stream.read_buf(&mut first).await?;
        }
        Ok::<_, io::Error>(())
    };
    timeout(limits.header_time, rest).await.map_err(late)??;
    Ok(first)
}

/// Until the one in the seat is to leave.
async fn left(seat: &Seat) {
    poll_fn(|cx| seat.poll_leaving(cx)).await;
}

/// The largest head the HTTP library is to read: what is too large is for the guard to say.
fn max_head(limits: &Limits) -> usize {
    usize::try_from(limits.headers + limits.url).unwrap_or(usize::MAX) + 1024
}

fn reason(error: &hyper::Error) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}
