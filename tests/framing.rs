//! HTTP/1.1 request framing: a public collection of raw requests, and rejections within a pipeline.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::Value;
use tokio::task::JoinSet;

use crate::support::{Client, Origin, Reply, Sidecar};

/// Statuses that count as a rejection where 400 is expected.
const REFUSALS: [u16; 9] = [400, 405, 413, 414, 417, 421, 431, 501, 505];

/// Returns true if the outcome meets the expectation. A `status` of `None` means that there was no response.
fn meets(expected: &str, status: Option<u16>, closed: bool) -> bool {
    match expected {
        "!101" => return status != Some(101),
        "2xx + close" => return status.is_some_and(|s| (200..300).contains(&s)) && closed,
        _ => {}
    }
    let words = expected.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter(|word| !word.is_empty()).any(|word| match word {
        "close" => status.is_none() && closed,
        // A 408 response before the close is accepted.
        "timeout" => closed && status.is_none_or(|s| s == 408),
        "2xx" => status.is_some_and(|s| (200..300).contains(&s)),
        "400" => status.is_some_and(|s| REFUSALS.contains(&s)),
        code => status.is_some() && status == code.parse().ok(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_requests_get_the_expected_response() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/http1-requests.json");
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("skipped: the collection of raw requests is missing ({})", path.display());
        return;
    };
    let requests: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let origin = Origin::start(|_| Reply::new(200, "ok")).await;
    let sidecar = Sidecar::with_tables(&origin, "", "[limits]\nheader_time = \"500ms\"\nkeep_alive = \"500ms\"");
    let scored: Vec<Value> = requests.into_iter().filter(|request| request["scored"] == true).collect();
    assert_eq!(scored.len(), 125);
    let mut tasks = JoinSet::new();
    for request in scored {
        tasks.spawn(fault(request, sidecar.address));
    }
    let wrong: Vec<String> = tasks.join_all().await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{} of 125:\n{}", wrong.len(), wrong.join("\n"));
}

/// Sends a request. Returns a description of the outcome if it is not the expected one.
async fn fault(request: Value, address: SocketAddr) -> Option<String> {
    let raw = request["raw"].as_str().expect("text").replace("localhost:8080", &address.to_string());
    let bytes: Vec<u8> = raw.chars().map(|c| u8::try_from(u32::from(c)).expect("Latin-1")).collect();
    let expected = request["expected"].as_str().expect("text");
    let mut client = Client::connect(address).await;
    client.write(bytes).await;
    let status = client.answer_to("GET").await.map(|answer| answer.status);
    let may_stay = status.is_some_and(|s| s < 300) && expected != "2xx + close";
    let closed = !may_stay && client.closed().await;
    (!meets(expected, status, closed)).then(|| format!("{}: {status:?}, expected {expected}", request["id"]))
}

#[tokio::test(flavor = "multi_thread")]
async fn rejection_keeps_pipeline_order_and_closes_the_connection() {
    let origin = Origin::start(|_| Reply::new(200, "fine")).await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    let (good, evil) = ("GET /good HTTP/1.1\r\nHost: a\r\n\r\n", "GET /evil HTTP/1.1\r\nHost: a\r\n\r\n");
    client.write(format!("{good}GET /bad HTTP/1.1\nHost: a\r\n\r\n{evil}")).await;
    assert_eq!(client.answer_to("GET").await.expect("a response").text(), "fine");
    let refusal = client.answer_to("GET").await.expect("a response");
    assert_eq!((refusal.status, refusal.header("connection")), (400, Some("close")));
    assert_eq!(refusal.json()["error"]["code"], "bad_line_end");
    assert!(client.closed().await);
    assert_eq!(origin.count(), 1, "only the valid request was forwarded");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_body_after_one_mebibyte_aborts_the_upstream_request() {
    let origin = Origin::start(|ask| Reply::new(200, format!("{}", ask.body.len()))).await;
    let sidecar = Sidecar::before(&origin, "");
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (chunks, served) in [(3, 0), (40, 0)] {
        let mut client = Client::connect(sidecar.address).await;
        client.write(format!("{head}{}5\nhello\r\n0\r\n\r\n", chunk.repeat(chunks))).await;
        let status = client.answer_to("POST").await.map(|answer| answer.status);
        assert!(status.is_none_or(|s| s == 400 || s == 502), "{chunks}: {status:?}");
        assert!(client.closed().await);
        assert_eq!(origin.count(), served, "no complete request was received");
    }
    let mut client = Client::connect(sidecar.address).await;
    client.write(format!("{head}{}0;a=\"b\"\r\nX-Trailer: y\r\n\r\n", chunk.repeat(40))).await;
    assert_eq!(client.answer_to("POST").await.expect("a response").text(), (40 * 0x10000).to_string());
}
