//! Request targets: path and query, the authority that the client used, and detection of ambiguous paths.

use std::net::IpAddr;

use http::header::HOST;
use http::{HeaderMap, Uri};

/// Returns path and query as received.
pub fn target(uri: &Uri) -> &str {
    uri.path_and_query().map_or("/", |target| target.as_str())
}

/// Returns the raw parameters of a query, in order: `a=1&b` → `(a, 1)`, `(b, none)`. Only `&` separates.
pub fn parameters(query: Option<&str>) -> impl Iterator<Item = (&str, Option<&str>)> {
    query
        .into_iter()
        .flat_map(|q| q.split('&'))
        .map(|pair| pair.split_once('=').map_or((pair, None), |(name, value)| (name, Some(value))))
}

/// Returns the authority that the client addressed: that of an absolute-form target, else Host.
pub fn client_authority<'r>(uri: &'r Uri, headers: &'r HeaderMap) -> Option<&'r str> {
    match uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => headers.get(HOST)?.to_str().ok().filter(|host| !host.is_empty()),
    }
}

/// Returns true if a cache and an upstream might interpret this path differently: dot segments, also encoded
/// (RFC 3986 §5.2.4), encoded slashes and NULs, backslashes.
pub fn is_ambiguous(path: &str) -> bool {
    let bytes = path.as_bytes();
    let encoded =
        |at: usize| bytes.get(at..at + 3).map(|code| [code[1].to_ascii_lowercase(), code[2].to_ascii_lowercase()]);
    // The number of dots in the current segment, as long as it consists of dots only.
    let mut dots = Some(0u8);
    let mut at = 0;
    while at < bytes.len() {
        let (dot, length) = match bytes[at] {
            b'\\' => return true,
            b'%' => match encoded(at) {
                Some([b'2', b'f'] | [b'5', b'c'] | [b'0', b'0']) => return true,
                Some([b'2', b'e']) => (true, 3),
                Some(_) | None => (false, 1),
            },
            b'.' => (true, 1),
            b'/' => {
                if matches!(dots, Some(1 | 2)) {
                    return true;
                }
                dots = Some(0);
                at += 1;
                continue;
            }
            _ => (false, 1),
        };
        dots = if dot { dots.map(|n| n.saturating_add(1)) } else { None };
        at += length;
    }
    matches!(dots, Some(1 | 2))
}

/// Returns true for addresses that no client may make the proxy connect to: link-local addresses, where clouds have
/// their metadata service, unspecified and multicast addresses, and `fd00::/16`.
pub fn is_refused(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_unspecified() || v4.is_multicast(),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => is_refused(IpAddr::V4(v4)),
            None => {
                v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast() || v6.segments()[0] == 0xfd00
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ambiguous_request_targets_are_detected() {
        for bad in ["/a/../b", "/./a", "/a/%2E%2e/b", "/a%2fb", "/a%00", "/a\\b", "/.."] {
            assert!(is_ambiguous(bad), "{bad}");
        }
        for good in ["/", "/a.json", "/a..b", "/a%20b", "/.well-known/x"] {
            assert!(!is_ambiguous(good), "{good}");
        }
    }

    #[test]
    fn metadata_link_local_and_unspecified_addresses_are_refused() {
        for bad in ["169.254.169.254", "fe80::1", "fd00:ec2::254", "::ffff:169.254.169.254", "0.0.0.0"] {
            assert!(is_refused(bad.parse().expect("an address")), "{bad}");
        }
        assert!(!is_refused("127.0.0.1".parse().expect("an address")));
    }
}
