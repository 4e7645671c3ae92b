//! One request at the door: what the scanner refused, the guard, the body, the proxy; and the other protocol that
//! may follow an upgrade.

use std::sync::{Arc, Mutex, PoisonError};

use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tracing::{Instrument, debug};

use super::normalise::normalise;
use super::wire::{REFUSED, Word};
use super::{guard, intake};
use crate::body::Body;
use crate::body::tunnel::Tunnel;
use crate::policy::headers::{add_date, nominated, strip_nominated};
use crate::proxy::Handled;
use crate::proxy::Proxy;
use crate::proxy::face::Face;
use crate::proxy::respond::{Rejection, body_rejection};
use crate::telemetry::spans;
use crate::upstream::Ear;

/// Where the two ends of a tunnel meet: filled by the request that asked for it, emptied by its connection.
pub(super) type Meeting = Arc<Mutex<Option<(OnUpgrade, Tunnel)>>>;

/// What requests of one connection have in common.
#[derive(Debug, Clone)]
pub(super) struct Desk {
    pub(super) face: Arc<Face>,
    pub(super) word: Arc<Word>,
    pub(super) meeting: Meeting,
    /// Where interim answers go; none: they can't be passed on.
    pub(super) interims: Option<Arc<dyn Ear>>,
}

/// Has a request handled, in its span.
fn traced(proxy: &Arc<Proxy>, request: Request<Body>, ear: Option<&Arc<dyn Ear>>) -> Handled {
    let span = spans::request(request.method(), request.uri().path(), request.headers());
    match span.in_scope(|| proxy.handle(request, ear)) {
        Handled::Now(response) => {
            spans::answered(&span, &response);
            Handled::Now(response)
        }
        Handled::Later(answer) if span.is_disabled() => Handled::Later(answer),
        Handled::Later(answer) => Handled::later(async move {
            let response = answer.instrument(span.clone()).await;
            spans::answered(&span, &response);
            response
        }),
    }
}

impl Desk {
    /// One request: guard, body, proxy.
    pub(super) fn receive(&self, mut request: Request<Incoming>) -> Handled {
        if let (Some(rejection), REFUSED) = (self.word.refused(), request.method().as_str()) {
            return self.refuse(&request.into_parts().0, rejection);
        }
        normalise(&mut request);
        let served = self.face.now();
        let proxy = &served.proxy;
        let guarded = guard::check(&request, &served.limits, |name| proxy.site.is_keyed(name));
        let names_one = request.headers().contains_key(UPGRADE);
        let upgrade = (names_one && asks_upgrade(&request)).then(|| hyper::upgrade::on(&mut request));
        let (mut parts, incoming) = request.into_parts();
        if let Err(rejection) = guarded {
            return self.refuse(&parts, &rejection);
        }
        if names_one && upgrade.is_none() {
            parts.headers.remove(UPGRADE);
            if incoming.is_end_stream() {
                self.word.stays();
            }
        }
        // Key, variant and upstream must see the same headers.
        strip_nominated(&mut parts.headers);
        if parts.method == Method::OPTIONS && parts.uri.path() == "*" {
            return Handled::Now(self.no_content());
        }
        if !incoming.is_end_stream() {
            return self.with_body(parts, incoming);
        }
        let ear = self.ear(&parts);
        let handled = traced(proxy, Request::from_parts(parts, Body::Empty), ear);
        match upgrade {
            None => handled,
            Some(upgrade) => self.may_upgrade(handled, upgrade),
        }
    }

    /// A client of HTTP/1.0 knows no interim answers: RFC 9110 §15.2.
    fn ear(&self, parts: &Parts) -> Option<&Arc<dyn Ear>> {
        self.interims.as_ref().filter(|_| parts.version == Version::HTTP_11)
    }

    fn with_body(&self, parts: Parts, incoming: Incoming) -> Handled {
        let desk = self.clone();
        Handled::later(async move {
            let served = desk.face.served();
            match intake::body(incoming, &served.limits, &served.proxy.commons.purse).await {
                Ok(body) => {
                    let ear = desk.ear(&parts);
                    traced(&served.proxy, Request::from_parts(parts, body), ear).response().await
                }
                Err(fault) => desk.refuse(&parts, &body_rejection(fault)).response().await,
            }
        })
    }

    /// A request that asked for another protocol, and may have got it.
    fn may_upgrade(&self, handled: Handled, client: OnUpgrade) -> Handled {
        let desk = self.clone();
        Handled::later(async move {
            let mut response = handled.response().await;
            match response.extensions_mut().remove::<Tunnel>() {
                Some(tunnel) => {
                    desk.word.tunnel();
                    *desk.meeting.lock().unwrap_or_else(PoisonError::into_inner) = Some((client, tunnel));
                }
                None => desk.word.stays(),
            }
            response
        })
    }

    /// After a refusal nothing more is read from the connection: what follows may be part of what was refused.
    fn refuse(&self, parts: &Parts, rejection: &Rejection) -> Handled {
        self.word.linger();
        let mut response = self.face.now().proxy.rejected(parts, rejection);
        if parts.version < Version::HTTP_2 {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Handled::Now(response)
    }

    fn no_content(&self) -> Response<Body> {
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::NO_CONTENT;
        add_date(response.headers_mut(), self.face.now().proxy.commons.clock.wall());
        response
    }
}

/// RFC 9110 §7.8: over HTTP/1.1, named by Connection too. One with a body stays what it is.
fn asks_upgrade(request: &Request<Incoming>) -> bool {
    request.version() == Version::HTTP_11
        && request.body().is_end_stream()
        && nominated(request.headers()).any(|name| name == UPGRADE)
}

/// Carries bytes both ways until one side ends, if the connection has become a tunnel.
pub(super) async fn tunnel(meeting: &Meeting) {
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
