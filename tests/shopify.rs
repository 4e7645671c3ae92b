//! The Shopify profile with the mock shop: pagination, rate limits, writes, credential partitions, large integers.

use std::sync::Arc;

use sidecache::clock::Clock;
use sidecache::demo::catalogue::{FIRST_ID, product_id};
use sidecache::demo::shop;
use sidecache::demo::shop::{Faults, Options, Shop, TOKENS};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::support::{Answer, Sidecar, send};

struct Setup {
    address: std::net::SocketAddr,
    shop: Arc<Shop>,
    sidecar: Sidecar,
    _stop: watch::Sender<bool>,
}

const API: &str = "/admin/api/2026-07";

impl Setup {
    async fn start(faults: Faults) -> Setup {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let options = Options { products: 12, bucket: 40, leak: 2.0, faults };
        let shop = Arc::new(Shop::new(options, Clock::start()));
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(shop::serve(listener, shop.clone(), stopped));
        let text = format!(
            "[[upstream]]\nprofile = \"shopify\"\nurl = \"http://{address}\"\nlisten = \"127.0.0.1:0\"\n\
             [admin]\nlisten = \"127.0.0.1:0\"\n"
        );
        Setup { address, shop, sidecar: Sidecar::from_text(&text), _stop: stop }
    }

    async fn ask(&self, method: &str, target: &str, token: &str, body: &str) -> Answer {
        let lines = [("X-Shopify-Access-Token", token), ("Content-Type", "application/json")];
        send(self.sidecar.address, method, &format!("{API}{target}"), &lines, body.as_bytes()).await
    }

    async fn get(&self, target: &str) -> Answer {
        self.ask("GET", target, TOKENS[0], "").await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn following_pagination_links_twice_fetches_each_page_once() {
    let setup = Setup::start(Faults::default()).await;
    for round in 0..2 {
        let mut target = format!("{API}/products.json?limit=5");
        let mut ids = Vec::new();
        for page in 0..3 {
            let answer = setup.get(target.strip_prefix(API).expect("the API")).await;
            assert_eq!(answer.is_hit(), round == 1, "page {page}: {}", answer.cache_status());
            let products = answer.json()["products"].as_array().expect("a list").clone();
            ids.extend(products.iter().map(|p| p["id"].as_u64().expect("an id")));
            let link = answer.header("link").expect("a Link header");
            let next = link.split(", ").find(|part| part.ends_with("; rel=\"next\""));
            assert_eq!(next.is_some(), page < 2, "{link}");
            if let Some(next) = next {
                let url = next.trim_start_matches('<').split('>').next().expect("a URL");
                target =
                    url.strip_prefix(&format!("http://{}", setup.sidecar.address)).expect("our address").to_owned();
            }
        }
        assert_eq!(ids, (0..12).map(|i| product_id(0, i)).collect::<Vec<_>>());
    }
    assert_eq!(setup.shop.requests(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_integers_and_header_case_are_preserved() {
    let setup = Setup::start(Faults::default()).await;
    for _ in 0..2 {
        let answer = setup.get(&format!("/products/{FIRST_ID}.json")).await;
        assert!(answer.text().contains(&format!("\"id\":{FIRST_ID},")));
        assert!(
            answer.headers.iter().any(|(name, value)| name == "X-Shopify-Shop-Api-Call-Limit" && value == "1/40")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn write_invalidates_the_product_and_its_lists_for_every_token() {
    let setup = Setup::start(Faults::default()).await;
    let one = format!("/products/{FIRST_ID}.json");
    for token in &TOKENS[..2] {
        setup.ask("GET", &one, token, "").await;
        setup.ask("GET", "/products.json?limit=5", token, "").await;
    }
    let body = format!("{{\"product\":{{\"id\":{FIRST_ID},\"title\":\"Renamed\"}}}}");
    assert_eq!(setup.ask("PUT", &one, TOKENS[0], &body).await.status, 200);
    for token in &TOKENS[..2] {
        assert_eq!(setup.ask("GET", &one, token, "").await.json()["product"]["title"], "Renamed");
        let page = setup.ask("GET", "/products.json?limit=5", token, "").await;
        assert_eq!(page.json()["products"][0]["title"], "Renamed");
    }
    let made = setup.ask("POST", "/products.json", TOKENS[0], "{\"product\":{\"title\":\"New\"}}").await;
    assert_eq!(made.status, 201);
    assert_eq!(setup.get("/products/count.json").await.json()["count"], 13);
    let id = made.json()["product"]["id"].as_u64().expect("an id");
    assert_eq!(setup.ask("DELETE", &format!("/products/{id}.json"), TOKENS[0], "").await.status, 200);
    assert_eq!(setup.get("/products/count.json").await.json()["count"], 12);
    assert_eq!(setup.get(&format!("/products/{id}.json")).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn shops_have_separate_entries_and_an_invalid_token_gets_401() {
    let setup = Setup::start(Faults::default()).await;
    let first = setup.ask("GET", "/shop.json", TOKENS[0], "").await.text();
    let other = setup.ask("GET", "/shop.json", TOKENS[2], "").await.text();
    assert_ne!(first, other);
    assert_eq!(setup.ask("GET", "/shop.json", "wrong", "").await.status, 401);
    assert!(setup.ask("GET", "/shop.json", TOKENS[2], "").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn resources_outside_the_shopify_profile_are_passed_through() {
    let setup = Setup::start(Faults::default()).await;
    for _ in 0..2 {
        let orders = setup.get("/orders.json").await;
        assert_eq!((orders.status, orders.cache_status().as_str()), (200, "sidecache; fwd=bypass; detail=rule-off"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limit_delays_reads_and_is_reported_to_writes_as_429() {
    let setup = Setup::start(Faults::default()).await;
    for n in 0..42 {
        assert_eq!(setup.get("/orders.json").await.status, 200, "{n}");
    }
    let stats = setup.sidecar.stats().await;
    assert!(stats["requests"]["throttles_absorbed"].as_u64() >= Some(1), "{stats}");
    let target = format!("/products/{}.json", product_id(0, 0));
    let mut throttled = None;
    for _ in 0..60 {
        let answer = setup.ask("PUT", &target, TOKENS[0], "{\"product\":{\"title\":\"new\"}}").await;
        if answer.status == 429 {
            throttled = Some(answer);
            break;
        }
    }
    let throttled = throttled.expect("a 429 response");
    assert_eq!(throttled.header("Retry-After"), Some("1.0"));
    assert_eq!(throttled.header("X-Shopify-Shop-Api-Call-Limit"), Some("40/40"));
    assert!(throttled.json()["errors"].as_str().expect("text").starts_with("Exceeded 2 calls per second"));
}

#[tokio::test(flavor = "multi_thread")]
async fn shop_faults_reach_uncached_requests_and_stale_entries_cover_errors() {
    let setup = Setup::start(Faults::default()).await;
    let one = format!("/products/{FIRST_ID}.json");
    setup.get(&one).await;
    let faults =
        [(r#"{"errors":1.0}"#, 503, "5xx"), (r#"{"truncated":1.0}"#, 502, ""), (r#"{"resets":1.0}"#, 502, "connect")];
    for (faults, status, cause) in faults {
        let shop = setup.ask("POST", "/orders.json", TOKENS[0], "").await;
        assert!(shop.status < 500);
        let set = send(setup.address, "POST", "/__faults", &[], faults.as_bytes()).await;
        assert_eq!(set.status, 200, "{}", set.text());
        let mut client = crate::support::Client::connect(setup.sidecar.address).await;
        client.ask("GET", &format!("{API}/orders.json"), &[("X-Shopify-Access-Token", TOKENS[0])], b"").await;
        let raw = client.answer_to("GET").await;
        assert_eq!(raw.map(|answer| answer.status), Some(status), "{faults}");
        if !faults.contains("truncated") {
            setup.sidecar.turn(600);
            let covered = setup.get(&one).await;
            assert_eq!(covered.status, 200);
            assert!(
                covered.cache_status().contains(&format!("stale-if-error; cause=\"{cause}\"")),
                "{}",
                covered.cache_status()
            );
        }
        send(setup.address, "POST", "/__faults", &[], b"{}").await;
    }
}
