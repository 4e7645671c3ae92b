//! Formatting of `Cache-Status` and `Server-Timing`, without heap allocation.

use std::io::Write;
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

use crate::policy::outcome::Outcome;

/// A field value that is being formatted, on the stack.
pub(super) type FieldValue = SmallVec<[u8; 128]>;

/// The `Server-Timing` metrics of a response (W3C Server Timing).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimingLabel {
    Cache,
    Upstream,
}

impl TimingLabel {
    /// Returns the field value, with durations in milliseconds.
    pub(super) fn text(self, elapsed: Duration) -> FieldValue {
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let mut value = FieldValue::new();
        value.extend_from_slice(match self {
            TimingLabel::Cache => b"cache;dur=",
            TimingLabel::Upstream => b"cache;dur=0, upstream;dur=",
        });
        let mut digits = itoa::Buffer::new();
        value.extend_from_slice(digits.format(micros / 1000).as_bytes());
        // Three digits: those of a thousand more, without the first.
        let thousandths = digits.format(1000 + micros % 1000);
        value.push(b'.');
        value.extend_from_slice(&thousandths.as_bytes()[1..]);
        value
    }
}

/// Returns the `Cache-Status` of a stored response. That of a hit is formatted without `write!`, which costs as much as
/// the lookup.
pub(super) fn stored_cache_status(outcome: &Outcome, key_name: &str) -> FieldValue {
    let mut cache_status = FieldValue::new();
    if let Outcome::Hit { ttl } = outcome {
        cache_status.extend_from_slice(b"sidecache; hit; ttl=");
        cache_status.extend_from_slice(itoa::Buffer::new().format(*ttl).as_bytes());
    } else {
        let _ = write!(cache_status, "{outcome}");
    }
    cache_status.extend_from_slice(b"; key=\"");
    cache_status.extend_from_slice(key_name.as_bytes());
    cache_status.push(b'"');
    cache_status
}

/// Returns the `Cache-Status` of any other response.
pub(super) fn cache_status(outcome: &Outcome) -> FieldValue {
    let mut cache_status = FieldValue::new();
    let _ = write!(cache_status, "{outcome}");
    cache_status
}

/// Replaces an empty placeholder value, or appends a field line.
pub(super) fn append_field(headers: &mut HeaderMap, name: HeaderName, value: &FieldValue) {
    let Ok(value) = HeaderValue::from_bytes(value) else { return };
    match headers.get_mut(&name) {
        Some(place) if place.is_empty() => *place = value,
        Some(_) | None => drop(headers.append(name, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(cache_status: &FieldValue) -> &str {
        std::str::from_utf8(cache_status).expect("text")
    }

    #[test]
    fn hit_cache_status_equals_formatted_outcome_and_timing_is_in_ms() {
        for ttl in [0, 7, 35_999] {
            let outcome = Outcome::Hit { ttl };
            assert_eq!(said(&stored_cache_status(&outcome, "9f3a")), format!("{outcome}; key=\"9f3a\""));
        }
        let timing = |micros| TimingLabel::Cache.text(Duration::from_micros(micros));
        assert_eq!(said(&timing(0)), "cache;dur=0.000");
        assert_eq!(said(&timing(1_045)), "cache;dur=1.045");
        let upstream = TimingLabel::Upstream.text(Duration::from_millis(812));
        assert_eq!(said(&upstream), "cache;dur=0, upstream;dur=812.000");
    }
}
