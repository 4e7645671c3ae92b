//! `explain` says what the running sidecar would do, and why.

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
async fn it_names_rule_key_tags_and_state() {
    let origin = Origin::start(|_| Reply::new(200, "{}")).await;
    let sidecar = Sidecar::before(&origin, RULES);
    let asked = json!({
        "method": "GET", "url": "/products/7.json?a=b",
        "headers": [["Authorization", "Bearer x"], ["Accept-Language", "de"]],
    });
    let told = explain(&sidecar, asked.clone()).await;
    assert_eq!(told["rule"], "product (path /products/{id}.json)");
    assert_eq!(told["decision"], "a fetch: nothing is stored for it here");
    assert_eq!(told["tags"], json!(["product:7"]));
    assert_eq!(told["key"]["tenant"], "those with the same authorization");
    assert_eq!(told["key"]["headers"], json!(["accept-language: de"]));
    assert!(!told.to_string().contains("Bearer"), "{told}");
    assert_eq!(origin.count(), 0, "nothing was sent");
    let lines = [("Authorization", "Bearer x"), ("Accept-Language", "de")];
    let answer = sidecar.get_with("/products/7.json?a=b", &lines).await;
    assert_eq!(answer.status, 200);
    let told = explain(&sidecar, asked.clone()).await;
    assert_eq!(told["decision"], "a hit");
    assert!(told["entry"]["ttl_seconds"].as_i64() >= Some(50), "{told}");
    let hit = sidecar.get_with("/products/7.json?a=b", &lines).await;
    let key = format!("key={}", told["key"]["name"]);
    assert!(hit.header("cache-status").expect("it says").ends_with(&key), "the same key as the hit's");
    sidecar.turn(100);
    let told = explain(&sidecar, asked).await;
    assert!(told["decision"].as_str().expect("text").contains("stale"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_why_something_is_not_cached() {
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
        let told = explain(&sidecar, request).await;
        assert_eq!(told["decision"], format!("passed through ({reason})"), "{told}");
        assert!(told["why"].as_str().is_some_and(|why| why.len() > 20), "{told}");
    }
    let long = format!("/{}", "a".repeat(9000));
    for (request, refusal) in [
        (json!({ "url": long }), "refused with 414 (url_too_long)"),
        (json!({ "method": "TRACE", "url": "/" }), "refused with 405 (method_not_allowed)"),
    ] {
        assert_eq!(explain(&sidecar, request).await["decision"], refusal);
    }
    sidecar.get("/other").await;
    let told = explain(&sidecar, json!({ "url": "/other" })).await;
    let why = told["not_stored"].as_str().expect("why");
    assert!(why.contains("private") && why.contains("not collapsed for 1"), "{why}");
    let lines = [("Content-Type", "application/json")];
    for wrong in ["{\"url\":\"a b\"}", "{\"url\":\"/\",\"upstream\":\"none\"}", "{\"link\":1}", "nonsense"] {
        let answer = send(sidecar.admin, "POST", "/explain", &lines, wrong.as_bytes()).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &"bad_request".into()), "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_asks_the_running_one_or_reads_the_file() {
    let origin = Origin::start(|_| Reply::new(200, "{}")).await;
    let sidecar = Sidecar::before(&origin, RULES);
    let admin = format!("http://{}", sidecar.admin);
    let url = format!("http://{}/products/7.json", sidecar.address);
    let (code, told, _) = run(&["explain", "GET", &url, "--admin", &admin]).await;
    assert_eq!(code, 0);
    assert!(told.contains("product (path /products/{id}.json)") && told.contains("product:7"), "{told}");
    assert!(told.contains("nothing is stored") && told.contains("breaker"), "{told}");
    let file = std::env::temp_dir().join(format!("sidecache-explain-{}.toml", origin.address.port()));
    std::fs::write(&file, format!("[[upstream]]\nurl = \"http://{}\"\n{RULES}", origin.address)).expect("written");
    let config = file.display().to_string();
    let offline = ["explain", "GET", "/private/x", "-H", "Accept: a", "--offline", "--config", &config];
    let (code, told, _) = run(&offline).await;
    std::fs::remove_file(&file).expect("it was there");
    assert_eq!(code, 0);
    assert!(told.contains("passed through (rule-off)") && told.contains("--offline"), "{told}");
    let (code, _, error) = run(&["explain", "GET", "/", "-H", "nonsense", "--admin", &admin]).await;
    assert_eq!(code, 1);
    assert!(error.contains("'Name: value'"), "{error}");
    assert_eq!(origin.count(), 0);
}
