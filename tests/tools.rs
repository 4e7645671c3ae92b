//! Command-line tools that talk to a running sidecar, run as processes.

use crate::support::process::run as sidecache;
use crate::support::{Origin, Reply, Sidecar, get};

fn admin(sidecar: &Sidecar) -> String {
    format!("http://{}", sidecar.admin)
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_command_fetches_a_url_list_within_the_upstream_budget() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/bad" => Reply::new(404, "x"),
        "/private" => Reply::new(200, "x").header("Cache-Control", "private"),
        _ => Reply::fresh(60, "x"),
    })
    .await;
    // A burst of two and a short `max_wait`: the third request is refused and must be retried.
    let rules = "budget = { rate = \"4/s\", burst = 2, max_wait = \"10ms\" }\n";
    let sidecar = Sidecar::before(&origin, rules);
    let list = std::env::temp_dir().join(format!("sidecache-warm-{}", sidecar.admin.port()));
    std::fs::write(&list, "# a list\n/a\n/b\n/a\n/private\n").expect("writable");
    let (to, from, list) = (format!("http://{}", sidecar.address), admin(&sidecar), list.display().to_string());
    let (code, output, errors) = sidecache(&["warm", &list, "--to", &to, "--admin", &from, "--jobs", "1"]).await;
    assert_eq!((code, output.trim()), (0, "1 not stored: private, 2 stored, 1 stored before"), "{errors}");
    assert!(sidecar.get("/b").await.is_hit());
    std::fs::write(&list, "/bad\n").expect("writable");
    let (code, output, _) = sidecache(&["warm", &list, "--to", &to]).await;
    assert_eq!((code, output.trim()), (1, "1 failed: 404"));
    std::fs::write(&list, "products\n").expect("writable");
    let (code, _, errors) = sidecache(&["warm", &list, "--to", &to]).await;
    assert!(code == 1 && errors.contains("line 1"), "{errors}");
    std::fs::remove_file(list).expect("the file exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn suggest_prints_rules_for_repeated_fetches_and_dry_run_changes_nothing() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Sidecar::before(&origin, "budget = { rate = \"1000/s\", burst = 10 }\n");
    for target in ["/products/1", "/products/1", "/products/1", "/products/2", "/once"] {
        sidecar.get(target).await;
    }
    let admin = admin(&sidecar);
    let (code, output, _) = sidecache(&["suggest", "--admin", &admin, "--ttl", "5m"]).await;
    assert_eq!(code, 0);
    assert!(output.contains("# saves 2 of 4 calls (now: no-freshness)"), "{output}");
    assert!(output.contains("path = \"/products/{id}\"\nttl = \"5m\""), "{output}");
    assert!(!output.contains("/once"), "{output}");
    let (code, output, _) = sidecache(&["mode", "bypass", "--dry-run", "--admin", &admin]).await;
    assert!(
        code == 0 && output.contains("within the configured budget") && output.contains("nothing was changed"),
        "{output}"
    );
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["mode"]["mode"], "normal");
    let (code, output, _) = sidecache(&["mode", "shadow", "--for", "5m", "--admin", &admin]).await;
    assert!(code == 0 && output.starts_with("mode shadow (set by: local) for another"), "{output}");
    let (code, _, errors) = sidecache(&["mode", "bypass", "--fleet", "--admin", &admin]).await;
    assert!(code == 1 && errors.contains("needs [redis]"), "{errors}");
    let (code, output, _) = sidecache(&["health", "--ready", "--admin", &admin]).await;
    assert_eq!((code, output.trim()), (0, "ready"));
    drop(sidecar);
    let (code, ..) = sidecache(&["health", "--ready", "--admin", "http://127.0.0.1:9"]).await;
    assert_eq!(code, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_man_and_check_commands_succeed() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, output, _) = sidecache(&["completions", shell]).await;
        assert!(code == 0 && output.contains("suggest") && output.contains("dry-run"), "{shell}");
    }
    let (code, output, _) = sidecache(&["man"]).await;
    assert!(code == 0 && output.contains(".TH sidecache 1"), "{output}");
    let folder = crate::support::redis::folder("man");
    let (code, ..) = sidecache(&["man", "--dir", &folder.display().to_string()]).await;
    assert!(code == 0 && folder.join("sidecache-purge.1").exists());
    let (code, output, _) = sidecache(&["check", "config.example.toml"]).await;
    assert_eq!((code, output.lines().last()), (0, Some("config.example.toml: ok")), "{output}");
}
