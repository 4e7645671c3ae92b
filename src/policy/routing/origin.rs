//! Origins of an upstream: one fixed origin, or the host patterns that clients may name.

use http::uri::{Authority, Scheme};

use super::pattern::Glob;

/// Where an upstream's requests are sent.
#[derive(Debug, Clone)]
pub enum Origin {
    /// One origin.
    Fixed {
        /// `http` or `https`.
        scheme: Scheme,
        /// Host and port.
        authority: Authority,
        /// Forward (and key) the client's Host rather than the authority.
        preserve_host: bool,
    },
    /// The client names the host, which must match one of these patterns.
    Hosts(Vec<HostPattern>),
}

impl Origin {
    /// Returns `scheme://authority`, or `hosts` for host patterns, where each request names the origin.
    pub fn to_text(&self) -> String {
        match self {
            Origin::Fixed { scheme, authority, .. } => format!("{scheme}://{authority}"),
            Origin::Hosts(_) => "hosts".to_owned(),
        }
    }
}

/// A host pattern: `[scheme://]pattern[:port]`.
#[derive(Debug, Clone)]
pub struct HostPattern {
    /// The scheme; `https` if the pattern has none.
    pub scheme: Scheme,
    /// One glob for each label.
    pub labels: Vec<Glob>,
    /// The port, if the pattern names one.
    pub port: Option<u16>,
}

impl HostPattern {
    /// Returns true if this authority (lower-case host, port if named) is allowed. `*` matches within one label.
    pub fn matches(&self, host: &str, port: Option<u16>) -> bool {
        let default = if self.scheme == Scheme::HTTPS { 443 } else { 80 };
        let labels: Vec<&str> = host.split('.').collect();
        port.unwrap_or(default) == self.port.unwrap_or(default)
            && labels.len() == self.labels.len()
            && self.labels.iter().zip(labels).all(|(glob, label)| !label.is_empty() && glob.matches(label.as_bytes()))
    }
}
