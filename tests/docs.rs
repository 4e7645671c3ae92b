//! Documentation tests: configurations are valid, commands succeed, links resolve, and the settings reference matches
//! `config.example.toml`.

use std::fmt::Write;
use std::path::Path;

use sidecache::config;

use crate::support::process::Process;
use crate::support::redis::{folder, free_port};
use crate::support::{Origin, Reply, soon};

/// Returns the code blocks of a language in a Markdown text, with their line numbers.
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
            // The variables of these secrets are not set here: use one that is.
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

/// Prefixes of commands that are not run: builds, installations, the whole test suite, commands that need a cluster,
/// and the sidecar in the foreground, which the test starts itself.
const SKIPPED: [&str; 5] = ["cargo ", "./scripts/test", "helm ", "sidecache --upstream", "kubectl "];

/// Runs the shell blocks of a text in order, with a sidecar in front of `upstream`. Returns their outputs.
async fn run_blocks(text: &str, upstream: &str, arguments: &[&str]) -> Vec<String> {
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
    let mut outputs = Vec::new();
    for (line, block) in blocks(text, "sh") {
        let lines = block.lines().filter(|line| !SKIPPED.iter().any(|begins| line.starts_with(begins)));
        let script: String = lines.fold(String::new(), |all, line| all + line + "\n");
        let script =
            script.replace("127.0.0.1:18080", &listen).replace("127.0.0.1:18081", &format!("127.0.0.1:{admin}"));
        let mut command = tokio::process::Command::new("bash");
        command.args(["-euo", "pipefail", "-c", &script]).current_dir(&place).env("PATH", &path);
        command.env("SIDECACHE_ADMIN", format!("http://127.0.0.1:{admin}")).env("TOKEN", "shpat_shop0_app0");
        let output = soon("the shell block ends", command.output()).await.expect("bash is installed");
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "line {line}:\n{script}\n{stdout}\n{errors}");
        outputs.push(stdout);
    }
    std::fs::remove_dir_all(place).expect("the folder exists");
    outputs
}

#[tokio::test(flavor = "multi_thread")]
async fn quick_start_commands_end_in_a_hit() {
    let shop = Process::start(&["mock-shop", "--listen", "127.0.0.1:0"], 1).await;
    let url = format!("http://{}", shop.address("mock-shop"));
    let outputs = run_blocks(include_str!("../docs/QUICKSTART.md"), &url, &["--profile", "shopify"]).await;
    let heads = outputs.iter().find(|output| output.contains("Cache-Status")).expect("the response heads");
    assert!(heads.contains("sidecache; fwd=uri-miss; stored") && heads.contains("sidecache; hit"), "{heads}");
    assert!(outputs.iter().any(|output| output.contains("decision         a hit")), "{outputs:?}");
    assert!(outputs.iter().any(|output| output.contains("sidecache.toml: ok")), "{outputs:?}");
    assert!(outputs.iter().any(|output| output.contains("\"reloaded\":true")), "{outputs:?}");
    assert!(outputs.iter().any(|output| output.contains("mode bypass (set by: local)")), "{outputs:?}");
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
    let outputs = run_blocks(&pages.concat(), &url, &[]).await;
    assert!(outputs.iter().any(|output| output.contains("2 stored")), "{outputs:?}");
}

/// Returns the settings reference: `config.example.toml` as a Markdown page. The test
/// `example_configuration_lists_every_setting_with_its_default` checks that the example is complete.
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
        let (setting, why) = split_comment(bare);
        if let Some(title) = line.strip_prefix("# ------").map(|title| title.trim_start_matches('-').trim()) {
            flush(&mut page, &mut row);
            writeln!(page, "\n## {}\n\n| setting | default or example | |\n|---|---|---|", capital(title))
                .expect("a string");
        } else if setting.starts_with('[') && setting.ends_with(']') {
            flush(&mut page, &mut row);
            writeln!(page, "| **`{setting}`** | | {} |", cell(why)).expect("a string");
        } else if open || setting.trim_start() != setting || setting.is_empty() || !setting.contains('=') {
            // A continued list or comment.
            if let Some((_, value, comment)) = &mut row {
                if open || !setting.trim().is_empty() {
                    *value = [value.as_str(), setting.trim()].join(" ").trim_start().into();
                }
                *comment = format!("{comment} {why}");
                open = open && !setting.starts_with(']');
            }
        } else if let Some((key, value)) = setting.split_once('=') {
            flush(&mut page, &mut row);
            open = value.trim() == "[";
            row = Some((key.trim().to_owned(), value.trim().to_owned(), why.to_owned()));
        }
    }
    flush(&mut page, &mut row);
    page
}

/// Splits a line into its text and its comment, at the first `#` outside quotes.
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

/// `UPDATE=1 cargo test docs` regenerates the page.
#[test]
fn configuration_reference_matches_the_example() {
    let made = reference(include_str!("../config.example.toml"));
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CONFIGURATION.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&page, &made).expect("writable");
    }
    let current = std::fs::read_to_string(&page).unwrap_or_default();
    assert!(current == made, "docs/CONFIGURATION.md differs from config.example.toml: run UPDATE=1 cargo test docs");
}

/// Every test that the documentation names, as `module::beginning_of_its_name…`, exists.
#[test]
fn tests_named_in_the_documentation_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut named = 0;
    for page in std::fs::read_dir(root.join("docs")).expect("a folder") {
        let text = std::fs::read_to_string(page.expect("an entry").path()).unwrap_or_default();
        for name in text.split('`').filter(|code| code.ends_with('…')) {
            let Some((module, beginning)) = name.trim_end_matches('…').split_once("::") else { continue };
            let Ok(tests) = std::fs::read_to_string(root.join(format!("tests/{module}.rs"))) else { continue };
            assert!(tests.contains(&format!("fn {beginning}")), "{name}");
            named += 1;
        }
    }
    assert!(named > 10, "{named}");
}
