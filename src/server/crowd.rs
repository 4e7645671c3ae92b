//! Who is here: a place for every connection, and what happens when there is none left. Then one that has done
//! nothing since it was last looked at (the clock algorithm of page replacement) is asked to leave: it finishes
//! what it does, and closes. An idle flood makes room for those who work.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use atomic_waker::AtomicWaker;
use tokio::sync::Notify;
use tokio::time::timeout;

/// Who is asked to leave has so long before the next one is asked.
const PATIENCE: Duration = Duration::from_millis(20);

/// One connection's.
#[derive(Debug, Default)]
pub(super) struct Seat {
    /// Requests so far.
    served: AtomicU32,
    leaving: AtomicBool,
    noted: AtomicBool,
    waker: AtomicWaker,
}

impl Seat {
    /// A request has come.
    pub(super) fn serves(&self) {
        self.served.fetch_add(1, Ordering::Relaxed);
    }

    /// How many have.
    pub(super) fn served(&self) -> u32 {
        self.served.load(Ordering::Relaxed)
    }

    /// Ready once it is to leave. One task asks, always the same: its waker is noted once.
    pub(super) fn poll_leaving(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.noted.swap(true, Ordering::Relaxed) {
            self.waker.register(cx.waker());
        }
        if self.leaving.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }

    fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// All connections of a listener.
#[derive(Debug)]
pub(super) struct Crowd {
    places: Mutex<Places>,
    freed: Notify,
}

#[derive(Debug)]
struct Places {
    taken: Vec<Option<(Arc<Seat>, u32)>>,
    free: Vec<usize>,
    hand: usize,
    most: usize,
}

/// A place that is taken.
#[derive(Debug)]
pub(super) struct Place {
    crowd: Arc<Crowd>,
    index: usize,
    pub(super) seat: Arc<Seat>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.crowd.lock();
        places.taken[self.index] = None;
        places.free.push(self.index);
        drop(places);
        self.crowd.freed.notify_one();
    }
}

impl Crowd {
    /// For at most so many.
    pub(super) fn new(most: usize) -> Arc<Crowd> {
        let places = Places { taken: Vec::new(), free: Vec::new(), hand: 0, most };
        Arc::new(Crowd { places: Mutex::new(places), freed: Notify::new() })
    }

    /// From now on for so many; who is here beyond that stays until asked to leave.
    pub(super) fn resize(&self, most: usize) {
        self.lock().most = most;
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, as soon as there is one.
    pub(super) async fn place(self: &Arc<Self>) -> Place {
        loop {
            if let Some(place) = self.take() {
                return place;
            }
            self.lock().send_one_away();
            // It may have a long answer to finish: then another one is asked.
            let _ = timeout(PATIENCE, self.freed.notified()).await;
        }
    }

    /// A place, if there is one now.
    pub(super) fn take(self: &Arc<Self>) -> Option<Place> {
        let seat = Arc::new(Seat::default());
        let mut places = self.lock();
        if places.taken.len() - places.free.len() >= places.most {
            return None;
        }
        let index = places.free.pop().unwrap_or_else(|| {
            places.taken.push(None);
            places.taken.len() - 1
        });
        places.taken[index] = Some((seat.clone(), 0));
        Some(Place { crowd: self.clone(), index, seat })
    }

    /// Everybody is to leave.
    pub(super) fn close(&self) {
        for (seat, _) in self.lock().taken.iter().flatten() {
            seat.leave();
        }
    }
}

impl Places {
    fn send_one_away(&mut self) {
        // Twice round: after the first, whoever is busy has been noted.
        for _ in 0..self.taken.len() * 2 {
            self.hand = (self.hand + 1) % self.taken.len();
            let Some((seat, noted)) = &mut self.taken[self.hand] else { continue };
            let served = seat.served();
            if served == *noted && !seat.leaving.load(Ordering::Relaxed) {
                return seat.leave();
            }
            *noted = served;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn leaves(place: &Place) -> bool {
        place.seat.poll_leaving(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[tokio::test]
    async fn who_does_nothing_makes_room() {
        let crowd = Crowd::new(3);
        let idle = crowd.take().expect("room");
        let busy = crowd.take().expect("room");
        let later = crowd.take().expect("room");
        assert!(crowd.take().is_none());
        busy.seat.serves();
        let next = tokio::spawn({
            let crowd = crowd.clone();
            async move { crowd.place().await }
        });
        crate::server::tests::until(|| leaves(&idle) || leaves(&later)).await;
        assert!(!leaves(&busy));
        assert!(leaves(&idle) || leaves(&later));
        drop((idle, later));
        let place = next.await.expect("a place");
        assert!(!leaves(&place));
        crowd.close();
        assert!(leaves(&place) && leaves(&busy));
    }
}
