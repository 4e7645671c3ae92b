//! Log of the most recent requests, each with the reason for its outcome.
//!
//! A ring buffer of slots that are overwritten: once it is full, recording a request allocates nothing, and it never
//! blocks (a slot that is being read is skipped).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, StatusCode};
use serde::Serialize;

use super::CompletedRequest;
use crate::policy::Tick;
use crate::policy::outcome::{Failure, Outcome};

/// Number of requests kept.
pub const KEPT: usize = 1000;

/// Maximum length of a path, in bytes. A longer one is truncated.
const LONGEST_PATH: usize = 200;

/// A ring buffer of the last [`KEPT`] requests.
#[derive(Debug)]
pub struct RequestLog {
    slots: Vec<Mutex<LogSlot>>,
    next: AtomicU64,
}

/// The recorded fields of a request: as few as possible, because hits are recorded too.
#[derive(Debug, Clone, Default)]
struct LogSlot {
    /// The number of the request, from 1. 0: the slot is empty.
    number: u64,
    at: Tick,
    took: Duration,
    same: u64,
    upstream: Option<Arc<str>>,
    rule: Option<Arc<str>>,
    method: Method,
    path: String,
    status: StatusCode,
    outcome: &'static str,
    detail: Option<&'static str>,
    cause: Option<&'static str>,
}

/// A logged request, for display: without query and header fields.
#[derive(Debug, Clone, Serialize)]
pub struct LoggedRequest {
    /// The number of the request since the start, from 1.
    pub number: u64,
    /// When the request was received.
    #[serde(skip)]
    pub at: Tick,
    /// The name of the upstream.
    pub upstream: String,
    /// The rule that matched the request. Empty: no rule that allows a response from the cache.
    pub rule: String,
    /// The request method.
    pub method: String,
    /// The request path, without the query.
    pub path: String,
    /// The status of the response.
    pub status: u16,
    /// The outcome: [`Outcome::label`].
    pub outcome: &'static str,
    /// The reason for the outcome: [`Outcome::detail`].
    pub detail: Option<&'static str>,
    /// The cause of the failure, if there was one.
    pub cause: Option<&'static str>,
    /// Time to the response head, in milliseconds.
    pub ms: f64,
    /// Equal for requests with the same method, target and credentials, in this process. 0: a hit.
    #[serde(skip)]
    pub same: u64,
}

impl Default for RequestLog {
    fn default() -> Self {
        let slots = std::iter::repeat_with(Mutex::default).take(KEPT).collect();
        RequestLog { slots, next: AtomicU64::new(0) }
    }
}

impl RequestLog {
    pub(super) fn add(&self, outcome: &Outcome, answered: &CompletedRequest<'_>) {
        let number = self.next.fetch_add(1, Relaxed);
        let at = usize::try_from(number).unwrap_or(0) % KEPT;
        let Some(Ok(mut slot)) = self.slots.get(at).map(Mutex::try_lock) else { return };
        let mut path = std::mem::take(&mut slot.path);
        overwrite(&mut path, answered.request.uri.path());
        *slot = LogSlot {
            number: number + 1,
            at: answered.now,
            took: answered.took,
            same: answered.identity.unwrap_or(0),
            upstream: Some(answered.upstream.clone()),
            rule: answered.rule.map(|rule| rule.name.clone()),
            method: answered.request.method.clone(),
            path,
            status: answered.status,
            outcome: outcome.label(),
            detail: outcome.detail(),
            cause: outcome.failure().map(Failure::cause),
        };
    }

    /// Returns the logged requests, newest first.
    pub fn read(&self) -> Vec<LoggedRequest> {
        let of = |slot: &Mutex<LogSlot>| slot.lock().ok().filter(|slot| slot.number > 0).map(|slot| slot.clone());
        let mut all: Vec<LogSlot> = self.slots.iter().filter_map(of).collect();
        all.sort_unstable_by_key(|slot| std::cmp::Reverse(slot.number));
        all.into_iter().map(logged_request).collect()
    }
}

fn logged_request(slot: LogSlot) -> LoggedRequest {
    LoggedRequest {
        number: slot.number,
        at: slot.at,
        upstream: slot.upstream.as_deref().unwrap_or_default().to_owned(),
        rule: slot.rule.as_deref().unwrap_or_default().to_owned(),
        method: slot.method.to_string(),
        path: slot.path,
        status: slot.status.as_u16(),
        outcome: slot.outcome,
        detail: slot.detail,
        cause: slot.cause,
        ms: (slot.took.as_secs_f64() * 100_000.0).round() / 100.0,
        same: slot.same,
    }
}

fn overwrite(text: &mut String, with: &str) {
    text.clear();
    let end = with.char_indices().map(|(at, _)| at).take_while(|at| *at <= LONGEST_PATH).last().unwrap_or(0);
    text.push_str(if with.len() <= LONGEST_PATH { with } else { &with[..end] });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::http::request_view::RequestView;
    use http::{HeaderMap, Uri};

    #[test]
    fn request_log_keeps_the_latest_requests_newest_first_without_query() {
        let recent = RequestLog::default();
        let (headers, upstream) = (HeaderMap::new(), Arc::from("shop"));
        for n in 0..KEPT + 5 {
            let uri: Uri = format!("/{n}?secret=1").parse().expect("a URI");
            let request = RequestView { method: &Method::GET, uri: &uri, headers: &headers };
            let answered = CompletedRequest {
                upstream: &upstream,
                rule: None,
                request,
                status: StatusCode::OK,
                now: Tick(7),
                took: Duration::from_micros(1500),
                request_id: None,
                identity: None,
            };
            recent.add(&Outcome::Hit { ttl: 1 }, &answered);
        }
        let all = recent.read();
        assert_eq!(all.len(), KEPT);
        assert_eq!((all[0].path.as_str(), all[0].outcome), ("/1004", "hit"));
        assert_eq!(all[KEPT - 1].path, "/5");
        assert!((all[0].ms - 1.5).abs() < 1e-9);
    }

    #[test]
    fn long_path_is_truncated_at_a_character_boundary() {
        let mut text = String::from("before");
        overwrite(&mut text, &"ä".repeat(300));
        assert_eq!(text.chars().count(), 100);
    }
}
