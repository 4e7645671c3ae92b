//! Fan-out of one upstream body to many readers.
//!
//! The fetch writes at the upstream's speed into a buffer that grows up to the size limit of an entry, within the
//! byte budget of all fetches. Readers stream from its beginning, whenever they join. States:
//!
//! * **growing**: all chunks are kept, readers may join, the body can be stored;
//! * **windowed**: the body has outgrown the buffer. No reader can join, chunks that all readers have read are dropped,
//!   and the fetch waits for the slowest reader, but cuts a reader that makes no progress while others wait;
//! * **ended**, with or without an error: readers get the remaining chunks, and then the end.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::SizeHint;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::BodyError;
use crate::policy::outcome::Failure;

/// Number of bytes that a windowed fetch may be ahead of its slowest reader.
const WINDOW: u64 = 256 << 10;

/// The number of bytes that all running fetches hold together, and its maximum.
#[derive(Debug)]
pub struct InflightBudget {
    held: AtomicU64,
    max: u64,
}

impl InflightBudget {
    /// Creates a budget of `max` bytes.
    pub fn new(max: u64) -> Arc<InflightBudget> {
        Arc::new(InflightBudget { held: AtomicU64::new(0), max })
    }

    /// Returns the number of bytes that may be held.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// Returns the number of bytes held now.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        self.held
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                held.checked_add(bytes).filter(|sum| *sum <= self.max)
            })
            .is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Bytes taken from an [`InflightBudget`]; given back on drop.
#[derive(Debug)]
pub struct InflightGuard {
    budget: Arc<InflightBudget>,
    bytes: u64,
}

impl InflightGuard {
    /// Creates a guard that holds no bytes.
    pub fn new(budget: &Arc<InflightBudget>) -> InflightGuard {
        InflightGuard { budget: budget.clone(), bytes: 0 }
    }

    /// Takes `bytes` more. Returns false if the budget does not have them.
    pub fn take(&mut self, bytes: u64) -> bool {
        let taken = self.budget.take(bytes);
        self.bytes += if taken { bytes } else { 0 };
        taken
    }

    fn give_back(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.give_back(bytes);
    }
}

impl Drop for InflightGuard {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

/// Ends a body on drop, however its fetch ends, including by a panic.
#[derive(Debug)]
pub struct FinishOnDrop<'f>(pub &'f Fanout);

impl Drop for FinishOnDrop<'_> {
    fn drop(&mut self) {
        self.0.finish(Err(BodyError::Upstream(Failure::Internal)));
    }
}

/// The body of a running fetch.
#[derive(Debug)]
pub struct Fanout {
    state: Mutex<FanoutState>,
    /// Notified when a reader has read a chunk or was dropped.
    moved: Notify,
    max_bytes: u64,
    stall: Duration,
    /// The Content-Length of the response, if it has one.
    length: Option<u64>,
}

#[derive(Debug)]
struct FanoutState {
    chunks: VecDeque<Bytes>,
    /// Number of chunks that were dropped from the front.
    dropped: usize,
    /// Bytes in `chunks`.
    buffered: u64,
    /// The bytes taken from the budget.
    held: InflightGuard,
    windowed: bool,
    /// Whether the body is larger than `max_bytes`.
    too_large: bool,
    end: Option<Result<(), BodyError>>,
    readers: Vec<Option<ReaderSlot>>,
}

#[derive(Debug)]
struct ReaderSlot {
    /// Index of the next chunk to read, counted from the first chunk of the body.
    next: usize,
    waker: Option<Waker>,
    cut: bool,
}

/// Error: no reader is left and the body can't be stored, so the fetch should stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abandoned;

impl Fanout {
    /// Creates an empty body whose buffer grows up to `max_bytes`.
    pub fn new(budget: &Arc<InflightBudget>, max_bytes: u64, stall: Duration, length: Option<u64>) -> Arc<Fanout> {
        let state = Mutex::new(FanoutState {
            chunks: VecDeque::new(),
            dropped: 0,
            buffered: 0,
            held: InflightGuard::new(budget),
            windowed: false,
            too_large: false,
            end: None,
            readers: Vec::new(),
        });
        Arc::new(Fanout { state, moved: Notify::new(), max_bytes, stall, length })
    }

    fn lock(&self) -> MutexGuard<'_, FanoutState> {
        // A panic of another task leaves chunks and reader slots consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a reader that starts at the first byte, or `None` if the body is windowed.
    pub fn join(self: &Arc<Self>) -> Option<Reader> {
        let mut state = self.lock();
        if state.windowed {
            return None;
        }
        state.readers.push(Some(ReaderSlot { next: 0, waker: None, cut: false }));
        Some(Reader { fanout: self.clone(), slot: state.readers.len() - 1 })
    }

    /// Adds a chunk. Waits for room if the body is windowed.
    pub async fn push(&self, chunk: Bytes) -> Result<(), Abandoned> {
        let size = chunk.len() as u64;
        let due = Instant::now() + self.stall;
        loop {
            {
                let mut state = self.lock();
                if !state.windowed {
                    let fits = state.buffered + size <= self.max_bytes;
                    state.windowed = !(fits && state.held.take(size));
                    state.too_large = !fits;
                }
                if state.windowed {
                    state.drop_read();
                    if state.readers.iter().flatten().all(|reader| reader.cut) {
                        return Err(Abandoned);
                    }
                }
                if !state.windowed || state.buffered == 0 || state.buffered + size <= WINDOW {
                    state.buffered += size;
                    state.chunks.push_back(chunk);
                    state.wake_all();
                    return Ok(());
                }
            }
            if tokio::time::timeout_at(due, self.moved.notified()).await.is_err() {
                self.lock().cut_slowest();
            }
        }
    }

    /// Replaces the chunks by slices of the stored body `whole`, from which the remaining readers then read, and gives
    /// the held bytes back to the budget.
    pub fn replace_chunks(&self, whole: &Bytes) {
        let mut state = self.lock();
        let mut start = 0;
        for chunk in &mut state.chunks {
            let end = start + chunk.len();
            *chunk = whole.slice(start..end);
            start = end;
        }
        let held = state.held.bytes;
        state.held.give_back(held);
    }

    /// Ends the body: no chunk follows. Only the first call has an effect.
    pub fn finish(&self, end: Result<(), BodyError>) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        state.wake_all();
    }

    /// Returns true if the body has outgrown the buffer.
    pub fn is_windowed(&self) -> bool {
        self.lock().windowed
    }

    /// Returns true if the body is larger than the size limit of an entry.
    pub fn is_too_large(&self) -> bool {
        self.lock().too_large
    }

    /// Returns all chunks so far and `last`, in one allocation of the exact size. Returns `None` if the body is
    /// windowed or larger than `max_bytes`.
    pub fn complete_body_with(&self, last: &[u8]) -> Option<Bytes> {
        let state = self.lock();
        let size = state.buffered + last.len() as u64;
        if state.windowed || size > self.max_bytes {
            return None;
        }
        let mut whole = BytesMut::with_capacity(usize::try_from(size).unwrap_or(0));
        state.chunks.iter().for_each(|chunk| whole.extend_from_slice(chunk));
        whole.extend_from_slice(last);
        Some(whole.freeze())
    }
}

impl FanoutState {
    fn wake_all(&mut self) {
        self.readers.iter_mut().flatten().filter_map(|reader| reader.waker.take()).for_each(Waker::wake);
    }

    /// Drops the chunks that all readers have read.
    fn drop_read(&mut self) {
        let slowest = self.readers.iter().flatten().filter(|s| !s.cut).map(|s| s.next).min();
        while slowest.is_none_or(|next| next > self.dropped) {
            let Some(chunk) = self.chunks.pop_front() else { break };
            self.dropped += 1;
            self.buffered -= chunk.len() as u64;
            self.held.give_back(chunk.len() as u64);
        }
    }

    /// Cuts the slowest readers if other readers wait for them. A single reader is subject only to the write timeout of
    /// its own connection.
    fn cut_slowest(&mut self) {
        let positions: Vec<usize> = self.readers.iter().flatten().filter(|s| !s.cut).map(|s| s.next).collect();
        let (Some(slowest), Some(fastest)) = (positions.iter().min(), positions.iter().max()) else { return };
        if slowest == fastest {
            return;
        }
        for reader in self.readers.iter_mut().flatten().filter(|reader| reader.next == *slowest) {
            reader.cut = true;
            if let Some(waker) = reader.waker.take() {
                waker.wake();
            }
        }
    }
}

/// One reader of a [`Fanout`].
#[derive(Debug)]
pub struct Reader {
    fanout: Arc<Fanout>,
    slot: usize,
}

impl Reader {
    /// Polls for the next chunk, the end, or the error that ended the body.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        let mut state = self.fanout.lock();
        let FanoutState { chunks, dropped, end, readers, windowed, .. } = &mut *state;
        let Some(reader) = readers.get_mut(self.slot).and_then(Option::as_mut) else { return Poll::Ready(None) };
        if reader.cut {
            return Poll::Ready(Some(Err(BodyError::Stalled)));
        }
        if let Some(chunk) = chunks.get(reader.next - *dropped) {
            reader.next += 1;
            if *windowed {
                self.fanout.moved.notify_one();
            }
            return Poll::Ready(Some(Ok(chunk.clone())));
        }
        match end {
            Some(Ok(())) => Poll::Ready(None),
            Some(Err(error)) => Poll::Ready(Some(Err(*error))),
            None => {
                reader.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Returns the Content-Length of the response, if it has one.
    pub fn size_hint(&self) -> SizeHint {
        self.fanout.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(reader) = self.fanout.lock().readers.get_mut(self.slot) {
            *reader = None;
        }
        self.fanout.moved.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    fn chunk(size: usize) -> Bytes {
        Bytes::from(vec![b'x'; size])
    }

    async fn next(reader: &mut Reader) -> Option<Result<usize, BodyError>> {
        poll_fn(|cx| reader.poll_next(cx)).await.map(|r| r.map(|c| c.len()))
    }

    #[tokio::test]
    async fn reader_that_joins_late_receives_the_body_from_the_first_byte() {
        let fanout = Fanout::new(&InflightBudget::new(1000), 1000, Duration::from_secs(1), None);
        fanout.push(chunk(10)).await.expect("room");
        let mut late = fanout.join().expect("still growing");
        fanout.push(chunk(20)).await.expect("room");
        fanout.finish(Ok(()));
        assert_eq!(next(&mut late).await, Some(Ok(10)));
        assert_eq!(next(&mut late).await, Some(Ok(20)));
        assert_eq!(next(&mut late).await, None);
        assert_eq!(fanout.complete_body_with(b"last").map(|w| w.len()), Some(34));
    }

    #[tokio::test]
    async fn inflight_budget_is_released_when_the_fanout_is_dropped() {
        let budget = InflightBudget::new(1000);
        let fanout = Fanout::new(&budget, 1000, Duration::from_secs(1), None);
        fanout.push(chunk(600)).await.expect("room");
        assert_eq!(budget.held(), 600);
        drop(fanout);
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn buffer_over_its_limit_accepts_no_readers_and_has_no_complete_body() {
        let fanout = Fanout::new(&InflightBudget::new(1000), 100, Duration::from_secs(1), None);
        let mut reader = fanout.join().expect("growing");
        fanout.push(chunk(200)).await.expect("one window");
        assert!(fanout.is_windowed() && fanout.join().is_none() && fanout.complete_body_with(b"").is_none());
        assert_eq!(next(&mut reader).await, Some(Ok(200)));
        drop(reader);
        assert_eq!(fanout.push(chunk(1)).await, Err(Abandoned));
    }

    #[tokio::test(start_paused = true)]
    async fn stalled_reader_is_cut_when_another_reader_waits() {
        let fanout = Fanout::new(&InflightBudget::new(0), 0, Duration::from_secs(2), None);
        let (mut quick, mut slow) = {
            let mut state = fanout.lock();
            state.readers.extend([0, 0].map(|next| Some(ReaderSlot { next, waker: None, cut: false })));
            (Reader { fanout: fanout.clone(), slot: 0 }, Reader { fanout: fanout.clone(), slot: 1 })
        };
        let window = usize::try_from(WINDOW).expect("small");
        fanout.push(chunk(window)).await.expect("one window");
        assert_eq!(next(&mut quick).await, Some(Ok(window)));
        fanout.push(chunk(1)).await.expect("the slow one was cut");
        assert_eq!(next(&mut slow).await, Some(Err(BodyError::Stalled)));
        assert_eq!(next(&mut quick).await, Some(Ok(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn failed_fetch_fails_its_readers_after_the_received_bytes() {
        let fanout = Fanout::new(&InflightBudget::new(100), 100, Duration::from_secs(1), None);
        let mut reader = fanout.join().expect("growing");
        fanout.push(chunk(1)).await.expect("room");
        fanout.finish(Err(BodyError::Client));
        assert_eq!(next(&mut reader).await, Some(Ok(1)));
        assert_eq!(next(&mut reader).await, Some(Err(BodyError::Client)));
    }
}
