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
            "upstream {}: {} can be reached from other machines. As a sidecar, listen on 127.0.0.1; as a shared proxy, restrict access by a network policy or `[upstream.listen_tls] client_ca`",
            upstream.name, upstream.listen
        )
    })
}

fn rules(upstream: &UpstreamConfig) -> impl Iterator<Item = String> {
    let own = &upstream.router.rules()[..upstream.own_plans];
    let unreachable = own.iter().enumerate().filter_map(move |(at, rule)| {
        let before = own[..at].iter().find(|before| covers(before, rule))?;
        Some(format!(
            "upstream {}: rule {} ({}) can never match: rule {} ({}) comes before it and matches all of its requests. Put the narrower one first",
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
                "upstream {}: rule {} ({}) serves responses to one credential to all clients. Leave out partition = \"everyone\", unless every client of this listener may see them",
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
    fn rule_covered_by_an_earlier_rule_gives_a_warning() {
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
    fn exposed_listener_and_shared_admin_rule_give_warnings() {
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
