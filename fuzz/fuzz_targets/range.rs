//! Fuzzes Range, If-Range and Content-Range: no panic, and no selected range beyond the end of the body.
#![no_main]

use std::time::UNIX_EPOCH;

use http::header::{CONTENT_RANGE, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use http::StatusCode;
use sidecache::policy::packed_head::PackedHead;
use sidecache::policy::http::incomplete::is_first_part;
use sidecache::policy::http::range::{RangeSelection, select_range};

libfuzzer_sys::fuzz_target!(|input: (&[u8], &[u8], u16)| {
    let (range, condition, length) = input;
    let (mut request, mut response) = (HeaderMap::new(), HeaderMap::new());
    if let Ok(value) = HeaderValue::from_bytes(range) {
        request.insert(RANGE, value.clone());
        response.insert(CONTENT_RANGE, value);
    }
    if !condition.is_empty()
        && let Ok(value) = HeaderValue::from_bytes(condition)
    {
        request.insert(IF_RANGE, value);
    }
    let head = PackedHead::new(StatusCode::OK, &HeaderMap::new(), None, Vec::new());
    let length = usize::from(length);
    match select_range(&request, &head, length, || UNIX_EPOCH) {
        RangeSelection::Whole | RangeSelection::Nowhere => {}
        RangeSelection::One(range) => assert!(range.start < range.end && range.end <= length),
        RangeSelection::Several(ranges) => assert!(ranges.iter().all(|range| range.start < range.end && range.end <= length)),
    }
    let _ = is_first_part(StatusCode::PARTIAL_CONTENT, &response);
});
