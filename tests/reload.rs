//! Another configuration while requests pass through.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use sidecache::app::App;
use sidecache::app::reload::Origin as ConfigOrigin;
use sidecache::config;
use tokio::sync::watch;

use crate::support::redis::folder;
use crate::support::sidecar::text;
use crate::support::{Client, Origin, Reply, get, send, soon, until};

/// A sidecar that reads its configuration from a file.
struct FromFile {
    address: std::net::SocketAddr,
    admin: std::net::SocketAddr,
    file: PathBuf,
    _stop: watch::Sender<bool>,
}

impl FromFile {
    async fn start(origin: &Origin, rules: &str) -> FromFile {
        let file = folder("reload").join("sidecache.toml");
        std::fs::write(&file, text(origin.address, rules, "")).expect("writable");
        let path = file.clone();
        let load = move || {
            let read = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
            config::from_text("sidecache.toml", &read, path.parent().expect("a folder"))
                .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
        };
        let app = App::bind(load().expect("it is good")).await.expect("free ports");
        app.reload_from(ConfigOrigin { load: Box::new(load), file: Some(file.clone()) });
        let (address, admin) = (app.addresses()[0], app.admin_address().expect("an admin listener"));
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(app.run(stopped));
        FromFile { address, admin, file, _stop: stop }
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.file, text).expect("writable");
    }

    async fn reload(&self) -> crate::support::Answer {
        send(self.admin, "POST", "/reload", &[], b"").await
    }
}

const STORES: &str = "[[upstream.rule]]\nname = \"all\"\npath = \"/**\"\nttl = \"1h\"\n";
const PASSES: &str = "[[upstream.rule]]\nname = \"all\"\npath = \"/**\"\ncache = \"off\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_good_file_counts_from_the_next_request_and_a_bad_one_changes_nothing() {
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let sidecar = FromFile::start(&origin, STORES).await;
    let mut client = Client::connect(sidecar.address).await;
    let mut ask = async || {
        client.ask("GET", "/x", &[], b"").await;
        client.answer_to("GET").await.expect("the connection stays")
    };
    ask().await;
    assert!(ask().await.is_hit());
    sidecar.write(&text(origin.address, PASSES, ""));
    let answer = sidecar.reload().await;
    assert_eq!((answer.status, answer.json()["needs_restart"].clone()), (200, serde_json::json!([])), "{answer:?}");
    assert_eq!(ask().await.cache_status(), "sidecache; fwd=bypass; detail=rule-off");
    sidecar.write(&text(origin.address, "[[upstream.rule]]\npath = \"/**\"\nttl = \"soon\"\n", ""));
    let refused = sidecar.reload().await;
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("sidecache.toml:7:7"), "{}", refused.text());
    assert_eq!(ask().await.cache_status(), "sidecache; fwd=bypass; detail=rule-off", "nothing has changed");
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["components"]["configuration"]["status"], "rejected");
    assert!(get(sidecar.admin, "/metrics", &[]).await.text().contains("sidecache_config_last_reload_successful 0"));
    let metrics = get(sidecar.admin, "/metrics", &[]).await.text();
    let hits = "sidecache_requests_total{upstream=\"api\",rule=\"all\",outcome=\"hit\"} 1";
    assert!(metrics.lines().any(|line| line == hits), "counters go on: {metrics}");
    // What was stored before is still there when the rule is back.
    sidecar.write(&text(origin.address, STORES, ""));
    assert_eq!(sidecar.reload().await.status, 200);
    let hit = ask().await;
    assert!(hit.is_hit() && hit.text() == "0", "{hit:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_a_restart_is_named_and_other_listeners_are_refused() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = FromFile::start(&origin, STORES).await;
    sidecar.write(&text(origin.address, STORES, "[log]\nfilter = \"warn\"\n[memory]\nmax_bytes = \"32MiB\"\n"));
    assert_eq!(sidecar.reload().await.json()["needs_restart"], serde_json::json!(["[log]"]));
    let memory = get(sidecar.admin, "/stats", &[]).await.json()["memory"]["max_bytes"].clone();
    assert_eq!(memory, 32 << 20, "sizes count at once");
    sidecar.write(&text(origin.address, STORES, "").replacen(
        "listen = \"127.0.0.1:0\"",
        "listen = \"127.0.0.1:1\"",
        1,
    ));
    let refused = sidecar.reload().await;
    assert!(refused.status == 422 && refused.text().contains("restart"), "{}", refused.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_is_watched_also_as_a_link_that_moves() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = FromFile::start(&origin, STORES).await;
    // As Kubernetes does it: the file is reached through a link, and the link is replaced.
    let folder = sidecar.file.parent().expect("a folder");
    for (name, rules) in [("one", STORES), ("two", PASSES)] {
        std::fs::create_dir(folder.join(name)).expect("writable");
        std::fs::write(folder.join(name).join("sidecache.toml"), text(origin.address, rules, "")).expect("writable");
    }
    std::fs::remove_file(&sidecar.file).expect("ours");
    std::os::unix::fs::symlink("data/sidecache.toml", &sidecar.file).expect("a link");
    std::os::unix::fs::symlink("one", folder.join("data")).expect("a link");
    std::os::unix::fs::symlink("two", folder.join("data.new")).expect("a link");
    std::fs::rename(folder.join("data.new"), folder.join("data")).expect("moved");
    let taken = async { while !get(sidecar.address, "/x", &[]).await.cache_status().ends_with("detail=rule-off") {} };
    soon("the new file is taken", taken).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_reloads_under_load_fail_nobody_and_close_no_connection() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Arc::new(FromFile::start(&origin, STORES).await);
    let (over, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..8 {
        let (sidecar, over, answered) = (sidecar.clone(), over.clone(), answered.clone());
        clients.spawn(async move {
            let mut client = Client::connect(sidecar.address).await;
            while !over.load(Ordering::Relaxed) {
                let target = format!("/{}", answered.fetch_add(1, Ordering::Relaxed) % (number + 2));
                client.ask("GET", &target, &[], b"").await;
                let answer = client.answer_to("GET").await.expect("the connection stays");
                assert_eq!((answer.status, answer.text().as_str()), (200, "x"));
            }
        });
    }
    let rule = |n: u32| format!("[[upstream.rule]]\npath = \"/{n}/**\"\nttl = \"1m\"\n");
    let huge = (0..500).map(rule).collect::<Vec<_>>().concat();
    let files = [
        (text(origin.address, PASSES, ""), 200),
        (text(origin.address, STORES, ""), 200),
        ("nonsense".to_owned(), 422),
        (text(origin.address, &huge, ""), 200),
    ];
    for n in 0..100 {
        let (file, expected) = &files[n % files.len()];
        sidecar.write(file);
        assert_eq!(sidecar.reload().await.status, *expected, "reload {n}");
    }
    let so_far = answered.load(Ordering::Relaxed);
    until("requests go on", || (answered.load(Ordering::Relaxed) > so_far + 100).then_some(())).await;
    over.store(true, Ordering::Relaxed);
    while let Some(client) = soon("the clients end", clients.join_next()).await {
        client.expect("no request failed");
    }
    assert!(so_far > 100, "{so_far} requests while it was reloading");
}
