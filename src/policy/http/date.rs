//! Strict parser for HTTP dates.
//!
//! Accepts all three forms, with names and zone in any case (RFC 9110 §5.6.7, RFC 9111 §4.2), and nothing else.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAYS: [&[u8]; 7] = [b"monday", b"tuesday", b"wednesday", b"thursday", b"friday", b"saturday", b"sunday"];
const MONTHS: [&[u8]; 12] =
    [b"jan", b"feb", b"mar", b"apr", b"may", b"jun", b"jul", b"aug", b"sep", b"oct", b"nov", b"dec"];

/// A two-digit year that would be further in the future than this is in the past century (RFC 9110 §5.6.7).
const MAX_YEARS_AHEAD: u64 = 50;

/// Parses a date. `now` determines the century of a two-digit year. Dates before 1970 become 1 January 1970, 00:00.
pub fn parse(value: &[u8], now: SystemTime) -> Option<SystemTime> {
    let lower = value.trim_ascii().to_ascii_lowercase();
    imf_fixdate(&lower).or_else(|| rfc850(&lower, now)).or_else(|| asctime(&lower))
}

/// Parses the form `Sun, 06 Nov 1994 08:49:37 GMT`.
fn imf_fixdate(text: &[u8]) -> Option<SystemTime> {
    let rest = after_day(text, |day| &day[..3])?.strip_prefix(b", ")?;
    let [day, month, year, time, b"gmt"] = split(rest, b' ')? else { return None };
    at(number(day, 2)?, month, number(year, 4)?, time)
}

/// Parses the form `Sunday, 06-Nov-94 08:49:37 GMT`.
fn rfc850(text: &[u8], now: SystemTime) -> Option<SystemTime> {
    let rest = after_day(text, |day| day)?.strip_prefix(b", ")?;
    let [date, time, b"gmt"] = split(rest, b' ')? else { return None };
    let [day, month, year] = split(date, b'-')?;
    let this_year = year_of(now);
    let mut year = this_year / 100 * 100 + number(year, 2)?;
    if year > this_year + MAX_YEARS_AHEAD {
        year -= 100;
    }
    at(number(day, 2)?, month, year, time)
}

/// Parses the form `Sun Nov  6 08:49:37 1994`.
fn asctime(text: &[u8]) -> Option<SystemTime> {
    let rest = after_day(text, |day| &day[..3])?.strip_prefix(b" ")?;
    let (month, rest) = (rest.get(..3)?, rest.get(3..)?.strip_prefix(b" ")?);
    let (day, rest) = (rest.get(..2)?, rest.get(2..)?.strip_prefix(b" ")?);
    let [time, year] = split(rest, b' ')?;
    let day = day.strip_prefix(b" ").map_or_else(|| number(day, 2), |digit| number(digit, 1))?;
    at(day, month, number(year, 4)?, time)
}

fn after_day(text: &[u8], form: impl Fn(&'static [u8]) -> &'static [u8]) -> Option<&[u8]> {
    DAYS.iter().find_map(|day| text.strip_prefix(form(day)))
}

/// Splits `text` into exactly `N` parts.
fn split<const N: usize>(text: &[u8], separator: u8) -> Option<[&[u8]; N]> {
    let mut parts = text.split(|byte| *byte == separator);
    let mut found = [&b""[..]; N];
    for place in &mut found {
        *place = parts.next()?;
    }
    parts.next().is_none().then_some(found)
}

fn number(digits: &[u8], length: usize) -> Option<u64> {
    let right = digits.len() == length && digits.iter().all(u8::is_ascii_digit);
    right.then(|| digits.iter().fold(0, |n, digit| n * 10 + u64::from(digit - b'0')))
}

fn at(day: u64, month: &[u8], year: u64, time: &[u8]) -> Option<SystemTime> {
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let [hour, minute, second] = split(time, b':')?;
    let (hour, minute, second) = (number(hour, 2)?, number(minute, 2)?, number(second, 2)?);
    // A leap second has the number 60 (RFC 9110 §5.6.7).
    if day == 0 || day > days_in(month, year) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = (days_before(year, month) + day - 1) * 86_400 + hour * 3_600 + minute * 60 + second;
    Some(UNIX_EPOCH + Duration::from_secs(seconds.saturating_sub(EPOCH_DAYS * 86_400)))
}

/// Days from 1 March of the year 0 to 1 January 1970, in a calendar whose years begin in March.
const EPOCH_DAYS: u64 = 719_468;

/// Returns the days from 1 March of the year 0 to the first day of a month.
fn days_before(year: u64, month: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year.saturating_sub(1), month + 9) };
    year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5
}

fn days_in(month: u64, year: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn year_of(time: SystemTime) -> u64 {
    let days = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400) + EPOCH_DAYS;
    // The year that begins in March. Only the year is needed, for the century of two-digit years (RFC 9110 §5.6.7).
    let (century, of_century) = (days / 146_097, days % 146_097);
    let of_era = (of_century - of_century / 1_460 + of_century / 36_524 - of_century / 146_096) / 365;
    let day_of_year = of_century - (365 * of_era + of_era / 4 - of_era / 100);
    century * 400 + of_era + u64::from(day_of_year >= 306)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_795_000_000)
    }

    fn seconds(text: &str) -> Option<u64> {
        parse(text.as_bytes(), now())?.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
    }

    #[test]
    fn three_http_date_formats_are_parsed_in_any_case() {
        let forms = [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "SUN, 06 nov 1994 08:49:37 gMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
            "  Sun, 06 Nov 1994 08:49:37 GMT ",
        ];
        for form in forms {
            assert_eq!(seconds(form), Some(784_111_777), "{form}");
        }
        assert_eq!(seconds("Thu Aug 18 02:01:18 2050"), seconds("Thu, 18 Aug 2050 02:01:18 GMT"));
        assert_eq!(seconds("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(seconds("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800));
    }

    #[test]
    fn two_digit_year_is_at_most_fifty_years_in_the_future() {
        assert_eq!(year_of(now()), 2026);
        assert_eq!(seconds("Thursday, 18-Aug-50 02:01:18 GMT"), seconds("Thu, 18 Aug 2050 02:01:18 GMT"));
        assert_eq!(seconds("Tuesday, 18-Aug-76 02:01:18 GMT"), seconds("Tue, 18 Aug 2076 02:01:18 GMT"));
        assert_eq!(seconds("Thursday, 18-Aug-77 02:01:18 GMT"), seconds("Thu, 18 Aug 1977 02:01:18 GMT"));
    }

    #[test]
    fn invalid_http_dates_are_rejected() {
        let wrong = [
            "",
            "0",
            "-1",
            "Thu, 18 Aug 2050 02:01:18 UTC",
            "Thu, 18 Aug 2050 02:01:18 AEST",
            "Thu, 18 Aug 2050 02:01:18",
            "Thu, 18 Aug 50 02:01:18 GMT",
            "Thu 18 Aug 2050 02:01:18 GMT",
            "Thu, 18  Aug  2050 02:01:18 GMT",
            "Thu, 18-Aug-2050 02:01:18 GMT",
            "Thu, 18 Aug 2050 02.01.18 GMT",
            "Thu, 18 Aug 2050 2:01:18 GMT",
            "Thu, 30 Feb 2050 02:01:18 GMT",
            "Thu, 18 Aug 2050 24:01:18 GMT",
            "Thu, 18 Aug 2050 02:01:18 GMT, Thu, 18 Aug 2050 02:01:18 GMT",
        ];
        for text in wrong {
            assert_eq!(seconds(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn formatted_http_date_parses_to_the_same_time(at in 0u64..253_402_300_799) {
            let time = UNIX_EPOCH + Duration::from_secs(at);
            prop_assert_eq!(seconds(&httpdate::fmt_http_date(time)), Some(at));
            let text = httpdate::fmt_http_date(time);
            prop_assert_eq!(Some(year_of(time)), text[12..16].parse().ok());
        }

        #[test]
        fn date_parsing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..40), text in "[a-z0-9 ,:-]{0,32}") {
            let _ = parse(&bytes, now());
            let _ = parse(text.as_bytes(), now());
        }
    }
}
