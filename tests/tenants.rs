//! Credential partitions: a response fetched with one credential is not served to a request with another.

use crate::support::{Origin, Reply, Sidecar};

async fn echo() -> Origin {
    Origin::start(|ask| {
        let credential =
            ["authorization", "cookie", "x-shopify-access-token"].map(|name| ask.header(name).unwrap_or("-"));
        Reply::fresh(60, format!("{} {}", credential.join(","), ask.number)).header("Cache-Control", "public")
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_credential_combination_has_its_own_partition() {
    let origin = echo().await;
    let sidecar = Sidecar::before(&origin, "");
    let tenants: &[&[(&str, &str)]] = &[
        &[],
        &[("Authorization", "Bearer a")],
        &[("Authorization", "Bearer b")],
        &[("Cookie", "Bearer a")],
        &[("X-Shopify-Access-Token", "a")],
        &[("X-Shopify-Access-Token", "b")],
        &[("X-Shopify-Access-Token", "a"), ("Authorization", "Bearer a")],
    ];
    let mut bodies = Vec::new();
    for tenant in tenants {
        bodies.push(sidecar.get_with("/", tenant).await.text());
    }
    assert_eq!(origin.count(), tenants.len());
    for (tenant, body) in tenants.iter().zip(&bodies) {
        let hit = sidecar.get_with("/", tenant).await;
        assert!(hit.is_hit(), "{tenant:?}");
        assert_eq!(hit.text(), *body);
    }
    assert_eq!(origin.count(), tenants.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_shared_across_credentials_only_with_partition_everyone() {
    let rules = "[[upstream.rule]]\npath = \"/shared\"\nttl = \"60s\"\nkey = { partition = \"everyone\" }\n\
                 [[upstream.rule]]\npath = \"/own\"\nttl = \"60s\"\n";
    let origin = echo().await;
    let sidecar = Sidecar::before(&origin, rules);
    for (target, shared) in [("/shared", true), ("/own", false)] {
        sidecar.get_with(target, &[("Authorization", "a")]).await;
        assert_eq!(sidecar.get_with(target, &[("Authorization", "b")]).await.is_hit(), shared, "{target}");
    }
    assert!(sidecar.get_with("/shared", &[("X-Strange-Token", "c")]).await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_credential_header_bypasses_the_cache_until_configured() {
    let origin = echo().await;
    let sidecar = Sidecar::before(&origin, "");
    for _ in 0..2 {
        let answer = sidecar.get_with("/", &[("X-Acme-Token", "a")]).await;
        assert_eq!(answer.cache_status(), "sidecache; fwd=bypass; detail=unkeyed-credential");
    }
    let tables = "[security]\ncredential_headers = [\"x-acme-token\"]\n";
    let configured = Sidecar::with_tables(&origin, "", tables);
    configured.get_with("/", &[("X-Acme-Token", "a")]).await;
    assert!(configured.get_with("/", &[("X-Acme-Token", "a")]).await.is_hit());
    assert!(!configured.get_with("/", &[("X-Acme-Token", "b")]).await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_with_different_credentials_are_not_coalesced() {
    let gate = crate::support::Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| {
        let credential = ask.header("x-api-key").unwrap_or("-").to_owned();
        Reply::fresh(60, credential).after(&held)
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut requests = tokio::task::JoinSet::new();
    for i in 0..20 {
        let (address, key) = (sidecar.address, ["a", "b"][i % 2]);
        requests.spawn(async move { (key, crate::support::get(address, "/", &[("X-Api-Key", key)]).await) });
    }
    origin.wait_for_requests(2).await;
    gate.open();
    for (key, answer) in requests.join_all().await {
        assert_eq!(answer.text(), key);
    }
    assert_eq!(origin.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn equivalent_host_forms_share_an_entry_and_unknown_hosts_get_421() {
    let origin = Origin::start(|ask| Reply::fresh(60, ask.header("host").unwrap_or("-"))).await;
    let port = origin.address.port();
    let text = format!(
        "[[upstream]]\nname = \"api\"\nhosts = [\"http://127.0.0.*:{port}\"]\nlisten = \"127.0.0.1:0\"\n\
         [admin]\nlisten = \"127.0.0.1:0\"\n"
    );
    let sidecar = Sidecar::from_text(&text);
    let named = format!("127.0.0.1:{port}");
    let first = sidecar.get_with("/", &[("Host", &named)]).await;
    assert_eq!(first.text(), named);
    let forwarded = sidecar.get_with("/", &[("Host", "whatever"), ("X-Forwarded-Host", &named)]).await;
    assert!(forwarded.is_hit());
    assert!(sidecar.get(&format!("http://{named}/")).await.is_hit(), "absolute-form");
    for host in ["evil.example", "169.254.169.254"] {
        let refused = sidecar.get_with("/", &[("Host", host)]).await;
        assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (421, Some("misdirected")));
    }
    assert_eq!(origin.count(), 1);
}
