//! `POST /explain`: what would become of a request.

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
use super::input::{Told, bad};
use crate::body::Body;
use crate::config::{Limits, Target};
use crate::policy::headers::strip_nominated;
use crate::proxy::Proxy;
use crate::server::guard;

/// A request to be explained.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExplainRequest {
    /// Its method; GET if it is empty.
    pub method: String,
    /// Its URL, absolute or from the slash on.
    pub url: String,
    /// Its headers: names and values.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: String,
    /// Which upstream, by name. Default: the one whose listener or origin the URL names, else the first.
    pub upstream: Option<String>,
}

pub(super) async fn explain(State(admin): State<Arc<Admin>>, Told(request): Told<ExplainRequest>) -> Response {
    match explain_now(&admin, &request) {
        Ok(told) => Json(told).into_response(),
        Err(message) => bad(&message),
    }
}

fn explain_now(admin: &Admin, request: &ExplainRequest) -> Result<serde_json::Value, String> {
    let proxies = admin.proxies();
    let limits = admin.stage.limits().ok_or("there is no upstream")?;
    answer(request, proxies.iter().map(AsRef::as_ref), &limits, true)
}

/// Explains a request to one of these proxies. The error is one clear line.
pub fn answer<'p>(
    asked: &ExplainRequest,
    proxies: impl Iterator<Item = &'p Proxy> + Clone,
    limits: &Limits,
    running: bool,
) -> Result<serde_json::Value, String> {
    let uri: Uri = asked.url.parse().map_err(|e| format!("{:?} is no URL: {e}", asked.url))?;
    let method = if asked.method.is_empty() { "GET" } else { &asked.method };
    let method = Method::from_bytes(method.as_bytes()).map_err(|e| format!("{method:?}: {e}"))?;
    let proxy = match &asked.upstream {
        Some(name) => proxies.clone().find(|proxy| *proxy.site.name == **name),
        None => proxies.clone().find(|proxy| is_for(proxy, &uri)).or_else(|| proxies.clone().next()),
    };
    let proxy = proxy.ok_or_else(|| {
        let names: Vec<&str> = proxies.map(|proxy| &*proxy.site.name).collect();
        format!("no such upstream: there are {}", names.join(", "))
    })?;
    let mut request = Request::builder().method(method);
    for (name, value) in &asked.headers {
        request = request.header(name, value);
    }
    // As a client sends it: the path, and whom it is for in Host.
    if request.headers_ref().is_some_and(|headers| !headers.contains_key(HOST)) {
        request = request.header(HOST, uri.authority().map_or("localhost", Authority::as_str));
    }
    let body = if asked.body.is_empty() { Body::Empty } else { Body::Full(asked.body.clone().into()) };
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    let mut request = request.uri(target).body(body).map_err(|e| e.to_string())?;
    if let Err(refused) = guard::check(&request, limits, |name| proxy.site.is_keyed(name)) {
        return Ok(json!({
            "request": format!("{} {target}", request.method()),
            "decision": format!("refused with {} ({})", refused.status.as_u16(), refused.code),
            "why": refused.message,
        }));
    }
    strip_nominated(request.headers_mut());
    Ok(proxy.explain(&request, running))
}

/// Does a URL name an upstream's listener, or its origin?
fn is_for(proxy: &Proxy, uri: &Uri) -> bool {
    let Some(named) = uri.authority() else { return false };
    let same = |authority: &Authority| authority.as_str().eq_ignore_ascii_case(named.as_str());
    let listens = named.port_u16() == Some(proxy.site.port());
    listens
        || match &proxy.site.target {
            Target::Origin { authority, .. } => same(authority),
            Target::Hosts(patterns) => {
                patterns.iter().any(|pattern| pattern.matches(&named.host().to_ascii_lowercase(), named.port_u16()))
            }
        }
}
