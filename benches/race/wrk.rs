//! Load generation with wrk on core 1, and parsing of its output.

use std::process::Command;

use crate::number;
use crate::servers::Server;

/// The results of one round.
#[derive(Debug, Clone)]
pub(crate) struct Round {
    pub(crate) rate: f64,
    pub(crate) cpu_micros: f64,
    pub(crate) p50: String,
    pub(crate) p99: String,
    pub(crate) errors: u64,
}

/// Loads a server for one round. With `random`, a random number below it is appended to the path.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn round(server: &Server, path: &str, connections: u32, random: Option<u32>) -> Round {
    let seconds = number("RACE_SECONDS", 3);
    let mut command = Command::new("taskset");
    command.args(["-c", "1", "wrk", "-t1", "--latency"]);
    command.arg(format!("-c{connections}")).arg(format!("-d{seconds}s"));
    let script = random.map(|count| {
        let file = std::env::temp_dir().join(format!("sidecache-race-{}.lua", std::process::id()));
        let text =
            format!("request = function() return wrk.format('GET', '{path}' .. math.random(0, {})) end\n", count - 1);
        std::fs::write(&file, text).expect("writable");
        file
    });
    if let Some(script) = &script {
        command.arg("-s").arg(script);
    }
    command.arg(format!("http://{}{path}", server.address));
    let before = server.cpu();
    let out = command.output().expect("wrk runs");
    let used = server.cpu().saturating_sub(before);
    if let Some(script) = script {
        let _ = std::fs::remove_file(script);
    }
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let after = |label: &str| text.lines().find_map(|line| line.trim().strip_prefix(label).map(str::trim));
    let requests: f64 = text
        .lines()
        .find_map(|line| line.split_once(" requests in "))
        .and_then(|(count, _)| count.trim().parse().ok())
        .unwrap_or_else(|| panic!("unexpected output of wrk: {text}"));
    let errors = after("Non-2xx or 3xx responses:").and_then(|n| n.parse().ok()).unwrap_or(0)
        + u64::from(after("Socket errors:").is_some());
    Round {
        rate: after("Requests/sec:").and_then(|n| n.parse().ok()).unwrap_or_default(),
        cpu_micros: used.as_secs_f64() * 1e6 / requests.max(1.0),
        p50: after("50%").unwrap_or("?").to_owned(),
        p99: after("99%").unwrap_or("?").to_owned(),
        errors,
    }
}

/// Returns the round with the median rate, with the median CPU time of all rounds.
pub(crate) fn median(rounds: &[Round]) -> Round {
    let mut by_rate = rounds.to_vec();
    by_rate.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    let mut middle = by_rate[by_rate.len() / 2].clone();
    let mut cpu: Vec<f64> = rounds.iter().map(|round| round.cpu_micros).collect();
    cpu.sort_by(f64::total_cmp);
    middle.cpu_micros = cpu[cpu.len() / 2];
    middle.errors = rounds.iter().map(|round| round.errors).sum();
    middle
}

/// The number of connections that fill the cache.
const WORKERS: u32 = 64;

/// Requests `/1024/{from}` to `/1024/{count - 1}` once each, over several connections.
pub(crate) fn fill(server: &Server, from: u32, count: u32) {
    use std::io::{Read, Write};
    let address = server.address;
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            std::thread::spawn(move || {
                let mut stream = std::net::TcpStream::connect(address).expect("a listener");
                let mut buffer = vec![0; 4096];
                for n in (from + worker..count).step_by(WORKERS as usize) {
                    // One write: several small ones would be delayed by Nagle's algorithm.
                    let request = format!("GET /1024/{n} HTTP/1.1\r\nHost: a\r\n\r\n");
                    stream.write_all(request.as_bytes()).expect("written");
                    let (mut have, mut whole) = (0, None);
                    while whole.is_none_or(|whole| have < whole) {
                        let read = stream.read(&mut buffer[have..]).expect("a response");
                        assert!(read > 0, "the connection ended");
                        have += read;
                        whole = buffer[..have].windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4 + 1024);
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().expect("no panic");
    }
}
