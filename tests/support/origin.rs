//! A scripted origin server: a function from request to reply, and a record of all requests.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::until;

/// A received request.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The number of earlier requests, on all connections.
    pub(crate) number: usize,
}

impl Ask {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// A one-shot signal that releases all waiting tasks.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    pub(crate) fn new() -> Gate {
        Gate(Arc::new(watch::Sender::new(false)))
    }

    pub(crate) fn open(&self) {
        self.0.send_replace(true);
    }

    pub(crate) async fn wait(&self) {
        self.0.subscribe().wait_for(|open| *open).await.expect("the sender is alive");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Send(Vec<u8>),
    Wait(Gate),
    Close,
    Reset,
    Hang,
}

/// The origin's reaction to a request.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    before: Vec<Step>,
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    raw: Option<Vec<Step>>,
    /// The second half of the body is sent when this gate opens.
    middle: Option<Gate>,
    /// The number of body bytes sent before the connection is closed (false) or reset (true).
    cut: Option<(usize, bool)>,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        let (before, headers) = (Vec::new(), Vec::new());
        Reply { before, status, headers, body: body.into(), raw: None, middle: None, cut: None }
    }

    /// Returns a 200 response with this `max-age`.
    pub(crate) fn fresh(seconds: u32, body: impl Into<Vec<u8>>) -> Reply {
        Reply::new(200, body).header("Cache-Control", &format!("max-age={seconds}"))
    }

    /// Sends these bytes and closes the connection.
    pub(crate) fn raw(bytes: impl Into<Vec<u8>>) -> Reply {
        let mut reply = Reply::new(0, "");
        reply.raw = Some(vec![Step::Send(bytes.into()), Step::Close]);
        reply
    }

    /// Sends `first`, waits for the gate, sends `rest`, and closes the connection.
    pub(crate) fn raw_halfway(first: impl Into<Vec<u8>>, gate: &Gate, rest: impl Into<Vec<u8>>) -> Reply {
        let steps = vec![Step::Send(first.into()), Step::Wait(gate.clone()), Step::Send(rest.into()), Step::Close];
        Reply { raw: Some(steps), ..Reply::new(0, "") }
    }

    /// Closes the connection without a response.
    pub(crate) fn close() -> Reply {
        Reply { raw: Some(vec![Step::Close]), ..Reply::new(0, "") }
    }

    /// Resets the connection without a response.
    pub(crate) fn reset() -> Reply {
        Reply { raw: Some(vec![Step::Reset]), ..Reply::new(0, "") }
    }

    /// Sends no response and keeps the connection open.
    pub(crate) fn hang() -> Reply {
        Reply { raw: Some(vec![Step::Hang]), ..Reply::new(0, "") }
    }

    #[must_use]
    pub(crate) fn header(mut self, name: &str, value: &str) -> Reply {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Delays the response until the gate opens.
    #[must_use]
    pub(crate) fn after(mut self, gate: &Gate) -> Reply {
        self.before.push(Step::Wait(gate.clone()));
        self
    }

    /// Sends half of the body, waits for the gate, and sends the rest.
    #[must_use]
    pub(crate) fn halfway(mut self, gate: &Gate) -> Reply {
        self.middle = Some(gate.clone());
        self
    }

    /// Announces the whole body, sends `bytes` bytes of it, and closes or resets the connection.
    #[must_use]
    pub(crate) fn cut_after(mut self, bytes: usize, reset: bool) -> Reply {
        self.cut = Some((bytes, reset));
        self
    }

    fn steps(self, head_only: bool) -> Vec<Step> {
        let mut steps = self.before;
        if let Some(raw) = self.raw {
            steps.extend(raw);
            return steps;
        }
        let mut head = format!("HTTP/1.1 {} Status\r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let framed = self.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("content-length"));
        if !framed && self.status != 304 && self.status != 204 {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        head += "\r\n";
        let mut bytes = head.into_bytes();
        if head_only {
            steps.push(Step::Send(bytes));
        } else if let Some((size, reset)) = self.cut {
            bytes.extend_from_slice(&self.body[..size]);
            steps.extend([Step::Send(bytes), if reset { Step::Reset } else { Step::Close }]);
        } else if let Some(gate) = self.middle {
            let half = self.body.len() / 2;
            bytes.extend_from_slice(&self.body[..half]);
            steps.extend([Step::Send(bytes), Step::Wait(gate), Step::Send(self.body[half..].to_vec())]);
        } else {
            bytes.extend_from_slice(&self.body);
            steps.push(Step::Send(bytes));
        }
        steps
    }
}

type Script = dyn Fn(&Ask) -> Reply + Send + Sync;

/// A running origin.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) address: SocketAddr,
    asks: Arc<Mutex<Vec<Ask>>>,
    connections: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl Origin {
    pub(crate) async fn start(script: impl Fn(&Ask) -> Reply + Send + Sync + 'static) -> Origin {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let asks = Arc::new(Mutex::new(Vec::new()));
        let (script, record): (Arc<Script>, _) = (Arc::new(script), asks.clone());
        let connections = Arc::new(AtomicUsize::new(0));
        let opened = connections.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                opened.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(connection(stream, script.clone(), record.clone()));
            }
        });
        Origin { address, asks, connections, serving }
    }

    pub(crate) fn asks(&self) -> Vec<Ask> {
        self.asks.lock().expect("unpoisoned").clone()
    }

    /// Returns the number of accepted connections.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn count(&self) -> usize {
        self.asks.lock().expect("unpoisoned").len()
    }

    /// Waits until `count` requests have been received.
    pub(crate) async fn wait_for_requests(&self, count: usize) {
        until(&format!("{count} requests at the origin"), || (self.count() >= count).then_some(())).await;
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn connection(mut stream: TcpStream, script: Arc<Script>, asks: Arc<Mutex<Vec<Ask>>>) {
    let mut buffer = Vec::new();
    while let Some(mut ask) = read_request(&mut stream, &mut buffer).await {
        {
            let mut asks = asks.lock().expect("unpoisoned");
            ask.number = asks.len();
            asks.push(ask.clone());
        }
        for step in script(&ask).steps(ask.method == "HEAD") {
            match step {
                Step::Send(bytes) => {
                    if stream.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                Step::Wait(gate) => gate.wait().await,
                Step::Hang => std::future::pending().await,
                Step::Close => return,
                Step::Reset => {
                    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).expect("a socket");
                    return;
                }
            }
        }
    }
}

async fn read_request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Ask> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let header = |line: &str| line.split_once(": ").map(|(n, v)| (n.to_owned(), v.to_owned()));
    let headers: Vec<_> = lines.filter_map(header).collect();
    let of = |name: &str| headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.clone());
    buffer.drain(..end);
    let mut body = Vec::new();
    if let Some(length) = of("content-length").and_then(|l| l.parse::<usize>().ok()) {
        while buffer.len() < length {
            if stream.read_buf(buffer).await.ok()? == 0 {
                return None;
            }
        }
        body = buffer.drain(..length).collect();
    } else if of("transfer-encoding").is_some() {
        body = super::client::read_chunked(stream, buffer).await?;
    }
    Some(Ask { method, target, headers, body, number: 0 })
}
