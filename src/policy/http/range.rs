//! Range requests for stored responses: `Range`, `If-Range`, `Content-Range` (RFC 9110 §13.1.5, §14).

use std::ops::Range;
use std::time::{Duration, SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, DATE, ETAG, HeaderMap, IF_RANGE, LAST_MODIFIED, RANGE};
use http::{Method, StatusCode};
use memchr::memmem;

use super::date;
use super::list_field::members;
use crate::policy::packed_head::PackedHead;

/// Maximum number of ranges. A request for more gets the complete response (which RFC 9110 §14.2 allows).
const MAX_RANGES: usize = 16;

/// Maximum total size of several parts, which are copied into a body for this one client, in bytes.
const MAX_MULTIPART_BYTES: usize = 256 << 10;

/// The part of a stored response that a request gets. Offsets are in bytes, and ends are exclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RangeSelection {
    /// The complete response, with its own status.
    Whole,
    /// One part: 206.
    One(Range<usize>),
    /// Several parts: 206 with `multipart/byteranges`.
    Several(Vec<Range<usize>>),
    /// No range is satisfiable: 416.
    Unsatisfiable,
}

/// Returns true if this is a range request: a GET with `Range`.
pub fn has_range(method: &Method, request: &HeaderMap) -> bool {
    *method == Method::GET && request.contains_key(RANGE)
}

/// Returns the part of a stored response of `length` bytes that a GET request gets.
pub fn select_range(
    request: &HeaderMap,
    head: &PackedHead,
    length: usize,
    now: impl FnOnce() -> SystemTime,
) -> RangeSelection {
    let mut lines = request.get_all(RANGE).iter();
    let (Some(range), None) = (lines.next(), lines.next()) else { return RangeSelection::Whole };
    if head.status != StatusCode::OK || !if_range_matches(request, head, now) {
        return RangeSelection::Whole;
    }
    let Some(ranges) = parse(range.as_bytes(), length) else { return RangeSelection::Whole };
    let requested: usize = ranges.iter().map(Range::len).sum();
    match &ranges[..] {
        [] => RangeSelection::Unsatisfiable,
        [one] => RangeSelection::One(one.clone()),
        // Overlapping ranges that add up to more than the response only cost work.
        _ if ranges.len() > MAX_RANGES || requested > length.min(MAX_MULTIPART_BYTES) => RangeSelection::Whole,
        _ => RangeSelection::Several(ranges),
    }
}

/// Returns true if `If-Range` is absent or matches the stored response by strong comparison (RFC 9110 §13.1.5).
fn if_range_matches(request: &HeaderMap, head: &PackedHead, now: impl FnOnce() -> SystemTime) -> bool {
    let Some(condition) = request.get(IF_RANGE).map(http::HeaderValue::as_bytes) else { return true };
    if condition.starts_with(b"\"") {
        return head.get(&ETAG) == Some(condition);
    }
    let now = now();
    let of = |name| date::parse(head.get(name)?, now);
    // Last-Modified is a strong validator only if Date is at least one second later (RFC 9110 §8.8.2.2).
    match (date::parse(condition, now), of(&LAST_MODIFIED), of(&DATE)) {
        (Some(condition), Some(modified), Some(made)) => {
            condition == modified && made.duration_since(modified).is_ok_and(|age| age >= Duration::from_secs(1))
        }
        _ => false,
    }
}

/// Returns the satisfiable ranges of a `Range` value for `length` bytes, or `None` if it is not a valid byte range set.
fn parse(value: &[u8], length: usize) -> Option<Vec<Range<usize>>> {
    let (unit, set) = value.split_at(value.iter().position(|byte| *byte == b'=')?);
    if !unit.eq_ignore_ascii_case(b"bytes") {
        return None;
    }
    let mut ranges = Vec::new();
    let mut named = false;
    for spec in members(&set[1..], false) {
        named = true;
        let dash = spec.iter().position(|byte| *byte == b'-')?;
        let range = match (&spec[..dash], &spec[dash + 1..]) {
            (b"", suffix) => length.saturating_sub(number(suffix)?)..length,
            (first, b"") => number(first)?..length,
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                if last < first {
                    return None;
                }
                first..length.min(last.saturating_add(1))
            }
        };
        if range.start < range.end {
            ranges.push(range);
        }
    }
    named.then_some(ranges)
}

/// Parses a decimal number, saturating.
fn number(digits: &[u8]) -> Option<usize> {
    let right = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    right.then(|| digits.iter().fold(0usize, |n, d| n.saturating_mul(10).saturating_add(usize::from(d - b'0'))))
}

/// Returns the value of `Content-Range` for a part of a body of `length` bytes.
pub fn content_range(range: &Range<usize>, length: usize) -> String {
    format!("bytes {}-{}/{length}", range.start, range.end.saturating_sub(1))
}

/// Returns the body of a `multipart/byteranges` response (RFC 9110 §14.6) with `boundary` between its parts, or `None`
/// if a part contains the boundary.
pub fn multipart(head: &PackedHead, body: &Bytes, ranges: &[Range<usize>], boundary: &str) -> Option<Bytes> {
    let mut whole = BytesMut::new();
    for range in ranges {
        let part = body.get(range.clone())?;
        if memmem::find(part, boundary.as_bytes()).is_some() {
            return None;
        }
        whole.put_slice(format!("--{boundary}\r\n").as_bytes());
        if let Some(kind) = head.get(&CONTENT_TYPE) {
            whole.put_slice(b"Content-Type: ");
            whole.put_slice(kind);
            whole.put_slice(b"\r\n");
        }
        whole.put_slice(format!("Content-Range: {}\r\n\r\n", content_range(range, body.len())).as_bytes());
        whole.put_slice(part);
        whole.put_slice(b"\r\n");
    }
    whole.put_slice(format!("--{boundary}--\r\n").as_bytes());
    Some(whole.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use http::header::HeaderName;
    use proptest::prelude::*;

    fn map(lines: &[(&'static str, &str)]) -> HeaderMap {
        let line =
            |(n, v): &(&'static str, &str)| (HeaderName::from_static(n), HeaderValue::from_str(v).expect("a value"));
        HeaderMap::from_iter(lines.iter().map(line))
    }

    fn stored() -> PackedHead {
        let lines = [
            ("etag", "\"a\""),
            ("last-modified", "Fri, 20 Nov 2026 12:00:00 GMT"),
            ("date", "Fri, 20 Nov 2026 12:00:01 GMT"),
        ];
        PackedHead::new(StatusCode::OK, &map(&lines), None, Vec::new())
    }

    fn of(lines: &[(&'static str, &str)]) -> RangeSelection {
        select_range(&map(lines), &stored(), 10, || SystemTime::UNIX_EPOCH)
    }

    #[test]
    fn range_selects_bytes_and_an_invalid_range_selects_the_whole_body() {
        let table = [
            ("bytes=0-1", RangeSelection::One(0..2)),
            ("Bytes=0-1", RangeSelection::One(0..2)),
            ("bytes=5-", RangeSelection::One(5..10)),
            ("bytes=-3", RangeSelection::One(7..10)),
            ("bytes=-30", RangeSelection::One(0..10)),
            ("bytes=0-99999999999999999999", RangeSelection::One(0..10)),
            ("bytes=10-", RangeSelection::Unsatisfiable),
            ("bytes=-0", RangeSelection::Unsatisfiable),
            ("bytes=0-0, 20-30", RangeSelection::One(0..1)),
            ("bytes=0-1, -2", RangeSelection::Several(vec![0..2, 8..10])),
            ("bytes=0-8, 1-9", RangeSelection::Whole),
            ("bytes=3-2", RangeSelection::Whole),
            ("bytes=", RangeSelection::Whole),
            ("bytes=-", RangeSelection::Whole),
            ("bytes=a-b", RangeSelection::Whole),
            ("lines=0-1", RangeSelection::Whole),
            ("nonsense", RangeSelection::Whole),
        ];
        for (range, expected) in table {
            assert_eq!(of(&[("range", range)]), expected, "{range}");
        }
        let many = vec!["0-0"; MAX_RANGES + 1].join(",");
        assert_eq!(of(&[("range", &format!("bytes={many}"))]), RangeSelection::Whole);
    }

    #[test]
    fn if_range_mismatch_selects_the_whole_body() {
        let with = |condition| of(&[("range", "bytes=0-1"), ("if-range", condition)]);
        assert_eq!(with("\"a\""), RangeSelection::One(0..2));
        assert_eq!(with("Fri, 20 Nov 2026 12:00:00 GMT"), RangeSelection::One(0..2));
        for other in ["\"b\"", "W/\"a\"", "Fri, 20 Nov 2026 12:00:01 GMT", "nonsense"] {
            assert_eq!(with(other), RangeSelection::Whole, "{other}");
        }
    }

    #[test]
    fn multipart_body_contains_each_selected_range() {
        let head = PackedHead::new(StatusCode::OK, &map(&[("content-type", "text/plain")]), None, Vec::new());
        let body = Bytes::from_static(b"0123456789");
        let made = multipart(&head, &body, &[0..2, 8..10], "b").expect("made");
        let expected = "--b\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-1/10\r\n\r\n01\r\n\
            --b\r\nContent-Type: text/plain\r\nContent-Range: bytes 8-9/10\r\n\r\n89\r\n--b--\r\n";
        assert_eq!(made, expected);
        assert_eq!(multipart(&head, &body, &[0..2, 8..10], "89"), None);
    }

    proptest! {
        #[test]
        fn selected_ranges_are_within_the_body(value in "bytes=[0-9, -]{0,20}", length in 0usize..40) {
            match select_range(&map(&[("range", &value)]), &stored(), length, || SystemTime::UNIX_EPOCH) {
                RangeSelection::Whole | RangeSelection::Unsatisfiable => {}
                RangeSelection::One(range) => prop_assert!(range.start < range.end && range.end <= length),
                RangeSelection::Several(ranges) => {
                    prop_assert!(ranges.iter().all(|range| range.start < range.end && range.end <= length));
                }
            }
        }
    }
}
