//! What a request says, read strictly: what it can't be is a 4xx in our words.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::problem;

/// The parameters of a request.
#[derive(Debug)]
pub(super) struct Asked<T>(pub(super) T);

/// The JSON body of a request.
#[derive(Debug)]
pub(super) struct Told<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let refused = |error: QueryRejection| bad(&error.body_text());
        Query::from_request_parts(parts, state).await.map(|Query(asked)| Asked(asked)).map_err(refused)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Told<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let refused = |error: JsonRejection| match error.status() {
            status @ (StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNSUPPORTED_MEDIA_TYPE) => {
                problem(status, "bad_request", &error.body_text())
            }
            _ => bad(&error.body_text()),
        };
        Json::from_request(request, state).await.map(|Json(told)| Told(told)).map_err(refused)
    }
}

/// At most so many in one answer.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "usize")]
pub(super) struct Limit(pub(super) usize);

/// Nobody gets more in one answer.
const MOST: usize = 1000;

impl TryFrom<usize> for Limit {
    type Error = String;

    fn try_from(given: usize) -> Result<Self, String> {
        if (1..=MOST).contains(&given) { Ok(Limit(given)) } else { Err(format!("write 1 to {MOST}")) }
    }
}

/// 400, and why.
pub(super) fn bad(message: &str) -> Response {
    problem(StatusCode::BAD_REQUEST, "bad_request", message)
}
