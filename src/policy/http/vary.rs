//! Variants of a stored response: `Vary`, and the comparison of request header fields (RFC 9111 §4.1).

use http::header::{
    ACCEPT_CHARSET, ACCEPT_ENCODING, ACCEPT_LANGUAGE, AUTHORIZATION, COOKIE, HOST, HeaderMap, HeaderName,
    HeaderValue, ORIGIN, REFERER, USER_AGENT,
};

use super::list_field::members;

/// The request header fields that a response depends on, with their values: a list of names and their lines.
#[derive(Debug, Clone, Default)]
pub struct Variant(pub Box<[(HeaderName, Box<[HeaderValue]>)]>);

/// How the values of a request header field are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VaryComparison {
    /// Byte by byte: a comma in the value does not have to be a separator.
    Exact,
    /// As lists with the same members in the same order, on any number of lines (RFC 9110 §5.3).
    List,
    /// As lists of tokens with weights, in any order and case (RFC 9110 §12.4.2, §12.5).
    Preferences,
}

/// Preferences with more members or bytes than this are compared byte by byte: real clients do not send them, and
/// comparing each member with each takes quadratic time.
const MAX_PREFERENCES: usize = 32;
const MAX_PREFERENCE_BYTES: usize = 512;

impl VaryComparison {
    /// Returns the number of the comparison in digests.
    fn number(self) -> u8 {
        match self {
            VaryComparison::Exact => 0,
            VaryComparison::List => 1,
            VaryComparison::Preferences => 2,
        }
    }

    fn of<'v, L: Iterator<Item = &'v HeaderValue>>(name: &HeaderName, lines: impl Fn() -> L) -> VaryComparison {
        const PREFERENCES: [HeaderName; 3] = [ACCEPT_CHARSET, ACCEPT_ENCODING, ACCEPT_LANGUAGE];
        const EXACT: [HeaderName; 6] = [AUTHORIZATION, COOKIE, HOST, ORIGIN, REFERER, USER_AGENT];
        if PREFERENCES.contains(name) {
            let bytes: usize = lines().map(HeaderValue::len).sum();
            let few = bytes <= MAX_PREFERENCE_BYTES && list_members(lines()).count() <= MAX_PREFERENCES;
            if few { VaryComparison::Preferences } else { VaryComparison::Exact }
        } else if EXACT.contains(name) {
            VaryComparison::Exact
        } else {
            VaryComparison::List
        }
    }
}

impl Variant {
    /// Returns the names of the request headers that select the variant.
    pub fn names(&self) -> Vec<HeaderName> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Creates a variant with the values that the fields `names` have in a request.
    pub fn of(names: Vec<HeaderName>, request: &HeaderMap) -> Variant {
        let values = |name: &HeaderName| request.get_all(name).iter().map(detached_copy).collect();
        Variant(names.into_iter().map(|name| (name.clone(), values(&name))).collect())
    }

    /// Returns a digest of the names and the normalized values: equal variants have equal digests.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for (name, values) in &self.0 {
            let reading = VaryComparison::of(name, || values.iter());
            let mut said: Vec<Vec<u8>> = match reading {
                VaryComparison::Exact => values.iter().map(|line| line.as_bytes().to_vec()).collect(),
                VaryComparison::List => list_members(values.iter()).map(<[u8]>::to_vec).collect(),
                VaryComparison::Preferences => {
                    list_members(values.iter()).map(|token| normalized_bytes(token).collect()).collect()
                }
            };
            if reading == VaryComparison::Preferences {
                said.sort_unstable();
                said.dedup();
            }
            let there = [reading.number(), u8::from(!values.is_empty())];
            hasher.update(name.as_str().as_bytes()).update(&[0xff]).update(&there);
            hasher.update(&(said.len() as u64).to_be_bytes());
            for part in said {
                hasher.update(&(part.len() as u64).to_be_bytes()).update(&part);
            }
        }
        hasher.finalize()
    }

    /// Returns true if this request selects the same response (RFC 9111 §4.1). Does not allocate.
    pub fn selected_by(&self, request: &HeaderMap) -> bool {
        self.0.iter().all(|(name, values)| equivalent(name, || values.iter(), || request.get_all(name).iter()))
    }
}

impl Variant {
    /// Returns true if the response depends on `negotiated`, and this request has equivalent values in all other fields.
    pub fn selected_by_all_but(&self, negotiated: &HeaderName, request: &HeaderMap) -> bool {
        let depends = self.0.iter().any(|(name, _)| name == negotiated);
        let others = || self.0.iter().filter(|(name, _)| name != negotiated);
        depends && others().all(|(name, values)| equivalent(name, || values.iter(), || request.get_all(name).iter()))
    }
}

/// Returns true if a request accepts a response with this `Content-Encoding` (RFC 9110 §12.5.3). One without
/// `Accept-Encoding` accepts a response without a content coding only: clients that can decode one say so.
pub fn accepts_coding(request: &HeaderMap, coding: Option<&[u8]>) -> bool {
    let coding = coding.unwrap_or(b"identity").trim_ascii();
    let (mut named, mut any) = (None, None);
    for member in list_members(request.get_all(ACCEPT_ENCODING).iter()) {
        let mut parts = member.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
        let name = parts.next().unwrap_or_default();
        let refused = parts.any(|part| {
            let weight = part.strip_prefix(b"q=").or_else(|| part.strip_prefix(b"Q="));
            weight.is_some_and(|weight| weight.iter().all(|byte| b"0.".contains(byte)))
        });
        let slot = if name == b"*" { &mut any } else { &mut named };
        if name == b"*" || name.eq_ignore_ascii_case(coding) {
            *slot = Some(!refused);
        }
    }
    named.or(any).unwrap_or(coding.eq_ignore_ascii_case(b"identity"))
}

impl PartialEq for Variant {
    fn eq(&self, other: &Variant) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|((name, values), (other_name, other_values))| {
                name == other_name && equivalent(name, || values.iter(), || other_values.iter())
            })
    }
}

impl Eq for Variant {}

/// Returns true if the two values of a request header field, each given as its lines, are equivalent.
fn equivalent<'v, A, B>(name: &HeaderName, one: impl Fn() -> A, other: impl Fn() -> B) -> bool
where
    A: Iterator<Item = &'v HeaderValue>,
    B: Iterator<Item = &'v HeaderValue>,
{
    if one().eq(other()) {
        return true;
    }
    // An empty field is not equivalent to an absent one.
    if one().next().is_none() || other().next().is_none() {
        return false;
    }
    match (VaryComparison::of(name, &one), VaryComparison::of(name, &other)) {
        (VaryComparison::List, VaryComparison::List) => list_members(one()).eq(list_members(other())),
        (VaryComparison::Preferences, VaryComparison::Preferences) => {
            list_members(one()).all(|token| has_token(list_members(other()), token))
                && list_members(other()).all(|token| has_token(list_members(one()), token))
        }
        (VaryComparison::Exact | VaryComparison::List | VaryComparison::Preferences, _) => false,
    }
}

fn has_token<'v>(mut tokens: impl Iterator<Item = &'v [u8]>, token: &[u8]) -> bool {
    tokens.any(|known| normalized_bytes(known).eq(normalized_bytes(token)))
}

fn list_members<'v>(lines: impl Iterator<Item = &'v HeaderValue>) -> impl Iterator<Item = &'v [u8]> {
    lines.flat_map(|line| members(line.as_bytes(), true))
}

/// Returns a token with its weight in lowercase and without whitespace.
fn normalized_bytes(token: &[u8]) -> impl Iterator<Item = u8> {
    token.iter().filter(|byte| !byte.is_ascii_whitespace()).map(u8::to_ascii_lowercase)
}

/// Returns a copy of a value that does not share memory with the buffer from which it was parsed.
fn detached_copy(value: &HeaderValue) -> HeaderValue {
    let mut copy = HeaderValue::from_bytes(value.as_bytes()).unwrap_or_else(|_| HeaderValue::from_static(""));
    copy.set_sensitive(value.is_sensitive());
    copy
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(name: &'static str, lines: &[&str]) -> HeaderMap {
        let name = HeaderName::from_static(name);
        lines.iter().fold(HeaderMap::new(), |mut headers, line| {
            headers.append(&name, HeaderValue::from_str(line).expect("a value"));
            headers
        })
    }

    #[test]
    fn variants_match_if_normalized_header_values_are_equal() {
        let table: &[(&str, &[&str], &[&str], bool)] = &[
            ("foo", &["1, 2"], &["1", "2"], true),
            ("foo", &["1,2"], &[" 1, 2 "], true),
            ("foo", &["1, 2"], &["2, 1"], false),
            ("foo", &["\"1, 2\""], &["\"1,2\""], false),
            ("foo", &["a"], &["A"], false),
            ("foo", &[""], &[], false),
            ("foo", &[], &[], true),
            ("accept-language", &["en, de"], &["De ,eN"], true),
            ("accept-language", &["en, de;q=0.5"], &["en", "de; q=0.5"], true),
            ("accept-language", &["en, de"], &["en"], false),
            ("accept-language", &["en, de"], &["en;q=0.5, de"], false),
            ("accept-encoding", &["gzip, br"], &["br,gzip"], true),
            ("user-agent", &["A (x, y)"], &["A (x,y)"], false),
        ];
        for (name, one, other, expected) in table {
            let variant = |lines| Variant::of(vec![HeaderName::from_static(name)], &request(name, lines));
            assert_eq!(variant(one).selected_by(&request(name, other)), *expected, "{name}: {one:?} {other:?}");
            assert_eq!(variant(one) == variant(other), *expected, "{name}: {one:?} {other:?}");
        }
    }

    // Digests of variants are part of Redis keys and of the names of leases.
    #[test]
    fn variant_digest_matches_the_golden_values() {
        let digest = |name: &'static str, lines: &[&str]| {
            Variant::of(vec![HeaderName::from_static(name)], &request(name, lines)).digest().to_hex()[..32].to_owned()
        };
        assert_eq!(digest("accept-encoding", &["gzip, BR"]), "fb0e924ee74bbceb1ad97957b5f17251");
        assert_eq!(digest("foo", &["a, b", "c"]), "477a14378781ff4d711e1216de6fe739");
        assert_eq!(digest("user-agent", &["A (x, y)"]), "347c434f5a33105ed145cc9d16a8896e");
        assert_eq!(digest("foo", &[]), "ea700f16247b7dc2ffe3c3fc5e4bb55b");
    }

    #[test]
    fn overlong_preference_lists_are_compared_exactly() {
        let variant = |text: &str| Variant::of(vec![ACCEPT_ENCODING], &request("accept-encoding", &[text]));
        let (one, other) = (format!("{}b", "a,".repeat(9000)), format!("{}a", "b,".repeat(9000)));
        assert!(variant(&one) == variant(&one) && variant(&one) != variant(&other));
        assert_ne!(variant(&one).digest(), variant(&other).digest());
    }

    proptest! {
        #[test]
        fn variant_digests_are_equal_only_for_equal_variants(
            name in prop::sample::select(vec!["foo", "accept-language", "accept-encoding", "user-agent"]),
            one in prop::collection::vec("[aA,\" ;q=]{0,8}", 0..3),
            other in prop::collection::vec("[aA,\" ;q=]{0,8}", 0..3),
        ) {
            let variant = |lines: &[String]| {
                let lines: Vec<_> = lines.iter().map(String::as_str).collect();
                Variant::of(vec![HeaderName::from_static(name)], &request(name, &lines))
            };
            let (one, other) = (variant(&one), variant(&other));
            prop_assert_eq!(one == other, one.digest() == other.digest());
            prop_assert_eq!(one == other, other == one);
        }
    }
}
