//! How a fetch can fail, in one word for each: what a rule's fallback names, what logs and counters say.

use http::StatusCode;

/// How a fetch failed. [`Failure::cause`] is the word a rule's `fallback.on` uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// Nothing in time: the client's deadline, or one of `timeouts`.
    Timeout,
    /// No connection, or it ended before the answer did.
    Connect,
    /// The upstream's answer is not HTTP we accept (RFC 9112).
    Malformed,
    /// 500, 502, 503 or 504.
    Status(StatusCode),
    /// 429.
    Throttled,
    /// `reject_empty`: the list that must not be empty is, or is missing.
    Empty,
    /// The breaker before the upstream is open.
    Unavailable,
    /// The task that fetched is gone: a bug of ours, survived.
    Internal,
}

impl Failure {
    /// All causes a fallback can name.
    pub const CAUSES: [&'static str; 5] = ["timeout", "connect", "5xx", "429", "empty"];

    /// The failure a status stands for, if it stands for one.
    pub fn from_status(status: StatusCode) -> Option<Failure> {
        match status.as_u16() {
            429 => Some(Failure::Throttled),
            500 | 502 | 503 | 504 => Some(Failure::Status(status)),
            _ => None,
        }
    }

    /// The word for it: one of [`Failure::CAUSES`].
    pub fn cause(self) -> &'static str {
        match self {
            Failure::Timeout => "timeout",
            Failure::Connect | Failure::Malformed | Failure::Unavailable | Failure::Internal => "connect",
            Failure::Status(_) => "5xx",
            Failure::Throttled => "429",
            Failure::Empty => "empty",
        }
    }

    /// A whole answer came, but one that says or means failure.
    pub fn is_answer(self) -> bool {
        match self {
            Failure::Status(_) | Failure::Throttled | Failure::Empty => true,
            Failure::Timeout | Failure::Connect | Failure::Malformed | Failure::Unavailable | Failure::Internal => {
                false
            }
        }
    }

    /// The code in a JSON error of our own.
    pub fn code(self) -> &'static str {
        match self {
            Failure::Timeout => "upstream_timeout",
            Failure::Connect => "upstream_unreachable",
            Failure::Malformed => "upstream_malformed",
            Failure::Status(_) => "upstream_error",
            Failure::Throttled => "upstream_throttled",
            Failure::Empty => "upstream_empty",
            Failure::Unavailable => "upstream_unavailable",
            Failure::Internal => "internal",
        }
    }
}
