//! Pass-through: requests that no rule may answer from the cache are sent to the upstream, and its response is relayed.

use std::sync::Arc;

use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Request, Response, StatusCode};

use super::exchange::{Exchange, ResponseContext};
use super::fetch::opportunistic::OpportunisticStore;
use super::respond::Responder;
use super::respond::error::body_rejection;
use super::send::outgoing::add_upgrade;
use super::send::{Attempt, Sender, UpstreamRequest};
use super::shadow::Shadow;
use super::upstream_state::Destination;
use super::write::Writer;
use crate::body::Body;
use crate::clock::Clock;
use crate::fleet::invalidations::Invalidations;
use crate::policy::http::hop_by_hop::{overrides_method, strip_hop_by_hop};
use crate::policy::invalidation::ledger::Position;
use crate::policy::outcome::{BypassReason, Failure, FetchSummary, Outcome};
use crate::policy::routing::router::Route;
use crate::proxy::upstream_state::UpstreamState;
use crate::upstream::{RecordHeaderCase, SendError};

/// Relays requests and responses.
#[derive(Debug)]
pub(crate) struct PassThrough {
    pub(crate) sender: Arc<Sender>,
    pub(crate) writer: Arc<Writer>,
    pub(crate) opportunistic: Arc<OpportunisticStore>,
    pub(crate) shadow: Arc<Shadow>,
    pub(crate) responder: Arc<Responder>,
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) clock: Clock,
    pub(crate) invalidations: Arc<Invalidations>,
}

/// A request that bypasses the cache.
pub(crate) struct Bypassed {
    pub(crate) request: Request<Body>,
    pub(crate) destination: Destination,
    pub(crate) reason: BypassReason,
    pub(crate) exchange: Exchange,
}

impl PassThrough {
    /// Sends a request to the upstream, and returns its response.
    pub(crate) async fn run(self: Arc<Self>, bypassed: Bypassed) -> Response<Body> {
        let Bypassed { request, destination, reason, exchange } = bypassed;
        let looked_up = (reason == BypassReason::Shadow)
            .then(|| self.shadow.look_up(&request, &destination, &exchange))
            .flatten();
        let (parts, body) = request.into_parts();
        let parts = Arc::new(parts);
        let request = UpstreamRequest { parts: &parts, destination: &destination };
        let position = self.invalidations.position();
        let sent = self.send(&parts, &destination, body, (reason, looked_up.is_some(), &exchange)).await;
        let took = self.clock.instant().saturating_duration_since(sent.sent_at);
        let context = ResponseContext::new(&*parts, None, &exchange);
        match sent.response {
            Ok(mut response) => {
                self.sender.record_response(&response, took);
                strip_for_client(&mut response);
                // Set if the response is of after the write.
                let written = response.extensions_mut().remove::<Position>();
                if reason == BypassReason::Range || written.is_some() && !reason.is_passthrough_mode() {
                    let position = written.unwrap_or(position);
                    response = self.opportunistic.observe(request, position, &exchange, response);
                }
                if let Some(looked_up) = looked_up {
                    response = self.shadow.observe(looked_up, request, &exchange, response);
                }
                let failure = Failure::from_status(response.status());
                let fetched = FetchSummary::bypass(reason, Some(response.status()));
                self.responder.relayed(&context, response, &Outcome::Relayed { fetched, failure })
            }
            Err(SendError { client: Some(error), .. }) => self.responder.rejected(&*parts, &body_rejection(error)),
            Err(error) => {
                self.sender.record_error(&error, took);
                let fetched = FetchSummary::bypass(reason, None);
                let outcome = Outcome::Failed { fetched, failure: error.failure };
                self.responder.failure(&context, &outcome, error.failure)
            }
        }
    }

    /// Sends a request: within the budget, unless a pass-through mode sends what clients send.
    async fn send(
        &self,
        parts: &Arc<Parts>,
        destination: &Destination,
        body: Body,
        (reason, may_be_stored, exchange): (BypassReason, bool, &Exchange),
    ) -> Attempt {
        let request = UpstreamRequest { parts, destination };
        let paced = !reason.is_passthrough_mode();
        if !parts.method.is_safe() || overrides_method(&parts.headers) {
            // Until the budget admits it, a write is dropped if its client disconnects.
            if paced && let Err(error) = self.sender.wait_for_budget(request, exchange.begun).await {
                return self.sender.not_sent(error);
            }
            return self.writer.send(parts.clone(), destination.clone(), body).await;
        }
        let upgrades = reason == BypassReason::Upgrade || !paced && self.may_upgrade(parts);
        let shape = |outgoing: &mut Request<Body>| {
            if upgrades {
                add_upgrade(outgoing, &parts.headers);
            }
            if may_be_stored {
                outgoing.extensions_mut().insert(RecordHeaderCase);
            }
        };
        if paced {
            self.sender.send(request, body, shape).await
        } else {
            self.sender.send_now(request, body, &shape).await
        }
    }

    /// Returns true if a rule allows the request to change the protocol.
    fn may_upgrade(&self, parts: &Parts) -> bool {
        let router = &self.upstream.router;
        let route = router.route(&parts.method, parts.uri.path(), parts.uri.query(), &parts.headers);
        matches!(route, Route::Bypass(BypassReason::Upgrade))
    }
}

/// Removes the hop-by-hop fields of a response, but for those of a 101 that name the new protocol.
fn strip_for_client(response: &mut Response<Body>) {
    let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let protocol = response.headers().get(UPGRADE).filter(|_| switches).cloned();
    strip_hop_by_hop(response.headers_mut());
    if let Some(protocol) = protocol {
        response.headers_mut().insert(UPGRADE, protocol);
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
}
