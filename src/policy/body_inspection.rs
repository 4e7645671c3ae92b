//! Inspection of complete bodies: detects empty lists, and compares JSON responses.

use std::io::Read;

use http::header::{CONTENT_ENCODING, HeaderMap};
use serde_json::Value;

/// Returns true if the value at `pointer` (RFC 6901) is empty or missing, or if the body can't be decoded or parsed.
///
/// At most `max` bytes are decompressed. A larger body is not inspected and counts as not empty.
pub fn is_empty_at(pointer: &str, headers: &HeaderMap, body: &[u8], max: usize) -> bool {
    let Some(body) = decode(headers, body, max) else { return true };
    if body.len() > max {
        return false;
    }
    match serde_json::from_slice::<Value>(&body).ok().as_ref().and_then(|json| json.pointer(pointer)) {
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Bool(_) | Value::Number(_)) => false,
        Some(Value::Null) | None => true,
    }
}

/// The header fields and the body of a response to compare.
#[derive(Debug, Clone, Copy)]
pub struct ComparedResponse<'a> {
    /// The header fields, of which only the content coding is used.
    pub headers: &'a HeaderMap,
    /// The complete body.
    pub body: &'a [u8],
}

/// The result of comparing two responses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// The responses are equal.
    Same,
    /// The responses differ, first at this JSON pointer. An empty pointer means the whole body.
    Differ(String),
    /// A body has an unsupported content coding, can't be decoded, or is too large.
    Unreadable,
}

/// Compares two responses as JSON, ignoring the values at the `volatile` pointers, in which `*` matches any one member.
///
/// At most `max` bytes of each body are decompressed.
pub fn compare(
    one: ComparedResponse<'_>,
    other: ComparedResponse<'_>,
    volatile: &[Box<str>],
    max: usize,
) -> Comparison {
    if one.body == other.body {
        return Comparison::Same;
    }
    let plain = (decode(one.headers, one.body, max), decode(other.headers, other.body, max));
    let (Some(one), Some(other)) = plain else { return Comparison::Unreadable };
    if one.len().max(other.len()) > max {
        return Comparison::Unreadable;
    }
    if one == other {
        return Comparison::Same;
    }
    let read = |body: &[u8]| serde_json::from_slice::<Value>(body).ok();
    let (Some(mut one), Some(mut other)) = (read(&one), read(&other)) else {
        return Comparison::Differ(String::new());
    };
    for pointer in volatile {
        let path: Vec<&str> = pointer.split('/').skip(1).collect();
        remove(&mut one, &path);
        remove(&mut other, &path);
    }
    differs_at(&one, &other).map_or(Comparison::Same, Comparison::Differ)
}

fn remove(value: &mut Value, path: &[&str]) {
    let Some((first, rest)) = path.split_first() else { return };
    let name = first.replace("~1", "/").replace("~0", "~");
    match value {
        Value::Object(map) if rest.is_empty() && *first == "*" => map.clear(),
        Value::Object(map) if rest.is_empty() => drop(map.remove(&name)),
        Value::Object(map) if *first == "*" => map.values_mut().for_each(|below| remove(below, rest)),
        Value::Object(map) => map.get_mut(&name).into_iter().for_each(|below| remove(below, rest)),
        Value::Array(list) if rest.is_empty() && *first == "*" => list.clear(),
        Value::Array(list) if *first == "*" => list.iter_mut().for_each(|below| remove(below, rest)),
        Value::Array(list) => {
            let at = name.parse::<usize>().ok();
            match at.and_then(|at| list.get_mut(at)) {
                Some(below) if rest.is_empty() => *below = Value::Null,
                Some(below) => remove(below, rest),
                None => {}
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn differs_at(one: &Value, other: &Value) -> Option<String> {
    let below = |name: &str, at: String| format!("/{}{at}", name.replace('~', "~0").replace('/', "~1"));
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let missing = other.keys().find(|name| !one.contains_key(*name));
            let differs = |(name, value): (&String, &Value)| match other.get(name) {
                None => Some(below(name, String::new())),
                Some(there) => differs_at(value, there).map(|at| below(name, at)),
            };
            one.iter().find_map(differs).or_else(|| missing.map(|name| below(name, String::new())))
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            let pairs = one.iter().zip(other).enumerate();
            pairs.into_iter().find_map(|(n, (one, other))| differs_at(one, other).map(|at| below(&n.to_string(), at)))
        }
        _ if one == other => None,
        _ => Some(String::new()),
    }
}

fn decode(headers: &HeaderMap, body: &[u8], max: usize) -> Option<Vec<u8>> {
    let limit = max as u64 + 1;
    let coding = headers.get(CONTENT_ENCODING).map_or(&b"identity"[..], |value| value.as_bytes());
    let mut plain = Vec::new();
    let read = match coding.to_ascii_lowercase().as_slice() {
        b"identity" | b"" => return Some(body.to_vec()),
        b"gzip" | b"x-gzip" => flate2::read::MultiGzDecoder::new(body).take(limit).read_to_end(&mut plain),
        b"deflate" => flate2::read::ZlibDecoder::new(body).take(limit).read_to_end(&mut plain),
        _ => return None,
    };
    read.ok().map(|_| plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use std::io::Write;

    #[test]
    fn empty_missing_or_unparsable_value_counts_as_empty() {
        let table = [
            (r#"{"products":[]}"#, true),
            (r#"{"products":[{"id":1}]}"#, false),
            (r#"{"items":[1]}"#, true),
            ("<html>", true),
            (r#"{"products":null}"#, true),
        ];
        for (body, expected) in table {
            assert_eq!(is_empty_at("/products", &HeaderMap::new(), body.as_bytes(), 1000), expected, "{body}");
        }
    }

    #[test]
    fn comparison_returns_first_difference_outside_volatile_paths() {
        let none = HeaderMap::new();
        let table = [
            (r#"{"a":1}"#, r#"{ "a": 1 }"#, None),
            (r#"{"a":1,"b":2}"#, r#"{"b":2,"a":1}"#, None),
            (r#"{"a":{"b":[1,2]}}"#, r#"{"a":{"b":[1,3]}}"#, Some("/a/b/1")),
            (r#"{"a":1}"#, r#"{"a":1,"c/d":2}"#, Some("/c~1d")),
            (r#"{"cost":1,"a":2}"#, r#"{"cost":5,"a":2}"#, None),
            (r#"{"l":[{"t":1,"a":2}]}"#, r#"{"l":[{"t":9,"a":2}]}"#, None),
            (r#"{"ids":[1,2]}"#, r#"{"ids":[3]}"#, None),
            (r#"{"pair":[1,2]}"#, r#"{"pair":[9,2]}"#, None),
            (r#"{"pair":[1,2]}"#, r#"{"pair":[9,3]}"#, Some("/pair/1")),
            ("one", "other", Some("")),
        ];
        let volatile: Vec<Box<str>> = ["/cost", "/l/*/t", "/ids/*", "/pair/0"].map(Into::into).to_vec();
        for (one, other, expected) in table {
            let (one, other) = (one.as_bytes(), other.as_bytes());
            let (one, other) =
                (ComparedResponse { headers: &none, body: one }, ComparedResponse { headers: &none, body: other });
            let expected = expected.map_or(Comparison::Same, |at: &str| Comparison::Differ(at.into()));
            assert_eq!(compare(one, other, &volatile, 1000), expected);
        }
    }

    #[test]
    fn compressed_body_is_inspected_only_up_to_the_size_limit() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(br#"{"products":[1]}"#).expect("compressed");
        let gzip = gzip.finish().expect("compressed");
        let headers = HeaderMap::from_iter([(CONTENT_ENCODING, HeaderValue::from_static("gzip"))]);
        assert!(!is_empty_at("/products", &headers, &gzip, 1000));
        assert!(!is_empty_at("/products", &headers, &gzip, 5), "too large to look into");
        assert!(is_empty_at("/products", &headers, b"not gzip", 1000));
    }
}
