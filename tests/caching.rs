//! Storing responses and serving them from the cache.

use crate::support::{Gate, Origin, Reply, Sidecar, until};

const OVERRIDE: &str = "[[upstream.rule]]\npath = \"/**\"\nttl = \"60s\"\nnegative_ttl = \"10s\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn fresh_response_is_served_until_it_expires() {
    let origin = Origin::start(|ask| Reply::fresh(60, format!("answer {}", ask.number))).await;
    let sidecar = Sidecar::before(&origin, "");
    let first = sidecar.get("/a?x=1").await;
    assert_eq!((first.status, first.cache_status().as_str()), (200, "sidecache; fwd=uri-miss; stored"));
    assert!(first.header("age").is_none() && first.header("date").is_some());
    sidecar.turn(30);
    let hit = sidecar.get("/a?x=1").await;
    assert!(hit.is_hit(), "{hit:?}");
    assert_eq!((hit.text().as_str(), hit.header("age")), ("answer 0", Some("30")));
    assert!(hit.header("cache-status").expect("a header").contains("; key=\""));
    assert!(hit.header("server-timing").expect("a header").starts_with("cache;dur="));
    assert_eq!(sidecar.get("/a?x=2").await.text(), "answer 1", "another query is another cache key");
    sidecar.turn(31);
    let refetched = sidecar.get("/a?x=1").await;
    assert_eq!(
        (refetched.text().as_str(), refetched.cache_status().as_str()),
        ("answer 2", "sidecache; fwd=stale; stored")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_status_says_why_a_response_was_not_stored() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/plain" => Reply::new(200, "x"),
        "/no-store" => Reply::new(200, "x").header("Cache-Control", "no-store"),
        "/private" => Reply::new(200, "x").header("Cache-Control", "private, max-age=9"),
        "/star" => Reply::fresh(9, "x").header("Vary", "*"),
        "/auth" => Reply::fresh(9, "x"),
        _ => Reply::fresh(9, "x"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "[[upstream.rule]]\npath = \"/off\"\ncache = \"off\"\n");
    let table: &[(&str, &[(&str, &str)], &str)] = &[
        ("/plain", &[], "sidecache; fwd=uri-miss; detail=no-freshness"),
        ("/no-store", &[], "sidecache; fwd=uri-miss; detail=no-store"),
        ("/private", &[], "sidecache; fwd=uri-miss; detail=private"),
        ("/star", &[], "sidecache; fwd=uri-miss; detail=vary-star"),
        ("/auth", &[("Authorization", "x")], "sidecache; fwd=uri-miss; detail=authorization"),
        ("/off", &[], "sidecache; fwd=bypass; detail=rule-off"),
        ("/x", &[("X-Foo-Token", "x")], "sidecache; fwd=bypass; detail=unkeyed-credential"),
        ("/x", &[("Range", "bytes=0-1")], "sidecache; fwd=bypass; detail=range"),
        ("/a/../x", &[], "sidecache; fwd=bypass; detail=ambiguous-target"),
    ];
    for (target, lines, expected) in table {
        for _ in 0..2 {
            assert_eq!(sidecar.get_with(target, lines).await.cache_status(), *expected, "{target}");
        }
    }
    assert_eq!(origin.count(), table.len() * 2);
    assert!(origin.asks().iter().any(|ask| ask.target == "/a/../x"), "the target is not normalized");
    let posted = sidecar.send("POST", "/x", "body").await;
    assert_eq!(posted.cache_status(), "sidecache; fwd=bypass; detail=method");
}

#[tokio::test(flavor = "multi_thread")]
async fn field_name_case_value_order_and_repeated_fields_are_preserved() {
    let origin = Origin::start(|_| {
        Reply::fresh(60, "x")
            .header("ETag", "\"1\"")
            .header("x-lower-case", "a")
            .header("X-Shop-API-Call-Limit", "1/40")
            .header("x-twice", "a=1")
            .header("x-twice", "b=2")
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for expected_hit in [false, true] {
        let answer = sidecar.get("/").await;
        assert_eq!(answer.is_hit(), expected_hit);
        let names: Vec<&str> = answer.headers.iter().map(|(name, _)| name.as_str()).collect();
        for name in ["ETag", "x-lower-case", "X-Shop-API-Call-Limit", "Cache-Control", "Cache-Status"] {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        assert_eq!(answer.all("x-twice"), ["a=1", "b=2"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_is_forwarded_unchanged() {
    let origin = Origin::start(|ask| Reply::new(200, ask.body.clone())).await;
    let sidecar = Sidecar::before(&origin, "");
    let lines = [
        ("X-MiXed-Case", "kept"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "dropped"),
        ("X-Forwarded-For", "1.2.3.4"),
        ("X-HTTP-Method-Override", "DELETE"),
        ("Accept-Encoding", "gzip, deflate"),
    ];
    let body = vec![7u8; 300_000];
    let answer = crate::support::send(sidecar.address, "POST", "/a%20b?c=%7E", &lines, &body).await;
    assert_eq!(answer.body, body);
    let ask = &origin.asks()[0];
    assert_eq!(ask.target, "/a%20b?c=%7E");
    assert!(ask.headers.contains(&("X-MiXed-Case".into(), "kept".into())));
    assert_eq!(ask.header("host"), Some(origin.address.to_string().as_str()));
    assert_eq!(ask.header("via"), None, "unless configured");
    assert_eq!(ask.header("accept-encoding"), Some("gzip, deflate"));
    assert_eq!(ask.header("x-http-method-override"), Some("DELETE"), "the upstream decides what it means");
    for gone in ["x-hop", "x-forwarded-for", "connection"] {
        assert_eq!(ask.header(gone), None, "{gone}");
    }
    assert!(answer.header("via").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn link_and_location_fields_are_rewritten_to_the_sidecar() {
    let origin = Origin::start(|ask| {
        let host = ask.header("host").expect("a host");
        let link = format!("<http://{host}/p?page=1>; rel=\"previous\", <https://{host}/p?page=3>; rel=\"next\"");
        let reply = Reply::fresh(60, "x").header("Link", &link);
        if ask.target == "/moved" { reply.header("Location", &format!("http://{host}/p")) } else { reply }
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let here = sidecar.address;
    let expected = format!("<http://{here}/p?page=1>; rel=\"previous\", <http://{here}/p?page=3>; rel=\"next\"");
    for _ in 0..2 {
        assert_eq!(sidecar.get("/p").await.header("link"), Some(expected.as_str()));
    }
    let named = sidecar.get_with("/p", &[("Host", "localhost:1234")]).await;
    assert!(named.is_hit() && named.header("link").expect("a header").starts_with("<http://localhost:1234/p"));
    let moved = sidecar.send("POST", "/moved", "").await;
    assert_eq!(moved.header("location"), Some(format!("http://{here}/p").as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_of_one_url_are_stored_separately() {
    let origin = Origin::start(|ask| {
        let language = ask.header("accept-language").unwrap_or("none");
        Reply::fresh(60, language).header("Vary", "Accept-Language")
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for round in 0..2 {
        for language in ["de", "en", "fr"] {
            let answer = sidecar.get_with("/", &[("Accept-Language", language)]).await;
            assert_eq!((answer.text().as_str(), answer.is_hit()), (language, round > 0));
        }
    }
    assert_eq!(origin.count(), 3);
    sidecar.purge(r#"{"urls":["/"]}"#).await;
    assert!(!sidecar.get_with("/", &[("Accept-Language", "en")]).await.is_hit(), "a purge removes all variants");
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_response_is_validated_and_freshened_by_304() {
    let origin = Origin::start(|ask| {
        if ask.header("if-none-match") == Some("\"v1\"") {
            return Reply::new(304, "").header("Cache-Control", "max-age=60").header("X-New", "yes");
        }
        Reply::fresh(10, "body").header("ETag", "\"v1\"")
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/").await;
    sidecar.turn(11);
    let validated = sidecar.get("/").await;
    assert_eq!((validated.status, validated.text().as_str()), (200, "body"));
    assert_eq!(validated.cache_status(), "sidecache; fwd=stale; fwd-status=304; stored");
    sidecar.turn(30);
    let hit = sidecar.get("/").await;
    assert!(hit.is_hit());
    assert_eq!((hit.header("x-new"), hit.header("etag")), (Some("yes"), Some("\"v1\"")));
}

#[tokio::test(flavor = "multi_thread")]
async fn conditional_request_is_answered_from_the_cache() {
    let origin = Origin::start(|_| Reply::fresh(60, "body").header("ETag", "\"v1\"")).await;
    let sidecar = Sidecar::before(&origin, "");
    for _ in 0..2 {
        let answer = sidecar.get_with("/", &[("If-None-Match", "\"v1\"")]).await;
        assert_eq!((answer.status, answer.header("etag")), (304, Some("\"v1\"")));
        assert_eq!(answer.header("content-length"), None);
    }
    assert_eq!(sidecar.get_with("/", &[("If-None-Match", "\"v2\"")]).await.text(), "body");
    assert_eq!(origin.count(), 1);
    assert_eq!(origin.asks()[0].header("if-none-match"), None, "the cache requests the complete response");
}

#[tokio::test(flavor = "multi_thread")]
async fn head_request_uses_a_stored_get_and_stores_nothing() {
    let origin = Origin::start(|_| Reply::fresh(60, "twelve bytes")).await;
    let sidecar = Sidecar::before(&origin, "");
    let missed = sidecar.send("HEAD", "/", "").await;
    assert_eq!(missed.cache_status(), "sidecache; fwd=uri-miss; detail=head");
    sidecar.get("/").await;
    let hit = sidecar.send("HEAD", "/", "").await;
    assert!(hit.is_hit());
    assert_eq!(hit.header("content-length"), Some("12"));
    assert_eq!(origin.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn override_ignores_upstream_directives_and_drops_set_cookie() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/gone" => Reply::new(404, "no"),
        "/teapot" => Reply::new(418, "no"),
        _ => Reply::new(200, "x").header("Cache-Control", "no-store, private").header("Set-Cookie", "session=1"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, OVERRIDE);
    assert_eq!(sidecar.get("/").await.status, 200);
    let hit = sidecar.get_with("/", &[("Cache-Control", "no-cache")]).await;
    assert!(hit.is_hit() && hit.header("set-cookie").is_none());
    sidecar.get("/gone").await;
    let gone = sidecar.get("/gone").await;
    assert!(gone.is_hit() && gone.status == 404);
    sidecar.turn(10);
    assert!(!sidecar.get("/gone").await.is_hit(), "negative_ttl has passed");
    sidecar.get("/teapot").await;
    assert_eq!(sidecar.get("/teapot").await.cache_status(), "sidecache; fwd=uri-miss; fwd-status=418; detail=status");
    let refused = sidecar.get_with("/", &[("Accept-Encoding", "gzip, identity;q=0")]).await;
    assert!(!refused.is_hit(), "content codings are separate variants");
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_response_is_streamed_and_not_stored() {
    let big = vec![b'x'; 600_000];
    let body = big.clone();
    let gate = Gate::new();
    let half = gate.clone();
    let origin = Origin::start(move |ask| match ask.target.as_str() {
        "/announced" => Reply::fresh(60, body.clone()).halfway(&half),
        _ => Reply::raw([b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n\r\n".to_vec(), body.clone()].concat()),
    })
    .await;
    let sidecar = Sidecar::with_tables(&origin, "", "[memory]\nmax_bytes = \"1MiB\"\nmax_entry_bytes = \"100KiB\"\n");
    let mut client = crate::support::Client::connect(sidecar.address).await;
    client.ask("GET", "/announced", &[], b"").await;
    client.read_some(200_000).await;
    gate.open();
    let answer = client.answer_to("GET").await.expect("a response");
    assert_eq!(
        (answer.body == big, answer.cache_status().as_str()),
        (true, "sidecache; fwd=uri-miss; detail=too-large")
    );
    let unannounced = sidecar.get("/unannounced").await;
    assert!(unannounced.body == big && unannounced.whole);
    assert!(!sidecar.get("/unannounced").await.is_hit());
    until("the in-flight bytes are released", || (sidecar.shared.inflight.held() == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn first_matching_rule_wins() {
    let rules = "[[upstream.rule]]\nname = \"one\"\npath = \"/a/*\"\ncache = \"off\"\n\
                 [[upstream.rule]]\nname = \"two\"\npath = \"/a/b\"\nttl = \"5m\"\n";
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let sidecar = Sidecar::before(&origin, rules);
    assert_eq!(sidecar.get("/a/b").await.cache_status(), "sidecache; fwd=bypass; detail=rule-off");
}

#[tokio::test(flavor = "multi_thread")]
async fn excluded_query_parameters_are_forwarded_and_not_in_the_key() {
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"5m\"\nkey = { query = [\"*\", \"!utm_*\"] }\n";
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::before(&origin, rules);
    sidecar.get("/?a=1&utm_source=mail").await;
    assert!(sidecar.get("/?utm_source=web&a=1").await.is_hit());
    assert_eq!(origin.asks()[0].target, "/?a=1&utm_source=mail");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_if_cached_without_a_stored_response_is_504() {
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let sidecar = Sidecar::before(&origin, "");
    let only = [("Cache-Control", "only-if-cached")];
    assert_eq!(sidecar.get_with("/", &only).await.status, 504);
    sidecar.get("/").await;
    assert!(sidecar.get_with("/", &only).await.is_hit());
    assert_eq!(origin.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn parameter_exclusion_applies_only_to_the_listed_names() {
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"5m\"\nkey = { query = [\"!utm_*\"] }\n";
    let origin = Origin::start(|ask| Reply::new(200, ask.target.clone())).await;
    let sidecar = Sidecar::before(&origin, rules);
    for page in 1..3 {
        let target = format!("/?page={page}");
        assert_eq!(sidecar.get(&target).await.text(), target);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_of_one_rule_are_not_served_by_another() {
    let rules = "[[upstream.rule]]\nname = \"gold\"\npath = \"/**\"\nttl = \"10s\"\nwhen = { headers = { x-tier = \"gold\" } }\n\
                 [[upstream.rule]]\nname = \"plain\"\npath = \"/**\"\nttl = \"1h\"\n";
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::before(&origin, rules);
    sidecar.get("/").await;
    sidecar.turn(100);
    assert!(sidecar.get("/").await.is_hit());
    assert!(!sidecar.get_with("/", &[("X-Tier", "gold")]).await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn field_named_by_connection_is_not_used_to_select_a_variant() {
    let origin = Origin::start(|ask| {
        Reply::fresh(60, ask.header("accept-language").unwrap_or("default")).header("Vary", "Accept-Language")
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let poison = [("Connection", "Accept-Language"), ("Accept-Language", "de")];
    assert_eq!(sidecar.get_with("/", &poison).await.text(), "default");
    assert_eq!(sidecar.get_with("/", &[("Accept-Language", "de")]).await.text(), "de");
}

#[tokio::test(flavor = "multi_thread")]
async fn response_304_for_another_representation_freshens_nothing() {
    let origin = Origin::start(|ask| match ask.header("if-none-match") {
        Some(_) => Reply::new(304, "").header("ETag", "\"v2\""),
        None => Reply::fresh(10, "v1").header("ETag", "\"v1\""),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/").await;
    sidecar.turn(11);
    let answer = sidecar.get("/").await;
    assert_ne!(answer.header("etag"), Some("\"v2\""), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn request_that_names_another_method_is_passed_through_as_a_write() {
    let origin = Origin::start(|ask| Reply::fresh(60, ask.number.to_string())).await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/a").await;
    for name in ["X-HTTP-Method", "X-HTTP-Method-Override", "X-Method-Override"] {
        let overriding = sidecar.get_with("/a", &[(name, "DELETE")]).await;
        assert_eq!(overriding.cache_status(), "sidecache; fwd=bypass; detail=method-override", "{name}");
        assert!(!sidecar.get("/a").await.is_hit(), "{name}: a write purges its path");
        assert!(sidecar.get("/a").await.is_hit());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_differ_in_a_header_share_an_override_response_only_if_it_is_inert() {
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let rule = "[[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\nkey = { ignore_headers = [\"X-Ignored\"] }\n";
    let sidecar = Sidecar::before(&origin, rule);
    let plain = sidecar.get("/a").await.text();
    for option in ["close", "keep-alive", "Upgrade, HTTP2-Settings"] {
        let answer = sidecar.get_with("/a", &[("Connection", option)]).await;
        assert_eq!((answer.status, answer.text()), (200, plain.clone()), "{option}");
    }
    for name in ["User-Agent", "traceparent", "X-Request-Id", "X-Forwarded-For", "X-Ignored", "Cache-Control"] {
        assert_eq!(sidecar.get_with("/a", &[(name, "a")]).await.text(), plain, "{name}");
    }
    for name in ["Stripe-Account", "X-Tenant-Id", "Accept-Language", "Origin", "X-User-Id", "X-Foo-Token"] {
        let one = sidecar.get_with("/a", &[(name, "a")]).await;
        let other = sidecar.get_with("/a", &[(name, "b")]).await;
        assert!(one.text() != plain && other.text() != plain && one.text() != other.text(), "{name}");
        assert!(sidecar.get_with("/a", &[(name, "a")]).await.is_hit(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_content_coding_serves_every_client_that_accepts_it() {
    let origin = Origin::start(|ask| {
        let reply = Reply::fresh(60, ask.number.to_string()).header("Vary", "Accept-Encoding");
        if ask.target == "/gzip" { reply.header("Content-Encoding", "gzip") } else { reply }
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get_with("/gzip", &[("Accept-Encoding", "gzip, br")]).await;
    sidecar.get_with("/identity", &[("Accept-Encoding", "gzip, br")]).await;
    let table: [(&str, &[(&str, &str)], bool); 8] = [
        ("/gzip", &[("Accept-Encoding", "br;q=1.0, gzip;q=0.5")], true),
        ("/gzip", &[("Accept-Encoding", "GZIP")], true),
        ("/gzip", &[("Accept-Encoding", "*")], true),
        ("/gzip", &[("Accept-Encoding", "gzip;q=0, br")], false),
        ("/gzip", &[("Accept-Encoding", "zstd")], false),
        ("/identity", &[("Accept-Encoding", "zstd")], true),
        ("/identity", &[], true),
        ("/identity", &[("Accept-Encoding", "gzip, identity;q=0")], false),
    ];
    for (target, lines, hit) in table {
        let answer = sidecar.get_with(target, &[lines, &[("Cache-Control", "only-if-cached")]].concat()).await;
        assert_eq!(answer.is_hit(), hit, "{target} {lines:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn set_cookie_of_a_stored_response_goes_only_to_the_client_that_caused_it() {
    let origin = Origin::start(|ask| {
        let reply = Reply::new(200, ask.number.to_string()).header("Set-Cookie", "session=1");
        let modified = || reply.clone().header("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT");
        if ask.target == "/heuristic" { modified() } else { reply.clone().header("Cache-Control", "max-age=60") }
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    assert_eq!(sidecar.get("/explicit").await.header("set-cookie"), Some("session=1"));
    let hit = sidecar.get("/explicit").await;
    assert!(hit.is_hit() && hit.header("set-cookie").is_none());
    assert_ne!(sidecar.get("/heuristic").await.text(), sidecar.get("/heuristic").await.text());
    let stores = Sidecar::before(&origin, "[[upstream.rule]]\npath = \"/**\"\nset_cookie = \"store\"\n");
    stores.get("/explicit").await;
    assert_eq!(stores.get("/explicit").await.header("set-cookie"), Some("session=1"));
}
