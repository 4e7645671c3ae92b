//! Client connections: TLS handshake if configured, protocol detection, and serving of HTTP/1.1 or HTTP/2.
//!
//! The first bytes determine the protocol. Requests are served until the connection ends or is evicted.

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

use super::connection_limit::ConnectionActivity;
use super::framing::RequestScanner;
use super::guarded_stream::{GuardedStream, Protocol};
use super::h2_flood::{FrameRate, PREFACE};
use super::h2_stalled_streams::{StalledStreams, WatchedBody};
use super::service::{RequestHandler, UpgradeSlot, run_tunnel};
use crate::policy::client_limits::ClientLimits;
use crate::proxy::Handled;
use crate::proxy::active::ActiveProxy;
use crate::upstream::InformationalSink;

/// Maximum number of concurrent streams on one HTTP/2 connection.
const MAX_STREAMS: u32 = 100;

/// Maximum interval between checks of an HTTP/2 connection.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// How long a closing connection without requests stays open for the client to close it.
const GOAWAY_TIMEOUT: Duration = Duration::from_millis(500);

/// Serves a connection of a listener.
#[derive(Clone)]
pub(super) struct ConnectionHandler {
    pub(super) proxy: Arc<ActiveProxy>,
    /// The limits that applied when the connection was accepted.
    pub(super) limits: ClientLimits,
    pub(super) tls: Option<TlsAcceptor>,
}

impl ConnectionHandler {
    /// Serves a connection to its end.
    pub(super) async fn connection(self, stream: TcpStream, activity: Arc<ConnectionActivity>) {
        let _ = stream.set_nodelay(true);
        let ended = match &self.tls {
            None => self.plain(stream, &activity).await,
            Some(tls) => match timeout(self.limits.header_time, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.plain(stream, &activity).await,
                Ok(Err(error)) => Err(format!("TLS: {error}")),
                Err(_elapsed) => Err("TLS: the handshake took too long".into()),
            },
        };
        if let Err(error) = ended {
            debug!(error, "client connection ended");
        }
    }

    async fn plain<S>(&self, mut stream: S, activity: &Arc<ConnectionActivity>) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let first = tokio::select! {
            biased;
            first = first_bytes(&mut stream, &self.limits) => first.map_err(|e| e.to_string())?,
            () = wait_evicted(activity) => return Ok(()),
        };
        if first.starts_with(PREFACE) {
            self.http2(stream, first, activity).await
        } else {
            self.http1(stream, first, activity).await
        }
    }

    async fn http1<S>(&self, stream: S, first: BytesMut, activity: &Arc<ConnectionActivity>) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let head = max_head(&self.limits);
        let (stream, flags) =
            GuardedStream::new(stream, Protocol::Http1(RequestScanner::new(head)), first, &self.limits);
        let upgrade_slot = UpgradeSlot::default();
        let interims = flags.informational.clone();
        let sink: Option<Arc<dyn InformationalSink>> = Some(interims.clone());
        let handler = RequestHandler {
            proxy: self.proxy.clone(),
            flags: flags.clone(),
            upgrade_slot: upgrade_slot.clone(),
            informational: sink,
        };
        let at = activity.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            at.count_request();
            let (handled, interims) = (handler.handle(request), interims.clone());
            async move {
                Ok::<_, Infallible>(match handled {
                    Handled::Now(response) => response,
                    Handled::Later(answer) => interims.deliver_before(answer).await,
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
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let mut shutdown_requested = false;
        let ended = poll_fn(|cx| {
            // Poll the connection first: a request that has arrived is read before an eviction takes effect.
            let polled = connection.as_mut().poll(cx);
            if polled.is_ready() || shutdown_requested || activity.poll_evicted(cx).is_pending() {
                return polled;
            }
            shutdown_requested = true;
            flags.set_evicted();
            connection.as_mut().graceful_shutdown();
            connection.as_mut().poll(cx)
        });
        ended.await.map_err(|e| error_text(&e))?;
        run_tunnel(&upgrade_slot).await;
        Ok(())
    }

    async fn http2<S>(&self, stream: S, first: BytesMut, activity: &Arc<ConnectionActivity>) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (stream, flags) = GuardedStream::new(stream, Protocol::Http2(FrameRate::new()), first, &self.limits);
        // The HTTP library can't send informational responses on a stream.
        let handler = RequestHandler {
            proxy: self.proxy.clone(),
            flags,
            upgrade_slot: UpgradeSlot::default(),
            informational: None,
        };
        let (at, stalls) = (activity.clone(), Arc::new(StalledStreams::default()));
        let streams = stalls.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            at.count_request();
            let open = streams.open_stream();
            let handled = handler.handle(request);
            async move { Ok::<_, Infallible>(handled.response().await.map(|body| WatchedBody { body, open })) }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .auto_date_header(false)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(u32::try_from(max_head(&self.limits)).unwrap_or(u32::MAX))
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let mut watch = pin!(self.watch(&stalls, activity));
        poll_fn(|cx| {
            // Poll again right after the start of a graceful shutdown, so that GOAWAY is sent.
            loop {
                if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                    return Poll::Ready(ended.map_err(|e| error_text(&e)));
                }
                if let Poll::Ready(ended) = watch.as_mut().poll(cx) {
                    return Poll::Ready(ended);
                }
                let leaves = stalls.is_idle() || activity.poll_evicted(cx).is_ready();
                if !leaves || stalls.closing.swap(true, Ordering::Relaxed) {
                    return Poll::Pending;
                }
                connection.as_mut().graceful_shutdown();
            }
        })
        .await
    }

    /// Ends a closing connection once it has no requests (a client need not react to GOAWAY), and a connection whose
    /// client reads nothing. Marks a connection as idle after `limits.keep_alive` without requests.
    async fn watch(&self, stalls: &StalledStreams, activity: &ConnectionActivity) -> Result<(), String> {
        let ClientLimits { keep_alive, write_stall, .. } = self.limits;
        let mut every = interval(WATCH_INTERVAL.min(write_stall / 4).min(keep_alive / 4) + Duration::from_millis(1));
        let (mut served, mut since) = (activity.requests(), Instant::now());
        loop {
            every.tick().await;
            if stalls.any_stalled(write_stall) {
                return Err("the client does not read".into());
            }
            if stalls.has_open_streams() || activity.requests() != served {
                (served, since) = (activity.requests(), Instant::now());
            } else if stalls.closing.load(Ordering::Relaxed) {
                if since.elapsed() >= GOAWAY_TIMEOUT {
                    return Ok(());
                }
            } else if since.elapsed() >= keep_alive {
                since = Instant::now();
                stalls.idle.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Reads enough bytes to determine the protocol: the complete HTTP/2 preface, or bytes that differ from it.
async fn first_bytes<S: AsyncRead + Unpin>(stream: &mut S, limits: &ClientLimits) -> io::Result<BytesMut> {
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

/// Waits until the connection is evicted.
async fn wait_evicted(activity: &ConnectionActivity) {
    poll_fn(|cx| activity.poll_evicted(cx)).await;
}

/// Returns the maximum head size in bytes of the scanner and the HTTP library. It exceeds `limits.headers` plus
/// `limits.url`, so that the request guard rejects a head that is too large.
fn max_head(limits: &ClientLimits) -> usize {
    usize::try_from(limits.headers + limits.url).unwrap_or(usize::MAX) + 1024
}

fn error_text(error: &hyper::Error) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}
