//! Scalar types of the file: durations, sizes, references to secrets.
//!
//! Each rejects ambiguous values with an error that says what to write.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

use super::error::NO_EXCERPT;

/// A duration: `"250ms"`, `"5s"`, `"1h"`. A bare number is an error.
#[derive(Debug, Clone, Copy)]
pub(super) struct DurationValue(pub(super) Duration);

/// A size: `"64MiB"`. A bare number is an error.
#[derive(Debug, Clone, Copy)]
pub(super) struct SizeValue(pub(super) u64);

/// A duration, or `"off"`.
#[derive(Debug, Clone, Copy)]
pub(super) struct OptionalDuration(pub(super) Option<Duration>);

/// A reference to a secret: `{ file = "…" }` or `{ env = "…" }`.
#[derive(Debug, Clone)]
pub(super) enum SecretRef {
    File(PathBuf),
    Env(String),
}

/// A URL: a text without credentials, or a reference to a secret that may carry them.
#[derive(Debug, Clone)]
pub(super) enum UrlRef {
    Text(String),
    Secret(SecretRef),
}

/// One value or a list of them.
#[derive(Debug, Clone)]
pub(super) struct OneOrMany<T>(pub(super) Vec<T>);

/// Parses a duration like `"5s"`. An error says what to write.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let hint = "write a number and a unit: \"250ms\", \"5s\", \"2m\", \"1h\", \"7d\"";
    let bare = text.bytes().all(|b| b.is_ascii_digit());
    if bare {
        return Err(format!("{text:?} has no unit: {hint}"));
    }
    humantime::parse_duration(text).map_err(|_| format!("{text:?} is no duration: {hint}"))
}

/// Parses a size like `"64MiB"`, in bytes. An error says what to write.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let hint = "write a number and a unit: \"2KiB\", \"64MiB\", \"1GiB\"";
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("{text:?} has no unit: {hint}"));
    }
    text.parse::<bytesize::ByteSize>().map(|size| size.as_u64()).map_err(|_| format!("{text:?} is no size: {hint}"))
}

struct TextVisitor<T> {
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> Visitor<'_> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        (self.parse)(&number.to_string()).map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for DurationValue {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(TextVisitor {
            expected: "a duration like \"5s\"",
            parse: |t| parse_duration(t).map(DurationValue),
        })
    }
}

impl<'de> Deserialize<'de> for SizeValue {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(TextVisitor {
            expected: "a size like \"64MiB\"",
            parse: |t| parse_size(t).map(SizeValue),
        })
    }
}

impl<'de> Deserialize<'de> for OptionalDuration {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let parse = |t: &str| match t {
            "off" => Ok(OptionalDuration(None)),
            text => parse_duration(text).map(|d| OptionalDuration(Some(d))),
        };
        from.deserialize_any(TextVisitor { expected: "a duration like \"5s\", or \"off\"", parse })
    }
}

impl<'de> Deserialize<'de> for SecretRef {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reference;
        impl<'de> Visitor<'de> for Reference {
            type Value = SecretRef;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("{ file = \"…\" } or { env = \"…\" }")
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<SecretRef, E> {
                let advice = "secrets are not written in this file: write { file = \"…\" } or { env = \"…\" }";
                Err(E::custom(NO_EXCERPT.to_owned() + advice))
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<SecretRef, E> {
                self.visit_str("")
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<SecretRef, E> {
                self.visit_str("")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<SecretRef, A::Error> {
                let entry = map.next_entry::<String, String>()?;
                let more = map.next_key::<String>()?.is_some();
                match entry.as_ref().map(|(k, v)| (k.as_str(), v)) {
                    Some(("file", path)) if !more => Ok(SecretRef::File(path.into())),
                    Some(("env", name)) if !more => Ok(SecretRef::Env(name.clone())),
                    Some(_) | None => Err(A::Error::custom("write { file = \"…\" } or { env = \"…\" }")),
                }
            }
        }
        from.deserialize_any(Reference)
    }
}

impl<'de> Deserialize<'de> for UrlRef {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Url;
        impl<'de> Visitor<'de> for Url {
            type Value = UrlRef;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a URL, or { env = \"…\" } or { file = \"…\" } that holds one")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<UrlRef, E> {
                Ok(UrlRef::Text(text.to_owned()))
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<UrlRef, A::Error> {
                SecretRef::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(UrlRef::Secret)
            }
        }
        from.deserialize_any(Url)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Any<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Any<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one value or a list of them")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                T::deserialize(serde::de::value::StrDeserializer::new(text)).map(|v| OneOrMany(vec![v]))
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(|v| OneOrMany(vec![v]))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element()? {
                    values.push(value);
                }
                Ok(OneOrMany(values))
            }
        }
        from.deserialize_any(Any(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_require_a_unit() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_hours(168)));
        assert!(parse_duration("5").expect_err("no unit").contains("\"5s\""));
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert!(parse_size("64").expect_err("no unit").contains("MiB"));
        assert!(parse_size("lots").is_err() && parse_duration("soon").is_err());
    }
}
