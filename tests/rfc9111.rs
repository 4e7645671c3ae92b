//! Requirements of RFC 9110 and RFC 9111 on shared caches that the public conformance suite does not cover.

use crate::support::{Client, Gate, Origin, Reply, Sidecar, until};

const DIGITS: &str = "0123456789";

#[tokio::test(flavor = "multi_thread")]
async fn range_requests_are_answered_from_a_stored_complete_response() {
    let origin = Origin::start(|_| {
        Reply::fresh(60, DIGITS)
            .header("ETag", "\"a\"")
            .header("Content-Type", "text/plain")
            .header("Last-Modified", "Fri, 20 Nov 2026 12:00:00 GMT")
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/x").await;
    let table: &[(&[(&str, &str)], u16, &str, Option<&str>)] = &[
        (&[("Range", "bytes=2-4")], 206, "234", Some("bytes 2-4/10")),
        (&[("Range", "bytes=-1")], 206, "9", Some("bytes 9-9/10")),
        (&[("Range", "bytes=20-")], 416, "", Some("bytes */10")),
        (&[("Range", "lines=1-2")], 200, DIGITS, None),
        (&[("Range", "bytes=2-4"), ("If-Range", "\"a\"")], 206, "234", Some("bytes 2-4/10")),
        (&[("Range", "bytes=2-4"), ("If-Range", "\"b\"")], 200, DIGITS, None),
        (&[("Range", "bytes=2-4"), ("If-None-Match", "\"a\"")], 304, "", None),
        (&[("Range", "bytes=2-4"), ("If-None-Match", "\"b\"")], 206, "234", Some("bytes 2-4/10")),
    ];
    for (lines, status, body, range) in table {
        let answer = sidecar.get_with("/x", lines).await;
        assert_eq!((answer.status, answer.text().as_str()), (*status, *body), "{lines:?}");
        assert_eq!(answer.header("content-range"), *range, "{lines:?}");
        assert!(answer.is_hit() && answer.header("age").is_some(), "{lines:?}: {answer:?}");
    }
    let several = sidecar.get_with("/x", &[("Range", "bytes=0-1, 8-")]).await;
    let kind = several.header("content-type").expect("a header").to_owned();
    let boundary = kind.strip_prefix("multipart/byteranges; boundary=").expect("several parts");
    let part = |range: &str, text: &str| {
        format!("--{boundary}\r\nContent-Type: text/plain\r\nContent-Range: bytes {range}/10\r\n\r\n{text}\r\n")
    };
    assert_eq!(several.text(), part("0-1", "01") + &part("8-9", "89") + &format!("--{boundary}--\r\n"));
    let head = crate::support::send(sidecar.address, "HEAD", "/x", &[("Range", "bytes=0-1")], b"").await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("10")), "Range applies only to GET");
    assert_eq!(origin.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn full_request_completes_a_stored_partial_response_with_if_range() {
    let origin = Origin::start(|ask| {
        match ask.header("range") {
            Some("bytes=0-3") => {
                Reply::new(206, "0123").header("Content-Range", "bytes 0-3/10").header("Cache-Control", "max-age=60")
            }
            Some("bytes=4-") => Reply::new(206, "456789")
                .header("Content-Range", "bytes 4-9/10")
                .header("Cache-Control", "max-age=60"),
            _ => Reply::fresh(60, "another"),
        }
        .header(
            "ETag",
            if ask.target == "/changed" && ask.header("range") != Some("bytes=0-3") { "\"b\"" } else { "\"a\"" },
        )
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for (target, whole, requests) in [("/same", DIGITS, 2), ("/changed", "another", 3)] {
        let before = origin.count();
        let part = sidecar.get_with(target, &[("Range", "bytes=0-3")]).await;
        assert_eq!((part.status, part.text().as_str()), (206, "0123"));
        let answer = sidecar.get(target).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, whole), "{target}");
        assert_eq!(answer.header("content-range"), None);
        assert_eq!(origin.count() - before, requests, "{target}");
        let rest = &origin.asks()[before + 1];
        assert_eq!((rest.header("range"), rest.header("if-range")), (Some("bytes=4-"), Some("\"a\"")));
        assert!(sidecar.get(target).await.is_hit());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn purged_partial_response_is_not_completed() {
    let origin = Origin::start(|ask| match ask.header("range") {
        Some(_) => Reply::new(206, "0123")
            .header("Content-Range", "bytes 0-3/10")
            .header("Cache-Control", "max-age=60")
            .header("ETag", "\"a\""),
        None => Reply::fresh(60, DIGITS),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get_with("/x", &[("Range", "bytes=0-3")]).await;
    sidecar.purge(r#"{"urls":["/x"]}"#).await;
    assert_eq!(sidecar.get("/x").await.text(), DIGITS);
    assert_eq!(origin.asks()[1].header("range"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn post_response_is_stored_only_with_own_content_location_and_max_age() {
    let origin = Origin::start(|ask| {
        let reply = Reply::new(200, format!("{} {}", ask.method, ask.number));
        match ask.target.as_str() {
            "/kept" => reply.header("Content-Location", "/kept").header("Cache-Control", "max-age=60"),
            "/elsewhere" => reply.header("Content-Location", "/kept2").header("Cache-Control", "max-age=60"),
            "/no-lifetime" => reply
                .header("Content-Location", "/no-lifetime")
                .header("Last-Modified", "Fri, 20 Nov 2020 12:00:00 GMT"),
            _ => reply.header("Cache-Control", "max-age=60"),
        }
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for (target, expected) in
        [("/kept", "POST 0"), ("/elsewhere", "GET 2"), ("/no-lifetime", "GET 4"), ("/x", "GET 6")]
    {
        sidecar.send("POST", target, "body").await;
        assert_eq!(sidecar.get(target).await.text(), expected, "{target}");
    }
    assert!(sidecar.get("/kept").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn hop_by_hop_fields_are_neither_stored_nor_forwarded() {
    let names = [
        "Connection",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Authentication-Info",
        "Proxy-Authorization",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Upgrade",
    ];
    let origin = Origin::start(move |_| {
        let reply = Reply::fresh(60, "x").header("X-Named", "1").header("X-Twice", "1").header("X-Twice", "2");
        let reply = names[1..].iter().fold(reply, |reply, name| reply.header(name, "some"));
        reply.header("Connection", "X-Named").header("X-Unknown", "stays")
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let lines: Vec<(&str, &str)> = names[1..]
        .iter()
        .map(|name| (*name, if *name == "TE" { "trailers" } else { "hop-by-hop" }))
        .chain([("X-Unknown", "stays")])
        .collect();
    // A request with Proxy-Authorization passes through.
    sidecar.get_with("/x", &lines).await;
    let lines: Vec<_> = lines.into_iter().filter(|(name, _)| !name.starts_with("Proxy-Auth")).collect();
    for hit in [false, true] {
        let answer = sidecar.get_with("/x", &lines).await;
        assert_eq!(answer.is_hit(), hit);
        for name in names.iter().chain(&["X-Named"]).filter(|name| **name != "Connection") {
            assert_eq!(answer.header(&name.to_ascii_lowercase()), None, "{name}");
        }
        assert_eq!(answer.header("x-unknown"), Some("stays"));
        assert_eq!(answer.all("x-twice"), ["1", "2"]);
    }
    let ask = &origin.asks()[0];
    for name in &names[1..] {
        assert_eq!(ask.header(&name.to_ascii_lowercase()), None, "{name} was forwarded");
    }
    assert_eq!((ask.header("x-unknown"), ask.header("via")), (Some("stays"), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn equivalent_vary_values_share_a_variant_but_credentials_do_not() {
    let origin =
        Origin::start(|ask| Reply::fresh(60, ask.number.to_string()).header("Vary", "Accept-Language, X-List")).await;
    let sidecar = Sidecar::before(&origin, "");
    let ask = async |lines: &[(&str, &str)]| sidecar.get_with("/x", lines).await.text();
    assert_eq!(ask(&[("Accept-Language", "en, de"), ("X-List", "1, 2")]).await, "0");
    assert_eq!(ask(&[("Accept-Language", "DE,en"), ("X-List", "1"), ("X-List", "2")]).await, "0");
    assert_eq!(ask(&[("Accept-Language", "en, de"), ("X-List", "2, 1")]).await, "1");
    assert_eq!(ask(&[("Accept-Language", "en;q=0.1, de"), ("X-List", "1, 2")]).await, "2");
    let tenant = |name| [("X-Api-Key", name), ("Accept-Language", "de, en"), ("X-List", "1, 2")];
    assert_eq!(ask(&tenant("a")).await, "3");
    assert_eq!(ask(&tenant("b")).await, "4");
    assert_eq!(ask(&tenant("a")).await, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_per_url_are_capped_and_the_oldest_are_evicted() {
    let origin = Origin::start(|_| Reply::fresh(60, "x").header("Vary", "X-V")).await;
    let sidecar = Sidecar::before(&origin, "");
    for i in 0..40 {
        sidecar.get_with("/x", &[("X-V", &i.to_string())]).await;
    }
    assert_eq!(sidecar.shared.memory.usage().entries, 1);
    assert!(sidecar.get_with("/x", &[("X-V", "39")]).await.is_hit(), "the newest variants are kept");
    assert!(!sidecar.get_with("/x", &[("X-V", "0")]).await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn cacheable_503_is_stored_unless_a_stale_entry_is_usable_and_429_never() {
    let origin = Origin::start(|ask| match (ask.target.as_str(), ask.number) {
        ("/bad", _) => Reply::new(503, "busy").header("Cache-Control", "max-age=10"),
        ("/429", _) => Reply::new(429, "slow down").header("Cache-Control", "max-age=10"),
        ("/good", 4) => Reply::fresh(5, "good").header("Cache-Control", "max-age=5, stale-if-error=60"),
        _ => Reply::new(503, "busy").header("Cache-Control", "max-age=10"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    assert_eq!(sidecar.get("/bad").await.status, 503);
    let kept = sidecar.get("/bad").await;
    assert!(kept.is_hit() && kept.status == 503, "{kept:?}");
    sidecar.turn(11);
    assert!(!sidecar.get("/bad").await.is_hit());
    for _ in 0..2 {
        assert!(!sidecar.get("/429").await.is_hit(), "RFC 6585 section 4: never stored");
    }
    assert_eq!(sidecar.get("/good").await.text(), "good");
    sidecar.turn(6);
    for _ in 0..2 {
        assert_eq!(sidecar.get("/good").await.text(), "good", "the stale response is preferred to the 503");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn head_response_refreshes_a_matching_entry_and_invalidates_a_changed_one() {
    let origin = Origin::start(|ask| {
        let changed = ask.target == "/changed" && ask.number > 1;
        Reply::new(200, "body")
            .header("Cache-Control", "max-age=10")
            .header("ETag", if changed { "\"2\"" } else { "\"1\"" })
            .header("X-Number", &ask.number.to_string())
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/same").await;
    sidecar.get("/changed").await;
    sidecar.turn(11);
    for target in ["/same", "/changed"] {
        crate::support::send(sidecar.address, "HEAD", target, &[], b"").await;
    }
    let same = sidecar.get("/same").await;
    assert!(same.is_hit(), "{same:?}");
    assert_eq!((same.text().as_str(), same.header("x-number")), ("body", Some("2")));
    let changed = sidecar.get("/changed").await;
    assert!(!changed.is_hit());
    assert_eq!(changed.text(), "body");
    assert_eq!(origin.count(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn valid_targeted_cache_control_field_overrides_cache_control() {
    let origin = Origin::start(|ask| {
        let (field, value) = match ask.target.as_str() {
            "/ours" => ("Sidecache-Cache-Control", "max-age=60"),
            "/cdn" => ("CDN-Cache-Control", "max-age=60"),
            _ => ("CDN-Cache-Control", "max-age=60, &&&"),
        };
        Reply::new(200, "x").header("Cache-Control", "no-store").header(field, value)
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for (target, hit) in [("/ours", true), ("/cdn", true), ("/invalid", false)] {
        sidecar.get(target).await;
        let again = sidecar.get(target).await;
        assert_eq!(again.is_hit(), hit, "{target}");
        assert_eq!(again.header("cache-control"), Some("no-store"), "fields are forwarded unchanged");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_partial_response_is_not_stored() {
    let origin = Origin::start(|ask| match ask.header("range") {
        Some("bytes=0-3") => Reply::new(206, "0123")
            .header("Content-Range", "bytes 0-3/10")
            .header("Cache-Control", "max-age=60")
            .header("ETag", "\"a\"")
            .cut_after(2, false),
        _ => Reply::fresh(60, DIGITS),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    client.ask("GET", "/x", &[("Range", "bytes=0-3")], b"").await;
    until("the origin receives the request", || (origin.count() == 1).then_some(())).await;
    let _broken = client.answer_to("GET").await;
    assert_eq!(sidecar.get("/x").await.text(), DIGITS);
    assert_eq!(origin.asks()[1].header("range"), None);
}

const HINTS: &str = "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\
    Connection: x-hop\r\nX-Hop: 1\r\n\r\n";
const FINAL: &str = "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 4\r\n\r\nbody";
const PASSED_ON: &str =
    "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn informational_responses_are_forwarded_at_once_and_are_not_stored() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match ask.target.as_str() {
        "/slow" => Reply::raw_halfway(HINTS, &held, FINAL),
        _ => Reply::raw(format!("{HINTS}{FINAL}")),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    client.ask("GET", "/slow", &[], b"").await;
    assert_eq!(
        String::from_utf8_lossy(client.read_some(PASSED_ON.len()).await),
        PASSED_ON,
        "before the final response"
    );
    gate.open();
    let mut rest = Vec::new();
    client.write(b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    client.read_to_end(&mut rest).await;
    let all = String::from_utf8_lossy(&rest).into_owned();
    assert_eq!(all.matches("HTTP/1.1 103").count(), 1, "{all}");
    assert_eq!(all.matches("HTTP/1.1 200 OK").count(), 2, "{all}");
    assert!(all.contains("sidecache; hit"), "{all}");

    let mut client = Client::connect(sidecar.address).await;
    client.write(b"GET /at-once HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    let mut all = Vec::new();
    client.read_to_end(&mut all).await;
    assert!(all.starts_with(format!("{PASSED_ON}HTTP/1.1 200 OK").as_bytes()), "{}", String::from_utf8_lossy(&all));

    let mut client = Client::connect(sidecar.address).await;
    client.write(b"GET /old-client HTTP/1.0\r\nHost: x\r\n\r\n").await;
    let mut all = Vec::new();
    client.read_to_end(&mut all).await;
    assert!(
        all.starts_with(b"HTTP/1.0 200 OK") || all.starts_with(b"HTTP/1.1 200 OK"),
        "no informational response for HTTP/1.0"
    );
    assert_eq!(origin.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn informational_responses_to_a_post_are_forwarded() {
    let origin = Origin::start(|_| Reply::raw(format!("{HINTS}{FINAL}"))).await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    client.write(b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n1").await;
    let mut all = Vec::new();
    client.read_to_end(&mut all).await;
    assert!(all.starts_with(format!("{PASSED_ON}HTTP/1.1 200 OK").as_bytes()), "{}", String::from_utf8_lossy(&all));
}

#[tokio::test(flavor = "multi_thread")]
async fn set_cookie_is_stored_or_removed_according_to_the_rule() {
    let origin = Origin::start(|_| Reply::fresh(60, "x").header("Set-Cookie", "a=b")).await;
    let rules = "[[upstream.rule]]\npath = \"/removed\"\ncache = \"http\"\nset_cookie = \"remove\"\n\
                 [[upstream.rule]]\npath = \"/stored\"\nttl = \"1h\"\nset_cookie = \"store\"\n\
                 [[upstream.rule]]\npath = \"/override\"\nttl = \"1h\"\n[[upstream.rule]]\npath = \"/http\"\n";
    let sidecar = Sidecar::before(&origin, rules);
    for (target, expected) in [("/removed", None), ("/stored", Some("a=b")), ("/override", None), ("/http", None)] {
        assert_eq!(sidecar.get(target).await.header("set-cookie"), Some("a=b"), "{target}: the client that fetched");
        let hit = sidecar.get(target).await;
        assert!(hit.is_hit());
        assert_eq!(hit.header("set-cookie"), expected, "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn head_response_without_validator_does_not_refresh_an_entry() {
    let origin =
        Origin::start(|ask| Reply::new(200, ask.number.to_string()).header("Cache-Control", "max-age=10")).await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/x").await;
    sidecar.turn(11);
    crate::support::send(sidecar.address, "HEAD", "/x", &[], b"").await;
    assert_eq!(sidecar.get("/x").await.text(), "2", "the stale entry has no validator");
}

#[tokio::test(flavor = "multi_thread")]
async fn cacheable_503_does_not_replace_a_fresh_entry() {
    let origin = Origin::start(|ask| match ask.number {
        0 => Reply::fresh(60, "good"),
        _ => Reply::new(503, "bad").header("Cache-Control", "max-age=60"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/x").await;
    assert_eq!(sidecar.get_with("/x", &[("Cache-Control", "no-cache")]).await.status, 503);
    assert_eq!(sidecar.get("/x").await.text(), "good");
}

#[tokio::test(flavor = "multi_thread")]
async fn range_request_revalidates_a_stale_entry_or_uses_it_in_an_outage() {
    let origin = Origin::start(|ask| match ask.number {
        0 => Reply::fresh(10, DIGITS).header("ETag", "\"1\""),
        1 => Reply::new(304, "").header("ETag", "\"1\"").header("Cache-Control", "max-age=10"),
        _ => Reply::close(),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let part = [("Range", "bytes=2-3")];
    sidecar.get("/x").await;
    for _ in 0..2 {
        sidecar.turn(11);
        let answer = sidecar.get_with("/x", &part).await;
        assert_eq!((answer.status, answer.text().as_str()), (206, "23"), "{answer:?}");
    }
    let asks = origin.asks();
    assert_eq!((asks[1].header("range"), asks[1].header("if-none-match")), (None, Some("\"1\"")));
}

#[tokio::test(flavor = "multi_thread")]
async fn not_modified_with_another_etag_triggers_an_unconditional_request() {
    let origin = Origin::start(|ask| match ask.header("if-none-match") {
        None => Reply::fresh(10, ask.number.to_string()).header("ETag", "\"1\""),
        Some(_) => Reply::new(304, "").header("ETag", "\"2\"").header("Cache-Control", "max-age=10"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/x").await;
    sidecar.turn(11);
    assert_eq!(sidecar.get("/x").await.text(), "2");
    assert_eq!(origin.count(), 3);
}
