//! Writes: unsafe methods are sent to the upstream, and invalidate what they may have changed (RFC 9111 §4.4).

use std::sync::Arc;

use http::header::{CONTENT_LOCATION, HeaderMap, HeaderValue, LOCATION};
use http::request::Parts;
use http::{Method, Response, Uri};
use tracing::Instrument;

use super::send::{Attempt, Sender, UpstreamRequest};
use super::upstream_state::{Destination, rule_tags};
use crate::body::Body;
use crate::fleet::Fleet;
use crate::fleet::invalidations::{Invalidations, PurgeReceipt};
use crate::policy::invalidation::ledger::{Position, PurgeKind, Selector};
use crate::policy::invalidation::tag::TagScope;
use crate::policy::outcome::Failure;
use crate::policy::resilience::retry::RetrySafety;
use crate::policy::routing::router::Route;
use crate::policy::routing::target::target;
use crate::proxy::upstream_state::UpstreamState;
use crate::telemetry::Telemetry;
use crate::upstream::SendError;

/// Sends writes, and invalidates.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) sender: Arc<Sender>,
    pub(crate) invalidations: Arc<Invalidations>,
    /// `None` without `[redis]`.
    pub(crate) fleet: Option<Arc<Fleet>>,
    pub(crate) telemetry: Arc<Telemetry>,
}

impl Writer {
    /// Sends a write and waits for its response, also if the client disconnects: what it changes must not be served
    /// from before.
    ///
    /// The response carries the [`Position`] of its purge as an extension if nothing else was purged meanwhile: it is
    /// of after the write.
    pub(crate) async fn send(self: &Arc<Self>, parts: Arc<Parts>, destination: Destination, body: Body) -> Attempt {
        let writer = self.clone();
        let write = async move {
            let request = UpstreamRequest { parts: &parts, destination: &destination };
            let before = writer.invalidations.position();
            let mut attempt = writer.sender.send_now(request, body, &|_| {}).await;
            let may_have_changed = match &attempt.response {
                Ok(response) => response.status().is_success() || response.status().is_redirection(),
                // Without a response, the request may have been processed.
                Err(error) => error.retry_safety != RetrySafety::Unsent,
            };
            if may_have_changed {
                writer.after_write(request, before, &mut attempt).await;
            }
            attempt
        };
        tokio::spawn(write.in_current_span()).await.unwrap_or_else(|panicked| {
            self.sender.not_sent(SendError::unanswered(Failure::Internal, panicked.to_string()))
        })
    }

    async fn after_write(&self, request: UpstreamRequest<'_>, before: Position, attempt: &mut Attempt) {
        let seen = self.invalidations.position();
        let undisturbed = self.is_cacheable_and_unpurged(request, before);
        let receipt = self.invalidate(request, attempt.response.as_ref().ok().map(Response::headers));
        if let Some(fleet) = &self.fleet {
            self.invalidations.wait_logged(receipt.number, fleet.timeout).await;
        }
        if let Ok(response) = &mut attempt.response
            && undisturbed
            && receipt.position.0 == seen.0 + 1
        {
            response.extensions_mut().insert(receipt.position);
        }
    }

    /// Returns true if a GET of the same URL could be answered from the cache, and has not been purged since `then`.
    fn is_cacheable_and_unpurged(&self, request: UpstreamRequest<'_>, then: Position) -> bool {
        let (upstream, uri) = (&self.upstream, &request.parts.uri);
        match upstream.router.route(&Method::GET, uri.path(), uri.query(), &request.parts.headers) {
            Route::Cache(rule) if request.parts.method == Method::POST => {
                let resource = upstream.resource_id(request.destination, uri, rule);
                !self.invalidations.purged_since(&resource, then)
            }
            Route::Cache(_) | Route::Bypass(_) => false,
        }
    }

    /// Invalidates the target, and `Location` and `Content-Location` of the same origin, in every partition and with any
    /// query; and the tags of the rules that cache the target (RFC 9111 §4.4).
    fn invalidate(&self, request: UpstreamRequest<'_>, response: Option<&HeaderMap>) -> PurgeReceipt {
        let UpstreamRequest { parts, destination } = request;
        let upstream = &self.upstream;
        let scope = TagScope { upstream: upstream.id, authority: destination.key_authority.as_deref() };
        let named = [LOCATION, CONTENT_LOCATION].into_iter().filter_map(|name| {
            let target = named_target(destination, response?.get(name)?)?;
            Some(target.split_once('?').map_or(&*target, |(path, _)| path).to_owned())
        });
        let paths = named.chain([parts.uri.path().to_owned()]);
        let rules = upstream.router.rules_for_write(parts.uri.path());
        let tags: Vec<String> = rules.flat_map(|rule| rule_tags(rule, parts.uri.path())).collect();
        let selectors: Vec<_> = paths
            .map(|path| Selector::path(scope, &path))
            .chain(tags.iter().map(|tag| Selector::tag(scope, tag)))
            .collect();
        self.telemetry.written();
        self.invalidations.record(selectors, PurgeKind::Hard, None)
    }
}

/// Returns path and query of a URL in a response field, if it is of the destination's origin.
pub(crate) fn named_target(destination: &Destination, value: &HeaderValue) -> Option<String> {
    let named: Uri = value.to_str().ok()?.parse().ok()?;
    let same = named.authority().is_none_or(|a| a.as_str().eq_ignore_ascii_case(&destination.host));
    same.then(|| target(&named).to_owned())
}
