//! Rejections of requests before routing: status, code and message.

use http::StatusCode;

/// Why the guard refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejection {
    /// The status to answer with.
    pub status: StatusCode,
    /// The code in the JSON error and in `Cache-Status`.
    pub code: &'static str,
    /// What is wrong.
    pub message: &'static str,
}
