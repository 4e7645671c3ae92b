//! Routing cost with 5 and with 200 rules. Run with `just route`.

use std::hint::black_box;
use std::path::Path;

use http::{HeaderMap, Method};
use sidecache::clock::Clock;
use sidecache::config;

const ROUNDS: u32 = 2_000_000;

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let headers = HeaderMap::new();
    for count in [5, 200] {
        let mut text = "[[upstream]]\nurl = \"https://api.example\"\n".to_owned();
        for i in 0..count {
            text += &format!("[[upstream.rule]]\npath = \"/admin/api/*/thing{i}/{{id}}.json\"\nttl = \"5m\"\n");
        }
        let config = config::from_text("bench", &text, Path::new("")).expect("a valid configuration");
        let router = &config.upstreams[0].router;
        for (what, path) in [("the last rule", count - 1), ("no rule", count)] {
            let path = format!("/admin/api/2026-07/thing{path}/632910392.json");
            let clock = Clock::start();
            let begun = clock.instant();
            for _ in 0..ROUNDS {
                black_box(router.route(&Method::GET, black_box(&path), None, &headers));
            }
            let each = (clock.instant() - begun) / ROUNDS;
            println!("{count:>4} rules, {what} matches: {each:?}");
        }
    }
}
