//! The parts of a request that decisions and answers depend on, wherever they are kept.

use http::header::HeaderMap;
use http::{Method, Request, Uri, request};

/// A request without its body.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'r> {
    /// Its method.
    pub method: &'r Method,
    /// Its target.
    pub uri: &'r Uri,
    /// Its headers.
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
