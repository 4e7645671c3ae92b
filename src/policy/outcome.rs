//! What happened to a request, as one family of enums.
//!
//! `Cache-Status` (RFC 9211), log lines, counters and tests all speak these words, and no others.

use std::fmt::{self, Write};

use http::StatusCode;

pub use crate::policy::resilience::failure::Failure;

/// Why a request was not looked up in the cache at all (`fwd=bypass` or `fwd=method`'s detail).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BypassReason {
    /// The method is neither GET nor HEAD.
    Method,
    /// A GET or HEAD that carries a body: its meaning is undefined (RFC 9110 §9.3.1).
    RequestBody,
    /// The matching rule says `cache = "off"`.
    Off,
    /// The target has dot segments, an encoded slash or the like: cache and upstream might read it differently.
    AmbiguousTarget,
    /// A header that looks like a credential and is not part of the key.
    UnkeyedCredential,
    /// A Range request (RFC 9110 §14) for what is not stored.
    Range,
    /// The mode is `bypass`: everything is handed through.
    Mode,
    /// The mode is `shadow`: everything is handed through, and compared.
    Shadow,
    /// The client's `Cache-Control: no-store`.
    NoStoreRequest,
    /// It asks for another protocol, and its rule allows that (RFC 9110 §7.8).
    Upgrade,
}

impl BypassReason {
    /// The word for it in `Cache-Status: …; detail=`, logs and counters.
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
            BypassReason::Upgrade => "upgrade",
        }
    }

    /// Does it go to the upstream as it is: no pacing, no breaker, no deadline?
    pub fn is_passthrough_mode(self) -> bool {
        matches!(self, BypassReason::Mode | BypassReason::Shadow)
    }
}

/// What a rehearsal has shown of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShadowResult {
    /// The cache would have answered what the upstream did (or kept a failure from the client).
    Hit,
    /// The cache would have answered something else.
    WrongHit,
    /// The cache would have answered, and nothing tells whether the same.
    NotCompared,
    /// The upstream would have been asked.
    Miss,
}

impl ShadowResult {
    /// All of them.
    pub const ALL: [ShadowResult; 4] =
        [ShadowResult::Hit, ShadowResult::WrongHit, ShadowResult::NotCompared, ShadowResult::Miss];

    /// Its word in metrics.
    pub fn token(self) -> &'static str {
        match self {
            ShadowResult::Hit => "hit",
            ShadowResult::WrongHit => "wrong_hit",
            ShadowResult::NotCompared => "not_compared",
            ShadowResult::Miss => "miss",
        }
    }
}

/// Why an answer was not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotStored {
    /// No explicit lifetime, and no heuristic applies (RFC 9111 §4.2.2).
    NoFreshness,
    /// `Cache-Control: no-store`.
    NoStore,
    /// `Cache-Control: private`.
    Private,
    /// The request had Authorization and the answer does not allow sharing (RFC 9111 §3.5).
    Authorization,
    /// `Vary: *`.
    VaryStar,
    /// A status this rule does not store.
    Status,
    /// Partial content.
    Partial,
    /// The answer to HEAD.
    Head,
    /// Larger than `memory.max_entry_bytes`.
    TooLarge,
    /// A purge or a write came after the fetch began.
    Invalidated,
    /// Server-sent events: they end when somebody leaves.
    EventStream,
}

impl NotStored {
    /// The word for it in `Cache-Status: …; detail=`, logs and counters.
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
            NotStored::Invalidated => "invalidated",
            NotStored::EventStream => "event-stream",
        }
    }
}

/// Why something stale was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StaleReason {
    /// Inside stale-while-revalidate; a refresh runs behind it.
    WhileRevalidate,
    /// The fetch failed and the entry is inside its stale-if-error window.
    IfError(Failure),
    /// The fetch failed and nothing better is left: `last_known_good`.
    LastKnownGood(Failure),
}

impl StaleReason {
    /// The word for it in `Cache-Status: …; detail=`.
    pub fn token(self) -> &'static str {
        match self {
            StaleReason::WhileRevalidate => "stale-while-revalidate",
            StaleReason::IfError(_) => "stale-if-error",
            StaleReason::LastKnownGood(_) => "last-known-good",
        }
    }

    /// The failure behind it.
    pub fn failure(self) -> Option<Failure> {
        match self {
            StaleReason::WhileRevalidate => None,
            StaleReason::IfError(f) | StaleReason::LastKnownGood(f) => Some(f),
        }
    }
}

/// Why a request went upstream: RFC 9211 §2.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ForwardReason {
    /// The cache was not asked.
    Bypass(BypassReason),
    /// Nothing is stored for this URL.
    UriMiss,
    /// Something is stored for this URL, but not for these request headers.
    VaryMiss,
    /// What is stored is too old.
    Stale,
    /// The client's own directives demanded it.
    Request,
}

impl ForwardReason {
    /// The value of `fwd=`.
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

/// What became of a fetch, seen from one request that waited for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchSummary {
    /// Why it was made.
    pub forward: ForwardReason,
    /// The status the upstream gave, where it gave one.
    pub status: Option<StatusCode>,
    /// This request shared a fetch that another had begun.
    pub collapsed: bool,
    /// `Ok`: stored (or being stored as it streams). `Err`: why not.
    pub stored: Result<(), Option<NotStored>>,
}

/// What the client got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A fresh entry. `ttl` in seconds.
    Hit {
        /// Seconds it stays fresh.
        ttl: i64,
    },
    /// A stale entry. `ttl` is negative.
    Stale {
        /// Seconds since it stopped being fresh, negative.
        ttl: i64,
        /// Why it was served all the same.
        reason: StaleReason,
    },
    /// The upstream's answer.
    Relayed {
        /// How it came.
        fetched: FetchSummary,
        /// Set if that answer is a failure that nothing replaced.
        failure: Option<Failure>,
    },
    /// A configured payload in place of a failure.
    Fallback {
        /// How it came to this.
        fetched: FetchSummary,
        /// Which failure.
        failure: Failure,
    },
    /// A JSON error of ours in place of a failure.
    Failed {
        /// How it came to this.
        fetched: FetchSummary,
        /// Which failure.
        failure: Failure,
    },
    /// `only-if-cached`, and it was not (RFC 9111 §5.2.1.7).
    NotCached,
    /// The request itself was refused, before any cache was asked.
    Rejected {
        /// Why, as in the error's `code`.
        code: &'static str,
    },
}

impl Outcome {
    /// Every value of [`Outcome::label`].
    pub const LABELS: [&'static str; 9] =
        ["hit", "stale", "miss", "collapsed", "bypass", "fallback", "failed", "not-cached", "rejected"];

    /// The word for it in logs and counters.
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

    /// The failure behind it, whether or not the client saw one.
    pub fn failure(&self) -> Option<Failure> {
        match self {
            Outcome::Stale { reason, .. } => reason.failure(),
            Outcome::Relayed { failure, .. } => *failure,
            Outcome::Fallback { failure, .. } | Outcome::Failed { failure, .. } => Some(*failure),
            Outcome::Hit { .. } | Outcome::NotCached | Outcome::Rejected { .. } => None,
        }
    }

    /// The most telling single word: what a person asks for with "why?".
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
    /// A request that never asked the cache.
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

/// The value of `Cache-Status`, RFC 9211: a structured-field list member. `hit` and `fwd` never stand together.
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

/// `cause` is an extension parameter of ours. A string, because `5xx` and `429` are no tokens.
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
    fn cache_status_reads_as_the_contract_says() {
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
    fn every_failure_has_a_cause_that_a_fallback_can_name() {
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
