//! Sending upstream: the budget, the circuit breaker, the request; and safe retries.

pub mod breakers;
pub mod budget;
pub mod outgoing;

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use tracing::{Instrument, debug, info, warn};

use super::upstream_state::{Destination, UpstreamState};
use crate::body::{Body, BodyError};
use crate::clock::Clock;
use crate::policy::mode::{Mode, ModeSwitch};
use crate::policy::outcome::Failure;
use crate::policy::resilience::budget::retry_after;
use crate::policy::resilience::retry::{RetryBudget, RetrySafety};
use crate::telemetry::{HealthTransition, Telemetry, spans};
use crate::upstream::{FreshConnection, SendError};
use outgoing::outgoing;

/// Sends requests to one upstream.
#[derive(Debug)]
pub(crate) struct Sender {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) clock: Clock,
    pub(crate) mode: Arc<ModeSwitch>,
    pub(crate) telemetry: Arc<Telemetry>,
}

/// A client's request, and where it goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpstreamRequest<'r> {
    pub(crate) parts: &'r Parts,
    pub(crate) destination: &'r Destination,
}

/// The result of sending a request.
pub(crate) struct Attempt {
    pub(crate) response: Result<Response<Body>, SendError>,
    /// When the request was sent that was answered.
    pub(crate) sent_at: Instant,
    /// Set if the upstream asked for a pause (`Retry-After`).
    pub(crate) retry_after: Option<Duration>,
}

/// How long a response waits for the beginning of its body. A response that breaks before anything of it is sent is a
/// failure, for which something else can stand in.
pub(crate) const BODY_PATIENCE: Duration = Duration::from_millis(20);

/// `Retry-After: 0` is retried after this.
const MIN_RETRY_AFTER: Duration = Duration::from_millis(100);

impl Sender {
    /// Sends a request within the upstream's budget; `shape` changes what is sent. A 429 is waited for and the request
    /// sent again if it is safe. All waiting together is bounded by the budget's `max_wait`.
    pub(crate) async fn send(
        &self,
        request: UpstreamRequest<'_>,
        mut body: Body,
        shape: impl Fn(&mut Request<Body>),
    ) -> Attempt {
        let begun = self.clock.instant();
        loop {
            if let Err(error) = self.wait_for_budget(request, begun).await {
                return self.not_sent(error);
            }
            let copy = body.try_clone().filter(|_| request.parts.method.is_safe());
            let attempt = self.send_now(request, body, &shape).await;
            let in_time = attempt.retry_after.is_some_and(|wait| wait <= self.wait_left(begun));
            let throttled = attempt.response.as_ref().is_ok_and(|r| r.status() == StatusCode::TOO_MANY_REQUESTS);
            let Some(copy) = copy.filter(|_| in_time) else {
                if throttled {
                    self.upstream.metrics.throttled(false);
                }
                return attempt;
            };
            self.telemetry.absorbed();
            self.upstream.metrics.throttled(true);
            body = copy;
        }
    }

    /// Sends a request without waiting for the budget; again only where it is safe. A 429 closes its bucket for its
    /// `Retry-After`.
    pub(crate) async fn send_now(
        &self,
        request: UpstreamRequest<'_>,
        mut body: Body,
        shape: &impl Fn(&mut Request<Body>),
    ) -> Attempt {
        let (mut attempts, mut fresh) = (0, false);
        loop {
            let copy = body.try_clone();
            let mut outgoing = outgoing(request.parts, request.destination, body, self.upstream.adds_via);
            shape(&mut outgoing);
            if fresh {
                outgoing.extensions_mut().insert(FreshConnection);
            }
            let sent_at = self.clock.instant();
            let response = self.send_through_breaker(outgoing, request.destination).await;
            attempts += 1;
            let error = response.as_ref().err();
            // The HTTP library reports a stream that it has begun and given up at a GOAWAY like one that the upstream has
            // not processed. Without content, the request may have been whole.
            let may_be_whole = matches!(copy, Some(Body::Empty)) && !request.parts.method.is_idempotent();
            let unclear = |error: &SendError| error.retry_safety == RetrySafety::Unprocessed && may_be_whole;
            let error = error.filter(|error| !unclear(error));
            let pause = error.and_then(|error| self.retry_pause(&request.parts.method, error, attempts));
            if let (Some(pause), Some(copy)) = (pause, copy) {
                fresh = error.is_some_and(|error| error.retry_safety == RetrySafety::ReusedConnectionDied);
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                body = copy;
                continue;
            }
            let retry_after = response.as_ref().ok().and_then(|response| self.apply_retry_after(response, request));
            return Attempt { response, sent_at, retry_after };
        }
    }

    /// An attempt that ended before anything was sent.
    pub(crate) fn not_sent(&self, error: SendError) -> Attempt {
        Attempt { response: Err(error), sent_at: self.clock.instant(), retry_after: None }
    }

    /// Waits for the budget, at most as long as it lets a request wait that began at `begun`.
    pub(crate) async fn wait_for_budget(
        &self,
        request: UpstreamRequest<'_>,
        begun: Instant,
    ) -> Result<(), SendError> {
        let (headers, destination) = (&request.parts.headers, request.destination);
        let Some(bucket) = self.upstream.limiting_bucket(destination, headers) else { return Ok(()) };
        let waits_since = self.clock.instant();
        let admitted = bucket.admit(self.wait_left(begun)).await;
        let metrics = &self.upstream.metrics;
        let waited = if request.parts.method.is_safe() { &metrics.reads_waited } else { &metrics.writes_waited };
        waited.add(self.clock.instant().saturating_duration_since(waits_since));
        admitted.map_err(|exceeded| {
            self.telemetry.refused_by_budget();
            let message = format!("the budget allows the next request in {:?}, later than max_wait", exceeded.0);
            unsent(Failure::Throttled, message)
        })
    }

    fn wait_left(&self, begun: Instant) -> Duration {
        let waited = self.clock.instant().saturating_duration_since(begun);
        self.upstream.budgets.max_wait().saturating_sub(waited)
    }

    /// Closes the bucket of a request for the `Retry-After` of a 429.
    fn apply_retry_after(&self, response: &Response<Body>, request: UpstreamRequest<'_>) -> Option<Duration> {
        if response.status() != StatusCode::TOO_MANY_REQUESTS {
            return None;
        }
        self.telemetry.throttled();
        let bucket = self.upstream.bucket(request.destination, &request.parts.headers)?;
        let wait = retry_after(response.headers(), self.clock.wall())?.max(MIN_RETRY_AFTER);
        self.upstream.budgets.close(&bucket, wait);
        Some(wait)
    }

    /// Returns the pause before a retry, if it is safe and the retry budget allows it.
    fn retry_pause(&self, method: &Method, error: &SendError, attempts: u32) -> Option<Duration> {
        let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
        let pause = self.upstream.retry.pause(method, error.retry_safety, attempts, jitter)?;
        (error.was_tried() && (error.retry_safety.is_free() || self.retry_budget().withdraw())).then_some(pause)
    }

    fn retry_budget(&self) -> MutexGuard<'_, RetryBudget> {
        self.upstream.retry_budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send_through_breaker(
        &self,
        mut request: Request<Body>,
        destination: &Destination,
    ) -> Result<Response<Body>, SendError> {
        let host = destination.authority.as_str();
        let (breakers, config) = (&self.upstream.breakers, &self.upstream.breaker_config);
        // In a pass-through mode nothing is refused; results are still counted.
        let refuses = self.mode.mode(self.clock.now()) == Mode::Normal;
        let admitted = breakers.admit(host, config, self.clock.now());
        if let Some(wait) = admitted.err().filter(|_| refuses) {
            let message = format!("the circuit breaker of {host} is open: next attempt in {wait:?}");
            return Err(unsent(Failure::Unavailable, message));
        }
        self.retry_budget().deposit();
        let span = spans::upstream(&request.method().clone(), host, request.headers_mut());
        let response = self.upstream.client.send(request).instrument(span.clone()).await;
        let response = match response {
            Ok(response) => begun(response).await,
            Err(error) => Err(error),
        };
        match &response {
            Ok(response) => span.record("http.response.status_code", response.status().as_u16()),
            Err(error) => span.record("error.type", error.failure.cause()),
        };
        self.record_in_breaker(host, &response);
        response
    }

    fn record_in_breaker(&self, host: &str, response: &Result<Response<Body>, SendError>) {
        let (upstream, breakers) = (&*self.upstream.name, &self.upstream.breakers);
        let (config, now) = (&self.upstream.breaker_config, self.clock.now());
        match response {
            // A fault of the client says nothing about the upstream.
            Err(error) if error.client.is_some() => {}
            Err(error) if error.unreachable => {
                if breakers.with(host, |breaker| breaker.failed(config, now)) {
                    warn!(upstream, host, "circuit breaker opened: {error}");
                }
            }
            Ok(response) if config.on_5xx && response.status().is_server_error() => {
                if breakers.with(host, |breaker| breaker.failed_by_answer(config, now)) {
                    warn!(upstream, host, "circuit breaker opened: half of the responses are 5xx");
                }
            }
            Ok(_) | Err(_) => {
                if breakers.with(host, |breaker| breaker.succeeded(now)) {
                    info!(upstream, host, "circuit breaker closed");
                }
            }
        }
    }

    /// Counts a response of the upstream.
    pub(crate) fn record_response(&self, response: &Response<Body>, took: Duration) {
        self.record(Failure::from_status(response.status()), took, response.status().as_str());
    }

    /// Counts an attempt without a response, if it was one.
    pub(crate) fn record_error(&self, error: &SendError, took: Duration) {
        if error.was_tried() {
            self.record(Some(error.failure), took, &error.message);
        }
    }

    /// Counts the end of a request to the upstream. Logs the first failure, and the first success after it.
    fn record(&self, failure: Option<Failure>, took: Duration, result: &str) {
        self.telemetry.upstream(failure);
        self.upstream.metrics.record_upstream(failure, took);
        let (upstream, cause) = (&*self.upstream.name, failure.map_or("", Failure::cause));
        match self.upstream.health.record(failure, self.clock.now()) {
            HealthTransition::Failing => warn!(upstream, cause, "the upstream fails: {result}"),
            HealthTransition::Recovered => info!(upstream, "the upstream responds again"),
            HealthTransition::None => debug!(upstream, cause, result, "request to the upstream ended"),
        }
    }
}

/// Reads the beginning of a response's body. A body that breaks in it is no response.
async fn begun(response: Response<Body>) -> Result<Response<Body>, SendError> {
    let (head, body) = response.into_parts();
    let patience = if body.is_small() { BODY_PATIENCE } else { Duration::ZERO };
    match body.begun(patience).await {
        Ok(body) => Ok(Response::from_parts(head, body)),
        Err(BodyError::Upstream(failure)) => Err(SendError::unanswered(failure, "the response body ended early")),
        Err(error) => Err(SendError::unanswered(Failure::Connect, error.to_string())),
    }
}

/// The error of a request that was not sent.
fn unsent(failure: Failure, message: String) -> SendError {
    SendError { retry_safety: RetrySafety::Unsent, ..SendError::unanswered(failure, message) }
}
