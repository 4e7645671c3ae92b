//! HTTP/2 to the upstream: Host, GOAWAY, refused streams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::support::sidecar::text;
use crate::support::{Sidecar, send};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// How an origin leaves requests unprocessed.
#[derive(Debug, Clone, Copy)]
enum Refusal {
    /// GOAWAY after this many streams of a connection; later streams are ignored.
    GoAway(usize),
    /// Every other stream is refused.
    RefusedStream,
}

/// An origin that speaks HTTP/2 frame by frame. It answers 200 with the body `ok`.
struct FrameOrigin {
    address: SocketAddr,
    /// Requests with content that were processed.
    writes: Arc<AtomicUsize>,
    /// Requests with a Host field.
    hosts: Arc<AtomicUsize>,
}

impl FrameOrigin {
    async fn start(refusal: Refusal) -> FrameOrigin {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let origin = FrameOrigin { address, writes: Arc::default(), hosts: Arc::default() };
        let (writes, hosts) = (origin.writes.clone(), origin.hosts.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (writes, hosts) = (writes.clone(), hosts.clone());
                tokio::spawn(async move {
                    // An error is the end of the connection.
                    let _ = connection(stream, refusal, &writes, &hosts).await;
                });
            }
        });
        origin
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a small frame").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

async fn connection(
    mut stream: TcpStream,
    refusal: Refusal,
    writes: &AtomicUsize,
    hosts: &AtomicUsize,
) -> std::io::Result<()> {
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await?;
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    let mut going_away = false;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await?;
        let (kind, flags, id) = (head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]));
        match kind {
            SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await?,
            PING if flags & ACK == 0 => stream.write_all(&frame(PING, ACK, 0, &payload)).await?,
            HEADERS => {
                // The field name is the static entry 38, or a literal.
                hosts.fetch_add(usize::from(payload.windows(4).any(|name| name == b"host")), Ordering::SeqCst);
            }
            _ => {}
        }
        if !matches!(kind, HEADERS | DATA) || flags & END_STREAM == 0 {
            continue;
        }
        let number = id.div_ceil(2) as usize;
        match refusal {
            Refusal::GoAway(most) if number > most => continue,
            Refusal::RefusedStream if number.is_multiple_of(2) => {
                stream.write_all(&frame(RST_STREAM, 0, id, &7_u32.to_be_bytes())).await?;
                continue;
            }
            Refusal::GoAway(_) | Refusal::RefusedStream => {}
        }
        writes.fetch_add(usize::from(kind == DATA), Ordering::SeqCst);
        // `:status: 200` is the static entry 8 (RFC 7541, appendix A).
        let mut answer = frame(HEADERS, END_HEADERS, id, &[0x88]);
        answer.extend(frame(DATA, END_STREAM, id, b"ok"));
        if let Refusal::GoAway(most) = refusal
            && !going_away
        {
            // All streams up to the last one are processed, in whatever order they end.
            going_away = true;
            let id = u32::try_from(most * 2 - 1).expect("a stream");
            answer.extend(frame(GOAWAY, 0, 0, &[&id.to_be_bytes()[..], &[0; 4]].concat()));
        }
        stream.write_all(&answer).await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_an_upstream_has_not_processed_are_sent_again_over_another_connection() {
    for refusal in [Refusal::GoAway(10), Refusal::RefusedStream] {
        let origin = FrameOrigin::start(refusal).await;
        let sidecar = Sidecar::from_text(&text(origin.address, "http2 = true", ""));
        let mut clients = JoinSet::new();
        for client in 0..20 {
            let address = sidecar.address;
            clients.spawn(async move {
                for number in 0..10 {
                    let (method, body): (_, &[u8]) = if number % 2 == 0 { ("GET", b"") } else { ("POST", b"data") };
                    let answer = send(address, method, &format!("/{client}/{number}"), &[], body).await;
                    assert_eq!((answer.status, answer.text().as_str()), (200, "ok"), "{refusal:?} {method}");
                }
            });
        }
        clients.join_all().await;
        assert_eq!(origin.writes.load(Ordering::SeqCst), 100, "{refusal:?}: each write once");
        assert_eq!(origin.hosts.load(Ordering::SeqCst), 0, "the authority says the same");
    }
}
