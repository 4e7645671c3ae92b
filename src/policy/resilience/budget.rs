//! Request budget of an upstream: the permitted request rate, and parsing of `Retry-After`.

use std::time::{Duration, SystemTime};

use http::header::{HeaderMap, RETRY_AFTER};

use crate::policy::http::date;

/// A longer `Retry-After` is considered a mistake and reduced to this.
const LONGEST: Duration = Duration::from_hours(1);

/// The budget of an upstream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// The request rate; `None`: unlimited, until the upstream sends `Retry-After`.
    pub pace: Option<RequestRate>,
    /// The longest time that a request waits for its turn.
    pub max_wait: Duration,
    /// Which requests share a bucket.
    pub per: BudgetScope,
}

/// The rate of a leaky bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestRate {
    /// The interval between two requests.
    pub every: Duration,
    /// The number of requests that may be sent at once.
    pub burst: u32,
}

/// Which requests share a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetScope {
    /// Requests with the same credentials to the same host.
    Credential,
    /// All requests to the same host.
    Host,
}

/// Returns the time to wait by `Retry-After`, at most one hour.
///
/// Its value is seconds (RFC 9110 §10.2.3), seconds with a fraction as some APIs send them, or a date.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        Duration::try_from_secs_f64(text.parse().ok()?).unwrap_or(LONGEST)
    } else {
        date::parse(text.as_bytes(), now)?.duration_since(now).unwrap_or_default()
    };
    Some(wait.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn retry_after_accepts_seconds_decimals_and_http_dates() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_hours(1);
        let ms = Duration::from_millis;
        let table = [
            ("2", Some(ms(2000))),
            ("2.0", Some(ms(2000))),
            (" 0.25", Some(ms(250))),
            ("Thu, 01 Jan 1970 01:00:05 GMT", Some(ms(5000))),
            ("Thu, 01 Jan 1970 00:00:05 GMT", Some(ms(0))),
            ("99999999999999999999", Some(LONGEST)),
            ("-1", None),
            ("1e3", None),
            ("soon", None),
            ("", None),
            (".", None),
        ];
        for (text, expected) in table {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]);
            assert_eq!(retry_after(&headers, now), expected, "{text:?}");
        }
    }
}
