//! `GET /entries`: the entries in memory, in pages. `GET /budgets`: the current request budget of each upstream.
//! Neither shows credentials: an entry shows only whether it belongs to one.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;
use super::extract::{Limit, QueryParams};
use crate::policy::entry::Entry;
use crate::policy::routing::cache_key::{is_private, looks_like_credential};
use crate::policy::routing::target::parameters;
use crate::policy::{Tick, millis};
use crate::proxy::Proxy;

/// Number of entries on a page, if `limit` is not given.
const DEFAULT_PAGE_SIZE: usize = 100;

/// The query parameters of `GET /entries`: which entries to return.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EntryFilter {
    /// Only entries with this tag.
    tag: Option<String>,
    /// Only entries whose path and query begin with this text.
    prefix: Option<String>,
    /// Only entries after this one: the `next` of the previous page.
    after: Option<String>,
    /// Maximum number of entries.
    limit: Option<Limit>,
}

pub(super) async fn entries(
    State(admin): State<Arc<Admin>>,
    QueryParams(wanted): QueryParams<EntryFilter>,
) -> Json<Value> {
    let limit = wanted.limit.map_or(DEFAULT_PAGE_SIZE, |limit| limit.0);
    let shared = admin.shared();
    let now = shared.clock.now();
    let mut found: Vec<(String, Value)> = Vec::new();
    let after = wanted.after.as_deref().unwrap_or_default();
    shared.memory.for_each(|key, entry| {
        let has_tag = wanted.tag.as_ref().is_none_or(|tag| entry.tags.contains(tag));
        let begins = wanted.prefix.as_ref().is_none_or(|prefix| entry.resource.target.starts_with(prefix.as_str()));
        let name = entry_name(entry);
        if !has_tag || !begins || *name <= *after || entry.expired(now) {
            return;
        }
        // The first `limit` entries by name are kept, and one more to know whether there is a next page.
        let at = found.partition_point(|(other, _)| *other < name);
        if at <= limit {
            let invalidation_state = shared.invalidations.state_of(entry, now);
            found.insert(at, (name, entry_json(entry, is_private(key), invalidation_state.token(), now)));
            found.truncate(limit + 1);
        }
    });
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().map(|(name, _)| name.clone()).filter(|_| more);
    let entries: Vec<Value> = found.into_iter().map(|(_, entry)| entry).collect();
    Json(json!({ "entries": entries, "next": next }))
}

/// Returns a name that is unique among the entries, and the same for the next page.
fn entry_name(entry: &Entry) -> String {
    format!("{}-{}", entry.key_name.as_str(), &entry.variant.digest().to_hex()[..8])
}

fn entry_json(entry: &Entry, private: bool, invalidation_state: &str, now: Tick) -> Value {
    let vary: Vec<&str> = entry.variant.0.iter().map(|(name, _)| name.as_str()).collect();
    json!({
        "key": entry.key_name.as_str(),
        "host": &*entry.resource.authority,
        "target": mask_credentials(&entry.resource.target),
        "of_a_credential": private,
        "rule": &*entry.rule,
        "tags": entry.tags,
        "status": entry.head.status.as_u16(),
        "age_seconds": entry.age(now),
        "ttl_seconds": entry.ttl(now),
        "bytes": entry.weight(),
        "vary": vary,
        "standing": invalidation_state,
    })
}

/// Returns path and query, with the values of parameters that look like credentials masked.
fn mask_credentials(target: &str) -> String {
    let Some((path, query)) = target.split_once('?') else { return target.to_owned() };
    let parts = parameters(Some(query)).map(|(name, value)| match value {
        Some(_) if is_secret_parameter(name) => format!("{name}=…"),
        Some(value) => format!("{name}={value}"),
        None => name.to_owned(),
    });
    format!("{path}?{}", parts.collect::<Vec<_>>().join("&"))
}

/// Returns true if the parameter's value is to be masked. Signed URLs have parameter names of their own. A
/// percent-encoded name is not decoded: its value is masked.
fn is_secret_parameter(name: &str) -> bool {
    const SIGNED: [&str; 6] = ["sig", "hmac", "code", "pass", "passwd", "pwd"];
    let name = name.to_ascii_lowercase();
    let mut words = name.split(|c: char| !c.is_ascii_alphanumeric());
    name.contains('%') || words.any(|part| looks_like_credential(part) || SIGNED.contains(&part))
}

pub(super) async fn budgets(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let of = |proxy: &Arc<Proxy>| {
        let state = proxy.upstream.budgets.state();
        let closed: Vec<u64> = state.closed.into_iter().map(millis).collect();
        json!({
            "upstream": &*proxy.upstream.name,
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
    fn credential_query_parameters_are_masked() {
        for (target, shown) in [
            ("/a?page=2&limit=5", "/a?page=2&limit=5"),
            ("/a?access_token=x&page=2", "/a?access_token=…&page=2"),
            ("/a?accessToken=x&apiKey.x=y", "/a?accessToken=…&apiKey.x=…"),
            ("/a?sv=1&sig=x&X-Amz-Signature=y", "/a?sv=1&sig=…&X-Amz-Signature=…"),
            ("/a?access%5Ftoken=x", "/a?access%5Ftoken=…"),
        ] {
            assert_eq!(mask_credentials(target), shown);
        }
    }
}
