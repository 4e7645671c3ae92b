//! Validation: combines file, environment and flags to a [`Config`], or returns all errors at once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use serde::Deserialize;
use toml::Spanned;
use toml::de::DeTable;

use super::error::{ConfigError, ConfigFault, Source};
use super::rules::header_name;
use super::values::{OneOrMany, SecretRef, UrlRef};
use super::{AdminConfig, Config, Flags};
use super::{default_credential_headers, file, interpolate};
use crate::policy::client_limits::ClientLimits;
use crate::policy::mode;
use crate::policy::mode::Mode;
use crate::secret::{Secret, SecretSource};
use crate::store::memory::MemoryLimits;
use crate::telemetry::logs::{LogConfig, LoggedRequests};

/// Reads, merges, validates and compiles the configuration.
///
/// Returns an error if there is neither a file nor `--upstream`.
pub fn load(flags: &Flags) -> Result<Config, Vec<ConfigError>> {
    let path = flags.config.clone().or_else(|| {
        let default_file = PathBuf::from("sidecache.toml");
        default_file.exists().then_some(default_file)
    });
    let name = path.as_ref().map_or_else(|| "flags".to_owned(), |p| p.display().to_string());
    let text = match &path {
        None => String::new(),
        Some(path) => fs::read_to_string(path)
            .map_err(|e| vec![ConfigError::at(&name, format!("can't read the configuration: {e}"))])?,
    };
    // Variables that are not valid Unicode are not sidecache's, and must not prevent the start.
    let text_only = |(key, value): (OsString, OsString)| Some((key.into_string().ok()?, value.into_string().ok()?));
    let vars: Vec<(String, String)> =
        std::env::vars_os().filter_map(text_only).filter(|(key, _)| key.starts_with("SIDECACHE_")).collect();
    let folder = path.as_ref().and_then(|p| p.parent()).unwrap_or(Path::new(""));
    build(Source { name: &name, text: &text }, folder, &vars, flags)
}

/// Returns the configuration of a text, with paths relative to `folder`. Uses no environment variables except those
/// that the text names.
pub fn from_text(name: &str, text: &str, folder: &Path) -> Result<Config, Vec<ConfigError>> {
    build(Source { name, text }, folder, &[], &Flags::default())
}

fn build(
    source: Source<'_>,
    folder: &Path,
    vars: &[(String, String)],
    flags: &Flags,
) -> Result<Config, Vec<ConfigError>> {
    let mut file = parse(source, vars).map_err(|e| vec![e])?;
    apply_flags(&mut file, flags);
    let folder = folder.to_owned();
    let mut validator = Validator { source, folder, errors: Vec::new(), notes: Vec::new() };
    let config = validator.config(&file);
    if validator.errors.is_empty() { Ok(config) } else { Err(validator.errors) }
}

fn parse(source: Source<'_>, vars: &[(String, String)]) -> Result<file::File, ConfigError> {
    let mut table = DeTable::parse(source.text).map_err(|e| source.toml_error(&e))?;
    interpolate::interpolate(table.get_mut(), source, &|name| std::env::var(name).ok())?;
    interpolate::overlay(table.get_mut(), vars)?;
    file::File::deserialize(toml::Deserializer::from(table)).map_err(|e| source.toml_error(&e))
}

pub(super) fn from_flags<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

/// Applies the flags, which set or replace settings of the first upstream and the Redis URL.
fn apply_flags(file: &mut file::File, flags: &Flags) {
    if file.upstream.is_empty() && flags.upstream.is_some() {
        file.upstream.push(from_flags(file::Upstream::default()));
    }
    if let Some(redis) = &flags.redis {
        file.redis.get_or_insert_with(|| from_flags(file::Redis::default())).get_mut().url =
            Some(from_flags(UrlRef::Text(redis.clone())));
    }
    let Some(upstream) = file.upstream.first_mut() else { return };
    let upstream = upstream.get_mut();
    if let Some(url) = &flags.upstream {
        upstream.url = Some(from_flags(url.clone()));
    }
    if let Some(listen) = &flags.listen {
        upstream.listen = Some(from_flags(listen.clone()));
    }
    if let Some(profile) = &flags.profile {
        upstream.profile = Some(from_flags(profile.clone()));
    }
    if let Some(ttl) = &flags.ttl {
        upstream.ttl_flag = Some(from_flags(ttl.clone()));
    }
}

/// Collects all errors, so that one run reports everything.
pub(super) struct Validator<'a> {
    pub(super) source: Source<'a>,
    pub(super) folder: PathBuf,
    pub(super) errors: Vec<ConfigError>,
    pub(super) notes: Vec<String>,
}

impl Validator<'_> {
    pub(super) fn collect<T>(&mut self, result: Result<T, ConfigFault>) -> Option<T> {
        result.map_err(|(span, message)| self.fault(&span, message)).ok()
    }

    pub(super) fn fault(&mut self, span: &Range<usize>, message: impl Into<String>) {
        let error = self.source.error(span, message);
        self.errors.push(error);
    }

    fn config(&mut self, file: &file::File) -> Config {
        self.refuse_unbuilt(file);
        if file.upstream.is_empty() && self.errors.is_empty() {
            let message = "nothing to run: give --upstream https://your-api.example, or --config FILE";
            self.errors.push(ConfigError::at(self.source.name, message));
        }
        let memory = self.memory(&file.memory);
        let limits = limits(&file.limits);
        let credentials = self.credentials(&file.security);
        let secrets = self.secrets(&file.security);
        let redis = file.redis.as_ref().and_then(|redis| self.redis(redis));
        let redis_tier = self.redis_tier(file.redis.as_ref().map(Spanned::get_ref));
        let classes = classes(&file.ttl);
        let mut upstreams = Vec::new();
        for upstream in &file.upstream {
            let others = upstreams.len();
            let built = self.upstream(upstream, &classes, &credentials, others);
            upstreams.extend(built);
        }
        self.distinct(&upstreams, &file.upstream);
        let admin = self.admin(&file.admin, &upstreams);
        let probes = file.probes.as_ref().and_then(|probes| self.probes(&probes.listen, &upstreams, admin.as_ref()));
        Config {
            source: self.source.name.to_owned(),
            upstreams,
            memory,
            limits,
            redis,
            redis_tier,
            secrets,
            encrypt: file.security.encrypt,
            mode: self.mode(file),
            admin,
            probes,
            grace: file.shutdown.grace.map_or(Duration::from_secs(25), |d| d.0),
            log: self.log(&file.log),
            notes: std::mem::take(&mut self.notes),
        }
    }

    /// Rejects settings that are documented but not implemented in this version.
    fn refuse_unbuilt(&mut self, file: &file::File) {
        if let Some(given) = &file.webhook {
            self.fault(&given.span(), "[[webhook]] is not built yet: leave it out");
        }
    }

    fn mode(&mut self, file: &file::File) -> (Mode, mode::ModeSource) {
        let Some(given) = &file.mode else { return Default::default() };
        // A setting from the environment has no position in the file.
        let source = if given.span().is_empty() { mode::ModeSource::Environment } else { mode::ModeSource::File };
        let mode = Mode::of(given.get_ref()).unwrap_or_else(|| {
            let message = format!("mode = {:?}: write \"normal\", \"bypass\" or \"shadow\"", given.get_ref());
            self.fault(&given.span(), message);
            Mode::Normal
        });
        (mode, source)
    }

    fn memory(&mut self, given: &file::Memory) -> MemoryLimits {
        let size = |s: &Option<Spanned<super::values::SizeValue>>, default: u64| {
            s.as_ref().map_or(default, |s| s.get_ref().0)
        };
        let memory = MemoryLimits {
            max_bytes: size(&given.max_bytes, 64 << 20),
            max_entry_bytes: size(&given.max_entry_bytes, 8 << 20),
            max_inflight_bytes: given.max_inflight_bytes.map_or(32 << 20, |s| s.0),
            max_unverified: given.max_unverified.map_or(Duration::from_secs(30), |d| d.0),
        };
        // With `max_bytes = 0`, only Redis stores responses.
        if memory.max_bytes > 0 && memory.max_entry_bytes > memory.max_bytes / 2 {
            let span = given.max_entry_bytes.as_ref().or(given.max_bytes.as_ref()).map_or(0..0, Spanned::span);
            let message =
                "memory.max_entry_bytes must be at most half of memory.max_bytes, or one response evicts all others";
            self.fault(&span, message);
        }
        memory
    }

    fn credentials(&mut self, given: &file::Security) -> Arc<[HeaderName]> {
        let Some(names) = &given.credential_headers else { return default_credential_headers().into() };
        names.iter().filter_map(|name| self.collect(header_name(name))).collect()
    }

    fn secrets(&mut self, given: &file::Security) -> Vec<Secret> {
        let Some(spanned) = given.secret.as_ref() else { return Vec::new() };
        let OneOrMany(references) = spanned.get_ref();
        references.iter().filter_map(|reference| self.secret(reference, &spanned.span())).collect()
    }

    /// Returns the source of a secret, with its path relative to the file.
    pub(super) fn secret_source(&self, reference: &SecretRef) -> SecretSource {
        match reference {
            SecretRef::File(path) => SecretSource::File(self.folder.join(path)),
            SecretRef::Env(name) => SecretSource::Env(name.clone()),
        }
    }

    pub(super) fn secret(&mut self, reference: &SecretRef, span: &Range<usize>) -> Option<Secret> {
        let read = self.secret_source(reference).read();
        self.collect(read.map_err(|why| (span.clone(), why)))
    }

    /// Checks that no two upstreams have the same address or name.
    fn distinct(&mut self, built: &[super::UpstreamConfig], given: &[Spanned<file::Upstream>]) {
        if built.len() != given.len() {
            return;
        }
        for (i, upstream) in built.iter().enumerate() {
            for earlier in &built[..i] {
                if earlier.name == upstream.name {
                    let message = format!("two upstreams are called {:?}: write another name = \"…\"", upstream.name);
                    self.fault(&given[i].span(), message);
                }
                if earlier.listen == upstream.listen && upstream.listen.port() != 0 {
                    let message =
                        format!("two upstreams listen on {}: write another listen = \"…\"", upstream.listen);
                    self.fault(&given[i].span(), message);
                }
            }
        }
    }

    fn admin(&mut self, given: &file::Admin, upstreams: &[super::UpstreamConfig]) -> Option<AdminConfig> {
        let token = given.token.as_ref().and_then(|token| self.secret(token.get_ref(), &token.span()));
        let listen = match &given.listen {
            None => SocketAddr::from(([127, 0, 0, 1], 18081)),
            Some(text) if text.get_ref() == "off" => return None,
            Some(text) => self.collect(address(text))?,
        };
        if !listen.ip().is_loopback() && given.token.is_none() {
            let span = given.listen.as_ref().map_or(0..0, Spanned::span);
            let message = "the admin API beyond loopback needs a token: write token = { file = \"…\" } under [admin]";
            self.fault(&span, message);
        }
        if listen.port() != 0 && upstreams.iter().any(|upstream| upstream.listen == listen) {
            let span = given.listen.as_ref().map_or(0..0, Spanned::span);
            self.fault(&span, format!("an upstream listens on {listen} too: write another listen = \"…\""));
        }
        Some(AdminConfig { listen, token })
    }

    fn probes(
        &mut self,
        given: &Spanned<String>,
        upstreams: &[super::UpstreamConfig],
        admin: Option<&AdminConfig>,
    ) -> Option<SocketAddr> {
        let listen = self.collect(address(given))?;
        let taken = upstreams.iter().map(|u| u.listen).chain(admin.map(|admin| admin.listen)).any(|a| a == listen);
        if listen.port() != 0 && taken {
            self.fault(&given.span(), format!("another listener is on {listen} too: write another listen = \"…\""));
        }
        Some(listen)
    }

    fn log(&mut self, given: &file::Log) -> LogConfig {
        let json = match given.format.as_ref().map(|f| (f.get_ref().as_str(), f.span())) {
            None | Some(("human", _)) => false,
            Some(("json", _)) => true,
            Some((other, span)) => {
                self.fault(&span, format!("log.format = {other:?}: write \"human\" or \"json\""));
                false
            }
        };
        let requests = match &given.requests {
            None => LoggedRequests::Failures,
            Some(given) => {
                let known = LoggedRequests::NAMES.into_iter().find(|(name, _)| name == given.get_ref());
                if known.is_none() {
                    let names = LoggedRequests::NAMES.map(|(name, _)| name);
                    self.fault(
                        &given.span(),
                        format!("log.requests = {:?}: write one of {names:?}", given.get_ref()),
                    );
                }
                known.map_or(LoggedRequests::Failures, |(_, requests)| requests)
            }
        };
        let slow = given.slow.map_or(Some(Duration::from_secs(5)), |slow| slow.0);
        LogConfig { filter: given.filter.clone().unwrap_or_else(|| "info".into()), json, requests, slow }
    }
}

/// Parses an address like `127.0.0.1:18080`. An error says what to write.
pub(super) fn address(text: &Spanned<String>) -> Result<SocketAddr, ConfigFault> {
    text.get_ref().parse().map_err(|_| {
        (
            text.span(),
            format!("{:?} is no address: write \"127.0.0.1:18080\"; port 0 takes any free one", text.get_ref()),
        )
    })
}

fn classes(given: &BTreeMap<String, super::values::DurationValue>) -> BTreeMap<String, Duration> {
    let hours = Duration::from_hours;
    let defaults = [
        ("default", hours(1)),
        ("session", hours(24)),
        ("temporary", Duration::from_mins(5)),
        ("long", hours(7 * 24)),
    ];
    let mut classes: BTreeMap<String, Duration> = defaults.map(|(name, ttl)| (name.to_owned(), ttl)).into();
    classes.extend(given.iter().map(|(name, ttl)| (name.clone(), ttl.0)));
    classes
}

fn limits(given: &file::Limits) -> ClientLimits {
    let seconds = Duration::from_secs;
    ClientLimits {
        request_body: given.request_body.map_or(64 << 20, |s| s.0),
        headers: given.headers.map_or(32 << 10, |s| s.0),
        url: given.url.map_or(8 << 10, |s| s.0),
        connections: given.connections.unwrap_or(10_000).max(1),
        header_time: given.header_time.map_or(seconds(5), |d| d.0),
        keep_alive: given.keep_alive.map_or(seconds(75), |d| d.0),
        write_stall: given.write_stall.map_or(seconds(30), |d| d.0),
        shared_write_stall: given.shared_write_stall.map_or(seconds(2), |d| d.0),
    }
}
