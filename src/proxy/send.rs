//! The way to the upstream: the budget's turn, the breaker's leave, the request; and once more where the upstream
//! asked us to wait and the request is safe.

use std::time::{Duration, Instant};

use http::header::HeaderMap;
use http::{Request, Response, StatusCode};
use tracing::{info, warn};

use super::Proxy;
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
    /// Sends a request when it is its turn.
    pub(super) async fn send(&self, request: Request<Body>, place: &Place) -> Sent {
        let (parts, mut body) = request.into_parts();
        let bucket = self.bucket(place, &parts.headers);
        let mut patience = bucket.as_ref().map_or(Duration::ZERO, |bucket| bucket.max_wait());
        loop {
            let came = self.commons.clock.instant();
            if let Some(bucket) = &bucket
                && let Err(late) = bucket.admit(patience).await
            {
                self.commons.telemetry.refused_by_budget();
                let message = format!("no turn within max_wait: the next is in {:?}", late.0);
                return Sent { answer: Err(unsent(Failure::Throttled, message)), at: came };
            }
            let at = self.commons.clock.instant();
            patience = patience.saturating_sub(at.saturating_duration_since(came));
            let copy = body.try_clone().filter(|_| parts.method.is_safe());
            let answer = self.through_breaker(Request::from_parts(parts.clone(), body), place).await;
            let wait = answer.as_ref().ok().and_then(|answer| self.asked_to_wait(answer));
            match (wait, &bucket, copy) {
                (Some(wait), Some(bucket), copy) => {
                    bucket.close(wait);
                    match copy.filter(|_| wait <= patience) {
                        Some(copy) => body = copy,
                        None => return Sent { answer, at },
                    }
                    self.commons.telemetry.absorbed();
                }
                (_, _, _) => return Sent { answer, at },
            }
        }
    }

    /// 429, and when to come again.
    fn asked_to_wait(&self, answer: &Response<Body>) -> Option<Duration> {
        if answer.status() != StatusCode::TOO_MANY_REQUESTS {
            return None;
        }
        self.commons.telemetry.throttled();
        retry_after(answer.headers(), self.commons.clock.wall())
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

    fn bucket(&self, place: &Place, headers: &HeaderMap) -> Option<std::sync::Arc<super::budget::Bucket>> {
        self.site.budgets.bucket(&place.host, headers, |name| self.site.is_credential(name))
    }

    /// How long the upstream wants to hear nothing of those who ask with these headers.
    pub(super) fn closed_for(&self, place: &Place, headers: &HeaderMap) -> Option<Duration> {
        self.bucket(place, headers)?.closed_for()
    }
}

/// No request was sent.
fn unsent(failure: Failure, message: String) -> SendError {
    SendError { ended: Ended::Unsent, ..SendError::unanswered(failure, message) }
}
