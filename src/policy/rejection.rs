//! Rejections of requests before routing: status, code and message.

use http::StatusCode;

/// The rejection of a request by the request guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejection {
    /// The status of the response.
    pub status: StatusCode,
    /// The error code in the JSON body and in `Cache-Status`.
    pub code: &'static str,
    /// A description of the error.
    pub message: &'static str,
}
