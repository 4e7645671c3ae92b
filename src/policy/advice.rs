//! What to tell people about a reason: one sentence, and what to do about it if they wish.

use super::outcome::{Bypass, Skip};

/// Why the cache is not asked.
pub fn of_bypass(reason: Bypass) -> &'static str {
    match reason {
        Bypass::Method => "only GET and HEAD are answered from the cache",
        Bypass::RequestBody => "a GET with a body is passed through: what it means is undefined (RFC 9110 §9.3.1)",
        Bypass::Off => "the rule that matches says cache = \"off\": write a rule of yours for this path",
        Bypass::AmbiguousTarget => {
            "the path has dot segments, an encoded slash or the like, which the upstream may read differently"
        }
        Bypass::UnkeyedCredential => {
            "a header looks like a credential and is not keyed: add it to [security] credential_headers, or let the \
             rule say partition = \"everyone\""
        }
        Bypass::Range => "it asks for a part of what is not stored",
        Bypass::Mode => "the mode is bypass: sidecache mode normal",
        Bypass::Shadow => "the mode is shadow: what the cache would do is only counted. sidecache mode normal",
        Bypass::NoStoreRequest => "the client says Cache-Control: no-store",
        Bypass::Upgrade => "it asks for another protocol, and its rule allows that",
    }
}

/// Why an answer is not stored.
pub fn of_skip(reason: Skip) -> &'static str {
    match reason {
        Skip::NoFreshness => {
            "the answer says nothing of how long it stays fresh: write a rule with a ttl if you know better"
        }
        Skip::NoStore => "the answer says Cache-Control: no-store: a rule with a ttl overrides that",
        Skip::Private => "the answer says Cache-Control: private: a rule with a ttl overrides that",
        Skip::Authorization => {
            "the request had Authorization, and the answer does not say public, s-maxage or must-revalidate \
             (RFC 9111 §3.5): a rule with a ttl overrides that"
        }
        Skip::VaryStar => "the answer says Vary: *",
        Skip::Status => "answers with this status are not stored under this rule",
        Skip::Partial => "it is partial content",
        Skip::Head => "the answer to HEAD has no body to store",
        Skip::TooLarge => "it is larger than memory.max_entry_bytes",
        Skip::InflightFull => "memory.max_inflight_bytes was used up",
        Skip::Incomplete => "its body ended early",
        Skip::Invalidated => "a purge or a write came after its fetch had begun",
        Skip::EventStream => "server-sent events are passed on as they come",
    }
}
