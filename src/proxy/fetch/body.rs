//! The body of a fetch: copied to all readers at the upstream's speed, and stored when it is complete.

use bytes::Bytes;
use http_body::Body as _;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::coalesce::{FetchResult, Leader};
use super::spec::FetchSpec;
use super::{Delivery, Fetcher, deliver_to_leader};
use crate::body::fanout::{Fanout, FinishOnDrop, InflightGuard};
use crate::body::{Body, BodyError};
use crate::policy::Tick;
use crate::policy::body_inspection::is_empty_at;
use crate::policy::http::storage::StorePlan;
use crate::policy::outcome::{Failure, NotStored};
use crate::policy::packed_head::PackedHead;

/// What storing a body needs, once it is complete.
pub(super) struct Storing<'f> {
    pub(super) spec: &'f FetchSpec,
    pub(super) plan: &'f StorePlan,
    pub(super) head: PackedHead,
    pub(super) received_at: Tick,
    /// False for a failure: it is shared, and not stored.
    pub(super) stores: bool,
}

/// Returns the failure that the end of a response body means.
pub(super) fn failure_of(error: BodyError) -> Failure {
    match error {
        BodyError::Upstream(failure) => failure,
        BodyError::Client | BodyError::TooLarge | BodyError::TooSlow | BodyError::Stalled => Failure::Connect,
    }
}

impl Fetcher {
    /// Reads the whole body first, because the rule inspects it (`reject_empty`). A body that is too large to be
    /// inspected is not empty, and is passed on.
    pub(super) async fn inspect(&self, leader: Leader, spec: &FetchSpec, mut delivery: Delivery) {
        let max = usize::try_from(self.max_entry_bytes).unwrap_or(usize::MAX);
        let mut guard = InflightGuard::new(&self.inflight);
        let mut whole = Vec::new();
        let body = delivery.response.response.body_mut();
        loop {
            match timeout_at(delivery.by, body.next()).await {
                Ok(None) => break,
                Ok(Some(Ok(chunk))) if whole.len() + chunk.len() <= max && guard.take(chunk.len() as u64) => {
                    whole.extend_from_slice(&chunk);
                }
                Ok(Some(Ok(chunk))) => {
                    let too_large = whole.len() + chunk.len() > max;
                    whole.extend_from_slice(&chunk);
                    let rest = std::mem::replace(body, Body::Empty);
                    *body = Body::prefixed(vec![Bytes::from(whole)], rest);
                    let response = delivery.response.response;
                    if too_large {
                        return self.deliver_unshared(leader, spec, response, NotStored::TooLarge);
                    }
                    // A moment without room says nothing about the response.
                    return deliver_to_leader(leader, response, NotStored::InflightFull);
                }
                Ok(Some(Err(error))) => return self.fail(leader, spec, failure_of(error)),
                Err(_elapsed) => return self.fail(leader, spec, Failure::Timeout),
            }
        }
        let pointer = spec.request.rule.reject_empty.as_deref().unwrap_or_default();
        let empty = is_empty_at(pointer, delivery.response.response.headers(), &whole, max);
        *delivery.response.response.body_mut() = Body::Full(Bytes::from(whole));
        drop(guard);
        delivery.failure = empty.then_some(Failure::Empty);
        if empty {
            self.pause_key(spec, Failure::Empty, None);
        }
        self.deliver(leader, spec, delivery).await;
    }

    /// Ends a fetch with a failure.
    pub(super) fn fail(&self, leader: Leader, spec: &FetchSpec, failure: Failure) {
        self.pause_key(spec, failure, None);
        leader.complete(FetchResult::Failed(failure));
    }

    /// Copies the body to all readers. It is stored, and the fetch deregistered, before its last chunk is sent: a client
    /// that has received the whole response finds it in the cache.
    pub(super) async fn copy_body(
        &self,
        leader: &mut Leader,
        mut body: Body,
        fanout: &Fanout,
        by: Instant,
        storing: &Storing<'_>,
    ) {
        let _finish = FinishOnDrop(fanout);
        loop {
            // A body that is too large to be stored is bounded by the idle timeout only.
            let next = if fanout.is_windowed() {
                leader.deregister();
                self.store.give_up_lease(storing.spec, fanout.is_too_large());
                timeout(self.upstream.timeouts.idle, body.next()).await
            } else {
                timeout_at(by, body.next()).await
            };
            let end = match next {
                Ok(Some(Ok(chunk))) => {
                    let last = body.is_end_stream();
                    if last {
                        self.store_body(fanout, fanout.complete_body_with(&chunk), storing);
                        leader.deregister();
                    }
                    match fanout.push(chunk).await {
                        Ok(()) if last => Ok(()),
                        Ok(()) => continue,
                        Err(_abandoned) => return,
                    }
                }
                Ok(None) => {
                    self.store_body(fanout, fanout.complete_body_with(b""), storing);
                    Ok(())
                }
                Ok(Some(Err(error))) => Err(error),
                Err(_elapsed) => Err(BodyError::Upstream(Failure::Timeout)),
            };
            match end {
                Err(error) => {
                    debug!(upstream = &*self.upstream.name, %error, "the response body ended early");
                    self.pause_key(storing.spec, failure_of(error), None);
                }
                Ok(()) if storing.stores => self.upstream.failed_keys.succeeded(&storing.spec.request.key),
                Ok(()) => {}
            }
            leader.deregister();
            return fanout.finish(end);
        }
    }

    /// Stores a complete body, unless it was too large to be kept.
    fn store_body(&self, fanout: &Fanout, body: Option<Bytes>, storing: &Storing<'_>) {
        let Storing { spec, plan, head, received_at, stores } = storing;
        if let Some(body) = body.filter(|_| *stores) {
            let entry = self.store.entry(spec, plan, (head.clone(), body), *received_at);
            fanout.replace_chunks(&entry.body);
            self.store.store_if_valid(spec, &entry);
        }
    }
}
