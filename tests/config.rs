//! Configuration: parsing, defaults, precedence, and error messages.

use std::path::Path;

use sidecache::config;

use crate::support::process::{Process, command, run};
use crate::support::{Origin, Reply, get, soon};

const HEAD: &str = "[[upstream]]\nurl = \"https://shop.example\"\n";

/// Returns the first line of the first error of an invalid configuration.
fn error(text: &str) -> String {
    let errors = config::from_text("t.toml", text, Path::new("/nowhere")).expect_err(text);
    errors[0].to_string().lines().next().expect("a line").to_owned()
}

#[test]
fn config_errors_name_the_line_and_the_fix() {
    let rule = |lines: &str| format!("{HEAD}[[upstream.rule]]\npath = \"/{{id}}\"\n{lines}\n");
    let table: &[(String, &str, &str)] = &[
        (format!("{HEAD}nope = 1\n"), "t.toml:3:1", "unknown field `nope`"),
        (format!("{HEAD}listen = \"18080\"\n"), "t.toml:3:10", "127.0.0.1:18080"),
        ("[[upstream]]\nurl = \"shop.example\"\n".into(), "t.toml:2:7", "https://shop.example"),
        ("[[upstream]]\nurl = \"https://a/b\"\n".into(), "t.toml:2:7", "\"https://a\""),
        ("[[upstream]]\nname = \"x\"\n".into(), "t.toml:1:1", "needs a url"),
        (rule("ttl = \"5m\"\ncache = \"http\""), "t.toml:5:7", "cache = \"override\""),
        (rule("ttl = \"weekly\""), "t.toml:5:7", "no class \"weekly\" in [ttl]"),
        (rule("ttl = \"5\""), "t.toml:5:7", "\"5s\""),
        (rule("cache = \"override\""), "t.toml:5:9", "needs a ttl"),
        (rule("cache = \"sometimes\""), "t.toml:5:9", "\"http\", \"override\" or \"off\""),
        (rule("deadline = 5"), "t.toml:5:12", "no unit"),
        (rule("tags = [\"p:{name}\"]"), "t.toml:5:8", "{name}"),
        (rule("methods = [\"POST\"]"), "t.toml:5:11", "only GET and HEAD"),
        (rule("reject_empty = \"products\""), "t.toml:5:16", "\"/products\""),
        (rule("fallback = { file = \"x.json\" }"), "t.toml:5:21", "/nowhere/x.json: No such file"),
        (rule("fallback = { body = \"\", on = [\"rain\"] }"), "t.toml:5:30", "timeout"),
        (rule("when = { graphql = { type = \"query\" } }"), "t.toml:5:20", "not built yet"),
        (rule("key = { partition = \"app\" }"), "t.toml:5:21", "not built yet"),
        (format!("mode = \"off\"\n{HEAD}"), "t.toml:1:8", "write \"normal\", \"bypass\" or \"shadow\""),
        (format!("{HEAD}budget = {{ rate = \"2\" }}\n"), "t.toml:3:19", "\"100/m\""),
        (format!("{HEAD}budget = {{ burst = 2 }}\n"), "t.toml:3:10", "rate"),
        (format!("{HEAD}budget = \"some\"\n"), "t.toml:3:10", "\"learn\""),
        (format!("{HEAD}http2 = true\nhost = \"preserve\"\n"), "t.toml:4:8", "leave out http2"),
        (format!("{HEAD}[upstream.listen_tls]\ncert = \"c.pem\"\n"), "t.toml:4:8", "needs both"),
        (format!("{HEAD}[redis]\n"), "t.toml:3:1", "needs a url"),
        (format!("{HEAD}[redis]\nurl = \"http://x\"\n"), "t.toml:4:7", "redis-cluster://"),
        (format!("{HEAD}[redis]\nurl = \"redis://x\"\npassword = \"plain\"\n"), "t.toml:5:12", "{ file = "),
        (format!("{HEAD}[redis]\nurl = \"redis://u:p@x\"\n"), "t.toml:4:7", "{ env = \"REDIS_URL\" }"),
        (format!("{HEAD}[redis]\nurl = {{ env = \"SIDECACHE_NOT_SET\" }}\n"), "t.toml:4:7", "SIDECACHE_NOT_SET"),
        (
            format!("{HEAD}[redis]\nurl = \"rediss://x\"\ntls = {{ names = {{ \"*\" = \"x\" }} }}\n"),
            "t.toml:5:17",
            "rediss-cluster://",
        ),
        (
            format!("{HEAD}[redis]\nurl = \"rediss-cluster://x\"\ntls = {{ names = {{ a = \"x\" }} }}\n"),
            "t.toml:5:17",
            "is no address",
        ),
        (format!("{HEAD}[redis]\nurl = \"redis://x\"\ntls = {{ ca = \"x.pem\" }}\n"), "t.toml:4:7", "rediss://"),
        (
            format!("{HEAD}[redis]\nurl = \"redis-cluster://x\"\ndatabases = {{ private = 1 }}\n"),
            "t.toml:5:13",
            "database 0",
        ),
        (format!("{HEAD}[memory]\nmax_bytes = 64\n"), "t.toml:4:13", "MiB"),
        (format!("{HEAD}[memory]\nmax_entry_bytes = \"1GiB\"\n"), "t.toml:4:19", "at most half"),
        (format!("{HEAD}[admin]\nlisten = \"0.0.0.0:1\"\n"), "t.toml:4:10", "needs a token"),
        (format!("{HEAD}[admin]\ntoken = \"plain\"\n"), "t.toml:4:9", "{ file = "),
        (format!("{HEAD}[admin]\ntoken = {{ file = \"t\" }}\n"), "t.toml:4:9", "/nowhere/t"),
        ("[[upstream]]\nurl = \"https://${SIDECACHE_NOT_SET}\"\n".into(), "t.toml:2:7", ":-default"),
        ("[[upstream]\n".into(), "t.toml:1:", ""),
    ];
    for (text, place, advice) in table {
        let error = error(text);
        assert!(error.starts_with(place), "{text}\n{error}");
        assert!(error.contains(advice), "{text}\n{error}");
    }
}

#[test]
fn config_errors_do_not_repeat_secrets() {
    for line in ["token = \"hunter2\"", "token = 123456"] {
        let errors = config::from_text("t.toml", &format!("{HEAD}[admin]\n{line}\n"), Path::new("")).expect_err(line);
        let text = errors[0].to_string();
        assert!(text.starts_with("t.toml:4:9: secrets are not written in this file"), "{text}");
        assert!(!text.contains("hunter2") && !text.contains("123456"), "{text}");
    }
    let errors = config::from_text("t.toml", "[[upstream]]\nurl = \"http://u:pw@h\"\n", Path::new(""))
        .expect_err("an invalid configuration");
    assert!(!errors[0].to_string().contains("pw@"), "{}", errors[0]);
}

#[test]
fn ttl_flag_applies_to_all_or_to_the_rules_of_the_profile() {
    let modes = |url: &str, path: &str| {
        let flags =
            config::Flags { upstream: Some(url.to_owned()), ttl: Some("7m".to_owned()), ..config::Flags::default() };
        let config = config::load(&flags).expect("a valid configuration");
        let plan = config.upstreams[0].router.rules().iter().find(|plan| plan.path.captures(path).is_some()).cloned();
        format!("{:?}", plan.expect("a rule").mode)
    };
    assert!(modes("https://api.example", "/anything").contains("420s"));
    assert!(modes("https://x.MyShopify.com", "/admin/api/2026-07/products.json").contains("420s"));
    assert_eq!(modes("https://x.myshopify.com", "/admin/oauth/access_token"), "Off");
}

#[test]
fn all_config_errors_are_reported_together() {
    let text = format!("mode = \"x\"\n{HEAD}[[upstream.rule]]\npath = \"a\"\nttl = \"b\"\n[log]\nformat = \"c\"\n");
    let errors = config::from_text("t.toml", &text, Path::new("")).expect_err("an invalid configuration");
    assert_eq!(errors.len(), 4, "{errors:?}");
}

#[test]
fn rules_inherit_each_setting_separately() {
    let text = format!(
        "{HEAD}[upstream.defaults]\nttl = \"1h\"\nstale_if_error = \"2h\"\n\
         [[upstream.rule]]\npath = \"/a\"\n[[upstream.rule]]\npath = \"/b\"\nttl = \"session\"\nstale_if_error = \"off\"\n\
         [[upstream.rule]]\npath = \"/c\"\ncache = \"http\"\n"
    );
    let config = config::from_text("t.toml", &text, Path::new("")).expect("a valid configuration");
    let plans: Vec<String> = config.upstreams[0].router.rules().iter().map(|p| format!("{:?}", p.mode)).collect();
    assert_eq!(
        plans,
        [
            "Override { ttl: 3600s, negative_ttl: None }",
            "Override { ttl: 86400s, negative_ttl: None }",
            "Http",
            // Requests that no rule matches follow HTTP caching, whatever `defaults` says.
            "Http",
        ]
    );
    let windows: Vec<_> =
        config.upstreams[0].router.rules().iter().map(|p| p.stale_if_error.map(|d| d.as_secs())).collect();
    assert_eq!(windows, [Some(7200), None, Some(7200), None]);
}

#[test]
fn example_configuration_lists_every_setting_with_its_default() {
    let example = include_str!("../config.example.toml");
    let with_example = config::from_text("t.toml", example, Path::new("")).expect("a valid example");
    let bare = "[[upstream]]\nurl = \"https://my-shop.myshopify.com\"\n";
    let bare = config::from_text("t.toml", bare, Path::new("")).expect("a valid configuration");
    let defaults =
        |c: &config::Config| format!("{:?} {:?} {:?} {:?} {:?}", c.memory, c.limits, c.grace, c.log, c.admin);
    assert_eq!(defaults(&with_example), defaults(&bare));
    let upstream = |c: &config::Config| {
        let u = &c.upstreams[0];
        format!("{} {:?} {:?} {:?} {}", u.listen, u.timeouts, u.retry, u.origin, u.profile)
    };
    assert_eq!(upstream(&with_example), upstream(&bare));
    // Every field that serde reads is in the example, except those that are not implemented.
    let not_implemented = ["ttl_flag", "probes", "webhook", "breaker", "graphql"];
    for line in include_str!("../src/config/file.rs").lines() {
        let Some(field) = line.trim().strip_prefix("pub(super) ").and_then(|l| l.split_once(": ")) else { continue };
        let documented = example.lines().any(|l| {
            let l = l.trim_start_matches(['#', ' ']);
            l.starts_with(&format!("{} ", field.0))
                || l.contains(&format!("{} = ", field.0))
                || l.contains(&format!("{}]", field.0))
        });
        assert!(documented || not_implemented.contains(&field.0), "{} is not in config.example.toml", field.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_prints_the_documented_lines() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let url = format!("http://{}", origin.address);
    let file = std::env::temp_dir().join(format!("sidecache-start-{}.toml", origin.address.port()));
    std::fs::write(&file, "[admin]\nlisten = \"127.0.0.1:0\"\n").expect("writable");
    let arguments = ["run", "--config", &file.display().to_string(), "--upstream", &url, "--listen", "127.0.0.1:0"];
    let process = Process::start(&arguments, 4).await;
    let (upstream, admin) = (process.address("upstream=upstream"), process.address("admin"));
    let expected = [
        format!("sidecache 0.1.0 mode=normal config={} redis=none (this process only)", file.display()),
        format!("listening upstream=upstream addr={upstream} -> {url} profile=generic rules=0"),
        format!("listening admin addr={admin} token=none"),
        "not in this version: budget = \"learn\" obeys Retry-After, but does not learn the pace".to_owned(),
    ];
    assert_eq!(process.start, expected);
    assert_eq!(get(upstream, "/", &[]).await.status, 200);
    std::fs::remove_file(file).expect("the file exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_errors_are_one_line_each() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let table: &[(&[&str], i32, &str)] = &[
        (
            &["--upstream", "http://127.0.0.1:9", "--listen", &address],
            1,
            "is in use: stop the process that listens there",
        ),
        (&["--config", "/nowhere/sidecache.toml"], 1, "/nowhere/sidecache.toml: can't read the configuration"),
        (&["--upstream", "http://x", "--redis", "memcached://x"], 1, "write one of redis://"),
        (&["--upstream", "http://x", "--profile", "magento"], 1, "write one of"),
        (&["--upstream", "http://x", "--ttl", "5"], 1, "has no unit"),
        (&["--what"], 2, "unexpected argument"),
        (&["purge"], 2, "required"),
        (&["stats", "--admin", "http://127.0.0.1:9"], 1, "no sidecar answers at http://127.0.0.1:9"),
    ];
    for (arguments, code, message) in table {
        let (exit, stdout, stderr) = run(arguments).await;
        assert_eq!((exit, stdout.as_str()), (*code, ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains(message), "{arguments:?}: {stderr}");
    }
    let without_arguments =
        soon("the process exits", command(&[]).current_dir("/").output()).await.expect("the program starts");
    assert!(String::from_utf8_lossy(&without_arguments.stderr).contains("give --upstream"));
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_override_environment_and_environment_overrides_file() {
    let check = |vars: &'static [(&str, &str)]| async move {
        let mut child = command(&["--upstream", "http://127.0.0.1:9", "--listen", "127.0.0.1:0"]);
        let output =
            soon("the process exits", child.envs(vars.iter().copied()).output()).await.expect("the program starts");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(check(&[("SIDECACHE_MEMORY__MAX_BYTES", "3")]).await.contains("\"3\" has no unit"));
    assert!(check(&[("SIDECACHE_MEMORY__NOPE", "3")]).await.contains("unknown field `nope`"));
    assert!(check(&[("SIDECACHE_MODE", "off")]).await.contains("mode = \"off\""));
    assert!(
        check(&[("SIDECACHE_UPSTREAM", "nonsense"), ("SIDECACHE_LOG__FORMAT", "x")]).await.contains("log.format")
    );
    let kubernetes = [("SIDECACHE_PORT_18080_TCP_ADDR", "10.0.0.1"), ("SIDECACHE_SERVICE_HOST", "10.0.0.1")];
    let text = std::env::temp_dir().join(format!("sidecache-env-{}.toml", std::process::id()));
    std::fs::write(&text, "[[upstream]]\nurl = \"http://127.0.0.1:9\"\n").expect("writable");
    let mut child = command(&["check", "--config", &text.display().to_string()]);
    let output = soon("the process exits", child.envs(kubernetes).output()).await.expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::write(&text, "[[upstream]]\nurl = \"http://127.0.0.1:9\"\n[log]\nformat = \"json\"\n")
        .expect("writable");
    let mut child = command(&["check", "--config", &text.display().to_string()]);
    let output = soon("the process exits", child.env("SIDECACHE_LOG__FORMAT", "xml").output())
        .await
        .expect("the program starts");
    assert!(String::from_utf8_lossy(&output.stderr).contains("\"xml\""), "the environment overrides the file");
    std::fs::remove_file(text).expect("the file exists");
}

/// Sends this number of GETs through a sidecar process. Returns the last response and the log.
async fn logged(origin: &Origin, gets: usize) -> (crate::support::Answer, String) {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let file = std::env::temp_dir().join(format!("sidecache-log-{}.toml", origin.address.port()));
    std::fs::write(&file, crate::support::sidecar::text(origin.address, "", "")).expect("writable");
    let mut child = command(&["--config", &file.display().to_string()]).spawn().expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let address = loop {
        let line = soon("a line", lines.next_line()).await.expect("readable").expect("a line");
        let named = line.split_once("upstream=api addr=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        if let Some(address) = named {
            break address;
        }
    };
    let mut answer = get(address, "/", &[]).await;
    for _ in 1..gets {
        answer = get(address, "/", &[]).await;
    }
    // At SIGTERM it writes the lines that are still in the queue.
    let id = i32::try_from(child.id().expect("running")).expect("a pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGTERM)
        .expect("our own process");
    let output = soon("the process exits", child.wait_with_output()).await.expect("an exit status");
    std::fs::remove_file(file).expect("the file exists");
    (answer, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn hint_is_logged_after_twenty_gets_with_nothing_stored() {
    let origin = Origin::start(|_| Reply::new(200, "x")).await;
    let (_, log) = logged(&origin, 40).await;
    assert_eq!(log.matches("nothing was stored").count(), 1, "{log}");
    assert!(log.contains("--ttl 30s"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn error_reason_is_found_in_the_log() {
    let origin = Origin::start(|_| Reply::close()).await;
    let (answer, log) = logged(&origin, 3).await;
    let id = answer.json()["error"]["request_id"].as_str().expect("a request ID").to_owned();
    assert_eq!(log.lines().filter(|line| line.contains(&id)).count(), 1, "{log}");
    assert_eq!(log.matches("the upstream fails").count(), 1, "one line per failure period: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hits_and_misses_are_not_logged() {
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let (answer, log) = logged(&origin, 10).await;
    assert!(answer.is_hit());
    assert_eq!(log, "");
}
