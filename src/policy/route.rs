//! Which rule is for this request: first match wins, found in a tree of path segments, so that 200 rules
//! cost no more than five.

use std::collections::HashMap;
use std::sync::Arc;

use http::{HeaderMap, Method};

use super::glob::{Captures, PathPattern, Segment, match_pieces};
use super::outcome::Bypass;
use super::plan::{CacheMode, Plan};
use super::tally::Tally;
use super::target::is_ambiguous;

/// What to do with a request, before any look-up.
#[derive(Debug)]
pub enum Route<'r> {
    /// Ask the cache, under this rule.
    Cache(&'r Arc<Plan>),
    /// Hand it through.
    Bypass(Bypass),
}

/// The rules of one upstream, in their order.
#[derive(Debug)]
pub struct Router {
    plans: Vec<Arc<Plan>>,
    root: Node,
}

#[derive(Debug, Default)]
struct Node {
    literal: HashMap<Box<str>, Node>,
    shaped: Vec<(Segment, Node)>,
    /// Rules whose pattern ends here, ascending.
    ends: Vec<usize>,
    /// Rules whose pattern is `**` from here, ascending.
    rests: Vec<usize>,
    /// The smallest rule in or below this node: nothing better is found below a larger one.
    least: usize,
}

impl Router {
    /// Builds the tree.
    pub fn new(plans: Vec<Arc<Plan>>) -> Router {
        let mut root = Node { least: 0, ..Node::default() };
        for (index, plan) in plans.iter().enumerate() {
            root.insert(&plan.path, index);
        }
        Router { plans, root }
    }

    /// The rules, in the order they are tried.
    pub fn plans(&self) -> &[Arc<Plan>] {
        &self.plans
    }

    /// Has the rules count where `tally` says, by their names.
    pub fn count_in(&mut self, tally: impl Fn(&str) -> Arc<Tally>) {
        for plan in self.plans.iter_mut().filter_map(Arc::get_mut) {
            plan.tally = tally(&plan.name);
        }
    }

    /// The way of a request.
    pub fn route(&self, method: &Method, path: &str, query: Option<&str>, headers: &HeaderMap) -> Route<'_> {
        if *method != Method::GET && *method != Method::HEAD {
            return Route::Bypass(Bypass::Method);
        }
        if is_ambiguous(path) {
            return Route::Bypass(Bypass::AmbiguousTarget);
        }
        match self.find(path, |plan| plan.accepts(method, query, headers)) {
            Some(plan) if plan.upgrades(headers) => Route::Bypass(Bypass::Upgrade),
            Some(plan) if plan.mode == CacheMode::Off => Route::Bypass(Bypass::Off),
            Some(plan) => Route::Cache(plan),
            None => Route::Bypass(Bypass::Off),
        }
    }

    /// The rule that matches a request, whatever it says.
    pub fn rule_for(
        &self,
        method: &Method,
        path: &str,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Option<&Arc<Plan>> {
        self.find(path, |plan| plan.accepts(method, query, headers))
    }

    /// The rules that cache reads of what an unsafe request to `path` changes, whatever else they ask of a read.
    pub fn rules_for_write<'r>(&'r self, path: &'r str) -> impl Iterator<Item = &'r Arc<Plan>> {
        self.plans.iter().filter(|plan| plan.path.captures(path).is_some())
    }

    fn find(&self, path: &str, accept: impl Fn(&Plan) -> bool) -> Option<&Arc<Plan>> {
        let mut best = usize::MAX;
        let segments = path.strip_prefix('/')?;
        self.root.search(Some(segments), &|index| accept(&self.plans[index]), &mut best);
        self.plans.get(best)
    }
}

impl Node {
    fn insert(&mut self, path: &PathPattern, index: usize) {
        let mut node = self;
        for segment in &path.segments {
            node = match segment {
                Segment::Literal(literal) => {
                    node.literal.entry(literal.clone()).or_insert_with(|| Node { least: index, ..Node::default() })
                }
                Segment::Shaped(_) => {
                    let known = node.shaped.iter().position(|(shape, _)| shape == segment);
                    let at = known.unwrap_or_else(|| {
                        node.shaped.push((segment.clone(), Node { least: index, ..Node::default() }));
                        node.shaped.len() - 1
                    });
                    &mut node.shaped[at].1
                }
            };
        }
        if path.rest { node.rests.push(index) } else { node.ends.push(index) }
    }

    /// `rest` is what follows the last slash taken, or `None` when the path has ended.
    fn search(&self, rest: Option<&str>, accept: &dyn Fn(usize) -> bool, best: &mut usize) {
        let candidates = if rest.is_some() { &self.rests } else { &self.ends };
        if let Some(found) = candidates.iter().take_while(|i| **i < *best).find(|i| accept(**i)) {
            *best = *found;
        }
        let Some(rest) = rest else { return };
        let (segment, rest) = rest.split_once('/').map_or((rest, None), |(segment, rest)| (segment, Some(rest)));
        if let Some(node) = self.literal.get(segment).filter(|node| node.least < *best) {
            node.search(rest, accept, best);
        }
        for (shape, node) in &self.shaped {
            let Segment::Shaped(pieces) = shape else { continue };
            if node.least < *best && match_pieces(pieces, segment, &mut Captures::new()) {
                node.search(rest, accept, best);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(name: &str, path: &str) -> Arc<Plan> {
        Arc::new(testing::plan(name, path))
    }

    fn name(router: &Router, path: &str) -> Option<String> {
        match router.route(&Method::GET, path, None, &HeaderMap::new()) {
            Route::Cache(plan) => Some(plan.name.to_string()),
            Route::Bypass(_) => None,
        }
    }

    #[test]
    fn the_first_rule_that_matches_wins_wherever_it_hangs_in_the_tree() {
        let router = Router::new(vec![
            plan("one", "/a/*/c"),
            plan("two", "/a/b/c"),
            plan("three", "/a/{x}.json"),
            plan("four", "/a/**"),
            plan("five", "/a/late"),
            plan("rest", "/**"),
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
    fn the_tree_agrees_with_trying_every_rule_in_order() {
        use proptest::prelude::*;
        let segment = prop_oneof!["a", "b", "\\*", "[ab]\\*", "x", "y"];
        let paths = proptest::collection::vec(prop_oneof!["a", "b", "ab", "x"], 1..4);
        let patterns = proptest::collection::vec((proptest::collection::vec(segment, 1..4), any::<bool>()), 1..8);
        proptest!(|(patterns in patterns, path in paths)| {
            let text = |(segments, rest): &(Vec<String>, bool)| {
                format!("/{}{}", segments.join("/"), if *rest { "/**" } else { "" })
            };
            let plans: Vec<_> = patterns.iter().enumerate().map(|(i, p)| plan(&i.to_string(), &text(p))).collect();
            let path = format!("/{}", path.join("/"));
            let slow = plans.iter().find(|p| p.path.captures(&path).is_some()).map(|p| p.name.to_string());
            prop_assert_eq!(name(&Router::new(plans), &path), slow);
        });
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A rule of no particular content.

    use std::time::Duration;

    use super::{CacheMode, PathPattern, Plan};
    use crate::policy::key::KeyPlan;
    use crate::policy::plan::{Methods, When};

    pub(crate) fn plan(name: &str, path: &str) -> Plan {
        Plan {
            name: name.into(),
            methods: Methods::safe(),
            path: PathPattern::parse(path).expect("a pattern"),
            when: When::default(),
            mode: CacheMode::Http,
            stale_while_revalidate: None,
            stale_if_error: None,
            last_known_good: None,
            refresh_ahead: None,
            key: KeyPlan::default(),
            tags: Vec::new(),
            reject_empty: None,
            volatile: Vec::new(),
            deadline: Duration::from_secs(5),
            fallback: None,
            upgrade: Vec::new(),
            keeps_cookies: false,
            tally: std::sync::Arc::default(),
        }
    }
}
