//! Rule lookup: the first rule that matches a request, found in a tree of path segments.
//!
//! The tree keeps the cost of a lookup with 200 rules at that of five.

use std::collections::HashMap;
use std::sync::Arc;

use http::{HeaderMap, Method};

use super::pattern::{Captures, PathPattern, PatternSegment, match_pieces};
use super::rule::{CacheMode, Rule};
use super::target::is_ambiguous;
use crate::policy::outcome::BypassReason;
use crate::policy::outcome_counters::OutcomeCounters;

/// How a request is handled, decided before the cache lookup.
#[derive(Debug)]
pub enum Route<'r> {
    /// Look up in the cache, under this rule.
    Cache(&'r Arc<Rule>),
    /// Pass through.
    Bypass(BypassReason),
}

/// The rules of one upstream, in their order.
#[derive(Debug)]
pub struct Router {
    rules: Vec<Arc<Rule>>,
    root: Node,
}

#[derive(Debug, Default)]
struct Node {
    literal: HashMap<Box<str>, Node>,
    shaped: Vec<(PatternSegment, Node)>,
    /// Indexes of the rules whose pattern ends here, ascending.
    end_rules: Vec<usize>,
    /// Indexes of the rules whose pattern is `**` from here, ascending.
    rest_rules: Vec<usize>,
    /// The smallest rule index in or below this node. The search skips the node if it has found a smaller one.
    min_rule: usize,
}

impl Router {
    /// Builds the tree.
    pub fn new(rules: Vec<Arc<Rule>>) -> Router {
        let mut root = Node { min_rule: 0, ..Node::default() };
        for (index, rule) in rules.iter().enumerate() {
            root.insert(&rule.path, index);
        }
        Router { rules, root }
    }

    /// Returns the rules, in the order in which they are tried.
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    /// Sets the counters of each rule to those that `tally` returns for the rule's name.
    pub fn set_counters(&mut self, tally: impl Fn(&str) -> Arc<OutcomeCounters>) {
        for rule in self.rules.iter_mut().filter_map(Arc::get_mut) {
            rule.counters = tally(&rule.name);
        }
    }

    /// Returns how a request is handled.
    pub fn route(&self, method: &Method, path: &str, query: Option<&str>, headers: &HeaderMap) -> Route<'_> {
        if *method != Method::GET && *method != Method::HEAD {
            return Route::Bypass(BypassReason::Method);
        }
        if is_ambiguous(path) {
            return Route::Bypass(BypassReason::AmbiguousTarget);
        }
        match self.find(path, |rule| rule.matches_request(method, query, headers)) {
            Some(rule) if rule.allows_upgrade(headers) => Route::Bypass(BypassReason::Upgrade),
            Some(rule) if rule.mode == CacheMode::Off => Route::Bypass(BypassReason::Off),
            Some(rule) => Route::Cache(rule),
            None => Route::Bypass(BypassReason::Off),
        }
    }

    /// Returns the first rule that matches a request, whatever its cache mode.
    pub fn rule_for(
        &self,
        method: &Method,
        path: &str,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Option<&Arc<Rule>> {
        self.find(path, |rule| rule.matches_request(method, query, headers))
    }

    /// Returns the rules whose path matches that of an unsafe request, whatever their other conditions.
    ///
    /// These rules may have stored responses that the request invalidates.
    pub fn rules_for_write<'r>(&'r self, path: &'r str) -> impl Iterator<Item = &'r Arc<Rule>> {
        self.rules.iter().filter(|rule| rule.path.captures(path).is_some())
    }

    fn find(&self, path: &str, accept: impl Fn(&Rule) -> bool) -> Option<&Arc<Rule>> {
        let mut best = usize::MAX;
        let segments = path.strip_prefix('/')?;
        self.root.search(Some(segments), &|index| accept(&self.rules[index]), &mut best);
        self.rules.get(best)
    }
}

impl Node {
    fn insert(&mut self, path: &PathPattern, index: usize) {
        let mut node = self;
        for segment in &path.segments {
            node = match segment {
                PatternSegment::Literal(literal) => {
                    node.literal.entry(literal.clone()).or_insert_with(|| Node { min_rule: index, ..Node::default() })
                }
                PatternSegment::Shaped(_) => {
                    let known = node.shaped.iter().position(|(shape, _)| shape == segment);
                    let at = known.unwrap_or_else(|| {
                        node.shaped.push((segment.clone(), Node { min_rule: index, ..Node::default() }));
                        node.shaped.len() - 1
                    });
                    &mut node.shaped[at].1
                }
            };
        }
        if path.rest { node.rest_rules.push(index) } else { node.end_rules.push(index) }
    }

    /// Searches the subtree. `rest` follows the last slash consumed, or is `None` when the path has ended.
    fn search(&self, rest: Option<&str>, accept: &dyn Fn(usize) -> bool, best: &mut usize) {
        let candidates = if rest.is_some() { &self.rest_rules } else { &self.end_rules };
        if let Some(found) = candidates.iter().take_while(|i| **i < *best).find(|i| accept(**i)) {
            *best = *found;
        }
        let Some(rest) = rest else { return };
        let (segment, rest) = rest.split_once('/').map_or((rest, None), |(segment, rest)| (segment, Some(rest)));
        if let Some(node) = self.literal.get(segment).filter(|node| node.min_rule < *best) {
            node.search(rest, accept, best);
        }
        for (shape, node) in &self.shaped {
            let PatternSegment::Shaped(pieces) = shape else { continue };
            if node.min_rule < *best && match_pieces(pieces, segment, &mut Captures::new()) {
                node.search(rest, accept, best);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str, path: &str) -> Arc<Rule> {
        Arc::new(testing::rule(name, path))
    }

    fn name(router: &Router, path: &str) -> Option<String> {
        match router.route(&Method::GET, path, None, &HeaderMap::new()) {
            Route::Cache(rule) => Some(rule.name.to_string()),
            Route::Bypass(_) => None,
        }
    }

    #[test]
    fn first_matching_rule_wins_and_ambiguous_paths_are_bypassed() {
        let router = Router::new(vec![
            rule("one", "/a/*/c"),
            rule("two", "/a/b/c"),
            rule("three", "/a/{x}.json"),
            rule("four", "/a/**"),
            rule("five", "/a/late"),
            rule("rest", "/**"),
        ]);
        let table = [
            ("/a/b/c", Some("one")),
            ("/a/x.json", Some("three")),
            ("/a/late", Some("four")),
            ("/a/b/c/d", Some("four")),
            ("/", Some("rest")),
            ("/b", Some("rest")),
            ("/a/../b", None),
            ("/a/%2E%2e/b", None),
            ("/a%2fb", None),
        ];
        for (path, expected) in table {
            assert_eq!(name(&router, path).as_deref(), expected, "{path}");
        }
    }

    #[test]
    fn router_finds_the_same_rule_as_a_linear_search() {
        use proptest::prelude::*;
        let segment = prop_oneof!["a", "b", "\\*", "[ab]\\*", "x", "y"];
        let paths = proptest::collection::vec(prop_oneof!["a", "b", "ab", "x"], 1..4);
        let patterns = proptest::collection::vec((proptest::collection::vec(segment, 1..4), any::<bool>()), 1..8);
        proptest!(|(patterns in patterns, path in paths)| {
            let text = |(segments, rest): &(Vec<String>, bool)| {
                format!("/{}{}", segments.join("/"), if *rest { "/**" } else { "" })
            };
            let rules: Vec<_> = patterns.iter().enumerate().map(|(i, p)| rule(&i.to_string(), &text(p))).collect();
            let path = format!("/{}", path.join("/"));
            let slow = rules.iter().find(|p| p.path.captures(&path).is_some()).map(|p| p.name.to_string());
            prop_assert_eq!(name(&Router::new(rules), &path), slow);
        });
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A rule with default settings, for tests.

    use std::time::Duration;

    use super::{CacheMode, PathPattern, Rule};
    use crate::policy::routing::cache_key::KeySpec;
    use crate::policy::routing::rule::{Conditions, Methods};

    pub(crate) fn rule(name: &str, path: &str) -> Rule {
        Rule {
            name: name.into(),
            methods: Methods::safe(),
            path: PathPattern::parse(path).expect("a pattern"),
            when: Conditions::default(),
            mode: CacheMode::Http,
            stale_while_revalidate: None,
            stale_if_error: None,
            last_known_good: None,
            refresh_ahead: None,
            key: KeySpec::default(),
            tags: Vec::new(),
            reject_empty: None,
            volatile: Vec::new(),
            deadline: Duration::from_secs(5),
            fallback: None,
            upgrade: Vec::new(),
            stores_set_cookie: false,
            counters: std::sync::Arc::default(),
        }
    }
}
