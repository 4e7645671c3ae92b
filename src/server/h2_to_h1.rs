//! Converts HTTP/2 requests to their HTTP/1.1 form (authority, cookie crumbs), so that later stages handle one form.

use http::header::{COOKIE, HOST, HeaderMap, HeaderValue};
use http::uri::PathAndQuery;
use http::{Request, Uri, Version};

/// Converts `:authority` to Host (RFC 9113 §8.3.1), the target to origin-form, and joins Cookie fields (§8.2.3).
///
/// A Host that differs from `:authority` is kept beside it: the request guard rejects requests with two Host fields.
pub(super) fn to_http1_form<B>(request: &mut Request<B>) {
    if request.version() != Version::HTTP_2 {
        return;
    }
    if let Some(authority) = request.uri().authority().cloned() {
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
        let headers = request.headers_mut();
        let same = headers.get(HOST).is_some_and(|host| host.as_bytes() == authority.as_str().as_bytes());
        if let (false, Ok(host)) = (same, HeaderValue::from_str(authority.as_str())) {
            headers.append(HOST, host);
        }
    }
    join_cookies(request.headers_mut());
}

fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let pieces: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&pieces.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http2_request_becomes_origin_form_with_host_and_one_cookie_field() {
        let request = Request::builder().version(Version::HTTP_2).uri("http://a.example/b?c");
        let request = request.header(COOKIE, "d=e").header(COOKIE, "f=g");
        let mut request = request.body(()).expect("a request");
        to_http1_form(&mut request);
        assert_eq!(request.uri(), "/b?c");
        assert_eq!(request.headers()[HOST], "a.example");
        assert_eq!(request.headers()[COOKIE], "d=e; f=g");
        let request = Request::builder().version(Version::HTTP_2).uri("http://a.example/").header(HOST, "b.example");
        let mut request = request.body(()).expect("a request");
        to_http1_form(&mut request);
        assert_eq!(request.headers().get_all(HOST).iter().count(), 2, "for the guard");
    }
}
