//! Client limits and request validation, over raw connections.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::process::command;
use crate::support::redis::free_port;
use crate::support::sidecar::text;
use crate::support::{Client, Gate, Origin, Reply, Sidecar, get, send, soon};

async fn plain() -> Origin {
    Origin::start(|ask| Reply::new(200, ask.body.clone())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_requests_never_reach_the_upstream() {
    let origin = plain().await;
    let sidecar = Sidecar::before(&origin, "");
    let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(9000));
    let large = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(33_000));
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: a\r\n".repeat(101));
    let table: &[(&str, &[u16])] = &[
        ("GET / HTTP/1.1\r\n\r\n", &[400]),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", &[400]),
        ("GET / HTTP/1.1\r\nHost: a@b/../c\r\n\r\n", &[400]),
        ("GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n", &[400]),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n", &[400]),
        ("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", &[405]),
        ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", &[405]),
        ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
        ("POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\nContent-Length: 1\r\n\r\nx", &[417]),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nhello", &[400]),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", &[400]),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", &[400]),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\nx", &[413]),
        (&long, &[414]),
        (&large, &[431]),
        (&many, &[431]),
        ("nonsense\r\n\r\n", &[400]),
    ];
    for (request, expected) in table {
        let mut client = Client::connect(sidecar.address).await;
        client.write(request).await;
        let status = client.answer_to("GET").await.map(|a| a.status);
        let shown = &request[..request.len().min(60)];
        assert!(status.is_some_and(|s| expected.contains(&s)), "{shown:?}: {status:?}");
        assert!(client.closed().await, "{shown:?}: the connection is closed");
    }
    assert_eq!(origin.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_valid_requests_are_served() {
    let origin = plain().await;
    let sidecar = Sidecar::before(&origin, "");
    let table = [
        ("GET / HTTP/1.0\r\n\r\n", 200),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 204),
        ("OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 200),
        ("GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 421),
        ("M-SEARCH / HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    ];
    for (request, expected) in table {
        let mut client = Client::connect(sidecar.address).await;
        client.write(request).await;
        assert_eq!(client.answer_to("GET").await.map(|a| a.status), Some(expected), "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn absolute_form_must_name_the_upstream_or_the_listener() {
    let origin = plain().await;
    let sidecar = Sidecar::before(&origin, "");
    for (authority, expected) in
        [(origin.address.to_string(), 200), (sidecar.address.to_string(), 200), ("billing.internal".to_owned(), 421)]
    {
        let target = format!("http://{authority}/");
        assert_eq!(get(sidecar.address, &target, &[("Authorization", "x")]).await.status, expected, "{target}");
    }
    assert_eq!(origin.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_request_body_keeps_its_framing() {
    let origin = plain().await;
    let sidecar = Sidecar::before(&origin, "");
    let large = vec![b'x'; 2 << 20];
    for method in ["POST", "GET"] {
        assert!(send(sidecar.address, method, "/", &[], &large).await.body == large, "{method}");
    }
    let mut client = Client::connect(sidecar.address).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n200000\r\n";
    client.write([head.as_bytes(), &large, b"\r\n0\r\n\r\n"].concat()).await;
    assert!(client.answer_to("POST").await.expect("a response").body == large);
    let framing: Vec<_> = origin.asks().iter().map(|ask| ask.header("content-length").map(str::to_owned)).collect();
    assert_eq!(framing, [Some("2097152".into()), Some("2097152".into()), None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn expect_continue_gets_a_100_response() {
    let origin = plain().await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    client.write("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    assert!(client.read_some(12).await.starts_with(b"HTTP/1.1 100"));
    client.write("hello").await;
    assert_eq!(client.answer_to("POST").await.expect("a response").text(), "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_body_start_is_rejected_and_large_bodies_stream() {
    let origin = plain().await;
    let sidecar = Sidecar::with_tables(&origin, "", "[limits]\nrequest_body = \"4MiB\"\n");
    let mut client = Client::connect(sidecar.address).await;
    client.write("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf").await;
    drop(client);
    let large = vec![b'x'; 3 << 20];
    assert_eq!(send(sidecar.address, "POST", "/", &[], &large).await.body.len(), large.len());
    assert_eq!(origin.count(), 1, "only the complete request was forwarded");
    let mut client = Client::connect(sidecar.address).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.write([head.as_bytes(), b"500000\r\n", &vec![b'x'; 0x50_0000], b"\r\n0\r\n\r\n"].concat()).await;
    let status = client.answer_to("POST").await.map(|a| a.status);
    assert!(status.is_none_or(|s| s == 413), "{status:?}");
    let unfinished = origin.count();
    assert!(unfinished <= 1, "the upstream did not receive the request completely");
}

#[tokio::test(flavor = "multi_thread")]
async fn early_response_reaches_a_client_that_reads_after_its_upload() {
    let sidecar = Sidecar::from_text(&text(([127, 0, 0, 1], free_port()).into(), "", ""));
    let (length, body) = (20 << 20, vec![b'x'; 20 << 20]);
    let by_length = (format!("Content-Length: {length}\r\n\r\n"), "");
    let in_chunks = (format!("Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n"), "\r\n0\r\n\r\n");
    for (head, tail) in [by_length, in_chunks] {
        let request = [b"POST / HTTP/1.1\r\nHost: a\r\n", head.as_bytes(), &body, tail.as_bytes()].concat();
        let mut client = TcpStream::connect(sidecar.address).await.expect("a listener");
        soon("the request is read", client.write_all(&request)).await.expect("no connection reset");
        let mut answer = String::new();
        soon("end of stream", client.read_to_string(&mut answer)).await.expect("no connection reset");
        assert!(answer.starts_with("HTTP/1.1 502 ") && answer.ends_with('}'), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hit_drains_the_request_body() {
    let origin = Origin::start(|ask| Reply::fresh(60, format!("{} {}", ask.method, ask.body.len()))).await;
    let sidecar = Sidecar::before(&origin, "");
    get(sidecar.address, "/", &[]).await;
    let mut client = Client::connect(sidecar.address).await;
    client.ask("GET", "/", &[], b"a body with a GET").await;
    let with_body = client.answer_to("GET").await.expect("a response");
    assert_eq!(with_body.cache_status(), "sidecache; fwd=bypass; detail=request-body");
    client.ask("GET", "/", &[], b"").await;
    assert!(client.answer_to("GET").await.expect("a response").is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_request_head_is_cut_off() {
    let origin = plain().await;
    let sidecar = Sidecar::with_tables(&origin, "", "[limits]\nheader_time = \"200ms\"\n");
    let mut slow = Client::connect(sidecar.address).await;
    slow.write("GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ").await;
    assert_eq!(get(sidecar.address, "/", &[]).await.status, 200);
    assert!(slow.closed().await, "closed without a response");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_the_limit_are_queued() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::new(200, "x").after(&held)).await;
    let sidecar = Sidecar::with_tables(&origin, "", "[limits]\nconnections = 1\n");
    let mut first = Client::connect(sidecar.address).await;
    first.ask("GET", "/first", &[("Connection", "close")], b"").await;
    origin.wait_for_requests(1).await;
    let mut second = Client::connect(sidecar.address).await;
    second.ask("GET", "/second", &[], b"").await;
    // These round trips would give a sidecar without the limit the time to forward the second request.
    for _ in 0..20 {
        get(sidecar.admin, "/livez", &[]).await;
    }
    assert_eq!(origin.count(), 1, "the second connection is queued");
    gate.open();
    assert_eq!(first.answer_to("GET").await.expect("a response").status, 200);
    assert_eq!(second.answer_to("GET").await.expect("a response").status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_that_nobody_reads_stalls_no_request() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let origin = Origin::start(|_| Reply::new(500, "broken")).await;
    let folder = crate::support::redis::folder("unread-log");
    let file = folder.join("sidecache.toml");
    let text = format!(
        "[[upstream]]\nurl = \"http://{}\"\nlisten = \"127.0.0.1:0\"\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [log]\nrequests = \"all\"\n",
        origin.address
    );
    std::fs::write(&file, text).expect("writable");
    // Its stderr is a pipe that is not read: it holds 64 KiB.
    let mut child = command(&["--config", &file.display().to_string()]).spawn().expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut address = None;
    while address.is_none() {
        let line = soon("a startup line", lines.next_line()).await.expect("readable").expect("another line");
        let after = line.split("listening on ").nth(1).or_else(|| line.split("addr=").nth(1));
        address = after.filter(|_| !line.contains("admin")).and_then(|after| after.split(' ').next()?.parse().ok());
    }
    let address = address.expect("an address");
    for number in 0..2_000 {
        let answer = soon("a response", get(address, &format!("/{number}"), &[])).await;
        assert_eq!(answer.status, 500);
    }
    std::fs::remove_dir_all(folder).expect("the folder exists");
}
