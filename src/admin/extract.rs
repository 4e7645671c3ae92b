//! Strict extractors for query parameters and JSON bodies: invalid input is a 4xx in the admin API's error format.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::problem;

/// The query parameters of a request.
#[derive(Debug)]
pub(super) struct QueryParams<T>(pub(super) T);

/// The JSON body of a request.
#[derive(Debug)]
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for QueryParams<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let refused = |error: QueryRejection| bad_request(&error.body_text());
        Query::from_request_parts(parts, state).await.map(|Query(value)| QueryParams(value)).map_err(refused)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let refused = |error: JsonRejection| match error.status() {
            status @ (StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNSUPPORTED_MEDIA_TYPE) => {
                problem(status, "bad_request", &error.body_text())
            }
            _ => bad_request(&error.body_text()),
        };
        Json::from_request(request, state).await.map(|Json(value)| JsonBody(value)).map_err(refused)
    }
}

/// Maximum number of items in one response.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "usize")]
pub(super) struct Limit(pub(super) usize);

/// The largest value of [`Limit`].
const MAX_LIMIT: usize = 1000;

impl TryFrom<usize> for Limit {
    type Error = String;

    fn try_from(given: usize) -> Result<Self, String> {
        if (1..=MAX_LIMIT).contains(&given) { Ok(Limit(given)) } else { Err(format!("write 1 to {MAX_LIMIT}")) }
    }
}

/// Returns a 400 response with the reason.
pub(super) fn bad_request(message: &str) -> Response {
    problem(StatusCode::BAD_REQUEST, "bad_request", message)
}
