//! Compiled rules: all settings that apply to a kind of request, resolved once at start.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Method, StatusCode};

use super::cache_key::KeySpec;
use super::pattern::{Glob, PathPattern};
use super::target::parameters;
use crate::policy::invalidation::tag::TagTemplate;
use crate::policy::outcome::Failure;
use crate::policy::outcome_counters::OutcomeCounters;

/// A compiled rule.
#[derive(Debug)]
pub struct Rule {
    /// The name: a label in metrics and in `explain`.
    pub name: Arc<str>,
    /// The methods that the rule matches.
    pub methods: Methods,
    /// The paths that the rule matches.
    pub path: PathPattern,
    /// Further conditions.
    pub when: Conditions,
    /// What decides whether a response is stored, and for how long.
    pub mode: CacheMode,
    /// How long a stale response may be served during revalidation. Under `http`, used if the response does not say.
    pub stale_while_revalidate: Option<Duration>,
    /// How long a stale response may be served if the fetch fails. Under `http`, used if the response does not say.
    pub stale_if_error: Option<Duration>,
    /// How long a response is kept to be served when all else fails, before the fallback payload.
    pub last_known_good: Option<Duration>,
    /// A hit on an entry with less than this freshness left refreshes the entry before it expires.
    pub refresh_ahead: Option<Duration>,
    /// The components of the cache key.
    pub key: KeySpec,
    /// Templates of the tags of stored responses.
    pub tags: Vec<TagTemplate>,
    /// JSON pointer (RFC 6901) to a list that must not be empty.
    pub reject_empty: Option<Box<str>>,
    /// JSON pointers to members that may differ between equivalent responses; `*` is any one member. For shadow mode.
    pub volatile: Vec<Box<str>>,
    /// How long a client waits for the response head before a stale or fallback response is served.
    pub deadline: Duration,
    /// The fallback payload, used when there is no other response.
    pub fallback: Option<FallbackPayload>,
    /// Protocols that a client may request with `Upgrade`: `websocket`.
    pub upgrade: Vec<Box<str>>,
    /// Whether `Set-Cookie` is stored with a response and sent with every hit.
    pub stores_set_cookie: bool,
    /// Counters of the outcomes of matching requests.
    pub counters: Arc<OutcomeCounters>,
}

/// What decides whether a response is stored, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// The upstream's header fields (RFC 9111).
    Http,
    /// The operator's settings.
    Override {
        /// How long 200, 203, 204, 301 and 308 stay fresh.
        ttl: Duration,
        /// How long 404 and 410 stay fresh; `None`: they are not stored.
        negative_ttl: Option<Duration>,
    },
    /// Nothing is stored: requests pass through.
    Off,
}

/// A set of methods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Methods(pub Vec<Method>);

impl Methods {
    /// GET and HEAD.
    pub fn safe() -> Methods {
        Methods(vec![Method::GET, Method::HEAD])
    }

    fn contains(&self, method: &Method) -> bool {
        self.0.contains(method)
    }
}

/// Conditions in addition to method and path; all must hold.
#[derive(Debug, Clone, Default)]
pub struct Conditions {
    /// Query parameter (raw name) → glob of its raw value. Any occurrence may match.
    pub query: Vec<(Box<str>, Glob)>,
    /// Header field → glob of its value. Any line may match.
    pub headers: Vec<(HeaderName, Glob)>,
}

impl Conditions {
    fn are_met(&self, query: Option<&str>, headers: &HeaderMap) -> bool {
        let parameter = |name: &str, glob: &Glob| {
            parameters(query).any(|(n, v)| n == name && glob.matches(v.unwrap_or_default().as_bytes()))
        };
        self.query.iter().all(|(name, glob)| parameter(name, glob))
            && self
                .headers
                .iter()
                .all(|(name, glob)| headers.get_all(name).iter().any(|value| glob.matches(value.as_bytes())))
    }
}

/// A configured response, used when there is no other.
#[derive(Debug, Clone)]
pub struct FallbackPayload {
    /// The body, read at start.
    pub body: Bytes,
    /// The status.
    pub status: StatusCode,
    /// The Content-Type.
    pub content_type: HeaderValue,
    /// The causes that it is used for, of [`Failure::CAUSES`].
    pub on: Vec<&'static str>,
}

impl FallbackPayload {
    /// Returns true if the payload is used for this failure.
    pub fn covers(&self, failure: Failure) -> bool {
        self.on.contains(&failure.cause())
    }
}

/// The request header fields that every response under `override` depends on.
const USUAL_VARY: [HeaderName; 1] = [http::header::ACCEPT_ENCODING];

impl Rule {
    /// Returns true if a request asks for an upgrade to a protocol that this rule allows.
    pub fn allows_upgrade(&self, headers: &HeaderMap) -> bool {
        !self.upgrade.is_empty()
            && headers.get(UPGRADE).is_some_and(|requested| {
                self.upgrade.iter().any(|protocol| requested.as_bytes().eq_ignore_ascii_case(protocol.as_bytes()))
            })
    }

    /// Returns the request header fields that responses under this rule depend on, as far as the rule alone tells.
    pub fn expected_vary(&self) -> &'static [HeaderName] {
        match self.mode {
            CacheMode::Override { .. } => &USUAL_VARY,
            CacheMode::Http | CacheMode::Off => &[],
        }
    }

    /// Returns the windows that are set (stale windows and `refresh_ahead`), with the names of their settings.
    pub fn windows(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        let windows = [
            ("stale_while_revalidate", self.stale_while_revalidate),
            ("stale_if_error", self.stale_if_error),
            ("last_known_good", self.last_known_good),
            ("refresh_ahead", self.refresh_ahead),
        ];
        windows.into_iter().filter_map(|(name, window)| Some((name, window?)))
    }

    /// Returns true if method, query and header fields match. The router matches the path.
    pub fn matches_request(&self, method: &Method, query: Option<&str>, headers: &HeaderMap) -> bool {
        self.methods.contains(method) && self.when.are_met(query, headers)
    }
}
