//! A rule, compiled: everything the pipeline needs to know about a kind of request, decided once at start.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Method, StatusCode};

use super::glob::{Glob, PathPattern};
use super::key::KeyPlan;
use super::outcome::Failure;
use super::tags::TagTemplate;
use super::tally::Tally;
use super::target::parameters;

/// One rule.
#[derive(Debug)]
pub struct Plan {
    /// Its name: a label in metrics and `explain`.
    pub name: Arc<str>,
    /// Which methods it is for.
    pub methods: Methods,
    /// Which paths it is for.
    pub path: PathPattern,
    /// What else must hold.
    pub when: When,
    /// Who decides what is stored, and for how long.
    pub mode: CacheMode,
    /// Serve stale for so long while refreshing. Under `http`, where the answer does not say.
    pub stale_while_revalidate: Option<Duration>,
    /// Serve stale for so long when the fetch fails. Under `http`, where the answer does not say.
    pub stale_if_error: Option<Duration>,
    /// Keep so long for the ladder's last rung before the payload.
    pub last_known_good: Option<Duration>,
    /// A hit on what has less than this left has it refreshed before it expires.
    pub refresh_ahead: Option<Duration>,
    /// What the key is made of.
    pub key: KeyPlan,
    /// Templates of the tags of what is stored.
    pub tags: Vec<TagTemplate>,
    /// JSON pointer (RFC 6901) to a list that must not be empty.
    pub reject_empty: Option<Box<str>>,
    /// JSON pointers to what differs between two answers that say the same; `*` is any one member. For rehearsals.
    pub volatile: Vec<Box<str>>,
    /// How long a client waits for the response head before the ladder.
    pub deadline: Duration,
    /// The ladder's payload.
    pub fallback: Option<Payload>,
    /// Other protocols that may be asked for: `websocket`.
    pub upgrade: Vec<Box<str>>,
    /// `Set-Cookie` is stored with an answer, and sent with every hit.
    pub keeps_cookies: bool,
    /// What became of the requests it matched.
    pub tally: Arc<Tally>,
}

/// Who decides whether an answer is stored and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// The upstream's headers: RFC 9111.
    Http,
    /// The operator.
    Override {
        /// How long 200, 203, 204, 301 and 308 stay fresh.
        ttl: Duration,
        /// How long 404 and 410 stay fresh; none: they are not stored.
        negative_ttl: Option<Duration>,
    },
    /// Nobody: pass through.
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

/// Conditions beside method and path; all must hold.
#[derive(Debug, Clone, Default)]
pub struct When {
    /// Query parameter (raw name) → glob of its raw value. Any occurrence may match.
    pub query: Vec<(Box<str>, Glob)>,
    /// Header → glob of its value. Any line may match.
    pub headers: Vec<(HeaderName, Glob)>,
}

impl When {
    fn holds(&self, query: Option<&str>, headers: &HeaderMap) -> bool {
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

/// A configured answer for when there is no other.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Its bytes, read at start.
    pub body: Bytes,
    /// Its status.
    pub status: StatusCode,
    /// Its Content-Type.
    pub content_type: HeaderValue,
    /// The causes it answers, of [`Failure::CAUSES`].
    pub on: Vec<&'static str>,
}

impl Payload {
    /// Is it meant for this failure?
    pub fn covers(&self, failure: Failure) -> bool {
        self.on.contains(&failure.cause())
    }
}

/// Under `override` every answer depends on this.
const USUAL_VARY: [HeaderName; 1] = [http::header::ACCEPT_ENCODING];

impl Plan {
    /// Does a request ask for another protocol, one that this rule allows?
    pub fn upgrades(&self, headers: &HeaderMap) -> bool {
        !self.upgrade.is_empty()
            && headers.get(UPGRADE).is_some_and(|asked| {
                self.upgrade.iter().any(|protocol| asked.as_bytes().eq_ignore_ascii_case(protocol.as_bytes()))
            })
    }

    /// The request headers that answers under this rule depend on, as far as the rule alone tells.
    pub fn usual_vary(&self) -> &'static [HeaderName] {
        match self.mode {
            CacheMode::Override { .. } => &USUAL_VARY,
            CacheMode::Http | CacheMode::Off => &[],
        }
    }

    /// Its windows beyond freshness, by the names of their settings: those that are open.
    pub fn windows(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        let windows = [
            ("stale_while_revalidate", self.stale_while_revalidate),
            ("stale_if_error", self.stale_if_error),
            ("last_known_good", self.last_known_good),
            ("refresh_ahead", self.refresh_ahead),
        ];
        windows.into_iter().filter_map(|(name, window)| Some((name, window?)))
    }

    /// Do method, query and headers fit? (The path is the router's business.)
    pub fn accepts(&self, method: &Method, query: Option<&str>, headers: &HeaderMap) -> bool {
        self.methods.contains(method) && self.when.holds(query, headers)
    }
}
