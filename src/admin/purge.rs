//! `POST /purge`: converts a purge request to selectors of the invalidation ledger, and records them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Admin;
use super::extract::{JsonBody, QueryParams, bad_request};
use crate::config::parse_duration;
use crate::fleet::invalidation_log::applied;
use crate::policy::invalidation::ledger::{Matcher, PurgeKind, Selector, TargetMatch};
use crate::policy::invalidation::tag::TagScope;
use crate::policy::routing::origin::Origin;
use crate::policy::routing::pattern::Glob;
use crate::proxy::SharedState;
use crate::proxy::upstream_state::UpstreamState;

/// Maximum time to wait for other sidecars.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A purge request. All given selectors apply; a request without selectors is an error.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PurgeRequest {
    /// Tags.
    pub tags: Vec<String>,
    /// URLs with their query, absolute or beginning with a slash.
    pub urls: Vec<String>,
    /// Prefixes of URLs, absolute or beginning with a slash.
    pub prefixes: Vec<String>,
    /// Globs that are matched against path and query.
    pub patterns: Vec<String>,
    /// All entries (of `upstream` and `hosts`, if given).
    pub all: bool,
    /// Only entries of this upstream.
    pub upstream: Option<String>,
    /// Only entries of these hosts, on an upstream that has several.
    pub hosts: Vec<String>,
    /// Makes entries stale instead of removing them.
    pub soft: bool,
}

impl PurgeRequest {
    /// Returns what the request names, for the log: the first selectors of each kind.
    fn summary(&self) -> String {
        const SHOWN: usize = 3;
        let kinds =
            [("tags", &self.tags), ("urls", &self.urls), ("prefixes", &self.prefixes), ("patterns", &self.patterns)];
        let mut parts: Vec<String> = Vec::new();
        for (kind, names) in kinds.into_iter().filter(|(_, names)| !names.is_empty()) {
            let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
            parts.push(format!("{kind} {:?}{more}", &names[..names.len().min(SHOWN)]));
        }
        if self.all {
            parts.push("all entries".to_owned());
        }
        parts.extend(self.upstream.iter().map(|name| format!("of upstream {name:?}")));
        parts.join(", ")
    }
}

/// The scope of a purge: an upstream, and optionally one of its hosts.
#[derive(Debug, Clone, Copy)]
struct PurgeScope<'a> {
    upstream: &'a UpstreamState,
    host: Option<&'a str>,
}

/// `?wait=1s`: the response is sent when all sidecars have applied the purge, or after this time.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct WaitParams {
    wait: Option<String>,
}

/// Purges entries. The purge is in force on this sidecar when the response is sent. With Redis, the handler waits up to
/// the command timeout for the fleet's log to have it.
pub(super) async fn purge(
    State(admin): State<Arc<Admin>>,
    QueryParams(wait): QueryParams<WaitParams>,
    JsonBody(request): JsonBody<PurgeRequest>,
) -> Response {
    let wait = match wait.wait.as_deref().map(parse_duration).transpose() {
        Ok(wait) => wait.map(|wait| wait.min(MAX_WAIT)),
        Err(message) => return bad_request(&format!("wait: {message}")),
    };
    let proxies = admin.proxies();
    let upstreams: Vec<&UpstreamState> = proxies.iter().map(|proxy| &*proxy.upstream).collect();
    let (purged, selectors) = match selectors(&request, &upstreams) {
        Ok(selected) => selected,
        Err(message) => return bad_request(&message),
    };
    let kind = if request.soft { PurgeKind::Soft } else { PurgeKind::Hard };
    let ack = record_purge(&admin.shared(), selectors, kind, wait).await;
    tracing::info!(selectors = purged, id = ack.id, soft = request.soft, "purge accepted: {}", request.summary());
    let mut answer = json!({"purged": purged, "id": ack.id});
    if let Some(logged) = ack.logged {
        answer["logged"] = logged.into();
    }
    if let Some((applied, sidecars)) = ack.applied {
        answer["applied"] = applied.into();
        answer["sidecars"] = sidecars.into();
    }
    Json(answer).into_response()
}

/// The progress of a purge.
struct PurgeAck {
    id: u64,
    /// Whether the fleet's log has the purge. `None` without Redis.
    logged: Option<bool>,
    /// The number of sidecars that have applied the purge, and the number of all that may serve: `None` if they can't be
    /// counted. `None` without `wait`.
    applied: Option<(u64, Option<u64>)>,
}

async fn record_purge(
    shared: &SharedState,
    selectors: Vec<Selector>,
    kind: PurgeKind,
    wait: Option<Duration>,
) -> PurgeAck {
    let Some(fleet) = &shared.fleet else {
        let recorded = shared.invalidations.record(selectors, kind, None);
        return PurgeAck { id: recorded.position.0, logged: None, applied: wait.map(|_| (1, Some(1))) };
    };
    let cleared = if kind == PurgeKind::Hard { selectors.clone() } else { Vec::new() };
    let name = wait.and_then(|_| getrandom::u64().ok());
    let mut confirmations = name.map(|name| fleet.inbox.subscribe(&applied(name)));
    let recorded = shared.invalidations.record(selectors, kind, name);
    let logged = shared.invalidations.wait_logged(recorded.number, fleet.timeout).await;
    fleet.tier.enqueue_scan(&cleared);
    let applied = match (&mut confirmations, wait) {
        (Some(confirmations), Some(wait)) => {
            let members = fleet.redis.members().await.ok().filter(|_| logged);
            let sidecars = members.map(|members| members.max(fleet.membership.known().1).max(1));
            let mut confirmed = HashSet::new();
            let all = async {
                while sidecars.is_none_or(|sidecars| (confirmed.len() as u64) < sidecars) {
                    confirmed.insert(confirmations.next_message().await);
                }
            };
            // A sidecar that has not confirmed by then counts as one that has not applied the purge.
            let _ = tokio::time::timeout(wait, all).await;
            Some(((confirmed.len() as u64).max(1), sidecars))
        }
        (_, _) => None,
    };
    PurgeAck { id: recorded.position.0, logged: Some(logged), applied }
}

/// Returns the number of selectors that a request names, and the corresponding selectors of the ledger.
fn selectors(request: &PurgeRequest, upstreams: &[&UpstreamState]) -> Result<(usize, Vec<Selector>), String> {
    let count = request.tags.len()
        + request.urls.len()
        + request.prefixes.len()
        + request.patterns.len()
        + usize::from(request.all);
    if count == 0 {
        return Err("name what to purge: tags, urls, prefixes, patterns, or \"all\": true".into());
    }
    if request.all && request.upstream.is_none() && request.hosts.is_empty() {
        return Ok((count, vec![Selector::Everything]));
    }
    let hosts: Vec<String> = request.hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
    let mut selectors = Vec::new();
    for scope in purge_scopes(request, &hosts, upstreams)? {
        let tag_scope = TagScope { upstream: scope.upstream.id, authority: scope.host };
        selectors.extend(request.tags.iter().map(|tag| Selector::tag(tag_scope, tag)));
        if request.all {
            selectors.push(Selector::scope(tag_scope));
        }
        for url in &request.urls {
            let (host, target) = split_url(url)?;
            let host = host.map(str::to_ascii_lowercase);
            if let Some(tag_scope) = narrow_scope(scope, host.as_deref()) {
                selectors.push(Selector::target(tag_scope, target));
            }
        }
        for (text, make) in matchers(request) {
            let (host, target) = split_url(text)?;
            let authority = host.or(scope.host).map(|host| host.to_ascii_lowercase().into());
            let upstream = Some(scope.upstream.id);
            selectors.push(Selector::Matching(Matcher { upstream, authority, target: make(target) }));
        }
    }
    if selectors.is_empty() {
        return Err(
            "no upstream serves the host that these URLs name: write only the path, or the upstream's host".into()
        );
    }
    Ok((count, selectors))
}

type MakeMatch = fn(&str) -> TargetMatch;

fn matchers(request: &PurgeRequest) -> impl Iterator<Item = (&String, MakeMatch)> {
    let prefix: MakeMatch = |text| TargetMatch::Prefix(text.into());
    let glob: MakeMatch = |text| TargetMatch::Glob(Glob::new(text));
    request.prefixes.iter().map(move |text| (text, prefix)).chain(request.patterns.iter().map(move |t| (t, glob)))
}

fn purge_scopes<'a>(
    request: &PurgeRequest,
    hosts: &'a [String],
    upstreams: &[&'a UpstreamState],
) -> Result<Vec<PurgeScope<'a>>, String> {
    let mut chosen = upstreams.to_vec();
    if let Some(name) = &request.upstream {
        chosen.retain(|upstream| *upstream.name == **name);
        if chosen.is_empty() {
            let known: Vec<&str> = upstreams.iter().map(|upstream| &*upstream.name).collect();
            return Err(format!("no upstream {name:?}: name one of {known:?}"));
        }
    }
    if hosts.is_empty() {
        return Ok(chosen.into_iter().map(|upstream| PurgeScope { upstream, host: None }).collect());
    }
    let several = |upstream: &&UpstreamState| {
        matches!(upstream.origin, Origin::Hosts(_) | Origin::Fixed { preserve_host: true, .. })
    };
    let each = |upstream: &'a UpstreamState| hosts.iter().map(move |host| PurgeScope { upstream, host: Some(host) });
    let scopes: Vec<_> = chosen.into_iter().filter(several).flat_map(each).collect();
    if scopes.is_empty() {
        return Err("hosts: only an upstream with a list of hosts, or with host = \"preserve\", has several".into());
    }
    Ok(scopes)
}

/// Returns the scope of a URL that may name a host. `None` if that host is outside `scope`.
fn narrow_scope<'a>(scope: PurgeScope<'a>, host: Option<&'a str>) -> Option<TagScope<'a>> {
    let upstream = scope.upstream.id;
    let Some(named) = host else { return Some(TagScope { upstream, authority: scope.host }) };
    match &scope.upstream.origin {
        Origin::Fixed { authority, preserve_host: false, .. } => {
            authority.as_str().eq_ignore_ascii_case(named).then_some(TagScope { upstream, authority: None })
        }
        Origin::Fixed { .. } | Origin::Hosts(_) => {
            let fits = scope.host.is_none_or(|host| host.eq_ignore_ascii_case(named));
            fits.then_some(TagScope { upstream, authority: Some(named) })
        }
    }
}

/// Splits `https://host/target` or `/target` into host and target.
fn split_url(url: &str) -> Result<(Option<&str>, &str), String> {
    if url.starts_with('/') || url.starts_with('*') {
        return Ok((None, url));
    }
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    match rest.map(|rest| rest.find('/').map_or((rest, "/"), |slash| rest.split_at(slash))) {
        Some((host, target)) if !host.is_empty() => {
            let default = if url.starts_with("https") { ":443" } else { ":80" };
            Ok((Some(host.strip_suffix(default).unwrap_or(host)), target))
        }
        Some(_) | None => Err(format!("{url:?} is neither a path nor an http URL: write \"/path\"")),
    }
}
