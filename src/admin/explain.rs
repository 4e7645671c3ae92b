//! `POST /explain`: explains how a request would be handled.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::HOST;
use http::uri::Authority;
use http::{Method, Request, Uri};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Admin;
use super::extract::{JsonBody, bad_request};
use crate::body::Body;
use crate::policy::client_limits::ClientLimits;
use crate::policy::http::hop_by_hop::strip_connection_options;
use crate::policy::http::request_guard;
use crate::policy::routing::origin::Origin;
use crate::proxy::Proxy;

/// A request to be explained.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExplainRequest {
    /// The method; GET if it is empty.
    pub method: String,
    /// The URL, absolute or beginning with a slash.
    pub url: String,
    /// The header fields: names and values.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
    /// The upstream's name. Default: the upstream whose listener or origin the URL names, else the first.
    pub upstream: Option<String>,
}

pub(super) async fn explain(
    State(admin): State<Arc<Admin>>,
    JsonBody(request): JsonBody<ExplainRequest>,
) -> Response {
    match explain_now(&admin, &request) {
        Ok(explanation) => Json(explanation).into_response(),
        Err(message) => bad_request(&message),
    }
}

fn explain_now(admin: &Admin, request: &ExplainRequest) -> Result<serde_json::Value, String> {
    let proxies = admin.proxies();
    let limits = admin.active.limits().ok_or("there is no upstream")?;
    explain_request(request, proxies.iter().map(AsRef::as_ref), &limits, true)
}

/// Explains how one of `proxies` would handle a request. The error is one line of text.
pub fn explain_request<'p>(
    params: &ExplainRequest,
    proxies: impl Iterator<Item = &'p Proxy> + Clone,
    limits: &ClientLimits,
    running: bool,
) -> Result<serde_json::Value, String> {
    let uri: Uri = params.url.parse().map_err(|e| format!("{:?} is no URL: {e}", params.url))?;
    let method = if params.method.is_empty() { "GET" } else { &params.method };
    let method = Method::from_bytes(method.as_bytes()).map_err(|e| format!("{method:?}: {e}"))?;
    let proxy = match &params.upstream {
        Some(name) => proxies.clone().find(|proxy| *proxy.upstream.name == **name),
        None => proxies.clone().find(|proxy| is_addressed_by(proxy, &uri)).or_else(|| proxies.clone().next()),
    };
    let proxy = proxy.ok_or_else(|| {
        let names: Vec<&str> = proxies.map(|proxy| &*proxy.upstream.name).collect();
        format!("no such upstream: there are {}", names.join(", "))
    })?;
    let mut request = Request::builder().method(method);
    for (name, value) in &params.headers {
        request = request.header(name, value);
    }
    // As a client sends it: the path as request target, the authority in Host.
    if request.headers_ref().is_some_and(|headers| !headers.contains_key(HOST)) {
        request = request.header(HOST, uri.authority().map_or("localhost", Authority::as_str));
    }
    let body = if params.body.is_empty() { Body::Empty } else { Body::Full(params.body.clone().into()) };
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    let mut request = request.uri(target).body(body).map_err(|e| e.to_string())?;
    if let Err(refused) = request_guard::check(&request, limits, |name| proxy.upstream.is_keyed(name)) {
        return Ok(json!({
            "request": format!("{} {target}", request.method()),
            "decision": format!("rejected with {} ({})", refused.status.as_u16(), refused.code),
            "why": refused.message,
        }));
    }
    strip_connection_options(request.headers_mut());
    Ok(proxy.explain(&request, running))
}

/// Returns true if a URL names the upstream's listener or its origin.
fn is_addressed_by(proxy: &Proxy, uri: &Uri) -> bool {
    let Some(named) = uri.authority() else { return false };
    let same = |authority: &Authority| authority.as_str().eq_ignore_ascii_case(named.as_str());
    let listens = named.port_u16() == Some(proxy.upstream.port());
    listens
        || match &proxy.upstream.origin {
            Origin::Fixed { authority, .. } => same(authority),
            Origin::Hosts(patterns) => {
                patterns.iter().any(|pattern| pattern.matches(&named.host().to_ascii_lowercase(), named.port_u16()))
            }
        }
}
