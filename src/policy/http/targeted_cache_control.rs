//! Targeted cache control (RFC 9213): fields for specific caches that override `Cache-Control` and `Expires`.

use http::header::{HeaderMap, HeaderName, HeaderValue};
use sfv::{BareItem, Dictionary, ListEntry, Parser};

use super::cache_control::CacheControl;

/// The target list (RFC 9213 §2.2): the fields that apply to sidecache, the most specific first.
const TARGETED_FIELDS: [HeaderName; 2] =
    [HeaderName::from_static("sidecache-cache-control"), HeaderName::from_static("cdn-cache-control")];

/// Returns the directives of the first applicable field that is valid and not empty (RFC 9213 §2.2).
///
/// A field is invalid and ignored if it is not a dictionary, or if a supported directive has a value of the wrong type.
pub fn directives(headers: &HeaderMap) -> Option<CacheControl> {
    TARGETED_FIELDS.iter().filter(|name| headers.contains_key(*name)).find_map(|name| {
        let lines: Vec<&[u8]> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
        let members: Dictionary = Parser::new(&lines.join(&b", "[..])).parse().ok()?;
        if members.is_empty() { None } else { read(&members) }
    })
}

fn read(members: &Dictionary) -> Option<CacheControl> {
    let mut directives = CacheControl::default();
    for (name, value) in members {
        let ListEntry::Item(item) = value else {
            if CacheControl::knows(name.as_str()) {
                return None;
            }
            continue;
        };
        let argument = match &item.bare_item {
            BareItem::Boolean(true) => None,
            // A false value, as in `no-store=?0`, means that the directive does not apply.
            BareItem::Boolean(false) => continue,
            BareItem::Integer(number) if CacheControl::takes_seconds(name.as_str()) => {
                Some(i64::from(*number).max(0).to_string())
            }
            BareItem::String(fields) if CacheControl::takes_fields(name.as_str()) => Some(fields.as_str().to_owned()),
            BareItem::Integer(_)
            | BareItem::String(_)
            | BareItem::Decimal(_)
            | BareItem::ByteSequence(_)
            | BareItem::Token(_)
            | BareItem::Date(_)
            | BareItem::DisplayString(_) => {
                if CacheControl::knows(name.as_str()) {
                    return None;
                }
                continue;
            }
        };
        if argument.is_none() && CacheControl::takes_seconds(name.as_str()) && name.as_str() != "max-stale" {
            return None;
        }
        directives.add(name.as_str().as_bytes(), argument.as_deref().map(str::as_bytes));
    }
    Some(directives)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(lines: &[(&'static str, &str)]) -> Option<CacheControl> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).expect("a value"));
        }
        directives(&headers)
    }

    #[test]
    fn targeted_cache_control_must_be_a_valid_structured_dictionary() {
        let field = "cdn-cache-control";
        let max_age = |value: &str| of(&[(field, value)]).and_then(|found| found.max_age);
        assert_eq!(max_age("max-age=60"), Some(60));
        assert_eq!(max_age("foobar, max-age=60;x=1, other=\"y\""), Some(60));
        assert_eq!(max_age("max-age=99999999999"), Some(1 << 31));
        assert_eq!(max_age("max-age=-1"), Some(0));
        for wrong in
            ["", " ", "max-age=60, &&&", "max-age=\"60\"", "max-age", "max-age =60", "MaX-aGe=60", "max-age=(60)"]
        {
            assert_eq!(of(&[(field, wrong)]), None, "{wrong}");
        }
        let all =
            of(&[(field, "no-store, private=?0, no-cache=\"a, b\""), (field, "must-revalidate")]).expect("valid");
        assert!(all.no_store && !all.private && !all.no_cache && all.must_revalidate);
        assert_eq!(all.drop_fields.len(), 2);
    }

    #[test]
    fn sidecache_cache_control_takes_precedence_over_cdn_cache_control() {
        let lines = [("cdn-cache-control", "max-age=1"), ("sidecache-cache-control", "max-age=2")];
        assert_eq!(of(&lines).and_then(|found| found.max_age), Some(2));
        let lines = [("cdn-cache-control", "max-age=1"), ("sidecache-cache-control", "max-age=oops!!(")];
        assert_eq!(of(&lines).and_then(|found| found.max_age), Some(1));
    }

    proptest! {
        #[test]
        fn parsing_of_arbitrary_values_does_not_panic(value in "[ -~]{0,60}") {
            let _ = of(&[("cdn-cache-control", &value)]);
        }
    }
}
