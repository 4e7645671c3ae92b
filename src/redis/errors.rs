//! What Redis and its driver say when something is wrong, and what to make of it.

use fred::error::{Error, ErrorKind};

/// Did a server say this? It begins with a word in capitals.
pub(super) fn is_answer(text: &str) -> bool {
    let word = text.split([' ', '\n']).next().unwrap_or_default();
    word.len() > 1 && word.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// Is the connection gone? fred tells of that with several kinds of errors.
pub(super) fn is_lost(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::IO | ErrorKind::Canceled)
        || *error.kind() == ErrorKind::Unknown && !is_answer(error.details())
}

/// Errors of a server that is no longer the right one, or of credentials that may have changed.
pub(super) fn must_reconnect(message: &str) -> bool {
    ["READONLY", "NOAUTH", "WRONGPASS", "MASTERDOWN", "CLUSTERDOWN"].iter().any(|word| message.starts_with(word))
}

/// The driver writes the system's errors as Rust does: `Os { …, message: "Connection refused" }`. People read the message.
pub(super) fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let printed = line.starts_with("Os {") || line.starts_with("Custom {");
    let said = line.split_once(": \"").filter(|_| printed);
    said.and_then(|(_, message)| message.split_once('"')).map_or(line, |(message, _)| message).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_the_message() {
        let refused = "Os { code: 111, kind: ConnectionRefused, message: \"Connection refused\" }";
        assert_eq!(first_line(refused), "Connection refused");
        assert_eq!(first_line("Custom { kind: Uncategorized, error: \"no such name\" }"), "no such name");
        assert_eq!(first_line("NOAUTH Authentication required.\nmore"), "NOAUTH Authentication required.");
    }
}
