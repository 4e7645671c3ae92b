//! Fuzzes targeted cache control fields (RFC 9213): no panic.
#![no_main]

use http::header::{HeaderMap, HeaderValue};
use sidecache::policy::http::targeted_cache_control::directives;

libfuzzer_sys::fuzz_target!(|lines: Vec<&[u8]>| {
    let mut headers = HeaderMap::new();
    for (n, line) in lines.iter().enumerate() {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(if n % 3 == 2 { "sidecache-cache-control" } else { "cdn-cache-control" }, value);
        }
    }
    let _ = directives(&headers);
});
