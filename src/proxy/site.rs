//! One upstream's place in the house: whom a request is for, and where it goes.

use std::borrow::Cow;
use std::collections::HashSet;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, Mutex};

use http::header::HeaderName;
use http::uri::{Authority, Scheme};
use http::{HeaderMap, Uri};

use super::breakers::Breakers;
use super::budget::Budgets;
use crate::config::{self, HostPattern, Target, Timeouts};
use crate::policy::asked::Asked;
use crate::policy::circuit::Tolerance;
use crate::policy::glob::Captures;
use crate::policy::invalidation::Address;
use crate::policy::plan::Plan;
use crate::policy::retry::{Retry, RetryBudget};
use crate::policy::route::Router;
use crate::policy::tags::{Scope, UpstreamId, subjects};
use crate::policy::target::{client_authority, is_refused, target};
use crate::telemetry::{Meter, Signals};
use crate::upstream::Upstream;

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// An upstream, and what belongs to it.
#[derive(Debug)]
pub struct Site {
    /// Which one it is, in every sidecar of a fleet: part of every key.
    pub id: UpstreamId,
    /// Its name in logs, metrics and purges.
    pub name: Arc<str>,
    /// Where requests go.
    pub target: Target,
    /// Its rules.
    pub router: Router,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// The API itself.
    pub upstream: Arc<dyn Upstream>,
    /// The port its listener has.
    port: u16,
    /// What its clients speak: `http` or `https`.
    pub listens: Scheme,
    /// How it is doing.
    pub signals: Arc<Signals>,
    /// What is counted for it.
    pub meter: Arc<Meter>,
    /// When it is asked once more …
    pub retry: Retry,
    /// … and how often in all.
    pub retries: Mutex<RetryBudget>,
    /// Who may ask it now.
    pub budgets: Arc<Budgets>,
    /// When it is not asked for a while …
    pub tolerance: Tolerance,
    /// … and which of its hosts are not.
    pub breakers: Arc<Breakers>,
    /// Request headers that are part of some key.
    keyed: HashSet<HeaderName>,
    /// Where every request goes, if that is one place.
    fixed: Option<Place>,
    digests: RandomState,
}

/// Where one request goes.
#[derive(Debug, Clone)]
pub struct Place {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Whom to connect to.
    pub connect: Authority,
    /// The authority that is keyed and scopes tags, where the upstream has several.
    pub keyed: Option<Box<str>>,
    /// The Host to send.
    pub host: Box<str>,
}

/// The request is for a host that is not served here: 421 (RFC 9110 §15.5.20).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Misdirected;

impl Site {
    /// The site of a configured upstream.
    pub fn new(config: config::Upstream, upstream: Arc<dyn Upstream>, port: u16) -> Site {
        let config::Upstream { name, target, mut router, timeouts, budget, tolerance, retry, listen_tls, .. } =
            config;
        let listens = if listen_tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP };
        let id = UpstreamId::of(&name, &target.origin());
        let fixed = match &target {
            Target::Origin { scheme, authority, preserve_host: false } => Some(Place {
                scheme: scheme.clone(),
                connect: authority.clone(),
                keyed: None,
                host: authority.as_str().into(),
            }),
            Target::Origin { .. } | Target::Hosts(_) => None,
        };
        let keyed = router.plans().iter().flat_map(|p| p.key.headers.iter().chain(p.key.credentials.iter()));
        let keyed = keyed.cloned().collect();
        let meter = Arc::new(Meter::default());
        router.count_in(|rule| meter.tally(rule));
        let (budgets, breakers) = (Arc::new(Budgets::new(budget)), Arc::new(Breakers::default()));
        Site {
            id,
            name,
            target,
            router,
            timeouts,
            upstream,
            port,
            listens,
            signals: Arc::default(),
            meter,
            retry,
            retries: Mutex::default(),
            budgets,
            tolerance,
            breakers,
            keyed,
            fixed,
            digests: RandomState::new(),
        }
    }

    /// The port its listener has.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Does this request header carry a credential, or seem to?
    pub fn is_credential(&self, name: &HeaderName) -> bool {
        // The same for all rules.
        self.router.plans().first().is_some_and(|plan| plan.key.is_credential(name))
    }

    /// The same for requests of the same method and target with the same credentials, as long as this process runs.
    pub fn identity(&self, asked: Asked<'_>) -> u64 {
        let mut digest = self.digests.build_hasher();
        (asked.method, target(asked.uri)).hash(&mut digest);
        let credentials = asked.headers.iter().filter(|(name, _)| self.is_credential(name));
        credentials.for_each(|(name, value)| (name, value).hash(&mut digest));
        digest.finish()
    }

    /// Is this request header part of some key?
    pub fn is_keyed(&self, name: &HeaderName) -> bool {
        self.keyed.contains(name)
    }

    /// Where a request goes, from its target, `X-Forwarded-Host` and `Host`.
    pub fn locate(&self, uri: &Uri, headers: &HeaderMap) -> Result<Cow<'_, Place>, Misdirected> {
        if let (Target::Origin { authority, .. }, Some(named)) = (&self.target, uri.authority()) {
            // Absolute-form: meant for the origin, or for us as an origin; we are no open proxy.
            let same = named.host().eq_ignore_ascii_case(authority.host()) && port(named) == port(authority);
            if !same && named.port_u16() != Some(self.port) {
                return Err(Misdirected);
            }
        }
        if let Some(fixed) = &self.fixed {
            return Ok(Cow::Borrowed(fixed));
        }
        let place = match &self.target {
            Target::Origin { scheme, authority, .. } => {
                let named = client_authority(uri, headers).unwrap_or(authority.as_str());
                let default = if *scheme == Scheme::HTTPS { ":443" } else { ":80" };
                let named = named.to_ascii_lowercase();
                let host: Box<str> = named.strip_suffix(default).unwrap_or(&named).into();
                let keyed = Some(host.clone());
                Place { scheme: scheme.clone(), connect: authority.clone(), keyed, host }
            }
            Target::Hosts(patterns) => allowed(patterns, uri, headers).ok_or(Misdirected)?,
        };
        Ok(Cow::Owned(place))
    }

    /// Goes on with what was known of the same upstream before its configuration was read again: how it is, and what it
    /// has forbidden.
    pub fn inherit(&mut self, before: &Site) {
        if self.id != before.id {
            return;
        }
        self.signals = before.signals.clone();
        self.meter = before.meter.clone();
        self.router.count_in(|rule| before.meter.tally(rule));
        self.breakers = before.breakers.clone();
        self.digests = before.digests.clone();
        if self.budgets.budget() == before.budgets.budget() {
            self.budgets = before.budgets.clone();
        }
    }

    /// What the stored answer to a request can be purged by.
    pub fn address(&self, place: &Place, uri: &Uri, plan: &Plan) -> Address {
        let target = target(uri);
        let tags = tags(plan, uri.path());
        let scope = Scope { upstream: self.id, authority: place.keyed.as_deref() };
        let subjects = subjects(scope, target, &tags).into();
        Address { upstream: self.id, authority: (&*place.host).into(), target: target.into(), subjects }
    }
}

/// A port, if it is not the default of either scheme.
fn port(authority: &Authority) -> Option<u16> {
    authority.port_u16().filter(|port| *port != 80 && *port != 443)
}

/// The tags of a path under a rule.
pub fn tags(plan: &Plan, path: &str) -> Vec<String> {
    let captures = if plan.tags.is_empty() { None } else { plan.path.captures(path) };
    let captures = captures.unwrap_or_else(Captures::new);
    plan.tags.iter().map(|tag| tag.fill(&captures)).collect()
}

/// The first of absolute-form target, `X-Forwarded-Host` and `Host` decides, and must be on the list.
fn allowed(patterns: &[HostPattern], uri: &Uri, headers: &HeaderMap) -> Option<Place> {
    let named = match (uri.authority(), headers.get(X_FORWARDED_HOST)) {
        (Some(authority), _) => authority.as_str(),
        (None, Some(forwarded)) => forwarded.to_str().ok()?.trim(),
        (None, None) => client_authority(uri, headers)?,
    };
    let authority: Authority = named.to_ascii_lowercase().parse().ok()?;
    let host = authority.host();
    if authority.as_str().contains('@') || refused_address(host) {
        return None;
    }
    let pattern = patterns.iter().find(|pattern| pattern.matches(host, authority.port_u16()))?;
    // `shop` and `shop:443` are one: the default port is left out.
    let default = if pattern.scheme == Scheme::HTTPS { 443 } else { 80 };
    let authority = if authority.port_u16() == Some(default) { host.parse().ok()? } else { authority };
    let host: Box<str> = authority.as_str().into();
    Some(Place { scheme: pattern.scheme.clone(), connect: authority, keyed: Some(host.clone()), host })
}

/// A literal link-local or metadata address.
fn refused_address(host: &str) -> bool {
    host.trim_matches(['[', ']']).parse().is_ok_and(is_refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::glob::Glob;
    use http::HeaderValue;

    fn place(uri: &str, lines: &[(&'static str, &'static str)]) -> Option<String> {
        let labels = ["*", "shop", "example"].map(Glob::new).to_vec();
        let patterns = [HostPattern { scheme: Scheme::HTTPS, labels, port: None }];
        let lines = lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v)));
        let found = allowed(&patterns, &uri.parse().expect("a URI"), &HeaderMap::from_iter(lines));
        found.map(|place| place.host.to_string())
    }

    #[test]
    fn the_first_that_names_a_host_decides_and_must_be_on_the_list() {
        let table: &[(&str, &[(&str, &str)], Option<&str>)] = &[
            ("/", &[("host", "a.shop.example")], Some("a.shop.example")),
            ("/", &[("host", "A.Shop.example:443")], Some("a.shop.example")),
            ("/", &[("host", "127.0.0.1"), ("x-forwarded-host", "b.shop.example")], Some("b.shop.example")),
            ("/", &[("host", "a.shop.example"), ("x-forwarded-host", "evil.example")], None),
            ("http://c.shop.example/", &[("host", "evil.example")], Some("c.shop.example")),
            ("/", &[("host", "a.b.shop.example")], None),
            ("/", &[("host", "a.shop.example:8443")], None),
            ("/", &[("host", "user@a.shop.example")], None),
            ("/", &[("host", "169.254.169.254")], None),
        ];
        for (uri, lines, expected) in table {
            assert_eq!(place(uri, lines).as_deref(), *expected, "{uri} {lines:?}");
        }
    }
}
