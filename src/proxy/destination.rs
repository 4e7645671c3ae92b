//! Destinations: where a request goes, and the Host that it carries.

use http::header::HeaderName;
use http::uri::{Authority, Scheme};
use http::{HeaderMap, Uri};

use crate::policy::routing::origin::{HostPattern, Origin};
use crate::policy::routing::target::{client_authority, is_refused};

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Where one request goes.
#[derive(Debug, Clone)]
pub struct Destination {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Host and port to connect to.
    pub authority: Authority,
    /// The authority that is part of the key and scopes tags. `None` for an upstream with one authority.
    pub key_authority: Option<Box<str>>,
    /// The Host to send.
    pub host: Box<str>,
}

/// The request is for a host that this upstream does not serve: 421 (RFC 9110 §15.5.20).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Misdirected;

impl Destination {
    /// Returns the destination of all requests of an upstream, if it has only one.
    pub(super) fn fixed(origin: &Origin) -> Option<Destination> {
        match origin {
            Origin::Fixed { scheme, authority, preserve_host: false } => Some(Destination {
                scheme: scheme.clone(),
                authority: authority.clone(),
                key_authority: None,
                host: authority.as_str().into(),
            }),
            Origin::Fixed { .. } | Origin::Hosts(_) => None,
        }
    }

    /// Returns the destination that a request names.
    pub(super) fn named(origin: &Origin, uri: &Uri, headers: &HeaderMap) -> Result<Destination, Misdirected> {
        match origin {
            Origin::Fixed { scheme, authority, .. } => {
                let named = client_authority(uri, headers).unwrap_or(authority.as_str());
                let default = if *scheme == Scheme::HTTPS { ":443" } else { ":80" };
                let named = named.to_ascii_lowercase();
                let host: Box<str> = named.strip_suffix(default).unwrap_or(&named).into();
                let key_authority = Some(host.clone());
                Ok(Destination { scheme: scheme.clone(), authority: authority.clone(), key_authority, host })
            }
            Origin::Hosts(patterns) => allowed_destination(patterns, uri, headers).ok_or(Misdirected),
        }
    }
}

/// The first of absolute-form target, `X-Forwarded-Host` and `Host` decides, and must match a pattern.
fn allowed_destination(patterns: &[HostPattern], uri: &Uri, headers: &HeaderMap) -> Option<Destination> {
    let named = match (uri.authority(), headers.get(X_FORWARDED_HOST)) {
        (Some(authority), _) => authority.as_str(),
        (None, Some(forwarded)) => forwarded.to_str().ok()?.trim(),
        (None, None) => client_authority(uri, headers)?,
    };
    let authority: Authority = named.to_ascii_lowercase().parse().ok()?;
    let host = authority.host();
    if authority.as_str().contains('@') || is_refused_host(host) {
        return None;
    }
    let pattern = patterns.iter().find(|pattern| pattern.matches(host, authority.port_u16()))?;
    // `shop` and `shop:443` are the same authority: the default port is removed.
    let default = if pattern.scheme == Scheme::HTTPS { 443 } else { 80 };
    let authority = if authority.port_u16() == Some(default) { host.parse().ok()? } else { authority };
    let host: Box<str> = authority.as_str().into();
    Some(Destination { scheme: pattern.scheme.clone(), authority, key_authority: Some(host.clone()), host })
}

/// Returns true for a literal link-local or metadata address.
fn is_refused_host(host: &str) -> bool {
    host.trim_matches(['[', ']']).parse().is_ok_and(is_refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::routing::origin::HostPattern;
    use crate::policy::routing::pattern::Glob;
    use http::HeaderValue;

    fn host_of(uri: &str, lines: &[(&'static str, &'static str)]) -> Option<String> {
        let labels = ["*", "shop", "example"].map(Glob::new).to_vec();
        let patterns = [HostPattern { scheme: Scheme::HTTPS, labels, port: None }];
        let lines = lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v)));
        let found = allowed_destination(&patterns, &uri.parse().expect("a URI"), &HeaderMap::from_iter(lines));
        found.map(|found| found.host.to_string())
    }

    #[test]
    fn destination_is_uri_then_x_forwarded_host_then_host_if_allowed() {
        let table: &[(&str, &[(&str, &str)], Option<&str>)] = &[
            ("/", &[("host", "a.shop.example")], Some("a.shop.example")),
            ("/", &[("host", "A.Shop.example:443")], Some("a.shop.example")),
            ("/", &[("host", "127.0.0.1"), ("x-forwarded-host", "b.shop.example")], Some("b.shop.example")),
            ("/", &[("host", "a.shop.example"), ("x-forwarded-host", "evil.example")], None),
            ("http://c.shop.example/", &[("host", "evil.example")], Some("c.shop.example")),
            ("/", &[("host", "a.b.shop.example")], None),
            ("/", &[("host", "a.shop.example:8443")], None),
            ("/", &[("host", "user@a.shop.example")], None),
            ("/", &[("host", "169.254.169.254")], None),
        ];
        for (uri, lines, expected) in table {
            assert_eq!(host_of(uri, lines).as_deref(), *expected, "{uri} {lines:?}");
        }
    }
}
