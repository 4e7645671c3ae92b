//! The client of the admin API, used by commands such as `stats`, `health` and `purge`.

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use http::{Method, Request, StatusCode, Uri};
use serde_json::Value;

use crate::body::Body;
use crate::clock::Clock;
use crate::secret::Secret;
use crate::upstream::Timeouts;
use crate::upstream::UpstreamClient;
use crate::upstream::client::PooledClient;

/// A client of a running sidecar's admin API.
#[derive(Debug)]
pub struct AdminClient {
    http: PooledClient,
    base: Uri,
    token: Option<Secret>,
}

impl AdminClient {
    /// Creates a client of the admin API at `base`, as in `http://127.0.0.1:18081`.
    pub fn new(base: &str, token: Option<Secret>) -> Result<AdminClient, String> {
        let base: Uri = base.parse().map_err(|e| format!("--admin {base:?}: {e}"))?;
        if base.authority().is_none() {
            return Err(format!("--admin {base}: write http://127.0.0.1:18081"));
        }
        let limit = Duration::from_secs(5);
        let timeouts = Timeouts { connect: Duration::from_secs(2), first_byte: limit, idle: limit, fetch: limit };
        Ok(AdminClient { http: PooledClient::plain(timeouts, Clock::start())?, base, token })
    }

    /// Sends `GET path`. Returns the status and the body.
    pub async fn get(&self, path: &str) -> Result<(StatusCode, String), String> {
        self.call(Method::GET, path, Body::Empty).await
    }

    /// Sends `POST path` with a JSON body. Returns the JSON response, or its error in one line.
    pub async fn post(&self, path: &str, body: &impl serde::Serialize) -> Result<Value, String> {
        let body = serde_json::to_vec(body).map_err(|e| e.to_string())?;
        let (status, text) = self.call(Method::POST, path, Body::Full(Bytes::from(body))).await?;
        let answer: Value = serde_json::from_str(&text).map_err(|_| format!("{status}: {text}"))?;
        if status.is_success() { Ok(answer) } else { Err(format!("{status}: {}", error_message(&answer))) }
    }

    async fn call(&self, method: Method, path: &str, body: Body) -> Result<(StatusCode, String), String> {
        let authority = self.base.authority().map_or("", |a| a.as_str());
        let scheme = self.base.scheme_str().unwrap_or("http");
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{scheme}://{authority}{path}"))
            .header(HOST, authority)
            .header(CONTENT_TYPE, "application/json");
        if let Some(token) = &self.token {
            let value = HeaderValue::from_str(&format!("Bearer {}", token.reveal()));
            let mut value =
                value.map_err(|_| "the token has characters that are not allowed in a header field".to_owned())?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let request = request.body(body).map_err(|e| e.to_string())?;
        let unreachable = |e| {
            format!("no sidecar answers at {scheme}://{authority} ({e}): start one, or give its address with --admin")
        };
        let response = self.http.send(request).await.map_err(unreachable)?;
        let status = response.status();
        let mut body = response.into_body();
        let mut text = Vec::new();
        while let Some(chunk) = body.next().await {
            text.extend_from_slice(&chunk.map_err(|e| e.to_string())?);
        }
        Ok((status, String::from_utf8_lossy(&text).into_owned()))
    }
}

fn error_message(answer: &Value) -> &str {
    answer.pointer("/error/message").and_then(Value::as_str).unwrap_or("no message")
}
