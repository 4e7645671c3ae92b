//! The service behind a client connection: request guard, request body, proxy call, and upgrades.

use std::sync::{Arc, Mutex, PoisonError};

use http::header::{CONNECTION, DATE, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tracing::{Instrument, debug};

use super::guarded_stream::{ConnectionFlags, REFUSED_METHOD};
use super::h2_to_h1::to_http1_form;
use super::request_body;
use crate::body::Body;
use crate::body::tunnel::Tunnel;
use crate::policy::http::hop_by_hop::{connection_options, strip_connection_options};
use crate::policy::http::request_guard;
use crate::policy::rejection::Rejection;
use crate::proxy::Handled;
use crate::proxy::Proxy;
use crate::proxy::active::ActiveProxy;
use crate::proxy::respond::error::body_rejection;
use crate::telemetry::spans;
use crate::upstream::InformationalSink;

/// Slot for the two ends of a tunnel: filled by the upgrade request, emptied by its connection.
pub(super) type UpgradeSlot = Arc<Mutex<Option<(OnUpgrade, Tunnel)>>>;

/// Handles the requests of one connection.
#[derive(Debug, Clone)]
pub(super) struct RequestHandler {
    pub(super) proxy: Arc<ActiveProxy>,
    pub(super) flags: Arc<ConnectionFlags>,
    pub(super) upgrade_slot: UpgradeSlot,
    /// Sink for informational responses. `None` if they can't be forwarded.
    pub(super) informational: Option<Arc<dyn InformationalSink>>,
}

/// Passes a request to the proxy within a tracing span.
fn handle_in_span(proxy: &Arc<Proxy>, request: Request<Body>, sink: Option<&Arc<dyn InformationalSink>>) -> Handled {
    let span = spans::request(request.method(), request.uri().path(), request.headers());
    match span.in_scope(|| proxy.handle(request, sink)) {
        Handled::Now(response) => {
            spans::record_response(&span, &response);
            Handled::Now(response)
        }
        Handled::Later(answer) if span.is_disabled() => Handled::Later(answer),
        Handled::Later(answer) => Handled::later(async move {
            let response = answer.instrument(span.clone()).await;
            spans::record_response(&span, &response);
            response
        }),
    }
}

impl RequestHandler {
    /// Handles a request: checks it with the guard, reads its body, and passes it to the proxy.
    pub(super) fn handle(&self, mut request: Request<Incoming>) -> Handled {
        if let (Some(rejection), REFUSED_METHOD) = (self.flags.refused(), request.method().as_str()) {
            return self.refuse(&request.into_parts().0, rejection);
        }
        to_http1_form(&mut request);
        let served = self.proxy.load();
        let proxy = &served.proxy;
        let guarded = request_guard::check(&request, &served.limits, |name| proxy.upstream.is_keyed(name));
        let names_one = request.headers().contains_key(UPGRADE);
        let upgrade = (names_one && asks_upgrade(&request)).then(|| hyper::upgrade::on(&mut request));
        let (mut parts, incoming) = request.into_parts();
        if let Err(rejection) = guarded {
            return self.refuse(&parts, &rejection);
        }
        if names_one && upgrade.is_none() {
            parts.headers.remove(UPGRADE);
            if incoming.is_end_stream() {
                self.flags.set_no_upgrade();
            }
        }
        // Key, variant and upstream must see the same headers.
        strip_connection_options(&mut parts.headers);
        if parts.method == Method::OPTIONS && parts.uri.path() == "*" {
            return Handled::Now(self.no_content());
        }
        if !incoming.is_end_stream() {
            return self.with_body(parts, incoming);
        }
        let sink = self.sink(&parts);
        let handled = handle_in_span(proxy, Request::from_parts(parts, Body::Empty), sink);
        match upgrade {
            None => handled,
            Some(upgrade) => self.may_upgrade(handled, upgrade),
        }
    }

    /// Returns the sink for informational responses, which must not be sent to HTTP/1.0 clients: RFC 9110 §15.2.
    fn sink(&self, parts: &Parts) -> Option<&Arc<dyn InformationalSink>> {
        self.informational.as_ref().filter(|_| parts.version == Version::HTTP_11)
    }

    fn with_body(&self, parts: Parts, incoming: Incoming) -> Handled {
        let handler = self.clone();
        Handled::later(async move {
            let served = handler.proxy.load_full();
            match request_body::read_body(incoming, &served.limits, served.proxy.inflight()).await {
                Ok(body) => {
                    let sink = handler.sink(&parts);
                    handle_in_span(&served.proxy, Request::from_parts(parts, body), sink).response().await
                }
                Err(fault) => handler.refuse(&parts, &body_rejection(fault)).response().await,
            }
        })
    }

    /// Handles the response to an upgrade request: stores the tunnel if the protocol was switched.
    fn may_upgrade(&self, handled: Handled, client: OnUpgrade) -> Handled {
        let handler = self.clone();
        Handled::later(async move {
            let mut response = handled.response().await;
            match response.extensions_mut().remove::<Tunnel>() {
                Some(tunnel) => {
                    handler.flags.set_tunnel();
                    *handler.upgrade_slot.lock().unwrap_or_else(PoisonError::into_inner) = Some((client, tunnel));
                }
                None => handler.flags.set_no_upgrade(),
            }
            response
        })
    }

    /// Returns the response to a refused request. Nothing more is read from the connection, because the bytes that
    /// follow may be part of the refused request.
    fn refuse(&self, parts: &Parts, rejection: &Rejection) -> Handled {
        self.flags.set_linger();
        let mut response = self.proxy.load().proxy.reject(parts, rejection);
        if parts.version < Version::HTTP_2 {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Handled::Now(response)
    }

    fn no_content(&self) -> Response<Body> {
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::NO_CONTENT;
        response.headers_mut().extend(self.proxy.load().proxy.date().map(|date| (DATE, date)));
        response
    }
}

/// Returns true if an HTTP/1.1 request asks for an upgrade, which Connection must name too: RFC 9110 §7.8.
/// Requests with a body are not upgraded.
fn asks_upgrade(request: &Request<Incoming>) -> bool {
    request.version() == Version::HTTP_11
        && request.body().is_end_stream()
        && connection_options(request.headers()).any(|name| name == UPGRADE)
}

/// Copies bytes in both directions until one side ends, if the connection has become a tunnel.
pub(super) async fn run_tunnel(upgrade_slot: &UpgradeSlot) {
    let met = upgrade_slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((client, tunnel)) = met else { return };
    let ended = async {
        let mut upstream = tunnel.open().await?;
        let mut client = TokioIo::new(client.await.map_err(std::io::Error::other)?);
        tokio::io::copy_bidirectional(&mut client, &mut upstream).await
    };
    match ended.await {
        Ok((up, down)) => debug!(up, down, "a tunnel has ended"),
        Err(error) => debug!(%error, "a tunnel failed"),
    }
}
