//! Invalidation by unsafe requests: entries that a write may have changed are not served afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{Client, Gate, Origin, Reply, Sidecar, until};

const RULES: &str = "[[upstream.rule]]\npath = \"/products/{id}\"\nttl = \"1h\"\nstale_while_revalidate = \"1h\"\n\
                     stale_if_error = \"1h\"\ntags = [\"products\", \"product:{id}\"]\n\
                     [[upstream.rule]]\npath = \"/products\"\nttl = \"1h\"\ntags = [\"products\"]\n\
                     [[upstream.rule]]\npath = \"/other\"\nttl = \"1h\"\n";

/// Starts an origin whose responses name a version, which each write increments.
async fn versioned() -> (Origin, Arc<AtomicUsize>) {
    let version = Arc::new(AtomicUsize::new(0));
    let counter = version.clone();
    let origin = Origin::start(move |ask| match ask.method.as_str() {
        "GET" => Reply::new(200, format!("version {}", counter.load(Ordering::SeqCst))),
        "PATCH" => Reply::new(422, "refused"),
        _ => {
            counter.fetch_add(1, Ordering::SeqCst);
            Reply::new(200, "written")
        }
    })
    .await;
    (origin, version)
}

#[tokio::test(flavor = "multi_thread")]
async fn write_invalidates_its_url_and_tags_for_every_credential() {
    let (origin, _) = versioned().await;
    let sidecar = Sidecar::before(&origin, RULES);
    let tenants = [("X-Api-Key", "a"), ("X-Api-Key", "b")];
    let targets = ["/products/1", "/products/1?fields=id", "/products/2", "/products", "/other"];
    for (round, (method, write)) in [("PUT", "/products/1"), ("DELETE", "/products/1")].into_iter().enumerate() {
        for tenant in tenants {
            for target in targets {
                sidecar.get_with(target, &[tenant]).await;
                assert!(sidecar.get_with(target, &[tenant]).await.is_hit());
            }
        }
        sidecar.send(method, write, "x").await;
        for tenant in tenants {
            for target in targets {
                let answer = sidecar.get_with(target, &[tenant]).await;
                let unaffected = target == "/other";
                assert_eq!(answer.is_hit(), unaffected, "{method} {target}");
                let expected = if unaffected { "version 0".into() } else { format!("version {}", round + 1) };
                assert_eq!(answer.text(), expected, "{method} {target}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn write_rejected_with_422_keeps_the_entry() {
    let (origin, _) = versioned().await;
    let sidecar = Sidecar::before(&origin, RULES);
    sidecar.get("/products/1").await;
    sidecar.send("PATCH", "/products/1", "x").await;
    assert!(sidecar.get("/products/1").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn fetch_started_before_a_write_is_delivered_but_not_stored() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match (ask.method.as_str(), ask.number) {
        ("GET", 0) => Reply::new(200, "before").after(&held),
        ("GET", _) => Reply::new(200, "after"),
        _ => Reply::new(200, "written"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, RULES);
    let address = sidecar.address;
    let early = tokio::spawn(async move { crate::support::get(address, "/products/1", &[]).await });
    origin.wait_for_requests(1).await;
    sidecar.send("PUT", "/products/1", "x").await;
    let during = sidecar.get("/products/1").await;
    assert_eq!(during.text(), "after", "a request after the write does not join the older fetch");
    gate.open();
    assert_eq!(early.await.expect("no panic").text(), "before");
    until("the older fetch has ended", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
    let later = sidecar.get("/products/1").await;
    assert!(later.is_hit() && later.text() == "after");
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_invalidated_by_a_write_is_not_served_stale_on_503() {
    let origin = Origin::start(|ask| match (ask.method.as_str(), ask.number) {
        ("GET", 0) => Reply::new(200, "old"),
        ("GET", _) => Reply::new(503, "down"),
        _ => Reply::new(200, "written"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, RULES);
    sidecar.get("/products/1").await;
    sidecar.send("PUT", "/products/1", "x").await;
    assert_eq!(sidecar.get("/products/1").await.status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn write_invalidates_its_url_even_if_the_client_disconnects() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match ask.method.as_str() {
        "GET" => Reply::new(200, ask.number.to_string()),
        _ => Reply::new(200, "written").after(&held),
    })
    .await;
    let sidecar = Sidecar::before(&origin, RULES);
    sidecar.get("/products/1").await;
    let mut client = Client::connect(sidecar.address).await;
    client.ask("PUT", "/products/1", &[], b"x").await;
    origin.wait_for_requests(2).await;
    drop(client);
    gate.open();
    until("the write is counted", || (sidecar.shared.telemetry.snapshot().writes == 1).then_some(())).await;
    assert!(!sidecar.get("/products/1").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn write_invalidates_the_urls_in_location_and_content_location() {
    let origin = Origin::start(|ask| match ask.method.as_str() {
        "GET" => Reply::fresh(3600, ask.number.to_string()),
        _ => Reply::new(201, "made").header("Location", "/made").header("Content-Location", "/also"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    for target in ["/made", "/also", "/made-up"] {
        sidecar.get(target).await;
    }
    sidecar.send("M-STRANGE", "/list", "x").await;
    for (target, hit) in [("/made", false), ("/also", false), ("/made-up", true)] {
        assert_eq!(sidecar.get(target).await.is_hit(), hit, "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn write_invalidates_tags_of_rules_regardless_of_when_conditions() {
    let rules = "[[upstream.rule]]\npath = \"/products/{id}\"\nttl = \"1h\"\ntags = [\"product:{id}\"]\n\
                 when = { query = { status = \"active\" } }\n\
                 [[upstream.rule]]\npath = \"/also/{id}\"\nttl = \"1h\"\ntags = [\"product:{id}\"]\n";
    let (origin, _) = versioned().await;
    let sidecar = Sidecar::before(&origin, rules);
    for target in ["/products/1?status=active", "/also/1", "/also/2"] {
        sidecar.get(target).await;
        assert!(sidecar.get(target).await.is_hit());
    }
    sidecar.send("PUT", "/products/1", "x").await;
    for (target, hit) in [("/products/1?status=active", false), ("/also/1", false), ("/also/2", true)] {
        assert_eq!(sidecar.get(target).await.is_hit(), hit, "{target}");
    }
}
