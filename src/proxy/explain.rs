//! Explanation of a request: rule, key, stored entry, and why it would or would not be stored, by the code that serves it.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderName};
use http::{Method, Request};
use humantime::format_duration;
use serde_json::{Value, json};

use super::admission::{Admission, Admitted};
use super::fetch::coalesce::Coalescer;
use super::lookup::{Lookup, LookupResult};
use super::upstream_state::{Destination, UpstreamState, rule_tags};
use crate::body::Body;
use crate::clock::Clock;
use crate::policy::entry::Entry;
use crate::policy::explain_text;
use crate::policy::http::freshness::RequestDirectives;
use crate::policy::outcome::{BypassReason, ForwardReason};
use crate::policy::routing::cache_key::{KeySpec, Partition, QueryFilter, short_name};
use crate::policy::routing::key_headers::KeyHeaders;
use crate::policy::routing::router::Route;
use crate::policy::routing::rule::{CacheMode, Rule};
use crate::policy::routing::target::target;

/// Explains requests without sending them.
#[derive(Debug)]
pub(crate) struct Explainer {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) coalescer: Arc<Coalescer>,
    pub(crate) clock: Clock,
}

impl Explainer {
    /// Explains a request that has not been sent. `running`: with the state of what is stored, and of the upstream.
    pub(super) fn explain(&self, request: &Request<Body>, running: bool) -> Value {
        let (uri, headers) = (request.uri(), request.headers());
        let mut explained = json!({
            "request": format!("{} {}", request.method(), target(uri)),
            "upstream": format!("{} -> {}", self.upstream.name, self.upstream.origin.to_text()),
        });
        let Ok(destination) = self.upstream.locate(uri, headers) else {
            explained["decision"] = "rejected with 421".into();
            explained["why"] = "this host is not on the upstream's list of hosts".into();
            return explained;
        };
        explained["goes_to"] =
            format!("{}://{}, Host: {}", destination.scheme, destination.authority, destination.host).into();
        let rule = match self.upstream.router.route(request.method(), uri.path(), uri.query(), headers) {
            Route::Cache(rule) => Some(rule),
            Route::Bypass(_) => self.upstream.router.rule_for(&Method::GET, uri.path(), uri.query(), headers),
        };
        if let Some(rule) = rule {
            explained["rule"] = format!("{} (path {})", rule.name, rule.path).into();
            explained["cache"] = cache(rule).into();
        }
        match self.admission.admit(request, &destination, self.clock.now()) {
            Err(reason) => bypass(&mut explained, reason),
            Ok(Admitted { rule, directives, key }) => {
                explained["key"] = Self::key_parts(&rule.key, &destination, request, &key);
                explained["tags"] = rule_tags(rule, uri.path()).into();
                explained["deadline"] = format_duration(rule.deadline).to_string().into();
                if running {
                    self.state(&mut explained, &key, headers, &directives);
                } else {
                    explained["decision"] = "cache lookup".into();
                }
            }
        }
        if running {
            explained["upstream_now"] = self.upstream_now(&destination, headers);
        }
        explained
    }

    fn key_parts(rule: &KeySpec, destination: &Destination, request: &Request<Body>, key: &[u8]) -> Value {
        let headers = request.headers();
        let mut credentials: Vec<&str> =
            headers.keys().filter(|name| rule.credentials.contains(name)).map(HeaderName::as_str).collect();
        credentials.sort_unstable();
        let tenant = match (rule.partition, credentials.is_empty()) {
            (Partition::Everyone, _) => "shared by everyone".to_owned(),
            (Partition::Credential, true) => "those without credentials".to_owned(),
            (Partition::Credential, false) => format!("those with the same {}", credentials.join(", ")),
        };
        let query = match &rule.query {
            QueryFilter::Whole => request.uri().query().map_or("none".to_owned(), |query| format!("?{query}")),
            QueryFilter::Filtered(_) => {
                format!("of {:?}, the parameters that the rule keeps", request.uri().query().unwrap_or(""))
            }
        };
        let named = |name: &HeaderName| {
            if rule.is_credential(name) {
                return format!("{name}: (not shown)");
            }
            let values: Vec<_> =
                headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
            format!("{name}: {}", if values.is_empty() { "(absent)".into() } else { values.join(", ") })
        };
        let mut keyed: Vec<&HeaderName> = match &rule.headers {
            KeyHeaders::Listed(names) => names.iter().collect(),
            KeyHeaders::AllBut(_) => headers.keys().filter(|name| rule.headers.contains(name)).collect(),
        };
        keyed.retain(|name| !rule.credentials.contains(name));
        keyed.sort_unstable_by_key(|name| name.as_str());
        json!({
            "name": short_name(key).as_str(),
            "tenant": tenant,
            "authority": destination.key_authority.as_deref().unwrap_or("the upstream's"),
            "path": request.uri().path(),
            "query": query,
            "headers": keyed.into_iter().map(named).collect::<Vec<_>>(),
        })
    }

    fn state(&self, explained: &mut Value, key: &[u8], headers: &HeaderMap, directives: &RequestDirectives) {
        let now = self.clock.now();
        let (decision, entry) = match self.lookup.find(key, headers, directives, now) {
            LookupResult::Fresh(entry) => ("a hit", Some(entry)),
            LookupResult::WhileRevalidate(entry) => ("a stale hit, with a refresh in the background", Some(entry)),
            LookupResult::Miss(miss) => {
                let decision = match miss.reason {
                    ForwardReason::Stale => {
                        "a fetch: the stored response is stale, and is served only if the fetch fails"
                    }
                    ForwardReason::Request => "a fetch: the request's Cache-Control requires it",
                    ForwardReason::VaryMiss => "a fetch: the stored responses are for other request headers (Vary)",
                    ForwardReason::UriMiss | ForwardReason::Bypass(_) => "a fetch: no response is stored in memory",
                };
                (decision, miss.stale)
            }
        };
        explained["decision"] = decision.into();
        explained["entry"] = entry.map_or(Value::Null, |entry| self.entry_json(&entry));
        if let Some(mark) = self.coalescer.hit_for_miss(key, now) {
            let why = mark.reason.map_or("its responses must be validated each time", explain_text::of_not_stored);
            let left = mark.seconds_left;
            explained["not_stored"] =
                format!("the last response was not stored: {why}. Requests are not collapsed for {left} s").into();
        }
        if let Some(left) = self.upstream.failed_keys.paused_for(key, now) {
            let left = left.as_secs() + 1;
            explained["paused"] = format!(
                "the last fetch failed: for {left} s the upstream is not asked where a stale response or a fallback can stand in"
            )
            .into();
        }
        explained["being_fetched"] = self.coalescer.is_fetching(key).into();
    }

    fn entry_json(&self, entry: &Entry) -> Value {
        let now = self.clock.now();
        let vary: Vec<&str> = entry.variant.0.iter().map(|(name, _)| name.as_str()).collect();
        json!({
            "status": entry.head.status.as_u16(),
            "ttl_seconds": entry.ttl(now),
            "age_seconds": entry.age(now),
            "body_bytes": entry.body.len(),
            "vary": vary,
            "standing": self.lookup.invalidations.state_of(entry, now).token(),
            "rule": &*entry.rule,
            "always_validate": entry.lifetimes.always_validate,
        })
    }

    fn upstream_now(&self, destination: &Destination, headers: &HeaderMap) -> Value {
        let breakers = self.upstream.breakers.open();
        let breaker =
            breakers.iter().find(|(host, _)| host == destination.authority.as_str()).map_or("closed", |b| b.1);
        json!({
            "breaker": breaker,
            "closed_by_retry_after_seconds": self.upstream.budget_closed_for(destination, headers).map(|left| left.as_secs() + 1),
            "state": self.upstream.health.state(self.clock.now()).status,
        })
    }
}

fn bypass(explained: &mut Value, reason: BypassReason) {
    explained["decision"] = format!("passed through ({})", reason.token()).into();
    explained["why"] = explain_text::of_bypass(reason).into();
}

/// Who decides what is stored, and for how long.
fn cache(rule: &Rule) -> String {
    let mut text = match rule.mode {
        CacheMode::Off => return "off: passed through".to_owned(),
        CacheMode::Http => "http: the upstream's headers decide (RFC 9111)".to_owned(),
        CacheMode::Override { ttl, negative_ttl } => {
            let negative =
                negative_ttl.map_or("not stored".to_owned(), |ttl| format!("for {}", format_duration(ttl)));
            let ttl = format_duration(ttl);
            format!("override: 200, 203, 204, 301 and 308 for {ttl}; 404 and 410 {negative}; nothing else")
        }
    };
    for (name, window) in rule.windows() {
        text += &format!("; {name} {}", format_duration(window));
    }
    text
}
