//! Fuzzes the HTTP date parser: no panic, and an IMF-fixdate is parsed back to its time.
#![no_main]

use std::time::{Duration, UNIX_EPOCH};

use sidecache::policy::http::date::parse;

libfuzzer_sys::fuzz_target!(|input: (&[u8], u32)| {
    let (text, now) = input;
    let now = UNIX_EPOCH + Duration::from_secs(u64::from(now));
    let _ = parse(text, now);
    assert_eq!(parse(httpdate::fmt_http_date(now).as_bytes(), now), Some(now));
});
