//! Fuzzes cache keys: two requests have the same key if and only if their keyed parts are equal.
#![no_main]

use http::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue};
use sidecache::policy::routing::cache_key::{KeyParts, KeySecret, KeySpec};
use sidecache::policy::invalidation::tag::UpstreamId;

type Input<'a> = (&'a str, Option<&'a str>, Option<&'a str>, Vec<&'a [u8]>, Vec<&'a [u8]>);

fn headers(accept: &[&[u8]], tokens: &[&[u8]]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in [(ACCEPT, accept), (AUTHORIZATION, tokens)] {
        for value in values.iter().filter_map(|value| HeaderValue::from_bytes(value).ok()) {
            headers.append(name.clone(), value);
        }
    }
    headers
}

libfuzzer_sys::fuzz_target!(|input: (Input<'_>, Input<'_>)| {
    let plan = KeySpec { headers: vec![ACCEPT], credentials: vec![AUTHORIZATION].into(), ..KeySpec::default() };
    let parts = |input: &Input<'_>| headers(&input.3, &input.4);
    let (a, b) = (parts(&input.0), parts(&input.1));
    let key = |input: &Input<'_>, headers: &HeaderMap| {
        let authority = input.2.filter(|authority| !authority.is_empty());
        let parts = KeyParts { upstream: UpstreamId(1), authority, path: input.0, query: input.1, headers };
        plan.cache_key(&KeySecret([7; 32]), &parts).ok()
    };
    let same = |name| a.get_all(&name).iter().eq(b.get_all(&name).iter());
    let (x, y) = (&input.0, &input.1);
    let authority = |input: &Input<'_>| input.2.unwrap_or_default().to_owned();
    let equal = x.0 == y.0 && x.1 == y.1 && authority(x) == authority(y) && same(ACCEPT) && same(AUTHORIZATION);
    if let (Some(k), Some(l)) = (key(x, &a), key(y, &b)) {
        assert_eq!(equal, k == l);
    }
});
