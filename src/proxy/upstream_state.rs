//! The state of one upstream: its rules, its client, its budget, its circuit breakers, its metrics.

use std::borrow::Cow;
use std::collections::HashSet;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::header::HeaderName;
use http::uri::{Authority, Scheme};
use http::{HeaderMap, Uri};

pub use super::destination::{Destination, Misdirected};
use super::fetch::failed_keys::FailedKeys;
use super::send::breakers::Breakers;
use super::send::budget::{Budgets, TokenBucket};
use crate::policy::http::request_view::RequestView;
use crate::policy::invalidation::ledger::ResourceId;
use crate::policy::invalidation::tag::{TagScope, UpstreamId, subjects};
use crate::policy::resilience::backoff::FailureBackoff;
use crate::policy::resilience::budget::Budget;
use crate::policy::resilience::circuit_breaker::BreakerConfig;
use crate::policy::resilience::retry::{RetryBudget, RetryPolicy};
use crate::policy::routing::origin::Origin;
use crate::policy::routing::pattern::Captures;
use crate::policy::routing::router::Router;
use crate::policy::routing::rule::Rule;
use crate::policy::routing::target::target;
use crate::telemetry::{PassiveHealth, UpstreamMetrics};
use crate::upstream::{Timeouts, UpstreamClient};

/// Settings of the proxy in front of an upstream.
#[derive(Debug)]
pub struct UpstreamSettings {
    /// Name in logs, metrics and purges.
    pub name: Arc<str>,
    /// The origins that requests go to.
    pub origin: Origin,
    /// The rules.
    pub router: Router,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Retries.
    pub retry: RetryPolicy,
    /// The pause of a key after a failed fetch.
    pub backoff: FailureBackoff,
    /// The rate at which the upstream may be asked. `None`: no limit, and `Retry-After` is not obeyed.
    pub budget: Option<Budget>,
    /// When a host's circuit breaker opens.
    pub breaker: BreakerConfig,
    /// The scheme of the listener: `http` or `https`.
    pub client_scheme: Scheme,
    /// Whether requests carry `Via`.
    pub adds_via: bool,
}

/// An upstream, as the steps of its proxy see it.
#[derive(Debug)]
pub struct UpstreamState {
    /// Identity in every sidecar of a fleet: part of every key.
    pub id: UpstreamId,
    /// Name in logs, metrics and purges.
    pub name: Arc<str>,
    /// The origins that requests go to.
    pub origin: Origin,
    /// The rules.
    pub router: Router,
    /// Time limits.
    pub timeouts: Timeouts,
    /// The client that sends requests.
    pub client: Arc<dyn UpstreamClient>,
    /// Port of the listener.
    port: u16,
    /// The scheme of the listener: `http` or `https`.
    pub client_scheme: Scheme,
    /// Whether requests carry `Via`.
    pub adds_via: bool,
    /// Health, as seen from the requests that were sent.
    pub health: Arc<PassiveHealth>,
    /// Metrics.
    pub metrics: Arc<UpstreamMetrics>,
    /// Retries of one request.
    pub retry: RetryPolicy,
    /// Retries of all requests together.
    pub retry_budget: Mutex<RetryBudget>,
    /// The pause of a key after a failed fetch.
    pub backoff: FailureBackoff,
    /// The keys whose last fetch failed.
    pub failed_keys: Arc<FailedKeys>,
    /// Buckets of the budget.
    pub budgets: Arc<Budgets>,
    /// When a host's circuit breaker opens.
    pub breaker_config: BreakerConfig,
    /// Circuit breakers by host.
    pub breakers: Arc<Breakers>,
    /// Request headers that are part of some key: credentials, and those that a rule lists.
    keyed_headers: HashSet<HeaderName>,
    /// The destination of all requests, if there is only one.
    fixed_destination: Option<Destination>,
    identity_hasher: RandomState,
}

impl UpstreamState {
    /// Returns the state of a configured upstream, whose listener has this port.
    pub fn new(settings: UpstreamSettings, client: Arc<dyn UpstreamClient>, port: u16) -> UpstreamState {
        let UpstreamSettings {
            name,
            origin,
            mut router,
            timeouts,
            retry,
            backoff,
            budget,
            breaker,
            client_scheme,
            adds_via,
        } = settings;
        let keyed =
            router.rules().iter().flat_map(|rule| rule.key.headers.listed().iter().chain(&*rule.key.credentials));
        let keyed_headers = keyed.cloned().collect();
        let metrics = Arc::new(UpstreamMetrics::default());
        router.set_counters(|rule| metrics.rule_counters(rule));
        UpstreamState {
            id: UpstreamId::of(&name, &origin.to_text()),
            fixed_destination: Destination::fixed(&origin),
            name,
            origin,
            router,
            timeouts,
            client,
            port,
            client_scheme,
            adds_via,
            health: Arc::default(),
            metrics,
            retry,
            retry_budget: Mutex::default(),
            backoff,
            failed_keys: Arc::default(),
            budgets: Arc::new(Budgets::new(budget)),
            breaker_config: breaker,
            breakers: Arc::default(),
            keyed_headers,
            identity_hasher: RandomState::new(),
        }
    }

    /// Returns the port of the listener.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns true if a request header carries a credential, or looks as if it did.
    pub fn is_credential(&self, name: &HeaderName) -> bool {
        // Credential headers are the same for all rules.
        self.router.rules().first().is_some_and(|rule| rule.key.is_credential(name))
    }

    /// Returns a hash that is equal for requests with the same method, target and credentials, within this process.
    pub fn identity(&self, request: RequestView<'_>) -> u64 {
        let mut digest = self.identity_hasher.build_hasher();
        (request.method, target(request.uri)).hash(&mut digest);
        let credentials = request.headers.iter().filter(|(name, _)| self.is_credential(name));
        credentials.for_each(|(name, value)| (name, value).hash(&mut digest));
        digest.finish()
    }

    /// Returns true if a request header is part of some key by its name.
    pub fn is_keyed(&self, name: &HeaderName) -> bool {
        self.keyed_headers.contains(name)
    }

    /// Returns the destination of a request, from its target, `X-Forwarded-Host` and `Host`.
    pub fn locate(&self, uri: &Uri, headers: &HeaderMap) -> Result<Cow<'_, Destination>, Misdirected> {
        if let (Origin::Fixed { authority, .. }, Some(named)) = (&self.origin, uri.authority()) {
            // Absolute-form names the upstream, or the sidecar as an origin: it is not an open proxy.
            let same = named.host().eq_ignore_ascii_case(authority.host())
                && non_default_port(named) == non_default_port(authority);
            if !same && named.port_u16() != Some(self.port) {
                return Err(Misdirected);
            }
        }
        match &self.fixed_destination {
            Some(fixed) => Ok(Cow::Borrowed(fixed)),
            None => Destination::named(&self.origin, uri, headers).map(Cow::Owned),
        }
    }

    /// Takes over the runtime state of the same upstream from before a reload: health, metrics, breakers, and the budget
    /// if its settings are the same.
    pub fn inherit(&mut self, before: &UpstreamState) {
        if self.id != before.id {
            return;
        }
        self.health = before.health.clone();
        self.metrics = before.metrics.clone();
        self.router.set_counters(|rule| before.metrics.rule_counters(rule));
        self.breakers = before.breakers.clone();
        self.failed_keys = before.failed_keys.clone();
        self.identity_hasher = before.identity_hasher.clone();
        if self.budgets.budget() == before.budgets.budget() {
            self.budgets = before.budgets.clone();
        }
    }

    /// Returns what the stored response to a request can be purged by.
    pub fn resource_id(&self, destination: &Destination, uri: &Uri, rule: &Rule) -> ResourceId {
        let target = target(uri);
        let tags = rule_tags(rule, uri.path());
        let scope = TagScope { upstream: self.id, authority: destination.key_authority.as_deref() };
        let subjects = subjects(scope, target, &tags).into();
        ResourceId { upstream: self.id, authority: (&*destination.host).into(), target: target.into(), subjects }
    }

    /// Returns the bucket of a request with these headers, if it may limit the request now.
    pub(crate) fn limiting_bucket(&self, destination: &Destination, headers: &HeaderMap) -> Option<Arc<TokenBucket>> {
        self.budgets.limiting(|| self.bucket(destination, headers))
    }

    /// Returns the bucket of a request with these headers. `None` without a budget.
    pub(crate) fn bucket(&self, destination: &Destination, headers: &HeaderMap) -> Option<Arc<TokenBucket>> {
        self.budgets.bucket(&destination.host, headers, |name| self.is_credential(name))
    }

    /// Returns for how long the bucket of a request with these headers is still closed by `Retry-After`.
    pub(crate) fn budget_closed_for(&self, destination: &Destination, headers: &HeaderMap) -> Option<Duration> {
        self.limiting_bucket(destination, headers)?.closed_for()
    }
}

/// Returns the port, unless it is the default of one of the schemes.
fn non_default_port(authority: &Authority) -> Option<u16> {
    authority.port_u16().filter(|port| *port != 80 && *port != 443)
}

/// Returns the tags of a path under a rule.
pub fn rule_tags(rule: &Rule, path: &str) -> Vec<String> {
    let captures = if rule.tags.is_empty() { None } else { rule.path.captures(path) };
    let captures = captures.unwrap_or_else(Captures::new);
    rule.tags.iter().map(|tag| tag.expand(&captures)).collect()
}
