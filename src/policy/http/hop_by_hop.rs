//! Hop-by-hop header fields and other fields that are not forwarded or stored (RFC 9110 §7.6.1).

use std::time::SystemTime;

use http::header::{
    CONNECTION, CONTENT_LENGTH, DATE, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use smallvec::SmallVec;

/// Hop-by-hop fields: those of RFC 9110 §7.6.1, and those of older implementations.
const HOP_BY_HOP: [HeaderName; 10] = [
    CONNECTION,
    TRANSFER_ENCODING,
    TE,
    TRAILER,
    UPGRADE,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authentication-info"),
];

/// `Cache-Status` (RFC 9211).
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// `Server-Timing` (W3C Server Timing).
pub const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Request fields that could make the upstream handle another request than the one in the cache key.
const REQUEST_OVERRIDES: [HeaderName; 3] =
    [FORWARDED, HeaderName::from_static("x-original-url"), HeaderName::from_static("x-rewrite-url")];

/// Returns true if `Connection` may not name this field, because removing it would change the meaning of the request.
pub fn must_not_be_connection_option(name: &HeaderName, keyed: impl Fn(&HeaderName) -> bool) -> bool {
    *name == HOST
        || *name == CONTENT_LENGTH
        || *name == FORWARDED
        || name.as_str().starts_with("x-forwarded-")
        || name.as_str().starts_with("proxy-") && name.as_str() != "proxy-connection"
        || keyed(name)
}

/// Returns the field names listed in `Connection`. Invalid names are skipped.
pub fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> + '_ {
    headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|b| *b == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
}

/// Removes the hop-by-hop fields of a request or a response.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let names: Vec<_> = connection_options(headers).collect();
        for name in names {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Removes the fields that `Connection` names, except `Close`, `Keep-Alive` and `Upgrade`, and no other fields.
pub fn strip_connection_options(headers: &mut HeaderMap) {
    let options = ["close", "keep-alive", "upgrade"];
    let names: SmallVec<[HeaderName; 2]> =
        connection_options(headers).filter(|n| !options.contains(&n.as_str())).collect();
    for name in names {
        headers.remove(name);
    }
}

/// Adds `Date` with the time of arrival to a response that has none (RFC 9110 §6.6.1).
pub fn add_date(headers: &mut HeaderMap, at: SystemTime) {
    if !headers.contains_key(DATE)
        && let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(at))
    {
        headers.insert(DATE, date);
    }
}

/// Removes the fields of a request that are never forwarded: `Forwarded`, `X-Forwarded-*` and other overrides.
pub fn strip_overrides(headers: &mut HeaderMap) {
    for name in &REQUEST_OVERRIDES {
        headers.remove(name);
    }
    let prefixed = |name: &&HeaderName| name.as_str().starts_with("x-forwarded-");
    let prefixed: Vec<_> = headers.keys().filter(prefixed).cloned().collect();
    for name in prefixed {
        headers.remove(name);
    }
}

/// Returns true if the upstream may execute the request with another method than its own, as many frameworks do.
pub fn overrides_method(headers: &HeaderMap) -> bool {
    let names =
        |name: &HeaderName| matches!(name.as_str(), "x-http-method" | "x-http-method-override" | "x-method-override");
    headers.keys().any(names)
}

/// Returns a copy of only these fields.
pub fn pick(names: &[HeaderName], headers: &HeaderMap) -> HeaderMap {
    let lines = names.iter().flat_map(|name| headers.get_all(name).iter().map(move |value| (name.clone(), value)));
    lines.fold(HeaderMap::new(), |mut picked, (name, value)| {
        picked.append(name, value.clone());
        picked
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_headers_and_those_named_by_connection_are_removed() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("connection", "close, X-Hop"), ("x-hop", "1"), ("keep-alive", "5"), ("te", "trailers"), ("x-stay", "1")]
        {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-stay"]);
    }
}
