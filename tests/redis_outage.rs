//! Redis failures: no client request fails, and Redis is used again after recovery.

use nix::sys::signal::Signal;
use redis::Commands;

use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::process::{command, run};
use crate::support::redis::folder;
use crate::support::sidecar::text;
use crate::support::{Chaos, Mood, Origin, Redis, Reply, Sidecar, get, soon, until};

async fn before(table: &str) -> (Origin, Sidecar) {
    let origin = Origin::start(|ask| Reply::fresh(60, ask.number.to_string())).await;
    let sidecar = Sidecar::with_tables(&origin, "", table);
    (origin, sidecar)
}

fn redis_state(sidecar: &Sidecar) -> sidecache::redis::RedisState {
    sidecar.shared.fleet.as_ref().expect("a fleet").redis.state()
}

/// Requests new targets until Redis is written to and read again.
async fn used_again(sidecar: &Sidecar, name: &str) {
    let state = || sidecar.shared.fleet.as_ref().expect("a fleet").tier.state();
    let before = state();
    let mut number = 0;
    soon("Redis is used again", async {
        while state().queue.written == before.queue.written || state().misses == before.misses {
            number += 1;
            assert_eq!(sidecar.get(&format!("/again/{name}/{number}")).await.status, 200);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sidecar_starts_without_redis_and_uses_it_once_available() {
    let mut redis = Redis::start();
    redis.kill();
    let (_origin, sidecar) = before(&redis.table()).await;
    assert_eq!(sidecar.get("/x").await.status, 200);
    assert!(sidecar.get("/x").await.is_hit());
    let health = get(sidecar.admin, "/health", &[]).await.json();
    until("the trouble is reported", || redis_state(&sidecar).trouble).await;
    assert!(health["components"]["redis"]["status"] != "ok", "{health}");
    assert_eq!(get(sidecar.admin, "/readyz", &[]).await.status, 200, "readiness does not depend on Redis");
    redis.restart();
    sidecar.in_fleet().await;
    used_again(&sidecar, "start").await;
    until("no trouble is reported", || redis_state(&sidecar).trouble.is_none().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_outage_fails_no_request_and_redis_is_used_after_recovery() {
    let mut redis = Redis::start();
    let chaos = Chaos::before(redis.address()).await;
    let (_origin, sidecar) = before(&chaos.table()).await;
    sidecar.in_fleet().await;
    sidecar.get("/warm").await;
    for fault in ["kill", "stop", "black hole", "refused", "cut"] {
        match fault {
            "kill" => redis.kill(),
            "stop" => redis.signal(Signal::SIGSTOP),
            "black hole" => chaos.set(Mood::BlackHole),
            "refused" => chaos.set(Mood::Refuses),
            _ => chaos.cut(),
        }
        for number in 0..20 {
            assert_eq!(sidecar.get(&format!("/{fault}/{number}").replace(' ', "-")).await.status, 200, "{fault}");
            assert!(sidecar.get("/warm").await.is_hit(), "{fault}");
        }
        match fault {
            "kill" => redis.restart(),
            "stop" => redis.signal(Signal::SIGCONT),
            _ => chaos.set(Mood::Fine),
        }
        used_again(&sidecar, &fault.replace(' ', "-")).await;
        // A restarted Redis has a new log: entries stored earlier become unverified once the sidecar notices.
        sidecar.level_with(&redis).await;
        sidecar.get("/warm").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unresponsive_redis_opens_the_breaker_and_recovery_closes_it() {
    let redis = Redis::start();
    let (_origin, sidecar) = before(&redis.table()).await;
    sidecar.in_fleet().await;
    redis.signal(Signal::SIGSTOP);
    for number in 0..50 {
        assert_eq!(sidecar.get(&format!("/{number}")).await.status, 200);
    }
    let state = redis_state(&sidecar);
    let reader = &state.connections["reader"];
    assert!(reader.missed <= 5, "{reader:?}");
    assert_eq!(reader.breaker, "open");
    redis.signal(Signal::SIGCONT);
    used_again(&sidecar, "silence").await;
    assert_eq!(redis_state(&sidecar).connections["reader"].breaker, "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_errors_fail_no_client_request_and_redis_is_used_again() {
    let redis = Redis::start();
    let mut observer = redis.observer();
    let _: () = observer.set("filler", vec![b'x'; 1 << 20]).expect("written");
    let faults: [(&str, &[&str], &[&str]); 6] = [
        ("OOM", &["CONFIG SET maxmemory 1", "CONFIG SET maxmemory-policy noeviction"], &["CONFIG SET maxmemory 0"]),
        ("READONLY", &["REPLICAOF 127.0.0.1 1"], &["REPLICAOF NO ONE"]),
        ("NOPERM", &["ACL SETUSER default -@all +acl +hello +select +time"], &["ACL SETUSER default +@all"]),
        ("NOAUTH", &["CONFIG SET requirepass x", "CLIENT KILL TYPE normal SKIPME yes"], &["CONFIG SET requirepass "]),
        (
            "maxclients",
            &["CONFIG SET maxclients 1", "CLIENT KILL TYPE normal SKIPME yes"],
            &["CONFIG SET maxclients 10000"],
        ),
        ("CLIENT KILL", &["CLIENT KILL TYPE normal SKIPME yes"], &[]),
    ];
    let (_origin, sidecar) = before(&redis.table()).await;
    sidecar.in_fleet().await;
    for (name, fault, repair) in faults {
        let mut run = |commands: &[&str]| {
            for words in commands {
                let mut command = redis::Cmd::new();
                for word in words.split(' ') {
                    command.arg(word);
                }
                command.exec(&mut observer).unwrap_or_else(|e| panic!("{words}: {e}"));
            }
        };
        run(fault);
        for number in 0..20 {
            let answer = sidecar.get(&format!("/{}/{number}", name.replace(' ', "-"))).await;
            assert_eq!(answer.status, 200, "{name}");
        }
        run(repair);
        used_again(&sidecar, &name.replace(' ', "-")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_password_file_is_read_again_on_reconnect() {
    let redis = Redis::start();
    let folder = folder("password");
    let file = folder.join("password");
    std::fs::write(&file, "first\n").expect("writable");
    let mut observer = redis.observer();
    let mut set = |password: &str| {
        let user = ["ACL", "SETUSER", "sidecache", "reset", "on", "~*", "&*", "+@all", password];
        user.iter().skip(1).fold(redis::cmd(user[0]), |mut c, w| c.arg(w).clone()).exec(&mut observer).expect("set");
        let kill = ["CLIENT", "KILL", "USER", "sidecache"];
        let _: Result<i64, _> =
            kill.iter().skip(1).fold(redis::cmd(kill[0]), |mut c, w| c.arg(w).clone()).query(&mut observer);
    };
    set(">first");
    let table =
        redis.table() + &format!("username = \"sidecache\"\npassword = {{ file = \"{}\" }}\n", file.display());
    let (_origin, sidecar) = before(&table).await;
    sidecar.in_fleet().await;
    used_again(&sidecar, "first").await;
    set(">second");
    until("the reason is reported", || redis_state(&sidecar).trouble.filter(|why| why.contains("WRONGPASS"))).await;
    assert_eq!(sidecar.get("/x").await.status, 200);
    std::fs::write(&file, "second\n").expect("writable");
    used_again(&sidecar, "second").await;
    std::fs::remove_dir_all(folder).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_redis_causes_few_timeouts_and_corrupted_replies_are_not_served() {
    let redis = Redis::start();
    let chaos = Chaos::before(redis.address()).await;
    let origin = Origin::start(|ask| Reply::fresh(60, ask.target.repeat(200))).await;
    let sidecar = Sidecar::with_tables(&origin, "[memory]\nmax_bytes = \"64MiB\"\n", &chaos.table());
    sidecar.in_fleet().await;
    chaos.set(Mood::Slow(std::time::Duration::from_millis(500)));
    for number in 0..30 {
        let target = format!("/slow/{number}");
        assert_eq!(sidecar.get(&target).await.text(), target.repeat(200));
    }
    let reader = &redis_state(&sidecar).connections["reader"];
    assert!(reader.missed <= 8, "{reader:?}");
    chaos.set(Mood::Fine);
    used_again(&sidecar, "slow").await;
    let writer = Sidecar::with_tables(&origin, "", &redis.table());
    writer.in_fleet().await;
    for number in 0..50 {
        writer.get(&format!("/lies/{number}")).await;
    }
    writer.written().await;
    chaos.set(Mood::Flips(300));
    for number in 0..50 {
        let target = format!("/lies/{number}");
        let answer = sidecar.get(&target).await;
        assert_eq!((answer.status, answer.text()), (200, target.repeat(200)));
    }
    chaos.set(Mood::Fine);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_served_while_redis_loads_its_dataset() {
    let mut redis = Redis::with(&[
        "--rdbcompression",
        "no",
        "--key-load-delay",
        "2000",
        "--loading-process-events-interval-bytes",
        "1024",
    ]);
    let mut observer = redis.observer();
    for number in 0..1_000 {
        let _: () = observer.set(format!("filler:{number}"), vec![b'x'; 100]).expect("written");
    }
    let (_origin, sidecar) = before(&redis.table()).await;
    sidecar.in_fleet().await;
    redis::cmd("SAVE").exec(&mut observer).expect("saved");
    redis.kill();
    redis.restart_loading();
    until("Redis is loading", || redis.info("persistence").contains("loading:1").then_some(())).await;
    for number in 0..20 {
        assert_eq!(sidecar.get(&format!("/loading/{number}")).await.status, 200);
    }
    assert!(redis.info("persistence").contains("loading:1"), "Redis was loading during all requests");
    used_again(&sidecar, "loaded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_warnings_are_logged_at_most_once_per_second() {
    let redis = Redis::start();
    let origin = Origin::start(|ask| Reply::fresh(60, ask.number.to_string())).await;
    let file = folder("quiet").join("sidecache.toml");
    let tables = redis.table() + "[log]\nfilter = \"warn\"\n";
    std::fs::write(&file, text(origin.address, "", &tables)).expect("writable");
    let mut child = command(&["--config", &file.display().to_string()]).spawn().expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let address = loop {
        let line = soon("a line", lines.next_line()).await.expect("readable").expect("a line");
        let named = line.split_once("upstream=api addr=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        if let Some(address) = named {
            break address;
        }
    };
    let mut observer = redis.observer();
    let written = || !redis.keys("sidecache:1:s:*").is_empty();
    let mut number = 0;
    let begun = tokio::time::Instant::now();
    soon("the sidecar uses Redis", async {
        while !written() {
            number += 1;
            get(address, &format!("/{number}"), &[]).await;
        }
    })
    .await;
    let user = |rules: &str| format!("ACL SETUSER default {rules}");
    for rules in ["-@all +acl +hello +select +time", "+@all", "-set", "+@all -get", "+@all -evalsha -eval", "+@all"] {
        let mut command = redis::Cmd::new();
        for word in user(rules).split(' ') {
            command.arg(word);
        }
        command.exec(&mut observer).expect("a reply");
        for _ in 0..150 {
            number += 1;
            assert_eq!(get(address, &format!("/{number}"), &[]).await.status, 200);
        }
    }
    let seconds = begun.elapsed().as_secs() + 1;
    child.start_kill().expect("our own process");
    let output = soon("the process exits", child.wait_with_output()).await.expect("an exit status");
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let warnings = log.lines().filter(|line| line.contains("WARN") && line.contains("redis")).count() as u64;
    assert!(warnings > 0 && warnings <= seconds + 1, "{warnings} lines in {seconds} s:\n{log}");
    std::fs::remove_dir_all(file.parent().expect("a folder")).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_command_reports_a_redis_error_in_one_line() {
    let mut redis = Redis::with(&["--requirepass", "right"]);
    let folder = folder("check");
    let path = |name: &str| folder.join(name).display().to_string();
    std::fs::write(folder.join("right"), "right").expect("writable");
    std::fs::write(folder.join("wrong"), "wrong").expect("writable");
    let password = |name: &str| format!("password = {{ file = \"{}\" }}\n", path(name));
    let cluster = format!("[redis]\nurl = \"redis-cluster://127.0.0.1:{}\"\n", redis.port);
    let cases = [
        (redis.table() + &password("right"), 0, ": ok, version "),
        (redis.table() + &password("wrong"), 1, "check username and password under [redis]"),
        (redis.table(), 1, "write username and password under [redis]"),
        (cluster + &password("right"), 1, "write redis://"),
    ];
    let check = async |table: &str| {
        let text = format!("[[upstream]]\nurl = \"http://127.0.0.1:9\"\n{table}");
        std::fs::write(folder.join("check.toml"), text).expect("writable");
        run(&["check", "--config", &path("check.toml")]).await
    };
    for (table, code, line) in &cases {
        let (exit, stdout, stderr) = check(table).await;
        assert_eq!(exit, *code, "{table}: {stdout} {stderr}");
        assert!(stdout.contains(line) || stderr.contains(line), "{table}: {stdout} {stderr}");
        assert!(stderr.lines().count() <= 1, "one line: {stderr}");
    }
    redis.kill();
    let (exit, stdout, _) = check(&cases[0].0).await;
    assert!(exit == 0 && stdout.contains("warning: redis 127.0.0.1"), "{stdout}");
    std::fs::remove_dir_all(folder).expect("the folder exists");
}
