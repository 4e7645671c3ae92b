//! `GET /entries`: what is in memory, a page at a time. `GET /budgets`: who may ask which upstream now. Credentials are
//! nowhere in either: an entry says only whether it belongs to one.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;
use super::input::{Asked, Limit};
use crate::policy::entry::Entry;
use crate::policy::key::{is_private, looks_like_credential};
use crate::policy::target::parameters;
use crate::policy::{Tick, millis};
use crate::proxy::Proxy;

/// Entries on a page, unless `limit` says otherwise.
const PAGE: usize = 100;

/// Which entries to tell of.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Wanted {
    /// With this tag.
    tag: Option<String>,
    /// Whose path and query begin so.
    prefix: Option<String>,
    /// After this one: the `next` of the page before.
    after: Option<String>,
    /// So many.
    limit: Option<Limit>,
}

pub(super) async fn entries(State(admin): State<Arc<Admin>>, Asked(wanted): Asked<Wanted>) -> Json<Value> {
    let limit = wanted.limit.map_or(PAGE, |limit| limit.0);
    let commons = admin.commons();
    let now = commons.clock.now();
    let mut found: Vec<(String, Value)> = Vec::new();
    let after = wanted.after.as_deref().unwrap_or_default();
    commons.memory.look_at_all(|key, entry| {
        let has_tag = wanted.tag.as_ref().is_none_or(|tag| entry.tags.contains(tag));
        let begins = wanted.prefix.as_ref().is_none_or(|prefix| entry.address.target.starts_with(prefix.as_str()));
        let name = name(entry);
        if !has_tag || !begins || *name <= *after || entry.expired(now) {
            return;
        }
        // The first so many by name are kept, and one more, to know whether there are more.
        let at = found.partition_point(|(other, _)| *other < name);
        if at <= limit {
            let standing = commons.invalidations.standing(entry, now);
            found.insert(at, (name, told(entry, is_private(key), standing.token(), now)));
            found.truncate(limit + 1);
        }
    });
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().map(|(name, _)| name.clone()).filter(|_| more);
    let entries: Vec<Value> = found.into_iter().map(|(_, told)| told).collect();
    Json(json!({ "entries": entries, "next": next }))
}

/// Unlike any other's, and the same on the next page.
fn name(entry: &Entry) -> String {
    format!("{}-{}", entry.key_name.as_str(), &entry.variant.digest().to_hex()[..8])
}

fn told(entry: &Entry, private: bool, standing: &str, now: Tick) -> Value {
    let vary: Vec<&str> = entry.variant.0.iter().map(|(name, _)| name.as_str()).collect();
    json!({
        "key": entry.key_name.as_str(),
        "host": &*entry.address.authority,
        "target": masked(&entry.address.target),
        "of_a_credential": private,
        "rule": &*entry.rule,
        "tags": entry.tags,
        "status": entry.head.status.as_u16(),
        "age_seconds": entry.age(now),
        "ttl_seconds": entry.ttl(now),
        "bytes": entry.weight(),
        "vary": vary,
        "standing": standing,
    })
}

/// Path and query, without the values of parameters that smell of a credential.
fn masked(target: &str) -> String {
    let Some((path, query)) = target.split_once('?') else { return target.to_owned() };
    let parts = parameters(Some(query)).map(|(name, value)| match value {
        Some(_) if smells(name) => format!("{name}=…"),
        Some(value) => format!("{name}={value}"),
        None => name.to_owned(),
    });
    format!("{path}?{}", parts.collect::<Vec<_>>().join("&"))
}

/// Signed URLs have words of their own. A name that is written in a roundabout way is not read, but masked.
fn smells(name: &str) -> bool {
    const SIGNED: [&str; 6] = ["sig", "hmac", "code", "pass", "passwd", "pwd"];
    let name = name.to_ascii_lowercase();
    let mut words = name.split(|c: char| !c.is_ascii_alphanumeric());
    name.contains('%') || words.any(|word| looks_like_credential(word) || SIGNED.contains(&word))
}

pub(super) async fn budgets(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let of = |proxy: &Arc<Proxy>| {
        let state = proxy.site.budgets.state();
        let closed: Vec<u64> = state.closed.into_iter().map(millis).collect();
        json!({
            "upstream": &*proxy.site.name,
            "pace_per_second": state.per_second,
            "buckets": state.buckets,
            "waiting": state.waiting,
            "closed_for_ms": closed,
        })
    };
    Json(json!({ "budgets": admin.proxies().iter().map(of).collect::<Vec<_>>() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_that_smell_of_a_credential() {
        for (target, shown) in [
            ("/a?page=2&limit=5", "/a?page=2&limit=5"),
            ("/a?access_token=x&page=2", "/a?access_token=…&page=2"),
            ("/a?accessToken=x&apiKey.x=y", "/a?accessToken=…&apiKey.x=…"),
            ("/a?sv=1&sig=x&X-Amz-Signature=y", "/a?sv=1&sig=…&X-Amz-Signature=…"),
            ("/a?access%5Ftoken=x", "/a?access%5Ftoken=…"),
        ] {
            assert_eq!(masked(target), shown);
        }
    }
}
