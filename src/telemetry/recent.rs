//! The last requests, each with its reason. A ring of slots that are written over: after the first lap nothing is
//! allocated, and nobody waits (a slot that is being read is left out).

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

use super::Answered;
use crate::policy::Tick;
use crate::policy::outcome::{Failure, Outcome};

/// So many are remembered.
pub const KEPT: usize = 1000;

/// A longer path is cut.
const LONGEST_PATH: usize = 200;

/// The last [`KEPT`] requests.
#[derive(Debug)]
pub struct Recent {
    slots: Vec<Mutex<Seen>>,
    next: AtomicU64,
}

/// One request, for people: no query string, no header.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Seen {
    /// Its number since the start, from 1; 0: none yet.
    pub number: u64,
    /// When it came.
    #[serde(skip)]
    pub at: Tick,
    /// The upstream's name.
    pub upstream: String,
    /// The rule it came under; empty: none that may answer from the cache.
    pub rule: String,
    /// Its method.
    pub method: String,
    /// Its path, without the query.
    pub path: String,
    /// The answer's status.
    pub status: u16,
    /// [`Outcome::label`].
    pub outcome: &'static str,
    /// [`Outcome::detail`]: the reason.
    pub detail: Option<&'static str>,
    /// The failure behind it, if there was one.
    pub cause: Option<&'static str>,
    /// Milliseconds to the response head.
    pub ms: f64,
    /// The same for requests of the same target and the same credentials, in this process; 0: a hit.
    #[serde(skip)]
    pub same: u64,
}

impl Default for Recent {
    fn default() -> Self {
        let slots = std::iter::repeat_with(Mutex::default).take(KEPT).collect();
        Recent { slots, next: AtomicU64::new(0) }
    }
}

impl Recent {
    pub(super) fn add(&self, outcome: &Outcome, answered: &Answered<'_>, took: Duration) {
        let number = self.next.fetch_add(1, Relaxed);
        let at = usize::try_from(number).unwrap_or(0) % KEPT;
        let Some(Ok(mut seen)) = self.slots.get(at).map(Mutex::try_lock) else { return };
        seen.number = number + 1;
        seen.at = answered.now;
        write_over(&mut seen.upstream, answered.upstream);
        write_over(&mut seen.rule, answered.plan.map_or("", |plan| &plan.name));
        write_over(&mut seen.method, answered.asked.method.as_str());
        write_over(&mut seen.path, answered.asked.uri.path());
        seen.status = answered.status.as_u16();
        seen.outcome = outcome.label();
        seen.detail = outcome.detail();
        seen.cause = outcome.failure().map(Failure::cause);
        seen.ms = (took.as_secs_f64() * 100_000.0).round() / 100.0;
        seen.same = answered.identity.unwrap_or(0);
    }

    /// The newest first.
    pub fn read(&self) -> Vec<Seen> {
        let of = |slot: &Mutex<Seen>| slot.lock().ok().filter(|seen| seen.number > 0).map(|seen| seen.clone());
        let mut all: Vec<Seen> = self.slots.iter().filter_map(of).collect();
        all.sort_unstable_by_key(|seen| std::cmp::Reverse(seen.number));
        all
    }
}

fn write_over(text: &mut String, with: &str) {
    text.clear();
    let end = with.char_indices().map(|(at, _)| at).take_while(|at| *at <= LONGEST_PATH).last().unwrap_or(0);
    text.push_str(if with.len() <= LONGEST_PATH { with } else { &with[..end] });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::asked::Asked;
    use http::{HeaderMap, Method, StatusCode, Uri};

    #[test]
    fn the_last_ones_are_kept_the_newest_first() {
        let recent = Recent::default();
        let headers = HeaderMap::new();
        for n in 0..KEPT + 5 {
            let uri: Uri = format!("/{n}?secret=1").parse().expect("a URI");
            let asked = Asked { method: &Method::GET, uri: &uri, headers: &headers };
            let answered = Answered {
                upstream: "shop",
                plan: None,
                asked,
                status: StatusCode::OK,
                now: Tick(7),
                took: Duration::from_micros(1500),
                request_id: None,
                identity: None,
            };
            recent.add(&Outcome::Hit { ttl: 1 }, &answered, answered.took);
        }
        let all = recent.read();
        assert_eq!(all.len(), KEPT);
        assert_eq!((all[0].path.as_str(), all[0].outcome), ("/1004", "hit"));
        assert_eq!(all[KEPT - 1].path, "/5");
        assert!((all[0].ms - 1.5).abs() < 1e-9);
    }

    #[test]
    fn a_long_path_is_cut_between_two_characters() {
        let mut text = String::from("before");
        write_over(&mut text, &"ä".repeat(300));
        assert_eq!(text.chars().count(), 100);
    }
}
