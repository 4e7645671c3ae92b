//! What the documentation says to write can be written.

use std::path::Path;

use sidecache::config;

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
fn every_configuration_in_the_documentation_is_good() {
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
fn every_file_that_the_documentation_links_to_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in
        ["README.md", "docs/HTTP.md", "docs/RECIPES.md", "docs/ON-CALL.md", "docs/RUNBOOK.md", "k8s/README.md"]
    {
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
