//! Upstream connector: DNS, TCP and TLS under one timeout, a connection limit per host, and a monitor per connection.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::uri::{Authority, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tower_service::Service;

use super::closing_habit::ClosingHabit;
use super::resolver::Resolver;
use super::response_monitor::{MonitoredStream, ResponseMonitor};
use crate::clock::Clock;

/// The start of the error message of a connect timeout.
pub(super) const CONNECT_TIMED_OUT: &str = "no connection within timeouts.connect";

/// Opens connections to the upstream.
#[derive(Clone)]
pub(super) struct Connector {
    secure: HttpsConnector<HttpConnector<Resolver>>,
    connect_timeout: Duration,
    /// Whether to use HTTP/2.
    http2: bool,
    slot_timeout: Duration,
    connections: Arc<HostConnections>,
    clock: Clock,
    pub(super) habit: Arc<ClosingHabit>,
}

/// The connection slots of each host.
struct HostConnections {
    max_connections: usize,
    hosts: Mutex<HashMap<Authority, Arc<Semaphore>>>,
}

/// Maximum number of hosts kept. When it is reached, hosts without a connection are removed.
const MAX_HOSTS: usize = 10_000;

impl HostConnections {
    fn semaphore_of(&self, uri: &Uri) -> Arc<Semaphore> {
        let host = uri.authority().cloned().unwrap_or_else(|| Authority::from_static("localhost"));
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= MAX_HOSTS {
            hosts.retain(|_, places| Arc::strong_count(places) > 1);
        }
        let new = || Arc::new(Semaphore::new(self.max_connections.min(Semaphore::MAX_PERMITS)));
        hosts.entry(host).or_insert_with(new).clone()
    }
}

/// Error: no connection slot was free in time. It does not count as a failure to reach the upstream.
#[derive(Debug)]
pub(super) struct NoFreeConnection;

impl std::fmt::Display for NoFreeConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("all connections are in use: limit of [upstream.pool] connections")
    }
}

impl std::error::Error for NoFreeConnection {}

/// The limits of a connector.
pub(super) struct ConnectorLimits {
    /// Timeout for DNS, TCP and TLS together.
    pub(super) connect_timeout: Duration,
    /// Timeout for waiting for a connection slot.
    pub(super) slot_timeout: Duration,
    /// Maximum number of concurrent connections to one host.
    pub(super) max_connections: usize,
    /// Whether to use HTTP/2.
    pub(super) http2: bool,
    /// Whether nothing else is used.
    pub(super) http2_only: bool,
    /// Whether addresses that may belong to the machine itself or to its cloud's metadata service are refused.
    pub(super) refuse_local: bool,
}

impl Connector {
    pub(super) fn new(terms: &ConnectorLimits, tls: ClientConfig, clock: Clock) -> Connector {
        let mut tcp = HttpConnector::new_with_resolver(Resolver::new(terms.refuse_local));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(Duration::from_secs(30)));
        tcp.set_connect_timeout(Some(terms.connect_timeout));
        let secure = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
        let secure = if terms.http2 {
            secure.enable_all_versions().wrap_connector(tcp)
        } else {
            secure.enable_http1().wrap_connector(tcp)
        };
        let places = Arc::new(HostConnections { max_connections: terms.max_connections, hosts: Mutex::default() });
        let ConnectorLimits { connect_timeout: limit, slot_timeout, http2, .. } = *terms;
        let habit = Arc::new(ClosingHabit::new());
        Connector { secure, connect_timeout: limit, http2, slot_timeout, connections: places, clock, habit }
    }
}

/// A connection to the upstream.
pub(super) struct UpstreamStream {
    io: TokioIo<MonitoredStream<TokioIo<MaybeHttpsStream<TokioIo<TcpStream>>>>>,
    http2: bool,
    _place: OwnedSemaphorePermit,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = UpstreamStream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<UpstreamStream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.secure.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (mut secure, places) = (self.secure.clone(), self.connections.clone());
        let (limit, slot_timeout, clock, may_http2) =
            (self.connect_timeout, self.slot_timeout, self.clock.clone(), self.http2);
        let habit = self.habit.clone();
        Box::pin(async move {
            // If a connection becomes idle during this wait, the request uses that one instead.
            let place = timeout(slot_timeout, places.semaphore_of(&uri).acquire_owned())
                .await
                .map_err(|_| NoFreeConnection)??;
            let connecting = secure.call(uri);
            let stream = timeout(limit, connecting).await.map_err(|_| BoxError::from(CONNECT_TIMED_OUT))??;
            // Over TLS, ALPN decides. Without TLS, the configuration does (prior knowledge, RFC 9113 §3.3).
            let http2 = match &stream {
                MaybeHttpsStream::Http(_) => may_http2,
                MaybeHttpsStream::Https(_) => stream.connected().is_negotiated_h2(),
            };
            let tapped = MonitoredStream::new(TokioIo::new(stream), ResponseMonitor::new(clock.now(), !http2, habit));
            Ok(UpstreamStream { io: TokioIo::new(tapped), http2, _place: place })
        })
    }
}

impl Connection for UpstreamStream {
    fn connected(&self) -> Connected {
        let tapped = self.io.inner();
        let connected = tapped.inner.inner().connected().extra(tapped.monitor.clone());
        if self.http2 { connected.negotiated_h2() } else { connected }
    }
}

impl hyper::rt::Read for UpstreamStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for UpstreamStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
