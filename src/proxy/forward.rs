//! The request as it goes upstream.

use http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING, UPGRADE,
    VIA,
};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Request, Uri, Version};

use super::site::Place;
use crate::body::Body;
use crate::policy::headers::{strip_hop_by_hop, strip_overrides};

/// A request for the upstream, from the client's: hop-by-hop and override fields dropped, Host set, `Via`
/// appended, header case kept. The target stays as it came, to the byte.
pub fn outgoing(asked: &Parts, place: &Place, body: Body) -> Request<Body> {
    let kind = Framing::of(&body);
    let mut request = Request::new(body);
    *request.method_mut() = asked.method.clone();
    *request.uri_mut() = uri(asked, place);
    *request.version_mut() = Version::HTTP_11;
    *request.extensions_mut() = asked.extensions.clone();
    let headers = request.headers_mut();
    headers.clone_from(&asked.headers);
    strip_hop_by_hop(headers);
    strip_overrides(headers);
    headers.remove(EXPECT);
    reframe(headers, &kind);
    headers.remove(HOST);
    if let Ok(host) = HeaderValue::from_str(&place.host) {
        headers.insert(HOST, host);
    }
    headers.append(VIA, via(asked.version));
    request
}

/// Asks for the other protocol too: RFC 9110 §7.8.
pub fn ask_upgrade(request: &mut Request<Body>, asked: &HeaderMap) {
    if let Some(protocol) = asked.get(UPGRADE) {
        request.headers_mut().insert(UPGRADE, protocol.clone());
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
}

/// How the length of a request body is said.
enum Framing {
    Nothing,
    /// The writer knows the length.
    Known,
    /// It still comes from the client.
    Coming,
}

impl Framing {
    fn of(body: &Body) -> Framing {
        match body {
            Body::Empty => Framing::Nothing,
            Body::Full(_) => Framing::Known,
            Body::Stream(_) | Body::Shared(_) => Framing::Coming,
        }
    }
}

/// Framing is made anew by the one who writes it, but for what only the client knows: that nothing follows, or
/// how long what follows will be (validated by the guard, and counted by the HTTP library).
fn reframe(headers: &mut HeaderMap, kind: &Framing) {
    match kind {
        Framing::Nothing => {
            if let Some(length) = headers.get_mut(CONTENT_LENGTH) {
                *length = HeaderValue::from_static("0");
            }
        }
        Framing::Known => {
            headers.remove(CONTENT_LENGTH);
        }
        Framing::Coming => {
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

fn uri(asked: &Parts, place: &Place) -> Uri {
    let slash = PathAndQuery::from_static("/");
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(place.scheme.clone());
    parts.authority = Some(place.connect.clone());
    parts.path_and_query = Some(asked.uri.path_and_query().cloned().unwrap_or(slash));
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
