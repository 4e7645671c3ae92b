//! The request as it goes upstream.

use http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING, UPGRADE,
    VIA,
};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, Uri, Version};

use crate::body::Body;
use crate::policy::http::hop_by_hop::{strip_hop_by_hop, strip_overrides};
use crate::proxy::upstream_state::Destination;

/// A request for the upstream, from the client's: hop-by-hop and override fields dropped, Host set, `Via`
/// appended if `adds_via`, header case kept. The target stays as it came, to the byte.
pub fn outgoing(client: &Parts, destination: &Destination, body: Body, adds_via: bool) -> Request<Body> {
    let kind = BodyFraming::of(&body);
    let mut request = Request::new(body);
    *request.method_mut() = client.method.clone();
    *request.uri_mut() = uri(client, destination);
    *request.version_mut() = Version::HTTP_11;
    *request.extensions_mut() = client.extensions.clone();
    let headers = request.headers_mut();
    headers.clone_from(&client.headers);
    strip_hop_by_hop(headers);
    strip_overrides(headers);
    headers.remove(EXPECT);
    set_framing(headers, &client.method, &kind);
    headers.remove(HOST);
    if let Ok(host) = HeaderValue::from_str(&destination.host) {
        headers.insert(HOST, host);
    }
    if adds_via {
        headers.append(VIA, via(client.version));
    }
    request
}

/// Asks for the other protocol too: RFC 9110 §7.8.
pub fn add_upgrade(request: &mut Request<Body>, client: &HeaderMap) {
    if let Some(protocol) = client.get(UPGRADE) {
        request.headers_mut().insert(UPGRADE, protocol.clone());
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
}

/// How the length of a request body is said.
enum BodyFraming {
    Nothing,
    /// The writer knows the length.
    Known,
    /// It still comes from the client.
    Coming,
}

impl BodyFraming {
    fn of(body: &Body) -> BodyFraming {
        match body {
            Body::Empty => BodyFraming::Nothing,
            Body::Full(_) => BodyFraming::Known,
            Body::Stream(_) | Body::Shared(_) => BodyFraming::Coming,
        }
    }
}

/// Sets the framing fields. The HTTP client frames the body, except for what only the downstream client knows: that
/// nothing follows, or the length of what follows (validated by the guard, and counted by the HTTP library).
fn set_framing(headers: &mut HeaderMap, method: &Method, kind: &BodyFraming) {
    match kind {
        BodyFraming::Nothing => {
            // Methods whose content has a meaning say that there is none (RFC 9110 §8.6).
            let expects_content = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
            if expects_content || headers.contains_key(CONTENT_LENGTH) {
                headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
            }
        }
        BodyFraming::Known => {
            headers.remove(CONTENT_LENGTH);
        }
        BodyFraming::Coming => {
            if !headers.contains_key(CONTENT_LENGTH) {
                headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
        }
    }
}

/// For a rule that looks into bodies: only codings it can read.
pub fn readable_codings_only(request: &mut Request<Body>) {
    let accepts_gzip = request.headers().get_all(ACCEPT_ENCODING).iter().any(|value| {
        value.as_bytes().split(|b| *b == b',').any(|coding| {
            let mut parts = coding.split(|b| *b == b';').map(<[u8]>::trim_ascii);
            let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(b"gzip"));
            named && !parts.any(|weight| matches!(weight, b"q=0" | b"q=0.0" | b"q=0.00" | b"q=0.000"))
        })
    });
    let codings = if accepts_gzip { "gzip" } else { "identity" };
    request.headers_mut().insert(ACCEPT_ENCODING, HeaderValue::from_static(codings));
}

fn uri(client: &Parts, destination: &Destination) -> Uri {
    let slash = PathAndQuery::from_static("/");
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(destination.scheme.clone());
    parts.authority = Some(destination.authority.clone());
    parts.path_and_query = Some(client.uri.path_and_query().cloned().unwrap_or(slash));
    // Scheme, authority and path are all there: that is all a URI needs.
    Uri::from_parts(parts).unwrap_or_default()
}

fn via(version: Version) -> HeaderValue {
    HeaderValue::from_static(match version {
        Version::HTTP_10 => "1.0 sidecache",
        Version::HTTP_2 => "2 sidecache",
        _ => "1.1 sidecache",
    })
}
