//! May this entry be served, now, to this request? (RFC 9111 §4.2, §5.2.1; RFC 5861)
//!
//! Everything that can be computed when storing was: a verdict compares a few numbers.

use http::header::{CACHE_CONTROL, HeaderMap, PRAGMA};

use super::cache_control::CacheControl;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::invalidation::ledger::InvalidationState;
use crate::policy::outcome::{Failure, StaleReason};
use crate::policy::routing::rule::{CacheMode, Rule};

/// What to do with what was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Serve it.
    Fresh,
    /// Serve it, and refresh it behind the client's back.
    WhileRevalidate,
    /// Fetch first. The ladder may come back to it.
    Stale,
    /// Fetch first: the client insists.
    Refused,
    /// Forget it: it was purged, or has outlived everything.
    Gone,
}

/// The directives of a request that bear on what may be served to it. Under `override` there are none.
#[derive(Debug, Clone, Default)]
pub struct RequestDirectives(Option<Box<CacheControl>>);

impl RequestDirectives {
    /// Reads them, where the rule lets the client have a say.
    pub fn from_request(rule: &Rule, headers: &HeaderMap) -> RequestDirectives {
        let silent = !headers.contains_key(CACHE_CONTROL) && !headers.contains_key(PRAGMA);
        if silent || rule.mode != CacheMode::Http {
            return RequestDirectives(None);
        }
        RequestDirectives(Some(Box::new(CacheControl::of_request(headers))))
    }

    /// `no-store`.
    pub fn no_store(&self) -> bool {
        self.0.as_ref().is_some_and(|d| d.no_store)
    }

    /// `only-if-cached`.
    pub fn only_if_cached(&self) -> bool {
        self.0.as_ref().is_some_and(|d| d.only_if_cached)
    }
}

/// The verdict on an entry.
pub fn evaluate(entry: &Entry, standing: InvalidationState, demands: &RequestDirectives, now: Tick) -> Verdict {
    if standing == InvalidationState::Gone || entry.expired(now) {
        return Verdict::Gone;
    }
    let left = freshness_left(entry, now);
    let by_age = if entry.lifetimes.always_validate || standing == InvalidationState::Unverified {
        Verdict::Stale
    } else if standing == InvalidationState::Valid && left > 0 {
        Verdict::Fresh
    } else if within(entry.lifetimes.while_revalidate, left) {
        Verdict::WhileRevalidate
    } else {
        Verdict::Stale
    };
    match &demands.0 {
        Some(demands) => with_directives(by_age, entry, demands, left, now),
        None => by_age,
    }
}

fn with_directives(by_age: Verdict, entry: &Entry, demands: &CacheControl, left: i64, now: Tick) -> Verdict {
    let seconds_left = left.div_euclid(1000);
    let too_old = demands.max_age.is_some_and(|max| entry.age(now) > max || max == 0);
    let too_soon = demands.min_fresh.is_some_and(|min| seconds_left < i64::try_from(min).unwrap_or(i64::MAX));
    if demands.no_cache || too_old || too_soon {
        return Verdict::Refused;
    }
    let tolerated = demands.max_stale.is_some_and(|max| left <= 0 && within(max.saturating_mul(1000), left));
    if by_age == Verdict::Stale && tolerated && !entry.lifetimes.always_validate && entry.lifetimes.disconnected > 0 {
        return Verdict::WhileRevalidate;
    }
    by_age
}

/// Why a stale entry may stand in for a failed fetch, if it may.
pub fn stale_on_failure(
    entry: &Entry,
    standing: InvalidationState,
    failure: Failure,
    now: Tick,
) -> Option<StaleReason> {
    if standing == InvalidationState::Gone {
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

/// Milliseconds of freshness left, negative when stale.
fn freshness_left(entry: &Entry, now: Tick) -> i64 {
    entry.lifetimes.fresh_for.saturating_sub(i64::try_from(entry.resident_time(now)).unwrap_or(i64::MAX))
}

/// Is it stale by no more than `window` milliseconds (or fresh, and the window is open at all)?
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

    fn demands(value: &'static str) -> RequestDirectives {
        let headers = HeaderMap::from_iter([(CACHE_CONTROL, HeaderValue::from_static(value))]);
        RequestDirectives(Some(Box::new(CacheControl::of_request(&headers))))
    }

    #[test]
    fn time_passes_through_the_windows() {
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
        for (at, standing, expected) in table {
            assert_eq!(evaluate(&entry, standing, &RequestDirectives(None), Tick(at)), expected, "{at} {standing:?}");
        }
    }

    #[test]
    fn the_client_may_ask_for_more_or_be_content_with_less() {
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
                evaluate(&entry, InvalidationState::Valid, &demands(directive), Tick(at)),
                expected,
                "{directive} {at}"
            );
        }
    }

    #[test]
    fn the_ladder_climbs_down_window_by_window() {
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
    fn age_and_ttl_are_whole_seconds_that_never_flatter() {
        let entry = entry(Lifetimes { initial_age: 1_500, ..terms() });
        assert_eq!((entry.age(Tick(400)), entry.age(Tick(500))), (1, 2));
        assert_eq!((entry.ttl(Tick(1)), entry.ttl(Tick(10_000)), entry.ttl(Tick(10_001))), (9, 0, -1));
    }
}
