//! The admin API: health, statistics, purges, modes, and access control.

use crate::support::{Origin, Reply, Sidecar, get, send};

const RULES: &str = "[[upstream.rule]]\npath = \"/products/{id}\"\nttl = \"1h\"\nstale_while_revalidate = \"1h\"\n\
                     tags = [\"products\", \"product:{id}\"]\n\
                     [[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\nstale_while_revalidate = \"1h\"\n";

const TARGETS: [&str; 4] = ["/products/1", "/products/2", "/shop?a=1", "/shop?a=2"];

async fn filled() -> (Origin, Sidecar) {
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let sidecar = Sidecar::before(&origin, RULES);
    fill(&sidecar).await;
    (origin, sidecar)
}

async fn fill(sidecar: &Sidecar) {
    for target in TARGETS {
        sidecar.get(target).await;
        assert!(sidecar.get(target).await.is_hit());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_removes_only_the_entries_it_matches() {
    let (origin, sidecar) = filled().await;
    let address = format!("\"urls\":[\"http://{}/shop?a=1\"]", origin.address);
    let table: &[(&str, &[&str])] = &[
        (r#"{"tags":["product:1"]}"#, &["/products/1"]),
        (r#"{"tags":["products"]}"#, &["/products/1", "/products/2"]),
        (r#"{"tags":["nothing"]}"#, &[]),
        (r#"{"urls":["/shop?a=1"]}"#, &["/shop?a=1"]),
        (&format!("{{{address}}}"), &["/shop?a=1"]),
        (r#"{"prefixes":["/shop"]}"#, &["/shop?a=1", "/shop?a=2"]),
        (r#"{"patterns":["*a=2"]}"#, &["/shop?a=2"]),
        (r#"{"all":true}"#, &TARGETS),
        (r#"{"all":true,"upstream":"api"}"#, &TARGETS),
        (r#"{"tags":["product:2"],"prefixes":["/shop?a=2"]}"#, &["/products/2", "/shop?a=2"]),
    ];
    for (request, expected) in table {
        fill(&sidecar).await;
        let answer = sidecar.purge(request).await;
        assert!(answer["purged"].as_u64() >= Some(1) && answer["id"].is_u64(), "{answer}");
        for target in TARGETS {
            assert_eq!(!sidecar.get(target).await.is_hit(), expected.contains(&target), "{request}: {target}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn soft_purge_serves_stale_while_revalidating() {
    let (_origin, sidecar) = filled().await;
    sidecar.purge(r#"{"tags":["product:1"],"soft":true}"#).await;
    let stale = sidecar.get("/products/1").await;
    assert!(stale.cache_status().ends_with("detail=stale-while-revalidate"), "{}", stale.cache_status());
    assert!(stale.cache_status().contains("ttl=-1"), "stale before it expires: {}", stale.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_purge_selector_is_400_with_a_reason() {
    let (_origin, sidecar) = filled().await;
    let lines = [("Content-Type", "application/json")];
    let bad = [
        "{}",
        "[",
        r#"{"tag":["x"]}"#,
        r#"{"urls":["shop"]}"#,
        r#"{"all":true,"upstream":"nope"}"#,
        r#"{"urls":["http://elsewhere.example/shop?a=1"]}"#,
        r#"{"all":true,"hosts":["x"]}"#,
    ];
    for body in bad {
        let answer = send(sidecar.admin, "POST", "/purge", &lines, body.as_bytes()).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (400, Some("bad_request")), "{body}");
    }
    assert_eq!(send(sidecar.admin, "GET", "/purge", &[], b"").await.status, 405, "GET is not allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn admin_api_requires_the_token() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let file = std::env::temp_dir().join(format!("sidecache-token-{}", std::process::id()));
    std::fs::write(&file, "canary-token\n").expect("writable");
    let text = format!(
        "[[upstream]]\nname = \"api\"\nurl = \"http://{}\"\nlisten = \"127.0.0.1:0\"\n\
         [admin]\nlisten = \"127.0.0.1:0\"\ntoken = {{ file = \"{}\" }}\n",
        origin.address,
        file.display()
    );
    let sidecar = Sidecar::from_text(&text);
    std::fs::remove_file(&file).expect("the file exists");
    let own = sidecar.admin.to_string();
    let token = ("Authorization", "Bearer canary-token");
    let table: &[(&str, &[(&str, &str)], u16)] = &[
        ("/stats", &[token], 200),
        ("/stats", &[], 401),
        ("/stats", &[("Authorization", "Bearer canary-toke")], 401),
        ("/stats", &[token, ("Host", "evil.example")], 421),
        ("/stats", &[token, ("Origin", "http://evil.example")], 403),
        ("/stats", &[token, ("Origin", &format!("http://{own}"))], 200),
        ("/livez", &[("Host", "10.0.0.7:8080")], 200),
        ("/readyz", &[], 200),
        ("/health", &[("Host", "10.0.0.7")], 200),
        ("/nothing", &[token], 404),
    ];
    for (path, lines, expected) in table {
        assert_eq!(get(sidecar.admin, path, lines).await.status, *expected, "{path} {lines:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_and_health_report_recent_traffic() {
    let (_origin, sidecar) = filled().await;
    let stats = sidecar.stats().await;
    assert_eq!(stats["requests"]["outcomes"]["hit"], 4);
    assert_eq!(stats["requests"]["outcomes"]["miss"], 4);
    assert_eq!(stats["requests"]["upstream_requests"], 4);
    assert_eq!(stats["requests"]["hit_ratio"], 0.5);
    assert_eq!(stats["memory"]["entries"], 4);
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["status"], "ok");
    assert_eq!(health["components"]["upstreams"]["api"]["status"], "ok");
    assert!(health["components"]["process"]["rss_bytes"].as_u64() > Some(1 << 20));
}

/// Returns the value of a series in `OpenMetrics` text.
fn sample(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_labelled_by_upstream_rule_and_outcome() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/bad" => Reply::new(503, "x"),
        _ => Reply::new(200, "x"),
    })
    .await;
    let rules = "[[upstream.rule]]\nname = \"things\"\npath = [\"/a\", \"/b\"]\nttl = \"1m\"\n\
                 fallback = { body = \"{}\" }\n[[upstream.rule]]\nname = \"bad\"\npath = \"/bad\"\nttl = \"1m\"\n\
                 fallback = { body = \"{}\" }\n";
    let sidecar = Sidecar::before(&origin, rules);
    for target in ["/a", "/a", "/b", "/bad", "/other"] {
        sidecar.get(target).await;
    }
    sidecar.send("POST", "/a", "x").await;
    let answer = get(sidecar.admin, "/metrics", &[]).await;
    assert!(answer.header("content-type").expect("a header").starts_with("application/openmetrics-text"));
    let text = answer.text();
    let table = [
        ("sidecache_requests_total{upstream=\"api\",rule=\"things\",outcome=\"hit\"}", 1.0),
        ("sidecache_requests_total{upstream=\"api\",rule=\"things\",outcome=\"miss\"}", 2.0),
        ("sidecache_requests_total{upstream=\"api\",rule=\"bad\",outcome=\"fallback\"}", 1.0),
        ("sidecache_requests_total{upstream=\"api\",rule=\"\",outcome=\"bypass\"}", 1.0),
        ("sidecache_upstream_requests_total{upstream=\"api\",result=\"5xx\"}", 1.0),
        ("sidecache_upstream_requests_total{upstream=\"api\",result=\"ok\"}", 4.0),
        ("sidecache_request_duration_seconds_count{upstream=\"api\",outcome=\"hit\"}", 1.0),
        ("sidecache_fallback_total{reason=\"5xx\"}", 1.0),
        ("sidecache_breaker_open{target=\"api\"}", 0.0),
        ("sidecache_upstream_up{upstream=\"api\"}", 1.0),
    ];
    for (series, expected) in table {
        assert_eq!(sample(&text, series), Some(expected), "{series} in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    // The last bucket of a histogram counts all observations.
    let last = "sidecache_request_duration_seconds_bucket{le=\"+Inf\",upstream=\"api\",outcome=\"hit\"}";
    assert_eq!(sample(&text, last), Some(1.0), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metric_labels_contain_no_path_host_or_credential() {
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let sidecar = Sidecar::before(&origin, "");
    for i in 0..200 {
        let token = format!("secret-{i}");
        sidecar.get_with(&format!("/path-{i}?q=query-{i}"), &[("X-Api-Key", token.as_str())]).await;
    }
    let text = get(sidecar.admin, "/metrics", &[]).await.text();
    for word in ["path-", "query-", "secret-", "127.0.0.1"] {
        assert!(!text.contains(word), "{word}");
    }
    assert!(text.lines().count() < 400, "{} lines", text.lines().count());
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_listener_serves_only_probes_without_a_token() {
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let text = crate::support::sidecar::text(origin.address, "", "[probes]\nlisten = \"127.0.0.1:0\"\n");
    let config =
        sidecache::config::from_text("test", &text, std::path::Path::new(".")).expect("a valid configuration");
    let app = sidecache::app::App::bind(config).expect("free ports");
    let probes = app.probes_address().expect("a listener");
    assert!(app.lines().iter().any(|line| line == &format!("listening probes addr={probes}")));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let running = tokio::spawn(app.run(stopped));
    for (path, status) in
        [("/livez", 200), ("/readyz", 200), ("/metrics", 200), ("/stats", 404), ("/purge", 404), ("/health", 404)]
    {
        assert_eq!(get(probes, path, &[("Host", "10.1.2.3:18082")]).await.status, status, "{path}");
    }
    stop.send_replace(true);
    crate::support::soon("the sidecar stops", running).await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_switch_passes_through_and_revalidates_when_switched_back() {
    let origin = Origin::start(|ask| Reply::new(200, format!("{} {}", ask.method, ask.number))).await;
    let sidecar = Sidecar::before(&origin, RULES);
    let mode = async |json: &str| {
        send(sidecar.admin, "POST", "/mode", &[("Content-Type", "application/json")], json.as_bytes()).await
    };
    assert_eq!(sidecar.get("/products/1").await.text(), "GET 0");
    assert_eq!(sidecar.get("/shop").await.text(), "GET 1");
    let state = mode(r#"{"mode":"bypass"}"#).await;
    assert_eq!(state.json(), serde_json::json!({"mode": "bypass", "source": "local", "for_ms": null}));
    for n in 2..4 {
        let passed = sidecar.get("/products/1").await;
        assert_eq!(passed.text(), format!("GET {n}"));
        assert_eq!(passed.cache_status(), "sidecache; fwd=bypass; detail=mode");
    }
    assert_eq!(sidecar.send("PUT", "/products/1", "x").await.text(), "PUT 4");
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["mode"]["mode"], "bypass");
    let metrics = get(sidecar.admin, "/metrics", &[]).await.text();
    assert_eq!(sample(&metrics, "sidecache_mode{mode=\"bypass\"}"), Some(1.0));
    assert_eq!(mode(r#"{"mode":"normal"}"#).await.status, 200);
    assert_eq!(sidecar.get("/products/1").await.text(), "GET 5", "the write has invalidated the entry");
    assert!(sidecar.get("/shop").await.is_hit(), "the other entry is kept");
    // A mode with `for` expires.
    assert_eq!(mode(r#"{"mode":"bypass","for":"30m"}"#).await.json()["for_ms"], 1_800_000);
    assert!(!sidecar.get("/shop").await.is_hit());
    sidecar.turn(1801);
    assert!(sidecar.get("/shop").await.is_hit());
    for (wrong, word) in [
        (r#"{"mode":"off"}"#, "write \\\"normal\\\""),
        (r#"{"mode":"bypass","for":"30"}"#, "unit"),
        (r#"{"mode":"bypass","fleet":true}"#, "needs [redis]"),
        (r#"{"mode":"bypass","until":1}"#, "unknown field"),
        ("nonsense", "JSON"),
    ] {
        let refused = mode(wrong).await;
        assert!((400..500).contains(&refused.status) && refused.text().contains(word), "{wrong}: {}", refused.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn configured_bypass_mode_holds_until_changed_by_the_admin_api() {
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let text = format!("mode = \"bypass\"\n{}", crate::support::sidecar::text(origin.address, "", ""));
    let sidecar = Sidecar::from_text(&text);
    for _ in 0..2 {
        assert!(!sidecar.get("/x").await.is_hit());
    }
    let json = [("Content-Type", "application/json")];
    send(sidecar.admin, "POST", "/mode", &json, br#"{"mode":"normal"}"#).await;
    sidecar.get("/x").await;
    assert!(sidecar.get("/x").await.is_hit());
    send(sidecar.admin, "POST", "/mode", &json, br#"{"mode":"configured"}"#).await;
    assert!(!sidecar.get("/x").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_listed_in_pages_without_credentials() {
    let origin = Origin::start(|ask| Reply::new(200, ask.target.clone())).await;
    let sidecar = Sidecar::before(&origin, RULES);
    for i in 0..25 {
        sidecar.get_with(&format!("/products/{i}?access_token=canary-{i}"), &[("X-Api-Key", "canary")]).await;
    }
    sidecar.get("/shop").await;
    let page = async |query: &str| get(sidecar.admin, &format!("/entries{query}"), &[]).await.json();
    let (mut seen, mut query) = (std::collections::BTreeSet::new(), "?limit=10".to_owned());
    for expected in [10, 10, 6] {
        let reply = page(&query).await;
        let entries = reply["entries"].as_array().expect("a list").clone();
        assert_eq!(entries.len(), expected, "{reply}");
        assert!(!reply.to_string().contains("canary"), "{reply}");
        seen.extend(
            entries
                .iter()
                .map(|entry| entry["target"].as_str().expect("text").to_owned() + &entry["key"].to_string()),
        );
        query = format!("?limit=10&after={}", reply["next"].as_str().unwrap_or("-"));
    }
    assert_eq!((seen.len(), query.as_str()), (26, "?limit=10&after=-"));
    let tagged = page("?tag=product:7").await;
    let entry = &tagged["entries"][0];
    assert_eq!(
        (entry["target"].as_str(), entry["of_a_credential"].as_bool(), entry["standing"].as_str()),
        (Some("/products/7?access_token=…"), Some(true), Some("valid"))
    );
    assert_eq!(page("?prefix=/shop").await["entries"].as_array().map(Vec::len), Some(1));
    assert_eq!(get(sidecar.admin, "/entries?nope=1", &[]).await.status, 400);
    let budgets = get(sidecar.admin, "/budgets", &[]).await.json();
    assert_eq!(budgets["budgets"][0]["upstream"], "api");
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboard_loads_nothing_from_other_hosts() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::before(&origin, "");
    let page = get(sidecar.admin, "/", &[]).await;
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.header("content-security-policy").expect("a header");
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    let text = page.text().replace("http://www.w3.org/2000/svg", "");
    assert!(!text.contains("http://") && !text.contains("https://"), "no other host");
}

#[tokio::test(flavor = "multi_thread")]
async fn recent_requests_show_reasons_and_no_secrets() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/plain" => Reply::new(200, "x"),
        _ => Reply::fresh(60, "x"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for target in ["/a?token=hidden", "/a?token=hidden", "/plain", "/plain"] {
        sidecar.get(target).await;
    }
    sidecar.send("POST", "/a", "x").await;
    let reply = get(sidecar.admin, "/requests", &[]).await;
    assert!(!reply.text().contains("hidden"), "{}", reply.text());
    let reply = reply.json();
    let all = reply["requests"].as_array().expect("a list").clone();
    let short = |seen: &serde_json::Value| {
        let field = |name: &str| seen[name].as_str().unwrap_or("-").to_owned();
        format!("{} {} {} {} {}", field("method"), field("path"), seen["status"], field("outcome"), field("detail"))
    };
    let lines: Vec<String> = all.iter().map(short).collect();
    let expected = [
        "POST /a 200 bypass method",
        "GET /plain 200 miss no-freshness",
        "GET /plain 200 miss no-freshness",
        "GET /a 200 hit -",
        "GET /a 200 miss -",
    ];
    assert_eq!(lines, expected);
    assert_eq!(all[1]["same"], all[2]["same"], "both requests have the same cache key");
    assert_ne!(all[0]["same"], all[1]["same"]);
    for (query, count) in
        [("?outcome=hit", 1), ("?outcome=miss&limit=2", 2), ("?rule=nothing", 0), ("?upstream=api", 5)]
    {
        let reply = get(sidecar.admin, &format!("/requests{query}"), &[]).await.json();
        assert_eq!(reply["requests"].as_array().map(Vec::len), Some(count), "{query}");
    }
    let rules = sidecar.stats().await["rules"].clone();
    assert_eq!((rules[0]["rule"].as_str(), rules[0]["requests"].as_u64()), (Some("default"), Some(4)), "{rules}");
    for wrong in ["?limit=0", "?limit=1001", "?nothing=1"] {
        let refused = get(sidecar.admin, &format!("/requests{wrong}"), &[]).await;
        assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (400, Some("bad_request")), "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn effective_configuration_and_process_figures_are_served() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::before(&origin, RULES);
    let config = get(sidecar.admin, "/config", &[]).await.json();
    assert_eq!(config["upstreams"][0]["rules"][0]["ttl"], "1h");
    assert_eq!(config["limits"]["headers"], "32KiB");
    let process = get(sidecar.admin, "/health", &[]).await.json()["components"]["process"].clone();
    assert!(
        process["open_files"].as_u64() > Some(3) && process["event_loop_delay_ms"]["worst"].is_u64(),
        "{process}"
    );
}

/// Checks that the document lists every path. `tests/openapi/run` checks requests against the document.
#[tokio::test(flavor = "multi_thread")]
async fn openapi_document_lists_every_path() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::before(&origin, "");
    let document = get(sidecar.admin, "/openapi.json", &[]).await.json();
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    let source = include_str!("../src/admin.rs");
    let served: Vec<&str> = source.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(served.len() > 12);
    let paths = document["paths"].as_object().expect("paths");
    assert_eq!(paths.len(), served.len());
    for path in served {
        assert!(paths.contains_key(path), "{path}");
    }
    for (method, path, status) in [("GET", "/nothing", 404), ("DELETE", "/stats", 405)] {
        let answer = send(sidecar.admin, method, path, &[], b"").await;
        assert_eq!(answer.status, status);
        assert!(answer.json()["error"]["message"].as_str().is_some_and(|text| text.contains("/openapi.json")));
    }
}
