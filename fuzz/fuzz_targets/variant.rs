//! Fuzzes variant selection: two requests select the same variant if and only if their variants have the same digest.
#![no_main]

use http::header::{ACCEPT_LANGUAGE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use sidecache::policy::http::vary::Variant;

const NAMES: [HeaderName; 3] = [ACCEPT_LANGUAGE, USER_AGENT, HeaderName::from_static("x-list")];

fn request(lines: &[(u8, &[u8])]) -> HeaderMap {
    lines.iter().fold(HeaderMap::new(), |mut headers, (which, line)| {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(&NAMES[usize::from(*which) % NAMES.len()], value);
        }
        headers
    })
}

libfuzzer_sys::fuzz_target!(|input: (Vec<(u8, &[u8])>, Vec<(u8, &[u8])>)| {
    let (one, other) = (request(&input.0), request(&input.1));
    let (a, b) = (Variant::of(NAMES.to_vec(), &one), Variant::of(NAMES.to_vec(), &other));
    assert_eq!(a.selected_by(&other), a.digest() == b.digest());
    assert_eq!(a == b, b.selected_by(&one));
});
