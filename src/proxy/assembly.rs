//! Builds the steps of the pipeline for an upstream, each with the dependencies that it names.

use std::sync::Arc;

use super::admission::Admission;
use super::explain::Explainer;
use super::fallback::Fallback;
use super::fetch::Fetcher;
use super::fetch::fleet::FleetLookup;
use super::fetch::opportunistic::OpportunisticStore;
use super::fetch::store::ResponseStore;
use super::lookup::Lookup;
use super::miss::MissHandler;
use super::pass_through::PassThrough;
use super::refresh::Refresher;
use super::respond::Responder;
use super::send::Sender;
use super::shadow::Shadow;
use super::upstream_state::UpstreamState;
use super::write::Writer;
use super::{Proxy, SharedState};

/// Steps that several others use.
struct Assembly<'s> {
    shared: &'s SharedState,
    upstream: Arc<UpstreamState>,
    responder: Arc<Responder>,
    admission: Arc<Admission>,
    lookup: Arc<Lookup>,
    sender: Arc<Sender>,
    fleet_lookup: Arc<FleetLookup>,
    store: Arc<ResponseStore>,
}

impl Proxy {
    /// Builds the proxy in front of an upstream.
    pub fn new(shared: &SharedState, upstream: UpstreamState) -> Proxy {
        let assembly = Assembly::new(shared, Arc::new(upstream));
        let fetcher = assembly.fetcher();
        Proxy {
            clock: shared.clock.clone(),
            inflight: shared.inflight.clone(),
            misses: assembly.misses(fetcher.clone()),
            refresher: assembly.refresher(fetcher),
            pass_through: assembly.pass_through(),
            explainer: assembly.explainer(),
            admission: assembly.admission,
            lookup: assembly.lookup,
            responder: assembly.responder,
            upstream: assembly.upstream,
        }
    }
}

impl<'s> Assembly<'s> {
    fn new(shared: &'s SharedState, upstream: Arc<UpstreamState>) -> Assembly<'s> {
        let (clock, telemetry, fleet) = (&shared.clock, &shared.telemetry, &shared.fleet);
        let (mode, key_secret) = (shared.mode.clone(), shared.key_secret.clone());
        let (memory, invalidations) = (shared.memory.clone(), shared.invalidations.clone());
        let lookup = Arc::new(Lookup { memory, invalidations });
        Assembly {
            responder: Arc::new(Responder {
                upstream: upstream.clone(),
                clock: clock.clone(),
                telemetry: telemetry.clone(),
            }),
            admission: Arc::new(Admission { upstream: upstream.clone(), mode: mode.clone(), key_secret }),
            sender: Arc::new(Sender {
                upstream: upstream.clone(),
                clock: clock.clone(),
                mode,
                telemetry: telemetry.clone(),
            }),
            fleet_lookup: Arc::new(FleetLookup {
                upstream: upstream.clone(),
                clock: clock.clone(),
                lookup: lookup.clone(),
                fleet: fleet.clone(),
            }),
            store: Arc::new(ResponseStore {
                upstream: upstream.name.clone(),
                clock: clock.clone(),
                lookup: lookup.clone(),
                coalescer: shared.coalescer.clone(),
                fleet: fleet.clone(),
                telemetry: telemetry.clone(),
            }),
            lookup,
            shared,
            upstream,
        }
    }

    fn fetcher(&self) -> Arc<Fetcher> {
        Arc::new(Fetcher {
            upstream: self.upstream.clone(),
            clock: self.shared.clock.clone(),
            lookup: self.lookup.clone(),
            fleet_lookup: self.fleet_lookup.clone(),
            sender: self.sender.clone(),
            store: self.store.clone(),
            incomplete: self.shared.incomplete.clone(),
            inflight: self.shared.inflight.clone(),
            max_entry_bytes: self.shared.max_entry_bytes,
            shared_write_stall: self.shared.shared_write_stall,
        })
    }

    fn misses(&self, fetcher: Arc<Fetcher>) -> Arc<MissHandler> {
        let fallback = Arc::new(Fallback {
            upstream: self.upstream.clone(),
            lookup: self.lookup.clone(),
            responder: self.responder.clone(),
            has_fleet: self.shared.fleet.is_some(),
        });
        Arc::new(MissHandler {
            upstream: self.upstream.clone(),
            lookup: self.lookup.clone(),
            fleet_lookup: self.fleet_lookup.clone(),
            coalescer: self.shared.coalescer.clone(),
            fetcher,
            fallback,
            responder: self.responder.clone(),
            telemetry: self.shared.telemetry.clone(),
        })
    }

    fn refresher(&self, fetcher: Arc<Fetcher>) -> Arc<Refresher> {
        Arc::new(Refresher {
            upstream: self.upstream.clone(),
            admission: self.admission.clone(),
            lookup: self.lookup.clone(),
            coalescer: self.shared.coalescer.clone(),
            fetcher,
            clock: self.shared.clock.clone(),
            fleet: self.shared.fleet.clone(),
        })
    }

    fn pass_through(&self) -> Arc<PassThrough> {
        let (inflight, max_entry_bytes) = (&self.shared.inflight, self.shared.max_entry_bytes);
        Arc::new(PassThrough {
            writer: Arc::new(Writer {
                upstream: self.upstream.clone(),
                sender: self.sender.clone(),
                invalidations: self.shared.invalidations.clone(),
                fleet: self.shared.fleet.clone(),
                telemetry: self.shared.telemetry.clone(),
            }),
            opportunistic: Arc::new(OpportunisticStore {
                upstream: self.upstream.clone(),
                admission: self.admission.clone(),
                store: self.store.clone(),
                incomplete: self.shared.incomplete.clone(),
                inflight: inflight.clone(),
                max_entry_bytes,
            }),
            shadow: Arc::new(Shadow {
                upstream: self.upstream.clone(),
                admission: self.admission.clone(),
                lookup: self.lookup.clone(),
                store: self.store.clone(),
                inflight: inflight.clone(),
                max_entry_bytes,
            }),
            upstream: self.upstream.clone(),
            clock: self.shared.clock.clone(),
            sender: self.sender.clone(),
            responder: self.responder.clone(),
            invalidations: self.shared.invalidations.clone(),
        })
    }

    fn explainer(&self) -> Explainer {
        Explainer {
            upstream: self.upstream.clone(),
            admission: self.admission.clone(),
            lookup: self.lookup.clone(),
            coalescer: self.shared.coalescer.clone(),
            clock: self.shared.clock.clone(),
        }
    }
}
