//! The attempts of a fetch: its request, for the missing part only if the first part of the response is stored (RFC 9111
//! §3.4), and a second one where a 304 or 206 is of another representation.

use std::sync::Arc;

use http::{Method, Response, StatusCode};

use super::Fetcher;
use super::spec::FetchSpec;
use crate::body::Body;
use crate::policy::http::conditional::{is_other_representation, set_conditions};
use crate::policy::http::hop_by_hop::strip_hop_by_hop;
use crate::policy::http::incomplete::IncompleteResponse;
use crate::proxy::send::{Attempt, UpstreamRequest};

impl Fetcher {
    /// Sends the request of a fetch.
    pub(super) async fn send(&self, spec: &FetchSpec) -> Attempt {
        let request = UpstreamRequest { parts: &spec.request.parts, destination: &spec.request.destination };
        let first_part = self.stored_first_part(spec);
        let attempt = self.sender.send(request, Body::Empty, |request| {
            spec.shape(request);
            if let Some(first_part) = &first_part {
                first_part.ask_for_rest(request.headers_mut());
            }
        });
        let attempt = attempt.await;
        let Some(first_part) = first_part else { return self.unless_other_representation(spec, attempt).await };
        match attempt.response {
            Ok(mut response)
                if matches!(response.status(), StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE) =>
            {
                strip_hop_by_hop(response.headers_mut());
                if let Some(headers) = first_part.completed(response.status(), response.headers()) {
                    let mut response = response.map(|rest| Body::prefixed(vec![first_part.start.body.clone()], rest));
                    *response.status_mut() = StatusCode::OK;
                    *response.headers_mut() = headers;
                    return Attempt { response: Ok(response), ..attempt };
                }
                // The rest may be of another representation: fetch the whole.
                self.sender.send(request, Body::Empty, |request| spec.shape(request)).await
            }
            response => Attempt { response, ..attempt },
        }
    }

    /// A 304 that names another strong validator than the request did says nothing about the stored response
    /// (RFC 9111 §4.3.4): the request is sent again, without conditions.
    async fn unless_other_representation(&self, spec: &FetchSpec, attempt: Attempt) -> Attempt {
        let is_other = |response: &Response<Body>| {
            let stored = spec.stale.as_ref().map(|stale| stale.head.headers());
            response.status() == StatusCode::NOT_MODIFIED
                && stored.is_some_and(|stored| is_other_representation(&stored, response.headers()))
        };
        if !attempt.response.as_ref().is_ok_and(is_other) {
            return attempt;
        }
        let request = UpstreamRequest { parts: &spec.request.parts, destination: &spec.request.destination };
        let shape = |request: &mut http::Request<Body>| {
            spec.shape(request);
            set_conditions(request.headers_mut(), None);
        };
        self.sender.send(request, Body::Empty, shape).await
    }

    /// Takes the stored first part of the response, if it is fresh and valid for this request.
    fn stored_first_part(&self, spec: &FetchSpec) -> Option<Arc<IncompleteResponse>> {
        if spec.request.parts.method != Method::GET || spec.stale.is_some() {
            return None;
        }
        let first_part = self.incomplete.take(&spec.request.key)?;
        let fresh = self.lookup.is_fresh(&first_part.start, self.clock.now());
        (fresh && first_part.start.variant.selected_by(&spec.request.parts.headers)).then_some(first_part)
    }
}
