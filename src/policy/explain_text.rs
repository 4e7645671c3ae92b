//! Explanations of bypass and not-stored reasons, each with the setting that changes it.

use super::outcome::{BypassReason, NotStored};

/// Returns why a request bypasses the cache.
pub fn of_bypass(reason: BypassReason) -> &'static str {
    match reason {
        BypassReason::Method => "only GET and HEAD requests are answered from the cache",
        BypassReason::RequestBody => {
            "a GET request with a body is passed through: its body has no defined meaning (RFC 9110 §9.3.1)"
        }
        BypassReason::Off => "the matching rule has cache = \"off\": add a rule for this path before it",
        BypassReason::AmbiguousTarget => {
            "the path has dot segments, an encoded slash or similar, which the upstream may normalize differently"
        }
        BypassReason::UnkeyedCredential => {
            "a header field looks like a credential and is not part of the key: add it to [security] \
             credential_headers, or set partition = \"everyone\" in the rule"
        }
        BypassReason::Range => "the request has a Range field, and no complete response is stored",
        BypassReason::Mode => "the mode is bypass: `sidecache mode normal` ends it",
        BypassReason::Shadow => {
            "the mode is shadow: hits are only counted, and every request goes upstream; `sidecache mode normal` ends it"
        }
        BypassReason::MethodOverride => {
            "the request names another method (X-HTTP-Method-Override): it counts as a write"
        }
        BypassReason::NoStoreRequest => "the request has Cache-Control: no-store",
        BypassReason::Upgrade => "the request is a protocol upgrade, which the rule allows",
    }
}

/// Returns why a response is not stored.
pub fn of_not_stored(reason: NotStored) -> &'static str {
    match reason {
        NotStored::NoFreshness => {
            "the response has no freshness lifetime (no max-age, s-maxage or Expires): a rule with a ttl sets one"
        }
        NotStored::NoStore => "the response has Cache-Control: no-store: a rule with a ttl overrides it",
        NotStored::Private => "the response has Cache-Control: private: a rule with a ttl overrides it",
        NotStored::Authorization => {
            "the request has Authorization, and the response has none of public, s-maxage and must-revalidate \
             (RFC 9111 §3.5): a rule with a ttl overrides it"
        }
        NotStored::VaryStar => "the response has Vary: *",
        NotStored::Status => "responses with this status are not stored under this rule",
        NotStored::Partial => "the response is partial content (206)",
        NotStored::Head => "the response to a HEAD request has no body to store",
        NotStored::InflightFull => "memory.max_inflight_bytes had no room for the body",
        NotStored::TooLarge => "the response is larger than memory.max_entry_bytes",
        NotStored::Invalidated => "a purge or a write invalidated the resource while it was fetched",
        NotStored::EventStream => "server-sent events are streamed and never stored",
    }
}
