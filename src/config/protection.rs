//! What protects an upstream: its budget, its breaker, and how many connections it gets.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use toml::Spanned;

use super::Pool;
use super::error::Fault;
use super::values::Dur;
use crate::policy::circuit::Tolerance;
use crate::policy::quota::{Budget, Pace, Per};

/// `budget`: a word, or a table.
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
    max_wait: Option<Dur>,
    per: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BreakerTable {
    failures: Option<u32>,
    open_for: Option<Dur>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PoolTable {
    connections: Option<usize>,
    idle: Option<usize>,
    max_age: Option<Dur>,
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

/// What a budget says; none: `"off"`. Without a word or with `"learn"` there is no pace, and an upstream that says
/// when to come again is obeyed.
pub(super) fn budget(given: Option<&Spanned<BudgetSpec>>) -> Result<Option<Budget>, Fault> {
    let obedient = Budget { pace: None, max_wait: MAX_WAIT, per: Per::Credential };
    let Some(spanned) = given else { return Ok(Some(obedient)) };
    match spanned.get_ref() {
        BudgetSpec::Word(word) if word == "learn" => Ok(Some(obedient)),
        BudgetSpec::Word(word) if word == "off" => Ok(None),
        BudgetSpec::Word(word) => {
            let message = format!("budget = {word:?}: write \"learn\", \"off\" or {{ rate = \"2/s\", burst = 40 }}");
            Err((spanned.span(), message))
        }
        BudgetSpec::Table(table) => {
            let burst = table.burst.as_ref().map_or(Ok(1), |burst| match *burst.get_ref() {
                0 => Err((burst.span(), "burst = 0 lets nothing through: write at least 1".into())),
                burst => Ok(burst),
            })?;
            Ok(Some(Budget {
                pace: Some(Pace { every: every(&table.rate)?, burst }),
                max_wait: table.max_wait.map_or(MAX_WAIT, |wait| wait.0),
                per: table.per.as_ref().map_or(Ok(Per::Credential), per)?,
            }))
        }
    }
}

/// `"2/s"`: so many in a second, minute or hour.
fn every(rate: &Spanned<String>) -> Result<Duration, Fault> {
    let parse = |text: &str| {
        let (count, unit) = text.split_once('/')?;
        let count: f64 = count.trim().parse().ok().filter(|count| *count > 0.0)?;
        let unit = match unit.trim() {
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        Duration::try_from_secs_f64(unit / count).ok().filter(|every| !every.is_zero())
    };
    let message = || format!("{:?} is no rate: write \"2/s\", \"100/m\" or \"5000/h\"", rate.get_ref());
    parse(rate.get_ref()).ok_or_else(|| (rate.span(), message()))
}

fn per(word: &Spanned<String>) -> Result<Per, Fault> {
    match word.get_ref().as_str() {
        "credential" => Ok(Per::Credential),
        "host" => Ok(Per::Host),
        other => Err((word.span(), format!("per = {other:?}: write \"credential\" or \"host\""))),
    }
}

pub(super) fn tolerance(given: &BreakerTable) -> Tolerance {
    Tolerance {
        failures: given.failures.unwrap_or(5).max(1),
        open_for: given.open_for.map_or(Duration::from_secs(5), |d| d.0),
    }
}

pub(super) fn pool(given: &PoolTable) -> Pool {
    Pool {
        connections: given.connections.unwrap_or(256).max(1),
        idle: given.idle.unwrap_or(64),
        max_age: given.max_age.map_or(Duration::from_mins(5), |d| d.0),
    }
}
