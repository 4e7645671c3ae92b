//! Fuzzes Cache-Control and Pragma of requests and responses: no panic, and no max-age without a digit in the input.
#![no_main]

use http::header::{CACHE_CONTROL, HeaderMap, HeaderValue, PRAGMA};
use sidecache::policy::http::cache_control::CacheControl;

libfuzzer_sys::fuzz_target!(|lines: Vec<&[u8]>| {
    let mut headers = HeaderMap::new();
    for (n, line) in lines.iter().enumerate() {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(if n % 5 == 4 { PRAGMA } else { CACHE_CONTROL }, value);
        }
    }
    let response = CacheControl::of_response(&headers);
    let _ = CacheControl::of_request(&headers);
    if response.max_age.is_some_and(|age| age > 0) {
        let digit = |line: &&[u8]| line.iter().any(u8::is_ascii_digit);
        assert!(lines.iter().any(digit));
    }
});
