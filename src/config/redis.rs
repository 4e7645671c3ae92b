//! Validation of `[redis]` of the file, with a [`RedisConfig`] as result.

use std::time::Duration;

use toml::Spanned;

use super::error::{ConfigFault, NO_EXCERPT};
use super::file;
use super::validate::Validator;
use crate::redis::{RedisConfig, RedisDatabases, RedisTopology};
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
        let (topology, encrypted, database) = self.collect(parse(url))?;
        let password = given.password.as_ref().map(|password| self.secret_source(password.get_ref()));
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
        let tls = self.tls(&given.tls);
        let databases = self.databases(given.databases.as_ref(), database, &topology);
        let key_prefix = given.key_prefix.as_ref().map_or("sidecache", |prefix| prefix.get_ref().as_str());
        if key_prefix.is_empty() || key_prefix.contains(|c: char| !c.is_ascii_alphanumeric() && !"_-.".contains(c)) {
            let span = given.key_prefix.as_ref().map_or(0..0, Spanned::span);
            self.fault(&span, "redis.key_prefix: write letters, digits, and _ - . only");
        }
        Some(RedisConfig {
            topology,
            tls: encrypted.then_some(tls),
            username: given.username.clone(),
            password,
            sentinel_username: given.sentinel_username.clone(),
            sentinel_password,
            databases,
            key_prefix: key_prefix.into(),
            command_timeout: given.command_timeout.map_or(Duration::from_millis(100), |d| d.0),
        })
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

/// Parses a Redis URL. Returns the topology, whether TLS is used, and the database.
fn parse(url: &Spanned<String>) -> Result<(RedisTopology, bool, u8), ConfigFault> {
    let fail = |why: String| (url.span(), why);
    let text = url.get_ref().as_str();
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(fail(format!("redis.url has no scheme: {SCHEMES}")));
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    if scheme == "redis+unix" {
        return if rest.starts_with('/') {
            Ok((RedisTopology::Unix(rest.into()), false, 0))
        } else {
            Err(fail("redis.url: write redis+unix:///path/to/redis.sock".into()))
        };
    }
    if rest.contains('@') {
        let advice = "redis.url does not carry credentials: write username = \"…\" and password = { file = \"…\" } or \
                      { env = \"…\" } under [redis]";
        return Err(fail(NO_EXCERPT.to_owned() + advice));
    }
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let database = match database {
        "" => 0,
        number => number.parse().map_err(|_| fail(format!("redis.url: database {number:?} is no number")))?,
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
            other => return Err(fail(format!("redis.url: unknown parameter {other:?}: write service or node"))),
        }
    }
    let default_port = if kind == "-sentinel" { 26379 } else { 6379 };
    let nodes: Vec<(String, u16)> =
        nodes.iter().map(|node| host_and_port(node, default_port)).collect::<Result<_, _>>().map_err(fail)?;
    let topology = match (kind, service) {
        ("", None) if nodes.len() == 1 => RedisTopology::Single(nodes[0].clone()),
        ("", None) => {
            return Err(fail("redis.url: several nodes: write redis-cluster:// or redis-sentinel://".into()));
        }
        ("-cluster", None) => RedisTopology::Cluster(nodes),
        ("-sentinel", Some(service)) => RedisTopology::Sentinel { nodes, service },
        ("-sentinel", None) => {
            return Err(fail("redis.url: which master? Write redis-sentinel://host:26379?service=mymaster".into()));
        }
        ("" | "-cluster", Some(_)) => {
            return Err(fail("redis.url: service is a Sentinel's: write redis-sentinel://".into()));
        }
        (_, _) => return Err(fail(format!("redis.url: scheme {scheme:?}: {SCHEMES}"))),
    };
    Ok((topology, encrypted, database))
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

    fn read(url: &str) -> Result<(RedisTopology, bool, u8), String> {
        parse(&Spanned::new(0..1, url.to_owned())).map_err(|(_, message)| message)
    }

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
            assert_eq!(read(url), Ok((topology, encrypted, database)), "{url}");
        }
        let bad = [
            ("127.0.0.1:6379", "no scheme"),
            ("http://127.0.0.1", "write one of redis://"),
            ("redis://", "has no host"),
            ("redis://a:x", "is no port"),
            ("redis://a/x", "is no number"),
            ("redis://a,b", "redis-cluster://"),
            ("redis://:hunter2@a", "does not carry credentials"),
            ("redis-sentinel://a", "which master"),
            ("redis+unix://sock", "redis+unix:///path"),
            ("redis://a?x=1", "unknown parameter"),
        ];
        for (url, why) in bad {
            assert!(read(url).is_err_and(|message| message.contains(why)), "{url}: {:?}", read(url));
        }
    }
}
