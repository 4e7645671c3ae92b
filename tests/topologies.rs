//! Redis topologies: TLS, Unix socket, Sentinel and Cluster, including failover.

use nix::sys::signal::Signal;
use redis::Commands;

use sidecache::store::redis_tier::PurgedRecords;

use crate::support::redis::{Cluster, Sentinels, cli, folder};
use crate::support::{Origin, Redis, Reply, Sidecar, soon, until};

async fn origin() -> Origin {
    Origin::start(|ask| Reply::fresh(600, ask.target.clone())).await
}

async fn member(origin: &Origin, table: &str) -> Sidecar {
    let sidecar = Sidecar::with_tables(origin, "", table);
    sidecar.in_fleet().await;
    sidecar
}

/// Returns the number of commands that failed or timed out.
fn missed(sidecar: &Sidecar) -> u64 {
    let state = sidecar.shared.fleet.as_ref().expect("a fleet").redis.state();
    state.connections.values().map(|link| link.refused + link.missed + link.lost + link.unasked).sum()
}

/// Checks that entries stored by `one` are hits on `other`, unless a Redis command timed out, and that a purge by `one`
/// reaches `other`.
async fn works(one: &Sidecar, other: &Sidecar, origin: &Origin, name: &str) {
    // A failover starts a new epoch of the log, which makes entries stored earlier unverified.
    one.settled().await;
    other.settled().await;
    // Until the log has read back the purges that they log once more, records are unverified.
    for sidecar in [one, other] {
        let confirmed = || sidecar.shared.invalidations.is_settled().then_some(());
        until("the log has all purges", confirmed).await;
    }
    let mut shared = Vec::new();
    for number in 0..200 {
        let target = format!("/{name}/{number}");
        let missed_before = missed(one) + missed(other);
        one.get(&target).await;
        one.written().await;
        let before = origin.count();
        let answer = other.get(&target).await;
        if answer.is_hit() {
            assert_eq!(origin.count(), before);
            shared.push(number);
        } else {
            let missed = missed(one) + missed(other) - missed_before;
            assert!(missed > 0, "{target}: {}", answer.cache_status());
        }
        if shared.len() == 20 {
            break;
        }
    }
    let [first, second, ..] = shared[..] else { panic!("{name}: nearly all Redis commands timed out") };
    let target = format!("/{name}/{second}");
    one.purge(&format!("{{\"prefixes\":[\"{target}\"]}}")).await;
    soon("the purge reaches the other sidecar", async { while other.get(&target).await.is_hit() {} }).await;
    assert!(other.get(&format!("/{name}/{first}")).await.is_hit());
}

/// Waits until an entry stored by `one` is a hit on `other`.
async fn together_again(one: &Sidecar, other: &Sidecar, name: &str) {
    for number in 0.. {
        let target = format!("/together/{name}/{number}");
        one.get(&target).await;
        one.written().await;
        if soon("a response", other.get(&target)).await.is_hit() {
            return;
        }
        assert!(number < 1_000, "{name}: no entry is shared");
    }
}

/// Requests new targets until Redis has stored 20 more records. Every response must be 200.
async fn used_again(sidecar: &Sidecar, name: &str) {
    let written = || sidecar.shared.fleet.as_ref().expect("a fleet").tier.state().queue.written;
    let before = written();
    let mut number = 0;
    soon("Redis is used again", async {
        while written() < before + 20 {
            number += 1;
            assert_eq!(sidecar.get(&format!("/again/{name}/{number}")).await.status, 200);
        }
    })
    .await;
}

/// Writes a certificate authority, and certificates of it for `localhost` and for a client, into the folder.
fn write_certificates(folder: &std::path::Path) {
    let params = |name: &str| {
        let mut params = rcgen::CertificateParams::new([name.to_owned()]).expect("parameters");
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params
    };
    let ca_key = rcgen::KeyPair::generate().expect("a key");
    let mut ca_params = params("ca.example");
    ca_params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = ca_params.self_signed(&ca_key).expect("a certificate");
    let issuer = rcgen::Issuer::new(ca_params, ca_key);
    let signed = |name: &str| {
        let key = rcgen::KeyPair::generate().expect("a key");
        (params(name).signed_by(&key, &issuer).expect("a certificate").pem(), key.serialize_pem())
    };
    let (server, client) = (signed("localhost"), signed("client"));
    let files = [
        ("ca.pem", &ca.pem()),
        ("server.pem", &server.0),
        ("server.key", &server.1),
        ("client.pem", &client.0),
        ("client.key", &client.1),
    ];
    for (name, text) in files {
        std::fs::write(folder.join(name), text).expect("writable");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_over_tls_works_with_private_ca_and_client_certificate() {
    let folder = folder("tls");
    write_certificates(&folder);
    let path = |name: &str| folder.join(name).display().to_string();
    let port = crate::support::redis::free_port();
    let redis = Redis::with(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &path("server.pem"),
        "--tls-key-file",
        &path("server.key"),
        "--tls-ca-cert-file",
        &path("ca.pem"),
    ]);
    let table = |identity: &str| {
        format!("[redis]\nurl = \"rediss://localhost:{port}\"\ntls = {{ ca = \"{}\"{identity} }}\n", path("ca.pem"))
    };
    let identity = format!(", cert = \"{}\", key = \"{}\"", path("client.pem"), path("client.key"));
    let origin = origin().await;
    let (one, other) = (member(&origin, &table(&identity)).await, member(&origin, &table(&identity)).await);
    works(&one, &other, &origin, "tls").await;
    let without_certificate = Sidecar::with_tables(&origin, "", &table(""));
    until("Redis rejects the connection and the reason is reported", || {
        without_certificate.shared.fleet.as_ref()?.redis.state().trouble
    })
    .await;
    assert_eq!(without_certificate.get("/x").await.status, 200, "requests are served without Redis");
    drop(redis);
    std::fs::remove_dir_all(folder).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_a_tls_cluster_are_verified_by_the_configured_names() {
    let folder = folder("tls-cluster");
    write_certificates(&folder);
    let path = |name: &str| folder.join(name).display().to_string();
    let port = crate::support::redis::free_cluster_port();
    let redis = Redis::cluster_node(&[
        "--tls-port",
        &port.to_string(),
        "--tls-auth-clients",
        "no",
        "--tls-cert-file",
        &path("server.pem"),
        "--tls-key-file",
        &path("server.key"),
        "--tls-ca-cert-file",
        &path("ca.pem"),
        "--tls-cluster",
        "yes",
        "--cluster-announce-ip",
        "127.0.0.1",
    ]);
    cli(&["-p", &redis.port.to_string(), "CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    let table = |names: &str| {
        let ca = path("ca.pem");
        format!("[redis]\nurl = \"rediss-cluster://localhost:{port}\"\ntls = {{ ca = \"{ca}\"{names} }}\n")
    };
    let origin = origin().await;
    let names = table(", names = { \"127.0.0.1\" = \"localhost\" }");
    let (one, other) = (member(&origin, &names).await, member(&origin, &names).await);
    works(&one, &other, &origin, "tls-cluster").await;
    let without_names = Sidecar::with_tables(&origin, "", &table(""));
    until("the certificate does not match the address", || {
        without_names.shared.fleet.as_ref()?.redis.state().trouble
    })
    .await;
    drop(redis);
    std::fs::remove_dir_all(folder).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_url_from_a_secret_carries_user_and_password() {
    let folder = folder("url");
    let redis = Redis::start();
    cli(&["-p", &redis.port.to_string(), "ACL", "SETUSER", "fleet", "on", ">p@ss/word", "~*", "&*", "+@all"]);
    cli(&["-p", &redis.port.to_string(), "ACL", "SETUSER", "default", "off"]);
    let file = folder.join("url");
    std::fs::write(&file, format!("redis://fleet:p%40ss%2Fword@{}\n", redis.address())).expect("writable");
    let origin = origin().await;
    let table = format!("[redis]\nurl = {{ file = \"{}\" }}\n", file.display());
    let (one, other) = (member(&origin, &table).await, member(&origin, &table).await);
    works(&one, &other, &origin, "url").await;
    std::fs::remove_dir_all(folder).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_and_purges_are_shared_over_a_redis_unix_socket() {
    let folder = folder("socket");
    let socket = folder.join("redis.sock").display().to_string();
    let _redis = Redis::with(&["--unixsocket", &socket]);
    let table = format!("[redis]\nurl = \"redis+unix://{socket}\"\n");
    let origin = origin().await;
    let (one, other) = (member(&origin, &table).await, member(&origin, &table).await);
    works(&one, &other, &origin, "socket").await;
    std::fs::remove_dir_all(folder).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_and_purges_are_shared_before_and_after_sentinel_failover() {
    let mut group = Sentinels::start();
    let origin = origin().await;
    let (one, other) = (member(&origin, &group.table()).await, member(&origin, &group.table()).await);
    works(&one, &other, &origin, "sentinel").await;
    group.servers[0].kill();
    used_again(&one, "sentinel").await;
    used_again(&other, "sentinel-too").await;
    assert!(group.servers[1].info("replication").contains("role:master"), "the replica was promoted");
    together_again(&one, &other, "sentinel").await;
    works(&one, &other, &origin, "after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_that_are_silent_or_have_a_password_do_not_keep_a_sidecar_from_redis() {
    let group = Sentinels::start();
    let origin = origin().await;
    // The first one of the list accepts connections and does not reply.
    group.sentinels[0].signal(Signal::SIGSTOP);
    let one = member(&origin, &group.table()).await;
    one.settled().await;
    group.sentinels[0].signal(Signal::SIGCONT);
    for sentinel in &group.sentinels {
        cli(&["-p", &sentinel.port.to_string(), "CONFIG", "SET", "requirepass", "of-sentinels"]);
        cli(&[
            "-p",
            &sentinel.port.to_string(),
            "-a",
            "of-sentinels",
            "SENTINEL",
            "CONFIG",
            "SET",
            "sentinel-pass",
            "of-sentinels",
        ]);
    }
    let file = folder("sentinel-password").join("password");
    std::fs::write(&file, "of-sentinels").expect("a writable folder");
    let table = group.table() + &format!("sentinel_password = {{ file = \"{}\" }}\n", file.display());
    let other = member(&origin, &table).await;
    other.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_and_purges_are_shared_after_cluster_slot_move_and_failover() {
    let mut cluster = Cluster::start();
    let origin = origin().await;
    let (one, other) = (member(&origin, &cluster.table()).await, member(&origin, &cluster.table()).await);
    works(&one, &other, &origin, "cluster").await;

    // Migrates the slot of the coordination keys to another master, key by key.
    let log = "{sidecache}:1:log";
    let from = cluster.owner(log);
    let to = (0..6).find(|i| *i != from && cluster.nodes[*i].info("replication").contains("role:master"));
    let to = to.expect("three masters");
    let slot = cli(&["-p", &cluster.nodes[from].port.to_string(), "CLUSTER", "KEYSLOT", log]).trim().to_owned();
    let id = |node: usize| cli(&["-p", &cluster.nodes[node].port.to_string(), "CLUSTER", "MYID"]).trim().to_owned();
    let (from_id, to_id) = (id(from), id(to));
    let at = |node: usize, words: &[&str]| {
        let port = cluster.nodes[node].port.to_string();
        cli(&[&["-p", &port][..], words].concat())
    };
    at(to, &["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]);
    at(from, &["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]);
    for round in 0..50 {
        let keys = at(from, &["CLUSTER", "GETKEYSINSLOT", &slot, "100"]);
        if keys.trim().is_empty() {
            break;
        }
        let port = cluster.nodes[to].port.to_string();
        for key in keys.lines() {
            at(from, &["MIGRATE", "127.0.0.1", &port, key, "0", "1000"]);
        }
        assert_eq!(one.get(&format!("/moving/{round}")).await.status, 200);
    }
    at(to, &["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
    at(from, &["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
    used_again(&one, "moved").await;
    together_again(&one, &other, "moved").await;
    works(&one, &other, &origin, "moved").await;

    // Kills the new owner of the slot.
    cluster.nodes[to].kill();
    used_again(&one, "failed-over").await;
    used_again(&other, "failed-over-too").await;
    together_again(&one, &other, "failed-over").await;
    works(&one, &other, &origin, "after").await;
    one.purge("{\"all\":true}").await;
    let left = || -> usize {
        let count = |node: &Redis| -> usize {
            let Some(mut observer) = node.try_observer() else { return 0 };
            let keys: Vec<String> = observer.keys("sidecache:1:*").unwrap_or_default();
            keys.len()
        };
        cluster.nodes.iter().map(count).sum()
    };
    until("a scan over all nodes has deleted all records", || (left() == 0).then_some(())).await;
}
