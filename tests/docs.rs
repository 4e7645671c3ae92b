//! What the documentation says to write can be written, what it says to type does what it says, and its reference is
//! what the program reads.

use std::fmt::Write;
use std::path::Path;

use sidecache::config;

use crate::support::process::Process;
use crate::support::redis::{folder, free_port};
use crate::support::{Origin, Reply, soon};

/// The blocks of a language in a Markdown text, with the line each begins on.
fn blocks<'t>(text: &'t str, language: &str) -> Vec<(usize, &'t str)> {
    let fence = format!("```{language}\n");
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = text[from..].find(&fence).map(|at| from + at + fence.len()) {
        let end = text[at..].find("```").map_or(text.len(), |end| at + end);
        found.push((text[..at].lines().count() + 1, &text[at..end]));
        from = end;
    }
    found
}

#[test]
fn documented_configurations_are_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::fs::read_dir(root.join("docs")).expect("a folder");
    let mut files: Vec<_> = folder.map(|entry| entry.expect("readable").path()).collect();
    files.push(root.join("README.md"));
    let mut checked = 0;
    for file in files.iter().filter(|file| file.extension().is_some_and(|kind| kind == "md")) {
        let text = std::fs::read_to_string(file).expect("readable");
        for (line, block) in blocks(&text, "toml").into_iter().filter(|(_, block)| block.contains("[[upstream]]")) {
            // Secrets come from the environment there; here any will do.
            let whole = block.replace("{ env = \"REDIS_PASSWORD\" }", "{ env = \"PATH\" }");
            let whole = whole.replace("{ env = \"SIDECACHE_SECRET_KEY\" }", "{ env = \"PATH\" }");
            if let Err(errors) = config::from_text("block", &whole, root) {
                panic!("{}:{line}: {}", file.display(), errors[0]);
            }
            checked += 1;
        }
    }
    assert!(checked >= 7, "{checked} blocks");
}

#[test]
fn documentation_links_resolve() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in [
        "README.md",
        "docs/CONFIGURATION.md",
        "docs/HTTP.md",
        "docs/LIMITS.md",
        "docs/ON-CALL.md",
        "docs/QUICKSTART.md",
        "docs/RECIPES.md",
        "docs/RUNBOOK.md",
        "docs/TUNING.md",
        "k8s/README.md",
    ] {
        let text = std::fs::read_to_string(root.join(name)).expect("readable");
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap_or_default();
            let file = target.split('#').next().unwrap_or_default();
            if !file.is_empty() && !file.contains("://") {
                let path = root.join(name).parent().expect("a folder").join(file);
                assert!(path.exists(), "{name} links to {target}");
            }
        }
    }
}

/// What is not run here: it builds, installs, runs everything, needs a cluster, or stays in the foreground (that one is
/// started by the test).
const ELSEWHERE: [&str; 5] = ["cargo ", "./scripts/test", "helm ", "sidecache --upstream", "kubectl "];

/// Runs the shell blocks of a text one after the other, before a sidecar in front of `upstream`: what each printed.
async fn typed(text: &str, upstream: &str, arguments: &[&str]) -> Vec<String> {
    let (api, admin) = (free_port(), free_port());
    let listen = format!("127.0.0.1:{api}");
    let place = folder("docs");
    let file = place.join("running.toml");
    std::fs::write(&file, format!("[admin]\nlisten = \"127.0.0.1:{admin}\"\n")).expect("writable");
    let file = file.display().to_string();
    let mut whole = vec!["run", "--config", &file, "--upstream", upstream, "--listen", &listen];
    whole.extend(arguments);
    let _sidecar = Process::start(&whole, 3).await;
    let programs = Path::new(env!("CARGO_BIN_EXE_sidecache")).parent().expect("a folder").display().to_string();
    let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
    std::fs::write(place.join("urls.txt"), "/warmed/1\n/warmed/2\n").expect("writable");
    let mut told = Vec::new();
    for (line, block) in blocks(text, "sh") {
        let lines = block.lines().filter(|line| !ELSEWHERE.iter().any(|begins| line.starts_with(begins)));
        let script: String = lines.fold(String::new(), |all, line| all + line + "\n");
        let script =
            script.replace("127.0.0.1:18080", &listen).replace("127.0.0.1:18081", &format!("127.0.0.1:{admin}"));
        let mut command = tokio::process::Command::new("bash");
        command.args(["-euo", "pipefail", "-c", &script]).current_dir(&place).env("PATH", &path);
        command.env("SIDECACHE_ADMIN", format!("http://127.0.0.1:{admin}")).env("TOKEN", "shpat_shop0_app0");
        let output = soon("the block ends", command.output()).await.expect("bash is installed");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "line {line}:\n{script}\n{said}\n{errors}");
        told.push(said);
    }
    std::fs::remove_dir_all(place).expect("ours");
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn quick_start_commands_end_in_a_hit() {
    let shop = Process::start(&["mock-shop", "--listen", "127.0.0.1:0"], 1).await;
    let url = format!("http://{}", shop.address("mock-shop"));
    let told = typed(include_str!("../docs/QUICKSTART.md"), &url, &["--profile", "shopify"]).await;
    let asked = told.iter().find(|said| said.contains("Cache-Status")).expect("the answers' heads");
    assert!(asked.contains("sidecache; fwd=uri-miss; stored") && asked.contains("sidecache; hit"), "{asked}");
    assert!(told.iter().any(|said| said.contains("decision         a hit")), "{told:?}");
    assert!(told.iter().any(|said| said.contains("sidecache.toml: ok")), "{told:?}");
    assert!(told.iter().any(|said| said.contains("\"reloaded\":true")), "{told:?}");
    assert!(told.iter().any(|said| said.contains("mode bypass (set by: local)")), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_commands_succeed() {
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let url = format!("http://{}", origin.address);
    let pages = [
        include_str!("../README.md"),
        include_str!("../docs/ON-CALL.md"),
        include_str!("../docs/RUNBOOK.md"),
        include_str!("../docs/RECIPES.md"),
        include_str!("../docs/TUNING.md"),
    ];
    let told = typed(&pages.concat(), &url, &[]).await;
    assert!(told.iter().any(|said| said.contains("2 stored")), "{told:?}");
}

/// The reference: `config.example.toml` as a page. That nothing of what is read is missing there is tested with the
/// configuration (`example_configuration_lists_every_setting_with_its_default`).
fn reference(example: &str) -> String {
    let mut page = String::from(
        "# Every setting\n\nMade from `config.example.toml`, which has every setting that the program reads, with its default or \
         an example. `${VAR}` and\n`${VAR:-default}` work in any string. A variable of the environment overrides the file: \
         `SIDECACHE_MEMORY__MAX_BYTES=128MiB` for `max_bytes`\nin `[memory]`; lists (`[[upstream]]`) can't be set so. \
         Durations: `ms s m h d`. Sizes: `B KiB MiB GiB`.\n\n| setting | default or example | |\n|---|---|---|\n",
    );
    let mut row: Option<(String, String, String)> = None;
    let cell = |text: &str| text.replace('|', "\\|").replace('*', "\\*");
    let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{}`", text.replace('|', "\\|")) };
    let flush = |page: &mut String, row: &mut Option<(String, String, String)>| {
        if let Some((key, value, why)) = row.take() {
            writeln!(page, "| {} | {} | {} |", code(&key), code(&value), cell(why.trim())).expect("a string");
        }
    };
    let mut open = false;
    for line in example.lines().skip_while(|line| !line.starts_with("mode")) {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let (said, why) = split_comment(bare);
        if let Some(title) = line.strip_prefix("# ------").map(|title| title.trim_start_matches('-').trim()) {
            flush(&mut page, &mut row);
            writeln!(page, "\n## {}\n\n| setting | default or example | |\n|---|---|---|", capital(title))
                .expect("a string");
        } else if said.starts_with('[') && said.ends_with(']') {
            flush(&mut page, &mut row);
            writeln!(page, "| **`{said}`** | | {} |", cell(why)).expect("a string");
        } else if open || said.trim_start() != said || said.is_empty() || !said.contains('=') {
            // A list that goes on, or a remark that does.
            if let Some((_, value, told)) = &mut row {
                if open || !said.trim().is_empty() {
                    *value = [value.as_str(), said.trim()].join(" ").trim_start().into();
                }
                *told = format!("{told} {why}");
                open = open && !said.starts_with(']');
            }
        } else if let Some((key, value)) = said.split_once('=') {
            flush(&mut page, &mut row);
            open = value.trim() == "[";
            row = Some((key.trim().to_owned(), value.trim().to_owned(), why.to_owned()));
        }
    }
    flush(&mut page, &mut row);
    page
}

/// A line's text, and its remark: the first # that is not in quotes.
fn split_comment(line: &str) -> (&str, &str) {
    let mut quoted = None;
    for (at, c) in line.char_indices() {
        match (quoted, c) {
            (None, '#') => return (line[..at].trim_end(), line[at + 1..].trim()),
            (None, '"' | '\'') => quoted = Some(c),
            (Some(quote), c) if quote == c => quoted = None,
            _ => {}
        }
    }
    (line.trim_end(), "")
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// `UPDATE=1 cargo test docs` writes it anew.
#[test]
fn configuration_reference_matches_the_example() {
    let made = reference(include_str!("../config.example.toml"));
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CONFIGURATION.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&page, &made).expect("writable");
    }
    let there = std::fs::read_to_string(&page).unwrap_or_default();
    assert!(there == made, "docs/CONFIGURATION.md is not what config.example.toml says: UPDATE=1 cargo test docs");
}
