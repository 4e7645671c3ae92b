//! The admin API: health, counters, purges. It has its own listener, and accepts only that listener's address as Host.

mod client;
mod entries;
pub mod explain;
mod extract;
mod health;
mod metrics;
pub mod mode;
mod purge;
mod reload;
mod requests;
mod stats;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwapOption;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use client::AdminClient;
pub use explain::ExplainRequest;
pub use mode::ModeRequest;
pub use purge::PurgeRequest;
pub use reload::{Reload, ReloadStatus};

use super::secret::Secret;
use crate::proxy::active::ActiveConfig;
use crate::proxy::{Proxy, SharedState};

/// Maximum size of a request body, in bytes.
const MAX_BODY: usize = 1 << 20;

/// The state of the admin API.
#[derive(Debug)]
pub struct Admin {
    active: Arc<ActiveConfig>,
    reload: Arc<dyn Reload>,
    draining: AtomicBool,
}

impl Admin {
    /// Creates the admin API of the active configuration.
    pub fn new(active: Arc<ActiveConfig>, reload: Arc<dyn Reload>) -> Admin {
        Admin { active, reload, draining: AtomicBool::new(false) }
    }

    /// Returns the current shared state of all upstreams.
    fn shared(&self) -> Arc<SharedState> {
        self.active.shared()
    }

    /// Returns the proxies that serve now.
    fn proxies(&self) -> Vec<Arc<Proxy>> {
        self.active.proxies()
    }

    /// Reports not ready from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

/// Access control of an admin listener.
#[derive(Debug)]
pub struct Access {
    /// The listener's address.
    pub address: SocketAddr,
    token: ArcSwapOption<Secret>,
}

impl Access {
    /// Allows requests that have the token. Without a token, allows all requests.
    pub fn new(address: SocketAddr, token: Option<Secret>) -> Access {
        Access { address, token: ArcSwapOption::from_pointee(token) }
    }

    /// Replaces the token.
    pub fn set_token(&self, token: Option<Secret>) {
        self.token.store(token.map(Arc::new));
    }
}

/// Serves the admin API until `close` turns true.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>, access: Arc<Access>, close: watch::Receiver<bool>) {
    let open = probes()
        .route("/health", get(health::health))
        .route("/openapi.json", get(openapi))
        .route("/", get(dashboard));
    let guarded = Router::new()
        .route("/stats", get(stats::stats))
        .route("/config", get(reload::config))
        .route("/requests", get(requests::requests))
        .route("/entries", get(entries::entries))
        .route("/budgets", get(entries::budgets))
        .route("/purge", post(purge::purge))
        .route("/explain", post(explain::explain))
        .route("/mode", post(mode::mode))
        .route("/reload", post(reload::reload))
        .layer(from_fn_with_state(access, authorize));
    let app = open.merge(guarded).fallback(not_found).method_not_allowed_fallback(method_not_allowed);
    let app = app.layer(DefaultBodyLimit::max(MAX_BODY)).with_state(admin);
    serve_router(listener, app, close, "admin").await;
}

/// Serves only the endpoints for kubelet and Prometheus, to any client and under any Host, until `close` turns true.
pub async fn serve_probes(listener: TcpListener, admin: Arc<Admin>, close: watch::Receiver<bool>) {
    serve_router(listener, probes().with_state(admin), close, "probes").await;
}

fn probes() -> Router<Arc<Admin>> {
    Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(metrics::metrics))
}

async fn serve_router(listener: TcpListener, app: Router, mut close: watch::Receiver<bool>, what: &str) {
    let closing = async move {
        let _ = close.wait_for(|close| *close).await;
    };
    if let Err(error) = axum::serve(listener, app).with_graceful_shutdown(closing).await {
        tracing::error!(%error, "the {what} listener ended");
    }
}

/// Returns the dashboard: a page without data, which requests the data with the token that the user enters.
async fn dashboard() -> impl IntoResponse {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                  base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    ([(CONTENT_SECURITY_POLICY, policy), (CACHE_CONTROL, "no-cache")], Html(include_str!("admin/dashboard.html")))
}

/// Returns the description of the admin API for tools: `OpenAPI` 3.1.
async fn openapi() -> impl IntoResponse {
    let document = include_str!("admin/openapi.json").replace("VERSION", env!("CARGO_PKG_VERSION"));
    ([(CONTENT_TYPE, "application/json")], document)
}

async fn not_found() -> Response {
    let message = "No such path: GET /openapi.json lists them.";
    problem(StatusCode::NOT_FOUND, "not_found", message)
}

async fn method_not_allowed() -> Response {
    let message = "Method not allowed for this path: GET /openapi.json lists the methods.";
    problem(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// Requires the listener's own Host (against DNS rebinding), its own Origin or none (against CSRF), and the token.
async fn authorize(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if !is_own_host(headers, access.address) {
        return problem(
            StatusCode::MISDIRECTED_REQUEST,
            "bad_host",
            "The Host is not this admin listener's address.",
        );
    }
    if !is_own_origin(headers) {
        return problem(StatusCode::FORBIDDEN, "foreign_origin", "The Origin is not this admin listener's.");
    }
    if let Some(token) = &*access.token.load() {
        let given = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        if !given.is_some_and(|given| token.equals(given)) {
            let message = "Send Authorization: Bearer with the token of [admin].";
            return problem(StatusCode::UNAUTHORIZED, "unauthorized", message);
        }
    }
    next.run(request).await
}

fn is_own_host(headers: &HeaderMap, address: SocketAddr) -> bool {
    let Some(host) = headers.get(HOST).and_then(|host| host.to_str().ok()) else { return false };
    let port = address.port();
    let local = ["127.0.0.1", "localhost", "[::1]"];
    // A listener on all addresses accepts any IP address with its port: DNS rebinding needs a host name.
    let by_number = || host.parse::<SocketAddr>().is_ok_and(|named| named.port() == port);
    host == address.to_string()
        || address.ip().is_unspecified() && by_number()
        || (address.ip().is_loopback() || address.ip().is_unspecified())
            && local.iter().any(|name| host == format!("{name}:{port}"))
}

fn is_own_origin(headers: &HeaderMap) -> bool {
    match (headers.get(ORIGIN), headers.get(HOST)) {
        (None, _) => true,
        (Some(origin), Some(host)) => {
            origin.as_bytes().strip_prefix(b"http://").is_some_and(|origin| origin == host.as_bytes())
        }
        (Some(_), None) => false,
    }
}

/// Returns an error response of the admin API.
fn problem(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({"error": {"code": code, "message": message}}))).into_response()
}
