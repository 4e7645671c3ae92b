//! A supervised connection: deadlines, a limit of commands in flight, a circuit breaker, and reconnection.
//!
//! The supervisor replaces the client when its connection is lost or no longer responds. It pings the server, asking
//! for its time, at intervals, at once after a missed deadline, and without end while the circuit breaker is open. So an
//! unresponsive server is noticed within a few milliseconds of the first missed deadline, and its return at once.

use std::sync::atomic::Ordering::Relaxed;
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
use super::connection_state::{ConnectionCounters, ConnectionState};
use super::errors::{first_line, is_connection_lost, must_reconnect};
use super::log_throttle::LogThrottle;
use super::{RedisConfig, RedisError, RedisErrorKind};
use crate::clock::{Clock, ServerTime};
use crate::policy::resilience::circuit_breaker::{BreakerConfig, CircuitBreaker, Recovery};
use crate::telemetry::Histogram;

/// Maximum number of commands in flight on one connection.
pub const MAX_IN_FLIGHT: usize = 32;

/// Interval of the supervisor's pings while there is no failure, and no other command shows that the server responds.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Timeout of such a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// Timeout of a ping after a missed deadline, which opens the breaker.
const SUSPECT_TIMEOUT: Duration = Duration::from_millis(50);

/// A client that has not answered a ping for this long is replaced.
const REPLACE_AFTER: Duration = Duration::from_secs(2);

/// Backoff between attempts to connect: the first pause, doubled up to the maximum.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(400));

/// Circuit breaker of a connection. Timeouts open it until a ping is answered, errors for `open_for`.
const BREAKER: BreakerConfig =
    BreakerConfig { failures: 5, open_for: Duration::from_secs(1), failure_ratio: false, on_5xx: false };

/// The client passed to commands, with options that leave the deadline to the caller.
pub(super) type TimedClient = WithOptions<Client>;

/// A supervised connection.
#[derive(Debug)]
pub(super) struct SupervisedConnection {
    pub(super) name: &'static str,
    /// In a cluster, the hash slot whose node is asked for the time.
    slot: u16,
    /// Interval of pings while there is no failure. `None` for a connection that waits at the server: the reply to a
    /// ping would wait too, and the command's own deadline serves the same purpose.
    heartbeat: Option<Duration>,
    client: ArcSwapOption<Client>,
    /// The run ID of the server: another one after a restart, or on another server.
    server_id: ArcSwapOption<String>,
    breaker: Mutex<CircuitBreaker>,
    slots: Semaphore,
    clock: Clock,
    /// Notified when a deadline was missed, to ping at once.
    deadline_missed: Notify,
    /// Notified when the server's replies call for a new connection.
    replace: Notify,
    /// Notified when a connection has been made.
    connected: Notify,
    log_throttle: Arc<LogThrottle>,
    counts: ConnectionCounters,
}

impl SupervisedConnection {
    pub(super) fn new(
        name: &'static str,
        slot: u16,
        waits: bool,
        clock: Clock,
        log_throttle: Arc<LogThrottle>,
    ) -> Arc<SupervisedConnection> {
        Arc::new(SupervisedConnection {
            name,
            slot,
            heartbeat: (!waits).then_some(HEARTBEAT),
            client: ArcSwapOption::empty(),
            server_id: ArcSwapOption::empty(),
            breaker: Mutex::default(),
            slots: Semaphore::new(MAX_IN_FLIGHT),
            clock,
            deadline_missed: Notify::new(),
            replace: Notify::new(),
            connected: Notify::new(),
            log_throttle,
            counts: ConnectionCounters::default(),
        })
    }

    fn breaker(&self) -> MutexGuard<'_, CircuitBreaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command for at most `deadline`. Fails at once if there is no connection or the circuit breaker is open.
    pub(super) async fn run<T, F>(
        &self,
        deadline: Duration,
        command: impl FnOnce(TimedClient) -> F,
    ) -> Result<T, RedisError>
    where
        F: Future<Output = FredResult<T>>,
    {
        let unasked = |why| {
            self.counts.unasked.fetch_add(1, Relaxed);
            Err(RedisError { why, message: String::new() })
        };
        let Some(client) = self.client.load_full() else { return unasked(RedisErrorKind::Down) };
        if self.breaker().admit(&BREAKER, self.clock.now()).is_err() {
            return unasked(RedisErrorKind::Open);
        }
        let begun = self.clock.instant();
        let Some((_place, deadline)) = self.acquire_slot(deadline).await else {
            return unasked(RedisErrorKind::Busy);
        };
        // The timeout below enforces the deadline: a second timer in fred would only cost.
        let options = Options { timeout: Some(Duration::ZERO), fail_fast: true, ..Options::default() };
        let result = timeout(deadline, command(client.with_options(&options))).await;
        if self.heartbeat.is_some() {
            self.counts.latencies.add(self.clock.instant().saturating_duration_since(begun));
        }
        match result {
            Ok(Ok(value)) => {
                self.breaker().reset();
                self.counts.ok.fetch_add(1, Relaxed);
                Ok(value)
            }
            Ok(Err(error)) => Err(self.on_error(&client, &error)),
            Err(_elapsed) => Err(self.on_timeout(&client)),
        }
    }

    /// Acquires a slot for a command in flight, and returns it with the rest of the deadline. Waits for a slot unless
    /// there was a failure since the last success.
    async fn acquire_slot(&self, deadline: Duration) -> Option<(SemaphorePermit<'_>, Duration)> {
        if let Ok(place) = self.slots.try_acquire() {
            return Some((place, deadline));
        }
        if !self.breaker().has_no_failures() {
            return None;
        }
        let begun = Instant::now();
        let place = timeout(deadline, self.slots.acquire()).await.ok()?.ok()?;
        Some((place, deadline.checked_sub(begun.elapsed())?))
    }

    /// Returns the run ID of the server. Empty before the first connection.
    pub(super) fn server_id(&self) -> String {
        self.server_id.load().as_deref().cloned().unwrap_or_default()
    }

    /// Returns true if there is a connection and the breaker would admit a command.
    pub(super) fn is_usable(&self) -> bool {
        self.client.load().is_some() && self.breaker().refuses_for(&BREAKER, self.clock.now()).is_none()
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

    fn on_timeout(&self, client: &Arc<Client>) -> RedisError {
        self.counts.deadline_missed.fetch_add(1, Relaxed);
        let timed_out =
            RedisError { why: RedisErrorKind::Silent, message: "no reply within redis.command_timeout".into() };
        self.record_failure(client, Recovery::Reset, &timed_out.message);
        self.deadline_missed.notify_one();
        timed_out
    }

    fn on_error(&self, client: &Arc<Client>, error: &Error) -> RedisError {
        if *error.kind() == ErrorKind::Timeout {
            return self.on_timeout(client);
        }
        let message = first_line(error.details());
        if is_connection_lost(error) {
            self.counts.lost.fetch_add(1, Relaxed);
            return RedisError { why: RedisErrorKind::Down, message };
        }
        self.counts.refused.fetch_add(1, Relaxed);
        self.record_failure(client, Recovery::Probe, &message);
        if must_reconnect(&message) && self.is_current(client) {
            self.replace.notify_one();
        }
        RedisError { why: RedisErrorKind::Refused, message }
    }

    fn is_current(&self, client: &Arc<Client>) -> bool {
        self.client.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, client))
    }

    /// Records a failure with the breaker, if `client` is still the current one.
    fn record_failure(&self, client: &Arc<Client>, recovery: Recovery, message: &str) {
        if !self.is_current(client) {
            return;
        }
        if self.breaker().failed_with(&BREAKER, recovery, self.clock.now()) {
            self.log_throttle.warn(self.name, &format!("circuit breaker opened: {message}"));
        } else if recovery == Recovery::Probe {
            self.log_throttle.warn(self.name, message);
        }
    }

    /// Connects, watches and reconnects, forever. `on_time` is called with the server's time.
    pub(super) async fn supervise(
        self: Arc<Self>,
        config: Arc<RedisConfig>,
        database: u8,
        on_time: impl Fn(ServerTime),
    ) {
        let mut backoff = BACKOFF.0;
        loop {
            let lost = match self.connect_once(&config, database, &on_time).await {
                Ok((connection, connected_at)) => {
                    let lost = self.watch(connection, connected_at, &on_time).await;
                    if connected_at.elapsed() > REPLACE_AFTER {
                        backoff = BACKOFF.0;
                    }
                    lost
                }
                Err(why) => why,
            };
            self.log_throttle.down(self.name, &lost);
            let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
            tokio::time::sleep(backoff.mul_f64(0.5 + jitter / 2.0)).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    /// Connects, and waits for the reply to a first ping.
    async fn connect_once(
        &self,
        config: &RedisConfig,
        database: u8,
        on_time: &impl Fn(ServerTime),
    ) -> Result<(Connection, Instant), String> {
        let connection = connect(config, database).await?;
        let time = match timeout(REPLACE_AFTER, server_time(&connection.client, self.slot)).await {
            Ok(Ok(time)) => time,
            Ok(Err(error)) => return Err(first_line(error.details())),
            Err(_elapsed) => return Err("connected, but no reply".into()),
        };
        on_time(time);
        self.server_id.store(Some(Arc::new(run_id(&connection.client, self.slot).await?)));
        // Notifications about the previous connection do not apply to this one.
        for notify in [&self.replace, &self.deadline_missed] {
            let _ = timeout(Duration::ZERO, notify.notified()).await;
        }
        self.counts.connections.fetch_add(1, Relaxed);
        self.breaker().reset();
        self.client.store(Some(Arc::new(connection.client.clone())));
        self.connected.notify_waiters();
        self.log_throttle.up(self.name);
        Ok((connection, Instant::now()))
    }

    /// Watches until the connection is lost or given up, and returns the reason.
    async fn watch(&self, connection: Connection, connected_at: Instant, on_time: &impl Fn(ServerTime)) -> String {
        let Connection { client, mut driver } = connection;
        let mut replies = self.counts.ok.load(Relaxed);
        let lost = loop {
            let suspicious = tokio::select! {
                why = driver.ended() => break why,
                () = self.replace.notified() => {
                    // A server that stays read-only would be connected to again and again.
                    if connected_at.elapsed() < REPLACE_AFTER {
                        continue;
                    }
                    break "the server is read-only, or another one has its data".into()
                }
                () = self.deadline_missed.notified() => true,
                () = sleep_or_pend(self.heartbeat) => {
                    let before = std::mem::replace(&mut replies, self.counts.ok.load(Relaxed));
                    if before != replies {
                        continue;
                    }
                    false
                }
            };
            tokio::select! {
                why = driver.ended() => break why,
                heard = self.ping(&client, suspicious, on_time) => match heard {
                    Ok(()) => self.breaker().reset_open(),
                    Err(why) => break why,
                },
            }
        };
        self.client.store(None);
        // Commands that still wait on the old client are aborted.
        drop(driver);
        lost
    }

    /// Asks for the time once. Returns an error if the client has to be replaced.
    async fn ping(&self, client: &Client, suspicious: bool, on_time: &impl Fn(ServerTime)) -> Result<(), String> {
        let request = server_time(client, self.slot);
        tokio::pin!(request);
        let patience = if suspicious { SUSPECT_TIMEOUT } else { PING_TIMEOUT };
        let reply = match timeout(patience, &mut request).await {
            Ok(reply) => reply,
            Err(_elapsed) => {
                if self.breaker().open_until_reset() {
                    self.log_throttle.warn(self.name, "circuit breaker opened: no reply");
                }
                match timeout(REPLACE_AFTER, request).await {
                    Ok(reply) => reply,
                    Err(_elapsed) => return Err("no answer".into()),
                }
            }
        };
        match reply {
            Ok(time) => on_time(time),
            Err(error) if is_connection_lost(&error) => return Err(first_line(error.details())),
            // An error reply shows that the server responds.
            Err(error) => self.log_throttle.warn(self.name, &first_line(error.details())),
        }
        Ok(())
    }

    /// Returns the latencies of commands. Empty for a connection whose commands wait at the server.
    pub(super) fn latencies(&self) -> &Histogram {
        &self.counts.latencies
    }

    pub(super) fn state(&self) -> ConnectionState {
        self.counts.state(self.client.load().is_some(), self.breaker().is_closed())
    }
}

/// Sleeps for this time, or forever.
async fn sleep_or_pend(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// Asks the server for its time. TIME returns seconds since the Unix epoch, and microseconds.
async fn server_time(client: &Client, slot: u16) -> FredResult<ServerTime> {
    let sent_at = Instant::now().into_std();
    let command = CustomCommand::new_static("TIME", ClusterHash::Custom(slot), false);
    let (seconds, micros): (u64, u64) = client.custom(command, Vec::<String>::new()).await?;
    Ok(ServerTime { server: seconds * 1000 + micros / 1000, sent_at })
}

/// Asks the server for its run ID, which is random for each process of a server.
async fn run_id(client: &Client, slot: u16) -> Result<String, String> {
    let command = CustomCommand::new_static("INFO", ClusterHash::Custom(slot), false);
    let info = timeout(REPLACE_AFTER, client.custom::<String, _>(command, vec!["server"])).await;
    let info = info.map_err(|_elapsed| "connected, but no reply")?.map_err(|error| first_line(error.details()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("run_id:")).unwrap_or("unknown");
    Ok(id.trim().to_owned())
}

/// Writes and reads once, and returns the server's version.
pub(super) async fn check_read_write(client: &Client, prefix: &str) -> Result<String, String> {
    let key = format!("{prefix}:1:probe");
    let tried = async {
        let () = client.set(&key, "", Some(Expiration::PX(1000)), None, false).await?;
        let info: String = client.info(Some(InfoKind::Server)).await.unwrap_or_default();
        let version = info.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or("unknown");
        Ok::<_, Error>(version.trim().to_owned())
    };
    match timeout(REPLACE_AFTER, tried).await {
        Ok(tried) => tried.map_err(|error| first_line(error.details())),
        Err(_elapsed) => Err("connected, but no reply".into()),
    }
}
