//! Conditional requests: those of clients (RFC 9110 §13), and validation of entries upstream (RFC 9111 §4.3).

use std::time::SystemTime;

use http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, IF_MATCH,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LAST_MODIFIED, RANGE,
};
use http::{Method, StatusCode};

use super::date;
use super::list_field::members;
use crate::policy::packed_head::PackedHead;

/// Removes the client's conditions and `Range` from a request that the cache sends upstream, and adds conditions with
/// the validators of the stored response.
pub fn set_conditions(request: &mut HeaderMap, stored: Option<&HeaderMap>) {
    for name in [IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_MATCH, IF_UNMODIFIED_SINCE, IF_RANGE, RANGE] {
        request.remove(name);
    }
    let Some(stored) = stored else { return };
    if let Some(etag) = stored.get(ETAG) {
        request.insert(IF_NONE_MATCH, etag.clone());
    }
    if let Some(modified) = stored.get(LAST_MODIFIED) {
        request.insert(IF_MODIFIED_SINCE, modified.clone());
    }
}

/// Returns true if the response to the client may be a 304.
///
/// `If-Modified-Since` is evaluated only if there is no `If-None-Match` (RFC 9110 §13.2.2).
pub fn not_modified(
    method: &Method,
    request: &HeaderMap,
    head: &PackedHead,
    now: impl FnOnce() -> SystemTime,
) -> bool {
    if head.status != StatusCode::OK || (*method != Method::GET && *method != Method::HEAD) {
        return false;
    }
    if request.contains_key(IF_NONE_MATCH) {
        return head.get(&ETAG).is_some_and(|etag| none_match_fails(request, etag));
    }
    let Some(since) = request.get(IF_MODIFIED_SINCE) else { return false };
    let now = now();
    let date = |value: &[u8]| date::parse(value, now);
    match (head.get(&LAST_MODIFIED).and_then(date), date(since.as_bytes())) {
        (Some(modified), Some(since)) => modified <= since,
        (None, _) | (_, None) => false,
    }
}

/// Returns true if `If-None-Match` has a member that matches `etag` by weak comparison (RFC 9110 §8.8.3.2, §13.1.2).
fn none_match_fails(request: &HeaderMap, etag: &[u8]) -> bool {
    let opaque = |tag: &[u8]| tag.strip_prefix(b"W/").unwrap_or(tag).to_vec();
    let stored = opaque(etag);
    let mut tags = request.get_all(IF_NONE_MATCH).iter().flat_map(|value| members(value.as_bytes(), false));
    tags.any(|tag| tag == b"*" || opaque(tag) == stored)
}

/// Removes the fields that describe the body, which a 304 to a client does not have (RFC 9110 §15.4.5).
pub fn strip_content_fields(headers: &mut HeaderMap) {
    for name in [CONTENT_LENGTH, CONTENT_TYPE, CONTENT_ENCODING] {
        headers.remove(name);
    }
}

/// Returns true if a 304 is about another representation than the stored one: both have strong validators, which differ
/// (RFC 9111 §4.3.4).
pub fn is_other_representation(stored: &HeaderMap, received: &HeaderMap) -> bool {
    let strong = |headers: &HeaderMap| headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/")).cloned();
    matches!((strong(stored), strong(received)), (Some(ours), Some(theirs)) if ours != theirs)
}

/// The result of comparing the response to a HEAD request with a stored response (RFC 9111 §4.3.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadComparison {
    /// Both are of the same representation.
    Same,
    /// They are of different representations.
    Another,
    /// The response to HEAD has no validator, or the same validators but a different length.
    Unknown,
}

/// Compares the response to a HEAD request with a stored response whose body has `length` bytes.
pub fn compare_head(stored: &HeaderMap, length: usize, received: &HeaderMap) -> HeadComparison {
    let validators =
        [ETAG, LAST_MODIFIED].into_iter().filter_map(|name| Some((received.get(&name)?, stored.get(&name))));
    let (mut same, mut another) = (false, false);
    for (theirs, ours) in validators {
        same |= ours == Some(theirs);
        another |= ours != Some(theirs);
    }
    // Many origins respond to HEAD with Content-Length: 0, so a different length alone proves nothing.
    let as_long =
        received.get(CONTENT_LENGTH).is_none_or(|stated| stated.as_bytes() == length.to_string().as_bytes());
    match (same, another) {
        (_, true) => HeadComparison::Another,
        (true, false) if as_long => HeadComparison::Same,
        (true | false, false) => HeadComparison::Unknown,
    }
}

/// Returns the stored head updated by the upstream's 304: the 304's fields replace the stored ones, except those that
/// describe the stored body (RFC 9111 §3.2).
pub fn freshen_head(stored: &HeaderMap, received: &HeaderMap) -> HeaderMap {
    const KEPT: [HeaderName; 4] =
        [CONTENT_LENGTH, CONTENT_ENCODING, CONTENT_RANGE, HeaderName::from_static("content-md5")];
    let mut merged = stored.clone();
    merged.remove(DATE);
    for name in received.keys().filter(|name| !KEPT.contains(name)) {
        merged.remove(name);
        for value in received.get_all(name) {
            merged.append(name, value.clone());
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn map(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        HeaderMap::from_iter(lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))))
    }

    #[test]
    fn not_modified_depends_on_if_none_match_then_if_modified_since() {
        let stored = [("etag", "W/\"a,b\""), ("last-modified", "Fri, 20 Nov 2026 12:00:00 GMT")];
        let head = PackedHead::new(StatusCode::OK, &map(&stored), None, Vec::new());
        let table: &[(&[(&'static str, &'static str)], bool)] = &[
            (&[("if-none-match", "\"a,b\"")], true),
            (&[("if-none-match", "\"x\", W/\"a,b\"")], true),
            (&[("if-none-match", "*")], true),
            (&[("if-none-match", "\"x\"")], false),
            (&[("if-none-match", "\"x\""), ("if-modified-since", "Fri, 20 Nov 2026 12:00:00 GMT")], false),
            (&[("if-modified-since", "Fri, 20 Nov 2026 12:00:00 GMT")], true),
            (&[("if-modified-since", "Fri, 20 Nov 2026 11:59:59 GMT")], false),
            (&[("if-modified-since", "nonsense")], false),
            (&[], false),
        ];
        for (lines, expected) in table {
            assert_eq!(
                not_modified(&Method::GET, &map(lines), &head, || SystemTime::UNIX_EPOCH),
                *expected,
                "{lines:?}"
            );
        }
    }

    #[test]
    fn not_modified_response_updates_stored_fields_except_content_length() {
        let stored = map(&[("x-a", "old"), ("x-b", "kept"), ("content-length", "4"), ("etag", "\"1\"")]);
        let merged =
            freshen_head(&stored, &map(&[("x-a", "new"), ("content-length", "0"), ("cache-control", "max-age=9")]));
        let expected = [
            ("x-a", "new"),
            ("x-b", "kept"),
            ("content-length", "4"),
            ("etag", "\"1\""),
            ("cache-control", "max-age=9"),
        ];
        assert_eq!(merged, map(&expected));
    }

    #[test]
    fn head_response_is_compared_by_validators_and_content_length() {
        let stored = map(&[("etag", "\"1\""), ("last-modified", "Fri, 20 Nov 2026 12:00:00 GMT")]);
        let table: &[(&[(&'static str, &'static str)], HeadComparison)] = &[
            (&[], HeadComparison::Unknown),
            (&[("content-length", "4")], HeadComparison::Unknown),
            (&[("etag", "\"1\""), ("content-length", "4")], HeadComparison::Same),
            (&[("etag", "\"1\""), ("content-length", "0")], HeadComparison::Unknown),
            (&[("etag", "\"2\"")], HeadComparison::Another),
            (&[("etag", "\"1\""), ("last-modified", "Fri, 20 Nov 2026 12:00:01 GMT")], HeadComparison::Another),
        ];
        for (received, expected) in table {
            assert_eq!(compare_head(&stored, 4, &map(received)), *expected, "{received:?}");
        }
    }

    #[test]
    fn stored_validators_replace_the_conditions_of_the_client() {
        let mut request = map(&[("if-none-match", "\"client\""), ("if-range", "\"x\"")]);
        set_conditions(&mut request, Some(&map(&[("etag", "\"1\"")])));
        assert_eq!(request, map(&[("if-none-match", "\"1\"")]));
    }
}
