//! Compact in-memory form of a stored response's head.
//!
//! The field names, which many heads share, are kept once; the values of a head are kept in one block of bytes. A
//! header map takes 104 bytes per field; this form takes the value and four bytes.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{AGE, HeaderMap, HeaderName, HeaderValue};
use http::{Extensions, StatusCode};

use crate::policy::http::hop_by_hop::{CACHE_STATUS, SERVER_TIMING};
use crate::policy::http::link_rewrite::LinkPatch;

/// The case in which an upstream writes field names.
#[derive(Debug, Clone)]
pub struct HeaderCase {
    /// The names that are not in Title-Case, one per line.
    pub names: Arc<[u8]>,
    /// The HTTP library's own record of the names, as response extensions, which can be cloned but not read.
    pub record: Arc<Extensions>,
}

/// The part that heads with the same fields share.
#[derive(Debug)]
pub struct HeadShape {
    /// The field lines with empty values. Includes [`CACHE_FIELDS`], so that a hit does not have to grow its copy.
    template: HeaderMap,
    /// The case of the names, if some are not in Title-Case.
    header_case: Option<HeaderCase>,
}

/// Fields that are added to every response from the cache.
const CACHE_FIELDS: [HeaderName; 3] = [AGE, CACHE_STATUS, SERVER_TIMING];

/// A packed response head: without hop-by-hop fields and `Age`, with `Date`.
#[derive(Debug, Clone)]
pub struct PackedHead {
    /// The status of the response.
    pub status: StatusCode,
    shape: Arc<HeadShape>,
    /// The end offset of each line's value, as four bytes in little-endian order, followed by the values.
    block: Bytes,
    /// The `Link` and `Location` values that contain the upstream's origin.
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
        // The shape is long-lived, and a clone has no spare capacity.
        HeadShape { template: template.clone(), header_case }
    }

    fn header_case_names(&self) -> &[u8] {
        self.header_case.as_ref().map_or(&[], |header_case| &header_case.names)
    }

    /// Returns the memory that the shape takes, in bytes. A slot of a header map has a hash, links, a name and a value.
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
    /// Creates a packed head.
    pub fn new(
        status: StatusCode,
        headers: &HeaderMap,
        header_case: Option<HeaderCase>,
        links: Vec<LinkPatch>,
    ) -> PackedHead {
        let shape = HeadShape::of(headers, header_case);
        // The values are in the order of the template, which may differ from that of `headers`.
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
            // The size of heads is limited to far less than 4 GiB.
            end += u32::try_from(line.len()).unwrap_or(u32::MAX);
            block.put_u32_le(end);
        }
        for line in lines {
            block.put_slice(line);
        }
        let links = (!links.is_empty()).then(|| links.into());
        PackedHead { status, shape: Arc::new(shape), block: block.freeze(), links }
    }

    /// Returns all fields, and empty values for the fields that are added to every response from the cache.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        self.write_to(&mut headers);
        headers
    }

    /// Replaces the contents of `headers` with the result of [`PackedHead::headers`].
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

    /// Returns the field lines that were stored.
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

    /// Returns the first value of a field.
    pub fn get(&self, name: &HeaderName) -> Option<&[u8]> {
        self.lines().find_map(|(found, value)| (found == name).then_some(value))
    }

    /// Returns the `Link` and `Location` values that contain the upstream's origin.
    pub fn links(&self) -> &[LinkPatch] {
        self.links.as_deref().unwrap_or_default()
    }

    /// Returns the case of the field names, if some are not in Title-Case.
    pub fn header_case(&self) -> Option<&HeaderCase> {
        self.shape.header_case.as_ref()
    }

    /// Returns the part that the head shares with others.
    pub fn shape(&self) -> &Arc<HeadShape> {
        &self.shape
    }

    /// Returns the same head with `shape`, which must be equal to its own. A small body is copied into one allocation
    /// with the head's bytes; a large body is returned unchanged.
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

    /// Returns the memory that the head takes in bytes, in addition to its own size and its shape's weight.
    pub fn weight(&self) -> usize {
        let links = self.links().iter().map(LinkPatch::weight).sum::<usize>();
        self.block.len() + links
    }

    /// Returns the end offsets of the values, relative to the first, and the position of the first value in the block.
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

/// Size of the end offset of a value, in bytes.
const OFFSET_BYTES: usize = 4;

/// Maximum size of a body that is copied into one allocation with its head, in bytes.
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
        fn packed_head_round_trips_headers_and_body(
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
    fn head_shapes_are_equal_only_for_the_same_header_names() {
        let shape = |lines: &[&str]| {
            let lines: Vec<_> = lines.iter().map(|&name| (name.to_owned(), name.to_owned())).collect();
            HeadShape::of(&map(&lines), None)
        };
        assert_eq!(shape(&["etag", "x-a"]), shape(&["etag", "x-a"]));
        assert_ne!(shape(&["etag", "x-a"]), shape(&["etag", "x-a", "x-a"]));
        assert_ne!(shape(&["etag", "x-a"]), shape(&["etag", "x-b"]));
    }
}
