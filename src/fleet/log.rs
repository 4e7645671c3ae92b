//! Follows the invalidation log, and tells it what was purged here.
//!
//! The follower reads a log from its beginning, then waits at the server for it to go on. Each entry names the one
//! before it; where that is not the one read last, or where the log ends before what was read, something may have been
//! missed: everything stored is in doubt then, and reading begins anew. A cut connection alone loses nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tracing::{debug, warn};

use super::SidecarId;
use super::inbox::Inbox;
use super::invalidations::Invalidations;
use super::purge::Purge;
use crate::clock::Clock;
use crate::policy::chain::{Broken, LogId};
use crate::policy::{Tick, millis};
use crate::redis::{LogEntry, Redis, Trouble};
use crate::store::seal::Ring;
use crate::store::wire::salt;

/// So long the server holds a reader that has read everything.
const WAIT: Duration = Duration::from_secs(1);

/// So often, at most, the end of the log is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// After trouble, before the next attempt.
const PAUSE: Duration = Duration::from_millis(50);

/// So often a sidecar says that it is there.
const PRESENT: Duration = Duration::from_secs(5);

/// One that has not said so for so long is taken for gone.
pub const GONE: Duration = Duration::from_secs(15);

/// Nobody waits longer to hear that a purge was applied.
const RECENT: Duration = Duration::from_secs(30);

/// Entries read at once.
const BATCH: u64 = 1_000;

/// What the follower and the logger work with.
#[derive(Debug, Clone)]
pub struct Log {
    /// The connections.
    pub redis: Arc<Redis>,
    /// Where purges go, and come from.
    pub invalidations: Arc<Invalidations>,
    /// Where messages go.
    pub inbox: Arc<Inbox>,
    /// The secrets that seal.
    pub ring: Arc<ArcSwap<Ring>>,
    /// This sidecar.
    pub me: SidecarId,
    /// The time.
    pub clock: Clock,
    /// When it last said that it is there.
    pub said_present: Arc<AtomicU64>,
}

/// What ends a stretch of following.
enum Interrupted {
    Trouble(Trouble),
    Broken,
}

impl From<Trouble> for Interrupted {
    fn from(trouble: Trouble) -> Interrupted {
        Interrupted::Trouble(trouble)
    }
}

impl From<Broken> for Interrupted {
    fn from(_: Broken) -> Interrupted {
        Interrupted::Broken
    }
}

impl Log {
    /// Follows for ever.
    pub async fn follow(self) {
        let mut inbox = LogId::default();
        loop {
            self.redis.follower_connected().await;
            match self.stretch(&mut inbox).await {
                Interrupted::Trouble(trouble) => {
                    debug!(%trouble, "the invalidation log can't be read");
                    tokio::time::sleep(PAUSE).await;
                }
                Interrupted::Broken => {
                    warn!(
                        "the invalidation log is another one, or was cut short: all that is stored is taken for stale"
                    );
                    if let Err(trouble) = self.begin().await {
                        debug!(%trouble, "the invalidation log can't be read");
                    }
                    // A log that breaks again and again is not read as fast as it can be.
                    tokio::time::sleep(PAUSE * 4).await;
                }
            }
        }
    }

    /// Reads until something comes between.
    async fn stretch(&self, inbox: &mut LogId) -> Interrupted {
        let read = async {
            if self.invalidations.log_position().is_none() {
                self.begin().await?;
            }
            self.catch_up().await?;
            let (mut looked, mut goal) = (None::<Tick>, None);
            loop {
                let now = self.clock.now();
                if looked.is_none_or(|looked| now.since(looked) >= millis(LOOK)) {
                    goal = Some((self.end().await?, now));
                    looked = Some(now);
                    self.present(now).await;
                }
                self.settle(&mut goal);
                self.wait(inbox).await?;
                self.settle(&mut goal);
            }
        };
        let Err::<std::convert::Infallible, _>(interrupted) = read.await;
        self.invalidations.set_caught_up(false);
        interrupted
    }

    /// Begins with what the log still has.
    async fn begin(&self) -> Result<(), Trouble> {
        // A log that is not there is begun, so that everything fetched from now on has an entry before it.
        self.redis.append(Bytes::new()).await?;
        let first = self.redis.log_after(None, 1).await?;
        if let Some(entry) = first.first() {
            self.invalidations.begin_log(entry.previous);
        }
        Ok(())
    }

    /// Reads what is there.
    async fn catch_up(&self) -> Result<(), Interrupted> {
        loop {
            let entries = self.redis.log_after(self.invalidations.log_position(), BATCH).await?;
            let done = (entries.len() as u64) < BATCH;
            self.apply(entries)?;
            if done {
                return Ok(());
            }
        }
    }

    /// Where the log ends now: not before what was read of it.
    async fn end(&self) -> Result<LogId, Interrupted> {
        let (end, read) = (self.redis.log_end().await?, self.invalidations.log_position());
        end.filter(|end| Some(*end) >= read).ok_or(Interrupted::Broken)
    }

    /// Once all that was there at some time has been read, everything is verified up to that time.
    fn settle(&self, goal: &mut Option<(LogId, Tick)>) {
        if let Some((_, at)) = goal.take_if(|(end, _)| self.invalidations.log_position() >= Some(*end)) {
            self.invalidations.verified(at);
            self.invalidations.set_caught_up(true);
        }
    }

    /// Says now and then that this sidecar is there.
    async fn present(&self, now: Tick) {
        if now.since(Tick(self.said_present.load(Ordering::Relaxed))) >= millis(PRESENT) {
            self.said_present.store(now.0, Ordering::Relaxed);
            if let Err(trouble) = self.redis.present(Some(&self.me.to_string()), GONE).await {
                debug!(%trouble, "this sidecar could not say that it is there");
            }
        }
    }

    async fn wait(&self, inbox: &mut LogId) -> Result<(), Interrupted> {
        let last = self.invalidations.log_position().unwrap_or_default();
        let news = self.redis.news(last, (&self.me.to_string(), *inbox), WAIT).await?;
        self.apply(news.log)?;
        for message in news.inbox {
            *inbox = message.id;
            self.inbox.deliver(&message.body);
        }
        Ok(())
    }

    fn apply(&self, entries: Vec<LogEntry>) -> Result<(), Broken> {
        let mut forged = 0;
        for LogEntry { id, previous, body } in entries {
            let said = (!body.is_empty()).then(|| Purge::open(&body, &self.ring.load()));
            let answer =
                said.as_ref().and_then(|purge| purge.as_ref().filter(|purge| purge.answer.is_some()).cloned());
            forged += u64::from(matches!(said, Some(None)));
            self.invalidations.apply(previous, id, said)?;
            if let Some(purge) = answer.filter(|_| self.is_recent(id)) {
                tokio::spawn(self.clone().confirm(purge));
            }
        }
        if forged > 0 {
            warn!(entries = forged, "of the invalidation log do not verify: all that is stored is taken for stale");
        }
        Ok(())
    }

    /// Does anybody still wait to hear of this entry?
    fn is_recent(&self, id: LogId) -> bool {
        self.redis.time().now().is_some_and(|now| now.saturating_sub(id.ms) < millis(RECENT))
    }

    /// Tells the sidecar that made a purge that it holds here.
    async fn confirm(self, purge: Purge) {
        let message = Bytes::from(format!("{} {}", applied(purge.answer.unwrap_or(0)), self.me));
        if purge.from == self.me {
            self.inbox.deliver(&message);
        } else if let Err(trouble) = self.redis.send(&purge.from.to_string(), message).await {
            debug!(%trouble, "a purge could not be confirmed");
        }
    }

    /// Writes our own purges into the log, one after the other, for ever.
    pub async fn tell(self) {
        loop {
            let purge = self.invalidations.next_to_log().await;
            let body = Bytes::from(purge.seal(&self.ring.load(), salt()));
            match self.redis.append(body).await {
                Ok(_id) => self.invalidations.was_logged(purge.number),
                Err(trouble) => {
                    self.invalidations.log_is_stuck();
                    debug!(%trouble, "a purge waits for the invalidation log");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// The subject of messages that say that a purge of ours was applied.
pub fn applied(name: u64) -> String {
    format!("applied:{name:016x}")
}
