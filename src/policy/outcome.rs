//! The outcome of a request, as one family of enums.
//!
//! `Cache-Status` (RFC 9211), log lines, counters and tests use the tokens of these enums, and no others.

use std::fmt::{self, Write};

use http::StatusCode;

pub use crate::policy::resilience::failure::Failure;

/// The reason why a request was not looked up in the cache (the `detail` of `fwd=bypass`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BypassReason {
    /// The method is neither GET nor HEAD.
    Method,
    /// A GET or HEAD request has a body, whose meaning is undefined (RFC 9110 §9.3.1).
    RequestBody,
    /// The matching rule has `cache = "off"`.
    Off,
    /// The target has dot segments, an encoded slash or similar: cache and upstream might interpret it differently.
    AmbiguousTarget,
    /// A header field looks like a credential and is not part of the key.
    UnkeyedCredential,
    /// A range request (RFC 9110 §14) for which no complete response is stored.
    Range,
    /// The mode is `bypass`: all requests are passed through.
    Mode,
    /// The mode is `shadow`: all requests are passed through, and responses compared.
    Shadow,
    /// The request has `Cache-Control: no-store`.
    NoStoreRequest,
    /// The request has `X-HTTP-Method-Override` or the like: the upstream may execute it with another method.
    MethodOverride,
    /// The request asks for a protocol upgrade, which its rule allows (RFC 9110 §7.8).
    Upgrade,
}

impl BypassReason {
    /// Returns the reason's token in `Cache-Status: …; detail=`, logs and counters.
    pub fn token(self) -> &'static str {
        match self {
            BypassReason::Method => "method",
            BypassReason::RequestBody => "request-body",
            BypassReason::Off => "rule-off",
            BypassReason::AmbiguousTarget => "ambiguous-target",
            BypassReason::UnkeyedCredential => "unkeyed-credential",
            BypassReason::Range => "range",
            BypassReason::Mode => "mode",
            BypassReason::Shadow => "shadow",
            BypassReason::NoStoreRequest => "no-store-request",
            BypassReason::MethodOverride => "method-override",
            BypassReason::Upgrade => "upgrade",
        }
    }

    /// Returns true if the request goes upstream without pacing, circuit breaker and deadline.
    pub fn is_passthrough_mode(self) -> bool {
        matches!(self, BypassReason::Mode | BypassReason::Shadow)
    }
}

/// The result of shadow mode for one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShadowResult {
    /// The cache would have served the same response as the upstream (or spared the client a failure).
    Hit,
    /// The cache would have served a different response.
    WrongHit,
    /// The cache would have served a response that can't be compared with the upstream's.
    NotCompared,
    /// The request would have gone upstream.
    Miss,
}

impl ShadowResult {
    /// All results.
    pub const ALL: [ShadowResult; 4] =
        [ShadowResult::Hit, ShadowResult::WrongHit, ShadowResult::NotCompared, ShadowResult::Miss];

    /// Returns the result's label in metrics.
    pub fn token(self) -> &'static str {
        match self {
            ShadowResult::Hit => "hit",
            ShadowResult::WrongHit => "wrong_hit",
            ShadowResult::NotCompared => "not_compared",
            ShadowResult::Miss => "miss",
        }
    }
}

/// The reason why a response was not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotStored {
    /// No explicit freshness lifetime, and no heuristic applies (RFC 9111 §4.2.2).
    NoFreshness,
    /// `Cache-Control: no-store`.
    NoStore,
    /// `Cache-Control: private`.
    Private,
    /// The request has Authorization, and the response does not allow sharing (RFC 9111 §3.5).
    Authorization,
    /// `Vary: *`.
    VaryStar,
    /// The status is not stored under this rule.
    Status,
    /// Partial content (206).
    Partial,
    /// The response to a HEAD request.
    Head,
    /// Larger than `memory.max_entry_bytes`.
    TooLarge,
    /// `memory.max_inflight_bytes` had no room for the body.
    InflightFull,
    /// A purge or a write invalidated the resource after the fetch began.
    Invalidated,
    /// Server-sent events: the stream ends only when a peer disconnects.
    EventStream,
}

impl NotStored {
    /// Returns the reason's token in `Cache-Status: …; detail=`, logs and counters.
    pub fn token(self) -> &'static str {
        match self {
            NotStored::NoFreshness => "no-freshness",
            NotStored::NoStore => "no-store",
            NotStored::Private => "private",
            NotStored::Authorization => "authorization",
            NotStored::VaryStar => "vary-star",
            NotStored::Status => "status",
            NotStored::Partial => "partial",
            NotStored::Head => "head",
            NotStored::TooLarge => "too-large",
            NotStored::InflightFull => "inflight-full",
            NotStored::Invalidated => "invalidated",
            NotStored::EventStream => "event-stream",
        }
    }
}

/// The reason why a stale response was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StaleReason {
    /// The entry is within its stale-while-revalidate window, and a refresh runs in the background.
    WhileRevalidate,
    /// The fetch failed, and the entry is within its stale-if-error window.
    IfError(Failure),
    /// The fetch failed, and the entry is only within its `last_known_good` window.
    LastKnownGood(Failure),
}

impl StaleReason {
    /// Returns the reason's token in `Cache-Status: …; detail=`.
    pub fn token(self) -> &'static str {
        match self {
            StaleReason::WhileRevalidate => "stale-while-revalidate",
            StaleReason::IfError(_) => "stale-if-error",
            StaleReason::LastKnownGood(_) => "last-known-good",
        }
    }

    /// Returns the failure that caused it, if any.
    pub fn failure(self) -> Option<Failure> {
        match self {
            StaleReason::WhileRevalidate => None,
            StaleReason::IfError(f) | StaleReason::LastKnownGood(f) => Some(f),
        }
    }
}

/// The reason why a request went upstream (RFC 9211 §2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ForwardReason {
    /// The cache was bypassed.
    Bypass(BypassReason),
    /// No response is stored for this URL.
    UriMiss,
    /// A response is stored for this URL, but for other values of the request header fields in `Vary`.
    VaryMiss,
    /// The stored response is stale.
    Stale,
    /// The request's `Cache-Control` directives require it.
    Request,
}

impl ForwardReason {
    /// Returns the value of `fwd=`.
    pub fn token(self) -> &'static str {
        match self {
            ForwardReason::Bypass(_) => "bypass",
            ForwardReason::UriMiss => "uri-miss",
            ForwardReason::VaryMiss => "vary-miss",
            ForwardReason::Stale => "stale",
            ForwardReason::Request => "request",
        }
    }
}

/// The result of a fetch for one request that waited for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchSummary {
    /// The reason of the fetch.
    pub forward: ForwardReason,
    /// The status of the upstream's response, if there was one.
    pub status: Option<StatusCode>,
    /// Whether the request was collapsed: it shared a fetch that another request had started.
    pub collapsed: bool,
    /// `Ok` if the response is stored (or is being stored while it streams), or else the reason, where known.
    pub stored: Result<(), Option<NotStored>>,
}

/// The outcome of a request: the kind of response that the client got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A fresh entry.
    Hit {
        /// Remaining freshness, in seconds.
        ttl: i64,
    },
    /// A stale entry.
    Stale {
        /// Seconds since it became stale, as a negative number.
        ttl: i64,
        /// The reason why it was served.
        reason: StaleReason,
    },
    /// The upstream's response.
    Relayed {
        /// The fetch.
        fetched: FetchSummary,
        /// Set if that response is a failure for which there was no replacement.
        failure: Option<Failure>,
    },
    /// A configured fallback payload in place of a failure.
    Fallback {
        /// The fetch that failed.
        fetched: FetchSummary,
        /// The failure.
        failure: Failure,
    },
    /// A JSON error response generated by sidecache in place of a failure.
    Failed {
        /// The fetch that failed.
        fetched: FetchSummary,
        /// The failure.
        failure: Failure,
    },
    /// The request has `only-if-cached`, and no stored response may be served (RFC 9111 §5.2.1.7).
    NotCached,
    /// The request was rejected before the cache lookup.
    Rejected {
        /// The `code` of the JSON error.
        code: &'static str,
    },
}

impl Outcome {
    /// All values of [`Outcome::label`].
    pub const LABELS: [&'static str; 9] =
        ["hit", "stale", "miss", "collapsed", "bypass", "fallback", "failed", "not-cached", "rejected"];

    /// Returns the outcome's label in logs and counters.
    pub fn label(&self) -> &'static str {
        match self {
            Outcome::Hit { .. } => "hit",
            Outcome::Stale { .. } => "stale",
            Outcome::Relayed { fetched, .. } => match fetched.forward {
                ForwardReason::Bypass(_) => "bypass",
                ForwardReason::UriMiss | ForwardReason::VaryMiss | ForwardReason::Stale | ForwardReason::Request => {
                    if fetched.collapsed {
                        "collapsed"
                    } else {
                        "miss"
                    }
                }
            },
            Outcome::Fallback { .. } => "fallback",
            Outcome::Failed { .. } => "failed",
            Outcome::NotCached => "not-cached",
            Outcome::Rejected { .. } => "rejected",
        }
    }

    /// Returns the failure of the fetch, whether or not the client saw it.
    pub fn failure(&self) -> Option<Failure> {
        match self {
            Outcome::Stale { reason, .. } => reason.failure(),
            Outcome::Relayed { failure, .. } => *failure,
            Outcome::Fallback { failure, .. } | Outcome::Failed { failure, .. } => Some(*failure),
            Outcome::Hit { .. } | Outcome::NotCached | Outcome::Rejected { .. } => None,
        }
    }

    /// Returns the most specific token that explains the outcome.
    pub fn detail(&self) -> Option<&'static str> {
        match self {
            Outcome::Hit { .. } => None,
            Outcome::Stale { reason, .. } => Some(reason.token()),
            Outcome::Relayed { fetched, .. } => fetched.detail(),
            Outcome::Fallback { .. } => Some("fallback"),
            Outcome::Failed { .. } => Some("error"),
            Outcome::NotCached => Some("only-if-cached"),
            Outcome::Rejected { code } => Some(code),
        }
    }
}

impl FetchSummary {
    /// Returns the summary of a request that bypassed the cache.
    pub fn bypass(reason: BypassReason, status: Option<StatusCode>) -> FetchSummary {
        FetchSummary { forward: ForwardReason::Bypass(reason), status, collapsed: false, stored: Err(None) }
    }

    fn detail(self) -> Option<&'static str> {
        match (self.forward, self.stored) {
            (ForwardReason::Bypass(reason), _) => Some(reason.token()),
            (_, Err(Some(skip))) => Some(skip.token()),
            (_, Ok(()) | Err(None)) => None,
        }
    }
}

/// Writes the value of `Cache-Status` (RFC 9211): a structured-field list member. `hit` and `fwd` exclude each other.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sidecache")?;
        match self {
            Outcome::Hit { ttl } => write!(f, "; hit; ttl={ttl}"),
            Outcome::Stale { ttl, reason } => {
                write!(f, "; hit; ttl={ttl}; detail={}", reason.token())?;
                reason.failure().map_or(Ok(()), |failure| cause(f, failure))
            }
            Outcome::Relayed { fetched, failure } => {
                forward(f, *fetched)?;
                if fetched.stored.is_ok() && failure.is_none() {
                    f.write_str("; stored")?;
                }
                if fetched.collapsed {
                    f.write_str("; collapsed")?;
                }
                if let (Some(detail), None) = (fetched.detail(), failure) {
                    write!(f, "; detail={detail}")?;
                }
                failure.map_or(Ok(()), |failure| cause(f, failure))
            }
            Outcome::Fallback { fetched, failure } | Outcome::Failed { fetched, failure } => {
                forward(f, *fetched)?;
                if fetched.collapsed {
                    f.write_str("; collapsed")?;
                }
                write!(f, "; detail={}", self.detail().unwrap_or("error"))?;
                cause(f, *failure)
            }
            Outcome::NotCached => f.write_str("; detail=only-if-cached"),
            Outcome::Rejected { code } => write!(f, "; detail={code}"),
        }
    }
}

fn forward(f: &mut fmt::Formatter<'_>, fetched: FetchSummary) -> fmt::Result {
    write!(f, "; fwd={}", fetched.forward.token())?;
    match fetched.status {
        Some(status) if !status.is_success() => write!(f, "; fwd-status={}", status.as_u16()),
        Some(_) | None => Ok(()),
    }
}

/// Writes `cause`, an extension parameter of sidecache. It is a string, because `5xx` and `429` are not tokens.
fn cause(f: &mut fmt::Formatter<'_>, failure: Failure) -> fmt::Result {
    f.write_str("; cause=\"")?;
    f.write_str(failure.cause())?;
    f.write_char('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn miss(stored: Result<(), Option<NotStored>>, collapsed: bool, status: u16) -> FetchSummary {
        FetchSummary { forward: ForwardReason::UriMiss, status: StatusCode::from_u16(status).ok(), collapsed, stored }
    }

    #[test]
    fn outcome_formats_as_the_expected_cache_status_value() {
        let table = [
            (Outcome::Hit { ttl: 297 }, "sidecache; hit; ttl=297"),
            (
                Outcome::Relayed { fetched: miss(Ok(()), false, 200), failure: None },
                "sidecache; fwd=uri-miss; stored",
            ),
            (
                Outcome::Relayed { fetched: miss(Ok(()), true, 200), failure: None },
                "sidecache; fwd=uri-miss; stored; collapsed",
            ),
            (
                Outcome::Stale { ttl: -12, reason: StaleReason::WhileRevalidate },
                "sidecache; hit; ttl=-12; detail=stale-while-revalidate",
            ),
            (
                Outcome::Stale { ttl: -40, reason: StaleReason::IfError(Failure::Timeout) },
                "sidecache; hit; ttl=-40; detail=stale-if-error; cause=\"timeout\"",
            ),
            (
                Outcome::Fallback {
                    fetched: miss(Err(None), false, 503),
                    failure: Failure::Status(StatusCode::SERVICE_UNAVAILABLE),
                },
                "sidecache; fwd=uri-miss; fwd-status=503; detail=fallback; cause=\"5xx\"",
            ),
            (
                Outcome::Relayed { fetched: miss(Err(Some(NotStored::NoFreshness)), false, 200), failure: None },
                "sidecache; fwd=uri-miss; detail=no-freshness",
            ),
            (
                Outcome::Relayed { fetched: FetchSummary::bypass(BypassReason::Method, None), failure: None },
                "sidecache; fwd=bypass; detail=method",
            ),
        ];
        for (outcome, expected) in table {
            assert_eq!(outcome.to_string(), expected);
            assert!(Outcome::LABELS.contains(&outcome.label()));
        }
    }

    #[test]
    fn cause_of_every_failure_is_in_the_list_of_causes() {
        for failure in [
            Failure::Timeout,
            Failure::Connect,
            Failure::Malformed,
            Failure::Status(StatusCode::BAD_GATEWAY),
            Failure::Throttled,
            Failure::Empty,
            Failure::Internal,
        ] {
            assert!(Failure::CAUSES.contains(&failure.cause()));
        }
    }
}
