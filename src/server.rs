//! The listeners: accept, limit, guard, hand to the proxy, drain.

mod guard;
mod intake;
mod wire;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::body::Body;
use crate::config::Limits;
use crate::policy::headers::{add_date, strip_nominated};
use crate::proxy::respond::body_rejection;
use crate::proxy::{Handled, Proxy};
use wire::{Answering, Phase, Wire};

/// After a failed `accept` (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds an address. The error says what to do.
pub async fn bind(address: SocketAddr, what: &str) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| {
        if error.kind() == io::ErrorKind::AddrInUse {
            format!("{what}: {address} is taken by another process: stop it, or choose another listen address")
        } else if error.kind() == io::ErrorKind::PermissionDenied {
            format!("{what}: no permission to listen on {address}: choose a port above 1023")
        } else {
            format!("{what}: can't listen on {address}: {error}")
        }
    })
}

/// Serves until `drain` turns true, then lets what runs finish until `grace` has passed.
///
/// Returns how many connections had to be cut.
pub async fn serve(
    listener: TcpListener,
    proxy: Arc<Proxy>,
    limits: Limits,
    mut drain: watch::Receiver<bool>,
    grace: Duration,
) -> usize {
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    let draining = drain.clone();
    loop {
        let accepted = tokio::select! {
            biased;
            () = turned(&mut drain) => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                let (proxy, draining) = (proxy.clone(), draining.clone());
                connections.spawn(async move {
                    connection(stream, proxy, limits, draining).await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "can't accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // Who is in the kernel's queue already has been let in.
    while let Ok(place) = places.clone().try_acquire_owned() {
        let waiting = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
        let Ok(Ok((stream, _))) = waiting else { break };
        let (proxy, draining) = (proxy.clone(), draining.clone());
        connections.spawn(async move {
            connection(stream, proxy, limits, draining).await;
            drop(place);
        });
    }
    drop(listener);
    let finish = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(grace, finish).await;
    let cut = connections.len();
    connections.shutdown().await;
    cut
}

/// Beyond `limits.connections` new ones wait in the kernel's queue.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn connection(stream: TcpStream, proxy: Arc<Proxy>, limits: Limits, mut drain: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let (wire, phase) = Wire::new(stream, limits.header_time, limits.write_stall);
    let service = service_fn(move |request: Request<Incoming>| {
        phase.set(Phase::Busy);
        let (handled, phase) = (receive(&proxy, &limits, request), phase.clone());
        async move { Ok::<_, Infallible>(handled.response().await.map(|body| Answering { body, phase })) }
    });
    let head = usize::try_from(limits.headers + limits.url).unwrap_or(usize::MAX) + 1024;
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.keep_alive)
        .preserve_header_case(true)
        .title_case_headers(true)
        .auto_date_header(false)
        .max_buf_size(head.max(64 << 10))
        .max_header_size(head)
        .serve_connection(TokioIo::new(wire), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        // A request that has come is read before the drain is noticed.
        biased;
        ended = connection.as_mut() => ended,
        () = turned(&mut drain) => {
            connection.as_mut().graceful_shutdown();
            connection.as_mut().await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a client's connection ended");
    }
}

/// Until the switch is on, or its owner gone.
async fn turned(switch: &mut watch::Receiver<bool>) {
    let _ = switch.wait_for(|on| *on).await;
}

/// One request: guard, body, proxy.
fn receive(proxy: &Arc<Proxy>, limits: &Limits, request: Request<Incoming>) -> Handled {
    let guarded = guard::check(&request, limits, |name| proxy.site.is_keyed(name));
    let (mut parts, incoming) = request.into_parts();
    if let Err(rejection) = guarded {
        return Handled::Now(closing(proxy.rejected(&parts, &rejection)));
    }
    // Key, variant and upstream must see the same headers.
    strip_nominated(&mut parts.headers);
    if parts.method == Method::OPTIONS && parts.uri.path() == "*" {
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::NO_CONTENT;
        add_date(response.headers_mut(), proxy.commons.clock.wall());
        return Handled::Now(response);
    }
    if incoming.is_end_stream() {
        return proxy.handle(Request::from_parts(parts, Body::Empty));
    }
    let (proxy, limits) = (proxy.clone(), *limits);
    Handled::later(async move {
        match intake::body(incoming, &limits).await {
            Ok(body) => proxy.handle(Request::from_parts(parts, body)).response().await,
            Err(fault) => closing(proxy.rejected(&parts, &body_rejection(fault))),
        }
    })
}

/// After a refusal nothing more is read from the connection: what follows may be part of what was refused.
fn closing(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    response
}
