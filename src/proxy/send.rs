//! The way to the upstream: the budget's turn, the breaker's leave, the request; and once more where that is safe,
//! or where the upstream asked us to wait.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::header::HeaderMap;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use tracing::{info, warn};

use super::Proxy;
use super::budget::Bucket;
use super::forward::outgoing;
use super::site::Place;
use crate::body::Body;
use crate::policy::circuit::Circuit;
use crate::policy::outcome::Failure;
use crate::policy::quota::retry_after;
use crate::policy::retry::{Ended, RetryBudget};
use crate::upstream::SendError;

/// What came of sending a request, and when the request went out that it answers.
pub(super) struct Sent {
    pub(super) answer: Result<Response<Body>, SendError>,
    pub(super) at: Instant,
}

/// An upstream that says "again, at once" is asked again after this.
const LEAST_WAIT: Duration = Duration::from_millis(100);

impl Proxy {
    /// Sends what was asked when it is its turn, `shape` having made of it what the occasion needs. All waiting for
    /// turns together is bounded by the budget's `max_wait`.
    pub(super) async fn send(
        &self,
        asked: &Parts,
        place: &Place,
        mut body: Body,
        shape: impl Fn(&mut Request<Body>),
    ) -> Sent {
        let begun = self.commons.clock.instant();
        for made in 1.. {
            if let Err(late) = self.turn(asked, place, begun).await {
                return Sent { answer: Err(late), at: self.commons.clock.instant() };
            }
            let copy = body.try_clone();
            let sent = self.attempt(asked, place, body, &shape).await;
            let again = match &sent.answer {
                Ok(answer) => self.absorbs(answer, asked, place, begun, copy.is_some()),
                Err(error) => self.retry(&asked.method, error, made).await,
            };
            match copy.filter(|_| again) {
                Some(copy) => body = copy,
                None => return sent,
            }
        }
        unreachable!("the loop returns")
    }

    /// Sends a write whose turn has come. It is not sent again, but where nothing of it can have been.
    pub(super) async fn send_once(&self, asked: &Parts, place: &Place, mut body: Body) -> Sent {
        for made in 1.. {
            let copy = body.try_clone();
            let sent = self.attempt(asked, place, body, &|_| {}).await;
            let again = match &sent.answer {
                Ok(answer) => {
                    self.obey(answer, asked, place);
                    false
                }
                Err(error) => self.retry(&asked.method, error, made).await,
            };
            match copy.filter(|_| again) {
                Some(copy) => body = copy,
                None => return sent,
            }
        }
        unreachable!("the loop returns")
    }

    /// Waits for a turn, as long as the budget lets a request wait that came at `begun`.
    pub(super) async fn turn(&self, asked: &Parts, place: &Place, begun: Instant) -> Result<(), SendError> {
        let budgets = &self.site.budgets;
        let Some(bucket) = budgets.in_the_way(|| self.bucket(place, &asked.headers)) else { return Ok(()) };
        bucket.admit(self.patience(begun)).await.map_err(|late| {
            self.commons.telemetry.refused_by_budget();
            unsent(Failure::Throttled, format!("no turn within max_wait: the next is in {:?}", late.0))
        })
    }

    fn patience(&self, begun: Instant) -> Duration {
        let waited = self.commons.clock.instant().saturating_duration_since(begun);
        self.site.budgets.max_wait().saturating_sub(waited)
    }

    /// One attempt, made anew from what was asked.
    async fn attempt(&self, asked: &Parts, place: &Place, body: Body, shape: &impl Fn(&mut Request<Body>)) -> Sent {
        let mut request = outgoing(asked, place, body);
        shape(&mut request);
        let at = self.commons.clock.instant();
        Sent { answer: self.through_breaker(request, place).await, at }
    }

    /// Should a 429 be waited for, and the request sent again?
    fn absorbs(&self, answer: &Response<Body>, asked: &Parts, place: &Place, begun: Instant, can: bool) -> bool {
        let Some(wait) = self.obey(answer, asked, place) else { return false };
        let again = can && asked.method.is_safe() && wait <= self.patience(begun);
        if again {
            self.commons.telemetry.absorbed();
        }
        again
    }

    /// Closes the bucket for as long as a 429 says.
    fn obey(&self, answer: &Response<Body>, asked: &Parts, place: &Place) -> Option<Duration> {
        if answer.status() != StatusCode::TOO_MANY_REQUESTS {
            return None;
        }
        self.commons.telemetry.throttled();
        let bucket = self.bucket(place, &asked.headers)?;
        let wait = retry_after(answer.headers(), self.commons.clock.wall())?.max(LEAST_WAIT);
        self.site.budgets.close(&bucket, wait);
        Some(wait)
    }

    /// Waits before the one retry that is safe, if this is one.
    async fn retry(&self, method: &Method, error: &SendError, made: u32) -> bool {
        let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
        let Some(pause) = self.site.retry.pause(method, error.ended, made, jitter) else { return false };
        let may = error.was_tried() && self.retries().withdraw();
        if may {
            tokio::time::sleep(pause).await;
        }
        may
    }

    fn retries(&self) -> MutexGuard<'_, RetryBudget> {
        self.site.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn through_breaker(&self, request: Request<Body>, place: &Place) -> Result<Response<Body>, SendError> {
        let upstream = &*self.site.name;
        let breaker = |change: &dyn Fn(&mut Circuit) -> bool| self.site.breakers.with(place.connect.as_str(), change);
        let tolerance = self.site.tolerance;
        if let Err(wait) = self.site.breakers.admits(place.connect.as_str(), tolerance, self.commons.clock.now()) {
            let message = format!("the breaker is open: the next try is in {wait:?}");
            return Err(unsent(Failure::Unavailable, message));
        }
        self.retries().deposit();
        let answer = self.site.upstream.send(request).await;
        let now = self.commons.clock.now();
        let host = place.connect.as_str();
        if answer.as_ref().is_err_and(|error| error.client.is_some()) {
            // The client's fault says nothing about the upstream.
            return answer;
        }
        if answer.as_ref().is_err_and(|error| error.silent) {
            if breaker(&|circuit| circuit.failed(tolerance, now)) {
                warn!(upstream, host, "the breaker opens: nobody answers there");
            }
        } else if breaker(&|circuit| circuit.succeeded(now)) {
            info!(upstream, host, "the breaker closes");
        }
        answer
    }

    fn bucket(&self, place: &Place, headers: &HeaderMap) -> Option<Arc<Bucket>> {
        self.site.budgets.bucket(&place.host, headers, |name| self.site.is_credential(name))
    }

    /// How long the upstream wants to hear nothing of those who ask with these headers.
    pub(super) fn closed_for(&self, place: &Place, headers: &HeaderMap) -> Option<Duration> {
        self.site.budgets.in_the_way(|| self.bucket(place, headers))?.closed_for()
    }
}

/// No request was sent.
fn unsent(failure: Failure, message: String) -> SendError {
    SendError { ended: Ended::Unsent, ..SendError::unanswered(failure, message) }
}
