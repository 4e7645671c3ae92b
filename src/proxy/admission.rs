//! Admission: whether the cache may answer a request, under which rule, and by which key.

use std::sync::Arc;

use arc_swap::ArcSwap;
use http::Request;

use super::upstream_state::{Destination, UpstreamState};
use crate::body::Body;
use crate::policy::Tick;
use crate::policy::http::freshness::RequestDirectives;
use crate::policy::http::hop_by_hop::overrides_method;
use crate::policy::http::request_view::RequestView;
use crate::policy::mode::{Mode, ModeSwitch};
use crate::policy::outcome::BypassReason;
use crate::policy::routing::cache_key::{CacheKey, KeyParts, KeySecret};
use crate::policy::routing::router::Route;
use crate::policy::routing::rule::Rule;

/// Decides before any lookup.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) mode: Arc<ModeSwitch>,
    pub(crate) key_secret: Arc<ArcSwap<KeySecret>>,
}

/// A request that the cache may answer.
pub(crate) struct Admitted<'r> {
    pub(crate) rule: &'r Arc<Rule>,
    pub(crate) directives: RequestDirectives,
    pub(crate) key: CacheKey,
}

impl Admission {
    /// Admits a request in the current mode, or says why it bypasses the cache.
    pub(crate) fn admit(
        &self,
        request: &Request<Body>,
        destination: &Destination,
        now: Tick,
    ) -> Result<Admitted<'_>, BypassReason> {
        match self.mode.mode(now) {
            Mode::Normal => self.admit_in_normal_mode(request, destination),
            Mode::Bypass => Err(BypassReason::Mode),
            Mode::Shadow => Err(BypassReason::Shadow),
        }
    }

    /// Admits a request as in mode `normal`, whatever the mode is.
    pub(crate) fn admit_in_normal_mode(
        &self,
        request: &Request<Body>,
        destination: &Destination,
    ) -> Result<Admitted<'_>, BypassReason> {
        let (uri, headers) = (request.uri(), request.headers());
        let rule = match self.upstream.router.route(request.method(), uri.path(), uri.query(), headers) {
            Route::Cache(rule) => rule,
            Route::Bypass(reason) => return Err(reason),
        };
        if overrides_method(headers) {
            return Err(BypassReason::MethodOverride);
        }
        if !matches!(request.body(), Body::Empty) {
            return Err(BypassReason::RequestBody);
        }
        let directives = RequestDirectives::from_request(rule, headers);
        if directives.no_store() {
            return Err(BypassReason::NoStoreRequest);
        }
        let key = self.cache_key(request.into(), destination, rule)?;
        Ok(Admitted { rule, directives, key })
    }

    /// Returns the key of a request under a rule.
    pub(crate) fn cache_key(
        &self,
        request: RequestView<'_>,
        destination: &Destination,
        rule: &Rule,
    ) -> Result<CacheKey, BypassReason> {
        let parts = KeyParts {
            upstream: self.upstream.id,
            authority: destination.key_authority.as_deref(),
            path: request.uri.path(),
            query: request.uri.query(),
            headers: request.headers,
        };
        rule.key.cache_key(&self.key_secret.load(), &parts)
    }
}
