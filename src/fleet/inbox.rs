//! The inbox of a sidecar: delivers messages to their subscribers by subject.
//!
//! One connection reads the inbox stream of this sidecar ([`super::invalidation_log`]) and delivers each message here.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Capacity of a subscription: messages not yet received, for one subject.
const MAX_WAITING: usize = 4096;

/// The inbox of a sidecar.
#[derive(Debug, Default)]
pub struct Inbox(Mutex<Subscribers>);

/// The subscriptions of each subject.
type Subscribers = HashMap<Box<str>, Vec<mpsc::Sender<Bytes>>>;

/// A subscription to messages about a subject. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription<'i> {
    inbox: &'i Inbox,
    subject: Box<str>,
    sender: mpsc::Sender<Bytes>,
    messages: mpsc::Receiver<Bytes>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Subscribers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Subscribes to a subject: messages about it are queued for the caller from now on.
    pub fn subscribe(&self, subject: &str) -> Subscription<'_> {
        let (sender, messages) = mpsc::channel(MAX_WAITING);
        self.lock().entry(subject.into()).or_default().push(sender.clone());
        Subscription { inbox: self, subject: subject.into(), sender, messages }
    }

    /// Delivers a message (subject, a space, content). A message without a subscriber is dropped.
    pub fn deliver(&self, message: &Bytes) {
        let Some(space) = message.iter().position(|byte| *byte == b' ') else { return };
        let Ok(subject) = std::str::from_utf8(&message[..space]) else { return };
        for waiting in self.lock().get(subject).into_iter().flatten() {
            // A full queue drops the message: a subscriber with this many pending messages needs no further one.
            let _ = waiting.try_send(message.slice(space + 1..));
        }
    }
}

impl Subscription<'_> {
    /// Waits for the next message and returns its content.
    pub async fn next_message(&mut self) -> Bytes {
        // The channel can't close, because this subscription holds one of its senders.
        self.messages.recv().await.unwrap_or_default()
    }
}

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        let mut waiting = self.inbox.lock();
        if let Some(senders) = waiting.get_mut(&self.subject) {
            senders.retain(|sender| !sender.same_channel(&self.sender));
            if senders.is_empty() {
                waiting.remove(&self.subject);
            }
        }
    }
}
