//! Environment variables: `${VAR}` and `${VAR:-default}` in strings of the file, and `SIDECACHE_A__B=…` for a key.

use std::borrow::Cow;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Source};

/// The environment, passed as a parameter so that tests need not change that of the process.
pub(super) type Env<'e> = &'e dyn Fn(&str) -> Option<String>;

/// Replaces the variables in every string of `table` and its subtables.
pub(super) fn interpolate(table: &mut DeTable<'_>, source: Source<'_>, env: Env<'_>) -> Result<(), ConfigError> {
    for (_, value) in table.iter_mut() {
        interpolate_value(value, source, env)?;
    }
    Ok(())
}

fn interpolate_value(value: &mut Spanned<DeValue<'_>>, source: Source<'_>, env: Env<'_>) -> Result<(), ConfigError> {
    let span = value.span();
    match value.get_mut() {
        DeValue::String(text) if text.contains('$') => {
            *text = Cow::Owned(expand(text, env).map_err(|message| source.error(&span, message))?);
            Ok(())
        }
        DeValue::Array(list) => list.iter_mut().try_for_each(|item| interpolate_value(item, source, env)),
        DeValue::Table(table) => interpolate(table, source, env),
        DeValue::String(_) | DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => {
            Ok(())
        }
    }
}

fn expand(text: &str, env: Env<'_>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((expression, after)) = after.strip_prefix('{').and_then(|a| a.split_once('}')) {
            let (name, default) = expression.split_once(":-").map_or((expression, None), |(n, d)| (n, Some(d)));
            let value = env(name).or_else(|| default.map(str::to_owned));
            out += &value
                .ok_or_else(|| format!("the environment has no {name}: set it, or write ${{{name}:-default}}"))?;
            rest = after;
        } else {
            return Err("write ${VAR} for a variable, and $$ for a dollar sign".into());
        }
    }
    Ok(out + rest)
}

/// Sets keys from variables like `SIDECACHE_REDIS__URL`. Only names with `__` (and `SIDECACHE_MODE`) count, because
/// Kubernetes sets `SIDECACHE_PORT_…` for a service called sidecache.
pub(super) fn overlay<'i>(table: &mut DeTable<'i>, vars: &'i [(String, String)]) -> Result<(), ConfigError> {
    for (name, value) in vars {
        let Some(path) = name.strip_prefix("SIDECACHE_") else { continue };
        if !path.contains("__") && path != "MODE" {
            continue;
        }
        let lower = path.to_ascii_lowercase();
        let keys: Vec<&str> = lower.split("__").collect();
        set(table, &keys, value).map_err(|message| ConfigError::at(format!("environment {name}"), message))?;
    }
    Ok(())
}

fn set<'i>(table: &mut DeTable<'i>, keys: &[&str], value: &'i str) -> Result<(), String> {
    const NOWHERE: Range<usize> = 0..0;
    let Some((first, rest)) = keys.split_first() else { return Ok(()) };
    let key = Spanned::new(NOWHERE, Cow::Owned((*first).to_owned()));
    if rest.is_empty() {
        table.insert(key, Spanned::new(NOWHERE, scalar(value)));
        return Ok(());
    }
    let below = table.entry(key).or_insert_with(|| Spanned::new(NOWHERE, DeValue::Table(DeTable::new())));
    match below.get_mut() {
        DeValue::Table(table) => set(table, rest, value),
        DeValue::Array(_) => Err(format!("[[{first}]] is a list: environment variables can't set its members")),
        DeValue::String(_) | DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => {
            Err(format!("`{first}` is a value, not a table"))
        }
    }
}

/// Parses numbers, booleans and lists as TOML does; everything else is text.
fn scalar(value: &str) -> DeValue<'_> {
    match DeValue::parse(value).map(Spanned::into_inner) {
        Ok(DeValue::String(text)) => DeValue::String(text),
        Ok(DeValue::Datetime(_)) | Err(_) => DeValue::String(Cow::Borrowed(value)),
        Ok(parsed) => parsed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_expanded_and_double_dollar_is_a_literal_dollar() {
        let env = |name: &str| (name == "HOST").then(|| "example".to_owned());
        assert_eq!(expand("https://${HOST}/", &env).as_deref(), Ok("https://example/"));
        assert_eq!(expand("${NOPE:-d}$$", &env).as_deref(), Ok("d$"));
        assert!(expand("${NOPE}", &env).expect_err("unset").contains("NOPE:-default"));
        assert!(expand("$NOPE", &env).is_err());
    }
}
