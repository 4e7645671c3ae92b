//! Validation of `[redis]` of the file, with a [`RedisConfig`] as result.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use toml::Spanned;

use super::error::{ConfigFault, NO_EXCERPT};
use super::file;
use super::validate::Validator;
use super::values::UrlRef;
use crate::redis::{RedisConfig, RedisDatabases, RedisTopology};
use crate::secret::{SecretSource, userinfo};
use crate::store::compression::Compression;
use crate::store::redis_tier::RedisTierConfig;

const SCHEMES: &str = "write one of redis://, rediss://, redis-cluster://, rediss-cluster://, redis-sentinel://, \
                       rediss-sentinel://, redis+unix://";

impl Validator<'_> {
    pub(super) fn redis(&mut self, given: &Spanned<file::Redis>) -> Option<RedisConfig> {
        let (span, given) = (given.span(), given.get_ref());
        let Some(url) = &given.url else {
            self.fault(&span, "[redis] needs a url: write url = \"redis://127.0.0.1:6379\"");
            return None;
        };
        let Url { topology, encrypted, database, username, password } = self.redis_url(url)?;
        if (username.is_some() || password.is_some()) && (given.username.is_some() || given.password.is_some()) {
            self.fault(&url.span(), "redis.url carries credentials: leave username and password out");
        }
        let given_password = given.password.as_ref().map(|password| self.secret_source(password.get_ref()));
        if let Some(reference) = &given.password {
            self.secret(reference.get_ref(), &reference.span());
        }
        let sentinel_password =
            given.sentinel_password.as_ref().map(|password| self.secret_source(password.get_ref()));
        if let Some(reference) = &given.sentinel_password {
            self.secret(reference.get_ref(), &reference.span());
            if !matches!(topology, RedisTopology::Sentinel { .. }) {
                self.fault(&reference.span(), "redis.sentinel_password needs a url with redis-sentinel://");
            }
        }
        let tls_given = given.tls.ca.is_some() || given.tls.cert.is_some() || given.tls.key.is_some();
        if tls_given && !encrypted {
            self.fault(&url.span(), "redis.tls needs rediss://: write rediss://, or leave tls out");
        }
        let file::RedisTls { ca, cert, key, names } = &given.tls;
        let tls = self.tls(&file::Tls { ca: ca.clone(), cert: cert.clone(), key: key.clone() });
        let tls_names = names.as_ref().and_then(|names| self.collect(tls_names(names))).unwrap_or_default();
        if let Some(names) = names
            && !(encrypted && matches!(topology, RedisTopology::Cluster(_)))
        {
            self.fault(&names.span(), "redis.tls.names needs a url with rediss-cluster://");
        }
        let databases = self.databases(given.databases.as_ref(), database, &topology);
        let key_prefix = given.key_prefix.as_ref().map_or("sidecache", |prefix| prefix.get_ref().as_str());
        if key_prefix.is_empty() || key_prefix.contains(|c: char| !c.is_ascii_alphanumeric() && !"_-.".contains(c)) {
            let span = given.key_prefix.as_ref().map_or(0..0, Spanned::span);
            self.fault(&span, "redis.key_prefix: write letters, digits, and _ - . only");
        }
        Some(RedisConfig {
            topology,
            tls: encrypted.then_some(tls),
            tls_names,
            username: username.or_else(|| given.username.clone()),
            password: password.or(given_password),
            sentinel_username: given.sentinel_username.clone(),
            sentinel_password,
            databases,
            key_prefix: key_prefix.into(),
            command_timeout: given.command_timeout.map_or(Duration::from_millis(100), |d| d.0),
        })
    }

    /// Returns the parts of the URL. Only one that is a secret carries credentials.
    fn redis_url(&mut self, given: &Spanned<UrlRef>) -> Option<Url> {
        let span = given.span();
        match given.get_ref() {
            UrlRef::Text(text) => self.collect(parse(text).map_err(|why| (span, why))),
            UrlRef::Secret(reference) => {
                let secret = self.secret(reference, &span)?;
                let text = secret.reveal();
                let credentials = userinfo(text);
                let place = match (text.split_once("://"), text.rsplit_once('@')) {
                    (Some((scheme, _)), Some((_, place))) if credentials.is_some() => format!("{scheme}://{place}"),
                    (_, _) => text.to_owned(),
                };
                // The URL is not repeated in a message.
                let parsed = parse(&place).map_err(|why| (span, NO_EXCERPT.to_owned() + &why));
                let (username, password) = credentials.unwrap_or_default();
                let source = self.secret_source(reference);
                let password = password.map(|_| SecretSource::PasswordOfUrl(Box::new(source)));
                Some(Url { username, password, ..self.collect(parsed)? })
            }
        }
    }

    /// Returns the settings for records in Redis, or the defaults without `[redis]`.
    pub(super) fn redis_tier(&mut self, given: Option<&file::Redis>) -> RedisTierConfig {
        let defaults = RedisTierConfig::default();
        let Some(given) = given else { return defaults };
        RedisTierConfig {
            compression: self.collect(compression(given.compress.as_ref())).unwrap_or_default(),
            compress_above: given.compress_above.map_or(defaults.compress_above, |s| s.0),
            write_behind: given.write_behind.map_or(defaults.write_behind, |s| s.0),
        }
    }

    fn databases(
        &mut self,
        given: Option<&Spanned<file::Databases>>,
        url: u8,
        topology: &RedisTopology,
    ) -> RedisDatabases {
        let each = |database: Option<u8>| database.unwrap_or(url);
        let databases = given.map_or(RedisDatabases { cache: url, private: url, coordination: url }, |given| {
            let file::Databases { cache, private, coordination } = *given.get_ref();
            RedisDatabases { cache: each(cache), private: each(private), coordination: each(coordination) }
        });
        let several = databases != (RedisDatabases { cache: 0, private: 0, coordination: 0 });
        if matches!(topology, RedisTopology::Cluster(_)) && several {
            let span = given.map_or(0..0, Spanned::span);
            self.fault(&span, "a Redis Cluster has database 0 only: leave databases out");
        }
        databases
    }
}

fn compression(given: Option<&Spanned<String>>) -> Result<Compression, ConfigFault> {
    let Some(text) = given else { return Ok(RedisTierConfig::default().compression) };
    match text.get_ref().as_str() {
        "lz4" => Ok(Compression::Lz4),
        "zstd" => Ok(Compression::Zstd),
        "off" => Ok(Compression::None),
        other => Err((text.span(), format!("redis.compress = {other:?}: write \"lz4\", \"zstd\" or \"off\""))),
    }
}

/// Parses `redis.tls.names`.
fn tls_names(given: &Spanned<BTreeMap<String, String>>) -> Result<BTreeMap<Option<IpAddr>, String>, ConfigFault> {
    let advice = |address: &str| {
        format!(
            "redis.tls.names: {address:?} is no address: write \"10.0.0.5\" = \"node.example\", or \"*\" for all others"
        )
    };
    let parse = |(address, name): (&String, &String)| match address.as_str() {
        "*" => Ok((None, name.clone())),
        text => text.parse().map(|address| (Some(address), name.clone())).map_err(|_| (given.span(), advice(text))),
    };
    given.get_ref().iter().map(parse).collect()
}

/// The parts of a Redis URL.
#[derive(Debug, PartialEq, Eq)]
struct Url {
    topology: RedisTopology,
    encrypted: bool,
    database: u8,
    username: Option<String>,
    password: Option<SecretSource>,
}

impl Url {
    fn new(topology: RedisTopology, encrypted: bool, database: u8) -> Url {
        Url { topology, encrypted, database, username: None, password: None }
    }
}

/// Parses a Redis URL without credentials.
fn parse(text: &str) -> Result<Url, String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(format!("redis.url has no scheme: {SCHEMES}"));
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    if scheme == "redis+unix" {
        return if rest.starts_with('/') {
            Ok(Url::new(RedisTopology::Unix(rest.into()), false, 0))
        } else {
            Err("redis.url: write redis+unix:///path/to/redis.sock".into())
        };
    }
    if rest.contains('@') {
        let advice = "redis.url carries credentials: write url = { env = \"REDIS_URL\" } or url = { file = \"…\" }, or \
                      username = \"…\" and password = { file = \"…\" } under [redis]";
        return Err(NO_EXCERPT.to_owned() + advice);
    }
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let database = match database {
        "" => 0,
        number => number.parse().map_err(|_| format!("redis.url: database {number:?} is no number"))?,
    };
    let (encrypted, kind) = match scheme.strip_prefix("rediss") {
        Some(kind) => (true, kind),
        None => (false, scheme.strip_prefix("redis").unwrap_or("?")),
    };
    let mut nodes = authority.split(',').map(str::to_owned).collect::<Vec<_>>();
    let mut service = None;
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match name {
            "node" => nodes.push(value.to_owned()),
            "service" | "sentinelServiceName" => service = Some(value.to_owned()),
            other => return Err(format!("redis.url: unknown parameter {other:?}: write service or node")),
        }
    }
    let default_port = if kind == "-sentinel" { 26379 } else { 6379 };
    let nodes: Vec<(String, u16)> =
        nodes.iter().map(|node| host_and_port(node, default_port)).collect::<Result<_, _>>()?;
    let topology = match (kind, service) {
        ("", None) if nodes.len() == 1 => RedisTopology::Single(nodes[0].clone()),
        ("", None) => {
            return Err("redis.url: several nodes: write redis-cluster:// or redis-sentinel://".into());
        }
        ("-cluster", None) => RedisTopology::Cluster(nodes),
        ("-sentinel", Some(service)) => RedisTopology::Sentinel { nodes, service },
        ("-sentinel", None) => {
            return Err("redis.url: which master? Write redis-sentinel://host:26379?service=mymaster".into());
        }
        ("" | "-cluster", Some(_)) => {
            return Err("redis.url: service is a Sentinel's: write redis-sentinel://".into());
        }
        (_, _) => return Err(format!("redis.url: scheme {scheme:?}: {SCHEMES}")),
    };
    Ok(Url::new(topology, encrypted, database))
}

fn host_and_port(node: &str, default: u16) -> Result<(String, u16), String> {
    let (host, port) = match node.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            (host, port.parse().map_err(|_| format!("redis.url: {port:?} is no port"))?)
        }
        Some(_) | None => (node, default),
    };
    let host = host.trim_matches(['[', ']']);
    if host.is_empty() {
        return Err("redis.url has no host: write redis://127.0.0.1:6379".into());
    }
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_urls_are_parsed_and_invalid_ones_are_rejected() {
        let one = |host: &str, port| (host.to_owned(), port);
        let good = [
            ("redis://127.0.0.1", RedisTopology::Single(one("127.0.0.1", 6379)), false, 0),
            ("rediss://cache.example:7000/3", RedisTopology::Single(one("cache.example", 7000)), true, 3),
            ("redis://[::1]:7000", RedisTopology::Single(one("::1", 7000)), false, 0),
            ("redis://[::1]", RedisTopology::Single(one("::1", 6379)), false, 0),
            ("redis+unix:///run/redis.sock", RedisTopology::Unix("/run/redis.sock".into()), false, 0),
            ("redis-cluster://a:1,b:2", RedisTopology::Cluster(vec![one("a", 1), one("b", 2)]), false, 0),
            ("rediss-cluster://a:1?node=b:2", RedisTopology::Cluster(vec![one("a", 1), one("b", 2)]), true, 0),
            (
                "redis-sentinel://a,b:2/1?service=main",
                RedisTopology::Sentinel { nodes: vec![one("a", 26379), one("b", 2)], service: "main".into() },
                false,
                1,
            ),
        ];
        for (url, topology, encrypted, database) in good {
            assert_eq!(parse(url), Ok(Url::new(topology, encrypted, database)), "{url}");
        }
        let bad = [
            ("127.0.0.1:6379", "no scheme"),
            ("http://127.0.0.1", "write one of redis://"),
            ("redis://", "has no host"),
            ("redis://a:x", "is no port"),
            ("redis://a/x", "is no number"),
            ("redis://a,b", "redis-cluster://"),
            ("redis://:hunter2@a", "url = { env = \"REDIS_URL\" }"),
            ("redis-sentinel://a", "which master"),
            ("redis+unix://sock", "redis+unix:///path"),
            ("redis://a?x=1", "unknown parameter"),
        ];
        for (url, why) in bad {
            assert!(parse(url).is_err_and(|message| message.contains(why)), "{url}: {:?}", parse(url));
        }
    }
}
