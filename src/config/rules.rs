//! Compilation of a rule of the file to [`Rule`]s, one for each of its paths.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use toml::Spanned;

use super::error::{ConfigError, ConfigFault, Source};
use super::file;
use super::values::{OneOrMany, OptionalDuration};
use crate::policy::invalidation::tag::TagTemplate;
use crate::policy::outcome::Failure;
use crate::policy::routing::cache_key::{KeySpec, Partition, QueryFilter};
use crate::policy::routing::key_headers::KeyHeaders;
use crate::policy::routing::pattern::{Glob, PathPattern};
use crate::policy::routing::rule::{CacheMode, Conditions, FallbackPayload, Methods, Rule};

/// The maximum size of a fallback file: 8 MiB.
const MAX_PAYLOAD: u64 = 8 << 20;

/// The context that a rule is compiled in.
pub(super) struct RuleContext<'a> {
    pub(super) source: Source<'a>,
    /// Paths in the file are relative to this folder.
    pub(super) folder: &'a Path,
    pub(super) upstream: &'a str,
    pub(super) classes: &'a dyn Fn(&str) -> Option<Duration>,
    pub(super) partition: Partition,
    pub(super) credentials: Arc<[HeaderName]>,
    pub(super) deadline: Duration,
    /// Whether requests are sent to the upstream over HTTP/2.
    pub(super) http2: bool,
}

type ConfigErrors = Vec<ConfigError>;

/// Returns `rule`, with settings that it leaves out taken from `defaults`.
pub(super) fn inherit(rule: file::Rule, defaults: &file::Rule) -> file::Rule {
    let file::Rule {
        name,
        path,
        methods,
        when,
        cache,
        ttl,
        stale_while_revalidate,
        stale_if_error,
        last_known_good,
        negative_ttl,
        refresh_ahead,
        key,
        tags,
        reject_empty,
        volatile,
        deadline,
        fallback,
        upgrade,
        set_cookie,
    } = rule;
    // A rule that sets `http` or `off` itself does not inherit a ttl.
    let own_mode = cache.as_ref().is_some_and(|c| c.get_ref() != "override");
    file::Rule {
        name,
        path,
        methods: methods.or_else(|| defaults.methods.clone()),
        when: when.or_else(|| defaults.when.clone()),
        // A rule that sets a ttl itself does not inherit a mode that contradicts it.
        cache: if ttl.is_some() { cache } else { cache.or_else(|| defaults.cache.clone()) },
        ttl: if own_mode { ttl } else { ttl.or_else(|| defaults.ttl.clone()) },
        stale_while_revalidate: stale_while_revalidate.or(defaults.stale_while_revalidate),
        stale_if_error: stale_if_error.or(defaults.stale_if_error),
        last_known_good: last_known_good.or(defaults.last_known_good),
        negative_ttl: negative_ttl.or(defaults.negative_ttl),
        refresh_ahead: refresh_ahead.or(defaults.refresh_ahead),
        key: key.or_else(|| defaults.key.clone()),
        tags: tags.or_else(|| defaults.tags.clone()),
        reject_empty: reject_empty.or_else(|| defaults.reject_empty.clone()),
        volatile: volatile.or_else(|| defaults.volatile.clone()),
        deadline: deadline.or(defaults.deadline),
        fallback: fallback.or_else(|| defaults.fallback.clone()),
        upgrade: upgrade.or_else(|| defaults.upgrade.clone()),
        set_cookie: set_cookie.or_else(|| defaults.set_cookie.clone()),
    }
}

impl RuleContext<'_> {
    /// Compiles a rule. On failure, adds its faults to `errors` and returns no rules.
    pub(super) fn compile(
        &self,
        rule: &Spanned<file::Rule>,
        defaults: &file::Rule,
        errors: &mut ConfigErrors,
    ) -> Vec<Rule> {
        let span = rule.span();
        let rule = inherit(rule.get_ref().clone(), defaults);
        let before = errors.len();
        let paths = self.paths(&rule, &span, errors);
        let mode = self.collect(self.mode(&rule), errors).unwrap_or(CacheMode::Http);
        let methods = self.collect(read_methods(&rule, mode), errors).unwrap_or_else(Methods::safe);
        let when = self.collect(read_when(&rule), errors).unwrap_or_default();
        let key = self.collect(self.key(&rule, mode), errors).unwrap_or_default();
        let fallback = self.collect(self.fallback(&rule), errors).flatten();
        let reject_empty = self.collect(read_reject_empty(&rule), errors).flatten();
        let volatile = self.collect(read_volatile(&rule), errors).unwrap_or_default();
        let upgrade = self.collect(self.upgrade(&rule), errors).unwrap_or_default();
        let keeps_cookies = self.collect(read_set_cookie(&rule), errors).unwrap_or_default();
        let tags = self.tags(&rule, &paths, errors);
        if errors.len() > before {
            return Vec::new();
        }
        let window = |w: Option<OptionalDuration>| w.and_then(|w| w.0);
        let name = |path: &PathPattern| -> Arc<str> {
            match &rule.name {
                Some(name) => name.get_ref().as_str().into(),
                None => format!("{}{path}", self.upstream).into(),
            }
        };
        let build_rule = |(path, tags): (PathPattern, Vec<TagTemplate>)| Rule {
            name: name(&path),
            methods: methods.clone(),
            when: when.clone(),
            mode,
            stale_while_revalidate: window(rule.stale_while_revalidate),
            stale_if_error: window(rule.stale_if_error),
            last_known_good: window(rule.last_known_good),
            refresh_ahead: window(rule.refresh_ahead),
            // Entries that another configuration stored under other tags or by another key are not found.
            key: KeySpec { rule: key.rule_digest(&name(&path), &tags), ..key.clone() },
            tags,
            reject_empty: reject_empty.clone(),
            volatile: volatile.clone(),
            deadline: rule.deadline.map_or(self.deadline, |d| d.0),
            fallback: fallback.clone(),
            upgrade: upgrade.clone(),
            stores_set_cookie: keeps_cookies,
            counters: Arc::default(),
            path,
        };
        paths.into_iter().zip(tags).map(build_rule).collect()
    }

    fn collect<T>(&self, result: Result<T, ConfigFault>, errors: &mut ConfigErrors) -> Option<T> {
        result.map_err(|(span, message)| errors.push(self.source.error(&span, message))).ok()
    }

    fn paths(&self, rule: &file::Rule, span: &Range<usize>, errors: &mut ConfigErrors) -> Vec<PathPattern> {
        let Some(path) = &rule.path else {
            errors.push(self.source.error(span, "a rule needs a path: write path = \"/products/{id}.json\""));
            return Vec::new();
        };
        let OneOrMany(paths) = path.get_ref();
        let parse = |text: &String| PathPattern::parse(text).map_err(|message| (path.span(), message));
        paths.iter().filter_map(|text| self.collect(parse(text), errors)).collect()
    }

    fn mode(&self, rule: &file::Rule) -> Result<CacheMode, ConfigFault> {
        let text = rule.cache.as_ref().map(|c| c.get_ref().as_str());
        match (text, &rule.ttl) {
            (None | Some("override"), Some(ttl)) => {
                let negative_ttl = rule.negative_ttl.and_then(|w| w.0);
                Ok(CacheMode::Override { ttl: self.ttl(ttl)?, negative_ttl })
            }
            (Some("override"), None) => {
                let span = rule.cache.as_ref().map_or(0..0, Spanned::span);
                Err((span, "cache = \"override\" needs a ttl: write ttl = \"5m\" beside it".into()))
            }
            (Some(text @ ("http" | "off")), Some(ttl)) => Err((
                ttl.span(),
                format!("a ttl has no meaning with cache = \"{text}\": leave it out, or write cache = \"override\""),
            )),
            (None | Some("http"), None) => Ok(CacheMode::Http),
            (Some("off"), None) => Ok(CacheMode::Off),
            (Some(other), _) => {
                let span = rule.cache.as_ref().map_or(0..0, Spanned::span);
                Err((span, format!("cache = {other:?}: write \"http\", \"override\" or \"off\"")))
            }
        }
    }

    fn ttl(&self, text: &Spanned<String>) -> Result<Duration, ConfigFault> {
        if let Some(class) = (self.classes)(text.get_ref()) {
            return Ok(class);
        }
        super::parse_duration(text.get_ref()).map_err(|message| {
            let named = text.get_ref().bytes().next().is_some_and(|b| b.is_ascii_alphabetic());
            let message = if named {
                format!("no class {:?} in [ttl]: define it there, or write a duration like \"5m\"", text.get_ref())
            } else {
                message
            };
            (text.span(), message)
        })
    }

    fn key(&self, rule: &file::Rule, mode: CacheMode) -> Result<KeySpec, ConfigFault> {
        let key = rule.key.clone().unwrap_or_default();
        let query = match key.query {
            None => QueryFilter::Whole,
            Some(list) if list == ["*"] => QueryFilter::Whole,
            Some(list) => {
                let pattern = |p: &String| match p.strip_prefix('!') {
                    Some(excluded) => (false, Glob::new(excluded)),
                    None => (true, Glob::new(p)),
                };
                let mut patterns: Vec<_> = list.iter().map(pattern).collect();
                // A list that only has exclusions excludes from all parameters.
                if patterns.iter().all(|(keep, _)| !keep) {
                    patterns.insert(0, (true, Glob::new("*")));
                }
                QueryFilter::Filtered(patterns)
            }
        };
        let names = |list: &[Spanned<String>]| list.iter().map(header_name).collect::<Result<Vec<_>, _>>();
        let headers = match (key.headers, key.ignore_headers, mode) {
            (Some(_), Some(ignored), _) => {
                return Err((ignored.span(), "key.headers is the whole list: leave ignore_headers out".into()));
            }
            (Some(listed), None, _) => KeyHeaders::Listed(names(&listed)?),
            (None, ignored, CacheMode::Override { .. }) => {
                KeyHeaders::AllBut(ignored.map_or(Ok(Vec::new()), |ignored| names(ignored.get_ref()))?)
            }
            (None, Some(ignored), CacheMode::Http | CacheMode::Off) => {
                let message =
                    "key.ignore_headers needs cache = \"override\": under \"http\", Vary of the response decides";
                return Err((ignored.span(), message.into()));
            }
            (None, None, CacheMode::Http | CacheMode::Off) => KeyHeaders::default(),
        };
        Ok(KeySpec {
            // Set by `compile`, where the rule's name is known.
            rule: [0; 4],
            query,
            headers,
            partition: key.partition.as_ref().map_or(Ok(self.partition), partition)?,
            credentials: self.credentials.clone(),
        })
    }

    fn tags(&self, rule: &file::Rule, paths: &[PathPattern], errors: &mut ConfigErrors) -> Vec<Vec<TagTemplate>> {
        let Some(tags) = &rule.tags else { return vec![Vec::new(); paths.len()] };
        // With several paths, a tag applies to those that capture its names; at least one must.
        for text in tags.get_ref() {
            let mut parsed = paths.iter().map(|path| TagTemplate::parse(text, path));
            if let Some(Err(message)) = parsed.next()
                && !parsed.any(|other| other.is_ok())
            {
                errors.push(self.source.error(&tags.span(), message));
            }
        }
        let of =
            |path: &PathPattern| tags.get_ref().iter().filter_map(|t| TagTemplate::parse(t, path).ok()).collect();
        paths.iter().map(of).collect()
    }

    fn fallback(&self, rule: &file::Rule) -> Result<Option<FallbackPayload>, ConfigFault> {
        let Some(spanned) = &rule.fallback else { return Ok(None) };
        let fallback = spanned.get_ref();
        let body = match (&fallback.file, &fallback.body) {
            (Some(file), None) => self.payload(file)?,
            (None, Some(body)) => Bytes::from(body.clone()),
            (Some(_), Some(_)) => return Err((spanned.span(), "a fallback has a file or a body, not both".into())),
            (None, None) => {
                return Err((spanned.span(), "a fallback needs a file = \"…\" or a body = \"…\"".into()));
            }
        };
        let status = fallback.status.as_ref().map_or(Ok(StatusCode::OK), |status| {
            StatusCode::from_u16(*status.get_ref())
                .ok()
                .filter(|s| !s.is_informational())
                .ok_or_else(|| (status.span(), format!("{} is no status: write 200 to 599", status.get_ref())))
        })?;
        let content_type = fallback.content_type.as_ref().map_or_else(
            || Ok(HeaderValue::from_static("application/json")),
            |text| HeaderValue::from_str(text.get_ref()).map_err(|e| (text.span(), e.to_string())),
        )?;
        let on = match &fallback.on {
            None => Failure::CAUSES.to_vec(),
            Some(list) => list.get_ref().iter().map(|name| fallback_cause(name, list)).collect::<Result<_, _>>()?,
        };
        Ok(Some(FallbackPayload { body, status, content_type, on }))
    }

    fn upgrade(&self, rule: &file::Rule) -> Result<Vec<Box<str>>, ConfigFault> {
        let Some(list) = &rule.upgrade else { return Ok(Vec::new()) };
        if self.http2 {
            let message = "over HTTP/2 to the upstream there is no Upgrade: leave out http2 = true, or this";
            return Err((list.span(), message.into()));
        }
        Ok(list.get_ref().iter().map(|protocol| protocol.as_str().into()).collect())
    }

    fn payload(&self, file: &Spanned<String>) -> Result<Bytes, ConfigFault> {
        let path = self.folder.join(file.get_ref());
        let fail = |why: String| (file.span(), format!("fallback file {}: {why}", path.display()));
        let size = fs::metadata(&path).map_err(|e| fail(e.to_string()))?.len();
        if size > MAX_PAYLOAD {
            return Err(fail(format!("{size} bytes, more than the maximum of {MAX_PAYLOAD}")));
        }
        fs::read(&path).map(Bytes::from).map_err(|e| fail(e.to_string()))
    }
}

fn read_methods(rule: &file::Rule, mode: CacheMode) -> Result<Methods, ConfigFault> {
    let Some(methods) = &rule.methods else { return Ok(Methods::safe()) };
    let parse = |name: &String| Method::from_bytes(name.as_bytes()).map_err(|e| (methods.span(), e.to_string()));
    let parsed = methods.get_ref().iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    if mode != CacheMode::Off && parsed.iter().any(|m| *m != Method::GET && *m != Method::HEAD) {
        let message = "only GET and HEAD can be cached: leave the others out, or write cache = \"off\"";
        return Err((methods.span(), message.into()));
    }
    Ok(Methods(parsed))
}

fn read_when(rule: &file::Rule) -> Result<Conditions, ConfigFault> {
    let Some(when) = &rule.when else { return Ok(Conditions::default()) };
    if let Some(graphql) = &when.graphql {
        return Err((graphql.span(), "when.graphql is not built yet: remove it".into()));
    }
    let header = |(name, glob): (&Spanned<String>, &String)| header_name(name).map(|name| (name, Glob::new(glob)));
    Ok(Conditions {
        query: when.query.iter().map(|(name, glob)| (name.as_str().into(), Glob::new(glob))).collect(),
        headers: when.headers.iter().map(header).collect::<Result<_, _>>()?,
    })
}

fn read_set_cookie(rule: &file::Rule) -> Result<bool, ConfigFault> {
    let Some(text) = &rule.set_cookie else { return Ok(false) };
    match text.get_ref().as_str() {
        "store" => Ok(true),
        "remove" => Ok(false),
        other => Err((text.span(), format!("set_cookie = {other:?}: write \"store\" or \"remove\""))),
    }
}

fn read_reject_empty(rule: &file::Rule) -> Result<Option<Box<str>>, ConfigFault> {
    let Some(pointer) = &rule.reject_empty else { return Ok(None) };
    json_pointer("reject_empty", pointer.get_ref(), &pointer.span()).map(Some)
}

fn read_volatile(rule: &file::Rule) -> Result<Vec<Box<str>>, ConfigFault> {
    let Some(pointers) = &rule.volatile else { return Ok(Vec::new()) };
    pointers.get_ref().iter().map(|pointer| json_pointer("volatile", pointer, &pointers.span())).collect()
}

fn json_pointer(setting: &str, pointer: &str, span: &Range<usize>) -> Result<Box<str>, ConfigFault> {
    if pointer.starts_with('/') || pointer.is_empty() {
        return Ok(pointer.into());
    }
    Err((span.clone(), format!("{setting} is a JSON pointer: write \"/{pointer}\"")))
}

fn fallback_cause(name: &str, list: &Spanned<Vec<String>>) -> Result<&'static str, ConfigFault> {
    let known = Failure::CAUSES.into_iter().find(|fallback_cause| *fallback_cause == name);
    known.ok_or_else(|| (list.span(), format!("on = {name:?}: write some of {:?}", Failure::CAUSES)))
}

pub(super) fn header_name(name: &Spanned<String>) -> Result<HeaderName, ConfigFault> {
    HeaderName::from_bytes(name.get_ref().as_bytes())
        .map_err(|_| (name.span(), format!("{:?} is no header name", name.get_ref())))
}

pub(super) fn partition(text: &Spanned<String>) -> Result<Partition, ConfigFault> {
    match text.get_ref().as_str() {
        "credential" => Ok(Partition::Credential),
        "everyone" => Ok(Partition::Everyone),
        "app" => Err((text.span(), "partition = \"app\" is not built yet: write \"credential\"".into())),
        other => Err((text.span(), format!("partition = {other:?}: write \"credential\" or \"everyone\""))),
    }
}
