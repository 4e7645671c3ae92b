//! One run: an origin with versions, sidecars behind fault proxies, one Redis, clients, and the faults of a schedule.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::chaos::{Chaos, Mood};
use crate::harness::{Conn, Got, Program, ms, quantile};
use crate::oracle::{Change, MAX_UNVERIFIED, Oracle, ProcessId};
use crate::origin::{RESOURCES, origin};
use crate::schedule::{Fault, Kind, Random, Schedule};
use crate::server::Redis;

const READERS: u64 = 4;
const RULES: &str = "[[upstream.rule]]\npath = \"/r/{id}\"\nttl = \"1h\"\ntags = [\"r:{id}\"]\n";

/// A sidecar that may be down.
struct Member {
    running: RwLock<Option<(ProcessId, SocketAddr, SocketAddr)>>,
    program: Mutex<Option<Program>>,
    link: Chaos,
}

struct World {
    versions: Arc<[AtomicU64; RESOURCES]>,
    origin: SocketAddr,
    members: Vec<Member>,
    redis: Mutex<Redis>,
    oracle: Oracle,
    started: AtomicU64,
    counts: Counts,
    violations: Mutex<Vec<String>>,
    hit_times: Mutex<Vec<Duration>>,
}

#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    hits: AtomicU64,
    changes: AtomicU64,
    confirmed: AtomicU64,
    unlogged: AtomicU64,
    faults: AtomicU64,
}

/// The result of a run.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) violations: Vec<String>,
    text: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {} violations", self.text, self.violations.len())?;
        self.violations.iter().take(10).try_for_each(|violation| write!(f, "\n  {violation}"))
    }
}

/// Runs a schedule.
pub(crate) async fn run(schedule: &Schedule) -> Report {
    let world = World::start(schedule.sidecars).await;
    let begun = Instant::now();
    let end = begun + schedule.length;
    let mut tasks = JoinSet::new();
    for reader in 0..READERS {
        tasks.spawn(world.clone().read(Random::new(schedule.seed ^ (reader + 1) << 40), begun, end));
    }
    tasks.spawn(world.clone().change(Random::new(schedule.seed ^ 1 << 50), end));
    for of_redis in [true, false] {
        let faults: Vec<Fault> = schedule.faults.iter().filter(|f| f.is_of_redis() == of_redis).copied().collect();
        tasks.spawn(world.clone().inject(faults, begun));
    }
    tasks.join_all().await;
    world.report()
}

impl World {
    async fn start(sidecars: usize) -> Arc<World> {
        let (origin, versions) = origin().await;
        let redis = tokio::task::spawn_blocking(|| Redis::with(&[])).await.expect("a Redis");
        let mut members = Vec::new();
        for _ in 0..sidecars {
            let link = Chaos::before(redis.address()).await;
            members.push(Member { running: RwLock::default(), program: Mutex::default(), link });
        }
        let world = Arc::new(World {
            versions,
            origin,
            members,
            redis: Mutex::new(redis),
            oracle: Oracle::default(),
            started: AtomicU64::new(0),
            counts: Counts::default(),
            violations: Mutex::default(),
            hit_times: Mutex::default(),
        });
        for sidecar in 0..sidecars {
            world.launch(sidecar).await;
        }
        world
    }

    /// Notes when Redis has heard of a process: its health is good then, for once.
    async fn watch_announcement(self: Arc<Self>, process: ProcessId, admin: SocketAddr) {
        for _ in 0..600 {
            sleep(Duration::from_millis(50)).await;
            let Some(mut admin) = Conn::open(admin).await else { return };
            let Some(got) = admin.send("GET", "/health", "").await else { return };
            let health: Value = serde_json::from_slice(&got.body).unwrap_or_default();
            if health["components"]["redis"]["status"] == "ok" {
                return self.oracle.announced(process);
            }
        }
    }

    async fn launch(self: &Arc<Self>, sidecar: usize) {
        let member = &self.members[sidecar];
        let tables = format!(
            "{}[memory]\nmax_unverified = \"{}s\"\n[security]\nsecret = {{ env = \"CHECK_FLEET_SECRET\" }}\n",
            member.link.table(),
            MAX_UNVERIFIED.as_secs()
        );
        let origin = self.origin;
        let start = move || Program::sidecar_with_env(origin, RULES, &tables, ("CHECK_FLEET_SECRET", "check-fleet"));
        let program = tokio::task::spawn_blocking(start).await.expect("a sidecar");
        let process = ProcessId(self.started.fetch_add(1, Ordering::SeqCst));
        tokio::spawn(self.clone().watch_announcement(process, program.admin()));
        *member.running.write().expect("no panic") = Some((process, program.api(), program.admin()));
        *member.program.lock().expect("no panic") = Some(program);
    }

    fn running(&self, sidecar: usize) -> Option<(ProcessId, SocketAddr, SocketAddr)> {
        *self.members[sidecar].running.read().expect("no panic")
    }

    fn violation(&self, text: String) {
        self.violations.lock().expect("no panic").push(text);
    }

    /// Sends a request. Returns `None` if the process has ended meanwhile; a failure of a running one is a violation.
    async fn ask(
        &self,
        sidecar: usize,
        process: ProcessId,
        to: SocketAddr,
        request: (&str, &str, &str),
    ) -> Option<Got> {
        let (method, target, body) = request;
        let sent = async { Conn::open(to).await?.send(method, target, body).await };
        let got = sent.await;
        let ended = || self.running(sidecar).is_none_or(|(running, ..)| running != process);
        match got {
            Some(got) if got.status == 200 => Some(got),
            Some(got) => {
                self.violation(format!(
                    "{method} {target} at sidecar {sidecar}: status {}: {}",
                    got.status, got.head
                ));
                None
            }
            None => {
                // The process may have been ended by the schedule a moment ago.
                sleep(Duration::from_millis(200)).await;
                if !ended() {
                    self.violation(format!("{method} {target} at sidecar {sidecar}: no response"));
                }
                None
            }
        }
    }

    async fn read(self: Arc<Self>, mut random: Random, begun: Instant, end: Instant) {
        while Instant::now() < end {
            let (sidecar, resource) = (random.index(self.members.len()), random.index(RESOURCES));
            sleep(Duration::from_millis(random.below(8))).await;
            let Some((process, api, _)) = self.running(sidecar) else { continue };
            let sent = Instant::now();
            let floor = self.oracle.floor(resource, process, sent);
            let target = format!("/r/{resource}");
            let Some(got) = self.ask(sidecar, process, api, ("GET", &target, "")).await else { continue };
            let version: u64 = String::from_utf8_lossy(&got.body).parse().expect("a version");
            self.counts.reads.fetch_add(1, Ordering::Relaxed);
            self.counts.hits.fetch_add(u64::from(got.is_hit()), Ordering::Relaxed);
            if got.is_hit() {
                self.hit_times.lock().expect("no panic").push(got.took);
            }
            if let Some(floor) = floor.filter(|floor| version < floor.version) {
                let cache_status = got.head.lines().find(|line| line.starts_with("cache-status")).unwrap_or_default();
                self.violation(format!(
                    "{:.3} s: {target} at sidecar {sidecar} (process {}) returned version {version}; \
                     {} to version {} by process {} completed {:.3} s earlier; {cache_status}",
                    (sent - begun).as_secs_f64(),
                    process.0,
                    floor.what,
                    floor.version,
                    floor.process.0,
                    (sent - floor.done).as_secs_f64()
                ));
            }
        }
    }

    async fn change(self: Arc<Self>, mut random: Random, end: Instant) {
        while Instant::now() < end {
            sleep(Duration::from_millis(20 + random.below(300))).await;
            let (sidecar, resource) = (random.index(self.members.len()), random.index(RESOURCES));
            let Some((process, api, admin)) = self.running(sidecar) else { continue };
            let target = format!("/r/{resource}");
            let by_write = random.below(2) == 0;
            let soft = random.below(3) == 0;
            let (got, version, what) = if by_write {
                let got = self.ask(sidecar, process, api, ("PUT", &target, "x")).await;
                let version = got.as_ref().map(|got| String::from_utf8_lossy(&got.body).parse().expect("a version"));
                (got, version.unwrap_or(0), "write".to_owned())
            } else {
                let version = self.versions[resource].fetch_add(1, Ordering::SeqCst) + 1;
                let selector = match random.below(4) {
                    0 => format!("\"tags\":[\"r:{resource}\"]"),
                    1 => format!("\"urls\":[\"{target}\"]"),
                    2 => "\"prefixes\":[\"/r/\"]".to_owned(),
                    _ => "\"all\":true".to_owned(),
                };
                let wait = if random.below(3) == 0 { "?wait=1s" } else { "" };
                let body = format!("{{{selector},\"soft\":{soft}}}");
                let got = self.ask(sidecar, process, admin, ("POST", &format!("/purge{wait}"), &body)).await;
                (got, version, format!("purge{wait} {body}"))
            };
            let Some(got) = got else { continue };
            let reply: Value = serde_json::from_slice(&got.body).unwrap_or_default();
            let confirmed = reply["sidecars"].is_u64() && reply["applied"] == reply["sidecars"];
            self.counts.changes.fetch_add(1, Ordering::Relaxed);
            self.counts.confirmed.fetch_add(u64::from(confirmed), Ordering::Relaxed);
            self.counts.unlogged.fetch_add(u64::from(reply["logged"] == false), Ordering::Relaxed);
            self.oracle.add(Change { resource, version, process, done: Instant::now(), confirmed, what });
        }
    }

    async fn inject(self: Arc<Self>, faults: Vec<Fault>, begun: Instant) {
        for fault in faults {
            sleep_until(begun + fault.at).await;
            self.counts.faults.fetch_add(1, Ordering::Relaxed);
            match fault.kind {
                Kind::Cut(sidecar) => self.disturb(sidecar, Mood::Refuses, fault.lasts).await,
                Kind::Silent(sidecar) => self.disturb(sidecar, Mood::BlackHole, fault.lasts).await,
                Kind::NoReplies(sidecar) => self.disturb(sidecar, Mood::NoReplies, fault.lasts).await,
                Kind::Slow(sidecar) => {
                    self.disturb(sidecar, Mood::Slow(Duration::from_millis(150)), fault.lasts).await;
                }
                Kind::Kill(sidecar) | Kind::Terminate(sidecar) => {
                    *self.members[sidecar].running.write().expect("no panic") = None;
                    let program = self.members[sidecar].program.lock().expect("no panic").take();
                    let terminate = matches!(fault.kind, Kind::Terminate(_));
                    tokio::task::spawn_blocking(move || end_program(program, terminate)).await.expect("no panic");
                    sleep(fault.lasts.min(Duration::from_secs(1))).await;
                    self.launch(sidecar).await;
                }
                Kind::RedisKilled => {
                    self.redis.lock().expect("no panic").kill();
                    sleep(fault.lasts).await;
                    let world = self.clone();
                    let restart = move || world.redis.lock().expect("no panic").restart();
                    tokio::task::spawn_blocking(restart).await.expect("no panic");
                }
                Kind::RedisStopped => {
                    self.redis.lock().expect("no panic").signal(Signal::SIGSTOP);
                    sleep(fault.lasts).await;
                    self.redis.lock().expect("no panic").signal(Signal::SIGCONT);
                }
                Kind::Failover => self.fail_over(fault.lasts).await,
                Kind::Misconfigured => {
                    // A folder in the place of the snapshot.
                    let folder = self.redis.lock().expect("no panic").folder.clone();
                    let (snapshot, moved) = (folder.join("dump.rdb"), folder.join("moved.rdb"));
                    let had_one = std::fs::rename(&snapshot, &moved).is_ok();
                    std::fs::create_dir_all(snapshot.join("not-empty")).expect("writable");
                    self.command("CONFIG SET save 3600_1").await;
                    self.command("BGSAVE SCHEDULE").await;
                    sleep(fault.lasts).await;
                    std::fs::remove_dir_all(&snapshot).expect("writable");
                    if had_one {
                        std::fs::rename(&moved, &snapshot).expect("writable");
                    }
                    self.command("CONFIG SET save _").await;
                    self.command("SAVE").await;
                }
                Kind::Command(first, last) => {
                    self.command(first).await;
                    if last != "PING" {
                        sleep(fault.lasts).await;
                        self.command(last).await;
                    }
                }
            }
        }
    }

    /// Starts a replica, detaches it once it has all data, and puts it in the place of the server after `lag`.
    async fn fail_over(self: &Arc<Self>, lag: Duration) {
        self.command("CONFIG SET repl-diskless-sync-delay 0").await;
        let port = self.redis.lock().expect("no panic").port.to_string();
        let replica = tokio::task::spawn_blocking(|| Redis::with(&[])).await.expect("a Redis");
        redis::cmd("REPLICAOF").arg("127.0.0.1").arg(port).exec(&mut replica.observer()).expect("a reply");
        for _ in 0..500 {
            if replica.info("replication").contains("master_link_status:up") {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        redis::cmd("REPLICAOF").arg("NO").arg("ONE").exec(&mut replica.observer()).expect("a reply");
        sleep(lag).await;
        for member in &self.members {
            member.link.set_server(replica.address());
        }
        // The former server is killed.
        *self.redis.lock().expect("no panic") = replica;
    }

    async fn disturb(&self, sidecar: usize, mood: Mood, time: Duration) {
        self.members[sidecar].link.set(mood);
        sleep(time).await;
        self.members[sidecar].link.set(Mood::Fine);
    }

    async fn command(self: &Arc<Self>, text: &'static str) {
        let world = self.clone();
        let run = move || {
            let mut command = redis::Cmd::new();
            for word in text.split(' ') {
                // An underscore stands for a space in a word.
                command.arg(word.replace('_', " ").trim());
            }
            let mut observer = world.redis.lock().expect("no panic").observer();
            command.exec(&mut observer).expect("a reply");
        };
        tokio::task::spawn_blocking(run).await.expect("a command");
    }

    fn report(&self) -> Report {
        let counts = &self.counts;
        let text = format!(
            "{} reads ({} hits, p99 {}), {} writes and purges ({} confirmed by all, {} not logged at once), {} faults",
            counts.reads.load(Ordering::Relaxed),
            counts.hits.load(Ordering::Relaxed),
            ms(quantile(self.hit_times.lock().expect("no panic").clone(), 0.99)),
            counts.changes.load(Ordering::Relaxed),
            counts.confirmed.load(Ordering::Relaxed),
            counts.unlogged.load(Ordering::Relaxed),
            counts.faults.load(Ordering::Relaxed)
        );
        Report { violations: self.violations.lock().expect("no panic").clone(), text }
    }
}

/// Ends a sidecar. A terminated one exits by itself, within a few seconds.
fn end_program(program: Option<Program>, terminate: bool) {
    let Some(mut program) = program else { return };
    if terminate {
        program.signal(Signal::SIGTERM);
        for _ in 0..600 {
            if program.has_ended() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    program.kill();
}
