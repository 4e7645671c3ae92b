//! Which request header fields are part of a key.
//!
//! Under `override` an API's `Vary` is not relied on: APIs that are cached against their will rarely send it. So every
//! field that is not known to be inert selects the response. Inert fields are those of the connection, of caching,
//! conditions and ranges, of tracing, of forwarding and client addresses, of the client's identification, and those
//! that `Vary` handles (`Accept-Encoding`).

use http::header::{ACCEPT, CONNECTION, HeaderMap, HeaderName};
use smallvec::SmallVec;

use super::cache_key::{CacheKey, KeySecret, looks_like_credential, push_field};
use crate::policy::http::hop_by_hop::connection_options;

/// Which request header fields are part of the key, in addition to credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyHeaders {
    /// These.
    Listed(Vec<HeaderName>),
    /// All that are not inert, and not among these.
    AllBut(Vec<HeaderName>),
}

impl Default for KeyHeaders {
    fn default() -> Self {
        KeyHeaders::Listed(Vec::new())
    }
}

impl KeyHeaders {
    /// Returns true if a field is part of the key, whether or not it carries a credential.
    pub fn contains(&self, name: &HeaderName) -> bool {
        match self {
            KeyHeaders::Listed(names) => names.contains(name),
            KeyHeaders::AllBut(ignored) => !is_inert(name.as_str()) && !ignored.contains(name),
        }
    }

    /// Returns the names of the list, if there is one.
    pub fn listed(&self) -> &[HeaderName] {
        match self {
            KeyHeaders::Listed(names) => names,
            KeyHeaders::AllBut(_) => &[],
        }
    }

    /// Appends the fields of a request to its key. `credentials`: those that are digested elsewhere.
    pub(super) fn push(
        &self,
        headers: &HeaderMap,
        credentials: &[HeaderName],
        secret: &KeySecret,
        key: &mut CacheKey,
    ) {
        match self {
            KeyHeaders::Listed(names) => {
                for name in names {
                    let mut values = headers.get_all(name).iter().peekable();
                    key.push(u8::from(values.peek().is_some()));
                    for value in values {
                        push_field(key, value.as_bytes());
                    }
                    key.push(0xff);
                }
            }
            KeyHeaders::AllBut(_) => {
                let selects = |name: &&HeaderName| {
                    self.contains(name)
                        && !credentials.contains(name)
                        && !looks_like_credential(name.as_str())
                        && (*name != ACCEPT || !accepts_anything(headers))
                };
                let mut names: SmallVec<[&HeaderName; 8]> = headers.keys().filter(selects).collect();
                if !names.is_empty() && headers.contains_key(CONNECTION) {
                    // The upstream does not get what `Connection` names.
                    let removed: SmallVec<[HeaderName; 4]> = connection_options(headers).collect();
                    names.retain(|name| !removed.contains(name));
                }
                if names.is_empty() {
                    key.push(0);
                    return;
                }
                names.sort_unstable_by_key(|name| name.as_str());
                key.push(1);
                let mut digest = blake3::Hasher::new_keyed(&secret.0);
                for name in names {
                    for value in headers.get_all(name) {
                        if *name == ACCEPT {
                            update(&mut digest, name.as_str().as_bytes(), &normalised(value.as_bytes()));
                        } else {
                            update(&mut digest, name.as_str().as_bytes(), value.as_bytes());
                        }
                    }
                }
                key.extend_from_slice(&digest.finalize().as_bytes()[..16]);
            }
        }
    }
}

fn update(digest: &mut blake3::Hasher, name: &[u8], value: &[u8]) {
    for part in [name, value] {
        digest.update(&(part.len() as u64).to_be_bytes());
        digest.update(part);
    }
}

/// Returns true if a request accepts any media type, as one without `Accept` does (RFC 9110 §12.5.1).
fn accepts_anything(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT).iter().all(|value| value.as_bytes().trim_ascii() == b"*/*")
}

/// Returns an `Accept` value in lower case and without white space, neither of which distinguishes media ranges.
fn normalised(value: &[u8]) -> SmallVec<[u8; 64]> {
    value.iter().filter(|byte| !byte.is_ascii_whitespace()).map(u8::to_ascii_lowercase).collect()
}

/// Returns true if a request header field is known not to select the response. `name`: in lower case.
pub fn is_inert(name: &str) -> bool {
    match name {
        // The connection and the message (RFC 9110 §7, RFC 9112). `Host` is in the key as the authority.
        "host" | "connection" | "keep-alive" | "proxy-connection" | "te" | "trailer" | "transfer-encoding" | "upgrade"
        | "expect" | "max-forwards" | "via" | "content-length" | "date" | "http2-settings" | "priority"
        | "upgrade-insecure-requests"
        // Caching, conditions, ranges (RFC 9110 §13, §14; RFC 9111).
        | "cache-control" | "pragma" | "if-match" | "if-none-match" | "if-modified-since" | "if-unmodified-since"
        | "if-range" | "range" | "accept-encoding"
        // The client's identification, and what browsers add to every request.
        | "user-agent" | "referer" | "from" | "dnt" | "save-data" | "device-memory" | "dpr" | "width" | "viewport-width"
        | "downlink" | "ect" | "rtt" | "purpose" | "x-purpose" | "x-moz" | "sec-purpose" | "sec-gpc"
        // Forwarding and client addresses. `X-Forwarded-*` are not sent upstream.
        | "forwarded" | "x-forwarded-for" | "x-forwarded-proto" | "x-forwarded-port" | "x-forwarded-host" | "x-forwarded-prefix" | "x-forwarded-scheme"
        | "x-forwarded-ssl" | "x-forwarded-protocol" | "x-forwarded-by" | "x-forwarded-server"
        | "x-original-forwarded-for" | "x-real-ip" | "x-client-ip" | "x-cluster-client-ip" | "x-remote-ip"
        | "x-remote-addr" | "true-client-ip" | "fastly-client-ip" | "cf-connecting-ip" | "cf-connecting-ipv6"
        | "cf-ray" | "cf-visitor" | "cf-ew-via" | "cf-warp-tag-id" | "cdn-loop" | "front-end-https"
        // Tracing and correlation: W3C, B3, Jaeger, the clouds, monitoring services.
        | "traceparent" | "tracestate" | "baggage" | "b3" | "uber-trace-id" | "grpc-trace-bin" | "grpc-tags-bin"
        | "x-cloud-trace-context" | "x-amzn-trace-id" | "x-amzn-requestid" | "x-amz-cf-id" | "sentry-trace" | "newrelic"
        | "elastic-apm-traceparent" | "x-dynatrace" | "x-ot-span-context" | "x-request-id" | "request-id"
        | "x-correlation-id" | "correlation-id" | "x-trace-id" | "trace-id" | "x-span-id" | "x-transaction-id"
        | "x-request-start" | "x-queue-start" | "x-ms-request-id" | "x-ms-client-request-id" | "request-context"
        | "x-vercel-id" | "x-fastly-trace" | "x-b3" | "x-parent-id"
        // Repetition of writes, and telemetry of client libraries.
        | "idempotency-key" | "x-idempotency-key" | "x-stripe-client-user-agent" | "x-stripe-client-telemetry"
        | "x-goog-api-client" | "x-amz-user-agent" | "amz-sdk-invocation-id" | "amz-sdk-request" | "x-ms-useragent"
        | "x-client-user-agent" | "x-sdk-version" | "x-sdk-name" => true,
        _ => INERT_PREFIXES.iter().any(|prefix| name.starts_with(prefix)),
    }
}

/// Beginnings of names of inert fields: client hints, tracing, service meshes, telemetry.
const INERT_PREFIXES: [&str; 12] = [
    "sec-ch-",
    "sec-fetch-",
    "sec-websocket-",
    "x-b3-",
    "x-datadog-",
    "x-newrelic-",
    "x-instana-",
    "x-envoy-",
    "x-stainless-",
    "uberctx-",
    "ot-tracer-",
    "baggage-",
];

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use http::header::AUTHORIZATION;

    fn pushed(lines: &[(&str, &str)]) -> CacheKey {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            headers.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        let ignored = HeaderName::from_static("x-ignored");
        let mut key = CacheKey::new();
        KeyHeaders::AllBut(vec![ignored]).push(&headers, &[AUTHORIZATION], &KeySecret([7; 32]), &mut key);
        key
    }

    const SELECTING: &str = "\
        Stripe-Account X-Tenant-Id X-User-Id X-Forwarded-User X-Forwarded-Email X-Forwarded-Groups \
        Impersonate-User OpenAI-Organization OpenAI-Project X-Forwarded-Client-Cert Stripe-Version Notion-Version \
        X-GitHub-Api-Version Accept Accept-Language Origin X-Currency X-Locale \
        X-Api-Version X-Requested-With Prefer X-Shop-Domain X-Store-Id X-Account-Id \
        X-Organization X-Country CF-IPCountry X-Role Square-Version Intercom-Version \
        LinkedIn-Version X-Feature-Flags Content-Type \
        ";

    const INERT: &str = "\
        Host Connection Keep-Alive TE Via Cache-Control \
        Pragma If-None-Match Range If-Modified-Since Accept-Encoding User-Agent \
        Referer DNT Priority Sec-CH-UA Sec-Fetch-Mode X-Forwarded-For \
        X-Forwarded-Proto X-Forwarded-Host Forwarded X-Real-IP CF-Connecting-IP traceparent \
        tracestate baggage b3 X-B3-TraceId X-Amzn-Trace-Id X-Cloud-Trace-Context \
        X-Datadog-Trace-Id Sentry-Trace X-Envoy-Attempt-Count X-Request-Id X-Correlation-Id Idempotency-Key \
        X-Stainless-Lang X-Stripe-Client-Telemetry X-Ignored Authorization X-Foo-Token \
        ";

    #[test]
    fn headers_that_select_a_response_are_keyed_and_inert_ones_are_not() {
        let none = pushed(&[]);
        for name in SELECTING.split_whitespace() {
            assert_ne!(pushed(&[(name, "a")]), none, "{name}");
            assert_ne!(pushed(&[(name, "a")]), pushed(&[(name, "b")]), "{name}");
        }
        for name in INERT.split_whitespace() {
            assert_eq!(pushed(&[(name, "a")]), none, "{name}");
        }
    }

    #[test]
    fn headers_that_connection_names_are_not_keyed() {
        for option in ["close", "keep-alive", "X-Hop", "close, X-Hop"] {
            assert_eq!(pushed(&[("connection", option)]), pushed(&[]), "{option}");
        }
        assert_eq!(pushed(&[("connection", "X-Hop"), ("x-hop", "1"), ("x-a", "1")]), pushed(&[("x-a", "1")]));
    }

    #[test]
    fn order_of_fields_does_not_matter_and_that_of_values_does() {
        assert_eq!(pushed(&[("x-a", "1"), ("x-b", "2")]), pushed(&[("x-b", "2"), ("x-a", "1")]));
        assert_ne!(pushed(&[("x-a", "1"), ("x-a", "2")]), pushed(&[("x-a", "2"), ("x-a", "1")]));
        assert_ne!(pushed(&[("x-a", "1"), ("x-b", "2")]), pushed(&[("x-a", "2"), ("x-b", "1")]));
    }

    #[test]
    fn accept_is_compared_without_case_and_white_space() {
        assert_eq!(pushed(&[("accept", "*/*")]), pushed(&[]));
        let json = pushed(&[("accept", "application/json, text/plain")]);
        assert_eq!(json, pushed(&[("accept", "Application/JSON,text/plain ")]));
        assert_ne!(json, pushed(&[("accept", "application/json")]));
    }

    #[test]
    fn values_do_not_appear_in_the_key() {
        assert!(!pushed(&[("x-user-id", "canary")]).windows(6).any(|bytes| bytes == b"canary"));
    }
}
