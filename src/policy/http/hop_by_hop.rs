//! Fields that are not forwarded, and fields that are not stored.

use std::time::SystemTime;

use http::header::{
    CONNECTION, CONTENT_LENGTH, DATE, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use smallvec::SmallVec;

/// Hop-by-hop: RFC 9110 §7.6.1, and what older agents send.
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

/// RFC 9211.
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// W3C Server Timing.
pub const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// What could make the upstream see another request than the one the cache keyed.
const REQUEST_OVERRIDES: [HeaderName; 3] =
    [FORWARDED, HeaderName::from_static("x-original-url"), HeaderName::from_static("x-rewrite-url")];

/// A `Connection` field may not name these: it would make us drop what decides about the request.
pub fn must_not_be_connection_option(name: &HeaderName, keyed: impl Fn(&HeaderName) -> bool) -> bool {
    *name == HOST
        || *name == CONTENT_LENGTH
        || *name == FORWARDED
        || name.as_str().starts_with("x-forwarded-")
        || name.as_str().starts_with("proxy-") && name.as_str() != "proxy-connection"
        || keyed(name)
}

/// The names that `Connection` fields nominate. What is no name is passed over.
pub fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> + '_ {
    headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|b| *b == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
}

/// Takes out the hop-by-hop fields of a request or an answer.
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

/// Takes out what `Connection` names, and nothing else.
pub fn strip_connection_options(headers: &mut HeaderMap) {
    let options = ["close", "keep-alive", "upgrade"];
    let names: SmallVec<[HeaderName; 2]> =
        connection_options(headers).filter(|n| !options.contains(&n.as_str())).collect();
    for name in names {
        headers.remove(name);
    }
}

/// An answer without `Date` gets the time it came: RFC 9110 §6.6.1.
pub fn add_date(headers: &mut HeaderMap, at: SystemTime) {
    if !headers.contains_key(DATE)
        && let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(at))
    {
        headers.insert(DATE, date);
    }
}

/// Takes out of a request what is never forwarded.
pub fn strip_overrides(headers: &mut HeaderMap) {
    for name in &REQUEST_OVERRIDES {
        headers.remove(name);
    }
    let prefixed =
        |name: &&HeaderName| ["x-forwarded-", "x-http-method"].iter().any(|p| name.as_str().starts_with(p));
    let prefixed: Vec<_> = headers.keys().filter(prefixed).cloned().collect();
    for name in prefixed {
        headers.remove(name);
    }
}

/// A copy of just these fields.
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
    fn what_connection_names_goes_with_it() {
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
