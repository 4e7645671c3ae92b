//! `explain`: the decision for a request, and its reason.

use serde_json::{Value, json};

use crate::support::process::run;
use crate::support::{Origin, Reply, Sidecar, send};

const RULES: &str = "[[upstream.rule]]\nname = \"product\"\npath = \"/products/{id}.json\"\nttl = \"1m\"\n\
                     stale_if_error = \"1h\"\ntags = [\"product:{id}\"]\nkey = { headers = [\"Accept-Language\"] }\n\
                     [[upstream.rule]]\npath = \"/private/**\"\ncache = \"off\"\n";

async fn explain(sidecar: &Sidecar, request: Value) -> Value {
    let lines = [("Content-Type", "application/json")];
    let answer = send(sidecar.admin, "POST", "/explain", &lines, request.to_string().as_bytes()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_shows_rule_key_tags_and_state() {
    let origin = Origin::start(|_| Reply::new(200, "{}")).await;
    let sidecar = Sidecar::before(&origin, RULES);
    let query = json!({
        "method": "GET", "url": "/products/7.json?a=b",
        "headers": [["Authorization", "Bearer x"], ["Accept-Language", "de"]],
    });
    let explanation = explain(&sidecar, query.clone()).await;
    assert_eq!(explanation["rule"], "product (path /products/{id}.json)");
    assert_eq!(explanation["decision"], "a fetch: no response is stored in memory");
    assert_eq!(explanation["tags"], json!(["product:7"]));
    assert_eq!(explanation["key"]["tenant"], "those with the same authorization");
    assert_eq!(explanation["key"]["headers"], json!(["accept-language: de"]));
    assert!(!explanation.to_string().contains("Bearer"), "{explanation}");
    assert_eq!(origin.count(), 0, "no request was sent");
    let lines = [("Authorization", "Bearer x"), ("Accept-Language", "de")];
    let answer = sidecar.get_with("/products/7.json?a=b", &lines).await;
    assert_eq!(answer.status, 200);
    let explanation = explain(&sidecar, query.clone()).await;
    assert_eq!(explanation["decision"], "a hit");
    assert!(explanation["entry"]["ttl_seconds"].as_i64() >= Some(50), "{explanation}");
    let hit = sidecar.get_with("/products/7.json?a=b", &lines).await;
    let key = format!("key={}", explanation["key"]["name"]);
    assert!(
        hit.header("cache-status").expect("a Cache-Status").ends_with(&key),
        "explain reports the key of the hit"
    );
    sidecar.turn(100);
    let explanation = explain(&sidecar, query).await;
    assert!(explanation["decision"].as_str().expect("text").contains("stale"), "{explanation}");
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_says_why_a_request_is_not_cached() {
    let origin = Origin::start(|_| Reply::new(200, "{}").header("Cache-Control", "private")).await;
    let sidecar = Sidecar::before(&origin, RULES);
    let passed = [
        (json!({ "url": "/private/a" }), "rule-off"),
        (json!({ "method": "POST", "url": "/products/7.json" }), "method"),
        (json!({ "url": "/a/../b" }), "ambiguous-target"),
        (json!({ "url": "/a", "headers": [["X-Special-Token", "x"]] }), "unkeyed-credential"),
        (json!({ "url": "/a", "body": "x" }), "request-body"),
    ];
    for (request, reason) in passed {
        let explanation = explain(&sidecar, request).await;
        assert_eq!(explanation["decision"], format!("passed through ({reason})"), "{explanation}");
        assert!(explanation["why"].as_str().is_some_and(|why| why.len() > 20), "{explanation}");
    }
    let long = format!("/{}", "a".repeat(9000));
    for (request, refusal) in [
        (json!({ "url": long }), "rejected with 414 (url_too_long)"),
        (json!({ "method": "TRACE", "url": "/" }), "rejected with 405 (method_not_allowed)"),
    ] {
        assert_eq!(explain(&sidecar, request).await["decision"], refusal);
    }
    sidecar.get("/other").await;
    let explanation = explain(&sidecar, json!({ "url": "/other" })).await;
    let why = explanation["not_stored"].as_str().expect("a reason");
    assert!(why.contains("private") && why.contains("not collapsed for 1"), "{why}");
    let lines = [("Content-Type", "application/json")];
    for wrong in ["{\"url\":\"a b\"}", "{\"url\":\"/\",\"upstream\":\"none\"}", "{\"link\":1}", "nonsense"] {
        let answer = send(sidecar.admin, "POST", "/explain", &lines, wrong.as_bytes()).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &"bad_request".into()), "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_uses_the_running_process_or_the_file() {
    let origin = Origin::start(|_| Reply::new(200, "{}")).await;
    let sidecar = Sidecar::before(&origin, RULES);
    let admin = format!("http://{}", sidecar.admin);
    let url = format!("http://{}/products/7.json", sidecar.address);
    let (code, explanation, _) = run(&["explain", "GET", &url, "--admin", &admin]).await;
    assert_eq!(code, 0);
    assert!(
        explanation.contains("product (path /products/{id}.json)") && explanation.contains("product:7"),
        "{explanation}"
    );
    assert!(explanation.contains("no response is stored") && explanation.contains("breaker"), "{explanation}");
    let file = std::env::temp_dir().join(format!("sidecache-explain-{}.toml", origin.address.port()));
    std::fs::write(&file, format!("[[upstream]]\nurl = \"http://{}\"\n{RULES}", origin.address)).expect("written");
    let config = file.display().to_string();
    let offline = ["explain", "GET", "/private/x", "-H", "Accept: a", "--offline", "--config", &config];
    let (code, explanation, _) = run(&offline).await;
    std::fs::remove_file(&file).expect("the file exists");
    assert_eq!(code, 0);
    assert!(explanation.contains("passed through (rule-off)") && explanation.contains("--offline"), "{explanation}");
    let (code, _, error) = run(&["explain", "GET", "/", "-H", "nonsense", "--admin", &admin]).await;
    assert_eq!(code, 1);
    assert!(error.contains("'Name: value'"), "{error}");
    assert_eq!(origin.count(), 0);
}
