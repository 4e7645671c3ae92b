//! HTTP/2, TLS, protocol upgrades, and event streams.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use crate::support::redis::folder;
use crate::support::sidecar::text;
use crate::support::{Client, Gate, Origin, Reply, Sidecar, get, send, soon};

type Sender = SendRequest<Full<Bytes>>;

async fn http2_over(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Sender {
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.expect("a handshake");
    tokio::spawn(connection);
    sender
}

async fn http2_to(address: SocketAddr) -> Sender {
    http2_over(TcpStream::connect(address).await.expect("a listener")).await
}

async fn ask(sender: &mut Sender, method: Method, uri: &str, body: &str) -> (Response<()>, String) {
    let request = Request::builder().method(method).uri(uri).version(Version::HTTP_2);
    let request = request.body(Full::new(Bytes::from(body.to_owned()))).expect("a request");
    let response = soon("a response", sender.send_request(request)).await.expect("a response");
    let (parts, body) = response.into_parts();
    let body = soon("a body", body.collect()).await.expect("a body").to_bytes();
    (Response::from_parts(parts, ()), String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_with_prior_knowledge_shares_entries_with_http1() {
    let origin = Origin::start(|ask| Reply::fresh(60, format!("{} {}", ask.method, ask.body.len()))).await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = http2_to(sidecar.address).await;
    let uri = format!("http://{}/a", sidecar.address);
    for expected in ["sidecache; fwd=uri-miss; stored", "sidecache; hit"] {
        let (answer, body) = ask(&mut client, Method::GET, &uri, "").await;
        assert_eq!((answer.status(), answer.version(), &*body), (StatusCode::OK, Version::HTTP_2, "GET 0"));
        let status = answer.headers()["cache-status"].to_str().expect("text");
        assert!(status.starts_with(expected), "{status}");
    }
    assert!(get(sidecar.address, "/a", &[]).await.is_hit(), "HTTP/1.1 shares the entry");
    let (_, body) = ask(&mut client, Method::POST, &uri, "hello").await;
    assert_eq!(body, "POST 5");
    let trace = ask(&mut client, Method::TRACE, &uri, "").await.0;
    assert_eq!(trace.status(), StatusCode::METHOD_NOT_ALLOWED);
    let large = format!("{uri}?{}", "a".repeat(9000));
    assert_eq!(ask(&mut client, Method::GET, &large, "").await.0.status(), StatusCode::URI_TOO_LONG);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_supports_vary_conditional_and_range_requests() {
    let origin = Origin::start(|ask| {
        let language = ask.header("accept-language").unwrap_or("none").to_owned();
        Reply::fresh(60, format!("0123456789 {language}")).header("ETag", "\"1\"").header("Vary", "Accept-Language")
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = http2_to(sidecar.address).await;
    let mut ask = async |lines: &[(&str, &str)]| {
        let request = Request::builder().uri(format!("http://{}/a", sidecar.address)).version(Version::HTTP_2);
        let request = lines.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = request.body(Full::new(Bytes::new())).expect("a request");
        let response = soon("a response", client.send_request(request)).await.expect("a response");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = soon("a body", response.into_body().collect()).await.expect("a body").to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned(), headers)
    };
    let language = ("accept-language", "de, en");
    assert_eq!(ask(&[language]).await.1, "0123456789 de, en");
    assert_eq!(ask(&[("accept-language", "EN,de")]).await.1, "0123456789 de, en");
    assert_eq!(ask(&[]).await.1, "0123456789 none");
    assert_eq!(ask(&[language, ("if-none-match", "\"1\"")]).await.0, 304);
    let (status, part, headers) = ask(&[language, ("range", "bytes=2-3")]).await;
    assert_eq!((status, &*part, &headers["content-range"]), (206, "23", &"bytes 2-3/17".parse().expect("a value")));
    assert_eq!(origin.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_ping_flood_or_incomplete_preface_closes_the_connection() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::with_tables(&origin, "", "[limits]\nheader_time = \"200ms\"\n");
    let mut half = Client::connect(sidecar.address).await;
    half.write("PRI * HTTP/2.0\r\n\r\nSM").await;
    assert!(half.closed().await, "closed without a response");
    let mut block = Client::connect(sidecar.address).await;
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    // HEADERS without END_HEADERS: CONTINUATION never comes.
    let headers = [0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82];
    block.write([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..], &headers[..]].concat()).await;
    let mut rest = Vec::new();
    block.read_to_end(&mut rest).await;
    let mut flood = TcpStream::connect(sidecar.address).await.expect("a listener");
    let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    flood
        .write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..]].concat())
        .await
        .expect("an open connection");
    let sent = async {
        for _ in 0..100_000 {
            if flood.write_all(&ping).await.is_err() {
                break;
            }
        }
        // The socket buffers may accept all frames before the sidecar reads the first one.
        let _ = flood.read_to_end(&mut Vec::new()).await;
    };
    soon("the connection is closed", sent).await;
    assert_eq!(get(sidecar.address, "/", &[]).await.status, 200);
}

/// Creates a certificate for localhost. Returns the `listen_tls` table and a client configuration that trusts it.
pub(crate) fn certificate(folder: &Path) -> (String, ClientConfig) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).expect("written");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("written");
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let config = config.with_root_certificates(roots).with_no_client_auth();
    (format!("[upstream.listen_tls]\ncert = \"{}\"\nkey = \"{}\"\n", cert.display(), key.display()), config)
}

#[tokio::test(flavor = "multi_thread")]
async fn alpn_selects_http2_or_http1_on_a_tls_listener() {
    let origin = Origin::start(|ask| {
        let link = format!("<http://{}/next>; rel=\"next\"", ask.header("host").expect("a host"));
        Reply::fresh(60, "secret").header("Link", &link)
    })
    .await;
    let folder = folder("tls");
    let (lines, mut config) = certificate(&folder);
    let sidecar = Sidecar::before(&origin, &lines);
    let connect = async |config: ClientConfig| {
        let stream = TcpStream::connect(sidecar.address).await.expect("a listener");
        let name = ServerName::try_from("localhost").expect("a name");
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS")
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = connect(config.clone()).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (answer, body) = ask(&mut http2_over(stream).await, Method::GET, "https://localhost/a", "").await;
    assert_eq!((answer.status(), &*body), (StatusCode::OK, "secret"));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let mut stream = connect(config).await;
    stream.write_all(b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.expect("written");
    let mut answer = Vec::new();
    let _ = soon("a response", stream.read_to_end(&mut answer)).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.contains("sidecache; hit"), "{answer}");
    assert!(answer.contains("<https://a/next>"), "links point to the sidecar: {answer}");
    // A plaintext request on a TLS listener ends at once.
    let mut plain = Client::connect(sidecar.address).await;
    plain.write("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    plain.read_some(1).await;
    assert_eq!(origin.count(), 1);
    std::fs::remove_dir_all(&folder).expect("the folder exists");
}

/// Starts an origin that supports only HTTP/2. Returns its address and its connection count.
async fn http2_origin() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (address, connections) = (listener.local_addr().expect("bound"), Arc::new(AtomicUsize::new(0)));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                let line = format!("{:?} {}", request.version(), request.uri());
                let body = request.into_body().collect().await.expect("a body").to_bytes();
                let response = Response::builder().header("cache-control", "max-age=60");
                let body = Full::new(Bytes::from(format!("{line} {}", body.len())));
                Ok::<_, Infallible>(response.body(body).expect("a response"))
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
        }
    });
    (address, connections)
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_http2_setting_sends_all_requests_over_one_connection() {
    let (origin, connections) = http2_origin().await;
    let sidecar = Sidecar::from_text(&text(origin, "http2 = true", ""));
    let first = get(sidecar.address, "/a?b", &[]).await;
    assert_eq!(first.text(), format!("HTTP/2.0 http://{origin}/a?b 0"));
    assert!(get(sidecar.address, "/a?b", &[]).await.is_hit());
    for n in 0..10 {
        assert_eq!(get(sidecar.address, &format!("/{n}"), &[]).await.status, 200);
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1, "all requests used one connection");
}

/// Sends 101 and echoes all bytes if the request asks for a WebSocket upgrade, and 426 otherwise.
async fn echo_if_asked(mut stream: TcpStream) {
    let mut head = vec![0; 4096];
    let read = stream.read(&mut head).await.expect("a head");
    let is_upgrade = String::from_utf8_lossy(&head[..read]).to_lowercase().contains("upgrade: websocket");
    let answer = if is_upgrade {
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"
    } else {
        "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    };
    stream.write_all(answer.as_bytes()).await.expect("written");
    let (mut read, mut write) = stream.split();
    let _ = tokio::io::copy(&mut read, &mut write).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_upgrade_is_forwarded_only_where_a_rule_allows_it() {
    let origin = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = origin.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((stream, _)) = origin.accept().await {
            tokio::spawn(echo_if_asked(stream));
        }
    });
    let rule = "[[upstream.rule]]\npath = \"/ws\"\ncache = \"off\"\nupgrade = [\"websocket\"]\n";
    let sidecar = Sidecar::from_text(&text(address, rule, ""));
    let lines = [("Connection", "keep-alive, Upgrade"), ("Upgrade", "websocket")];
    assert_eq!(get(sidecar.address, "/other", &lines).await.status, 426, "no rule allows the upgrade");
    let mut client = Client::connect(sidecar.address).await;
    client.ask("GET", "/ws", &lines, b"").await;
    let switched = client.answer_head().await.expect("a response");
    assert_eq!((switched.status, switched.header("upgrade")), (101, Some("websocket")));
    assert_eq!(client.read_some(5).await, b"hello");
    // A client may send data of the new protocol before it receives the 101.
    let mut early = Client::connect(sidecar.address).await;
    let head = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    early.write(format!("{head}\nearly\0")).await;
    assert_eq!(early.answer_head().await.expect("a response").status, 101);
    assert_eq!(early.read_some(12).await, b"hello\nearly\0");
    // If the upgrade is refused, the following bytes are the next request.
    let mut plain = Client::connect(sidecar.address).await;
    let head = "GET /other HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    plain.write(format!("{head}{head}")).await;
    for _ in 0..2 {
        assert_eq!(plain.answer_to("GET").await.expect("a response").status, 426);
    }
    // Bypass mode forwards upgrades, too.
    let bypass =
        send(sidecar.admin, "POST", "/mode", &[("Content-Type", "application/json")], br#"{"mode":"bypass"}"#).await;
    assert_eq!(bypass.status, 200);
    assert_eq!(get(sidecar.address, "/other", &lines).await.status, 426);
    let mut bypassed = Client::connect(sidecar.address).await;
    bypassed.ask("GET", "/ws", &lines, b"").await;
    assert_eq!(bypassed.answer_head().await.expect("a response").status, 101);
    // Arbitrary bytes pass through unchanged.
    client.write(b"\x81\x05\r\0\n\xff!").await;
    assert_eq!(&client.read_some(12).await[5..], b"\x81\x05\r\0\n\xff!");
}

#[tokio::test(flavor = "multi_thread")]
async fn event_streams_are_not_buffered_or_shared_between_clients() {
    let gate = Gate::new();
    let held = gate.clone();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n\r\n";
    let origin =
        Origin::start(move |_| Reply::raw_halfway(format!("{head}data: one\n\n"), &held, "data: two\n\n")).await;
    let sidecar = Sidecar::before(&origin, "");
    let mut clients = Vec::new();
    for n in 1..=3 {
        let mut client = Client::connect(sidecar.address).await;
        client.ask("GET", "/events", &[], b"").await;
        let answer = client.answer_head().await.expect("a head");
        assert!(answer.cache_status().ends_with("detail=event-stream"), "{answer:?}");
        let first = String::from_utf8_lossy(client.read_some(14).await).into_owned();
        assert!(first.contains("data: one"), "{first}: the first event arrives before the second is sent");
        assert_eq!(origin.count(), n);
        clients.push(client);
    }
    gate.open();
    for mut client in clients {
        let all = "B\r\ndata: one\n\n\r\nB\r\ndata: two\n\n\r\n0\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(client.read_some(all.len()).await), all, "the body is complete");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http_1_0_upstream_is_answered_for_in_http_1_1() {
    let head = "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n";
    let origin = Origin::start(move |ask| match ask.target.as_str() {
        "/length" => Reply::raw(format!("{head}Content-Length: 2\r\n\r\nok")),
        _ => Reply::raw(format!("{head}\r\nok")),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    for target in ["/length", "/close", "/length", "/close"] {
        client.write(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        assert!(client.read_some(12).await.starts_with(b"HTTP/1.1 200"), "{target}");
        let answer = client.answer_to("GET").await.expect("a response on the same connection");
        assert_eq!(answer.text(), "ok", "{target}");
    }
    assert_eq!(origin.connections(), 4, "a connection on which the upstream answered as HTTP/1.0 is not reused");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_length_of_a_204_is_removed_and_that_of_an_empty_post_is_sent() {
    let origin = Origin::start(|_| Reply::raw("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n")).await;
    let sidecar = Sidecar::before(&origin, "");
    for method in ["GET", "POST"] {
        let answer = send(sidecar.address, method, "/", &[], b"").await;
        assert_eq!((answer.status, answer.header("content-length")), (204, None), "{method}");
    }
    let mut client = Client::connect(sidecar.address).await;
    client.write("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").await;
    assert_eq!(client.answer_to("POST").await.expect("a response").status, 204);
    let asks = origin.asks();
    assert_eq!(asks[0].header("content-length"), None);
    assert!(asks[1..].iter().all(|ask| ask.header("content-length") == Some("0")), "{asks:?}");
}
