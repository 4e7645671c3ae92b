//! An HTTP/1.1 client that preserves header case, order and repeated fields, and detects truncated bodies.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::soon;

/// A response.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Whether the body was received completely.
    pub(crate) whole: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str()).collect()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// Returns the last `Cache-Status` member without its `key` parameter.
    pub(crate) fn cache_status(&self) -> String {
        let last = self.all("cache-status").last().copied().unwrap_or_default();
        last.split("; key=").next().unwrap_or_default().to_owned()
    }

    pub(crate) fn is_hit(&self) -> bool {
        self.cache_status().starts_with("sidecache; hit; ttl=") && !self.cache_status().contains("detail")
    }
}

/// A client connection.
#[derive(Debug)]
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).await.expect("a listener");
        stream.set_nodelay(true).expect("a socket");
        Client { stream, buffer: Vec::new() }
    }

    /// Sends raw bytes.
    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        // Ignored: the server may send an error response and close before it has read everything.
        let _ = self.stream.write_all(bytes.as_ref()).await;
    }

    /// Sends a request with these header lines, and with a Host if they have none.
    pub(crate) async fn ask(&mut self, method: &str, target: &str, lines: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {target} HTTP/1.1\r\n");
        if !lines.iter().any(|(n, _)| n.eq_ignore_ascii_case("host")) {
            let host = self.stream.peer_addr().expect("connected");
            head += &format!("Host: {host}\r\n");
        }
        for (name, value) in lines {
            super::canary::learn(name, value);
            head += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        head += "\r\n";
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        self.write(bytes).await;
    }

    /// Reads until at least `least` bytes are buffered or the connection ends. Returns the buffer.
    pub(crate) async fn read_some(&mut self, least: usize) -> &[u8] {
        while self.buffer.len() < least {
            let read = soon("bytes from the server", self.stream.read_buf(&mut self.buffer)).await;
            if read.unwrap_or(0) == 0 {
                break;
            }
        }
        &self.buffer
    }

    /// Appends all remaining bytes to `rest`.
    pub(crate) async fn read_to_end(&mut self, rest: &mut Vec<u8>) {
        rest.append(&mut self.buffer);
        let _ = soon("end of stream", self.stream.read_to_end(rest)).await;
    }

    /// Waits until the server closes the connection. Returns true if it sent nothing more.
    pub(crate) async fn closed(&mut self) -> bool {
        let mut rest = Vec::new();
        let _ = soon("the server closes", self.stream.read_to_end(&mut rest)).await;
        rest.is_empty()
    }

    /// Reads the response to a request with this method. Returns `None` if the connection ended before a head.
    pub(crate) async fn answer_to(&mut self, method: &str) -> Option<Answer> {
        soon("a response", self.read_answer(method)).await
    }

    /// Reads the head of the next response. [`Client::read_some`] reads the bytes after it.
    pub(crate) async fn answer_head(&mut self) -> Option<Answer> {
        soon("a response head", self.read_head()).await
    }

    async fn read_head(&mut self) -> Option<Answer> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if self.stream.read_buf(&mut self.buffer).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end);
        let mut lines = head.lines();
        let status: u16 = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        if matches!(status, 100 | 102..=199) {
            return Box::pin(self.read_head()).await;
        }
        let header = |line: &str| line.split_once(':').map(|(n, v)| (n.to_owned(), v.trim().to_owned()));
        let headers: Vec<_> = lines.filter_map(header).collect();
        Some(Answer { status, headers, body: Vec::new(), whole: true })
    }

    async fn read_answer(&mut self, method: &str) -> Option<Answer> {
        let mut answer = self.read_head().await?;
        let status = answer.status;
        if method == "HEAD" || status == 204 || status == 304 {
            return Some(answer);
        }
        if let Some(length) = answer.header("content-length").and_then(|l| l.parse::<usize>().ok()) {
            while self.buffer.len() < length {
                if self.stream.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                    answer.whole = false;
                    break;
                }
            }
            let have = length.min(self.buffer.len());
            answer.body = self.buffer.drain(..have).collect();
        } else if answer.header("transfer-encoding").is_some() {
            match read_chunked(&mut self.stream, &mut self.buffer).await {
                Some(body) => answer.body = body,
                None => answer.whole = false,
            }
        } else {
            let _ = self.stream.read_to_end(&mut self.buffer).await;
            answer.body = std::mem::take(&mut self.buffer);
        }
        Some(answer)
    }

    /// Resets the connection.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(std::time::Duration::ZERO)).expect("a socket");
    }
}

/// Reads a chunked body. Returns `None` if it is truncated.
pub(crate) async fn read_chunked(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line_end = loop {
            if let Some(at) = buffer.windows(2).position(|w| w == b"\r\n") {
                break at;
            }
            if stream.read_buf(buffer).await.ok()? == 0 {
                return None;
            }
        };
        let line = String::from_utf8_lossy(&buffer[..line_end]).into_owned();
        let size = usize::from_str_radix(line.split(';').next()?.trim(), 16).ok()?;
        buffer.drain(..line_end + 2);
        while buffer.len() < size + 2 {
            if stream.read_buf(buffer).await.ok()? == 0 {
                return None;
            }
        }
        body.extend(buffer.drain(..size));
        buffer.drain(..2);
        if size == 0 {
            return Some(body);
        }
    }
}

/// Sends one request on a new connection and reads the response.
pub(crate) async fn send(
    address: SocketAddr,
    method: &str,
    target: &str,
    lines: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let mut client = Client::connect(address).await;
    client.ask(method, target, lines, body).await;
    client.answer_to(method).await.unwrap_or_else(|| panic!("{method} {target}: no response"))
}

/// Sends a GET on a new connection and reads the response.
pub(crate) async fn get(address: SocketAddr, target: &str, lines: &[(&str, &str)]) -> Answer {
    send(address, "GET", target, lines, b"").await
}
