//! `POST /purge`: from what a person names to selectors of the ledger.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Admin;
use super::input::{Asked, Told, bad};
use crate::config::{Target, parse_duration};
use crate::fleet::log::{GONE, applied};
use crate::policy::glob::Glob;
use crate::policy::invalidation::{Matcher, Selector, Strength, TargetMatch};
use crate::policy::tags::{Scope, Subject};
use crate::proxy::Commons;
use crate::proxy::site::Site;

/// Nobody waits longer for other sidecars.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What to purge. Everything that is named counts; nothing named is an error.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PurgeRequest {
    /// Tags.
    pub tags: Vec<String>,
    /// URLs, absolute or from the slash on, with their query.
    pub urls: Vec<String>,
    /// Beginnings of URLs, absolute or from the slash on.
    pub prefixes: Vec<String>,
    /// Globs over path and query.
    pub patterns: Vec<String>,
    /// Everything (of `upstream` and `hosts`, if they are named).
    pub all: bool,
    /// Only in this upstream.
    pub upstream: Option<String>,
    /// Only for these hosts, on an upstream that has several.
    pub hosts: Vec<String>,
    /// Take for stale rather than for gone.
    pub soft: bool,
}

/// Where a purge applies: an upstream, and maybe one of its hosts.
#[derive(Debug, Clone, Copy)]
struct Reach<'a> {
    site: &'a Site,
    host: Option<&'a str>,
}

/// `?wait=1s`: answer when all sidecars have applied it, or after so long.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Wait {
    wait: Option<String>,
}

/// What is purged holds here when this answers. With Redis it waits a moment for the fleet's log to have it.
pub(super) async fn purge(
    State(admin): State<Arc<Admin>>,
    Asked(wait): Asked<Wait>,
    Told(request): Told<PurgeRequest>,
) -> Response {
    let wait = match wait.wait.as_deref().map(parse_duration).transpose() {
        Ok(wait) => wait.map(|wait| wait.min(LONGEST_WAIT)),
        Err(message) => return bad(&format!("wait: {message}")),
    };
    let proxies = admin.proxies();
    let sites: Vec<&Site> = proxies.iter().map(|proxy| &proxy.site).collect();
    let (purged, selectors) = match selectors(&request, &sites) {
        Ok(selected) => selected,
        Err(message) => return bad(&message),
    };
    let strength = if request.soft { Strength::Soft } else { Strength::Hard };
    let spread = spread(&admin.commons(), selectors, strength, wait).await;
    tracing::info!(purged, id = spread.id, soft = request.soft, "purged");
    let mut answer = json!({"purged": purged, "id": spread.id});
    if let Some(logged) = spread.logged {
        answer["logged"] = logged.into();
    }
    if let Some((applied, sidecars)) = spread.applied {
        answer["applied"] = applied.into();
        answer["sidecars"] = sidecars.into();
    }
    Json(answer).into_response()
}

/// How far a purge came.
struct Spread {
    id: u64,
    /// Whether the fleet's log has it.
    logged: Option<bool>,
    /// How many sidecars have applied it, of how many.
    applied: Option<(u64, u64)>,
}

async fn spread(commons: &Commons, selectors: Vec<Selector>, strength: Strength, wait: Option<Duration>) -> Spread {
    let Some(fleet) = &commons.fleet else {
        let recorded = commons.invalidations.record(selectors, strength, None);
        return Spread { id: recorded.position.0, logged: None, applied: wait.map(|_| (1, 1)) };
    };
    let cleared = if strength == Strength::Hard { selectors.clone() } else { Vec::new() };
    let name = wait.and_then(|_| getrandom::u64().ok());
    let mut answers = name.map(|name| fleet.inbox.expect(&applied(name)));
    let recorded = commons.invalidations.record(selectors, strength, name);
    let logged = commons.invalidations.logged(recorded.number, fleet.patience).await;
    fleet.shared.clear(cleared);
    let applied = match (&mut answers, wait) {
        (Some(answers), Some(wait)) => {
            let sidecars = fleet.redis.present(None, GONE).await.unwrap_or(1).max(1);
            let mut who = HashSet::new();
            let all = async {
                while (who.len() as u64) < sidecars {
                    who.insert(answers.message().await);
                }
            };
            // Whoever has not answered by then has not.
            let _ = tokio::time::timeout(wait, all).await;
            Some(((who.len() as u64).max(1), sidecars))
        }
        (_, _) => None,
    };
    Spread { id: recorded.position.0, logged: Some(logged), applied }
}

/// How many selectors a request names, and what they are in the ledger's terms.
fn selectors(request: &PurgeRequest, sites: &[&Site]) -> Result<(usize, Vec<Selector>), String> {
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
    for reach in reaches(request, &hosts, sites)? {
        let scope = Scope { upstream: reach.site.id, authority: reach.host };
        let subjects = request.tags.iter().map(|tag| Subject::tag(scope, tag));
        selectors.extend(subjects.map(Selector::Subject));
        if request.all {
            selectors.push(Selector::Subject(Subject::everything(scope)));
        }
        for url in &request.urls {
            let (host, target) = split(url)?;
            let host = host.map(str::to_ascii_lowercase);
            if let Some(scope) = narrowed(reach, host.as_deref()) {
                selectors.push(Selector::Subject(Subject::target(scope, target)));
            }
        }
        for (text, make) in matchers(request) {
            let (host, target) = split(text)?;
            let authority = host.or(reach.host).map(|host| host.to_ascii_lowercase().into());
            let upstream = Some(reach.site.id);
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

fn reaches<'a>(request: &PurgeRequest, hosts: &'a [String], sites: &[&'a Site]) -> Result<Vec<Reach<'a>>, String> {
    let mut chosen = sites.to_vec();
    if let Some(name) = &request.upstream {
        chosen.retain(|site| *site.name == **name);
        if chosen.is_empty() {
            let known: Vec<&str> = sites.iter().map(|site| &*site.name).collect();
            return Err(format!("no upstream {name:?}: name one of {known:?}"));
        }
    }
    if hosts.is_empty() {
        return Ok(chosen.into_iter().map(|site| Reach { site, host: None }).collect());
    }
    let several = |site: &&Site| matches!(site.target, Target::Hosts(_) | Target::Origin { preserve_host: true, .. });
    let each = |site: &'a Site| hosts.iter().map(move |host| Reach { site, host: Some(host) });
    let reaches: Vec<_> = chosen.into_iter().filter(several).flat_map(each).collect();
    if reaches.is_empty() {
        return Err("hosts: only an upstream with a list of hosts, or with host = \"preserve\", has several".into());
    }
    Ok(reaches)
}

/// The scope of a URL that may name a host; none if that is not the host in reach.
fn narrowed<'a>(reach: Reach<'a>, host: Option<&'a str>) -> Option<Scope<'a>> {
    let upstream = reach.site.id;
    let Some(named) = host else { return Some(Scope { upstream, authority: reach.host }) };
    match &reach.site.target {
        Target::Origin { authority, preserve_host: false, .. } => {
            authority.as_str().eq_ignore_ascii_case(named).then_some(Scope { upstream, authority: None })
        }
        Target::Origin { .. } | Target::Hosts(_) => {
            let fits = reach.host.is_none_or(|host| host.eq_ignore_ascii_case(named));
            fits.then_some(Scope { upstream, authority: Some(named) })
        }
    }
}

/// `https://host/target` or `/target`.
fn split(url: &str) -> Result<(Option<&str>, &str), String> {
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
