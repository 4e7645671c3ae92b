//! A stored answer's head, packed: what many heads have alike is kept once, and what is a head's own lies in one block
//! of bytes. A header map takes 104 bytes a field; this takes the values and four bytes each.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{AGE, HeaderMap, HeaderName, HeaderValue};
use http::{Extensions, StatusCode};

use crate::policy::http::hop_by_hop::{CACHE_STATUS, SERVER_TIMING};
use crate::policy::http::link_rewrite::LinkPatch;

/// How an upstream writes its field names.
#[derive(Debug, Clone)]
pub struct HeaderCase {
    /// The names that are not in Title-Case, one a line.
    pub names: Arc<[u8]>,
    /// The HTTP library's own record of them, as response extensions: it can be cloned, not read.
    pub record: Arc<Extensions>,
}

/// What heads with the same fields have alike.
#[derive(Debug)]
pub struct HeadShape {
    /// The fields, a line each, with empty values; and places for what every answer from the cache gets, so that a
    /// hit need not enlarge its copy.
    template: HeaderMap,
    /// How the upstream wrote the names, where that is not Title-Case.
    header_case: Option<HeaderCase>,
}

/// Fields that every answer from the cache gets.
const CACHE_FIELDS: [HeaderName; 3] = [AGE, CACHE_STATUS, SERVER_TIMING];

/// A response head, ready to be sent many times: without hop-by-hop fields and `Age`, with `Date`.
#[derive(Debug, Clone)]
pub struct PackedHead {
    /// Its status.
    pub status: StatusCode,
    shape: Arc<HeadShape>,
    /// Where each line's value ends, as four bytes, little end first; then the values, one after the other.
    block: Bytes,
    /// `Link` and `Location` values that name the upstream.
    links: Option<Arc<[LinkPatch]>>,
}

impl HeadShape {
    fn of(headers: &HeaderMap, header_case: Option<HeaderCase>) -> HeadShape {
        let mut template = HeaderMap::with_capacity(headers.len() + CACHE_FIELDS.len());
        for name in headers.keys() {
            for _ in headers.get_all(name) {
                template.append(name.clone(), HeaderValue::from_static(""));
            }
        }
        for name in CACHE_FIELDS {
            template.entry(name).or_insert(HeaderValue::from_static(""));
        }
        // It is kept for long: a clone takes no more than what it holds.
        HeadShape { template: template.clone(), header_case }
    }

    fn header_case_names(&self) -> &[u8] {
        self.header_case.as_ref().map_or(&[], |header_case| &header_case.names)
    }

    /// Bytes it takes in memory: a header map's slot is a hash, links, a name and a value.
    pub fn weight(&self) -> usize {
        const SLOT: usize = 104;
        size_of::<HeadShape>()
            + self.template.keys().map(|name| SLOT + name.as_str().len()).sum::<usize>()
            + self.header_case_names().len()
    }
}

impl PartialEq for HeadShape {
    fn eq(&self, other: &HeadShape) -> bool {
        let names = |shape: &HeadShape| shape.template.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        self.template.len() == other.template.len()
            && self.header_case_names() == other.header_case_names()
            && names(self) == names(other)
    }
}

impl Eq for HeadShape {}

impl Hash for HeadShape {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.template.iter().for_each(|(name, _)| name.hash(state));
        self.header_case_names().hash(state);
    }
}

impl PackedHead {
    /// Packs a head.
    pub fn new(
        status: StatusCode,
        headers: &HeaderMap,
        header_case: Option<HeaderCase>,
        links: Vec<LinkPatch>,
    ) -> PackedHead {
        let shape = HeadShape::of(headers, header_case);
        // The order is the template's: it need not be that of the map it was made from.
        let mut lines: Vec<&[u8]> = Vec::with_capacity(shape.template.len());
        for name in shape.template.keys() {
            let values = shape.template.get_all(name).iter().count();
            let given = headers.get_all(name).iter().map(HeaderValue::as_bytes);
            lines.extend(given.chain(std::iter::repeat(&b""[..])).take(values));
        }
        let size = lines.iter().map(|line| line.len() + OFFSET_BYTES).sum();
        let mut block = BytesMut::with_capacity(size);
        let mut end = 0;
        for line in &lines {
            // Heads are limited to far less than 4 GiB.
            end += u32::try_from(line.len()).unwrap_or(u32::MAX);
            block.put_u32_le(end);
        }
        for line in lines {
            block.put_slice(line);
        }
        let links = (!links.is_empty()).then(|| links.into());
        PackedHead { status, shape: Arc::new(shape), block: block.freeze(), links }
    }

    /// All lines: with empty places for what every answer from the cache gets.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        self.write_to(&mut headers);
        headers
    }

    /// Makes `headers` this head's.
    pub fn write_to(&self, headers: &mut HeaderMap) {
        headers.clone_from(&self.shape.template);
        let (ends, values) = self.parts();
        let mut start = 0;
        for (value, end) in headers.values_mut().zip(ends) {
            if end > start
                && let Ok(line) = HeaderValue::from_maybe_shared(self.block.slice(values + start..values + end))
            {
                *value = line;
            }
            start = end;
        }
    }

    /// The fields that were stored, a line each.
    pub fn lines(&self) -> impl Iterator<Item = (&HeaderName, &[u8])> {
        let (ends, values) = self.parts();
        let mut start = 0;
        let lines =
            self.shape.template.keys().flat_map(|name| self.shape.template.get_all(name).iter().map(move |_| name));
        lines
            .zip(ends)
            .map(move |(name, end)| {
                let value = self.block.get(values + start..values + end).unwrap_or_default();
                start = end;
                (name, value)
            })
            .filter(|(name, value)| !(value.is_empty() && CACHE_FIELDS.contains(name)))
    }

    /// The first value of a field.
    pub fn get(&self, name: &HeaderName) -> Option<&[u8]> {
        self.lines().find_map(|(found, value)| (found == name).then_some(value))
    }

    /// `Link` and `Location` values that name the upstream.
    pub fn links(&self) -> &[LinkPatch] {
        self.links.as_deref().unwrap_or_default()
    }

    /// How the upstream wrote the names.
    pub fn header_case(&self) -> Option<&HeaderCase> {
        self.shape.header_case.as_ref()
    }

    /// What it has alike with others.
    pub fn shape(&self) -> &Arc<HeadShape> {
        &self.shape
    }

    /// The same head with an equal shape, and its bytes and the body in one block if the body is small: one
    /// allocation for both. A large body is not copied.
    #[must_use]
    pub fn packed(mut self, shape: Arc<HeadShape>, body: Bytes) -> (PackedHead, Bytes) {
        debug_assert_eq!(self.shape, shape);
        self.shape = shape;
        if body.len() > SMALL {
            return (self, body);
        }
        let end = self.block.len();
        let both = Bytes::from([&self.block[..], &body[..]].concat());
        self.block = both.slice(..end);
        (self, both.slice(end..))
    }

    /// Bytes it takes in memory, beyond its own size and its shape's.
    pub fn weight(&self) -> usize {
        let links = self.links().iter().map(LinkPatch::weight).sum::<usize>();
        self.block.len() + links
    }

    /// Where the values end, and where the first begins.
    fn parts(&self) -> (impl Iterator<Item = usize>, usize) {
        let at = self.shape.template.len() * OFFSET_BYTES;
        let ends = self.block.get(..at).unwrap_or_default();
        let ends = ends.chunks_exact(OFFSET_BYTES).map(|end| {
            let end = end.try_into().map_or(0, u32::from_le_bytes);
            usize::try_from(end).unwrap_or(0)
        });
        (ends, at)
    }
}

/// Bytes for where a value ends.
const OFFSET_BYTES: usize = 4;

/// A body up to this size is copied when it is stored, to lie beside its head.
const SMALL: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(lines: &[(String, String)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            headers.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        headers
    }

    fn without_places(mut headers: HeaderMap) -> HeaderMap {
        for name in CACHE_FIELDS {
            if headers.get(&name).is_some_and(HeaderValue::is_empty) {
                headers.remove(name);
            }
        }
        headers
    }

    proptest! {
        #[test]
        fn what_is_unpacked_is_what_was_packed(
            lines in prop::collection::vec(("(link|etag|x-[a-d]|age|cache-status)", "[ -~]{1,20}|x-"), 0..12),
            size in prop::sample::select(vec![0, 10, SMALL, SMALL + 1]),
        ) {
            let headers = map(&lines);
            let head = PackedHead::new(StatusCode::OK, &headers, None, Vec::new());
            prop_assert_eq!(without_places(head.headers()), headers.clone());
            let same = Arc::new(HeadShape::of(&headers, None));
            let (packed, body) = head.clone().packed(same, Bytes::from(vec![7; size]));
            prop_assert_eq!(body, vec![7; size]);
            prop_assert_eq!(without_places(packed.headers()), headers.clone());
            prop_assert_eq!(packed.lines().count(), headers.len());
            for (name, value) in &headers {
                prop_assert!(packed.lines().any(|line| line == (name, value.as_bytes())));
                prop_assert_eq!(packed.get(name), headers.get(name).map(HeaderValue::as_bytes));
            }
        }
    }

    #[test]
    fn shapes_are_equal_by_names_and_their_order() {
        let shape = |lines: &[&str]| {
            let lines: Vec<_> = lines.iter().map(|&name| (name.to_owned(), name.to_owned())).collect();
            HeadShape::of(&map(&lines), None)
        };
        assert_eq!(shape(&["etag", "x-a"]), shape(&["etag", "x-a"]));
        assert_ne!(shape(&["etag", "x-a"]), shape(&["etag", "x-a", "x-a"]));
        assert_ne!(shape(&["etag", "x-a"]), shape(&["etag", "x-b"]));
    }
}
