//! A connection that is watched: commands with a deadline, a bound on how many are under way, a breaker, and a
//! supervisor that replaces the client when it is gone or no longer answers.
//!
//! The supervisor asks for the server's time now and then, at once after a missed deadline, and without end while the
//! breaker is open: so silence is noticed within a few milliseconds of the first miss, and its end at once.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use fred::clients::{Client, WithOptions};
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike, FredResult, KeysInterface};
use fred::types::config::Options;
use fred::types::{ClusterHash, CustomCommand, Expiration, InfoKind};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use super::connect::{Connection, connect};
use super::errors::{first_line, is_lost, must_reconnect};
use super::herald::Herald;
use super::{Trouble, Why};
use crate::clock::{Clock, Told};
use crate::config;
use crate::policy::breaker::{Breaker, Fault};
use crate::telemetry::Latencies;

/// So many commands may be under way on one connection.
pub const IN_FLIGHT: usize = 32;

/// The supervisor asks for the time so often when all is well.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// After a missed deadline: no answer to the supervisor for so long opens the breaker.
const SUSPICION: Duration = Duration::from_millis(50);

/// A client that has not answered for so long is replaced.
const REPLACE: Duration = Duration::from_secs(2);

/// Between attempts to connect, doubled from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(400));

/// A client as commands get it: with their deadline.
pub(super) type Asking = WithOptions<Client>;

/// A supervised connection.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) name: &'static str,
    /// The slot whose node tells the time, in a cluster.
    slot: u16,
    /// How often it is asked for the time when all is well. One that waits at the server is not: the answer would wait
    /// too, and its own deadline tells as much.
    heartbeat: Option<Duration>,
    client: ArcSwapOption<Client>,
    breaker: Mutex<Breaker>,
    places: Semaphore,
    clock: Clock,
    /// A deadline was missed: look.
    missed: Notify,
    /// It answers, but as one that should not be asked: connect anew.
    replace: Notify,
    /// A connection is there.
    connected: Notify,
    herald: Arc<Herald>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    ok: AtomicU64,
    refused: AtomicU64,
    missed: AtomicU64,
    lost: AtomicU64,
    unasked: AtomicU64,
    connections: AtomicU64,
    latencies: Latencies,
}

/// What `/stats` and `/health` say of a connection.
#[derive(Debug, Clone, serde::Serialize)]
pub struct LinkState {
    /// Is there a connection?
    pub connected: bool,
    /// `closed` or `open`.
    pub breaker: &'static str,
    /// Commands answered.
    pub ok: u64,
    /// Commands answered with an error.
    pub refused: u64,
    /// Commands not answered in time.
    pub missed: u64,
    /// Commands whose connection was lost.
    pub lost: u64,
    /// Commands not sent: the breaker was open, no connection was there, or too many were under way.
    pub unasked: u64,
    /// Connections made.
    pub connections: u64,
    /// Milliseconds that half, and all but one in a hundred, of the commands took at most. Not counted where commands
    /// wait at the server.
    pub p50_ms: f64,
    /// See `p50_ms`.
    pub p99_ms: f64,
}

impl Link {
    pub(super) fn new(name: &'static str, slot: u16, waits: bool, clock: Clock, herald: Arc<Herald>) -> Arc<Link> {
        Arc::new(Link {
            name,
            slot,
            heartbeat: (!waits).then_some(HEARTBEAT),
            client: ArcSwapOption::empty(),
            breaker: Mutex::default(),
            places: Semaphore::new(IN_FLIGHT),
            clock,
            missed: Notify::new(),
            replace: Notify::new(),
            connected: Notify::new(),
            herald,
            counts: Counts::default(),
        })
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command, if that makes sense now, for at most `deadline`.
    pub(super) async fn run<T, F>(&self, deadline: Duration, command: impl FnOnce(Asking) -> F) -> Result<T, Trouble>
    where
        F: Future<Output = FredResult<T>>,
    {
        let unasked = |why| {
            self.counts.unasked.fetch_add(1, Relaxed);
            Err(Trouble { why, message: String::new() })
        };
        let Some(client) = self.client.load_full() else { return unasked(Why::Down) };
        if !self.breaker().admits(self.clock.now()) {
            return unasked(Why::Open);
        }
        let begun = self.clock.instant();
        let Some((_place, deadline)) = self.place(deadline).await else { return unasked(Why::Busy) };
        // The deadline is ours to keep: a second timer would only cost.
        let options = Options { timeout: Some(Duration::ZERO), fail_fast: true, ..Options::default() };
        let result = timeout(deadline, command(client.with_options(&options))).await;
        if self.heartbeat.is_some() {
            self.counts.latencies.add(self.clock.instant().saturating_duration_since(begun));
        }
        match result {
            Ok(Ok(value)) => {
                self.breaker().succeeded();
                self.counts.ok.fetch_add(1, Relaxed);
                Ok(value)
            }
            Ok(Err(error)) => Err(self.failed(&client, &error)),
            Err(_elapsed) => Err(self.silent(&client)),
        }
    }

    /// A place among the commands under way, and what is left of the deadline then. As long as all goes well it is worth
    /// waiting for one; once a deadline was missed it is not.
    async fn place(&self, deadline: Duration) -> Option<(SemaphorePermit<'_>, Duration)> {
        if let Ok(place) = self.places.try_acquire() {
            return Some((place, deadline));
        }
        if !self.breaker().is_calm() {
            return None;
        }
        let begun = Instant::now();
        let place = timeout(deadline, self.places.acquire()).await.ok()?.ok()?;
        Some((place, deadline.checked_sub(begun.elapsed())?))
    }

    /// Is there a connection, and would a command be sent?
    pub(super) fn answers(&self) -> bool {
        self.client.load().is_some() && self.breaker().would_admit(self.clock.now())
    }

    /// Waits until there is a connection.
    pub(super) async fn connected(&self) {
        loop {
            let connected = self.connected.notified();
            tokio::pin!(connected);
            connected.as_mut().enable();
            if self.client.load().is_some() {
                return;
            }
            connected.await;
        }
    }

    fn silent(&self, client: &Arc<Client>) -> Trouble {
        self.counts.missed.fetch_add(1, Relaxed);
        let trouble = Trouble { why: Why::Silent, message: "no answer within the command timeout".into() };
        self.note(client, Fault::Silence, &trouble.message);
        self.missed.notify_one();
        trouble
    }

    fn failed(&self, client: &Arc<Client>, error: &Error) -> Trouble {
        if *error.kind() == ErrorKind::Timeout {
            return self.silent(client);
        }
        let message = first_line(error.details());
        if is_lost(error) {
            self.counts.lost.fetch_add(1, Relaxed);
            return Trouble { why: Why::Down, message };
        }
        self.counts.refused.fetch_add(1, Relaxed);
        self.note(client, Fault::Refusal, &message);
        if must_reconnect(&message) && self.is_current(client) {
            self.replace.notify_one();
        }
        Trouble { why: Why::Refused, message }
    }

    fn is_current(&self, client: &Arc<Client>) -> bool {
        self.client.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, client))
    }

    /// Counts against the breaker what a client that is still the current one did.
    fn note(&self, client: &Arc<Client>, fault: Fault, message: &str) {
        if !self.is_current(client) {
            return;
        }
        if self.breaker().failed(fault, self.clock.now()) {
            self.herald.say(self.name, &format!("not asked any more: {message}"));
        } else if fault == Fault::Refusal {
            self.herald.say(self.name, message);
        }
    }

    /// Supervises for ever. `on_time` hears the server's time.
    pub(super) async fn supervise(self: Arc<Self>, config: Arc<config::Redis>, database: u8, on_time: impl Fn(Told)) {
        let mut pause = BACKOFF.0;
        loop {
            let lost = match self.attempt(&config, database, &on_time).await {
                Ok((connection, connected_at)) => {
                    let lost = self.watch(connection, &on_time).await;
                    if connected_at.elapsed() > REPLACE {
                        pause = BACKOFF.0;
                    }
                    lost
                }
                Err(why) => why,
            };
            self.herald.down(self.name, &lost);
            let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
            tokio::time::sleep(pause.mul_f64(0.5 + jitter / 2.0)).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Connects, and hears a first answer.
    async fn attempt(
        &self,
        config: &config::Redis,
        database: u8,
        on_time: &impl Fn(Told),
    ) -> Result<(Connection, Instant), String> {
        let connection = connect(config, database).await?;
        let told = match timeout(REPLACE, server_time(&connection.client, self.slot)).await {
            Ok(Ok(told)) => told,
            Ok(Err(error)) => return Err(first_line(error.details())),
            Err(_elapsed) => return Err("connected, but no answer".into()),
        };
        on_time(told);
        // What was said of the last one does not concern this one.
        for told in [&self.replace, &self.missed] {
            let _ = timeout(Duration::ZERO, told.notified()).await;
        }
        self.counts.connections.fetch_add(1, Relaxed);
        self.breaker().succeeded();
        self.client.store(Some(Arc::new(connection.client.clone())));
        self.connected.notify_waiters();
        self.herald.up(self.name);
        Ok((connection, Instant::now()))
    }

    /// Watches until the connection is lost or given up: why.
    async fn watch(&self, connection: Connection, on_time: &impl Fn(Told)) -> String {
        let Connection { client, mut driver } = connection;
        let lost = loop {
            let suspicious = tokio::select! {
                why = driver.ended() => break why,
                () = self.replace.notified() => break "the server asks for another connection".into(),
                () = self.missed.notified() => true,
                () = pause(self.heartbeat) => false,
            };
            tokio::select! {
                why = driver.ended() => break why,
                heard = self.listen(&client, suspicious, on_time) => match heard {
                    Ok(()) => self.breaker().heard(),
                    Err(why) => break why,
                },
            }
        };
        self.client.store(None);
        // Whatever still waits on the old client is not worth waiting for.
        drop(driver);
        lost
    }

    /// Asks for the time once, and waits for the answer until the client has to be replaced.
    async fn listen(&self, client: &Client, suspicious: bool, on_time: &impl Fn(Told)) -> Result<(), String> {
        let asked = server_time(client, self.slot);
        tokio::pin!(asked);
        let patience = if suspicious { SUSPICION } else { HEARTBEAT };
        let answer = match timeout(patience, &mut asked).await {
            Ok(answer) => answer,
            Err(_elapsed) => {
                if self.breaker().trip() {
                    self.herald.say(self.name, "not asked any more: no answer");
                }
                match timeout(REPLACE, asked).await {
                    Ok(answer) => answer,
                    Err(_elapsed) => return Err("no answer".into()),
                }
            }
        };
        match answer {
            Ok(told) => on_time(told),
            Err(error) if is_lost(&error) => return Err(first_line(error.details())),
            // An error is an answer.
            Err(error) => self.herald.say(self.name, &first_line(error.details())),
        }
        Ok(())
    }

    /// How long commands took; nothing where they wait at the server.
    pub(super) fn took(&self) -> &Latencies {
        &self.counts.latencies
    }

    pub(super) fn state(&self) -> LinkState {
        let counts = &self.counts;
        LinkState {
            connected: self.client.load().is_some(),
            breaker: if self.breaker().is_open() { "open" } else { "closed" },
            ok: counts.ok.load(Relaxed),
            refused: counts.refused.load(Relaxed),
            missed: counts.missed.load(Relaxed),
            lost: counts.lost.load(Relaxed),
            unasked: counts.unasked.load(Relaxed),
            connections: counts.connections.load(Relaxed),
            p50_ms: counts.latencies.quantile_ms(0.5),
            p99_ms: counts.latencies.quantile_ms(0.99),
        }
    }
}

/// So long, or for ever.
async fn pause(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// TIME: seconds since the epoch, and microseconds.
async fn server_time(client: &Client, slot: u16) -> FredResult<Told> {
    let asked = Instant::now().into_std();
    let command = CustomCommand::new_static("TIME", ClusterHash::Custom(slot), false);
    let (seconds, micros): (u64, u64) = client.custom(command, Vec::<String>::new()).await?;
    Ok(Told { server: seconds * 1000 + micros / 1000, asked })
}

/// Reads and writes once: the server's version.
pub(super) async fn try_out(client: &Client, prefix: &str) -> Result<String, String> {
    let key = format!("{prefix}:1:probe");
    let tried = async {
        let () = client.set(&key, "", Some(Expiration::PX(1000)), None, false).await?;
        let info: String = client.info(Some(InfoKind::Server)).await.unwrap_or_default();
        let version = info.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or("unknown");
        Ok::<_, Error>(version.trim().to_owned())
    };
    match timeout(REPLACE, tried).await {
        Ok(tried) => tried.map_err(|error| first_line(error.details())),
        Err(_elapsed) => Err("connected, but no answer".into()),
    }
}
