//! Response framing checks that the HTTP library does not make (RFC 9112 §6.1, §6.3).

use http::header::HeaderName;

/// Returns the framing error of a response, if there is one. `fields`: names and values as received.
pub(super) fn framing_error<'f>(
    http_10: bool,
    fields: impl Iterator<Item = (&'f [u8], &'f [u8])>,
) -> Option<&'static str> {
    let (mut length, mut coding) = (None, None);
    for (name, value) in fields {
        let value = value.trim_ascii();
        if name.eq_ignore_ascii_case(b"content-length") {
            if length.replace(value).is_some() || !value.iter().all(u8::is_ascii_digit) {
                return Some("the response has more than one Content-Length, or one that is no number");
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding")
            && (coding.replace(value).is_some() || needs_decoding(value))
        {
            return Some("the response has a Transfer-Encoding other than chunked");
        }
    }
    match (length, coding) {
        (Some(_), Some(_)) => Some("the response has both Content-Length and Transfer-Encoding"),
        (None, Some(_)) if http_10 => Some("an HTTP/1.0 response has a Transfer-Encoding"),
        _ => None,
    }
}

/// Returns true if a transfer coding would have to be decoded. A coding that is not registered (RFC 9112 §7) is
/// ignored: such a body ends with its connection and is passed on unchanged.
fn needs_decoding(coding: &[u8]) -> bool {
    let known = ["chunked", "gzip", "x-gzip", "deflate", "compress", "x-compress", "identity"];
    let names_known = || {
        let words = coding.split(|b| !b.is_ascii_alphanumeric() && *b != b'-');
        words
            .into_iter()
            .any(|coding_name| known.iter().any(|coding| coding_name.eq_ignore_ascii_case(coding.as_bytes())))
    };
    !coding.eq_ignore_ascii_case(b"chunked") && (names_known() || HeaderName::from_bytes(coding).is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ambiguous_response_framing_is_an_error() {
        let sound: &[&[(&str, &str)]] = &[
            &[],
            &[("Content-Length", " 4 ")],
            &[("transfer-encoding", "Chunked")],
            &[("Transfer-Encoding", "x-unheard-of")],
        ];
        let flawed: &[&[(&str, &str)]] = &[
            &[("Content-Length", "4"), ("content-length", "4")],
            &[("Content-Length", "4, 4")],
            &[("Content-Length", "-4")],
            &[("Content-Length", "4"), ("Transfer-Encoding", "chunked")],
            &[("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
            &[("Transfer-Encoding", "gzip, chunked")],
            &[("Transfer-Encoding", "identity")],
            &[("Transfer-Encoding", "\u{b}chunked")],
        ];
        let found = |http_10, fields: &[(&str, &str)]| {
            framing_error(http_10, fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
        };
        for fields in sound {
            assert_eq!(found(false, fields), None, "{fields:?}");
        }
        for fields in flawed {
            assert!(found(false, fields).is_some(), "{fields:?}");
        }
        assert!(found(true, &[("Transfer-Encoding", "chunked")]).is_some());
    }
}
