//! Rewriting of upstream URLs in `Link`, `Location` and `Content-Location` to the address that the client used.
//!
//! All bytes around the origin are preserved, because clients split these fields on exact strings.

use bytes::{BufMut, BytesMut};
use http::header::{CONTENT_LOCATION, HeaderMap, HeaderName, HeaderValue, LINK, LOCATION};

/// A field value from which the upstream's origin has been removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkPatch {
    name: HeaderName,
    /// The index of the line among those of the field.
    line: usize,
    /// The bytes before, between and after the origins.
    pieces: Vec<Box<[u8]>>,
}

impl LinkPatch {
    /// Returns the memory that the patch takes, in bytes.
    pub fn weight(&self) -> usize {
        size_of::<LinkPatch>() + self.pieces.iter().map(|piece| piece.len() + size_of_val(piece)).sum::<usize>()
    }
}

/// Finds the values that contain a URL of `authority`, with scheme `http` or `https`.
pub fn find(headers: &HeaderMap, authority: &str) -> Vec<LinkPatch> {
    let mut patches = Vec::new();
    for name in [LINK, LOCATION, CONTENT_LOCATION] {
        for (line, value) in headers.get_all(&name).iter().enumerate() {
            let pieces = split_at_origin(value.as_bytes(), authority, name == LINK);
            if pieces.len() > 1 {
                patches.push(LinkPatch { name: name.clone(), line, pieces });
            }
        }
    }
    patches
}

/// Inserts `origin` (such as `http://127.0.0.1:18080`) in place of the upstream's origin.
pub fn apply(patches: &[LinkPatch], headers: &mut HeaderMap, origin: &str) {
    for patch in patches {
        let mut value = BytesMut::new();
        for (i, piece) in patch.pieces.iter().enumerate() {
            if i > 0 {
                value.put_slice(origin.as_bytes());
            }
            value.put_slice(piece);
        }
        let Ok(value) = HeaderValue::from_maybe_shared(value.freeze()) else { continue };
        if let http::header::Entry::Occupied(mut lines) = headers.entry(&patch.name)
            && let Some(line) = lines.iter_mut().nth(patch.line)
        {
            *line = value;
        }
    }
}

/// Splits a value at the origins. In `Link`, an origin follows a `<`; in other fields, it starts the value.
fn split_at_origin(value: &[u8], authority: &str, in_brackets: bool) -> Vec<Box<[u8]>> {
    let mut pieces = Vec::new();
    let (mut piece, mut at) = (0, 0);
    while at < value.len() {
        let begins = if in_brackets { at > 0 && value[at - 1] == b'<' } else { at == 0 };
        match begins.then(|| origin_length(&value[at..], authority)).flatten() {
            Some(length) => {
                pieces.push(value[piece..at].into());
                at += length;
                piece = at;
            }
            None => at += 1,
        }
    }
    pieces.push(value[piece..].into());
    pieces
}

/// Returns the length of `http[s]://authority` at the start of `url`, or `None` if `url` starts otherwise.
fn origin_length(url: &[u8], authority: &str) -> Option<usize> {
    let (scheme, default_port) = [("https://", ":443"), ("http://", ":80")]
        .into_iter()
        .find(|(scheme, _)| url.get(..scheme.len()).is_some_and(|s| s.eq_ignore_ascii_case(scheme.as_bytes())))?;
    let rest = &url[scheme.len()..];
    let bare = authority.strip_suffix(default_port).unwrap_or(authority);
    let with_port = format!("{bare}{default_port}");
    [authority, with_port.as_str(), bare].into_iter().find_map(|name| {
        let named = rest.get(..name.len())?.eq_ignore_ascii_case(name.as_bytes());
        let ends = rest.get(name.len()).is_none_or(|b| matches!(b, b'/' | b'?' | b'#' | b'>'));
        (named && ends).then_some(scheme.len() + name.len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(name: &HeaderName, value: &str, authority: &str) -> String {
        let mut headers = HeaderMap::new();
        headers.append(name, HeaderValue::from_static("<untouched>"));
        headers.append(name, HeaderValue::from_str(value).expect("a value"));
        let patches = find(&headers, authority);
        apply(&patches, &mut headers, "http://127.0.0.1:18080");
        let last = headers.get_all(name).iter().next_back().expect("a value").to_str().expect("text");
        last.to_owned()
    }

    #[test]
    fn only_the_upstream_origin_is_rewritten_in_link_and_location() {
        let shop = "shop.example";
        let table = [
            (
                LINK,
                "<https://shop.example/a.json?page_info=x>; rel=\"previous\", <https://shop.example/a.json?page_info=y>; rel=\"next\"",
                "<http://127.0.0.1:18080/a.json?page_info=x>; rel=\"previous\", <http://127.0.0.1:18080/a.json?page_info=y>; rel=\"next\"",
            ),
            (LINK, "<https://shop.example.evil/a>; rel=\"next\"", "<https://shop.example.evil/a>; rel=\"next\""),
            (LINK, "</a>; title=\"https://shop.example/\"", "</a>; title=\"https://shop.example/\""),
            (LOCATION, "https://SHOP.example:443/x", "http://127.0.0.1:18080/x"),
            (LOCATION, "https://shop.example:8443/x", "https://shop.example:8443/x"),
            (LOCATION, "http://shop.example", "http://127.0.0.1:18080"),
            (LOCATION, "/relative", "/relative"),
        ];
        for (name, value, expected) in table {
            assert_eq!(rewritten(&name, value, shop), expected);
        }
        assert_eq!(rewritten(&LOCATION, "http://127.0.0.1:9/x", "127.0.0.1:9"), "http://127.0.0.1:18080/x");
    }
}
