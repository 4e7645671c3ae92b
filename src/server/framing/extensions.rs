//! Chunk extension syntax (RFC 9112 §7.1.1). Extensions are ignored, but an invalid one makes the chunk invalid.

use super::TOKEN;

/// Returns true if `rest` is `*( BWS ";" BWS name [ BWS "=" BWS ( token / quoted-string ) ] )`: RFC 9112 §7.1.1.
pub(super) fn is_extension(mut rest: &[u8]) -> bool {
    while !rest.is_empty() {
        let Some(after) = blank(rest).strip_prefix(b";") else { return false };
        let (name, after) = split_token(blank(after));
        if name.is_empty() {
            return false;
        }
        rest = after;
        if let Some(value) = blank(after).strip_prefix(b"=") {
            let value = blank(value);
            let after = if value.first() == Some(&b'"') { after_quoted(value) } else { after_token(value) };
            let Some(after) = after else { return false };
            rest = after;
        }
    }
    true
}

fn after_token(text: &[u8]) -> Option<&[u8]> {
    let (token, rest) = split_token(text);
    (!token.is_empty()).then_some(rest)
}

fn after_quoted(text: &[u8]) -> Option<&[u8]> {
    let mut escaped = false;
    for (at, byte) in text.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return text.get(at + 1..),
            0..=8 | 10..=31 | 127 => return None,
            _ => {}
        }
    }
    None
}

fn split_token(text: &[u8]) -> (&[u8], &[u8]) {
    text.split_at(text.iter().take_while(|b| TOKEN[usize::from(**b)]).count())
}

fn blank(text: &[u8]) -> &[u8] {
    text.trim_ascii_start()
}
