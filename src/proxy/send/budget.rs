//! The budget of upstream requests: a token bucket for each credential or host. Requests wait in order of arrival for
//! the configured rate, and while `Retry-After` closes the bucket.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use http::header::{HeaderMap, HeaderName};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::policy::millis;
use crate::policy::resilience::budget::{Budget, BudgetScope, RequestRate};

/// Maximum number of buckets. Beyond it, unused ones are evicted.
const MAX_BUCKETS: usize = 10_000;

/// The buckets of one upstream.
#[derive(Debug)]
pub struct Budgets {
    budget: Option<Budget>,
    buckets: Mutex<HashMap<u64, Arc<TokenBucket>>>,
    hasher: RandomState,
    clock: GovernorClock,
    /// The tick until which at least one bucket is closed, in milliseconds. 0: none ever was.
    closed_until: AtomicU64,
}

/// One bucket.
#[derive(Debug)]
pub struct TokenBucket {
    pace: Option<(RequestRate, Limiter)>,
    /// First come, first served: tokio's semaphore is fair.
    turn: Semaphore,
    waiting: AtomicU32,
    /// The tick of the last use, in milliseconds.
    used: AtomicU64,
    closed: Mutex<Option<Instant>>,
    clock: GovernorClock,
}

type Limiter = RateLimiter<NotKeyed, InMemoryState, GovernorClock, NoOpMiddleware<Duration>>;

/// The state of the buckets of an upstream.
#[derive(Debug, Clone, PartialEq)]
pub struct BudgetState {
    /// The rate of each bucket, in requests per second. `None`: no rate is configured.
    pub per_second: Option<f64>,
    /// The number of buckets.
    pub buckets: usize,
    /// The number of requests that wait.
    pub waiting: u32,
    /// The remaining times of the closed buckets.
    pub closed: Vec<Duration>,
}

/// The request would wait for longer than `max_wait`. Holds the expected wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BudgetExceeded(pub Duration);

/// Tokio's clock, for governor.
#[derive(Debug, Clone, Copy)]
struct GovernorClock(Instant);

impl Clock for GovernorClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

impl Budgets {
    /// Returns the configured budget.
    pub fn budget(&self) -> Option<Budget> {
        self.budget
    }

    /// Returns the state for the admin API.
    pub fn state(&self) -> BudgetState {
        let buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = buckets.values().map(|bucket| bucket.waiting.load(Ordering::Relaxed)).sum();
        let mut closed: Vec<Duration> = buckets.values().filter_map(|bucket| bucket.closed_for()).collect();
        closed.sort_unstable();
        let per_second = self.budget.and_then(|budget| budget.pace).map(|pace| 1.0 / pace.every.as_secs_f64());
        BudgetState { per_second, buckets: buckets.len(), waiting, closed }
    }

    /// Creates the buckets of a budget. Without one, no request waits.
    pub fn new(budget: Option<Budget>) -> Budgets {
        let (buckets, hasher) = (Mutex::default(), RandomState::new());
        Budgets { budget, buckets, hasher, clock: GovernorClock(Instant::now()), closed_until: AtomicU64::new(0) }
    }

    /// Returns the maximum wait of a request.
    pub fn max_wait(&self) -> Duration {
        self.budget.map_or(Duration::ZERO, |budget| budget.max_wait)
    }

    /// Returns the bucket of a request if it may delay the request now: it has a rate, or a bucket is closed.
    pub fn limiting(&self, bucket: impl FnOnce() -> Option<Arc<TokenBucket>>) -> Option<Arc<TokenBucket>> {
        let paced = self.budget?.pace.is_some();
        let until = self.closed_until.load(Ordering::Relaxed);
        let closed = until > 0 && until >= millis(self.clock.now());
        if paced || closed { bucket() } else { None }
    }

    /// Closes the bucket for this time (`Retry-After`).
    pub fn close(&self, bucket: &TokenBucket, wait: Duration) {
        bucket.close(wait);
        self.closed_until.fetch_max(millis(self.clock.now() + wait) + 1, Ordering::Relaxed);
    }

    /// Returns the bucket of a request to `host`. `is_credential`: whether a header field is a credential.
    pub fn bucket(
        &self,
        host: &str,
        headers: &HeaderMap,
        is_credential: impl Fn(&HeaderName) -> bool,
    ) -> Option<Arc<TokenBucket>> {
        let budget = self.budget?;
        let mut id = self.hasher.build_hasher();
        host.hash(&mut id);
        if budget.per == BudgetScope::Credential {
            let mut names: Vec<&HeaderName> = headers.keys().filter(|name| is_credential(name)).collect();
            names.sort_unstable_by_key(|name| name.as_str());
            for name in names {
                name.hash(&mut id);
                headers.get_all(name).iter().for_each(|value| value.as_bytes().hash(&mut id));
            }
        }
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_BUCKETS {
            self.evict_buckets(&mut buckets);
        }
        let bucket = buckets.entry(id.finish()).or_insert_with(|| Arc::new(TokenBucket::new(&budget, self.clock)));
        bucket.used.store(millis(self.clock.now()), Ordering::Relaxed);
        Some(bucket.clone())
    }

    /// Evicts unused full buckets; if that is not enough, closed ones too.
    fn evict_buckets(&self, buckets: &mut HashMap<u64, Arc<TokenBucket>>) {
        let now = millis(self.clock.now());
        let in_use = |bucket: &Arc<TokenBucket>| Arc::strong_count(bucket) > 1;
        let full_again = |bucket: &TokenBucket| {
            let fills = bucket.pace.as_ref().map_or(0, |(pace, _)| millis(pace.every.saturating_mul(pace.burst)));
            bucket.used.load(Ordering::Relaxed) + fills < now && bucket.closed_for().is_none()
        };
        buckets.retain(|_, bucket| in_use(bucket) || !full_again(bucket));
        if buckets.len() >= MAX_BUCKETS {
            buckets.retain(|_, bucket| in_use(bucket));
        }
    }
}

impl TokenBucket {
    fn new(budget: &Budget, clock: GovernorClock) -> TokenBucket {
        let limiter = |pace: RequestRate| {
            let burst = pace.burst.try_into().unwrap_or(std::num::NonZeroU32::MIN);
            let quota = Quota::with_period(pace.every)?.allow_burst(burst);
            Some((pace, RateLimiter::direct_with_clock(quota, clock)))
        };
        TokenBucket {
            pace: budget.pace.and_then(limiter),
            turn: Semaphore::new(1),
            waiting: AtomicU32::new(0),
            used: AtomicU64::new(0),
            closed: Mutex::default(),
            clock,
        }
    }

    fn closed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the remaining time for which the bucket is closed.
    pub fn closed_for(&self) -> Option<Duration> {
        let until = (*self.closed())?;
        Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    /// Closes the bucket for this time.
    fn close(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut closed = self.closed();
        *closed = Some(closed.map_or(until, |earlier| earlier.max(until)));
    }

    /// Waits until the request may be sent, at most for `max_wait`. Fails at once if that can't be enough.
    pub async fn admit(&self, max_wait: Duration) -> Result<(), BudgetExceeded> {
        let expected = self.expected();
        if expected > max_wait {
            return Err(BudgetExceeded(expected));
        }
        let by = Instant::now() + max_wait;
        let _waiting = WaitingCount::on(&self.waiting);
        let Ok(turn) = timeout_at(by, self.turn.acquire()).await else { return Err(BudgetExceeded(self.expected())) };
        loop {
            let next = match (self.closed_for(), &self.pace) {
                (Some(left), _) => Instant::now() + left,
                (None, None) => break,
                (None, Some((_, limiter))) => match limiter.check() {
                    Ok(()) => break,
                    Err(early) => Instant::now() + early.wait_time_from(self.clock.now()),
                },
            };
            if next > by {
                return Err(BudgetExceeded(next.saturating_duration_since(Instant::now())));
            }
            sleep_until(next).await;
        }
        drop(turn);
        Ok(())
    }

    /// Returns the expected wait of a new request: the rest of the closed time, and the requests before it.
    fn expected(&self) -> Duration {
        let before = self.waiting.load(Ordering::Relaxed);
        let queue = self.pace.as_ref().map_or(Duration::ZERO, |(pace, _)| pace.every.saturating_mul(before));
        self.closed_for().unwrap_or_default() + queue
    }
}

/// Counts a waiting request until it is dropped.
struct WaitingCount<'a>(&'a AtomicU32);

impl<'a> WaitingCount<'a> {
    fn on(count: &'a AtomicU32) -> WaitingCount<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        WaitingCount(count)
    }
}

impl Drop for WaitingCount<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn bucket(pace: Option<(u64, u32)>, max_wait: u64) -> Arc<TokenBucket> {
        let pace = pace.map(|(every, burst)| RequestRate { every: MS(every), burst });
        let budgets = Budgets::new(Some(Budget { pace, max_wait: MS(max_wait), per: BudgetScope::Host }));
        budgets.bucket("a", &HeaderMap::new(), |_| false).expect("a budget")
    }

    #[tokio::test(start_paused = true)]
    async fn budget_admits_requests_in_order_at_the_configured_rate() {
        let (bucket, start) = (bucket(Some((500, 2)), 5000), Instant::now());
        let mut turns = tokio::task::JoinSet::new();
        for n in 0..6u32 {
            let bucket = bucket.clone();
            turns.spawn(async move {
                bucket.admit(MS(5000)).await.expect("in time");
                (n, start.elapsed().as_millis())
            });
            tokio::task::yield_now().await;
        }
        let mut seen = turns.join_all().await;
        seen.sort_unstable_by_key(|(_, at)| *at);
        let order: Vec<u32> = seen.iter().map(|(n, _)| *n).collect();
        assert_eq!(order, [0, 1, 2, 3, 4, 5]);
        for ((_, at), expected) in seen.iter().zip([0, 0, 500, 1000, 1500, 2000]) {
            assert!(at.abs_diff(expected) <= 2, "{seen:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_would_exceed_the_maximum_wait_are_refused() {
        let (bucket, start) = (bucket(Some((1000, 1)), 2500), Instant::now());
        let waits: Vec<_> = (0..5)
            .map(|_| {
                let bucket = bucket.clone();
                tokio::spawn(async move { bucket.admit(MS(2500)).await })
            })
            .collect();
        let mut admitted = 0;
        for wait in waits {
            admitted += usize::from(wait.await.expect("no panic").is_ok());
        }
        assert_eq!((admitted, start.elapsed().as_secs()), (3, 2), "now, in one second, in two");
    }

    #[tokio::test(start_paused = true)]
    async fn closed_budget_delays_all_requests_until_the_pause_ends() {
        let (bucket, start) = (bucket(None, 5000), Instant::now());
        assert_eq!(bucket.admit(MS(0)).await, Ok(()), "nothing in the way");
        bucket.close(MS(2000));
        bucket.close(MS(100));
        assert_eq!(bucket.admit(MS(1000)).await, Err(BudgetExceeded(MS(2000))));
        let (a, b) = tokio::join!(bucket.admit(MS(5000)), bucket.admit(MS(5000)));
        assert_eq!((a, b), (Ok(()), Ok(())));
        let waited = start.elapsed();
        assert!(waited >= MS(2000) && waited < MS(2010), "{waited:?}");
        assert_eq!(bucket.closed_for(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn cancelled_wait_gives_its_turn_to_the_next_request() {
        let (bucket, start) = (bucket(Some((1000, 1)), 5000), Instant::now());
        bucket.admit(MS(0)).await.expect("the first");
        let leaves = tokio::time::timeout(MS(300), bucket.admit(MS(5000)));
        let (left, stays) = tokio::join!(leaves, bucket.admit(MS(5000)));
        assert!(left.is_err() && stays.is_ok());
        assert_eq!(start.elapsed().as_secs(), 1);
    }

    #[test]
    fn budget_is_separate_per_credential_and_host() {
        let budgets = Budgets::new(Some(Budget { pace: None, max_wait: MS(1), per: BudgetScope::Credential }));
        let headers = |token: &'static str| {
            HeaderMap::from_iter([(http::header::AUTHORIZATION, http::HeaderValue::from_static(token))])
        };
        let is = |name: &HeaderName| *name == http::header::AUTHORIZATION;
        let bucket = |host, token| budgets.bucket(host, &headers(token), is).expect("a budget");
        assert!(Arc::ptr_eq(&bucket("a", "x"), &bucket("a", "x")));
        assert!(!Arc::ptr_eq(&bucket("a", "x"), &bucket("a", "y")));
        assert!(!Arc::ptr_eq(&bucket("a", "x"), &bucket("b", "x")));
        assert!(Budgets::new(None).bucket("a", &headers("x"), is).is_none());
    }
}
