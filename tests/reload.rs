//! Configuration reload while requests are served.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use sidecache::app::App;
use sidecache::app::reload::ConfigSource as ConfigOrigin;
use sidecache::config;
use tokio::sync::watch;

use crate::support::process::command;
use crate::support::redis::{folder, free_port};
use crate::support::sidecar::text;
use crate::support::{Answer, Client, Gate, Origin, Redis, Reply, get, send, soon, until};

/// A sidecar that reads its configuration from a file.
struct FromFile {
    address: std::net::SocketAddr,
    admin: std::net::SocketAddr,
    file: PathBuf,
    _stop: watch::Sender<bool>,
}

impl FromFile {
    fn start(origin: &Origin, rules: &str) -> FromFile {
        let file = folder("reload").join("sidecache.toml");
        std::fs::write(&file, text(origin.address, rules, "")).expect("writable");
        let path = file.clone();
        let load = move || {
            let read = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
            config::from_text("sidecache.toml", &read, path.parent().expect("a folder"))
                .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
        };
        let app = App::bind(load().expect("a valid configuration")).expect("free ports");
        app.reload_from(ConfigOrigin { load: Box::new(load), file: Some(file.clone()) });
        let (address, admin) = (app.addresses()[0], app.admin_address().expect("an admin listener"));
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(app.run(stopped));
        FromFile { address, admin, file, _stop: stop }
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.file, text).expect("writable");
    }

    async fn reload(&self) -> Answer {
        send(self.admin, "POST", "/reload", &[], b"").await
    }
}

/// Requests /x on a connection that must stay open.
async fn get_x(client: &mut Client) -> Answer {
    client.ask("GET", "/x", &[], b"").await;
    client.answer_to("GET").await.expect("the connection stays open")
}

const STORES: &str = "[[upstream.rule]]\nname = \"all\"\npath = \"/**\"\nttl = \"1h\"\n";
const PASSES: &str = "[[upstream.rule]]\nname = \"all\"\npath = \"/**\"\ncache = \"off\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn valid_file_applies_from_the_next_request_and_invalid_file_is_rejected() {
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let sidecar = FromFile::start(&origin, STORES);
    let mut client = Client::connect(sidecar.address).await;
    let mut ask = async || get_x(&mut client).await;
    ask().await;
    assert!(ask().await.is_hit());
    sidecar.write(&text(origin.address, PASSES, ""));
    let answer = sidecar.reload().await;
    assert_eq!((answer.status, answer.json()["replaced"].clone()), (200, serde_json::json!([])), "{answer:?}");
    assert_eq!(ask().await.cache_status(), "sidecache; fwd=bypass; detail=rule-off");
    sidecar.write(&text(origin.address, "[[upstream.rule]]\npath = \"/**\"\nttl = \"soon\"\n", ""));
    let refused = sidecar.reload().await;
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("sidecache.toml:7:7"), "{}", refused.text());
    assert_eq!(
        ask().await.cache_status(),
        "sidecache; fwd=bypass; detail=rule-off",
        "the configuration is unchanged"
    );
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["components"]["configuration"]["status"], "rejected");
    assert!(get(sidecar.admin, "/metrics", &[]).await.text().contains("sidecache_config_last_reload_successful 0"));
    let metrics = get(sidecar.admin, "/metrics", &[]).await.text();
    let hits = "sidecache_requests_total{upstream=\"api\",rule=\"all\",outcome=\"hit\"} 1";
    assert!(metrics.lines().any(|line| line == hits), "counters are kept: {metrics}");
    // Entries stored earlier are served again when the rule is restored.
    sidecar.write(&text(origin.address, STORES, ""));
    assert_eq!(sidecar.reload().await.status, 200);
    let hit = ask().await;
    assert!(hit.is_hit() && hit.text() == "0", "{hit:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reloaded_limits_apply_at_once_and_stored_entries_are_kept() {
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let sidecar = FromFile::start(&origin, STORES);
    get(sidecar.address, "/x", &[]).await;
    let sizes = "[memory]\nmax_bytes = \"32MiB\"\nmax_entry_bytes = \"1KiB\"\nmax_inflight_bytes = \"1MiB\"\n\
                 [limits]\nurl = \"64B\"\nconnections = 5\n[shutdown]\ngrace = \"1s\"\n";
    sidecar.write(&text(origin.address, STORES, sizes));
    assert_eq!(sidecar.reload().await.json()["replaced"], serde_json::json!([]));
    let memory = get(sidecar.admin, "/stats", &[]).await.json()["memory"]["max_bytes"].clone();
    assert_eq!(memory, 32 << 20);
    assert!(get(sidecar.address, "/x", &[]).await.is_hit());
    assert_eq!(get(sidecar.address, &format!("/{}", "y".repeat(80)), &[]).await.status, 414);
    let config = get(sidecar.admin, "/config", &[]).await.json();
    assert_eq!(config["limits"]["connections"], 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_adds_and_removes_listeners_and_keeps_existing_connections() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = FromFile::start(&origin, STORES);
    let mut kept = Client::connect(sidecar.address).await;
    let first = text(origin.address, STORES, "");
    let port = free_port();
    let second = format!(
        "[[upstream]]\nname = \"second\"\nurl = \"http://{}\"\nlisten = \"127.0.0.1:{port}\"\n",
        origin.address
    );
    sidecar.write(&format!("{first}[probes]\nlisten = \"127.0.0.1:0\"\n{second}"));
    let answer = sidecar.reload().await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.text().contains(&format!("listening on 127.0.0.1:{port}")), "{}", answer.text());
    let new = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(get(new, "/x", &[]).await.text(), "x");
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert!(health["components"]["upstreams"]["second"].is_object(), "{health}");
    // If a listener can't be bound, the reload is rejected and the listeners bound for it are closed.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let third =
        second.replace("second", "third").replace(&port.to_string(), &taken.local_addr().unwrap().port().to_string());
    sidecar.write(&format!("{first}{third}"));
    let refused = sidecar.reload().await;
    assert!(refused.status == 422 && refused.text().contains("is in use"), "{}", refused.text());
    assert_eq!(get(new, "/x", &[]).await.text(), "x");
    // The listener of a removed upstream is closed; connections of the remaining upstream are unaffected.
    sidecar.write(&first);
    assert!(sidecar.reload().await.text().contains(&format!("no longer listening on 127.0.0.1:{port}")));
    let closed = async { while tokio::net::TcpStream::connect(new).await.is_ok() {} };
    soon("the port is free", closed).await;
    assert_eq!(get_x(&mut kept).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_replaces_the_admin_token_and_the_admin_listener() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = FromFile::start(&origin, STORES);
    let folder = sidecar.file.parent().expect("a folder");
    let with = |token: &str, listen: &str| {
        std::fs::write(folder.join("token"), token).expect("writable");
        text(origin.address, STORES, "").replacen(
            "[admin]\nlisten = \"127.0.0.1:0\"\n",
            &format!("[admin]\nlisten = \"{listen}\"\ntoken = {{ file = \"token\" }}\n"),
            1,
        )
    };
    sidecar.write(&with("canary-one", "127.0.0.1:0"));
    assert_eq!(sidecar.reload().await.status, 200);
    assert_eq!(get(sidecar.admin, "/stats", &[]).await.status, 401);
    let one = [("Authorization", "Bearer canary-one")];
    assert_eq!(get(sidecar.admin, "/stats", &one).await.status, 200);
    // A reload reads the token file again.
    sidecar.write(&with("canary-two", "127.0.0.1:0"));
    assert_eq!(send(sidecar.admin, "POST", "/reload", &one, b"").await.status, 200);
    assert_eq!(get(sidecar.admin, "/stats", &one).await.status, 401);
    let two = [("Authorization", "Bearer canary-two")];
    let moved = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    sidecar.write(&with("canary-two", &moved.to_string()));
    assert_eq!(
        send(sidecar.admin, "POST", "/reload", &two, b"").await.status,
        200,
        "the old listener still sends its response"
    );
    assert_eq!(get(moved, "/stats", &two).await.status, 200);
    let closed = async { while tokio::net::TcpStream::connect(sidecar.admin).await.is_ok() {} };
    soon("the old listener is closed", closed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_with_another_redis_or_secret_empties_the_cache() {
    let (one, other) = (Redis::start(), Redis::start());
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let sidecar = FromFile::start(&origin, STORES);
    let mut client = Client::connect(sidecar.address).await;
    let mut ask = async || get_x(&mut client).await;
    let secret = "[security]\nsecret = { env = \"PATH\" }\n";
    for (number, table) in [one.table(), other.table(), other.table() + secret].iter().enumerate() {
        ask().await;
        assert!(ask().await.is_hit());
        sidecar.write(&text(origin.address, STORES, table));
        let answer = sidecar.reload().await;
        assert!(answer.text().contains("the cache starts empty"), "{}", answer.text());
        let fetched = ask().await;
        assert!(!fetched.is_hit(), "{number}: {fetched:?}");
        let redis = if number == 0 { &one } else { &other };
        until("the record is in the configured Redis", || (!redis.keys("sidecache:1:s:*").is_empty()).then_some(()))
            .await;
    }
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["components"]["redis"]["place"], format!("127.0.0.1:{}", other.port));
    sidecar.write(&text(origin.address, STORES, ""));
    assert_eq!(sidecar.reload().await.status, 200);
    assert_eq!(get(sidecar.admin, "/health", &[]).await.json()["components"]["redis"]["status"], "off");
    // Connections to a Redis that is no longer configured are closed.
    let mut observer = one.observer();
    until("only the observer is connected", || {
        let clients: String = redis::cmd("CLIENT").arg("LIST").query(&mut observer).expect("a reply");
        (clients.lines().count() == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_replaces_the_certificate_for_new_connections() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let (one, other) = (folder("tls"), folder("tls"));
    let (first, trusts_first) = crate::protocols::certificate(&one);
    let (second, trusts_second) = crate::protocols::certificate(&other);
    let sidecar = FromFile::start(&origin, &first);
    let handshake_succeeds = async |config: &rustls::ClientConfig| {
        let stream = tokio::net::TcpStream::connect(sidecar.address).await.expect("a listener");
        let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
        tokio_rustls::TlsConnector::from(Arc::new(config.clone())).connect(name, stream).await.is_ok()
    };
    assert!(handshake_succeeds(&trusts_first).await && !handshake_succeeds(&trusts_second).await);
    sidecar.write(&text(origin.address, &second, ""));
    assert_eq!(sidecar.reload().await.status, 200);
    assert!(!handshake_succeeds(&trusts_first).await && handshake_succeeds(&trusts_second).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_changes_the_log_filter_and_format() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let file = folder("log").join("sidecache.toml");
    std::fs::write(&file, text(origin.address, "", "")).expect("writable");
    let mut child = command(&["--config", &file.display().to_string()]).spawn().expect("the program starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut log = BufReader::new(child.stderr.take().expect("piped")).lines();
    let mut line = async |of: &str| loop {
        let line = soon("a line", out.next_line()).await.expect("readable").expect("another line");
        if let Some((_, rest)) = line.split_once(of) {
            let word = rest.split(' ').next().expect("an address");
            break word.parse::<std::net::SocketAddr>().expect("an address");
        }
    };
    let (address, admin) = (line("upstream=api addr=").await, line("admin addr=").await);
    std::fs::write(&file, text(origin.address, "", "[log]\nfilter = \"sidecache=debug\"\nformat = \"json\"\n"))
        .expect("writable");
    assert_eq!(send(admin, "POST", "/reload", &[], b"").await.status, 200);
    get(address, "/x", &[]).await;
    assert!(get(address, "/x", &[]).await.is_hit());
    let hit_logged = async {
        loop {
            let line = log.next_line().await.expect("readable").expect("another line");
            let entry: Option<serde_json::Value> = serde_json::from_str(&line).ok();
            if entry.is_some_and(|entry| entry["outcome"] == "hit") {
                break;
            }
        }
    };
    soon("a hit is logged as JSON", hit_logged).await;
    child.kill().await.expect("our own process");
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_symlink_to_the_configuration_file_triggers_a_reload() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = FromFile::start(&origin, STORES);
    // Kubernetes mounts a ConfigMap behind a symbolic link, and replaces the link on an update.
    let folder = sidecar.file.parent().expect("a folder");
    for (name, rules) in [("one", STORES), ("two", PASSES)] {
        std::fs::create_dir(folder.join(name)).expect("writable");
        std::fs::write(folder.join(name).join("sidecache.toml"), text(origin.address, rules, "")).expect("writable");
    }
    std::fs::remove_file(&sidecar.file).expect("the file exists");
    std::os::unix::fs::symlink("data/sidecache.toml", &sidecar.file).expect("a link");
    std::os::unix::fs::symlink("one", folder.join("data")).expect("a link");
    std::os::unix::fs::symlink("two", folder.join("data.new")).expect("a link");
    std::fs::rename(folder.join("data.new"), folder.join("data")).expect("moved");
    let taken = async { while !get(sidecar.address, "/x", &[]).await.cache_status().ends_with("detail=rule-off") {} };
    soon("the new configuration applies", taken).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_reloads_under_load_fail_no_request_and_close_no_connection() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = Arc::new(FromFile::start(&origin, STORES));
    let (done, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..8 {
        let (sidecar, done, answered) = (sidecar.clone(), done.clone(), answered.clone());
        clients.spawn(async move {
            let mut client = Client::connect(sidecar.address).await;
            while !done.load(Ordering::Relaxed) {
                let target = format!("/{}", answered.fetch_add(1, Ordering::Relaxed) % (number + 2));
                client.ask("GET", &target, &[], b"").await;
                let answer = client.answer_to("GET").await.expect("the connection stays open");
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
    until("requests continue", || (answered.load(Ordering::Relaxed) > so_far + 100).then_some(())).await;
    done.store(true, Ordering::Relaxed);
    while let Some(client) = soon("the clients end", clients.join_next()).await {
        client.expect("no request failed");
    }
    assert!(so_far > 100, "{so_far} requests during the reloads");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_stored_with_other_tags_or_cache_key_are_misses_after_reload() {
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let rule = |lines: &str| format!("[[upstream.rule]]\nname = \"all\"\npath = \"/**\"\nttl = \"1h\"\n{lines}\n");
    let sidecar = FromFile::start(&origin, &rule(""));
    get(sidecar.address, "/x", &[]).await;
    sidecar.write(&text(origin.address, &rule("tags = [\"products\"]"), ""));
    assert_eq!(sidecar.reload().await.status, 200);
    assert!(!get(sidecar.address, "/x", &[]).await.is_hit(), "the entry does not have the new tag");
    sidecar.write(&text(origin.address, &rule("key = { query = [\"*\", \"!page\"] }"), ""));
    assert_eq!(sidecar.reload().await.status, 200);
    get(sidecar.address, "/x?page=2", &[]).await;
    assert!(get(sidecar.address, "/x", &[]).await.is_hit());
    sidecar.write(&text(origin.address, &rule("key = { query = [\"*\", \"!other\"] }"), ""));
    assert_eq!(sidecar.reload().await.status, 200);
    assert!(!get(sidecar.address, "/x", &[]).await.is_hit(), "the entry was stored under another key");
}

#[tokio::test(flavor = "multi_thread")]
async fn write_started_before_a_reload_invalidates_entries_stored_after_it() {
    let (gate, version) = (Gate::new(), Arc::new(AtomicUsize::new(1)));
    let (opened, current) = (gate.clone(), version.clone());
    let origin = Origin::start(move |ask| match ask.method.as_str() {
        "PUT" => Reply::new(200, "done").after(&opened),
        _ => Reply::new(200, current.load(Ordering::SeqCst).to_string()),
    })
    .await;
    let sidecar = FromFile::start(&origin, STORES);
    let address = sidecar.address;
    let write = tokio::spawn(async move { send(address, "PUT", "/x", &[], b"x").await });
    until("the write has reached the origin", || (origin.count() == 1).then_some(())).await;
    sidecar.write(&text(origin.address, STORES, "[security]\nsecret = { env = \"PATH\" }\n"));
    assert_eq!(sidecar.reload().await.status, 200);
    assert_eq!(get(address, "/x", &[]).await.text(), "1");
    assert!(get(address, "/x", &[]).await.is_hit());
    version.store(2, Ordering::SeqCst);
    gate.open();
    assert_eq!(soon("the write ends", write).await.expect("no panic").status, 200);
    assert_eq!(get(address, "/x", &[]).await.text(), "2", "the write invalidates the new cache");
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_keep_counters_and_removing_redis_ends_the_fleet_mode() {
    let redis = Redis::start();
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let sidecar = FromFile::start(&origin, STORES);
    for _ in 0..3 {
        get(sidecar.address, "/x", &[]).await;
    }
    let counted = async || {
        let metrics = get(sidecar.admin, "/metrics", &[]).await.text();
        let hits = "sidecache_requests_total{upstream=\"api\",rule=\"all\",outcome=\"hit\"} ";
        metrics.lines().find_map(|line| line.strip_prefix(hits)?.parse::<u64>().ok())
    };
    assert_eq!(counted().await, Some(2));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let probes = format!("[probes]\nlisten = \"{}\"\n", taken.local_addr().expect("bound"));
    sidecar.write(&text(origin.address, STORES, &probes));
    for _ in 0..3 {
        assert_eq!(sidecar.reload().await.status, 422);
    }
    assert_eq!(counted().await, Some(2));
    sidecar.write(&text(origin.address, STORES, &redis.patient_table()));
    assert_eq!(sidecar.reload().await.status, 200);
    assert_eq!(counted().await, Some(2));
    assert_eq!(get(sidecar.admin, "/stats", &[]).await.json()["rules"][0]["requests"], 3);
    let json = [("Content-Type", "application/json")];
    let bypass =
        async || send(sidecar.admin, "POST", "/mode", &json, br#"{"mode":"bypass","fleet":true}"#).await.status;
    soon("the fleet mode is set", async { while bypass().await != 200 {} }).await;
    sidecar.write(&text(origin.address, STORES, ""));
    assert_eq!(sidecar.reload().await.status, 200);
    let normal = async || get(sidecar.admin, "/health", &[]).await.json()["mode"]["mode"] == "normal";
    soon("the fleet mode ends", async { while !normal().await {} }).await;
}
