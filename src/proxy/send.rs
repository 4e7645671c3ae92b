//! The way to the upstream: the budget's turn, the breaker's leave, the request; and once more where that is safe,
//! or where the upstream asked us to wait.

use std::sync::{Arc, PoisonError};
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
use crate::policy::retry::Ended;
use crate::upstream::SendError;

/// What came of sending a request, and when the request went out that it answers.
pub(super) struct Sent {
    pub(super) answer: Result<Response<Body>, SendError>,
    pub(super) at: Instant,
}

impl Proxy {
    /// Sends what was asked when it is its turn, `shape` having made of it what the occasion needs.
    pub(super) async fn send(
        &self,
        asked: &Parts,
        place: &Place,
        mut body: Body,
        shape: impl Fn(&mut Request<Body>),
    ) -> Sent {
        let mut patience = self.site.budgets.max_wait();
        self.site.retries.lock().unwrap_or_else(PoisonError::into_inner).deposit();
        for made in 1.. {
            let came = self.commons.clock.instant();
            let bucket = self.site.budgets.in_the_way(|| self.bucket(place, &asked.headers));
            if let Some(bucket) = &bucket
                && let Err(late) = bucket.admit(patience).await
            {
                self.commons.telemetry.refused_by_budget();
                let message = format!("no turn within max_wait: the next is in {:?}", late.0);
                return Sent { answer: Err(unsent(Failure::Throttled, message)), at: came };
            }
            let at = self.commons.clock.instant();
            patience = patience.saturating_sub(at.saturating_duration_since(came));
            let copy = body.try_clone();
            let mut request = outgoing(asked, place, body);
            shape(&mut request);
            let answer = self.through_breaker(request, place).await;
            let again = match &answer {
                Ok(answer) => self.throttled(answer, asked, place, patience),
                Err(error) => self.retry(&asked.method, error, made).await,
            };
            match copy.filter(|_| again) {
                Some(copy) => body = copy,
                None => return Sent { answer, at },
            }
        }
        unreachable!("the loop returns")
    }

    /// Obeys a 429 that says when to come again. True if the request may be sent again then.
    fn throttled(&self, answer: &Response<Body>, asked: &Parts, place: &Place, patience: Duration) -> bool {
        if answer.status() != StatusCode::TOO_MANY_REQUESTS {
            return false;
        }
        self.commons.telemetry.throttled();
        let bucket = self.bucket(place, &asked.headers);
        let wait = retry_after(answer.headers(), self.commons.clock.wall());
        let (Some(bucket), Some(wait)) = (bucket, wait) else { return false };
        self.site.budgets.close(&bucket, wait);
        let again = asked.method.is_safe() && wait <= patience;
        if again {
            self.commons.telemetry.absorbed();
        }
        again
    }

    /// Waits before the one retry that is safe, if this is one.
    async fn retry(&self, method: &Method, error: &SendError, made: u32) -> bool {
        let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
        let Some(pause) = self.site.retry.pause(method, error.ended, made, jitter) else { return false };
        let may = error.was_tried() && self.site.retries.lock().unwrap_or_else(PoisonError::into_inner).withdraw();
        if may {
            tokio::time::sleep(pause).await;
        }
        may
    }

    async fn through_breaker(&self, request: Request<Body>, place: &Place) -> Result<Response<Body>, SendError> {
        let upstream = &*self.site.name;
        let breaker = |change: &dyn Fn(&mut Circuit) -> bool| self.site.breakers.with(place.connect.as_str(), change);
        let tolerance = self.site.tolerance;
        if let Err(wait) = self.site.breakers.admits(place.connect.as_str(), tolerance, self.commons.clock.now()) {
            let message = format!("the breaker is open: the next try is in {wait:?}");
            return Err(unsent(Failure::Unavailable, message));
        }
        let answer = self.site.upstream.send(request).await;
        let now = self.commons.clock.now();
        let host = place.connect.as_str();
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
