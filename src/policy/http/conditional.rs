//! Conditional requests, in both directions: asked by a client of us (RFC 9110 §13), and by us of the
//! upstream (RFC 9111 §4.3).

use std::time::SystemTime;

use http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, IF_MATCH,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LAST_MODIFIED, RANGE,
};
use http::{Method, StatusCode};

use super::date;
use super::list_field::members;
use crate::policy::packed_head::PackedHead;

/// Takes the client's own conditions, and a wish for a part, off a request that the cache makes for itself, and puts
/// in the conditions of what is stored.
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

/// Would a 304 do for this client? `If-None-Match` first, `If-Modified-Since` only without it:
/// RFC 9110 §13.2.2.
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

/// Weak comparison with each member: RFC 9110 §8.8.3.2, §13.1.2.
fn none_match_fails(request: &HeaderMap, etag: &[u8]) -> bool {
    let opaque = |tag: &[u8]| tag.strip_prefix(b"W/").unwrap_or(tag).to_vec();
    let stored = opaque(etag);
    let mut tags = request.get_all(IF_NONE_MATCH).iter().flat_map(|value| members(value.as_bytes(), false));
    tags.any(|tag| tag == b"*" || opaque(tag) == stored)
}

/// The fields of a 304 to a client: RFC 9110 §15.4.5. Everything but what describes the body that is not sent.
pub fn strip_content_fields(headers: &mut HeaderMap) {
    for name in [CONTENT_LENGTH, CONTENT_TYPE, CONTENT_ENCODING] {
        headers.remove(name);
    }
}

/// Does a 304 speak of another representation than the stored one? Both name strong validators, and they differ
/// (RFC 9111 §4.3.4).
pub fn is_other_representation(stored: &HeaderMap, answered: &HeaderMap) -> bool {
    let strong = |headers: &HeaderMap| headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/")).cloned();
    matches!((strong(stored), strong(answered)), (Some(ours), Some(theirs)) if ours != theirs)
}

/// What the answer to a HEAD says of what is stored, by its validators (RFC 9111 §4.3.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadComparison {
    /// It is of the same representation.
    Same,
    /// Of another.
    Another,
    /// It has no validator, or says nothing that could be compared.
    Unknown,
}

/// Is the answer to a HEAD about what is stored?
pub fn compare_head(stored: &HeaderMap, length: usize, answered: &HeaderMap) -> HeadComparison {
    let said = [ETAG, LAST_MODIFIED].into_iter().filter_map(|name| Some((answered.get(&name)?, stored.get(&name))));
    let (mut same, mut another) = (false, false);
    for (theirs, ours) in said {
        same |= ours == Some(theirs);
        another |= ours != Some(theirs);
    }
    // Many answer a HEAD with a length of 0: that alone says nothing.
    let as_long = answered.get(CONTENT_LENGTH).is_none_or(|said| said.as_bytes() == length.to_string().as_bytes());
    match (same, another) {
        (_, true) => HeadComparison::Another,
        (true, false) if as_long => HeadComparison::Same,
        (true | false, false) => HeadComparison::Unknown,
    }
}

/// The stored head after the upstream's 304: its fields replace ours, but those that describe the stored
/// bytes stay (RFC 9111 §3.2).
pub fn freshen_head(stored: &HeaderMap, answered: &HeaderMap) -> HeaderMap {
    const KEPT: [HeaderName; 4] =
        [CONTENT_LENGTH, CONTENT_ENCODING, CONTENT_RANGE, HeaderName::from_static("content-md5")];
    let mut merged = stored.clone();
    merged.remove(DATE);
    for name in answered.keys().filter(|name| !KEPT.contains(name)) {
        merged.remove(name);
        for value in answered.get_all(name) {
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
    fn clients_conditions() {
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
    fn a_304_updates_what_it_names_and_keeps_what_describes_the_bytes() {
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
    fn a_head_is_of_the_same_by_its_validators() {
        let stored = map(&[("etag", "\"1\""), ("last-modified", "Fri, 20 Nov 2026 12:00:00 GMT")]);
        let table: &[(&[(&'static str, &'static str)], HeadComparison)] = &[
            (&[], HeadComparison::Unknown),
            (&[("content-length", "4")], HeadComparison::Unknown),
            (&[("etag", "\"1\""), ("content-length", "4")], HeadComparison::Same),
            (&[("etag", "\"1\""), ("content-length", "0")], HeadComparison::Unknown),
            (&[("etag", "\"2\"")], HeadComparison::Another),
            (&[("etag", "\"1\""), ("last-modified", "Fri, 20 Nov 2026 12:00:01 GMT")], HeadComparison::Another),
        ];
        for (answered, expected) in table {
            assert_eq!(compare_head(&stored, 4, &map(answered)), *expected, "{answered:?}");
        }
    }

    #[test]
    fn our_conditions_replace_the_clients() {
        let mut request = map(&[("if-none-match", "\"client\""), ("if-range", "\"x\"")]);
        set_conditions(&mut request, Some(&map(&[("etag", "\"1\"")])));
        assert_eq!(request, map(&[("if-none-match", "\"1\"")]));
    }
}
