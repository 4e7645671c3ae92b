//! Tags of stored responses, and digests ([`Subject`]) of everything that a purge can name.
//!
//! Tags come from a rule's templates. Subjects are scoped to upstream and authority.

use std::fmt;

use crate::policy::routing::pattern::PathPattern;

/// A rule's tag template: `product:{id}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagTemplate(Vec<TagPart>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum TagPart {
    Text(Box<str>),
    /// The n-th name of the path pattern.
    Capture(usize),
}

impl TagTemplate {
    /// Parses a template whose `{names}` the path pattern captures. An error says what to write instead.
    pub fn parse(text: &str, path: &PathPattern) -> Result<TagTemplate, String> {
        if text.is_empty() || text.contains(char::is_whitespace) {
            return Err(format!("tag {text:?}: a tag must not be empty or contain spaces"));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) =
                after.split_once('}').ok_or_else(|| format!("tag {text:?}: a `{{` without its `}}`"))?;
            let index = path.names().iter().position(|known| **known == *name).ok_or_else(|| {
                format!("tag {text:?}: the path {path} captures no `{{{name}}}`; write it into the path")
            })?;
            parts.extend([TagPart::Text(before.into()), TagPart::Capture(index)]);
            rest = after;
        }
        parts.push(TagPart::Text(rest.into()));
        Ok(TagTemplate(parts))
    }

    /// Returns the tag for the captures of a path.
    pub fn expand(&self, captures: &[&str]) -> String {
        self.0.iter().fold(String::new(), |tag, part| match part {
            TagPart::Text(text) => tag + text,
            TagPart::Capture(index) => tag + captures.get(*index).copied().unwrap_or_default(),
        })
    }
}

/// Formats the template as written, with the index of each capture instead of its name: `product:{0}`.
impl fmt::Display for TagTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            TagPart::Text(text) => f.write_str(text),
            TagPart::Capture(index) => write!(f, "{{{index}}}"),
        })
    }
}

/// Identifies an upstream: a digest of its name and its origin. Sidecars with different configurations use the same id
/// for the same upstream, and different ids for upstreams that have the same name but different origins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UpstreamId(pub u64);

impl UpstreamId {
    /// Returns the id of an upstream. `origin` is `scheme://authority`, or another name for where its requests go.
    pub fn of(name: &str, origin: &str) -> UpstreamId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(name.len() as u64).to_be_bytes()).update(name.as_bytes()).update(origin.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        UpstreamId(u64::from_be_bytes(first))
    }
}

/// The scope of tags and URLs: an upstream, and one of its authorities or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagScope<'a> {
    /// The upstream.
    pub upstream: UpstreamId,
    /// The authority; `None`: all of this upstream.
    pub authority: Option<&'a str>,
}

/// 128 bits of a BLAKE3 digest of something that a purge can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject(u128);

impl Subject {
    /// Returns the subject of everything in the scope.
    pub fn everything(scope: TagScope<'_>) -> Subject {
        Subject::digest(b"all", scope, "")
    }

    /// Returns the subject of everything with this tag.
    pub fn tag(scope: TagScope<'_>, tag: &str) -> Subject {
        Subject::digest(b"tag", scope, tag)
    }

    /// Returns the subject of one path and query.
    pub fn target(scope: TagScope<'_>, target: &str) -> Subject {
        Subject::digest(b"url", scope, target)
    }

    /// Returns the subject of one path with any query.
    pub fn path(scope: TagScope<'_>, path: &str) -> Subject {
        Subject::digest(b"pth", scope, path)
    }

    /// Returns the bytes of the wire format.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// Creates a subject from the bytes of [`Subject::to_bytes`].
    pub fn from_bytes(bytes: [u8; 16]) -> Subject {
        Subject(u128::from_be_bytes(bytes))
    }

    fn digest(kind: &[u8], scope: TagScope<'_>, name: &str) -> Subject {
        let authority = scope.authority.unwrap_or("*");
        let mut hasher = blake3::Hasher::new();
        hasher.update(kind).update(&scope.upstream.0.to_be_bytes());
        hasher.update(&(authority.len() as u64).to_be_bytes()).update(authority.as_bytes()).update(name.as_bytes());
        let mut first = [0; 16];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Subject(u128::from_be_bytes(first))
    }
}

/// Returns all subjects that a purge can name a stored response by.
pub fn subjects(scope: TagScope<'_>, target: &str, tags: &[String]) -> Vec<Subject> {
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let any = TagScope { authority: None, ..scope };
    let scopes: &[TagScope<'_>] = if scope.authority.is_some() { &[scope, any] } else { &[any] };
    let mut subjects = Vec::with_capacity(scopes.len() * (3 + tags.len()));
    for scope in scopes {
        subjects.extend([Subject::everything(*scope), Subject::target(*scope, target), Subject::path(*scope, path)]);
        subjects.extend(tags.iter().map(|tag| Subject::tag(*scope, tag)));
    }
    subjects
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_templates_are_filled_with_path_captures() {
        let path = PathPattern::parse("/{shop}/products/{id}.json").expect("a pattern");
        let fill = |text: &str| TagTemplate::parse(text, &path).map(|t| t.expand(&["acme", "7"]));
        assert_eq!(fill("product:{id}").as_deref(), Ok("product:7"));
        assert_eq!(fill("{shop}/{id}!").as_deref(), Ok("acme/7!"));
        assert!(fill("product:{nope}").is_err());
        assert!(fill("").is_err());
    }

    // The invalidation log and the records of running fleets contain subjects and upstream ids.
    #[test]
    fn subject_encoding_matches_the_golden_values() {
        let upstream = UpstreamId::of("shop", "https://shop.example");
        assert_eq!(format!("{:016x}", upstream.0), "14e8276d8656b4da");
        let hex = |subject: Subject| crate::policy::testing::hex(&subject.to_bytes());
        let scope = TagScope { upstream, authority: Some("a.example") };
        let any = TagScope { upstream, authority: None };
        assert_eq!(hex(Subject::tag(scope, "products")), "dd523895ad88aec56faddeb2886d8bab");
        assert_eq!(hex(Subject::target(any, "/p?q")), "b3316ba7ac874cc69edc1c46cd4c66ff");
        assert_eq!(hex(Subject::path(scope, "/p")), "31a976077c6debf6f8a3295547b47809");
        assert_eq!(hex(Subject::everything(any)), "d1f5ab4ab34d16f09212848170e0e1fd");
    }

    #[test]
    fn subjects_differ_by_authority_and_kind() {
        let one = TagScope { upstream: UpstreamId(0), authority: Some("a.example") };
        let other = TagScope { upstream: UpstreamId(0), authority: Some("b.example") };
        assert_ne!(Subject::tag(one, "x"), Subject::tag(other, "x"));
        assert_ne!(Subject::tag(one, "/x"), Subject::target(one, "/x"));
        let any = Subject::tag(TagScope { upstream: UpstreamId(0), authority: None }, "x");
        assert!(subjects(one, "/x?y", &["x".into()]).contains(&any));
    }
}
