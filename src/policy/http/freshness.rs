//! Freshness evaluation: whether an entry may be served to a request (RFC 9111 §4.2, §5.2.1; RFC 5861).
//!
//! Lifetimes are computed when the response is stored, so that an evaluation only compares a few numbers.

use http::header::{CACHE_CONTROL, HeaderMap, PRAGMA};

use super::cache_control::CacheControl;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::invalidation::ledger::InvalidationState;
use crate::policy::outcome::{Failure, StaleReason};
use crate::policy::routing::rule::{CacheMode, Rule};

/// How an entry that was found may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The entry is fresh: serve it.
    Fresh,
    /// The entry is within its stale-while-revalidate window: serve it, and refresh it in the background.
    WhileRevalidate,
    /// The entry is stale: fetch first. If the fetch fails, the entry may still be served ([`stale_on_failure`]).
    Stale,
    /// The client's directives do not allow the entry: fetch first.
    Refused,
    /// The entry was purged or is past all of its windows: remove it.
    Gone,
}

/// The `Cache-Control` directives of a request. They are ignored unless the rule's mode is [`CacheMode::Http`].
#[derive(Debug, Clone, Default)]
pub struct RequestDirectives(Option<Box<CacheControl>>);

impl RequestDirectives {
    /// Parses the directives, if the rule's mode respects them.
    pub fn from_request(rule: &Rule, headers: &HeaderMap) -> RequestDirectives {
        let silent = !headers.contains_key(CACHE_CONTROL) && !headers.contains_key(PRAGMA);
        if silent || rule.mode != CacheMode::Http {
            return RequestDirectives(None);
        }
        RequestDirectives(Some(Box::new(CacheControl::of_request(headers))))
    }

    /// Returns true if the request has `no-store`.
    pub fn no_store(&self) -> bool {
        self.0.as_ref().is_some_and(|d| d.no_store)
    }

    /// Returns true if the request has `only-if-cached`.
    pub fn only_if_cached(&self) -> bool {
        self.0.as_ref().is_some_and(|d| d.only_if_cached)
    }
}

/// Decides how an entry may be used for a request.
pub fn evaluate(
    entry: &Entry,
    invalidation: InvalidationState,
    directives: &RequestDirectives,
    now: Tick,
) -> Verdict {
    if invalidation == InvalidationState::Gone || entry.expired(now) {
        return Verdict::Gone;
    }
    let left = freshness_left(entry, now);
    let by_age = if entry.lifetimes.always_validate || invalidation == InvalidationState::Unverified {
        Verdict::Stale
    } else if invalidation == InvalidationState::Valid && left > 0 {
        Verdict::Fresh
    } else if within(entry.lifetimes.while_revalidate, left) {
        Verdict::WhileRevalidate
    } else {
        Verdict::Stale
    };
    match &directives.0 {
        Some(directives) => with_directives(by_age, entry, directives, left, now),
        None => by_age,
    }
}

fn with_directives(by_age: Verdict, entry: &Entry, directives: &CacheControl, left: i64, now: Tick) -> Verdict {
    let seconds_left = left.div_euclid(1000);
    let too_old = directives.max_age.is_some_and(|max| entry.age(now) > max || max == 0);
    let too_soon = directives.min_fresh.is_some_and(|min| seconds_left < i64::try_from(min).unwrap_or(i64::MAX));
    if directives.no_cache || too_old || too_soon {
        return Verdict::Refused;
    }
    let tolerated = directives.max_stale.is_some_and(|max| left <= 0 && within(max.saturating_mul(1000), left));
    if by_age == Verdict::Stale && tolerated && !entry.lifetimes.always_validate && entry.lifetimes.disconnected > 0 {
        return Verdict::WhileRevalidate;
    }
    by_age
}

/// Returns the reason why an entry may be served after a failed fetch, or `None` if it may not.
pub fn stale_on_failure(
    entry: &Entry,
    invalidation: InvalidationState,
    failure: Failure,
    now: Tick,
) -> Option<StaleReason> {
    if invalidation == InvalidationState::Gone {
        return None;
    }
    let left = freshness_left(entry, now);
    let window = if failure.is_answer() {
        entry.lifetimes.if_error
    } else {
        entry.lifetimes.if_error.max(entry.lifetimes.disconnected)
    };
    if window > 0 && within(window, left) {
        Some(StaleReason::IfError(failure))
    } else if entry.lifetimes.last_known_good > 0 && within(entry.lifetimes.last_known_good, left) {
        Some(StaleReason::LastKnownGood(failure))
    } else {
        None
    }
}

/// Returns the remaining freshness in milliseconds, negative if the entry is stale.
fn freshness_left(entry: &Entry, now: Tick) -> i64 {
    entry.lifetimes.fresh_for.saturating_sub(i64::try_from(entry.resident_time(now)).unwrap_or(i64::MAX))
}

/// Returns true if the entry has been stale for at most `window` milliseconds, or is fresh and `window` is not 0.
fn within(window: u64, left: i64) -> bool {
    window > 0 && (left > 0 || left.unsigned_abs() <= window)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::entry::Lifetimes;
    use crate::policy::entry::testing::entry;
    use http::{HeaderValue, StatusCode};

    fn terms() -> Lifetimes {
        Lifetimes {
            fresh_for: 10_000,
            while_revalidate: 20_000,
            if_error: 50_000,
            disconnected: 60_000,
            last_known_good: 100_000,
            ..Lifetimes::default()
        }
    }

    fn directives(value: &'static str) -> RequestDirectives {
        let headers = HeaderMap::from_iter([(CACHE_CONTROL, HeaderValue::from_static(value))]);
        RequestDirectives(Some(Box::new(CacheControl::of_request(&headers))))
    }

    #[test]
    fn verdict_depends_on_age_and_invalidation_state() {
        let entry = entry(terms());
        let table = [
            (0, InvalidationState::Valid, Verdict::Fresh),
            (9_999, InvalidationState::Valid, Verdict::Fresh),
            (10_000, InvalidationState::Valid, Verdict::WhileRevalidate),
            (30_000, InvalidationState::Valid, Verdict::WhileRevalidate),
            (30_001, InvalidationState::Valid, Verdict::Stale),
            (110_000, InvalidationState::Valid, Verdict::Stale),
            (110_001, InvalidationState::Valid, Verdict::Gone),
            (0, InvalidationState::Stale, Verdict::WhileRevalidate),
            (0, InvalidationState::Unverified, Verdict::Stale),
            (0, InvalidationState::Gone, Verdict::Gone),
        ];
        for (at, invalidation, expected) in table {
            assert_eq!(
                evaluate(&entry, invalidation, &RequestDirectives(None), Tick(at)),
                expected,
                "{at} {invalidation:?}"
            );
        }
    }

    #[test]
    fn request_directives_tighten_or_relax_freshness() {
        let entry = entry(Lifetimes { while_revalidate: 0, ..terms() });
        let table = [
            ("no-cache", 0, Verdict::Refused),
            ("max-age=0", 0, Verdict::Refused),
            ("max-age=5", 5_000, Verdict::Fresh),
            ("max-age=5", 6_000, Verdict::Refused),
            ("min-fresh=5", 4_000, Verdict::Fresh),
            ("min-fresh=5", 6_000, Verdict::Refused),
            ("max-stale", 20_000, Verdict::WhileRevalidate),
            ("max-stale=5", 14_000, Verdict::WhileRevalidate),
            ("max-stale=5", 16_000, Verdict::Stale),
        ];
        for (directive, at, expected) in table {
            assert_eq!(
                evaluate(&entry, InvalidationState::Valid, &directives(directive), Tick(at)),
                expected,
                "{directive} {at}"
            );
        }
    }

    #[test]
    fn stale_response_on_failure_is_allowed_only_within_its_stale_windows() {
        let entry = entry(terms());
        let status = Failure::Status(StatusCode::BAD_GATEWAY);
        let table = [
            (status, 60_000, Some(StaleReason::IfError(status))),
            (status, 60_001, Some(StaleReason::LastKnownGood(status))),
            (Failure::Timeout, 70_000, Some(StaleReason::IfError(Failure::Timeout))),
            (Failure::Timeout, 70_001, Some(StaleReason::LastKnownGood(Failure::Timeout))),
            (Failure::Timeout, 110_001, None),
        ];
        for (failure, at, expected) in table {
            assert_eq!(
                stale_on_failure(&entry, InvalidationState::Valid, failure, Tick(at)),
                expected,
                "{failure:?} {at}"
            );
        }
        assert_eq!(stale_on_failure(&entry, InvalidationState::Gone, status, Tick(0)), None);
    }

    #[test]
    fn age_and_ttl_are_rounded_down_to_whole_seconds() {
        let entry = entry(Lifetimes { initial_age: 1_500, ..terms() });
        assert_eq!((entry.age(Tick(400)), entry.age(Tick(500))), (1, 2));
        assert_eq!((entry.ttl(Tick(1)), entry.ttl(Tick(10_000)), entry.ttl(Tick(10_001))), (9, 0, -1));
    }
}
