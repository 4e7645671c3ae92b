//! Incomplete responses: the first part of a body, and its completion by a range request (RFC 9111 §3.3, §3.4).

use std::sync::Arc;

use http::StatusCode;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE};

use super::conditional::freshen_head;
use crate::policy::entry::Entry;

/// A stored response with the first bytes of a representation.
#[derive(Debug)]
pub struct IncompleteResponse {
    /// The 206 response with the first bytes.
    pub start: Arc<Entry>,
    /// The complete length of the representation, in bytes.
    pub length: u64,
}

/// Parses `Content-Range`: the offset of the first byte, the offset after the last byte, and the complete length
/// (RFC 9110 §14.4).
fn content_range(headers: &HeaderMap) -> Option<(u64, u64, u64)> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, length) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse::<u64>().ok()?.checked_add(1)?, length.parse().ok()?))
}

/// Returns the number of bytes in a 206 and the complete length, if the part is the first but not the whole.
pub fn is_first_part(status: StatusCode, headers: &HeaderMap) -> Option<(u64, u64)> {
    let (first, end, length) = content_range(headers).filter(|_| status == StatusCode::PARTIAL_CONTENT)?;
    (first == 0 && end < length).then_some((end, length))
}

impl IncompleteResponse {
    /// Turns the request into a range request for the remaining bytes, with `If-Range` if there is a strong validator.
    pub fn ask_for_rest(&self, request: &mut HeaderMap) {
        if let Ok(range) = HeaderValue::try_from(format!("bytes={}-", self.start.body.len())) {
            request.insert(RANGE, range);
        }
        if let Some(etag) = self.strong_etag() {
            request.insert(IF_RANGE, etag);
        }
    }

    /// Returns the header fields of the complete response, if this response has the remaining bytes of the same
    /// representation: both have the same strong validator (RFC 9110 §15.3.7.3).
    pub fn completed(&self, status: StatusCode, headers: &HeaderMap) -> Option<HeaderMap> {
        let (first, end, length) = content_range(headers).filter(|_| status == StatusCode::PARTIAL_CONTENT)?;
        let same = self.strong_etag().is_some_and(|etag| headers.get(ETAG) == Some(&etag));
        // The number of received body bytes is checked against Content-Length.
        let announced = headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse() == Ok(length.saturating_sub(first));
        let rest = first == self.start.body.len() as u64 && end == length && length == self.length;
        if !same || !announced || !rest {
            return None;
        }
        let mut whole = freshen_head(&self.start.head.headers(), headers);
        whole.remove(CONTENT_RANGE);
        whole.insert(CONTENT_LENGTH, HeaderValue::from(length));
        Some(whole)
    }

    fn strong_etag(&self) -> Option<HeaderValue> {
        let etag = self.start.head.get(&ETAG).filter(|etag| etag.starts_with(b"\""))?;
        HeaderValue::from_bytes(etag).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::entry::Lifetimes;
    use crate::policy::entry::testing::entry;
    use crate::policy::packed_head::PackedHead;
    use http::header::HeaderName;

    fn map(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        HeaderMap::from_iter(lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))))
    }

    fn partial(etag: &'static str) -> IncompleteResponse {
        let head = map(&[("etag", etag), ("content-range", "bytes 0-3/10"), ("x-a", "old")]);
        let mut start = entry(Lifetimes::default());
        start.head = PackedHead::new(StatusCode::PARTIAL_CONTENT, &head, None, Vec::new());
        IncompleteResponse { start: Arc::new(start), length: 10 }
    }

    #[test]
    fn incomplete_response_is_completed_by_the_matching_range() {
        let partial = partial("\"1\"");
        let mut request = HeaderMap::new();
        partial.ask_for_rest(&mut request);
        assert_eq!(request, map(&[("range", "bytes=4-"), ("if-range", "\"1\"")]));
        let rest =
            map(&[("etag", "\"1\""), ("content-range", "bytes 4-9/10"), ("content-length", "6"), ("x-a", "new")]);
        let whole = partial.completed(StatusCode::PARTIAL_CONTENT, &rest).expect("it fits");
        assert_eq!(whole.get("content-length").map(HeaderValue::as_bytes), Some(&b"10"[..]));
        assert_eq!(whole.get("x-a").map(HeaderValue::as_bytes), Some(&b"new"[..]));
        assert!(!whole.contains_key(CONTENT_RANGE));
    }

    #[test]
    fn mismatched_validator_or_range_does_not_complete_a_response() {
        let status = StatusCode::PARTIAL_CONTENT;
        let table = [
            ("\"1\"", "\"2\"", "bytes 4-9/10"),
            ("W/\"1\"", "W/\"1\"", "bytes 4-9/10"),
            ("\"1\"", "\"1\"", "bytes 5-9/10"),
            ("\"1\"", "\"1\"", "bytes 4-8/10"),
            ("\"1\"", "\"1\"", "bytes 4-9/11"),
            ("\"1\"", "\"1\"", "bytes */10"),
            ("\"1\"", "\"1\"", "lines 4-9/10"),
        ];
        for (ours, theirs, range) in table {
            let rest = map(&[("etag", theirs), ("content-range", range), ("content-length", "6")]);
            assert_eq!(partial(ours).completed(status, &rest), None, "{ours} {theirs} {range}");
        }
        let short = map(&[("etag", "\"1\""), ("content-range", "bytes 4-9/10"), ("content-length", "5")]);
        assert_eq!(partial("\"1\"").completed(status, &short), None, "it says that it is shorter");
    }

    #[test]
    fn only_an_incomplete_range_from_byte_zero_is_a_first_part() {
        let of = |range| is_first_part(StatusCode::PARTIAL_CONTENT, &map(&[("content-range", range)]));
        assert_eq!(of("bytes 0-3/10"), Some((4, 10)));
        for other in
            ["bytes 0-18446744073709551615/10", "bytes 1-3/10", "bytes 0-9/10", "bytes 0-3/*", "bytes */10", ""]
        {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
