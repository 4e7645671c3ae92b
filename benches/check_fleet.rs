//! A randomised checker of the fleet's guarantees: real sidecars, a real Redis, a fault proxy before each sidecar, and
//! an oracle that knows the oldest version that each response may have. `just check-fleet`; options after `--`:
//!
//! `--seconds 60`, `--runs 1`, `--seed N` (of the first run; the next runs count up), `--shrink`: repeats a failing
//! schedule with fewer faults. Fails with the seed and the schedule if a guarantee is violated.

#[path = "../tests/support/chaos.rs"]
#[allow(dead_code)]
mod chaos;
mod harness;
#[path = "check_fleet/oracle.rs"]
mod oracle;
#[path = "check_fleet/origin.rs"]
mod origin;
#[path = "check_fleet/schedule.rs"]
mod schedule;
#[path = "../tests/support/redis.rs"]
#[allow(dead_code)]
mod server;
#[path = "check_fleet/world.rs"]
mod world;

use std::process::ExitCode;
use std::time::Duration;

use schedule::Schedule;

/// The number of sidecars.
const SIDECARS: usize = 3;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)?.parse::<u64>().ok()
    };
    // `cargo test --benches` gives no arguments, and must not take minutes.
    if arguments.is_empty() {
        return ExitCode::SUCCESS;
    }
    let length = Duration::from_secs(number("--seconds").unwrap_or(60));
    let first = number("--seed").unwrap_or_else(|| getrandom::u64().expect("random numbers") >> 32);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for seed in first..first + number("--runs").unwrap_or(1) {
        let schedule = Schedule::random(seed, length, SIDECARS);
        let report = runtime.block_on(world::run(&schedule));
        println!("seed {seed}: {report}");
        if report.violations.is_empty() {
            continue;
        }
        let smallest = if arguments.iter().any(|argument| argument == "--shrink") {
            runtime.block_on(shrink(schedule))
        } else {
            schedule
        };
        println!("repeat with --seed {seed} --seconds {}; schedule:\n{smallest}", length.as_secs());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Removes faults from a failing schedule, one at a time, as long as it still fails.
async fn shrink(mut failing: Schedule) -> Schedule {
    let mut at = 0;
    while at < failing.faults.len() {
        let mut smaller = failing.clone();
        smaller.faults.remove(at);
        let report = world::run(&smaller).await;
        println!("without {}: {report}", failing.faults[at]);
        if report.violations.is_empty() {
            at += 1;
        } else {
            failing = smaller;
        }
    }
    failing
}
