//! Connection limit: slots for client connections, and eviction of idle ones when all are taken.
//!
//! The clock algorithm of page replacement selects a connection that has received no request since it was last
//! checked. It finishes the request in progress and closes, so that a flood of idle connections does not displace
//! active ones.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use atomic_waker::AtomicWaker;
use tokio::sync::Notify;
use tokio::time::timeout;

/// How long an evicted connection has to close before the next one is evicted.
const EVICTION_INTERVAL: Duration = Duration::from_millis(20);

/// The activity and eviction state of one connection.
#[derive(Debug, Default)]
pub(super) struct ConnectionActivity {
    /// Number of requests so far.
    requests: AtomicU32,
    evicted: AtomicBool,
    waker_registered: AtomicBool,
    waker: AtomicWaker,
}

impl ConnectionActivity {
    /// Counts a request.
    pub(super) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the number of requests so far.
    pub(super) fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Ready once the connection is evicted. Always polled by the same task, so its waker is registered once.
    pub(super) fn poll_evicted(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.waker_registered.swap(true, Ordering::Relaxed) {
            self.waker.register(cx.waker());
        }
        if self.evicted.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }

    fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// The slots of a listener's connections.
#[derive(Debug)]
pub(super) struct ConnectionSlots {
    table: Mutex<SlotTable>,
    freed: Notify,
}

#[derive(Debug)]
struct SlotTable {
    taken: Vec<Option<(Arc<ConnectionActivity>, u32)>>,
    free: Vec<usize>,
    clock_hand: usize,
    most: usize,
}

/// A taken slot, freed on drop.
#[derive(Debug)]
pub(super) struct ConnectionSlot {
    slots: Arc<ConnectionSlots>,
    index: usize,
    pub(super) activity: Arc<ConnectionActivity>,
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut table = self.slots.lock();
        table.taken[self.index] = None;
        table.free.push(self.index);
        drop(table);
        self.slots.freed.notify_one();
    }
}

impl ConnectionSlots {
    /// Creates slots for at most `most` connections.
    pub(super) fn new(most: usize) -> Arc<ConnectionSlots> {
        let table = SlotTable { taken: Vec::new(), free: Vec::new(), clock_hand: 0, most };
        Arc::new(ConnectionSlots { table: Mutex::new(table), freed: Notify::new() })
    }

    /// Changes the number of slots. Connections in excess of it stay open until they are evicted.
    pub(super) fn resize(&self, most: usize) {
        self.lock().most = most;
    }

    fn lock(&self) -> MutexGuard<'_, SlotTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a free slot and takes it. Evicts idle connections meanwhile.
    pub(super) async fn acquire(self: &Arc<Self>) -> ConnectionSlot {
        loop {
            if let Some(place) = self.try_acquire() {
                return place;
            }
            self.lock().evict_idle();
            // The evicted connection may have a long response to finish: then another one is evicted.
            let _ = timeout(EVICTION_INTERVAL, self.freed.notified()).await;
        }
    }

    /// Takes a slot if one is free.
    pub(super) fn try_acquire(self: &Arc<Self>) -> Option<ConnectionSlot> {
        let activity = Arc::new(ConnectionActivity::default());
        let mut table = self.lock();
        if table.taken.len() - table.free.len() >= table.most {
            return None;
        }
        let index = table.free.pop().unwrap_or_else(|| {
            table.taken.push(None);
            table.taken.len() - 1
        });
        table.taken[index] = Some((activity.clone(), 0));
        Some(ConnectionSlot { slots: self.clone(), index, activity })
    }

    /// Evicts all connections.
    pub(super) fn evict_all(&self) {
        for (activity, _) in self.lock().taken.iter().flatten() {
            activity.evict();
        }
    }
}

impl SlotTable {
    fn evict_idle(&mut self) {
        // Two rounds: the first one updates the request counts of the busy connections.
        for _ in 0..self.taken.len() * 2 {
            self.clock_hand = (self.clock_hand + 1) % self.taken.len();
            let Some((activity, noted)) = &mut self.taken[self.clock_hand] else { continue };
            let served = activity.requests();
            if served == *noted && !activity.evicted.load(Ordering::Relaxed) {
                return activity.evict();
            }
            *noted = served;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn leaves(place: &ConnectionSlot) -> bool {
        place.activity.poll_evicted(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[tokio::test]
    async fn idle_connection_is_evicted_when_a_new_one_waits_for_a_slot() {
        let slots = ConnectionSlots::new(3);
        let idle = slots.try_acquire().expect("room");
        let busy = slots.try_acquire().expect("room");
        let later = slots.try_acquire().expect("room");
        assert!(slots.try_acquire().is_none());
        busy.activity.count_request();
        let next = tokio::spawn({
            let slots = slots.clone();
            async move { slots.acquire().await }
        });
        crate::server::tests::until(|| leaves(&idle) || leaves(&later)).await;
        assert!(!leaves(&busy));
        assert!(leaves(&idle) || leaves(&later));
        drop((idle, later));
        let place = next.await.expect("a place");
        assert!(!leaves(&place));
        slots.evict_all();
        assert!(leaves(&place) && leaves(&busy));
    }
}
