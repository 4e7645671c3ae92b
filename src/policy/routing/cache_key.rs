//! Cache keys: credential partition, rule, upstream, authority, path, query and keyed header fields of a request.
//!
//! Each field is length-prefixed, so that ("ab", "c") and ("a", "bc") have different keys.
//!
//! Keys hold the raw path and query in the client's order. Credentials enter only as a keyed digest.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderName};
use smallvec::SmallVec;

use super::key_headers::KeyHeaders;
use super::pattern::Glob;
use super::target::parameters;
use crate::policy::invalidation::tag::{TagTemplate, UpstreamId};
use crate::policy::outcome::BypassReason;

/// The bytes of a cache key. Compared in full in memory; digested for Redis.
pub type CacheKey = SmallVec<[u8; 256]>;

/// Version of the key layout, the first byte of every key: a change of the layout changes every key.
const VERSION: u8 = 2;

/// The secret for credential digests, specific to this deployment or to this process.
#[derive(Clone)]
pub struct KeySecret(pub [u8; 32]);

impl KeySecret {
    /// Derives the digest secret from a deployment's secret.
    pub fn of(secret: &[u8]) -> KeySecret {
        KeySecret(blake3::derive_key("sidecache 2026 credential digests", secret))
    }
}

impl std::fmt::Debug for KeySecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeySecret(…)")
    }
}

/// Which requests share stored responses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Partition {
    /// Only requests with the same credentials share.
    #[default]
    Credential,
    /// All requests share.
    Everyone,
}

/// The components of a rule's cache keys.
#[derive(Debug, Clone, Default)]
pub struct KeySpec {
    /// Digest of the rule. A rule does not use responses stored under another one, because it may be stricter.
    pub rule: [u8; 4],
    /// The query parameters that are part of the key.
    pub query: QueryFilter,
    /// Request header fields that are part of the key, in addition to credentials.
    pub headers: KeyHeaders,
    /// Which requests share stored responses.
    pub partition: Partition,
    /// The header fields that carry credentials.
    pub credentials: Arc<[HeaderName]>,
}

/// Which query parameters are part of the key.
#[derive(Debug, Clone, Default)]
pub enum QueryFilter {
    /// The raw query as received.
    #[default]
    Whole,
    /// The parameters that a rule's list keeps: the last pattern that matches a name decides.
    Filtered(Vec<(bool, Glob)>),
}

/// The parts of a request that its key is made from.
#[derive(Debug, Clone, Copy)]
pub struct KeyParts<'a> {
    /// The upstream.
    pub upstream: UpstreamId,
    /// The authority, for an upstream with several.
    pub authority: Option<&'a str>,
    /// The raw path.
    pub path: &'a str,
    /// The raw query.
    pub query: Option<&'a str>,
    /// All request header fields.
    pub headers: &'a HeaderMap,
}

/// Version of the encoding that [`KeySpec::rule_digest`] digests.
const RULE_VERSION: u8 = 2;

impl KeySpec {
    /// Returns the digest that identifies a rule in keys: of its name, its tags, and the components of its keys.
    ///
    /// The digest is the first four bytes of the BLAKE3 digest of an explicit encoding: a version byte, then
    /// length-prefixed fields. It does not depend on names in the code, so that keys in Redis survive a refactoring.
    pub fn rule_digest(&self, name: &str, tags: &[TagTemplate]) -> [u8; 4] {
        let mut encoded = CacheKey::new();
        encoded.push(RULE_VERSION);
        push_field(&mut encoded, name.as_bytes());
        for tag in tags {
            push_field(&mut encoded, tag.to_string().as_bytes());
        }
        encoded.push(0xff);
        match &self.query {
            QueryFilter::Whole => encoded.push(b'w'),
            QueryFilter::Filtered(patterns) => {
                encoded.push(b'f');
                for (keep, glob) in patterns {
                    push_field(&mut encoded, format!("{}{glob}", if *keep { '+' } else { '-' }).as_bytes());
                }
                encoded.push(0xff);
            }
        }
        let (kind, headers) = match &self.headers {
            KeyHeaders::Listed(names) => (b'l', names),
            KeyHeaders::AllBut(names) => (b'a', names),
        };
        encoded.push(kind);
        for names in [&headers[..], &self.credentials[..]] {
            for name in names {
                push_field(&mut encoded, name.as_str().as_bytes());
            }
            encoded.push(0xff);
        }
        encoded.push(match self.partition {
            Partition::Credential => b'c',
            Partition::Everyone => b'e',
        });
        let mut digest = [0; 4];
        digest.copy_from_slice(&blake3::hash(&encoded).as_bytes()[..4]);
        digest
    }

    /// Returns the key of a request, or the reason why the request must bypass the cache.
    pub fn cache_key(&self, secret: &KeySecret, parts: &KeyParts<'_>) -> Result<CacheKey, BypassReason> {
        let mut key = CacheKey::new();
        key.push(VERSION);
        self.partition_prefix(secret, parts.headers, &mut key)?;
        let mut which = [0; 12];
        which[..4].copy_from_slice(&self.rule);
        which[4..].copy_from_slice(&parts.upstream.0.to_be_bytes());
        key.extend_from_slice(&which);
        push_field(&mut key, parts.authority.unwrap_or_default().as_bytes());
        push_field(&mut key, parts.path.as_bytes());
        self.query(parts.query, &mut key);
        self.headers.push(parts.headers, &self.credentials, secret, &mut key);
        Ok(key)
    }

    /// Returns true if a request header field of this name carries a credential, or seems to.
    pub fn is_credential(&self, name: &HeaderName) -> bool {
        self.credentials.contains(name) || looks_like_credential(name.as_str())
    }

    fn partition_prefix(
        &self,
        secret: &KeySecret,
        headers: &HeaderMap,
        key: &mut CacheKey,
    ) -> Result<(), BypassReason> {
        if self.partition == Partition::Everyone {
            key.push(b'e');
            return Ok(());
        }
        let mut held: SmallVec<[&HeaderName; 4]> = SmallVec::new();
        for name in headers.keys() {
            if self.credentials.contains(name) {
                held.push(name);
            } else if looks_like_credential(name.as_str()) {
                match &self.headers {
                    KeyHeaders::Listed(names) if names.contains(name) => {}
                    KeyHeaders::Listed(_) => return Err(BypassReason::UnkeyedCredential),
                    KeyHeaders::AllBut(ignored) if ignored.contains(name) => {}
                    KeyHeaders::AllBut(_) => held.push(name),
                }
            }
        }
        if held.is_empty() {
            key.push(b'n');
            return Ok(());
        }
        held.sort_unstable_by_key(|name| name.as_str());
        let mut digest = blake3::Hasher::new_keyed(&secret.0);
        for name in held {
            for value in headers.get_all(name) {
                for part in [name.as_str().as_bytes(), value.as_bytes()] {
                    digest.update(&(part.len() as u64).to_be_bytes());
                    digest.update(part);
                }
            }
        }
        key.push(b'c');
        key.extend_from_slice(digest.finalize().as_bytes());
        Ok(())
    }

    fn query(&self, query: Option<&str>, key: &mut CacheKey) {
        match &self.query {
            QueryFilter::Whole => {
                key.push(u8::from(query.is_some()));
                push_field(key, query.unwrap_or_default().as_bytes());
            }
            QueryFilter::Filtered(patterns) => {
                for (name, value) in parameters(query).filter(|(name, _)| is_keyed(patterns, name)) {
                    push_field(key, name.as_bytes());
                    key.push(u8::from(value.is_some()));
                    push_field(key, value.unwrap_or_default().as_bytes());
                }
                key.push(0xff);
            }
        }
    }
}

fn is_keyed(patterns: &[(bool, Glob)], name: &str) -> bool {
    patterns.iter().rev().find(|(_, glob)| glob.matches(name.as_bytes())).is_some_and(|(keep, _)| *keep)
}

/// Appends a length-prefixed field. The length never starts with 0xff, which terminates lists.
pub(super) fn push_field(key: &mut CacheKey, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX >> 1);
    key.extend_from_slice(&length.to_be_bytes());
    key.extend_from_slice(bytes);
}

/// Returns true if a word of a header name suggests a credential, whether or not the name is configured.
pub fn looks_like_credential(name: &str) -> bool {
    const WORDS: [&str; 18] = [
        "token",
        "key",
        "secret",
        "auth",
        "authorization",
        "authentication",
        "session",
        "sessionid",
        "sid",
        "signature",
        "jwt",
        "credential",
        "credentials",
        "cookie",
        "password",
        "apikey",
        "authtoken",
        "accesstoken",
    ];
    // Fast path: header names of nearly every request that are never credentials.
    const PLAIN: [&str; 8] = [
        "host",
        "accept",
        "user-agent",
        "connection",
        "accept-encoding",
        "accept-language",
        "content-type",
        "cache-control",
    ];
    const HARMLESS: [&str; 3] = ["idempotency-key", "sec-websocket-key", "surrogate-key"];
    !PLAIN.contains(&name) && name.split(['-', '_']).any(|part| WORDS.contains(&part)) && !HARMLESS.contains(&name)
}

/// Returns true if entries under this key belong to a credential.
pub fn is_private(key: &[u8]) -> bool {
    key.get(1) == Some(&b'c')
}

/// Returns a short public name of a key, as shown in `Cache-Status: …; key=`: 64 bits of its BLAKE3 digest, in hex.
pub fn short_name(key: &[u8]) -> KeyName {
    KeyName::from_hex(blake3::hash(key).to_hex().as_str())
}

/// A short public name of a key: 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyName([u8; 16]);

impl KeyName {
    /// Takes the first 16 of these digits.
    pub fn from_hex(digits: &str) -> KeyName {
        KeyName(digits.as_bytes().first_chunk().copied().unwrap_or_default())
    }

    /// Returns the digits.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::hex;
    use http::HeaderValue;
    use http::header::{ACCEPT, AUTHORIZATION, COOKIE};
    use proptest::prelude::*;

    const SECRET: KeySecret = KeySecret([7; 32]);

    fn key_spec() -> KeySpec {
        KeySpec { credentials: [AUTHORIZATION].into(), ..KeySpec::default() }
    }

    fn parts<'a>(path: &'a str, query: Option<&'a str>, headers: &'a HeaderMap) -> KeyParts<'a> {
        KeyParts { upstream: UpstreamId(0), authority: None, path, query, headers }
    }

    fn with(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn credential_headers_partition_keys_and_unkeyed_credentials_bypass() {
        let key = |headers: &HeaderMap| key_spec().cache_key(&SECRET, &parts("/", None, headers));
        let none = key(&HeaderMap::new());
        assert_ne!(none, key(&with("authorization", "a")));
        assert_ne!(key(&with("authorization", "a")), key(&with("authorization", "b")));
        assert_eq!(none, key(&with("user-agent", "x")));
        for smelling in ["x-foo-token", "x-apikey", "api_key", "x-jwt", "x-session-id", "x-auth"] {
            assert_eq!(key(&with(smelling, "x")), Err(BypassReason::UnkeyedCredential), "{smelling}");
        }
        for harmless in ["x-author", "x-keyboard", "idempotency-key", "x-request-id"] {
            assert_eq!(key(&with(harmless, "x")), none, "{harmless}");
        }
        let everyone = KeySpec { partition: Partition::Everyone, ..key_spec() };
        let shared = |headers: &HeaderMap| everyone.cache_key(&SECRET, &parts("/", None, headers));
        assert_eq!(shared(&with("authorization", "a")), shared(&with("x-foo-token", "b")));
    }

    // Running fleets have keys in Redis. A difference here gives every fleet a cold cache: change the version byte, and
    // record it in the changelog.
    #[test]
    fn cache_key_encoding_matches_the_golden_values() {
        let headers = HeaderMap::from_iter([
            (AUTHORIZATION, HeaderValue::from_static("Bearer a")),
            (ACCEPT, HeaderValue::from_static("text/html")),
        ]);
        let filter = QueryFilter::Filtered(vec![(true, Glob::new("*")), (false, Glob::new("utm_*"))]);
        let key_spec =
            KeySpec { rule: [1, 2, 3, 4], query: filter, headers: KeyHeaders::Listed(vec![ACCEPT]), ..key_spec() };
        let parts = KeyParts { authority: Some("a.example"), ..parts("/p", Some("a=1&utm_source=x&b"), &headers) };
        let key = key_spec.cache_key(&SECRET, &parts).expect("a key");
        assert_eq!(
            hex(&key),
            "0263b1ec7c7d3d898b048eb7c73accb854c72b2155343766f4dcd8bec136720f951601020304000000000000000000000009612e6578616d706c65000000022f70000000016101000000013100000001620000000000ff0100000009746578742f68746d6cff"
        );
        assert_eq!(short_name(&key).as_str(), "7ab6b2610ec19f4e");
    }

    #[test]
    fn rule_digest_matches_the_golden_values() {
        let path = super::super::pattern::PathPattern::parse("/p/{id}.json").expect("a pattern");
        let tags = ["products", "product:{id}"].map(|tag| TagTemplate::parse(tag, &path).expect("a tag"));
        let filter = QueryFilter::Filtered(vec![(true, Glob::new("*")), (false, Glob::new("utm_*"))]);
        let filtered = KeySpec { query: filter, headers: KeyHeaders::Listed(vec![ACCEPT]), ..key_spec() };
        assert_eq!(hex(&key_spec().rule_digest("product", &tags)), "b1218344");
        assert_eq!(hex(&filtered.rule_digest("product", &tags)), "75662f8a");
        let everyone = KeySpec { partition: Partition::Everyone, ..key_spec() };
        assert_eq!(hex(&everyone.rule_digest("product", &[])), "c0e7471e");
    }

    #[test]
    fn rule_digest_differs_for_each_part_of_a_rule() {
        let path = super::super::pattern::PathPattern::parse("/p/{a}/{b}").expect("a pattern");
        let tag = |text: &str| TagTemplate::parse(text, &path).expect("a tag");
        let digests = [
            key_spec().rule_digest("p", &[]),
            key_spec().rule_digest("q", &[]),
            key_spec().rule_digest("p", &[tag("x{a}")]),
            key_spec().rule_digest("p", &[tag("x{b}")]),
            key_spec().rule_digest("p", &[tag("x"), tag("y")]),
            KeySpec { headers: KeyHeaders::Listed(vec![ACCEPT]), ..key_spec() }.rule_digest("p", &[]),
            KeySpec { headers: KeyHeaders::AllBut(vec![ACCEPT]), ..key_spec() }.rule_digest("p", &[]),
            KeySpec { credentials: [ACCEPT].into(), ..key_spec() }.rule_digest("p", &[]),
            KeySpec { partition: Partition::Everyone, ..key_spec() }.rule_digest("p", &[]),
            KeySpec { query: QueryFilter::Filtered(vec![(true, Glob::new("a"))]), ..key_spec() }
                .rule_digest("p", &[]),
            KeySpec { query: QueryFilter::Filtered(vec![(false, Glob::new("a"))]), ..key_spec() }
                .rule_digest("p", &[]),
        ];
        let distinct: std::collections::HashSet<_> = digests.iter().collect();
        assert_eq!(distinct.len(), digests.len());
    }

    #[test]
    fn credential_value_does_not_appear_in_the_cache_key() {
        let headers = with("authorization", "Bearer canary");
        let key = key_spec().cache_key(&SECRET, &parts("/", None, &headers)).expect("a key");
        assert!(!key.windows(6).any(|w| w == b"canary"));
    }

    #[test]
    fn query_filter_removes_only_the_excluded_parameters() {
        let filter = QueryFilter::Filtered(vec![(true, Glob::new("*")), (false, Glob::new("utm_*"))]);
        let key_spec = KeySpec { query: filter, ..KeySpec::default() };
        let headers = HeaderMap::new();
        let key = |query| key_spec.cache_key(&SECRET, &parts("/", query, &headers)).expect("a key");
        assert_eq!(key(Some("a=1&utm_x=2")), key(Some("a=1")));
        assert_ne!(key(Some("a=1")), key(Some("a=2")));
        assert_ne!(key(Some("a")), key(Some("a=")));
    }

    proptest! {
        #[test]
        fn different_requests_never_share_a_key(
            a in ("/[a-c?&=/]{0,6}", proptest::option::of("[a-c&=]{0,6}"), "[a-c]{0,3}"),
            b in ("/[a-c?&=/]{0,6}", proptest::option::of("[a-c&=]{0,6}"), "[a-c]{0,3}"),
        ) {
            let key_spec = KeySpec { headers: KeyHeaders::Listed(vec![ACCEPT]), ..key_spec() };
            let key = |(path, query, accept): &(String, Option<String>, String)| {
                let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_str(accept).expect("a value"))]);
                key_spec.cache_key(&SECRET, &parts(path, query.as_deref(), &headers)).expect("a key")
            };
            prop_assert_eq!(a == b, key(&a) == key(&b));
        }

        /// Credentials differ in header name, value, number, or order of values.
        #[test]
        fn different_credentials_never_share_a_key(
            a in prop::collection::vec((0usize..2, "[a-c]{0,3}"), 0..4),
            b in prop::collection::vec((0usize..2, "[a-c]{0,3}"), 0..4),
        ) {
            let key_spec = KeySpec { credentials: vec![AUTHORIZATION, COOKIE].into(), ..KeySpec::default() };
            let headers = |lines: &[(usize, String)]| {
                let mut headers = HeaderMap::new();
                for (which, value) in lines {
                    headers.append([AUTHORIZATION, COOKIE][*which].clone(), HeaderValue::from_str(value).expect("a value"));
                }
                headers
            };
            let key = |headers: &HeaderMap| key_spec.cache_key(&SECRET, &parts("/", None, headers)).expect("a key");
            // Equal credentials have the same values in the same order in each header field.
            let of = |headers: &HeaderMap, name| headers.get_all(name).iter().cloned().collect::<Vec<_>>();
            let (a, b) = (headers(&a), headers(&b));
            let same = of(&a, AUTHORIZATION) == of(&b, AUTHORIZATION) && of(&a, COOKIE) == of(&b, COOKIE);
            prop_assert_eq!(same, key(&a) == key(&b));
        }
    }
}
