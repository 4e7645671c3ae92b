//! A borrowed view of a request's method, target and header fields, independent of how the request is stored.

use http::header::HeaderMap;
use http::{Method, Request, Uri, request};

/// A request without its body.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'r> {
    /// The method.
    pub method: &'r Method,
    /// The request target.
    pub uri: &'r Uri,
    /// The header fields.
    pub headers: &'r HeaderMap,
}

impl<'r, B> From<&'r Request<B>> for RequestView<'r> {
    fn from(request: &'r Request<B>) -> Self {
        RequestView { method: request.method(), uri: request.uri(), headers: request.headers() }
    }
}

impl<'r> From<&'r request::Parts> for RequestView<'r> {
    fn from(parts: &'r request::Parts) -> Self {
        RequestView { method: &parts.method, uri: &parts.uri, headers: &parts.headers }
    }
}
