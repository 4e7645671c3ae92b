//! One request at the door: what the scanner refused, the guard, the body, the proxy; and the other protocol that
//! may follow an upgrade.

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

/// Where the two ends of a tunnel meet: filled by the request that asked for it, emptied by its connection.
pub(super) type UpgradeSlot = Arc<Mutex<Option<(OnUpgrade, Tunnel)>>>;

/// What requests of one connection have in common.
#[derive(Debug, Clone)]
pub(super) struct RequestHandler {
    pub(super) proxy: Arc<ActiveProxy>,
    pub(super) flags: Arc<ConnectionFlags>,
    pub(super) upgrade_slot: UpgradeSlot,
    /// Where interim answers go; none: they can't be passed on.
    pub(super) informational: Option<Arc<dyn InformationalSink>>,
}

/// Has a request handled, in its span.
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
    /// One request: guard, body, proxy.
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

    /// A client of HTTP/1.0 knows no interim answers: RFC 9110 §15.2.
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

    /// A request that asked for another protocol, and may have got it.
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

    /// After a refusal nothing more is read from the connection: what follows may be part of what was refused.
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

/// RFC 9110 §7.8: over HTTP/1.1, named by Connection too. One with a body stays what it is.
fn asks_upgrade(request: &Request<Incoming>) -> bool {
    request.version() == Version::HTTP_11
        && request.body().is_end_stream()
        && connection_options(request.headers()).any(|name| name == UPGRADE)
}

/// Carries bytes both ways until one side ends, if the connection has become a tunnel.
pub(super) async fn run_tunnel(meeting: &UpgradeSlot) {
    let met = meeting.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((client, tunnel)) = met else { return };
    let ended = async {
        let mut upstream = tunnel.open().await?;
        let mut client = TokioIo::new(client.await.map_err(std::io::Error::other)?);
        tokio::io::copy_bidirectional(&mut client, &mut upstream).await
    };
    match ended.await {
        Ok((up, down)) => debug!(up, down, "a tunnel has ended"),
        Err(error) => debug!(%error, "a tunnel broke"),
    }
}
