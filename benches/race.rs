//! Throughput comparison: the sidecar, nginx, `HAProxy`, Varnish and a minimal hyper server, each alone on core 0, with
//! wrk on core 1. Rounds are interleaved, medians reported. `cargo bench --bench race [-- hits pass rules many start]`.
//! Seconds per round and number of rounds: `RACE_SECONDS` (3), `RACE_ROUNDS` (5).

#![allow(clippy::disallowed_methods)] // measures real time

#[path = "race/servers.rs"]
mod servers;
#[path = "race/wrk.rs"]
mod wrk;

use std::time::{Duration, Instant};

use servers::{Server, Setup};
use wrk::{Round, median};

fn main() {
    let parts: Vec<String> = std::env::args().skip(1).filter(|part| !part.starts_with("--")).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|named| named == part);
    let missing: Vec<&str> = ["wrk", "nginx", "haproxy", "varnishd", "taskset"]
        .into_iter()
        .filter(|program| !servers::is_there(program))
        .collect();
    if !missing.is_empty() {
        eprintln!("missing: {}. On Debian: apt-get install wrk nginx haproxy varnish util-linux", missing.join(", "));
        std::process::exit(1);
    }
    println!("{}\n", servers::machine());
    let setup = Setup::new();
    if wanted("hits") {
        hits(&setup);
    }
    if wanted("pass") {
        pass_through(&setup);
    }
    if wanted("rules") {
        rules(&setup);
    }
    if wanted("many") {
        many(&setup);
    }
    if wanted("start") {
        start(&setup);
    }
}

/// Prints a table with one line per server and its ratio to the sidecar.
fn table(title: &str, path: &str, connections: u32, servers: &[Server]) {
    println!("{title}");
    println!(
        "  {:<12}{:>12}{:>14}{:>10}{:>10}{:>14}{:>14}",
        "", "requests/s", "CPU µs/req", "p50", "p99", "sidecar r/s ×", "sidecar CPU ×"
    );
    for server in servers {
        server.warm(path);
    }
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); servers.len()];
    for _ in 0..number("RACE_ROUNDS", 5) {
        for (server, rounds) in servers.iter().zip(&mut rounds) {
            rounds.push(wrk::round(server, path, connections, None));
        }
    }
    let figures: Vec<Round> = rounds.iter().map(|rounds| median(rounds)).collect();
    let ours = figures[0].clone();
    for (server, result) in servers.iter().zip(&figures) {
        println!(
            "  {:<12}{:>12.0}{:>14.2}{:>10}{:>10}{:>14.2}{:>14.2}{}",
            server.name,
            result.rate,
            result.cpu_micros,
            result.p50,
            result.p99,
            ours.rate / result.rate,
            ours.cpu_micros / result.cpu_micros,
            if result.errors > 0 { format!("   {} errors", result.errors) } else { String::new() }
        );
    }
    println!();
}

pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn hits(setup: &Setup) {
    let servers = [setup.sidecar(""), servers::bare_server(), setup.nginx(), setup.haproxy(), setup.varnish()];
    for size in [1024, 20480] {
        for connections in [1, 64, 1000] {
            let title = format!("hits of {} KiB, {connections} connections", size / 1024);
            table(&title, &format!("/{size}/product"), connections, &servers);
        }
    }
}

fn pass_through(setup: &Setup) {
    let off = "[[upstream.rule]]\npath = \"/**\"\ncache = \"off\"\n";
    let servers = [setup.sidecar(off), setup.nginx(), setup.haproxy()];
    table("passed through, 1 KiB, 64 connections", "/pass", 64, &servers);
}

fn rules(setup: &Setup) {
    let rule = |n: usize| format!("[[upstream.rule]]\npath = \"/api/{n}/items/{{id}}\"\nttl = \"1m\"\n");
    let many: String = (0..200).map(rule).collect();
    let servers = [setup.sidecar(&many), setup.sidecar(&rule(0))];
    println!("(first sidecar: 200 rules; second: one rule)");
    table("hits of 1 KiB, 64 connections", "/1024/product", 64, &servers);
}

/// Measures the memory per entry, and the throughput with many entries.
#[allow(clippy::cast_precision_loss)]
fn many(setup: &Setup) {
    let sidecar = setup.sidecar_with("", "[memory]\nmax_bytes = \"4GiB\"\n");
    let empty = sidecar.rss();
    println!("memory and size");
    println!("  resident when idle: {:.1} MiB", empty as f64 / 1_048_576.0);
    let mut stored = 0;
    for count in [1_000, 100_000, 1_000_000] {
        wrk::fill(&sidecar, stored, count);
        stored = count;
        let each = (sidecar.rss() - empty) as f64 / f64::from(count) / 1024.0;
        let rounds: Vec<Round> =
            (0..number("RACE_ROUNDS", 5)).map(|_| wrk::round(&sidecar, "/1024/", 64, Some(count))).collect();
        let result = median(&rounds);
        println!(
            "  {count:>9} entries of 1 KiB: {each:.2} KiB each, {:.0} requests/s at random, {:.2} µs CPU, p99 {}",
            result.rate, result.cpu_micros, result.p99
        );
    }
    println!();
}

/// Measures the time from the start of the process to its first response.
fn start(setup: &Setup) {
    let mut times: Vec<Duration> = (0..11)
        .map(|_| {
            let begun = Instant::now();
            let sidecar = setup.sidecar("");
            sidecar.warm("/1024/a");
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("start to first response (a miss): median {:?}, slowest {:?}", times[5], times[10]);
}
