//! HTTP/1.1 request framing: a strict scanner for RFC 9112 §2 to §7 that runs before the HTTP library.
//!
//! Ambiguous framing is refused here, so that no later stage or upstream can interpret it differently (request
//! smuggling, RFC 9112 §11.2).
//!
//! A [`RequestScanner`] receives the bytes as they arrive and returns how many of them may pass. A line is held back
//! until it is complete, and a head until all of its lines are. States:
//!
//! * **head**: the request line and the header fields; followed by one of the other states, or by a new head;
//! * **length**: the given number of bytes remains of a body with a Content-Length;
//! * **chunk size**, **chunk**, **chunk end**, **trailers**: a chunked body.

mod extensions;

use http::StatusCode;
use memchr::{memchr, memchr3_iter};

use crate::policy::rejection::Rejection;
use extensions::is_extension;

/// Maximum total size of the chunk extensions of a body, in bytes. More is an attack.
const MAX_EXTENSIONS: usize = 4 << 10;

/// Maximum number of hexadecimal digits of a chunk size. More would overflow.
const MAX_DIGITS: usize = 15;

/// Maximum number of empty lines before a request line, which RFC 9112 §2.2 allows.
const MAX_EMPTY_LINES: usize = 4;

/// Scans the requests of one connection.
#[derive(Debug)]
pub struct RequestScanner {
    state: FramingState,
    /// Offset of the end of the last complete line within the bytes that are held back.
    checked: usize,
    /// The content of the current head so far.
    head: RequestHead,
    /// Bytes of chunk extensions in the current body.
    extensions: usize,
    /// The last head requested an upgrade: the bytes that follow are held back until the response is known.
    awaits_upgrade: bool,
    max_head: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FramingState {
    Head,
    Length(u64),
    ChunkSize,
    /// Remaining bytes, including the line end after the data.
    Chunk(u64),
    Trailers,
}

#[derive(Debug, Default)]
struct RequestHead {
    begun: bool,
    empty_lines: usize,
    http_10: bool,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

/// The result of a scan.
#[derive(Debug, PartialEq, Eq)]
pub struct ScanResult {
    /// Number of bytes that may pass. The rest is incomplete, and must be scanned again together with the next bytes.
    pub passed: usize,
    /// The rejection of what follows those bytes.
    pub refused: Option<Rejection>,
}

type FramingResult<T> = Result<T, Rejection>;

impl RequestScanner {
    /// Creates the scanner of a new connection. Heads larger than `max_head` bytes are refused.
    pub fn new(max_head: usize) -> RequestScanner {
        RequestScanner {
            state: FramingState::Head,
            checked: 0,
            head: RequestHead::default(),
            extensions: 0,
            awaits_upgrade: false,
            max_head,
        }
    }

    /// Returns true if a body has begun and is not complete.
    pub fn in_body(&self) -> bool {
        self.state != FramingState::Head
    }

    /// Returns true if the last head requested an upgrade and the protocol of the following bytes is not yet known.
    pub fn awaits_upgrade(&self) -> bool {
        self.awaits_upgrade
    }

    /// Resumes scanning: the connection stays HTTP/1.1.
    pub fn resume(&mut self) {
        self.awaits_upgrade = false;
    }

    /// Scans bytes: all that have been received and have not passed.
    pub fn scan(&mut self, bytes: &[u8]) -> ScanResult {
        let mut passed = 0;
        loop {
            if self.awaits_upgrade {
                return ScanResult { passed, refused: None };
            }
            let rest = &bytes[passed..];
            let step = match self.state {
                FramingState::Head => self.read_head(rest),
                FramingState::Length(left) => Ok(self.read_length(left, rest)),
                FramingState::ChunkSize => self.read_chunk_size(rest),
                FramingState::Chunk(left) => self.read_chunk(left, rest),
                FramingState::Trailers => self.read_trailers(rest),
            };
            match step {
                Ok(Some(taken)) => passed += taken,
                Ok(None) => return ScanResult { passed, refused: None },
                Err(refused) => return ScanResult { passed, refused: Some(refused) },
            }
            if passed == bytes.len() {
                return ScanResult { passed, refused: None };
            }
        }
    }

    /// Reads a head. Returns its size in bytes, or `None` if it is incomplete.
    fn read_head(&mut self, bytes: &[u8]) -> FramingResult<Option<usize>> {
        let mut lines = LineReader::from(bytes, self.checked);
        while let Some((line, end)) = lines.next()? {
            self.checked = end;
            if !line.is_empty() {
                self.head.take_line(line)?;
            } else if self.head.begun {
                let head = std::mem::take(&mut self.head);
                self.checked = 0;
                self.extensions = 0;
                self.state = match head.length {
                    _ if head.chunked => FramingState::ChunkSize,
                    Some(length) if length > 0 => FramingState::Length(length),
                    _ => FramingState::Head,
                };
                self.awaits_upgrade = head.upgrade && self.state == FramingState::Head;
                return Ok(Some(end));
            } else {
                self.head.empty_lines += 1;
                if self.head.empty_lines > MAX_EMPTY_LINES {
                    return Err(bad_request("bad_request_line", "Empty lines come before the request line."));
                }
            }
        }
        if bytes.len() > self.max_head {
            return Err(if self.head.begun { HEADERS_TOO_LARGE } else { URL_TOO_LONG });
        }
        Ok(None)
    }

    fn read_length(&mut self, left: u64, bytes: &[u8]) -> Option<usize> {
        let taken = min_length(left, bytes.len());
        let left = left - taken as u64;
        self.state = if left == 0 { FramingState::Head } else { FramingState::Length(left) };
        (taken > 0).then_some(taken)
    }

    fn read_chunk_size(&mut self, bytes: &[u8]) -> FramingResult<Option<usize>> {
        let Some((line, end)) = LineReader::from(bytes, 0).next()? else {
            if bytes.len() > MAX_EXTENSIONS {
                return Err(EXTENSIONS_TOO_LARGE);
            }
            return Ok(None);
        };
        let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let (size, extension) = line.split_at(digits);
        if digits == 0 || digits > MAX_DIGITS || !is_extension(extension) {
            return Err(bad_request(
                "bad_chunk",
                "A chunk's size is not a hexadecimal number, or its extension is broken.",
            ));
        }
        self.extensions += extension.len();
        if self.extensions > MAX_EXTENSIONS {
            return Err(EXTENSIONS_TOO_LARGE);
        }
        let size = size.iter().fold(0, |sum, digit| sum << 4 | u64::from(hex(*digit)));
        self.state = if size == 0 { FramingState::Trailers } else { FramingState::Chunk(size + 2) };
        Ok(Some(end))
    }

    /// Reads the data of a chunk and the line end after it.
    fn read_chunk(&mut self, left: u64, bytes: &[u8]) -> FramingResult<Option<usize>> {
        let taken = min_length(left, bytes.len());
        // Offsets of the last two bytes of the chunk (CR, LF) within `bytes`.
        for (expected, from_end) in [(b'\r', 2), (b'\n', 1)] {
            let at = left.checked_sub(from_end).and_then(|at| usize::try_from(at).ok());
            if at.and_then(|at| bytes.get(at)).is_some_and(|byte| *byte != expected) {
                return Err(bad_request("bad_chunk", "A chunk is longer than its size."));
            }
        }
        let left = left - taken as u64;
        self.state = if left == 0 { FramingState::ChunkSize } else { FramingState::Chunk(left) };
        Ok((taken > 0).then_some(taken))
    }

    fn read_trailers(&mut self, bytes: &[u8]) -> FramingResult<Option<usize>> {
        let mut lines = LineReader::from(bytes, self.checked);
        while let Some((line, end)) = lines.next()? {
            self.checked = end;
            if line.is_empty() {
                self.checked = 0;
                self.state = FramingState::Head;
                return Ok(Some(end));
            }
            parse_field(line)?;
        }
        if bytes.len() > self.max_head {
            return Err(HEADERS_TOO_LARGE);
        }
        Ok(None)
    }
}

impl RequestHead {
    fn take_line(&mut self, line: &[u8]) -> FramingResult<()> {
        if !self.begun {
            self.begun = true;
            self.http_10 = line.ends_with(b"HTTP/1.0");
            return request_line(line);
        }
        let (name, value) = parse_field(line)?;
        match name.len() {
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                self.upgrade = true;
                Ok(())
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => self.take_length(value),
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => self.take_encoding(value),
            _ => Ok(()),
        }
    }

    fn take_length(&mut self, value: &[u8]) -> FramingResult<()> {
        let value = trim(value);
        let digits = !value.is_empty() && value.len() <= 18 && value.iter().all(u8::is_ascii_digit);
        let twice = self.length.is_some();
        if !digits || twice {
            return Err(bad_request("bad_framing", "Content-Length is not one number."));
        }
        self.length = Some(value.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')));
        self.one_framing()
    }

    fn take_encoding(&mut self, value: &[u8]) -> FramingResult<()> {
        if self.chunked || self.http_10 || !trim(value).eq_ignore_ascii_case(b"chunked") {
            return Err(bad_request("bad_framing", "Transfer-Encoding is not exactly chunked."));
        }
        self.chunked = true;
        self.one_framing()
    }

    fn one_framing(&self) -> FramingResult<()> {
        if self.chunked && self.length.is_some() {
            return Err(bad_request("bad_framing", "The request has both Content-Length and Transfer-Encoding."));
        }
        Ok(())
    }
}

/// Checks `method SP target SP HTTP/1.x`: RFC 9112 §3. The guard and the HTTP library check the parts in detail.
fn request_line(line: &[u8]) -> FramingResult<()> {
    let fault = bad_request("bad_request_line", "The request line is not method, target and HTTP/1.0 or HTTP/1.1.");
    let (Some(first), Some(last)) = (memchr(b' ', line), line.len().checked_sub(9)) else { return Err(fault) };
    let version = &line[last..];
    if first >= last || (version != b" HTTP/1.1" && version != b" HTTP/1.0") {
        return Err(fault);
    }
    let (method, target) = (&line[..first], &line[first + 1..last]);
    let visible = target.iter().all(|b| (0x21..=0x7e).contains(b) && *b != b'#');
    if target.is_empty() || !visible {
        return Err(bad_request("bad_target", "The request target has bytes that do not belong there."));
    }
    if is_token(method) { Ok(()) } else { Err(fault) }
}

/// Parses `name ":" value`: RFC 9112 §5. Refuses space before the colon, folded lines, and fields without a name.
fn parse_field(line: &[u8]) -> FramingResult<(&[u8], &[u8])> {
    let colon = memchr(b':', line).unwrap_or(0);
    let (name, value) = line.split_at(colon);
    if !is_token(name) {
        return Err(bad_request("bad_header", "A header line has no valid name, or is folded."));
    }
    Ok((name, value.get(1..).unwrap_or_default()))
}

fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|b| TOKEN[usize::from(*b)])
}

/// The `tchar` characters: RFC 9110 §5.6.2.
const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let members = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let mut i = 0;
    while i < members.len() {
        table[members[i] as usize] = true;
        i += 1;
    }
    table
};

fn trim(value: &[u8]) -> &[u8] {
    value.trim_ascii()
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

fn min_length(left: u64, have: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(have)
}

const fn bad_request(code: &'static str, message: &'static str) -> Rejection {
    Rejection { status: StatusCode::BAD_REQUEST, code, message }
}

const EXTENSIONS_TOO_LARGE: Rejection = bad_request("bad_chunk", "The chunk extensions are larger than 4 KiB.");

const HEADERS_TOO_LARGE: Rejection = Rejection {
    status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    code: "headers_too_large",
    message: "The header section is larger than limits.headers.",
};

const URL_TOO_LONG: Rejection = Rejection {
    status: StatusCode::URI_TOO_LONG,
    code: "url_too_long",
    message: "The request target is longer than limits.url.",
};

/// Reader of complete lines that end in CR LF. A bare CR or LF, or a NUL, is an error.
struct LineReader<'b> {
    bytes: &'b [u8],
    start: usize,
    hits: memchr::Memchr3<'b>,
    offset: usize,
}

impl<'b> LineReader<'b> {
    fn from(bytes: &'b [u8], start: usize) -> LineReader<'b> {
        LineReader { bytes, start, hits: memchr3_iter(b'\r', b'\n', 0, &bytes[start..]), offset: start }
    }

    /// Returns the next complete line without its line end, and the offset of the line after it.
    fn next(&mut self) -> FramingResult<Option<(&'b [u8], usize)>> {
        let alone = bad_request("bad_line_end", "A line does not end in CR LF, or holds a CR, LF or NUL.");
        let Some(at) = self.hits.next().map(|at| at + self.offset) else { return Ok(None) };
        match (self.bytes[at], self.bytes.get(at + 1)) {
            (b'\r', Some(b'\n')) => {
                // The LF is the next hit.
                self.hits.next();
                let line = &self.bytes[self.start..at];
                self.start = at + 2;
                Ok(Some((line, self.start)))
            }
            (b'\r', None) => Ok(None),
            _ => Err(alone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scanner() -> RequestScanner {
        RequestScanner::new(64 << 10)
    }

    fn code(text: &str) -> Option<&'static str> {
        scanner().scan(text.as_bytes()).refused.map(|r| r.code)
    }

    #[test]
    fn malformed_request_heads_are_rejected_with_their_error_code() {
        let table = [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", None),
            ("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", None),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", Some("bad_line_end")),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", Some("bad_line_end")),
            ("GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", Some("bad_line_end")),
            ("GET / HTTP/1.1\r\nX: a\0b\r\n\r\n", Some("bad_line_end")),
            ("GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n", Some("bad_header")),
            ("GET / HTTP/1.1\r\nX : a\r\n\r\n", Some("bad_header")),
            ("GET / HTTP/1.1\r\n: a\r\n\r\n", Some("bad_header")),
            ("GET / HTTP/1.1\r\nX\r\n\r\n", Some("bad_header")),
            ("GET /#a HTTP/1.1\r\n\r\n", Some("bad_target")),
            ("GET /a b HTTP/1.1\r\n\r\n", Some("bad_target")),
            ("GET /\u{e9} HTTP/1.1\r\n\r\n", Some("bad_target")),
            ("GET  / HTTP/1.1\r\n\r\n", Some("bad_target")),
            ("GET / HTTP/1.2\r\n\r\n", Some("bad_request_line")),
            ("GET / http/1.1\r\n\r\n", Some("bad_request_line")),
            ("GET /\r\n\r\n", Some("bad_request_line")),
            ("G,T / HTTP/1.1\r\n\r\n", Some("bad_request_line")),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\nx", Some("bad_framing")),
            ("POST / HTTP/1.1\r\nContent-Length: 1,1\r\n\r\nx", Some("bad_framing")),
            ("POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\nx", Some("bad_framing")),
            ("POST / HTTP/1.1\r\nContent-Length:\r\n\r\nx", Some("bad_framing")),
            ("POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", Some("bad_framing")),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", Some("bad_framing")),
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
                Some("bad_framing"),
            ),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n", Some("bad_framing")),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", Some("bad_framing")),
        ];
        for (text, expected) in table {
            assert_eq!(code(text), expected, "{text:?}");
        }
    }

    #[test]
    fn malformed_chunked_bodies_are_rejected_with_their_error_code() {
        let table = [
            ("5\r\nhello\r\n0\r\n\r\n", None),
            ("5;a=b; c = \"d;\\\"e\" ;f\r\nhello\r\n0\r\nX: y\r\n\r\n", None),
            ("5 \r\nhello\r\n0\r\n\r\n", Some("bad_chunk")),
            ("5;\r\nhello\r\n0\r\n\r\n", Some("bad_chunk")),
            ("5;a=\r\nhello\r\n0\r\n\r\n", Some("bad_chunk")),
            ("5;a=\"b\r\nhello\r\n0\r\n\r\n", Some("bad_chunk")),
            ("0x5\r\nhello\r\n0\r\n\r\n", Some("bad_chunk")),
            ("+5\r\nhello\r\n0\r\n\r\n", Some("bad_chunk")),
            ("\r\nhello\r\n0\r\n\r\n", Some("bad_chunk")),
            ("5\nhello\r\n0\r\n\r\n", Some("bad_line_end")),
            ("5\r\nhello!\r\n0\r\n\r\n", Some("bad_chunk")),
            ("5\r\nhello\n0\r\n\r\n", Some("bad_chunk")),
            ("10000000000000000\r\n", Some("bad_chunk")),
            ("0\r\nX y\r\n\r\n", Some("bad_header")),
        ];
        for (body, expected) in table {
            let text = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
            assert_eq!(code(&text), expected, "{body:?}");
        }
        let many = format!("1;{}\r\nx\r\n", "a".repeat(1500)).repeat(3);
        assert_eq!(code(&format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{many}")), Some("bad_chunk"));
    }

    #[test]
    fn overlong_request_line_is_414_and_overlong_header_section_is_431() {
        let mut scanner = RequestScanner::new(100);
        assert_eq!(scanner.scan(&[b'a'; 101]).refused.map(|r| r.status.as_u16()), Some(414));
        let mut scanner = RequestScanner::new(100);
        let head = format!("GET / HTTP/1.1\r\nX: {}", "a".repeat(100));
        assert_eq!(scanner.scan(head.as_bytes()).refused.map(|r| r.status.as_u16()), Some(431));
    }

    const PIECES: &[&str] = &[
        "Host: a\r\n",
        "X: y\r\n",
        "X:\r\n",
        " folded\r\n",
        "\ttab\r\n",
        "X : y\r\n",
        ": y\r\n",
        "X y\r\n",
        "X: a\rb\r\n",
        "X: y\n",
        "\r\n",
        "\n",
        "\0",
        "Content-Length: 5\r\n",
        "content-length: 5\r\n",
        "Content-Length: 05\r\n",
        "Content-Length: +5\r\n",
        "Transfer-Encoding: chunked\r\n",
        "transfer-encoding: CHUNKED\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Content-Length : 5\r\n",
        "Content-Length\r\n",
        "X: \u{e9}\r\n",
        "X: \t y \t\r\n",
    ];

    /// Scans `bytes` in the pieces between `cuts`. Returns the bytes that passed and the rejection.
    fn feed(bytes: &[u8], cuts: &[usize]) -> (Vec<u8>, Option<Rejection>) {
        let (mut scanner, mut held, mut passed) = (scanner(), Vec::new(), Vec::new());
        let mut last = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            held.extend_from_slice(&bytes[last..cut]);
            last = cut;
            let scanned = scanner.scan(&held);
            passed.extend(held.drain(..scanned.passed));
            if scanned.refused.is_some() {
                return (passed, scanned.refused);
            }
        }
        assert!(held.is_empty(), "everything was whole");
        (passed, None)
    }

    proptest! {
        #[test]
        fn scan_result_is_the_same_at_any_split(mut cuts in prop::collection::vec(0usize..300, 0..12), broken: bool) {
            let mut text = "POST /a HTTP/1.1\r\nContent-Length: 10\r\n\r\n0123456789\
                GET /b HTTP/1.1\r\nHost: a\r\n\r\n\
                POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nT: u\r\n\r\n\
                GET /d HTTP/1.1\r\nHost: a\r\n\r\n".to_owned();
            let whole = text.len();
            if broken {
                text.push_str("GET /e HTTP/1.1\nHost: a\r\n\r\n");
            }
            for cut in &mut cuts {
                *cut = (*cut).min(text.len());
            }
            cuts.sort_unstable();
            let (passed, refused) = feed(text.as_bytes(), &cuts);
            prop_assert_eq!(passed, &text.as_bytes()[..whole]);
            prop_assert_eq!(refused.is_some(), broken);
        }

        /// The HTTP library also parses what passes as one head, with the same length.
        #[test]
        fn accepted_request_heads_have_the_same_length_in_httparse(
            pieces in prop::collection::vec(prop::sample::select(PIECES), 0..10),
            method in "[A-Z ]{0,5}",
        ) {
            let head = format!("{method} /a HTTP/1.1\r\n{}\r\n", pieces.concat());
            let mut scanner = scanner();
            let scanned = scanner.scan(head.as_bytes());
            if scanned.refused.is_none() && scanned.passed > 0 {
                let mut fields = [httparse::EMPTY_HEADER; 64];
                let mut request = httparse::Request::new(&mut fields);
                let ends = head.find("\r\n\r\n").map(|at| at + 4);
                prop_assert_eq!(request.parse(head.as_bytes()).ok().map(httparse::Status::unwrap), ends, "{:?}", head);
                let framing = |name: &str| request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name)).count();
                prop_assert!(framing("content-length") + framing("transfer-encoding") <= 1, "{:?}", head);
            }
        }

        #[test]
        fn scan_of_arbitrary_bytes_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut scanner = scanner();
            let first = scanner.scan(&bytes);
            prop_assert!(first.passed <= bytes.len());
        }
    }
}
