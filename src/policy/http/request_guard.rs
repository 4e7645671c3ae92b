//! Request validation before any other processing: RFC 9112 §3, RFC 9110 §7, and patterns of attacks on caches.

use http::header::{CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName};
use http::uri::Authority;
use http::{Method, Request, StatusCode, Uri, Version};
use memchr::memchr;

use crate::policy::client_limits::ClientLimits;
use crate::policy::http::hop_by_hop::{connection_options, must_not_be_connection_option};
use crate::policy::rejection::Rejection;
use crate::policy::routing::target::target;

/// Maximum number of header lines of a request.
const MAX_LINES: usize = 100;

/// Validates a request. Returns the [`Rejection`] to respond with if it must not be processed.
pub fn check<B>(
    request: &Request<B>,
    limits: &ClientLimits,
    is_keyed: impl Fn(&HeaderName) -> bool,
) -> Result<(), Rejection> {
    let (method, uri, headers) = (request.method(), request.uri(), request.headers());
    check_method(method, uri)?;
    check_target(uri, method, limits)?;
    check_size(headers, limits)?;
    check_host(request.version(), uri, headers)?;
    check_length(headers, limits)?;
    if connection_options(headers).any(|name| must_not_be_connection_option(&name, &is_keyed)) {
        return refuse(StatusCode::BAD_REQUEST, "bad_connection_header", "Connection names a header that must stay.");
    }
    let expects = headers.get_all(EXPECT).iter().all(|e| e.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    if !expects {
        return refuse(StatusCode::EXPECTATION_FAILED, "bad_expectation", "Only Expect: 100-continue is understood.");
    }
    Ok(())
}

fn refuse(status: StatusCode, code: &'static str, message: &'static str) -> Result<(), Rejection> {
    Err(Rejection { status, code, message })
}

fn bad_request(code: &'static str, message: &'static str) -> Result<(), Rejection> {
    refuse(StatusCode::BAD_REQUEST, code, message)
}

fn check_method(method: &Method, uri: &Uri) -> Result<(), Rejection> {
    if *method == Method::CONNECT || *method == Method::TRACE {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "CONNECT and TRACE are not served.");
    }
    if uri.path() == "*" && *method != Method::OPTIONS {
        return bad_request("bad_target", "The target * is for OPTIONS only.");
    }
    Ok(())
}

fn check_target(uri: &Uri, method: &Method, limits: &ClientLimits) -> Result<(), Rejection> {
    let target = target(uri);
    if target.len() as u64 > limits.url {
        return refuse(StatusCode::URI_TOO_LONG, "url_too_long", "The request target is longer than limits.url.");
    }
    let visible = |b: u8| (0x21..=0x7e).contains(&b) && b != b'#';
    let starts = target.starts_with('/') || (*method == Method::OPTIONS && target == "*");
    if !starts || !target.bytes().all(visible) {
        return bad_request("bad_target", "The request target has bytes that do not belong there.");
    }
    match (uri.scheme_str(), uri.authority()) {
        (None, None) | (Some("http" | "https"), Some(_)) => Ok(()),
        _ => bad_request("bad_target", "The request target is neither a path nor an http URL."),
    }
}

fn check_size(headers: &HeaderMap, limits: &ClientLimits) -> Result<(), Rejection> {
    let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if size as u64 > limits.headers || headers.len() > MAX_LINES {
        let message = "The header section is larger than limits.headers, or has over 100 lines.";
        return refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message);
    }
    Ok(())
}

/// Checks that an HTTP/1.1 request has exactly one well-formed Host (RFC 9112 §3.2).
fn check_host(version: Version, uri: &Uri, headers: &HeaderMap) -> Result<(), Rejection> {
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if version == Version::HTTP_10 => Ok(()),
        (None, _) => bad_request("bad_host", "HTTP/1.1 needs a Host."),
        (Some(_), Some(_)) => bad_request("bad_host", "There is more than one Host."),
        (Some(host), None) => {
            // RFC 9110 §7.2: Host is empty if the target URI has no authority. Here, it is accepted only with an
            // absolute-form target, which has its own.
            let empty_and_absolute = host.is_empty() && uri.authority().is_some();
            if empty_and_absolute || host.to_str().is_ok_and(is_authority) {
                Ok(())
            } else {
                bad_request("bad_host", "The Host is not a host with an optional port.")
            }
        }
    }
}

fn is_authority(text: &str) -> bool {
    is_simple_authority(text.as_bytes()) || is_unusual_authority(text)
}

/// Fast path: returns true for a name or an IPv4 address with or without a port, which nearly every client sends.
fn is_simple_authority(text: &[u8]) -> bool {
    let colon = memchr(b':', text);
    let (name, port) = text.split_at(colon.unwrap_or(text.len()));
    let in_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
    let port_is_number = || port.len() >= 2 && port.len() <= 5 && port[1..].iter().all(u8::is_ascii_digit);
    !name.is_empty() && name.iter().all(in_name) && (colon.is_none() || port_is_number())
}

fn is_unusual_authority(text: &str) -> bool {
    let port_is_number = |authority: &Authority| {
        let after = authority.as_str().get(authority.host().len()..).unwrap_or_default();
        after.strip_prefix(':').map_or(after.is_empty(), |port| !port.is_empty() && authority.port_u16().is_some())
    };
    !text.contains(['@', ',']) && text.parse::<Authority>().as_ref().is_ok_and(port_is_number)
}

/// Checks that Content-Length is a single number within the limit. The framing itself has been validated before, by the
/// scanner (HTTP/1.1) or the HTTP/2 library.
fn check_length(headers: &HeaderMap, limits: &ClientLimits) -> Result<(), Rejection> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let (Some(first), second) = (lengths.next(), lengths.next()) else { return Ok(()) };
    let digits = !first.is_empty() && first.as_bytes().iter().all(u8::is_ascii_digit);
    if second.is_some() || !digits {
        return bad_request("bad_framing", "Content-Length is not one number.");
    }
    if first.to_str().ok().and_then(|v| v.parse().ok()).is_none_or(|length: u64| length > limits.request_body) {
        let message = "The request body is larger than limits.request_body.";
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const LIMITS: ClientLimits = ClientLimits {
        request_body: 100,
        headers: 1000,
        url: 100,
        connections: 1,
        header_time: Duration::ZERO,
        keep_alive: Duration::ZERO,
        write_stall: Duration::ZERO,
        shared_write_stall: Duration::ZERO,
    };

    fn status(method: &str, uri: &str, lines: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("a request");
        check(&request, &LIMITS, |name| name.as_str() == "x-tenant").map_or_else(|r| r.status.as_u16(), |()| 200)
    }

    #[test]
    fn invalid_requests_are_rejected_with_the_matching_4xx_status() {
        let host = ("host", "localhost:8080");
        let long = format!("/{}", "a".repeat(100));
        let big = "a".repeat(1000);
        type Lines<'a> = &'a [(&'a str, &'a str)];
        let table: &[(&str, &str, Lines<'_>, u16)] = &[
            ("GET", "/", &[host], 200),
            ("GET", "/", &[], 400),
            ("GET", "/", &[host, ("host", "b")], 400),
            ("GET", "/", &[("host", "a b")], 400),
            ("GET", "/", &[("host", "user@a")], 400),
            ("GET", "/", &[("host", "a:x")], 400),
            ("GET", "/", &[("host", "a/b")], 400),
            ("GET", "/", &[("host", "[::1]:80")], 200),
            ("GET", "http://a/", &[("host", "b")], 200),
            ("GET", "ftp://a/", &[("host", "a")], 400),
            ("TRACE", "/", &[host], 405),
            ("CONNECT", "a:443", &[host], 405),
            ("OPTIONS", "*", &[host], 200),
            ("GET", "*", &[host], 400),
            ("GET", &long, &[host], 414),
            ("GET", "/", &[host, ("x", &big)], 431),
            ("POST", "/", &[host, ("content-length", "5, 5")], 400),
            ("POST", "/", &[host, ("content-length", "5"), ("content-length", "5")], 400),
            ("POST", "/", &[host, ("content-length", "+5")], 400),
            ("POST", "/", &[host, ("content-length", "101")], 413),
            ("GET", "/", &[host, ("connection", "close, x-harmless")], 200),
            ("GET", "/", &[host, ("connection", "host")], 400),
            ("GET", "/", &[host, ("connection", "X-Tenant")], 400),
            ("GET", "/", &[host, ("connection", "x-forwarded-for")], 400),
            ("GET", "/", &[host, ("expect", "200-ok")], 417),
            ("POST", "/", &[host, ("expect", "100-continue")], 200),
        ];
        for (method, uri, lines, expected) in table {
            assert_eq!(status(method, uri, lines), *expected, "{method} {uri} {lines:?}");
        }
    }
}
