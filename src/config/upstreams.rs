//! Compilation of an `[[upstream]]` of the file to an [`UpstreamConfig`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use http::{HeaderName, Uri};
use serde::Deserialize;
use toml::Spanned;

use super::UpstreamConfig;
use super::error::{ConfigError, ConfigFault, Source};
use super::file;
use super::resilience;
use super::resilience::BudgetSpec;
use super::rules::{RuleContext, inherit, partition};
use super::validate::{Validator, address, from_flags};
use super::values::OneOrMany;
use crate::policy::resilience::retry::RetryPolicy;
use crate::policy::routing::cache_key::Partition;
use crate::policy::routing::origin::{HostPattern, Origin};
use crate::policy::routing::pattern::Glob;
use crate::policy::routing::router::Router;
use crate::policy::routing::rule::Rule;
use crate::tls::{ClientTls, ServerTls};
use crate::upstream::Timeouts;

/// The profiles: name, rules as TOML, and the host suffix that selects the profile by default.
const PROFILES: [(&str, &str, Option<&str>); 2] =
    [("generic", "", None), ("shopify", include_str!("profiles/shopify.toml"), Some(".myshopify.com"))];

impl Validator<'_> {
    pub(super) fn upstream(
        &mut self,
        spanned: &Spanned<file::Upstream>,
        classes: &BTreeMap<String, Duration>,
        credentials: &Arc<[HeaderName]>,
        others: usize,
    ) -> Option<UpstreamConfig> {
        let given = spanned.get_ref();
        self.note_unbuilt(given);
        let origin = self.origin(spanned);
        let (profile, profile_text) = self.profile(given);
        let fallback_name = if profile == "generic" { "upstream" } else { profile };
        let name: Arc<str> = given.name.as_ref().map_or(fallback_name, |n| n.get_ref().as_str()).into();
        let listen = self.listen(given, others);
        let value = given.partition.as_ref().map_or(Ok(Partition::default()), partition);
        let (partition, folder) = (self.collect(value).unwrap_or_default(), self.folder.clone());
        let class = |name: &str| classes.get(name).copied();
        let surroundings = |source| RuleContext {
            source,
            folder: &folder,
            upstream: &name,
            classes: &class,
            partition,
            credentials: credentials.clone(),
            deadline: given.timeouts.deadline.map_or(Duration::from_secs(5), |d| d.0),
            http2: given.http2,
        };
        let own = surroundings(self.source);
        self.refuse_in_defaults(&given.defaults);
        let mut defaults = given.defaults.clone();
        let ttl_rule = match (&given.ttl_flag, profile) {
            (Some(ttl), "generic") => Some(rule_for_all("all", Some(ttl.clone()))),
            (ttl, _) => {
                defaults.ttl = ttl.clone().or(defaults.ttl);
                None
            }
        };
        let own_rules = given.rule.iter().chain(&ttl_rule);
        let mut rules = own_rules.clone().count();
        let mut plans: Vec<Rule> =
            own_rules.flat_map(|rule| own.compile(rule, &given.defaults, &mut self.errors)).collect();
        let own_plans = plans.len();
        if given.profile_rules != Some(false) {
            let source = Source { name: profile, text: profile_text };
            let (count, compiled) = profile_rules(&surroundings(source), &defaults, &mut self.errors);
            rules += count;
            plans.extend(compiled);
        }
        // The upstream's header fields decide for requests that no other rule matches.
        plans.extend(own.compile(&rule_for_all("default", None), &file::Rule::default(), &mut self.errors));
        let router = Router::new(plans.into_iter().map(Arc::new).collect());
        let (timeouts, retry) = (timeouts(&given.timeouts), retry(&given.retry));
        let backoff = resilience::backoff(&given.backoff);
        let (tls, http2) = (self.tls(&given.tls), given.http2);
        let listen_tls = self.listen_tls(&given.listen_tls);
        let budget = self.collect(resilience::budget(given.budget.as_ref())).flatten();
        let (breaker, pool) = (resilience::breaker(&given.breaker), resilience::pool(&given.pool));
        let (listen, origin) = (listen?, origin?);
        Some(UpstreamConfig {
            name,
            listen,
            origin,
            profile,
            router,
            own_plans,
            rules,
            timeouts,
            retry,
            adds_via: given.via,
            backoff,
            tls,
            listen_tls,
            http2,
            budget,
            breaker,
            pool,
        })
    }

    fn refuse_in_defaults(&mut self, defaults: &file::Rule) {
        let name = defaults.name.as_ref().map(|name| ("name", name.span()));
        let path = defaults.path.as_ref().map(|path| ("path", path.span()));
        for (key, span) in name.into_iter().chain(path) {
            self.fault(&span, format!("{key} belongs to a rule, not to [upstream.defaults]"));
        }
    }

    fn note_unbuilt(&mut self, given: &file::Upstream) {
        let learns = given.budget.as_ref().is_none_or(|b| matches!(b.get_ref(), BudgetSpec::Word(w) if w == "learn"));
        let note =
            "not in this version: budget = \"learn\" obeys Retry-After, but does not learn the pace".to_owned();
        if learns && !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn origin(&mut self, spanned: &Spanned<file::Upstream>) -> Option<Origin> {
        let given = spanned.get_ref();
        match (&given.url, &given.hosts) {
            (Some(_), Some(_)) => {
                self.fault(&spanned.span(), "an upstream has a url or hosts, not both");
                None
            }
            (None, None) => {
                self.fault(&spanned.span(), "an upstream needs a url: write url = \"https://your-api.example\"");
                None
            }
            (None, Some(hosts)) => {
                let patterns = hosts.iter().filter_map(|text| self.collect(host_pattern(text))).collect();
                Some(Origin::Hosts(patterns))
            }
            (Some(url), None) => {
                let preserve_host = match given.host.as_ref().map(|h| (h.get_ref().as_str(), h.span())) {
                    None | Some(("rewrite", _)) => false,
                    Some(("preserve", _)) => true,
                    Some((other, span)) => {
                        self.fault(&span, format!("host = {other:?}: write \"preserve\" or \"rewrite\""));
                        false
                    }
                };
                if let (true, true, Some(host)) = (preserve_host, given.http2, &given.host) {
                    let message = "over HTTP/2 the Host is the one connected to: leave out http2 = true, or this";
                    self.fault(&host.span(), message);
                }
                self.collect(parse_origin(url, preserve_host))
            }
        }
    }

    /// Returns the profile's name and rules: the profile that the file names, or the one that the host selects.
    fn profile(&mut self, given: &file::Upstream) -> (&'static str, &'static str) {
        if let Some(value) = &given.profile {
            if let Some((name, text, _)) = PROFILES.iter().find(|(name, ..)| name == value.get_ref()) {
                return (name, text);
            }
            let known: Vec<_> = PROFILES.iter().map(|(name, ..)| *name).collect();
            self.fault(&value.span(), format!("profile = {:?}: write one of {known:?}", value.get_ref()));
        }
        let named: Vec<String> = match (&given.url, &given.hosts) {
            (Some(url), _) => {
                url.get_ref().parse::<Uri>().ok().and_then(|u| u.host().map(str::to_owned)).into_iter().collect()
            }
            (None, hosts) => {
                let host =
                    |text: &str| text.rsplit("://").next().unwrap_or_default().split(':').next().map(str::to_owned);
                hosts.iter().flatten().filter_map(|h| host(h.get_ref())).collect()
            }
        };
        let chosen = PROFILES.iter().find(|(_, _, suffix)| {
            suffix.is_some_and(|suffix| {
                !named.is_empty() && named.iter().all(|host| host.to_ascii_lowercase().ends_with(suffix))
            })
        });
        chosen.map_or((PROFILES[0].0, PROFILES[0].1), |(name, text, _)| (name, text))
    }

    /// Returns the listen address. The default port is 18080 for the first upstream, then 18180, 18280 and so on.
    fn listen(&mut self, given: &file::Upstream, others: usize) -> Option<SocketAddr> {
        if let Some(text) = &given.listen {
            return self.collect(address(text));
        }
        let port = 18080 + 100 * u16::try_from(others).unwrap_or(0);
        Some(SocketAddr::from(([127, 0, 0, 1], port)))
    }

    pub(super) fn tls(&mut self, given: &file::Tls) -> ClientTls {
        let identity = match (&given.cert, &given.key) {
            (Some(cert), Some(key)) => Some((self.folder.join(cert.get_ref()), self.folder.join(key.get_ref()))),
            (None, None) => None,
            (Some(one), None) | (None, Some(one)) => {
                self.fault(&one.span(), "a client certificate needs both: cert = \"…\" and key = \"…\"");
                None
            }
        };
        let ca = given.ca.as_ref().map(|ca| self.readable("tls.ca", ca));
        ClientTls { ca, identity }
    }

    fn listen_tls(&mut self, given: &file::ListenTls) -> Option<ServerTls> {
        let file::ListenTls { cert, key, client_ca } = given;
        match (cert, key, client_ca) {
            (Some(cert), Some(key), _) => {
                let client_ca = client_ca.as_ref().map(|ca| self.readable("listen_tls.client_ca", ca));
                let (cert, key) = (self.readable("listen_tls.cert", cert), self.readable("listen_tls.key", key));
                Some(ServerTls { cert, key, client_ca })
            }
            (None, None, None) => None,
            (Some(one), None, _) | (None, Some(one), _) | (None, None, Some(one)) => {
                self.fault(&one.span(), "[upstream.listen_tls] needs both: cert = \"…\" and key = \"…\"");
                None
            }
        }
    }

    /// Resolves a path relative to the file's folder. Reports a fault if nothing exists there.
    fn readable(&mut self, what: &str, given: &Spanned<String>) -> PathBuf {
        let path = self.folder.join(given.get_ref());
        if let Err(why) = std::fs::metadata(&path) {
            self.fault(&given.span(), format!("{what} {}: {why}", path.display()));
        }
        path
    }
}

fn rule_for_all(name: &str, ttl: Option<Spanned<String>>) -> Spanned<file::Rule> {
    let path = Some(from_flags(OneOrMany(vec!["/**".to_owned()])));
    from_flags(file::Rule { name: Some(from_flags(name.to_owned())), path, ttl, ..file::Rule::default() })
}

/// Compiles a profile's rules, which inherit from the operator's defaults first, then from the profile's.
fn profile_rules(
    surroundings: &RuleContext<'_>,
    defaults: &file::Rule,
    errors: &mut Vec<ConfigError>,
) -> (usize, Vec<Rule>) {
    let parsed = toml::Deserializer::parse(surroundings.source.text).and_then(file::Profile::deserialize);
    match parsed {
        Ok(profile) => {
            let defaults = inherit(defaults.clone(), &profile.defaults);
            let compile = |rule: &_| surroundings.compile(rule, &defaults, errors);
            (profile.rule.len(), profile.rule.iter().flat_map(compile).collect())
        }
        Err(error) => {
            errors.push(surroundings.source.toml_error(&error));
            (0, Vec::new())
        }
    }
}

fn timeouts(given: &file::Timeouts) -> Timeouts {
    let seconds = Duration::from_secs;
    let fetch = given.fetch.map_or(seconds(120), |d| d.0);
    Timeouts {
        connect: given.connect.map_or(seconds(2), |d| d.0),
        first_byte: given.first_byte.map_or(fetch, |d| d.0),
        idle: given.idle.map_or(seconds(30), |d| d.0),
        fetch,
    }
}

fn retry(given: &file::Retry) -> RetryPolicy {
    RetryPolicy {
        attempts: given.attempts.unwrap_or(2).max(1),
        base: given.base.map_or(Duration::from_millis(50), |d| d.0),
        cap: given.cap.map_or(Duration::from_secs(1), |d| d.0),
    }
}

fn parse_origin(text: &Spanned<String>, preserve_host: bool) -> Result<Origin, ConfigFault> {
    let fail = |why: String| (text.span(), why);
    let written = text.get_ref().as_str();
    let uri: Uri = written.parse().map_err(|e| fail(format!("{written:?} is no URL: {e}")))?;
    let parts = uri.into_parts();
    let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
        return Err(fail(format!(
            "{written:?} has no scheme: write \"https://{}\"",
            written.trim_start_matches('/')
        )));
    };
    if scheme != Scheme::HTTP && scheme != Scheme::HTTPS {
        return Err(fail(format!("scheme {scheme:?}: write http:// or https://")));
    }
    if parts.path_and_query.is_some_and(|p| p.as_str() != "/") {
        return Err(fail(format!("an upstream is one origin, without a path: write \"{scheme}://{authority}\"")));
    }
    if authority.as_str().contains('@') {
        return Err(fail(
            super::error::NO_EXCERPT.to_owned() + "a URL does not carry credentials: the client's headers do",
        ));
    }
    Ok(Origin::Fixed { scheme, authority, preserve_host })
}

/// Parses a host pattern: `[scheme://]pattern[:port]`.
fn host_pattern(text: &Spanned<String>) -> Result<HostPattern, ConfigFault> {
    let written = text.get_ref().as_str();
    let (scheme, rest) = match written.split_once("://") {
        Some(("http", rest)) => (Scheme::HTTP, rest),
        Some(("https", rest)) => (Scheme::HTTPS, rest),
        None => (Scheme::HTTPS, written),
        Some((other, _)) => return Err((text.span(), format!("scheme {other:?}: write http:// or https://"))),
    };
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) => {
            let port = port.parse().map_err(|_| (text.span(), format!("{port:?} is no port")))?;
            (host, Some(port))
        }
        None => (rest, None),
    };
    if host.is_empty() || host.contains(['/', '@', ' ']) || host.split('.').any(str::is_empty) {
        return Err((text.span(), format!("{written:?} is no host pattern: write \"*.myshopify.com\"")));
    }
    let labels = host.to_ascii_lowercase().split('.').map(Glob::new).collect();
    Ok(HostPattern { scheme, labels, port })
}
