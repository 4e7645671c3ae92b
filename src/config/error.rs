//! Configuration errors, with the position, the fault, and what to write instead.

use std::fmt;
use std::ops::Range;

/// A configuration error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The position: `file:line:column`, or the whole source (file, flags, environment).
    pub place: String,
    /// What is wrong, and what to write instead.
    pub message: String,
    /// The line of the file with a caret under the error, if there is one.
    pub excerpt: Option<String>,
}

impl ConfigError {
    /// Creates an error without a line of a file.
    pub fn at(place: impl Into<String>, message: impl Into<String>) -> ConfigError {
        ConfigError { place: place.into(), message: message.into(), excerpt: None }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)?;
        self.excerpt.as_ref().map_or(Ok(()), |excerpt| write!(f, "\n{excerpt}"))
    }
}

impl std::error::Error for ConfigError {}

/// Prefix of a message whose line must not be quoted, because it contains a secret.
pub(super) const NO_EXCERPT: &str = "\u{0}";

/// A fault: its span in the text, and its message.
pub(super) type ConfigFault = (Range<usize>, String);

/// A named text that spans refer to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
}

impl Source<'_> {
    /// Creates an error at a span. Values from flags or environment have the empty span at 0.
    pub(super) fn error(&self, span: &Range<usize>, message: impl Into<String>) -> ConfigError {
        if *span == (0..0) {
            return ConfigError::at("command line or environment", message);
        }
        let start = span.start.min(self.text.len());
        let line_start = self.text[..start].rfind('\n').map_or(0, |i| i + 1);
        let line_number = self.text[..start].matches('\n').count() + 1;
        let line = self.text[line_start..].lines().next().unwrap_or_default();
        let column = self.text[line_start..start].chars().count() + 1;
        let width = span.end.saturating_sub(start).clamp(1, line.chars().count().saturating_sub(column - 1).max(1));
        let margin = " ".repeat(line_number.to_string().len());
        let message = message.into();
        if let Some(message) = message.strip_prefix(NO_EXCERPT) {
            return ConfigError::at(format!("{}:{line_number}:{column}", self.name), message);
        }
        let excerpt =
            format!("{margin} |\n{line_number} | {line}\n{margin} | {}{}", " ".repeat(column - 1), "^".repeat(width));
        ConfigError { place: format!("{}:{line_number}:{column}", self.name), message, excerpt: Some(excerpt) }
    }

    /// Converts an error of the TOML parser or of deserialization.
    pub(super) fn toml_error(&self, error: &toml::de::Error) -> ConfigError {
        let message = error.message().trim_end().replace('\n', "; ");
        match error.span() {
            Some(span) => self.error(&span, message),
            None => ConfigError::at(self.name, message),
        }
    }
}
