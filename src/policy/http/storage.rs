//! Storage decision: whether a response may be stored, and its freshness lifetime (RFC 9111 §3, §4.2).

use std::time::{Duration, SystemTime};

use http::header::{
    ACCEPT_ENCODING, AGE, AUTHORIZATION, CONTENT_TYPE, DATE, ETAG, EXPIRES, HeaderMap, HeaderName, HeaderValue,
    LAST_MODIFIED, SET_COOKIE, VARY,
};
use http::{Method, StatusCode};

use super::cache_control::{CacheControl, seconds};
use super::date;
use super::request_view::RequestView;
use super::targeted_cache_control;
use crate::policy::entry::Lifetimes;
use crate::policy::millis;
use crate::policy::outcome::NotStored;
use crate::policy::routing::rule::{CacheMode, Rule};

/// Maximum heuristic freshness lifetime, which is a tenth of the time since Last-Modified (RFC 9111 §4.2.2).
const HEURISTIC_CAP: Duration = Duration::from_hours(24);

/// Time for which a stale response may be served when the upstream sends no response and no directive forbids it
/// (RFC 9111 §4.2.4), and for which a stale response with a validator is kept for validation.
const DISCONNECTED_WINDOW: Duration = Duration::from_hours(24);

/// More names than this in `Vary` are taken for `*`: comparing each with each takes quadratic time.
const MAX_VARY: usize = 64;

/// Size of a request head in bytes from which a 400, 405 or 414 is not stored: the large head may have caused it.
const MAX_HEAD_OF_CACHED_ERROR: usize = 4096;

/// The head of a response, and the time of its arrival.
#[derive(Debug, Clone, Copy)]
pub struct ResponseView<'a> {
    /// The status.
    pub status: StatusCode,
    /// The header fields.
    pub headers: &'a HeaderMap,
    /// The wall clock time of arrival: `response_time` (RFC 9111 §4.2.3).
    pub at: SystemTime,
    /// Time from the request to the head of the response: `response_delay` (RFC 9111 §4.2.3).
    pub delay: Duration,
}

impl ResponseView<'_> {
    fn date(&self, name: &HeaderName) -> Option<SystemTime> {
        date::parse(self.headers.get(name)?.as_bytes(), self.at)
    }
}

/// How a response is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorePlan {
    /// The freshness lifetime and the stale windows.
    pub lifetimes: Lifetimes,
    /// The request header fields that select the response (RFC 9111 §4.1).
    pub vary: Vec<HeaderName>,
    /// The response header fields that are not stored.
    pub drop: Vec<HeaderName>,
}

/// Decides whether a response is stored, and how. Returns the reason if it is not.
pub fn decide(request: &RequestView<'_>, response: &ResponseView<'_>, rule: &Rule) -> Result<StorePlan, NotStored> {
    if response.status == StatusCode::PARTIAL_CONTENT {
        return Err(NotStored::Partial);
    }
    if *request.method == Method::HEAD {
        return Err(NotStored::Head);
    }
    if is_event_stream(response.headers) {
        return Err(NotStored::EventStream);
    }
    let vary = vary(response.headers)?;
    match rule.mode {
        CacheMode::Off => Err(NotStored::Status),
        CacheMode::Override { ttl, negative_ttl } => decide_by_rule(response, rule, ttl, negative_ttl, vary),
        CacheMode::Http => decide_by_headers(request, response, rule, vary),
    }
}

/// Decides whether a failure response that is not stored may be shared with collapsed requests.
///
/// Returns the request header fields whose values must be equal for that, or `None` if it must not be shared.
pub fn failure_vary(response: &ResponseView<'_>, rule: &Rule) -> Option<Vec<HeaderName>> {
    let directives = targeted_cache_control::directives(response.headers)
        .unwrap_or_else(|| CacheControl::of_response(response.headers));
    let forbidden = rule.mode == CacheMode::Http && (directives.no_store || directives.private);
    if forbidden || response.headers.contains_key(SET_COOKIE) {
        return None;
    }
    let mut vary = vary(response.headers).ok()?;
    if !vary.contains(&ACCEPT_ENCODING) {
        vary.push(ACCEPT_ENCODING);
    }
    Some(vary)
}

/// Returns true for `text/event-stream`, which is always streamed and never stored, whatever its other fields.
fn is_event_stream(headers: &HeaderMap) -> bool {
    let essence = |value: &HeaderValue| {
        value.as_bytes().get(..17).is_some_and(|v| v.eq_ignore_ascii_case(b"text/event-stream"))
    };
    headers.get(CONTENT_TYPE).is_some_and(essence)
}

fn decide_by_rule(
    response: &ResponseView<'_>,
    rule: &Rule,
    ttl: Duration,
    negative_ttl: Option<Duration>,
    mut vary: Vec<HeaderName>,
) -> Result<StorePlan, NotStored> {
    let fresh = match response.status.as_u16() {
        200 | 203 | 204 | 301 | 308 => ttl,
        404 | 410 => negative_ttl.ok_or(NotStored::Status)?,
        _ => return Err(NotStored::Status),
    };
    if !vary.contains(&ACCEPT_ENCODING) {
        vary.push(ACCEPT_ENCODING);
    }
    let negative = response.status.is_client_error();
    let window = |d: Option<Duration>| if negative { 0 } else { d.map_or(0, millis) };
    let lifetimes = Lifetimes {
        initial_age: initial_age(response),
        fresh_for: signed(millis(fresh)),
        while_revalidate: window(rule.stale_while_revalidate),
        if_error: window(rule.stale_if_error),
        disconnected: window(rule.stale_if_error),
        last_known_good: window(rule.last_known_good),
        validation: if has_validator(response.headers) { millis(fresh) } else { 0 },
        always_validate: false,
    };
    Ok(StorePlan { lifetimes, vary, drop: dropped_fields(rule, Vec::new()) })
}

fn decide_by_headers(
    request: &RequestView<'_>,
    response: &ResponseView<'_>,
    rule: &Rule,
    vary: Vec<HeaderName>,
) -> Result<StorePlan, NotStored> {
    let targeted = targeted_cache_control::directives(response.headers);
    let for_all = targeted.is_none();
    let directives = targeted.unwrap_or_else(|| CacheControl::of_response(response.headers));
    if directives.must_understand && !is_understood(response.status) {
        return Err(NotStored::Status);
    }
    if directives.no_store && !directives.must_understand {
        return Err(NotStored::NoStore);
    }
    if directives.private {
        return Err(NotStored::Private);
    }
    let may_share = directives.public || directives.s_maxage.is_some() || directives.must_revalidate;
    if request.headers.contains_key(AUTHORIZATION) && !may_share {
        return Err(NotStored::Authorization);
    }
    let head_size: usize = request.headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 4).sum();
    if is_never_stored(response.status, head_size) {
        return Err(NotStored::Status);
    }
    let age = initial_age(response);
    let lifetime = lifetime(response, &directives, for_all);
    let validator = has_validator(response.headers);
    let sets_cookie = response.headers.contains_key(SET_COOKIE) && !rule.stores_set_cookie;
    if sets_cookie && !has_explicit_lifetime(response) {
        // It was made for one client.
        return Err(NotStored::NoFreshness);
    }
    let fresh_for = match lifetime {
        Some(lifetime) => signed(lifetime).saturating_sub(signed(age)),
        None if validator && heuristically_cacheable(response.status) => -1,
        None if heuristically_cacheable(response.status) => return Err(NotStored::NoFreshness),
        None => return Err(NotStored::Status),
    };
    let never_stale = directives.must_revalidate
        || directives.proxy_revalidate
        || directives.s_maxage.is_some()
        || directives.no_cache
        // A stored 5xx response is never served stale.
        || response.status.is_server_error();
    let window = |said: Option<u64>, configured: Option<Duration>| {
        if never_stale { 0 } else { said.map_or_else(|| configured.map_or(0, millis), |s| s.saturating_mul(1000)) }
    };
    let keep = if never_stale { 0 } else { millis(DISCONNECTED_WINDOW) };
    let lifetimes = Lifetimes {
        initial_age: age,
        fresh_for,
        while_revalidate: window(directives.stale_while_revalidate, rule.stale_while_revalidate),
        if_error: window(directives.stale_if_error, rule.stale_if_error),
        disconnected: keep,
        last_known_good: window(None, rule.last_known_good),
        validation: if validator { millis(DISCONNECTED_WINDOW) } else { 0 },
        always_validate: directives.no_cache,
    };
    if fresh_for <= 0 && !validator && lifetimes.while_revalidate == 0 && lifetimes.if_error == 0 && keep == 0 {
        return Err(NotStored::NoFreshness);
    }
    Ok(StorePlan { lifetimes, vary, drop: dropped_fields(rule, directives.drop_fields) })
}

fn dropped_fields(rule: &Rule, mut drop: Vec<HeaderName>) -> Vec<HeaderName> {
    if !rule.stores_set_cookie {
        drop.push(SET_COOKIE);
    }
    drop
}

/// Returns the freshness lifetime in milliseconds: explicit (RFC 9111 §4.2.1), or else heuristic (§4.2.2).
///
/// `with_expires` is false if a targeted field overrides `Expires` (RFC 9213 §2.2).
fn lifetime(response: &ResponseView<'_>, directives: &CacheControl, with_expires: bool) -> Option<u64> {
    if let Some(seconds) = directives.s_maxage.or(directives.max_age) {
        return Some(seconds.saturating_mul(1000));
    }
    let date = response.date(&DATE).unwrap_or(response.at);
    if with_expires && response.headers.contains_key(EXPIRES) {
        let expires = response.date(&EXPIRES);
        return Some(expires.and_then(|e| e.duration_since(date).ok()).map_or(0, millis));
    }
    if !(heuristically_cacheable(response.status) || directives.public) {
        return None;
    }
    let modified = response.date(&LAST_MODIFIED)?;
    let since = date.duration_since(modified).ok()?;
    Some(millis((since / 10).min(HEURISTIC_CAP)))
}

/// Returns true if the response has an explicit freshness lifetime (RFC 9111 §4.2.1).
pub fn has_explicit_lifetime(response: &ResponseView<'_>) -> bool {
    let directives = targeted_cache_control::directives(response.headers);
    let with_expires = directives.is_none() && response.headers.contains_key(EXPIRES);
    let directives = directives.unwrap_or_else(|| CacheControl::of_response(response.headers));
    with_expires || directives.max_age.is_some() || directives.s_maxage.is_some()
}

/// Returns `corrected_initial_age` (RFC 9111 §4.2.3), in milliseconds.
pub fn initial_age(response: &ResponseView<'_>) -> u64 {
    let first = response.headers.get(AGE).map(|v| v.as_bytes().split(|b| *b == b',').next().unwrap_or_default());
    let age = seconds(first.map(<[u8]>::trim_ascii)).unwrap_or(0).saturating_mul(1000);
    // Date has whole seconds: compare whole seconds, so that a new response is not considered one second old.
    let second = |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let apparent = response.date(&DATE).map_or(0, |date| second(response.at).saturating_sub(second(date)));
    age.saturating_add(millis(response.delay)).max(apparent.saturating_mul(1000))
}

fn has_validator(headers: &HeaderMap) -> bool {
    headers.contains_key(ETAG) || headers.contains_key(LAST_MODIFIED)
}

/// Returns the request header fields listed in `Vary` (RFC 9111 §4.1, RFC 9110 §12.5.5).
fn vary(headers: &HeaderMap) -> Result<Vec<HeaderName>, NotStored> {
    let mut names = Vec::new();
    let members = headers.get_all(VARY).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
    for member in members.map(<[u8]>::trim_ascii).filter(|m| !m.is_empty()) {
        let name = HeaderName::from_bytes(member).map_err(|_| NotStored::VaryStar)?;
        if name.as_str() == "*" {
            return Err(NotStored::VaryStar);
        }
        if !names.contains(&name) {
            names.push(name);
        }
        if names.len() > MAX_VARY {
            return Err(NotStored::VaryStar);
        }
    }
    Ok(names)
}

/// Returns true if the status is heuristically cacheable (RFC 9110 §15.1).
fn heuristically_cacheable(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501)
}

/// Returns true if the status is understood as `must-understand` requires: the final statuses of RFC 9110 §15, except
/// those of partial content (206) and without content of their own (304).
fn is_understood(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200..=205 | 300..=303 | 305 | 307 | 308 | 400..=417 | 421 | 422 | 426 | 500..=505)
}

fn is_never_stored(status: StatusCode, request_head: usize) -> bool {
    match status.as_u16() {
        413 | 431 | 304 => true,
        400 | 405 | 414 => request_head >= MAX_HEAD_OF_CACHED_ERROR,
        _ => status.is_informational(),
    }
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::routing::router::testing::rule;
    use http::HeaderValue;

    const NOW: &str = "Fri, 20 Nov 2026 12:00:00 GMT";

    fn map(lines: &[(&'static str, &str)]) -> HeaderMap {
        let line =
            |(n, v): &(&'static str, &str)| (HeaderName::from_static(n), HeaderValue::from_str(v).expect("a value"));
        HeaderMap::from_iter(lines.iter().map(line))
    }

    fn decided(
        mode: CacheMode,
        status: u16,
        request_headers: &HeaderMap,
        headers: &HeaderMap,
    ) -> Result<StorePlan, NotStored> {
        let mut rule = rule("x", "/**");
        rule.mode = mode;
        let response = ResponseView {
            status: StatusCode::from_u16(status).expect("a status"),
            headers,
            at: httpdate::parse_http_date(NOW).expect("a date"),
            delay: Duration::ZERO,
        };
        let mut request = http::Request::new(());
        request.headers_mut().clone_from(request_headers);
        decide(&RequestView::from(&request), &response, &rule)
    }

    #[test]
    fn http_mode_lifetime_and_storability_depend_on_status_and_headers() {
        type Lines<'a> = &'a [(&'static str, &'a str)];
        let table: &[(u16, Lines<'_>, Result<i64, NotStored>)] = &[
            (200, &[("cache-control", "max-age=60")], Ok(60_000)),
            (200, &[("cache-control", "max-age=60, s-maxage=10")], Ok(10_000)),
            (200, &[("cache-control", "max-age=60"), ("age", "20")], Ok(40_000)),
            (200, &[("cache-control", "max-age=60"), ("date", "Fri, 20 Nov 2026 11:59:50 GMT")], Ok(50_000)),
            (200, &[("cache-control", "max-age=60"), ("age", "1.5")], Ok(60_000)),
            (200, &[("expires", "Fri, 20 Nov 2026 12:01:00 GMT"), ("date", NOW)], Ok(60_000)),
            (200, &[("expires", "0"), ("etag", "\"a\"")], Ok(0)),
            (200, &[("last-modified", "Fri, 20 Nov 2026 11:00:00 GMT"), ("date", NOW)], Ok(360_000)),
            (302, &[("last-modified", "Fri, 20 Nov 2026 11:00:00 GMT"), ("date", NOW)], Err(NotStored::Status)),
            (302, &[("cache-control", "max-age=60")], Ok(60_000)),
            (404, &[("cache-control", "max-age=60")], Ok(60_000)),
            (431, &[("cache-control", "max-age=60")], Err(NotStored::Status)),
            (206, &[("cache-control", "max-age=60")], Err(NotStored::Partial)),
            (200, &[("etag", "\"a\"")], Ok(-1)),
            (200, &[], Err(NotStored::NoFreshness)),
            (200, &[("cache-control", "no-store, max-age=60")], Err(NotStored::NoStore)),
            (200, &[("cache-control", "private, max-age=60")], Err(NotStored::Private)),
            (200, &[("cache-control", "max-age=60"), ("vary", "*")], Err(NotStored::VaryStar)),
            (200, &[("cache-control", "max-age=60"), ("vary", "Accept, *")], Err(NotStored::VaryStar)),
        ];
        for (status, lines, expected) in table {
            let found =
                decided(CacheMode::Http, *status, &HeaderMap::new(), &map(lines)).map(|s| s.lifetimes.fresh_for);
            assert_eq!(found, *expected, "{status} {lines:?}");
        }
    }

    #[test]
    fn response_to_authorization_is_stored_only_if_explicitly_allowed() {
        let request_headers = map(&[("authorization", "Bearer x")]);
        let table = [
            ("max-age=60", Err(NotStored::Authorization)),
            ("max-age=60, public", Ok(())),
            ("s-maxage=60", Ok(())),
            ("max-age=60, must-revalidate", Ok(())),
        ];
        for (directives, expected) in table {
            let headers = map(&[("cache-control", directives)]);
            assert_eq!(
                decided(CacheMode::Http, 200, &request_headers, &headers).map(|_| ()),
                expected,
                "{directives}"
            );
        }
    }

    #[test]
    fn must_revalidate_disables_every_stale_window() {
        let headers = map(&[("cache-control", "max-age=1, must-revalidate, stale-if-error=60"), ("etag", "\"a\"")]);
        let stored = decided(CacheMode::Http, 200, &HeaderMap::new(), &headers).expect("stored");
        let Lifetimes { if_error, while_revalidate, disconnected, last_known_good, .. } = stored.lifetimes;
        assert_eq!((if_error, while_revalidate, disconnected, last_known_good), (0, 0, 0, 0));
    }

    #[test]
    fn override_mode_ignores_cache_control_and_drops_set_cookie() {
        let mode = CacheMode::Override { ttl: Duration::from_mins(1), negative_ttl: Some(Duration::from_secs(10)) };
        let table = [
            (200, Ok(60_000)),
            (301, Ok(60_000)),
            (404, Ok(10_000)),
            (302, Err(NotStored::Status)),
            (500, Err(NotStored::Status)),
            (403, Err(NotStored::Status)),
        ];
        let headers = map(&[("cache-control", "no-store, private, max-age=0"), ("set-cookie", "a=b")]);
        for (status, expected) in table {
            let found = decided(mode, status, &map(&[("authorization", "x")]), &headers);
            assert_eq!(found.clone().map(|s| s.lifetimes.fresh_for), expected, "{status}");
            if let Ok(store) = found {
                assert_eq!((store.vary, store.drop), (vec![ACCEPT_ENCODING], vec![SET_COOKIE]));
            }
        }
        let star = map(&[("vary", "*")]);
        assert_eq!(decided(mode, 200, &HeaderMap::new(), &star), Err(NotStored::VaryStar));
    }
}
