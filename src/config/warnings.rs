//! Warnings of `sidecache check`: settings that are valid but probably unintended.
//!
//! Warnings do not affect anything else.

use super::{Config, UpstreamConfig};
use crate::policy::routing::cache_key::Partition;
use crate::policy::routing::rule::Rule;

/// Returns one line for each questionable setting of a valid configuration.
pub fn warnings(config: &Config) -> Vec<String> {
    config.upstreams.iter().flat_map(|upstream| exposed(upstream).into_iter().chain(rules(upstream))).collect()
}

/// Warns if other machines can reach the listener: their clients may read what `everyone` shares, and spend the
/// upstream's budget.
fn exposed(upstream: &UpstreamConfig) -> Option<String> {
    let anyone =
        !upstream.listen.ip().is_loopback() && upstream.listen_tls.as_ref().is_none_or(|tls| tls.client_ca.is_none());
    anyone.then(|| {
        format!(
            "upstream {}: {} can be reached from other machines. Beside its application, listen on 127.0.0.1; \
             shared, keep others out by a network policy or `[upstream.listen_tls] client_ca`",
            upstream.name, upstream.listen
        )
    })
}

fn rules(upstream: &UpstreamConfig) -> impl Iterator<Item = String> {
    let own = &upstream.router.rules()[..upstream.own_plans];
    let unreachable = own.iter().enumerate().filter_map(move |(at, rule)| {
        let before = own[..at].iter().find(|before| covers(before, rule))?;
        Some(format!(
            "upstream {}: rule {} ({}) can never match: rule {} ({}) stands before it and takes all it would. \
             Put the narrower one first",
            upstream.name, rule.name, rule.path, before.name, before.path
        ))
    });
    // Shopify's Admin API requires a token, and its responses may differ from one token to another.
    let shared = own
        .iter()
        .filter(|rule| upstream.profile == "shopify" && rule.key.partition == Partition::Everyone)
        .filter(|rule| rule.path.to_string().starts_with("/admin"))
        .map(|rule| {
            format!(
                "upstream {}: rule {} ({}) shares with everyone what was answered to one credential. Leave out \
                 partition = \"everyone\", unless all who reach this listener may see it",
                upstream.name, rule.name, rule.path
            )
        });
    unreachable.chain(shared)
}

/// Returns true if `wide` matches every request that `narrow` matches.
fn covers(wide: &Rule, narrow: &Rule) -> bool {
    let unconditional = wide.when.query.is_empty() && wide.when.headers.is_empty();
    unconditional && narrow.methods.0.iter().all(|m| wide.methods.0.contains(m)) && wide.path.covers(&narrow.path)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::from_text;

    fn warned(upstream: &str) -> Vec<String> {
        let text = format!("[[upstream]]\n{upstream}");
        warnings(&from_text("test", &text, Path::new("")).expect("good"))
    }

    #[test]
    fn a_rule_behind_one_that_takes_all_it_would() {
        let found = warned(
            r#"
            url = "http://api.example"
            rule = [
                { path = "/items/**", ttl = "1m", methods = ["GET"], when = { query = { a = "1" } } },
                { name = "all", path = "/items/**", ttl = "1m" },
                { name = "one", path = "/items/{id}", ttl = "5m" },
                { name = "written", path = "/items/{id}", cache = "off", methods = ["POST"] },
            ]"#,
        );
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("rule one (/items/{id}) can never match: rule all"), "{found:?}");
    }

    #[test]
    fn a_listener_that_anyone_reaches_and_what_everyone_shares() {
        let found = warned(
            r#"
            url = "https://a.myshopify.com"
            listen = "0.0.0.0:18080"
            rule = [{ path = "/admin/x", partition = "everyone" }, { path = "/x", partition = "everyone" }]"#
                .replace("partition = ", "key.partition = ")
                .as_str(),
        );
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("0.0.0.0:18080") && found[1].contains("/admin/x"), "{found:?}");
        assert_eq!(warned("url = \"http://api.example\""), Vec::<String>::new());
    }
}
