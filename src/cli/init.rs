//! `init`: writes a first configuration file.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use super::InitArgs;
use super::run::errors;
use crate::config;
use crate::process::print_line;

const TEMPLATE: &str = include_str!("init/sidecache.toml");
const SHOPIFY: &str = include_str!("init/shopify.toml");
const GENERIC: &str = include_str!("init/generic.toml");

/// Writes the configuration file, after checking that it is valid.
pub(super) fn init(args: &InitArgs) -> Result<ExitCode, String> {
    let path = args.config.display().to_string();
    let text = text(&args.upstream, args.profile.as_deref());
    let checked = config::from_text(&path, &text, Path::new("")).map_err(|found| errors(&found))?;
    let failed = |error: io::Error| {
        if error.kind() == ErrorKind::AlreadyExists {
            return format!("{path} exists and was not changed: choose another file with --config FILE");
        }
        format!("can't write {path}: {error}")
    };
    let mut file = File::create_new(&args.config).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    print_line(format!("{path}: profile {}. Next: sidecache run --config {path}", checked.upstreams[0].profile));
    Ok(ExitCode::SUCCESS)
}

fn text(upstream: &str, profile: Option<&str>) -> String {
    let host = upstream.split("://").last().unwrap_or_default();
    let host = host.split(['/', ':']).next().unwrap_or_default();
    let shopify = profile.map_or(host.ends_with(".myshopify.com"), |name| name == "shopify");
    let profile = profile.unwrap_or(if shopify { "shopify" } else { "generic" });
    TEMPLATE
        .replace("{rules}", if shopify { SHOPIFY } else { GENERIC }.trim_end())
        // A JSON string is also a TOML string.
        .replace("{url}", &serde_json::Value::from(upstream).to_string())
        .replace("{profile}", &serde_json::Value::from(profile).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_configuration_is_valid_also_with_all_settings_uncommented() {
        for (url, profile, expected) in [
            ("https://a.myshopify.com", None, "shopify"),
            ("https://api.example", None, "generic"),
            ("https://api.example", Some("shopify"), "shopify"),
        ] {
            let text = text(url, profile);
            // A commented-out setting is one word, an equals sign, a value; all other comments are prose.
            let setting = |line: &str| line.starts_with("# [") || line.split(' ').nth(2) == Some("=");
            let uncommented: Vec<&str> =
                text.lines().map(|line| if setting(line) { line.trim_start_matches("# ") } else { line }).collect();
            for text in [text.clone(), uncommented.join("\n").replace("SIDECACHE_ADMIN_TOKEN", "PATH")] {
                let config = config::from_text("init", &text, Path::new(""))
                    .unwrap_or_else(|found| panic!("{}\n{text}", errors(&found)));
                assert_eq!(config.upstreams[0].profile, expected);
            }
        }
    }

    #[test]
    fn url_with_quote_and_newline_cannot_add_a_setting() {
        let text = text("https://a.example\"\nlisten = \"0.0.0.0:1", None);
        assert!(config::from_text("init", &text, Path::new("")).is_err());
    }
}
