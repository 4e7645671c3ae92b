//! The way to the upstream: the budget's turn, the breaker's leave, the request; and once more where that is safe,
//! or where the upstream asked us to wait.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::header::HeaderMap;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use tracing::{Instrument, info, warn};

use super::Proxy;
use super::budget::Bucket;
use super::forward::outgoing;
use super::site::Place;
use crate::body::Body;
use crate::policy::mode::Mode;
use crate::policy::outcome::Failure;
use crate::policy::quota::retry_after;
use crate::policy::retry::{Ended, RetryBudget};
use crate::telemetry::spans;
use crate::upstream::SendError;

/// What came of sending a request, and when the request went out that it answers.
pub(super) struct Sent {
    pub(super) answer: Result<Response<Body>, SendError>,
    pub(super) at: Instant,
    /// The upstream wants to hear nothing for so long.
    pub(super) wait: Option<Duration>,
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
        loop {
            if let Err(late) = self.turn(asked, place, begun).await {
                return Sent { answer: Err(late), at: self.commons.clock.instant(), wait: None };
            }
            let copy = body.try_clone().filter(|_| asked.method.is_safe());
            let sent = self.send_now(asked, place, body, &shape).await;
            let in_time = sent.wait.is_some_and(|wait| wait <= self.patience(begun));
            let throttled = sent.answer.as_ref().is_ok_and(|answer| answer.status() == StatusCode::TOO_MANY_REQUESTS);
            let Some(copy) = copy.filter(|_| in_time) else {
                if throttled {
                    self.site.meter.throttled(false);
                }
                return sent;
            };
            self.commons.telemetry.absorbed();
            self.site.meter.throttled(true);
            body = copy;
        }
    }

    /// Sends what has had its turn, again only where nothing of it can have been done. A 429 closes its bucket for as
    /// long as it says.
    pub(super) async fn send_now(
        &self,
        asked: &Parts,
        place: &Place,
        mut body: Body,
        shape: &impl Fn(&mut Request<Body>),
    ) -> Sent {
        let mut made = 0;
        loop {
            let copy = body.try_clone();
            let mut request = outgoing(asked, place, body);
            shape(&mut request);
            let at = self.commons.clock.instant();
            let answer = self.through_breaker(request, place).await;
            made += 1;
            let pause = answer.as_ref().err().and_then(|error| self.retry_pause(&asked.method, error, made));
            if let (Some(pause), Some(copy)) = (pause, copy) {
                tokio::time::sleep(pause).await;
                body = copy;
                continue;
            }
            let wait = answer.as_ref().ok().and_then(|answer| self.obey(answer, asked, place));
            return Sent { answer, at, wait };
        }
    }

    /// Waits for a turn, as long as the budget lets a request wait that came at `begun`.
    pub(super) async fn turn(&self, asked: &Parts, place: &Place, begun: Instant) -> Result<(), SendError> {
        let budgets = &self.site.budgets;
        let Some(bucket) = budgets.in_the_way(|| self.bucket(place, &asked.headers)) else { return Ok(()) };
        let came = self.commons.clock.instant();
        let admitted = bucket.admit(self.patience(begun)).await;
        let meter = &self.site.meter;
        let waited = if asked.method.is_safe() { &meter.reads_waited } else { &meter.writes_waited };
        waited.add(self.commons.clock.instant().saturating_duration_since(came));
        admitted.map_err(|late| {
            self.commons.telemetry.refused_by_budget();
            unsent(Failure::Throttled, format!("no turn within max_wait: the next is in {:?}", late.0))
        })
    }

    fn patience(&self, begun: Instant) -> Duration {
        let waited = self.commons.clock.instant().saturating_duration_since(begun);
        self.site.budgets.max_wait().saturating_sub(waited)
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

    /// How long to wait before the one retry that is safe, if this is one and there is some left to spend.
    fn retry_pause(&self, method: &Method, error: &SendError, made: u32) -> Option<Duration> {
        let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
        let pause = self.site.retry.pause(method, error.ended, made, jitter)?;
        (error.was_tried() && self.retries().withdraw()).then_some(pause)
    }

    fn retries(&self) -> MutexGuard<'_, RetryBudget> {
        self.site.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn through_breaker(&self, mut request: Request<Body>, place: &Place) -> Result<Response<Body>, SendError> {
        let (upstream, host) = (&*self.site.name, place.connect.as_str());
        let (breakers, tolerance, clock) = (&self.site.breakers, self.site.tolerance, &self.commons.clock);
        // Handing everything through, we refuse nothing; what happens is counted.
        let bypasses = self.commons.mode.mode(clock.now()) != Mode::Normal;
        if let Some(wait) = breakers.admits(host, tolerance, clock.now()).err().filter(|_| !bypasses) {
            let message = format!("the breaker is open: the next try is in {wait:?}");
            return Err(unsent(Failure::Unavailable, message));
        }
        self.retries().deposit();
        let span = spans::upstream(&request.method().clone(), host, request.headers_mut());
        let answer = self.site.upstream.send(request).instrument(span.clone()).await;
        match &answer {
            Ok(response) => span.record("http.response.status_code", response.status().as_u16()),
            Err(error) => span.record("error.type", error.failure.cause()),
        };
        let now = clock.now();
        match &answer {
            // The client's fault says nothing about the upstream.
            Err(error) if error.client.is_some() => {}
            Err(error) if error.silent => {
                if breakers.with(host, |circuit| circuit.failed(tolerance, now)) {
                    warn!(upstream, host, "the breaker opens: nobody answers there");
                }
            }
            Ok(_) | Err(_) => {
                if breakers.with(host, |circuit| circuit.succeeded(now)) {
                    info!(upstream, host, "the breaker closes");
                }
            }
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
