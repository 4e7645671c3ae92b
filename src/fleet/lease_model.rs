//! A model of the leases: random interleavings of claims, releases, messages on their way, and fetches that are given up.
//! Whatever happens, every fetch ends by messages alone: none waits until a lease expires.

use std::collections::{BTreeSet, VecDeque};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use proptest::prelude::*;

use super::inbox::{Inbox, Subscription};
use super::lease::LeaseMessage;

const SIDECARS: usize = 2;

/// Fetches of one key at each sidecar.
const FETCHES: usize = 3;

const SUBJECT: &str = "lease:x";

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A fetch subscribes to the messages about the lease.
    Begin(usize),
    /// It claims the lease (the script CLAIM).
    Claim(usize),
    /// Its response arrives, and it releases the lease (the script RELEASE).
    Finish { fetch: usize, stored: bool },
    /// Its clients are gone. A holder releases the lease.
    GiveUp(usize),
    /// The oldest message that is on its way to a sidecar reaches its stream (the script SEND).
    Send,
    /// A sidecar reads its stream.
    Read(usize),
    /// A waiting fetch takes a message, if there is one.
    Take(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let fetch = 0..SIDECARS * FETCHES;
    prop_oneof![
        3 => fetch.clone().prop_map(Step::Begin),
        5 => fetch.clone().prop_map(Step::Claim),
        3 => (fetch.clone(), prop::bool::weighted(0.7)).prop_map(|(fetch, stored)| Step::Finish { fetch, stored }),
        1 => fetch.clone().prop_map(Step::GiveUp),
        3 => Just(Step::Send),
        3 => (0..SIDECARS).prop_map(Step::Read),
        4 => fetch.prop_map(Step::Take),
    ]
}

enum Fetch<'i> {
    NotBegun,
    Claiming(Subscription<'i>),
    Holding,
    Waiting(Subscription<'i>),
    Done,
}

/// What Redis holds.
#[derive(Default)]
struct Server {
    holder: Option<usize>,
    waiting: BTreeSet<usize>,
    stored: bool,
    streams: [VecDeque<Bytes>; SIDECARS],
}

struct Model<'i> {
    inboxes: &'i [Inbox; SIDECARS],
    fetches: Vec<Fetch<'i>>,
    server: Server,
    /// Messages that a holder sends after it has released the lease: the sidecar, and the message.
    on_their_way: VecDeque<(usize, Bytes)>,
}

/// Returns the sidecar of a fetch.
fn sidecar_of(fetch: usize) -> usize {
    fetch % SIDECARS
}

impl<'i> Model<'i> {
    fn new(inboxes: &'i [Inbox; SIDECARS]) -> Model<'i> {
        let fetches = (0..SIDECARS * FETCHES).map(|_| Fetch::NotBegun).collect();
        Model { inboxes, fetches, server: Server::default(), on_their_way: VecDeque::new() }
    }

    fn release(&mut self, fetch: usize, message: &str) {
        if self.server.holder == Some(fetch) {
            self.server.holder = None;
            let body = Bytes::from(format!("{SUBJECT} {message}"));
            let waiting = std::mem::take(&mut self.server.waiting);
            self.on_their_way.extend(waiting.into_iter().map(|sidecar| (sidecar, body.clone())));
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Begin(fetch) => {
                if matches!(self.fetches[fetch], Fetch::NotBegun) {
                    self.fetches[fetch] = Fetch::Claiming(self.inboxes[sidecar_of(fetch)].subscribe(SUBJECT));
                }
            }
            Step::Claim(fetch) => {
                self.fetches[fetch] = match std::mem::replace(&mut self.fetches[fetch], Fetch::Done) {
                    Fetch::Claiming(messages) if self.server.holder.is_some() => {
                        self.server.waiting.insert(sidecar_of(fetch));
                        Fetch::Waiting(messages)
                    }
                    // A record that was stored meanwhile is found, and the lease is released.
                    Fetch::Claiming(_) if self.server.stored => {
                        self.server.holder = Some(fetch);
                        self.release(fetch, "nothing");
                        Fetch::Done
                    }
                    Fetch::Claiming(_) => {
                        self.server.holder = Some(fetch);
                        Fetch::Holding
                    }
                    other @ (Fetch::NotBegun | Fetch::Holding | Fetch::Waiting(_) | Fetch::Done) => other,
                };
            }
            Step::Finish { fetch, stored } => {
                if matches!(self.fetches[fetch], Fetch::Holding) {
                    self.server.stored |= stored;
                    self.release(fetch, if stored { "stored" } else { "unshared" });
                    self.fetches[fetch] = Fetch::Done;
                }
            }
            Step::GiveUp(fetch) => {
                self.release(fetch, "nothing");
                if !matches!(self.fetches[fetch], Fetch::NotBegun) {
                    self.fetches[fetch] = Fetch::Done;
                }
            }
            Step::Send => {
                if let Some((sidecar, message)) = self.on_their_way.pop_front() {
                    self.server.streams[sidecar].push_back(message);
                }
            }
            Step::Read(sidecar) => {
                for message in self.server.streams[sidecar].drain(..) {
                    self.inboxes[sidecar].deliver(&message);
                }
            }
            Step::Take(fetch) => {
                self.fetches[fetch] = match std::mem::replace(&mut self.fetches[fetch], Fetch::Done) {
                    Fetch::Waiting(mut messages) => match taken(&mut messages) {
                        None => Fetch::Waiting(messages),
                        Some(LeaseMessage::Stored) if self.server.stored => Fetch::Done,
                        Some(LeaseMessage::Unshared) => Fetch::Done,
                        Some(LeaseMessage::Stored | LeaseMessage::Nothing) => Fetch::Claiming(messages),
                    },
                    other @ (Fetch::NotBegun | Fetch::Claiming(_) | Fetch::Holding | Fetch::Done) => other,
                };
            }
        }
    }

    /// Lets everything go on that can, until all fetches have ended or nothing changes.
    fn finish(&mut self) {
        for _ in 0..4 * SIDECARS * FETCHES {
            for fetch in 0..SIDECARS * FETCHES {
                self.step(Step::Claim(fetch));
                self.step(Step::Finish { fetch, stored: true });
            }
            while !self.on_their_way.is_empty() {
                self.step(Step::Send);
            }
            (0..SIDECARS).for_each(|sidecar| self.step(Step::Read(sidecar)));
            (0..SIDECARS * FETCHES).for_each(|fetch| self.step(Step::Take(fetch)));
        }
    }
}

fn taken(messages: &mut Subscription<'_>) -> Option<LeaseMessage> {
    let message = pin!(messages.next_message()).poll(&mut Context::from_waker(Waker::noop()));
    match message {
        Poll::Ready(message) => Some(LeaseMessage::read(&message)),
        Poll::Pending => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn no_interleaving_leaves_a_fetch_waiting_for_a_lease_to_expire(steps in prop::collection::vec(step(), 1..80)) {
        let inboxes: [Inbox; SIDECARS] = Default::default();
        let mut model = Model::new(&inboxes);
        for step in steps {
            model.step(step);
            let holders = model.fetches.iter().filter(|fetch| matches!(fetch, Fetch::Holding)).count();
            prop_assert!(holders <= 1, "{} fetches hold the lease", holders);
        }
        model.finish();
        let left = model.fetches.iter().filter(|fetch| !matches!(fetch, Fetch::Done | Fetch::NotBegun)).count();
        prop_assert_eq!(left, 0, "fetches that wait for a lease to expire");
    }
}
