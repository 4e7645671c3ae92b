//! Classification of the errors of Redis and its driver.

use fred::error::{Error, ErrorKind};

/// Returns true if the text is an error reply of a server: it begins with a word in capitals.
pub(super) fn is_server_reply(text: &str) -> bool {
    let code = text.split([' ', '\n']).next().unwrap_or_default();
    code.len() > 1 && code.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// Returns true if the connection was lost, which fred reports with several kinds of errors.
pub(super) fn is_connection_lost(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::IO | ErrorKind::Canceled)
        || *error.kind() == ErrorKind::Unknown && !is_server_reply(error.details())
}

/// Returns true if the error says that the server is no longer the right one, or that credentials may have changed.
pub(super) fn must_reconnect(message: &str) -> bool {
    ["READONLY", "NOAUTH", "WRONGPASS", "MASTERDOWN", "CLUSTERDOWN"].iter().any(|code| message.starts_with(code))
}

/// Returns the first line of an error, or only the message of a system error, which the driver formats with `Debug`:
/// `Os { …, message: "Connection refused" }`.
pub(super) fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let printed = line.starts_with("Os {") || line.starts_with("Custom {");
    let quoted = line.split_once(": \"").filter(|_| printed);
    quoted.and_then(|(_, message)| message.split_once('"')).map_or(line, |(message, _)| message).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_formatted_error_is_reduced_to_its_message() {
        let refused = "Os { code: 111, kind: ConnectionRefused, message: \"Connection refused\" }";
        assert_eq!(first_line(refused), "Connection refused");
        assert_eq!(first_line("Custom { kind: Uncategorized, error: \"no such name\" }"), "no such name");
        assert_eq!(first_line("NOAUTH Authentication required.\nmore"), "NOAUTH Authentication required.");
    }
}
