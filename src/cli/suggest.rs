//! `suggest`: proposes rules for repeated requests that were not served from the cache.
//!
//! Each rule is shown with the number of upstream calls that it would have saved. Only the last requests and the
//! counters of shadow mode are used; nothing is extrapolated to URLs that were not requested.

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde_json::Value;

use super::SuggestArgs;
use super::remote::{client, fetch_json};
use crate::config::parse_duration;
use crate::policy::millis;
use crate::process::print_line;

/// Minimum number of saved calls for a rule to be proposed.
const MIN_SAVED: usize = 2;

/// A request that was not served from the cache.
#[derive(Debug)]
struct UncachedRequest<'a> {
    ago: u64,
    same: &'a str,
    reason: &'a str,
}

/// A proposed rule, and the effect it would have had.
#[derive(Debug, PartialEq, Eq)]
struct Suggestion {
    upstream: String,
    path: String,
    uncached: usize,
    saved: usize,
    /// The most common reason why the requests were not served from the cache.
    reason: String,
}

pub(super) async fn suggest(args: SuggestArgs) -> Result<ExitCode, String> {
    let SuggestArgs { remote, ttl } = args;
    let time = parse_duration(&ttl).map_err(|e| format!("--ttl: {e}"))?;
    let client = client(&remote)?;
    let requests = fetch_json(&client, "/requests").await?;
    let requests = requests["requests"].as_array().cloned().unwrap_or_default();
    let oldest = requests.iter().filter_map(|request| request["ago_ms"].as_u64()).max().unwrap_or(0);
    print_line(format!(
        "# From the last {} requests, of {} s. Copy the rules you want under their [[upstream]].",
        requests.len(),
        oldest / 1000
    ));
    let found = suggestions(&requests, millis(time));
    if found.is_empty() {
        print_line("# No rule to suggest: no request was repeated within the ttl and fetched twice.");
    }
    let mut upstream = "";
    for suggestion in &found {
        if upstream != suggestion.upstream {
            upstream = &suggestion.upstream;
            print_line(format!("\n# upstream {upstream}"));
        }
        print_line(rule_text(suggestion, &ttl));
    }
    let stats = fetch_json(&client, "/stats").await?;
    for rule in stats["rehearsals"].as_array().into_iter().flatten() {
        print_line(shadow_line(rule));
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the proposed rules by upstream, those that save the most calls first. `ttl` is in milliseconds.
fn suggestions(requests: &[Value], ttl: u64) -> Vec<Suggestion> {
    let mut groups: BTreeMap<(&str, String), Vec<UncachedRequest<'_>>> = BTreeMap::new();
    for request in requests {
        let field = |name: &str| request[name].as_str().unwrap_or_default();
        let fetched = matches!(field("outcome"), "miss" | "bypass") && field("method") == "GET";
        let good = request["status"].as_u64().is_some_and(|status| status < 300 || status == 304);
        if fetched && good && field("detail") != "upgrade" {
            let uncached = UncachedRequest {
                ago: request["ago_ms"].as_u64().unwrap_or(0),
                same: field("same"),
                reason: field("detail"),
            };
            groups.entry((field("upstream"), template(field("path")))).or_default().push(uncached);
        }
    }
    let mut found: Vec<Suggestion> = groups
        .into_iter()
        .map(|((upstream, path), uncached)| Suggestion {
            upstream: upstream.to_owned(),
            path,
            saved: saved(&uncached, ttl),
            reason: most_common_reason(&uncached),
            uncached: uncached.len(),
        })
        .filter(|suggestion| suggestion.saved >= MIN_SAVED)
        .collect();
    found.sort_by(|a, b| (&a.upstream, b.saved).cmp(&(&b.upstream, a.saved)));
    found
}

/// Returns the number of requests that would have been hits: those within `ttl` milliseconds of a fetch of the same
/// request.
fn saved(uncached: &[UncachedRequest<'_>], ttl: u64) -> usize {
    let mut fetched: BTreeMap<&str, u64> = BTreeMap::new();
    let mut sorted: Vec<&UncachedRequest<'_>> = uncached.iter().collect();
    sorted.sort_by_key(|uncached| std::cmp::Reverse(uncached.ago));
    let mut saved = 0;
    for uncached in sorted {
        match fetched.get(uncached.same) {
            Some(fetch) if fetch - uncached.ago < ttl => saved += 1,
            _ => drop(fetched.insert(uncached.same, uncached.ago)),
        }
    }
    saved
}

fn most_common_reason(uncached: &[UncachedRequest<'_>]) -> String {
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for uncached in uncached {
        *reasons.entry(uncached.reason).or_default() += 1;
    }
    let most = reasons.into_iter().max_by_key(|(_, count)| *count);
    most.map_or("", |(reason, _)| reason).to_owned()
}

/// Returns the path with `{id}` for segments that look like an identifier: numbers, UUIDs, long hexadecimal words.
fn template(path: &str) -> String {
    let segment = |segment: &str| {
        let (field, rest) = segment.split_once('.').map_or((segment, String::new()), |(w, r)| (w, format!(".{r}")));
        let number = !field.is_empty() && field.bytes().all(|b| b.is_ascii_digit());
        let hex = field.len() >= 16 && field.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        if number || hex { format!("{{id}}{rest}") } else { segment.to_owned() }
    };
    let mut named = 0;
    let segments = path.split('/').map(segment).map(|segment| {
        // Two parameters of the same name would be an error.
        if segment.starts_with("{id}") {
            named += 1;
        }
        if named > 1 { segment.replacen("{id}", &format!("{{id{named}}}"), 1) } else { segment }
    });
    segments.collect::<Vec<_>>().join("/")
}

fn rule_text(suggestion: &Suggestion, ttl: &str) -> String {
    let Suggestion { path, uncached, saved, reason, .. } = suggestion;
    let why = match reason.as_str() {
        "no-store" | "private" => "; the upstream forbids storing it",
        "unkeyed-credential" => "; first add its credential header to [security] credential_headers",
        "request-body" | "range" => "; these requests pass through whatever the rule is",
        _ => "",
    };
    let reason = if reason.is_empty() { String::new() } else { format!(" (now: {reason}{why})") };
    format!("# saves {saved} of {uncached} calls{reason}\n[[upstream.rule]]\npath = \"{path}\"\nttl = \"{ttl}\"\n")
}

/// Formats the results of shadow mode for an existing rule.
fn shadow_line(rule: &Value) -> String {
    let count = |name: &str| rule[name].as_u64().unwrap_or(0);
    let (hits, wrong) = (count("hit"), count("wrong_hit"));
    let verdict = match (hits, wrong) {
        (0, 0) => "no hits yet",
        (_, 0) => "no hit would have differed",
        _ => "a shorter ttl, or volatile for what may differ, before it is switched on",
    };
    let field = |name: &str| rule[name].as_str().unwrap_or("?");
    format!(
        "# shadow, upstream {}, rule {}: {} hits, {wrong} of them wrong, {} misses: {verdict}",
        field("upstream"),
        field("rule"),
        hits + wrong + count("not_compared"),
        count("miss")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_repeated_within_the_ttl_give_a_rule_suggestion() {
        let one = |path: &str, same: &str, ago: u64, detail: &str| {
            json!({ "upstream": "api", "method": "GET", "path": path, "same": same, "ago_ms": ago, "status": 200,
                    "outcome": "miss", "detail": detail })
        };
        let requests = [
            one("/products/1.json", "a", 100_000, "no-freshness"),
            one("/products/1.json", "a", 90_000, "no-freshness"),
            one("/products/1.json", "a", 20_000, "no-freshness"),
            one("/products/2.json", "b", 19_000, "no-freshness"),
            one("/products/2.json", "b", 18_000, "no-store"),
            one("/once", "c", 18_000, "no-freshness"),
        ];
        let found = suggestions(&requests, 60_000);
        let expected = Suggestion {
            upstream: "api".into(),
            path: "/products/{id}.json".into(),
            uncached: 5,
            saved: 2,
            reason: "no-freshness".into(),
        };
        assert_eq!(found, [expected]);
        let text = format!("[[upstream]]\nurl = \"http://127.0.0.1:9\"\n{}", rule_text(&found[0], "1m"));
        crate::config::from_text("suggested", &text, std::path::Path::new("")).expect("it can be used as it is");
    }

    #[test]
    fn path_template_replaces_ids_with_placeholders() {
        for (path, expected) in [
            ("/products/632910392.json", "/products/{id}.json"),
            ("/a/1/b/2", "/a/{id}/b/{id2}"),
            ("/x/0f8fad5b-d9cb-469f-a165-70867728950e", "/x/{id}"),
            ("/admin/api/2026-07/shop.json", "/admin/api/2026-07/shop.json"),
            ("/", "/"),
        ] {
            assert_eq!(template(path), expected);
        }
    }
}
