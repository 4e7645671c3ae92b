//! Who waits for which message. One connection reads the inbox of this sidecar ([`super::invalidation_log`]); here the messages find
//! those who wait for them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Messages that nobody has taken yet, for one subject.
const MAX_WAITING: usize = 4096;

/// The inbox of a sidecar.
#[derive(Debug, Default)]
pub struct Inbox(Mutex<HashMap<Box<str>, mpsc::Sender<Bytes>>>);

/// One who waits for messages about a subject. Dropping it ends that.
#[derive(Debug)]
pub struct Subscription<'i> {
    inbox: &'i Inbox,
    subject: Box<str>,
    sender: mpsc::Sender<Bytes>,
    messages: mpsc::Receiver<Bytes>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, mpsc::Sender<Bytes>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on messages about this subject are kept for the caller.
    pub fn subscribe(&self, subject: &str) -> Subscription<'_> {
        let (sender, messages) = mpsc::channel(MAX_WAITING);
        self.lock().insert(subject.into(), sender.clone());
        Subscription { inbox: self, subject: subject.into(), sender, messages }
    }

    /// A message came: `subject`, a space, and what it says. What nobody waits for is dropped.
    pub fn deliver(&self, message: &Bytes) {
        let Some(space) = message.iter().position(|byte| *byte == b' ') else { return };
        let Ok(subject) = std::str::from_utf8(&message[..space]) else { return };
        if let Some(waiting) = self.lock().get(subject) {
            // Whoever has so many waiting does not need another.
            let _ = waiting.try_send(message.slice(space + 1..));
        }
    }
}

impl Subscription<'_> {
    /// The next message.
    pub async fn next_message(&mut self) -> Bytes {
        // It can't end, as one of its senders is here.
        self.messages.recv().await.unwrap_or_default()
    }
}

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        let mut waiting = self.inbox.lock();
        if waiting.get(&self.subject).is_some_and(|sender| sender.same_channel(&self.sender)) {
            waiting.remove(&self.subject);
        }
    }
}
