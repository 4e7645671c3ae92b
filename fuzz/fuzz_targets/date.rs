//! Any bytes as an HTTP date: never a panic, and what is written in the usual form is read back.
#![no_main]

use std::time::{Duration, UNIX_EPOCH};

use sidecache::policy::http::date::parse;

libfuzzer_sys::fuzz_target!(|input: (&[u8], u32)| {
    let (text, now) = input;
    let now = UNIX_EPOCH + Duration::from_secs(u64::from(now));
    let _ = parse(text, now);
    assert_eq!(parse(httpdate::fmt_http_date(now).as_bytes(), now), Some(now));
});
