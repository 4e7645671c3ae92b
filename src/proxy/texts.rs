//! The texts that go with every answer: written on the stack, on the shortest way.

use std::io::Write;
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

use crate::policy::outcome::Outcome;

/// A field value in the making, on the stack.
pub(super) type Text = SmallVec<[u8; 128]>;

/// Who took the time: RFC-less, but as browsers and tools read `Server-Timing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Timing {
    Cache,
    Upstream,
}

impl Timing {
    pub(super) fn text(self, elapsed: Duration) -> Text {
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let mut text = Text::new();
        text.extend_from_slice(match self {
            Timing::Cache => b"cache;dur=",
            Timing::Upstream => b"cache;dur=0, upstream;dur=",
        });
        let mut digits = itoa::Buffer::new();
        text.extend_from_slice(digits.format(micros / 1000).as_bytes());
        // Three digits: those of a thousand more, without the first.
        let thousandths = digits.format(1000 + micros % 1000);
        text.push(b'.');
        text.extend_from_slice(&thousandths.as_bytes()[1..]);
        text
    }
}

/// The `Cache-Status` of what is stored. Of a hit, on the shortest way: the machinery of `write!` costs as much as the
/// look-up.
pub(super) fn stored_status(outcome: &Outcome, key_name: &str) -> Text {
    let mut text = Text::new();
    if let Outcome::Hit { ttl } = outcome {
        text.extend_from_slice(b"sidecache; hit; ttl=");
        text.extend_from_slice(itoa::Buffer::new().format(*ttl).as_bytes());
    } else {
        let _ = write!(text, "{outcome}");
    }
    text.extend_from_slice(b"; key=\"");
    text.extend_from_slice(key_name.as_bytes());
    text.push(b'"');
    text
}

/// The `Cache-Status` of everything else.
pub(super) fn text(outcome: &Outcome) -> Text {
    let mut text = Text::new();
    let _ = write!(text, "{outcome}");
    text
}

/// Appends a line, or fills the place that was made for it.
pub(super) fn append(headers: &mut HeaderMap, name: HeaderName, value: &Text) {
    let Ok(value) = HeaderValue::from_bytes(value) else { return };
    match headers.get_mut(&name) {
        Some(place) if place.is_empty() => *place = value,
        Some(_) | None => drop(headers.append(name, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &Text) -> &str {
        std::str::from_utf8(text).expect("text")
    }

    #[test]
    fn the_short_way_says_the_same() {
        for ttl in [0, 7, 35_999] {
            let outcome = Outcome::Hit { ttl };
            assert_eq!(said(&stored_status(&outcome, "9f3a")), format!("{outcome}; key=\"9f3a\""));
        }
        let timing = |micros| Timing::Cache.text(Duration::from_micros(micros));
        assert_eq!(said(&timing(0)), "cache;dur=0.000");
        assert_eq!(said(&timing(1_045)), "cache;dur=1.045");
        let upstream = Timing::Upstream.text(Duration::from_millis(812));
        assert_eq!(said(&upstream), "cache;dur=0, upstream;dur=812.000");
    }
}
