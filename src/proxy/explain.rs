//! What would become of a request: which rule, which key, what is stored, and why it would or would not be. By the
//! same code as serves it.

use http::header::HeaderMap;
use http::{Method, Request};
use humantime::format_duration;
use serde_json::{Value, json};

use super::Proxy;
use super::lookup::Lookup;
use super::site::{Place, tags};
use crate::body::Body;
use crate::policy::advice;
use crate::policy::entry::Entry;
use crate::policy::freshness::Demands;
use crate::policy::key::{KeyPlan, Partition, QueryFilter, short_name};
use crate::policy::outcome::{Bypass, Forward};
use crate::policy::plan::{CacheMode, Plan};
use crate::policy::route::Route;
use crate::policy::target::target;

impl Proxy {
    /// Explains a request that has not been sent. `running`: with the state of what is stored, and of the upstream.
    pub fn explain(&self, request: &Request<Body>, running: bool) -> Value {
        let (uri, headers) = (request.uri(), request.headers());
        let mut told = json!({
            "request": format!("{} {}", request.method(), target(uri)),
            "upstream": format!("{} -> {}", self.site.name, self.site.target.origin()),
        });
        let Ok(place) = self.site.locate(uri, headers) else {
            told["decision"] = "refused with 421".into();
            told["why"] = "this host is not on the upstream's list of hosts".into();
            return told;
        };
        told["goes_to"] = format!("{}://{}, Host: {}", place.scheme, place.connect, place.host).into();
        let plan = match self.site.router.route(request.method(), uri.path(), uri.query(), headers) {
            Route::Cache(plan) => Some(plan),
            Route::Bypass(_) => self.site.router.rule_for(&Method::GET, uri.path(), uri.query(), headers),
        };
        if let Some(plan) = plan {
            told["rule"] = format!("{} (path {})", plan.name, plan.path).into();
            told["cache"] = cache(plan).into();
        }
        match self.admit(request, &place, self.commons.clock.now()) {
            Err(reason) => bypass(&mut told, reason),
            Ok((plan, demands, key)) => {
                told["key"] = Self::key_parts(&plan.key, &place, request, &key);
                told["tags"] = tags(plan, uri.path()).into();
                told["deadline"] = format_duration(plan.deadline).to_string().into();
                if running {
                    self.state(&mut told, &key, headers, &demands);
                } else {
                    told["decision"] = "the cache is asked".into();
                }
            }
        }
        if running {
            told["upstream_now"] = self.upstream_now(&place, headers);
        }
        told
    }

    fn key_parts(plan: &KeyPlan, place: &Place, request: &Request<Body>, key: &[u8]) -> Value {
        let headers = request.headers();
        let mut credentials: Vec<&str> =
            headers.keys().filter(|name| plan.credentials.contains(name)).map(http::HeaderName::as_str).collect();
        credentials.sort_unstable();
        let tenant = match (plan.partition, credentials.is_empty()) {
            (Partition::Everyone, _) => "shared by everyone".to_owned(),
            (Partition::Credential, true) => "those without credentials".to_owned(),
            (Partition::Credential, false) => format!("those with the same {}", credentials.join(", ")),
        };
        let query = match &plan.query {
            QueryFilter::Whole => request.uri().query().map_or("none".to_owned(), |query| format!("?{query}")),
            QueryFilter::Filtered(_) => format!("of {:?}, what the rule keeps", request.uri().query().unwrap_or("")),
        };
        let named = |name: &http::HeaderName| {
            if plan.is_credential(name) {
                return format!("{name}: (not shown)");
            }
            let values: Vec<_> =
                headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
            format!("{name}: {}", if values.is_empty() { "(absent)".into() } else { values.join(", ") })
        };
        json!({
            "name": short_name(key).as_str(),
            "tenant": tenant,
            "authority": place.keyed.as_deref().unwrap_or("the upstream's"),
            "path": request.uri().path(),
            "query": query,
            "headers": plan.headers.iter().map(named).collect::<Vec<_>>(),
        })
    }

    fn state(&self, told: &mut Value, key: &[u8], headers: &HeaderMap, demands: &Demands) {
        let now = self.commons.clock.now();
        let (decision, entry) = match self.look_up(key, headers, demands, now) {
            Lookup::Fresh(entry) => ("a hit", Some(entry)),
            Lookup::WhileRevalidate(entry) => ("a stale hit, and a refresh behind it", Some(entry)),
            Lookup::Fetch(miss) => {
                let decision = match miss.forward {
                    Forward::Stale => "a fetch: what is stored is stale, and stands in only if the fetch fails",
                    Forward::Request => "a fetch: the request's Cache-Control insists on it",
                    Forward::VaryMiss => "a fetch: what is stored is for other request headers (Vary)",
                    Forward::UriMiss | Forward::Bypass(_) => "a fetch: nothing is stored for it here",
                };
                (decision, miss.stale)
            }
        };
        told["decision"] = decision.into();
        told["entry"] = entry.map_or(Value::Null, |entry| self.told_entry(&entry));
        if let Some((left, reason)) = self.commons.flights.why_hit_for_miss(key, now) {
            let why = reason.map_or("its answers have to be validated each time", advice::of_skip);
            told["not_stored"] =
                format!("the last answer was not stored: {why}. For {left} s nobody waits for another's answer")
                    .into();
        }
        told["being_fetched"] = self.commons.flights.is_flying(key).into();
    }

    fn told_entry(&self, entry: &Entry) -> Value {
        let now = self.commons.clock.now();
        let vary: Vec<&str> = entry.variant.0.iter().map(|(name, _)| name.as_str()).collect();
        json!({
            "status": entry.head.status.as_u16(),
            "ttl_seconds": entry.ttl(now),
            "age_seconds": entry.age(now),
            "body_bytes": entry.body.len(),
            "vary": vary,
            "standing": self.commons.invalidations.standing(entry, now).token(),
            "rule": &*entry.rule,
            "always_validate": entry.terms.always_validate,
        })
    }

    fn upstream_now(&self, place: &Place, headers: &HeaderMap) -> Value {
        let breakers = self.site.breakers.open();
        let breaker = breakers.iter().find(|(host, _)| host == place.connect.as_str()).map_or("closed", |b| b.1);
        json!({
            "breaker": breaker,
            "closed_by_retry_after_seconds": self.closed_for(place, headers).map(|left| left.as_secs() + 1),
            "state": self.site.signals.state(self.commons.clock.now()).status,
        })
    }
}

fn bypass(told: &mut Value, reason: Bypass) {
    told["decision"] = format!("passed through ({})", reason.token()).into();
    told["why"] = advice::of_bypass(reason).into();
}

/// Who decides what is stored, and for how long.
fn cache(plan: &Plan) -> String {
    let mut text = match plan.mode {
        CacheMode::Off => return "off: passed through".to_owned(),
        CacheMode::Http => "http: the upstream's headers decide (RFC 9111)".to_owned(),
        CacheMode::Override { ttl, negative_ttl } => {
            let negative =
                negative_ttl.map_or("not stored".to_owned(), |ttl| format!("for {}", format_duration(ttl)));
            let ttl = format_duration(ttl);
            format!("override: 200, 203, 204, 301 and 308 for {ttl}; 404 and 410 {negative}; nothing else")
        }
    };
    for (name, window) in plan.windows() {
        text += &format!("; {name} {}", format_duration(window));
    }
    text
}
