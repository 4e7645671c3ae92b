//! Architecture rules, checked against the sources: layers, adapter modules, file and function sizes.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the path and the text of every Rust file below `folder`.
fn sources(folder: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut open = vec![root.join(folder)];
    let mut found = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
        } else if path.extension().is_some_and(|e| e == "rs") {
            let name: PathBuf = path.strip_prefix(root).expect("a path below the root").to_owned();
            found.push((name.display().to_string(), fs::read_to_string(&path).expect("text")));
        }
    }
    assert!(!found.is_empty());
    found
}

/// Returns the code of a file without its tests and comments.
fn code(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]").next().unwrap_or_default();
    before_tests.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Fails if `words` appear in the code of files that `inside` does not hold.
fn only_in(words: &[&str], inside: &[&str]) {
    for (name, text) in sources("src") {
        if inside.iter().any(|place| name.starts_with(place)) {
            continue;
        }
        let code = code(&text);
        for word in words {
            assert!(!code.contains(word), "{name} uses {word}, which is allowed only in {inside:?}");
        }
    }
}

#[test]
fn policy_is_pure() {
    let forbidden = [
        "tokio",
        "hyper",
        "fred",
        "Instant::now",
        "SystemTime::now",
        "getrandom",
        "TcpStream",
        "std::fs",
        "tracing",
        "async ",
    ];
    for (name, text) in sources("src").into_iter().filter(|(name, _)| name.starts_with("src/policy")) {
        let code = code(&text);
        for word in forbidden {
            assert!(!code.contains(word), "{word} in {name}");
        }
        for line in code.lines().filter(|line| line.contains("crate::")) {
            assert!(line.contains("crate::policy"), "{name} imports from outside policy: {line}");
        }
    }
}

// Modules that keep deadlines may use tokio's Instant.
#[test]
fn libraries_are_used_only_in_their_adapter_modules() {
    only_in(&["hyper_util"], &["src/server", "src/upstream", "src/demo"]);
    only_in(&["hyper::"], &["src/server", "src/upstream", "src/demo"]);
    only_in(&["fred"], &["src/redis"]);
    only_in(&["axum"], &["src/admin"]);
    only_in(&["quick_cache"], &["src/store", "src/proxy/fetch/coalesce.rs", "src/proxy/fetch/failed_keys.rs"]);
    only_in(
        &["serde::", "toml::"],
        &["src/config", "src/admin", "src/demo", "src/telemetry", "src/store", "src/fleet", "src/redis"],
    );
    only_in(&["Deserialize"], &["src/config", "src/admin", "src/demo", "src/store/record", "src/fleet"]);
    only_in(
        &["Instant::now", "SystemTime::now"],
        &[
            "src/clock.rs",
            "src/server",
            "src/proxy/fetch.rs",
            "src/proxy/fetch",
            "src/proxy/send/budget.rs",
            "src/body.rs",
            "src/body/fanout.rs",
            "src/upstream",
            "src/redis/connection.rs",
        ],
    );
    only_in(&["crate::demo"], &["src/demo", "src/cli.rs"]);
    only_in(&["crate::cli"], &["src/cli", "src/main.rs"]);
    only_in(&["crate::app"], &["src/app.rs", "src/cli", "src/main.rs", "src/demo"]);
}

#[test]
fn general_modules_name_no_specific_upstream_api() {
    for folder in ["src/policy", "src/proxy", "src/store", "src/server", "src/upstream", "src/body", "src/telemetry"]
    {
        for (name, text) in sources("src").into_iter().filter(|(name, _)| name.starts_with(folder)) {
            assert!(!text.to_lowercase().contains("shopify"), "{name}");
        }
    }
}

/// The layers, lowest first. A module imports only modules of lower layers.
const LAYERS: [&str; 18] = [
    "policy",
    "secret",
    "process",
    "clock",
    "body",
    "tls",
    "telemetry",
    "upstream",
    "redis",
    "store",
    "fleet",
    "proxy",
    "server",
    "config",
    "admin",
    "app",
    "demo",
    "cli",
];

/// Returns the top-level modules that a file's code names, by `crate::` or by a chain of `super::` up to the root.
fn imported_modules<'c>(name: &str, code: &'c str) -> Vec<&'c str> {
    let module = |rest: &'c str| &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())];
    let to_root = "super::".repeat(name.split('/').count() - 1);
    let by_super = code.match_indices(&to_root).filter(|(at, _)| !code[..*at].ends_with("super::"));
    let by_super = by_super.map(|(at, chain)| &code[at + chain.len()..]);
    let by_crate = code.split("crate::").skip(1);
    by_crate.chain(by_super).map(module).filter(|module| *module != "super").collect()
}

/// Returns the functions of a file's code that have more than five parameters besides `self`.
fn functions_with_many_parameters(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for function in code.split("fn ").skip(1) {
        let Some((name, rest)) = function.split_once('(') else { continue };
        let (mut depth, mut parameters, mut text) = (0, 0, String::new());
        for letter in rest.replace("->", "").chars() {
            match letter {
                '(' | '[' | '<' => depth += 1,
                ')' if depth == 0 => break,
                ')' | ']' | '>' => depth -= 1,
                ',' if depth == 0 => {
                    parameters += usize::from(text.contains(':'));
                    text.clear();
                }
                _ => text.push(letter),
            }
        }
        parameters += usize::from(text.contains(':'));
        if parameters > 5 {
            found.push(name);
        }
    }
    found
}

#[test]
fn modules_import_only_lower_layers() {
    let layer = |module: &str| LAYERS.iter().position(|layer| *layer == module);
    for (name, text) in sources("src") {
        let module = name.trim_start_matches("src/").split(['/', '.']).next().expect("a module");
        if module == "main" || module == "lib" {
            continue;
        }
        let own = layer(module).unwrap_or_else(|| panic!("{name} is in no layer"));
        for imported in imported_modules(&name, &code(&text)) {
            let below = layer(imported).is_some_and(|imported| imported <= own);
            assert!(below, "{name} imports {imported}, which is not a lower layer");
        }
    }
}

#[test]
fn admin_does_not_import_server() {
    for (name, text) in sources("src").into_iter().filter(|(name, _)| name.starts_with("src/admin")) {
        assert!(!imported_modules(&name, &code(&text)).contains(&"server"), "{name}");
    }
}

#[test]
fn files_are_short_and_begin_with_a_module_comment() {
    let mut lengths = Vec::new();
    for (name, text) in sources("src") {
        assert!(text.starts_with("//! "), "{name} does not begin with a module comment");
        let length = text.split("#[cfg(test)]").next().unwrap_or_default().lines().count();
        assert!(length <= 400, "{name} has {length} lines without its tests");
        assert!(!name.ends_with("/mod.rs"), "{name}: write foo.rs beside foo/");
        lengths.push(length);
    }
    for (name, text) in sources("benches") {
        assert!(text.lines().count() <= 400, "{name} has {} lines", text.lines().count());
    }
    lengths.sort_unstable();
    assert!(lengths[lengths.len() / 2] <= 130, "half of the files have at most 130 lines");
}

#[test]
fn functions_have_at_most_five_parameters() {
    assert_eq!(functions_with_many_parameters("fn f(a: A<B, C>, b: B, c: C, d: (D, D), e: E)"), [""; 0]);
    assert_eq!(functions_with_many_parameters("fn f(a: A, b: B, c: C, d: D, e: E, g: fn(A) -> B,)"), ["f"]);
    for (name, text) in sources("src") {
        let found = code(&text);
        assert_eq!(functions_with_many_parameters(&found), [""; 0], "{name}");
    }
}

#[test]
fn request_handler_is_at_most_forty_lines() {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/proxy.rs")).expect("the file exists");
    let handle = text.split("pub fn handle").nth(1).expect("the handler").split("\n    }\n").next().expect("its end");
    assert!(handle.lines().count() <= 40, "{}", handle.lines().count());
}

#[test]
fn tests_do_not_sleep() {
    let (sleep, thread) = (["time::", "sleep("].concat(), ["thread::", "sleep"].concat());
    for (name, text) in sources("tests") {
        assert!(!text.contains(&sleep) && !text.contains(&thread), "{name}");
    }
}
