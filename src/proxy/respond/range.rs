//! Range responses from stored entries: 206, 416 (RFC 9110 §14, §15.3.7).

use std::time::SystemTime;

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, EXPIRES, HeaderMap, HeaderValue,
};
use http::{Response, StatusCode};

use crate::body::Body;
use crate::policy::entry::Entry;
use crate::policy::http::range::{RangeSelection, content_range, multipart, select_range};

/// Reduces the complete response of an entry to what the `Range` of a request selects.
pub(super) fn apply(
    response: &mut Response<Body>,
    request: &HeaderMap,
    entry: &Entry,
    now: impl FnOnce() -> SystemTime,
) {
    let length = entry.body.len();
    let (status, body, field, value) = match select_range(request, &entry.head, length, now) {
        RangeSelection::Whole => return,
        RangeSelection::One(range) => {
            let value = content_range(&range, length);
            (StatusCode::PARTIAL_CONTENT, entry.body.slice(range), CONTENT_RANGE, value)
        }
        RangeSelection::Several(ranges) => {
            let boundary = format!("sidecache-{}", entry.key_name.as_str());
            let Some(body) = multipart(&entry.head, &entry.body, &ranges, &boundary) else { return };
            (StatusCode::PARTIAL_CONTENT, body, CONTENT_TYPE, format!("multipart/byteranges; boundary={boundary}"))
        }
        RangeSelection::Unsatisfiable => {
            // These fields describe the whole representation.
            for name in [CACHE_CONTROL, EXPIRES, CONTENT_TYPE, CONTENT_ENCODING] {
                response.headers_mut().remove(name);
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Bytes::new(), CONTENT_RANGE, format!("bytes */{length}"))
        }
    };
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(field, value);
    }
    *response.body_mut() = Body::Full(body);
}
