//! Settings that protect an upstream: request budget, circuit breaker, connection pool.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use toml::Spanned;

use super::error::ConfigFault;
use super::file::Backoff;
use super::values::DurationValue;
use crate::policy::resilience::backoff::FailureBackoff;
use crate::policy::resilience::budget::{Budget, BudgetScope, RequestRate};
use crate::policy::resilience::circuit_breaker::BreakerConfig;
use crate::upstream::PoolLimits;

/// The setting `budget`: a word, or a table.
#[derive(Debug, Clone)]
pub(super) enum BudgetSpec {
    Word(String),
    Table(BudgetTable),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BudgetTable {
    rate: Spanned<String>,
    burst: Option<Spanned<u32>>,
    max_wait: Option<DurationValue>,
    per: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BreakerTable {
    failures: Option<u32>,
    open_for: Option<DurationValue>,
    on_5xx: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PoolTable {
    connections: Option<usize>,
    idle: Option<usize>,
    max_age: Option<DurationValue>,
}

impl<'de> Deserialize<'de> for BudgetSpec {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = BudgetSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"off\", \"learn\" or { rate = \"2/s\", burst = 40 }")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<BudgetSpec, E> {
                Ok(BudgetSpec::Word(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<BudgetSpec, A::Error> {
                let map = serde::de::value::MapAccessDeserializer::new(map);
                BudgetTable::deserialize(map).map(BudgetSpec::Table)
            }
        }
        from.deserialize_any(Either)
    }
}

const MAX_WAIT: Duration = Duration::from_secs(5);

/// Returns the budget, or `None` for `"off"`. If it is not set or `"learn"`, the rate is unlimited, and `Retry-After`
/// of the upstream is obeyed.
pub(super) fn budget(given: Option<&Spanned<BudgetSpec>>) -> Result<Option<Budget>, ConfigFault> {
    let obedient = Budget { pace: None, max_wait: MAX_WAIT, per: BudgetScope::Credential };
    let Some(spanned) = given else { return Ok(Some(obedient)) };
    match spanned.get_ref() {
        BudgetSpec::Word(text) if text == "learn" => Ok(Some(obedient)),
        BudgetSpec::Word(text) if text == "off" => Ok(None),
        BudgetSpec::Word(text) => {
            let message = format!("budget = {text:?}: write \"learn\", \"off\" or {{ rate = \"2/s\", burst = 40 }}");
            Err((spanned.span(), message))
        }
        BudgetSpec::Table(table) => {
            let burst = table.burst.as_ref().map_or(Ok(1), |burst| match *burst.get_ref() {
                0 => Err((burst.span(), "burst = 0 allows no request: write at least 1".into())),
                burst => Ok(burst),
            })?;
            Ok(Some(Budget {
                pace: Some(RequestRate { every: parse_rate(&table.rate)?, burst }),
                max_wait: table.max_wait.map_or(MAX_WAIT, |wait| wait.0),
                per: table.per.as_ref().map_or(Ok(BudgetScope::Credential), per)?,
            }))
        }
    }
}

/// Parses a rate like `"2/s"`, per second, minute or hour. Returns the interval between two requests.
fn parse_rate(rate: &Spanned<String>) -> Result<Duration, ConfigFault> {
    let parse = |text: &str| {
        let (count, unit) = text.split_once('/')?;
        let count: f64 = count.trim().parse().ok().filter(|count| *count > 0.0)?;
        let unit = match unit.trim() {
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        Duration::try_from_secs_f64(unit / count).ok().filter(|interval| !interval.is_zero())
    };
    let message = || format!("{:?} is no rate: write \"2/s\", \"100/m\" or \"5000/h\"", rate.get_ref());
    parse(rate.get_ref()).ok_or_else(|| (rate.span(), message()))
}

fn per(text: &Spanned<String>) -> Result<BudgetScope, ConfigFault> {
    match text.get_ref().as_str() {
        "credential" => Ok(BudgetScope::Credential),
        "host" => Ok(BudgetScope::Host),
        other => Err((text.span(), format!("per = {other:?}: write \"credential\" or \"host\""))),
    }
}

pub(super) fn breaker(given: &BreakerTable) -> BreakerConfig {
    BreakerConfig {
        failures: given.failures.unwrap_or(5).max(1),
        open_for: given.open_for.map_or(Duration::from_secs(5), |d| d.0),
        failure_ratio: true,
        on_5xx: given.on_5xx,
    }
}

pub(super) fn backoff(given: &Backoff) -> FailureBackoff {
    let base = given.base.map_or(Duration::from_secs(1), |base| base.0);
    FailureBackoff { base, cap: given.cap.map_or(Duration::from_mins(1), |cap| cap.0).max(base) }
}

pub(super) fn pool(given: &PoolTable) -> PoolLimits {
    PoolLimits {
        connections: given.connections.unwrap_or(256).max(1),
        idle: given.idle.unwrap_or(64),
        max_age: given.max_age.map_or(Duration::from_mins(5), |d| d.0),
    }
}
