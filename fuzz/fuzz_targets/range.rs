//! Any bytes as Range, If-Range and Content-Range: never a panic, and no part beyond the end.
#![no_main]

use std::time::UNIX_EPOCH;

use http::header::{CONTENT_RANGE, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use http::StatusCode;
use sidecache::policy::head::Head;
use sidecache::policy::partial::begins;
use sidecache::policy::ranges::{Part, part};

libfuzzer_sys::fuzz_target!(|input: (&[u8], &[u8], u16)| {
    let (range, condition, length) = input;
    let (mut request, mut answer) = (HeaderMap::new(), HeaderMap::new());
    if let Ok(value) = HeaderValue::from_bytes(range) {
        request.insert(RANGE, value.clone());
        answer.insert(CONTENT_RANGE, value);
    }
    if !condition.is_empty()
        && let Ok(value) = HeaderValue::from_bytes(condition)
    {
        request.insert(IF_RANGE, value);
    }
    let head = Head::new(StatusCode::OK, &HeaderMap::new(), None, Vec::new());
    let length = usize::from(length);
    match part(&request, &head, length, || UNIX_EPOCH) {
        Part::Whole | Part::Nowhere => {}
        Part::One(range) => assert!(range.start < range.end && range.end <= length),
        Part::Several(ranges) => assert!(ranges.iter().all(|range| range.start < range.end && range.end <= length)),
    }
    let _ = begins(StatusCode::PARTIAL_CONTENT, &answer);
});
