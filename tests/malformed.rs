//! Malformed upstream responses: 502 or an aborted body, never stored, and the connection is not reused.

use tokio::task::JoinSet;

use crate::support::{Client, Origin, Reply, Sidecar, get};

const OK: &str = "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn invalid_response_heads_yield_502_and_are_not_stored_or_retried() {
    let heads = [
        "nonsense\r\n\r\n".to_owned(),
        "HTTP/1.1 abc OK\r\n\r\n".to_owned(),
        format!("{OK}Content-Length: 4\r\nContent-Length: 4\r\n\r\nbody"),
        format!("{OK}Content-Length: 4, 4\r\n\r\nbody"),
        format!("{OK}Content-Length: 4\r\nContent-Length: 5\r\n\r\nbody!"),
        format!("{OK}Content-Length: -4\r\n\r\nbody"),
        format!("{OK}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"),
        format!("{OK}Transfer-Encoding: gzip, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"),
        format!("{OK}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"),
        format!("{OK}X Y: z\r\n\r\nbody"),
        format!("{OK}X: a\0b\r\n\r\nbody"),
        format!("{OK}X: {}\r\n\r\nbody", "a".repeat(200_000)),
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n".to_owned(),
        "HTTP/1.0 200 OK\nTransfer-Encoding: chunked\n\n4\r\nbody\r\n0\r\n\r\n".to_owned(),
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n".to_owned(),
    ];
    let count = heads.len();
    let origin = Origin::start(move |ask| {
        let index: usize = ask.target[1..].parse().expect("a number");
        Reply::raw(heads[index].clone())
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for index in 0..count {
        for _ in 0..2 {
            let answer = sidecar.get(&format!("/{index}")).await;
            assert_eq!(answer.status, 502, "{index}: {answer:?}");
            let code = answer.json()["error"]["code"].as_str().expect("a code").to_owned();
            assert!(code.starts_with("upstream_"), "{index} {code}");
        }
    }
    assert_eq!(origin.count(), count * 2, "nothing was stored, nothing was retried");
}

#[tokio::test(flavor = "multi_thread")]
async fn incomplete_or_malformed_bodies_are_aborted_and_not_stored() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/short" => Reply::fresh(60, vec![b'x'; 50_000]).cut_after(30_000, false),
        "/reset" => Reply::fresh(60, vec![b'x'; 50_000]).cut_after(30_000, true),
        "/large" => Reply::fresh(60, vec![b'x'; 500_000]).cut_after(300_000, false),
        "/chunk" => Reply::raw(format!("{OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhel")),
        "/nochunk" => Reply::raw(format!("{OK}Transfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n0\r\n\r\n")),
        _ => Reply::new(404, ""),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for target in ["/short", "/reset", "/large", "/chunk", "/nochunk"] {
        for _ in 0..2 {
            let mut client = Client::connect(sidecar.address).await;
            client.ask("GET", target, &[], b"").await;
            let answer = client.answer_to("GET").await;
            if target == "/large" {
                assert!(answer.is_none_or(|a| !a.whole), "{target}: the truncated body seems complete");
            } else {
                assert_eq!(answer.expect("a response").status, 502, "{target}: nothing of it was sent");
            }
        }
    }
    assert_eq!(sidecar.shared.memory.usage().entries, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn excess_bytes_prevent_reuse_and_a_second_response_prevents_storage() {
    let smuggled = format!("body{OK}Content-Length: 3\r\n\r\nbad");
    let origin = Origin::start(move |ask| match ask.target.as_str() {
        "/long" => Reply::fresh(60, "body and more").header("Content-Length", "4"),
        "/two" => Reply::fresh(60, smuggled.clone()).header("Content-Length", "4"),
        _ => Reply::fresh(60, "clean"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    client.ask("GET", "/two", &[], b"").await;
    if let Some(answer) = client.answer_to("GET").await {
        assert!(answer.status == 502 || answer.text() == "body", "no byte beyond Content-Length is delivered");
    }
    assert_eq!(sidecar.shared.memory.usage().entries, 0);
    let connections = origin.connections();
    assert_eq!(sidecar.get("/long").await.text(), "body", "RFC 9112 section 6.3: Content-Length ends the body");
    assert_eq!(sidecar.get("/clean").await.text(), "clean");
    assert_eq!(origin.connections(), connections + 2, "each request used a new connection");
    assert_eq!(sidecar.shared.memory.usage().entries, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_is_not_reused_after_an_invalid_response_head() {
    let origin = Origin::start(|ask| {
        let reply = Reply::new(200, "4\r\nbody\r\n0\r\n\r\n").header("Content-Length", "14");
        if ask.target == "/flawed" { reply.header("Transfer-Encoding", "chunked") } else { reply }
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for requests in 1..10 {
        let flawed = sidecar.get("/flawed").await;
        assert_eq!((flawed.status, &flawed.json()["error"]["code"]), (502, &"upstream_malformed".into()));
        assert_eq!((origin.count(), origin.connections()), (requests, requests), "one request, on a new connection");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_with_bytes_after_the_body_receives_no_further_request() {
    const CLIENTS: usize = 32;
    const EACH: usize = 40;
    let origin = Origin::start(|_| Reply::new(200, "body and more").header("Content-Length", "4")).await;
    let sidecar = Sidecar::before(&origin, "[upstream.pool]\nconnections = 4\n");
    let mut clients = JoinSet::new();
    for id in 0..CLIENTS {
        let address = sidecar.address;
        clients.spawn(async move {
            for n in 0..EACH {
                assert_eq!(get(address, &format!("/{id}/{n}"), &[]).await.text(), "body");
            }
        });
    }
    clients.join_all().await;
    assert_eq!(origin.count(), CLIENTS * EACH, "no request was retried");
}

#[tokio::test(flavor = "multi_thread")]
async fn thousand_informational_responses_do_not_block_the_final_response() {
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n".repeat(1000);
    let origin = Origin::start(move |_| Reply::raw(format!("{interim}{OK}Content-Length: 4\r\n\r\nbody"))).await;
    let sidecar = Sidecar::before(&origin, "");
    assert_eq!(sidecar.get("/").await.text(), "body");
}

#[tokio::test(flavor = "multi_thread")]
async fn get_is_retried_when_a_reused_connection_closes_and_post_is_not() {
    // The origin responds to one request per connection, and closes it on the second.
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/first" => Reply::new(200, "first"),
        _ if ask.number % 2 == 1 => Reply::close(),
        _ => Reply::new(200, "second"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    assert_eq!(sidecar.get("/first").await.text(), "first");
    assert_eq!(sidecar.get("/again").await.text(), "second", "the GET is retried");
    assert_eq!(origin.count(), 3);
    let posted = sidecar.send("POST", "/write", "x").await;
    assert_eq!(posted.status, 502, "the POST is not retried");
    assert_eq!(origin.count(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn pooled_connection_is_replaced_after_its_maximum_age() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/").await;
    sidecar.get("/").await;
    assert_eq!(origin.connections(), 1);
    sidecar.turn(301);
    sidecar.get("/").await;
    sidecar.get("/").await;
    assert_eq!(origin.connections(), 2);
}
