//! Looks into a complete body, for the rules that ask for it.

use std::io::Read;

use http::header::{CONTENT_ENCODING, HeaderMap};
use serde_json::Value;

/// Is the list at `pointer` (RFC 6901) empty or missing? A body that can't be read has no list.
///
/// At most `max` bytes are decompressed; a body that has more is too large to look into, and not empty.
pub fn is_empty_at(pointer: &str, headers: &HeaderMap, body: &[u8], max: usize) -> bool {
    let Some(body) = decoded(headers, body, max) else { return true };
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

fn decoded(headers: &HeaderMap, body: &[u8], max: usize) -> Option<Vec<u8>> {
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
    fn empty_lists() {
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
    fn a_compressed_body_is_read_within_its_bound() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(br#"{"products":[1]}"#).expect("compressed");
        let gzip = gzip.finish().expect("compressed");
        let headers = HeaderMap::from_iter([(CONTENT_ENCODING, HeaderValue::from_static("gzip"))]);
        assert!(!is_empty_at("/products", &headers, &gzip, 1000));
        assert!(!is_empty_at("/products", &headers, &gzip, 5), "too large to look into");
        assert!(is_empty_at("/products", &headers, b"not gzip", 1000));
    }
}
