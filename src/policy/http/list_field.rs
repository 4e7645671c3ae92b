//! Parser for comma-separated lists in field values (RFC 9110 §5.6.1).
//!
//! Whitespace around members and empty members are removed. Commas in quotes do not separate members.

/// Returns the members of one field line.
///
/// If `escapes` is true, a backslash in quotes escapes the next character, as in a quoted-string (RFC 9110 §5.6.4) but
/// not in an entity tag (§8.8.3).
pub fn members(list: &[u8], escapes: bool) -> Members<'_> {
    Members { rest: list, escapes }
}

/// Iterator over the members of a field line, returned by [`members`].
#[derive(Debug, Clone)]
pub struct Members<'l> {
    rest: &'l [u8],
    escapes: bool,
}

impl<'l> Iterator for Members<'l> {
    type Item = &'l [u8];

    fn next(&mut self) -> Option<&'l [u8]> {
        while !self.rest.is_empty() {
            let end = end_of_first(self.rest, self.escapes);
            let member = self.rest[..end].trim_ascii();
            self.rest = self.rest.get(end + 1..).unwrap_or_default();
            if !member.is_empty() {
                return Some(member);
            }
        }
        None
    }
}

/// Returns the index of the comma that ends the first member, or the length of the list.
fn end_of_first(list: &[u8], escapes: bool) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (i, byte) in list.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted && escapes => escaped = true,
            b'"' => quoted = !quoted,
            b',' if !quoted => return i,
            _ => {}
        }
    }
    list.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_quotes_do_not_separate_list_members() {
        let split = |list: &'static str, escapes| -> Vec<_> {
            members(list.as_bytes(), escapes).map(|member| String::from_utf8_lossy(member).into_owned()).collect()
        };
        assert_eq!(split(" a ,, b=\"c, d\" ,", true), ["a", "b=\"c, d\""]);
        assert_eq!(split("\"a\\\", b\", c", true), ["\"a\\\", b\"", "c"]);
        assert_eq!(split("\"a\\\", \"b\"", false), ["\"a\\\"", "\"b\""]);
        assert!(split(" , ", true).is_empty());
    }
}
