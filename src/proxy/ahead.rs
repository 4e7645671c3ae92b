//! Refresh-ahead: what is asked for shortly before it expires is fetched again before it does.
//!
//! When that is differs from entry to entry, so that what was fetched together is not refreshed together. In a fleet it
//! happens once: a request without credentials becomes work for any sidecar ([`crate::fleet::work`]); one with
//! credentials is refreshed by the sidecar that got it, under the lease of its key.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::header::{HOST, HeaderValue};
use tracing::debug;

use super::Proxy;
use super::flights::{Landing, Seat, Waited};
use super::job::{Help, Job};
use super::lookup::{Lookup, variant_key};
use super::site::Place;
use crate::body::Body;
use crate::fleet::Fleet;
use crate::fleet::work::Refresh;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::freshness::Demands;
use crate::policy::key::KeyBuf;
use crate::policy::plan::Plan;
use crate::policy::target::{client_authority, target};
use crate::store::wire::salt;

impl Proxy {
    #[allow(clippy::too_many_arguments)] // what a hit has at hand
    /// A hit: is it time to refresh what it found? Asks once for each entry.
    pub(super) fn ahead(
        self: &Arc<Self>,
        request: &Request<Body>,
        place: &Place,
        plan: &Arc<Plan>,
        key: &KeyBuf,
        entry: &Arc<Entry>,
        ahead: Duration,
        now: Tick,
    ) {
        if !entry.is_due(ahead, now) || entry.see_to() {
            return;
        }
        let anonymous = !request.headers().keys().any(|name| plan.key.is_credential(name));
        match self.commons.fleet.clone() {
            Some(fleet) if anonymous && fleet.works => self.offer(fleet, request, entry, ahead),
            Some(_) | None => self.refresh(request, place, plan, key, entry, true),
        }
    }

    /// Makes it work for the fleet.
    fn offer(self: &Arc<Self>, fleet: Arc<Fleet>, request: &Request<Body>, entry: &Arc<Entry>, ahead: Duration) {
        let Some(born) = fleet.redis.time().at(entry.born) else { return };
        // All of them: what the upstream makes of which is not for us to know.
        let mut headers = request.headers().clone();
        headers.remove(HOST);
        let refresh = Refresh {
            upstream: self.site.id.0,
            host: client_authority(request.uri(), request.headers()).unwrap_or_default().to_owned(),
            target: target(request.uri()).to_owned(),
            headers,
            born,
        };
        let name = format!("{}-{}", entry.key_name.as_str(), &entry.variant.digest().to_hex()[..16]);
        tokio::spawn(async move {
            let Some(body) = refresh.seal(&fleet.ring.load(), salt()) else { return };
            match fleet.redis.offer(&name, Bytes::from(body), ahead / 2).await {
                Ok(offered) => debug!(offered, "a refresh ahead"),
                Err(trouble) => debug!(%trouble, "a refresh ahead could not be offered"),
            }
        });
    }

    /// Does what a sidecar has offered: until it is fetched, by whomever, or can't be.
    pub async fn work_off(self: &Arc<Self>, fleet: &Fleet, refresh: Refresh) {
        let Ok(uri) = refresh.target.parse() else { return };
        let mut request = Request::new(Body::Empty);
        *request.uri_mut() = uri;
        *request.headers_mut() = refresh.headers;
        if let Ok(host) = HeaderValue::from_str(&refresh.host) {
            request.headers_mut().insert(HOST, host);
        }
        let Ok(place) = self.site.locate(request.uri(), request.headers()) else { return };
        let Ok((plan, _demands, key)) = self.admit(&request, &place, self.commons.clock.now()) else { return };
        let Some(born) = fleet.redis.time().tick(refresh.born) else { return };
        let entry = match self.look_up(&key, request.headers(), &Demands::default(), self.commons.clock.now()) {
            Lookup::Fresh(entry) | Lookup::WhileRevalidate(entry) => Some(entry),
            Lookup::Fetch(miss) => miss.stale,
        };
        let position = self.commons.invalidations.position();
        let address = self.site.address(&place, request.uri(), plan);
        let flight_key =
            entry.as_ref().map_or_else(|| key.clone(), |entry| variant_key(&key, &entry.variant, request.headers()));
        let nobody = || None::<()>;
        let boarded =
            self.commons.flights.board(&flight_key, &address, position, &self.commons.invalidations, nobody);
        let waiter = match boarded {
            Ok(Seat::Follow(waiter)) => waiter,
            Ok(Seat::Lead(lead, waiter)) => {
                let (place, plan, key) = (place.clone().into_owned(), plan.clone(), key.to_vec().into());
                let (help, ahead, lease) = (Help::Claim, Some(born), Mutex::default());
                let asked = Arc::new(request.into_parts().0);
                let job = Job { asked, place, plan, key, address, position, stale: entry, help, ahead, lease };
                self.spawn(lead, job);
                waiter
            }
            Err(()) => return,
        };
        match waiter.landing().await {
            Waited::Landed(Landing::Failed(failure), _) => debug!(cause = failure.cause(), "a refresh ahead failed"),
            Waited::Landed(_, _) | Waited::Private(_) | Waited::Lost => {}
        }
    }
}
