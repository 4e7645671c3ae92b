//! Pattern matching for the configuration: globs for values and path patterns for rules.
//!
//! There are no regular expressions, so that matching takes time in proportion to the text.

use std::fmt;

use smallvec::SmallVec;

/// A glob: `*` matches any run of bytes, including none; every other byte matches itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob(Box<str>);

impl Glob {
    /// Creates a glob. Any text is valid.
    pub fn new(pattern: &str) -> Glob {
        Glob(pattern.into())
    }

    /// Returns true if the whole of `text` matches.
    pub fn matches(&self, text: &[u8]) -> bool {
        let pattern = self.0.as_bytes();
        let (mut p, mut t) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while t < text.len() {
            if pattern.get(p) == Some(&b'*') {
                star = Some((p, t));
                p += 1;
            } else if pattern.get(p) == Some(&text[t]) {
                p += 1;
                t += 1;
            } else if let Some((star_p, star_t)) = star {
                star = Some((star_p, star_t + 1));
                p = star_p + 1;
                t = star_t + 1;
            } else {
                return false;
            }
        }
        pattern[p..].iter().all(|b| *b == b'*')
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The captured parts of a path, in the order of the `{names}` in the rule's `path`.
pub type Captures<'p> = SmallVec<[&'p str; 4]>;

/// A rule's path pattern: `/admin/api/*/products/{id}.json`. `{name}` matches one segment or a part of one, `*` any
/// run inside a segment, a final `**` the rest of the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPattern {
    pub(super) segments: Vec<PatternSegment>,
    pub(super) rest: bool,
    names: Vec<Box<str>>,
    text: Box<str>,
}

/// One segment of a pattern, between slashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PatternSegment {
    Literal(Box<str>),
    /// A segment with at least one wildcard.
    Shaped(Vec<PatternPiece>),
}

impl PatternSegment {
    fn covers(&self, other: &PatternSegment) -> bool {
        let PatternSegment::Shaped(pieces) = self else { return self == other };
        match other {
            _ if *pieces == [PatternPiece::Run] => true,
            PatternSegment::Literal(text) => match_pieces(pieces, text, &mut Captures::new()),
            PatternSegment::Shaped(others) => {
                self == other
                    || *pieces == [PatternPiece::Capture] && others.iter().any(|piece| *piece != PatternPiece::Run)
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PatternPiece {
    Text(Box<str>),
    /// `*`: any run, including none.
    Run,
    /// `{name}`: at least one byte.
    Capture,
}

impl PathPattern {
    /// Parses a pattern. An error says what to write instead.
    pub fn parse(text: &str) -> Result<PathPattern, String> {
        let Some(path) = text.strip_prefix('/') else {
            return Err(format!("a path pattern starts with a slash: write \"/{text}\""));
        };
        if text.contains('?') {
            return Err("a path pattern has no query: write `when = { query = { name = \"value\" } }`".into());
        }
        let mut pattern = PathPattern { segments: Vec::new(), rest: false, names: Vec::new(), text: text.into() };
        let mut segments = path.split('/').peekable();
        while let Some(segment) = segments.next() {
            if segment == "**" {
                if segments.peek().is_some() {
                    return Err("`**` matches any rest of the path, so it must be the last segment".into());
                }
                pattern.rest = true;
            } else {
                let segment = pattern.segment(segment)?;
                pattern.segments.push(segment);
            }
        }
        Ok(pattern)
    }

    /// Returns the `{names}`, in order.
    pub fn names(&self) -> &[Box<str>] {
        &self.names
    }

    /// Returns true if this pattern matches every path that `other` matches, and false where that is undecided.
    pub fn covers(&self, other: &PathPattern) -> bool {
        let (mine, others) = (self.segments.len(), other.segments.len());
        let deep_enough =
            if self.rest { mine < others || mine == others && other.rest } else { mine == others && !other.rest };
        deep_enough && self.segments.iter().zip(&other.segments).all(|(wide, narrow)| wide.covers(narrow))
    }

    fn segment(&mut self, text: &str) -> Result<PatternSegment, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('*') {
                if after.starts_with('*') {
                    return Err("`**` must be a whole segment; inside one, write `*`".into());
                }
                pieces.push(PatternPiece::Run);
                rest = after;
            } else if let Some(after) = rest.strip_prefix('{') {
                let (name, after) = after.split_once('}').ok_or("a `{` without its `}`")?;
                if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                    return Err(format!("`{{{name}}}`: a name has letters, digits and _ only"));
                }
                if self.names.iter().any(|known| **known == *name) {
                    return Err(format!("`{{{name}}}` occurs twice in this path"));
                }
                if matches!(pieces.last(), Some(PatternPiece::Capture | PatternPiece::Run)) {
                    return Err(format!("`{{{name}}}` follows a wildcard at once; put text between them"));
                }
                self.names.push(name.into());
                pieces.push(PatternPiece::Capture);
                rest = after;
            } else {
                let end = rest.find(['*', '{']).unwrap_or(rest.len());
                pieces.push(PatternPiece::Text(rest[..end].into()));
                rest = &rest[end..];
            }
        }
        Ok(match pieces.as_slice() {
            [] => PatternSegment::Literal("".into()),
            [PatternPiece::Text(only)] => PatternSegment::Literal(only.clone()),
            _ => PatternSegment::Shaped(pieces),
        })
    }

    /// Returns the parts of `path` that the pattern's names capture, or `None` if it does not match.
    pub fn captures<'p>(&self, path: &'p str) -> Option<Captures<'p>> {
        let mut captures = Captures::new();
        let mut segments = path.strip_prefix('/')?.split('/');
        for pattern in &self.segments {
            let segment = segments.next()?;
            match pattern {
                PatternSegment::Literal(literal) if **literal == *segment => {}
                PatternSegment::Shaped(pieces) if match_pieces(pieces, segment, &mut captures) => {}
                PatternSegment::Literal(_) | PatternSegment::Shaped(_) => return None,
            }
        }
        (self.rest == segments.next().is_some()).then_some(captures)
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Matches one segment. On success, the segment's captures are appended to `captures`.
///
/// Each literal is matched at its first occurrence, and the last one at the end. If any match exists, this one does, so
/// no backtracking is needed.
pub(super) fn match_pieces<'p>(pieces: &[PatternPiece], text: &'p str, captures: &mut Captures<'p>) -> bool {
    let depth = captures.len();
    let matched = match_from(pieces, text, captures).is_some();
    if !matched {
        captures.truncate(depth);
    }
    matched
}

fn match_from<'p>(pieces: &[PatternPiece], text: &'p str, captures: &mut Captures<'p>) -> Option<()> {
    let mut rest = text;
    // The wildcard whose end is not yet known; its text begins where `rest` does.
    let mut open: Option<&PatternPiece> = None;
    for (index, piece) in pieces.iter().enumerate() {
        let PatternPiece::Text(literal) = piece else {
            if let Some(wildcard) = open {
                // Two wildcards in a row: the first takes as little as it may.
                rest = close(wildcard, rest, least(wildcard, rest)?, captures);
            }
            open = Some(piece);
            continue;
        };
        if let Some(wildcard) = open.take() {
            let least = least(wildcard, rest)?;
            let end = if index + 1 == pieces.len() {
                let end = rest.len().checked_sub(literal.len())?;
                (end >= least && rest.ends_with(&**literal)).then_some(end)?
            } else {
                least + rest[least..].find(&**literal)?
            };
            rest = close(wildcard, rest, end, captures);
        }
        rest = rest.strip_prefix(&**literal)?;
    }
    match open {
        None => rest.is_empty().then_some(()),
        Some(wildcard) => {
            least(wildcard, rest)?;
            close(wildcard, rest, rest.len(), captures);
            Some(())
        }
    }
}

/// Returns the fewest bytes of `rest` that a wildcard may take, or `None` if `rest` is shorter.
fn least(wildcard: &PatternPiece, rest: &str) -> Option<usize> {
    if *wildcard == PatternPiece::Capture { rest.chars().next().map(char::len_utf8) } else { Some(0) }
}

/// Ends a wildcard after `end` bytes. Returns the text that follows.
fn close<'p>(wildcard: &PatternPiece, rest: &'p str, end: usize, captures: &mut Captures<'p>) -> &'p str {
    if *wildcard == PatternPiece::Capture {
        captures.push(&rest[..end]);
    }
    &rest[end..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glob_asterisk_matches_any_text() {
        let table = [
            ("*json*", "application/json", true),
            ("*", "", true),
            ("a*b*c", "aXXbYYc", true),
            ("a*b*c", "aXXbYY", false),
            ("utm_*", "utm_source", true),
            ("utm_*", "outm_source", false),
            ("", "", true),
            ("", "x", false),
        ];
        for (glob, text, expected) in table {
            assert_eq!(Glob::new(glob).matches(text.as_bytes()), expected, "{glob} {text}");
        }
    }

    #[test]
    fn path_patterns_match_and_return_captures() {
        let table: &[(&str, &str, Option<&[&str]>)] = &[
            ("/admin/api/*/products/{id}.json", "/admin/api/2026-07/products/632.json", Some(&["632"])),
            ("/admin/api/*/products/{id}.json", "/admin/api/2026-07/products/.json", None),
            ("/admin/api/*/products/{id}.json", "/admin/api/a/b/products/1.json", None),
            ("/{a}-{b}", "/x-y-z", Some(&["x", "y-z"])),
            ("/**", "/", Some(&[])),
            ("/**", "/a/b", Some(&[])),
            ("/a/**", "/a/", Some(&[])),
            ("/a/**", "/a", None),
            ("/a", "/a/", None),
            ("/a*c", "/abbc", Some(&[])),
            ("/", "/", Some(&[])),
            ("/{a}-{b}-x", "/1-2-x-x", Some(&["1", "2-x"])),
            ("/{a}*", "/xyz", Some(&["x"])),
            ("/{a}*", "/", None),
            ("/*-{a}", "/-", None),
            ("/*-{a}", "/-b", Some(&["b"])),
            ("/{a}ab", "/ab", None),
            ("/{a}ab", "/aab", Some(&["a"])),
            ("/{a}é", "/éé", Some(&["é"])),
        ];
        for (pattern, path, expected) in table {
            let parsed = PathPattern::parse(pattern).expect("a pattern");
            assert_eq!(parsed.captures(path).as_deref(), *expected, "{pattern} {path}");
        }
    }

    #[test]
    fn path_pattern_covers_only_the_patterns_that_it_includes() {
        let table = [
            ("/**", "/a/{id}", true),
            ("/a/**", "/a", false),
            ("/a/**", "/a/b/**", true),
            ("/a/b/**", "/a/**", false),
            ("/a/{id}", "/a/1.json", true),
            ("/a/{id}.json", "/a/1", false),
            ("/a/{id}.json", "/a/{name}.json", true),
            ("/a/*", "/a/{id}", true),
            ("/a/{id}", "/a/*", false),
            ("/a/{id}", "/a/*.json", true),
            ("/a/1", "/a/{id}", false),
            ("/a", "/a/**", false),
        ];
        for (wide, narrow, expected) in table {
            let parse = |text| PathPattern::parse(text).expect("a pattern");
            assert_eq!(parse(wide).covers(&parse(narrow)), expected, "{wide} {narrow}");
        }
    }

    #[test]
    fn invalid_path_patterns_are_rejected() {
        for bad in ["a/b", "/a?b", "/**/a", "/{}", "/{a", "/{a}{b}", "/{a}/{a}", "/x**"] {
            assert!(PathPattern::parse(bad).is_err(), "{bad}");
        }
    }
}
