//! The request header fields that carry credentials, unless `security.credential_headers` names others.
//!
//! Requests with other fields that look like credentials bypass the cache ([`crate::policy::routing::cache_key`]).

use http::header::HeaderName;

/// Returns the default of `security.credential_headers`.
pub fn default_credential_headers() -> Vec<HeaderName> {
    [
        "authorization",
        "cookie",
        "x-api-key",
        "api-key",
        "apikey",
        "x-auth-token",
        "x-access-token",
        "private-token",
        "x-shopify-access-token",
        "x-shopify-storefront-access-token",
        "shopify-storefront-private-token",
    ]
    .map(HeaderName::from_static)
    .to_vec()
}
