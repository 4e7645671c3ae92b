//! Case of upstream header field names, kept as response extensions of the HTTP library.
//!
//! The library accepts no other form. Its extensions can be cloned but not constructed, so the library is made to parse
//! a response head with just those names. Names in Title-Case need no extension, because that is the default.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::response_monitor::head_fields;
use crate::policy::packed_head::HeaderCase;

/// Maximum number of cached sets of names. An upstream has few; further ones are written in Title-Case.
const MAX_KNOWN: usize = 256;

/// The header cases seen so far, by the names that are not in Title-Case.
#[derive(Debug, Default)]
pub(super) struct HeaderCases(Mutex<HashMap<Box<[u8]>, HeaderCase>>);

impl HeaderCases {
    /// Returns the header case of a raw head, or `None` if all names are in Title-Case.
    pub(super) async fn for_head(&self, head: &[u8]) -> Option<HeaderCase> {
        self.for_names(&non_title_case_names(head)).await
    }

    /// Returns the header case of these names (one per line), or `None` if there are no names.
    pub(super) async fn for_names(&self, unusual: &[u8]) -> Option<HeaderCase> {
        if unusual.is_empty() {
            return None;
        }
        let known = |header_cases: &Self| {
            let known = header_cases.0.lock().unwrap_or_else(PoisonError::into_inner);
            (known.get(unusual).cloned(), known.len())
        };
        match known(self) {
            (Some(header_case), _) => Some(header_case),
            (None, MAX_KNOWN..) => None,
            (None, _) => {
                let header_case = read_back(unusual).await?;
                let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                known.insert(unusual.into(), header_case.clone());
                Some(header_case)
            }
        }
    }
}

/// Returns the names that are not in Title-Case, one per line.
fn non_title_case_names(head: &[u8]) -> Vec<u8> {
    let mut names = Vec::new();
    for (name, _) in head_fields(head) {
        if !is_title_case(name) {
            names.extend_from_slice(name);
            names.push(b'\n');
        }
    }
    names
}

fn is_title_case(name: &[u8]) -> bool {
    let mut starts = true;
    name.iter().all(|byte| {
        let usual = if starts { !byte.is_ascii_lowercase() } else { !byte.is_ascii_uppercase() };
        starts = *byte == b'-';
        usual
    })
}

/// Makes an HTTP client read a response head with these names over a pipe, and returns the case that it recorded.
async fn read_back(names: &[u8]) -> Option<HeaderCase> {
    let (ours, theirs) = tokio::io::duplex(names.len() * 2 + 1024);
    let mut client = http1::Builder::new();
    client.preserve_header_case(true);
    let (mut sender, connection) = client.handshake(TokioIo::new(theirs)).await.ok()?;
    let drive = tokio::spawn(connection);
    let answer = tokio::spawn(async move { sender.send_request(http::Request::new(Empty::<&[u8]>::new())).await });
    let (mut read, mut write) = tokio::io::split(ours);
    let mut request = [0; 256];
    let _head = read.read(&mut request).await.ok()?;
    // A 204 response has no body, whatever its header fields are.
    let mut head = b"HTTP/1.1 204 No Content\r\n".to_vec();
    for name in names.split(|b| *b == b'\n').filter(|name| !name.is_empty()) {
        head.extend_from_slice(name);
        head.extend_from_slice(b": 0\r\n");
    }
    head.extend_from_slice(b"\r\n");
    write.write_all(&head).await.ok()?;
    let response = answer.await.ok()?.ok()?;
    drive.abort();
    Some(HeaderCase { names: names.into(), record: Arc::new(response.into_parts().0.extensions) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_header_names_not_in_title_case_are_recorded() {
        let head = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nETag: y\r\nx-request-id: z\r\nX-Shop-Limit: 1/40\r\n\r\n";
        assert_eq!(non_title_case_names(head), b"ETag\nx-request-id\n");
    }

    #[tokio::test]
    async fn repeated_response_head_reuses_its_header_case_record() {
        let header_cases = HeaderCases::default();
        let head = b"HTTP/1.1 200 OK\r\nETag: y\r\ncontent-length: 5\r\n\r\n";
        let first = header_cases.for_head(head).await.expect("a record");
        let second = header_cases.for_head(head).await.expect("a record");
        assert!(Arc::ptr_eq(&first.record, &second.record));
        assert!(header_cases.for_head(b"HTTP/1.1 200 OK\r\nContent-Type: y\r\n\r\n").await.is_none());
    }
}
