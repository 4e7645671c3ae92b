//! Handing through: what no rule may answer from the cache. And what writes do to it.

use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, CONTENT_LOCATION, HeaderMap, HeaderValue, LOCATION, UPGRADE};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Uri};
use tracing::{Instrument, debug, info, warn};

use super::Proxy;
use super::forward::ask_upgrade;
use super::respond::body_rejection;
use super::send::Sent;
use super::site::{Place, tags};
use super::visit::Visit;
use crate::body::Body;
use crate::fleet::invalidations::Recorded;
use crate::policy::headers::strip_hop_by_hop;
use crate::policy::invalidation::{Position, Selector, Strength};
use crate::policy::outcome::{Bypass, Failure, Fetched, Outcome};
use crate::policy::retry::Ended;
use crate::policy::route::Route;
use crate::policy::tags::{Scope, Subject};
use crate::policy::target::target;
use crate::telemetry::News;
use crate::upstream::{MayBeStored, SendError};

impl Proxy {
    /// Does a rule let this request change the protocol?
    fn may_upgrade(&self, asked: &Parts) -> bool {
        let uri = &asked.uri;
        let route = self.site.router.route(&asked.method, uri.path(), uri.query(), &asked.headers);
        matches!(route, Route::Bypass(Bypass::Upgrade))
    }

    /// Sends the request on as it is, and its answer back.
    pub(super) async fn relay(
        self: Arc<Self>,
        request: Request<Body>,
        place: Place,
        reason: Bypass,
        visit: Visit,
    ) -> Response<Body> {
        let rehearsal = (reason == Bypass::Shadow).then(|| self.rehearse(&request, &place, &visit)).flatten();
        let (parts, body) = request.into_parts();
        let asked = Arc::new(parts);
        let position = self.commons.invalidations.position();
        let upgrades = reason == Bypass::Upgrade || reason.hands_through() && self.may_upgrade(&asked);
        let sent = if asked.method.is_safe() {
            let shape = |request: &mut Request<Body>| {
                if upgrades {
                    ask_upgrade(request, &asked.headers);
                }
                if rehearsal.is_some() {
                    request.extensions_mut().insert(MayBeStored);
                }
            };
            if reason.hands_through() {
                // No pacing either: what the client sends is sent.
                self.send_now(&asked, &place, body, &shape).await
            } else {
                self.send(&asked, &place, body, shape).await
            }
        } else if reason.hands_through() {
            self.clone().write(asked.clone(), place.clone(), body).await
        } else {
            // Until its turn has come, a client that leaves takes its write with it.
            match self.turn(&asked, &place, visit.begun).await {
                Ok(()) => self.clone().write(asked.clone(), place.clone(), body).await,
                Err(late) => Sent { answer: Err(late), at: self.commons.clock.instant(), wait: None },
            }
        };
        let took = self.commons.clock.instant().saturating_duration_since(sent.at);
        match sent.answer {
            Ok(mut response) => {
                let failure = Failure::from_status(response.status());
                self.upstream_ended(failure, took, response.status().as_str());
                strip_for_client(&mut response);
                // A write's answer is of after the write, if nobody else has purged meanwhile.
                let written = response.extensions_mut().remove::<Position>();
                if reason == Bypass::Range || written.is_some() && !reason.hands_through() {
                    response = self.aside(&asked, &place, written.unwrap_or(position), &visit, response);
                }
                if let Some(rehearsal) = rehearsal {
                    response = self.compared(rehearsal, &asked, &place, &visit, response);
                }
                let fetched = Fetched::bypass(reason, Some(response.status()));
                self.relayed(&*asked, response, &Outcome::Relayed { fetched, failure }, None, &visit)
            }
            Err(SendError { client: Some(fault), .. }) => self.rejected(&*asked, &body_rejection(fault)),
            Err(error) => {
                if error.was_tried() {
                    self.upstream_ended(Some(error.failure), took, &error.message);
                }
                let fetched = Fetched::bypass(reason, None);
                let outcome = Outcome::Failed { fetched, failure: error.failure };
                self.failure(&*asked, &outcome, error.failure, None, &visit)
            }
        }
    }

    /// Counts what became of a request to the upstream; one line when it begins to fail, one when it is back.
    pub(super) fn upstream_ended(&self, failure: Option<Failure>, took: Duration, why: &str) {
        self.commons.telemetry.upstream(failure, took);
        self.site.meter.upstream(failure, took);
        let (upstream, cause) = (&*self.site.name, failure.map_or("", Failure::cause));
        match self.site.signals.ended(failure, self.commons.clock.now()) {
            News::Fails => warn!(upstream, cause, why, "the upstream fails"),
            News::IsBack => info!(upstream, "the upstream answers again"),
            News::None => debug!(upstream, cause, why, "a request to the upstream has ended"),
        }
    }

    /// A write goes to its answer even if its client leaves: what it changes must not be served from before.
    async fn write(self: Arc<Self>, asked: Arc<Parts>, place: Place, body: Body) -> Sent {
        let at = self.commons.clock.instant();
        let before = self.commons.invalidations.position();
        let write = async move {
            let mut sent = self.send_now(&asked, &place, body, &|_| {}).await;
            let may_have_changed = match &sent.answer {
                Ok(response) => response.status().is_success() || response.status().is_redirection(),
                // No answer says nothing about what was done.
                Err(error) => error.ended != Ended::Unsent,
            };
            if may_have_changed {
                let seen = self.commons.invalidations.position();
                let undisturbed = self.stood_since(&asked, &place, before);
                let recorded = self.invalidate(&asked, &place, sent.answer.as_ref().ok().map(Response::headers));
                self.told_fleet(recorded).await;
                if let Ok(response) = &mut sent.answer
                    && undisturbed
                    && recorded.position.0 == seen.0 + 1
                {
                    response.extensions_mut().insert(recorded.position);
                }
            }
            sent
        };
        let panicked = |e: tokio::task::JoinError| Sent {
            answer: Err(SendError::unanswered(Failure::Internal, e.to_string())),
            at,
            wait: None,
        };
        tokio::spawn(write.in_current_span()).await.unwrap_or_else(panicked)
    }

    /// Would a GET of the same, answered from then on, not have been purged since?
    fn stood_since(&self, asked: &Parts, place: &Place, then: Position) -> bool {
        let (uri, headers) = (&asked.uri, &asked.headers);
        match self.site.router.route(&Method::GET, uri.path(), uri.query(), headers) {
            Route::Cache(plan) if asked.method == Method::POST => {
                !self.commons.invalidations.outdated(&self.site.address(place, uri, plan), then)
            }
            Route::Cache(_) | Route::Bypass(_) => false,
        }
    }

    /// RFC 9111 §4.4: the target, `Location` and `Content-Location` of the same origin, in every partition and
    /// with any query; and the tags of the rule that caches it.
    fn invalidate(&self, asked: &Parts, place: &Place, answer: Option<&HeaderMap>) -> Recorded {
        let scope = Scope { upstream: self.site.id, authority: place.keyed.as_deref() };
        let named = [LOCATION, CONTENT_LOCATION].into_iter().filter_map(|name| {
            let target = named_target(place, answer?.get(name)?)?;
            Some(target.split_once('?').map_or(&*target, |(path, _)| path).to_owned())
        });
        let paths = named.chain([asked.uri.path().to_owned()]);
        let rules = self.site.router.rules_for_write(asked.uri.path());
        let tags: Vec<String> = rules.flat_map(|plan| tags(plan, asked.uri.path())).collect();
        let selectors: Vec<_> = paths
            .map(|path| Subject::path(scope, &path))
            .chain(tags.iter().map(|tag| Subject::tag(scope, tag)))
            .map(Selector::Subject)
            .collect();
        self.commons.telemetry.written();
        self.commons.invalidations.record(selectors, Strength::Hard, None)
    }
}

/// Path and query that a field of an answer names, if they are of the same origin.
pub(super) fn named_target(place: &Place, named: &HeaderValue) -> Option<String> {
    let named: Uri = named.to_str().ok()?.parse().ok()?;
    let same = named.authority().is_none_or(|a| a.as_str().eq_ignore_ascii_case(&place.host));
    same.then(|| target(&named).to_owned())
}

/// Hop-by-hop fields end here, but for a 101's: that is what it is about.
fn strip_for_client(response: &mut Response<Body>) {
    let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let protocol = response.headers().get(UPGRADE).filter(|_| switches).cloned();
    strip_hop_by_hop(response.headers_mut());
    if let Some(protocol) = protocol {
        response.headers_mut().insert(UPGRADE, protocol);
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
}
