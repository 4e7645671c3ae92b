//! `Cache-Control` (RFC 9111 §5.2, RFC 5861) of requests and responses, and `Pragma` (RFC 9111 §5.4).
//!
//! Names are case-insensitive, values may be quoted, and several field lines form one list. If a directive is
//! repeated, the smaller number applies, so that conflicting directives never extend a lifetime.

use http::HeaderMap;
use http::header::{CACHE_CONTROL, HeaderName, PRAGMA};

use super::list_field::members;

/// Maximum of delta-seconds, to which larger values are reduced (RFC 9111 §1.2.2).
const MAX_DELTA: u64 = 1 << 31;

/// The supported directives. Durations are in seconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheControl {
    /// `no-store`.
    pub no_store: bool,
    /// `no-cache` without field names.
    pub no_cache: bool,
    /// The field names of `no-cache="…"` and `private="…"`, which are removed before the response is stored.
    pub drop_fields: Vec<HeaderName>,
    /// `private` without field names.
    pub private: bool,
    /// `public`.
    pub public: bool,
    /// `must-revalidate`.
    pub must_revalidate: bool,
    /// `proxy-revalidate`.
    pub proxy_revalidate: bool,
    /// `must-understand`: overrides `no-store` if the cache understands the status, and forbids storing if not.
    pub must_understand: bool,
    /// `only-if-cached`.
    pub only_if_cached: bool,
    /// `max-age`. An invalid value counts as 0.
    pub max_age: Option<u64>,
    /// `s-maxage`. An invalid value counts as 0.
    pub s_maxage: Option<u64>,
    /// `min-fresh`.
    pub min_fresh: Option<u64>,
    /// `max-stale`. [`u64::MAX`] if it has no value.
    pub max_stale: Option<u64>,
    /// `stale-while-revalidate`.
    pub stale_while_revalidate: Option<u64>,
    /// `stale-if-error`.
    pub stale_if_error: Option<u64>,
}

impl CacheControl {
    /// Parses the `Cache-Control` of a response.
    pub fn of_response(headers: &HeaderMap) -> CacheControl {
        let mut parsed = CacheControl::default();
        for value in headers.get_all(CACHE_CONTROL) {
            parsed.read(value.as_bytes());
        }
        parsed
    }

    /// Parses the `Cache-Control` of a request, or `Pragma: no-cache` if there is no `Cache-Control`.
    pub fn of_request(headers: &HeaderMap) -> CacheControl {
        let mut parsed = Self::of_response(headers);
        if !headers.contains_key(CACHE_CONTROL)
            && headers.get_all(PRAGMA).iter().any(|v| v.as_bytes().eq_ignore_ascii_case(b"no-cache"))
        {
            parsed.no_cache = true;
        }
        parsed
    }

    fn read(&mut self, value: &[u8]) {
        for member in members(value, true) {
            let Some(eq) = member.iter().position(|b| *b == b'=') else {
                self.add(member, None);
                continue;
            };
            let (name, value) = (&member[..eq], &member[eq + 1..]);
            match value.strip_prefix(b"\"") {
                None => self.add(name, Some(value)),
                // An argument that is not terminated is unreadable.
                Some(quoted) => self.add(name, Some(quoted.strip_suffix(b"\"").unwrap_or_default())),
            }
        }
        if has_open_quote(value) {
            self.read_restrictions(value);
        }
    }

    /// Reads the directives that forbid storing or reuse from a field whose quotes do not match: where a directive begins
    /// and ends is not known, so each word counts.
    fn read_restrictions(&mut self, value: &[u8]) {
        for word in value.split(|byte| b",;= \t\"".contains(byte)) {
            match word.to_ascii_lowercase().as_slice() {
                b"no-store" => self.no_store = true,
                b"no-cache" => self.no_cache = true,
                b"private" => self.private = true,
                b"must-revalidate" => self.must_revalidate = true,
                _ => {}
            }
        }
    }

    /// Adds one directive. Unknown directives are ignored.
    pub(super) fn add(&mut self, name: &[u8], argument: Option<&[u8]>) {
        let zero_if_unreadable = || seconds(argument).unwrap_or(0);
        match name.to_ascii_lowercase().as_slice() {
            b"no-store" => self.no_store = true,
            b"no-cache" => self.fields_or(argument, |s| &mut s.no_cache),
            b"private" => self.fields_or(argument, |s| &mut s.private),
            b"public" => self.public = true,
            b"must-revalidate" => self.must_revalidate = true,
            b"proxy-revalidate" => self.proxy_revalidate = true,
            b"must-understand" => self.must_understand = true,
            b"only-if-cached" => self.only_if_cached = true,
            b"max-age" => keep_smaller(&mut self.max_age, zero_if_unreadable()),
            b"s-maxage" => keep_smaller(&mut self.s_maxage, zero_if_unreadable()),
            b"min-fresh" => self.min_fresh = seconds(argument).or(self.min_fresh),
            b"max-stale" => self.max_stale = argument.map_or(Some(u64::MAX), |a| seconds(Some(a))),
            b"stale-while-revalidate" => keep_smaller(&mut self.stale_while_revalidate, zero_if_unreadable()),
            b"stale-if-error" => keep_smaller(&mut self.stale_if_error, zero_if_unreadable()),
            _ => {}
        }
    }

    /// Returns true if the directive's argument is a number of seconds.
    pub(super) fn takes_seconds(name: &str) -> bool {
        matches!(
            name,
            "max-age" | "s-maxage" | "min-fresh" | "max-stale" | "stale-while-revalidate" | "stale-if-error"
        )
    }

    /// Returns true if the directive's argument is a list of field names.
    pub(super) fn takes_fields(name: &str) -> bool {
        matches!(name, "no-cache" | "private")
    }

    /// Returns true if the directive is supported.
    pub(super) fn knows(name: &str) -> bool {
        let flags =
            ["no-store", "public", "must-revalidate", "proxy-revalidate", "must-understand", "only-if-cached"];
        Self::takes_seconds(name) || Self::takes_fields(name) || flags.contains(&name)
    }

    fn fields_or(&mut self, argument: Option<&[u8]>, flag: fn(&mut Self) -> &mut bool) {
        match argument {
            None => *flag(self) = true,
            // An empty list names nothing that could be left out.
            Some(fields) if fields.trim_ascii().is_empty() => *flag(self) = true,
            Some(fields) => {
                let names = fields.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|n| !n.is_empty());
                for name in names {
                    match HeaderName::from_bytes(name) {
                        Ok(name) => self.drop_fields.push(name),
                        Err(_) => *flag(self) = true,
                    }
                }
            }
        }
    }
}

/// Returns true if a quoted-string in the value is not terminated (RFC 9110 §5.6.4).
fn has_open_quote(value: &[u8]) -> bool {
    let (mut quoted, mut escaped) = (false, false);
    for byte in value {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ => {}
        }
    }
    quoted
}

fn keep_smaller(slot: &mut Option<u64>, value: u64) {
    *slot = Some(slot.map_or(value, |old| old.min(value)));
}

/// Parses delta-seconds, which are digits only (RFC 9111 §1.2.2).
pub fn seconds(argument: Option<&[u8]>) -> Option<u64> {
    let digits = argument?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits.iter().fold(0u64, |n, d| n.saturating_mul(10).saturating_add(u64::from(d - b'0')));
    Some(value.min(MAX_DELTA))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn parse(lines: &[&str]) -> CacheControl {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(CACHE_CONTROL, HeaderValue::from_str(line).expect("a value"));
        }
        CacheControl::of_response(&headers)
    }

    #[test]
    fn max_age_is_the_lowest_value_and_an_invalid_value_is_zero() {
        let table: &[(&[&str], Option<u64>)] = &[
            (&["max-age=60"], Some(60)),
            (&["Max-Age=60"], Some(60)),
            (&["max-age=\"60\""], Some(60)),
            (&["max-age=60, max-age=30"], Some(30)),
            (&["max-age=60", "max-age=90"], Some(60)),
            (&["max-age"], Some(0)),
            (&["max-age=-1"], Some(0)),
            (&["max-age=1.5"], Some(0)),
            (&["max-age=99999999999999999999"], Some(1 << 31)),
            (&["foo=\"a, max-age=60\""], None),
            (&["foo=\"a\\\", max-age=60\""], None),
            (&["public"], None),
        ];
        for (lines, expected) in table {
            assert_eq!(parse(lines).max_age, *expected, "{lines:?}");
        }
    }

    #[test]
    fn qualified_private_and_no_cache_only_drop_the_named_fields() {
        let parsed = parse(&["private=\"X-A, x-b\", no-cache=\"Set-Cookie\""]);
        assert!(!parsed.private && !parsed.no_cache);
        assert_eq!(parsed.drop_fields.len(), 3);
        assert!(parse(&["private"]).private);
        assert!(parse(&["private=\"not a name\""]).private, "an unreadable list forbids everything");
    }

    #[test]
    fn malformed_private_and_no_cache_count_as_unqualified() {
        for line in ["private=\"\"", "private=", "private=\"", "private=\"x-a", "PRIVATE=\" \"", "foo=\"a, private"] {
            assert!(parse(&[line]).private, "{line}");
        }
        for line in ["no-cache=\"\"", "no-cache=", "no-cache=\"", "foo=\"a, no-cache", "private=\"x, no-cache"] {
            assert!(parse(&[line]).no_cache, "{line}");
        }
        assert!(parse(&["max-age=60, foo=\"a, no-store"]).no_store);
        let sound = parse(&["foo=\"a, private, no-store\", max-age=60"]);
        assert!(!sound.private && !sound.no_store && sound.max_age == Some(60));
    }

    #[test]
    fn pragma_no_cache_applies_only_without_cache_control() {
        let mut headers = HeaderMap::new();
        headers.insert(PRAGMA, HeaderValue::from_static("no-cache"));
        assert!(CacheControl::of_request(&headers).no_cache);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=5"));
        assert!(!CacheControl::of_request(&headers).no_cache);
    }
}
