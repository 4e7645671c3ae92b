//! Secrets: they come from a file or the environment, and their `Debug` shows nothing.

use std::env::VarError;
use std::path::PathBuf;
use std::{fmt, fs};

use subtle::ConstantTimeEq;

/// Text that must not be seen.
#[derive(Clone)]
pub struct Secret(Box<str>);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<Box<str>>) -> Secret {
        Secret(text.into())
    }

    /// The text itself, for the one place that must send or digest it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Compares in constant time.
    pub fn equals(&self, other: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(other).into()
    }
}

/// Where a secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// In this file.
    File(PathBuf),
    /// In this environment variable.
    Env(String),
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretSource::File(path) => write!(f, "file {}", path.display()),
            SecretSource::Env(name) => write!(f, "environment variable {name}"),
        }
    }
}

impl SecretSource {
    /// Reads it, as it is now. The error says what is wrong.
    pub fn read(&self) -> Result<Secret, String> {
        let text = match self {
            SecretSource::File(path) => fs::read_to_string(path).map_err(|e| e.to_string()),
            SecretSource::Env(name) => std::env::var(name).map_err(|e| match e {
                VarError::NotPresent => "it is not set".to_owned(),
                VarError::NotUnicode(_) => "it is not text".to_owned(),
            }),
        };
        match text.as_deref().map(str::trim) {
            Ok("") => Err(format!("the secret in {self} is empty")),
            Ok(text) => Ok(Secret::new(text)),
            Err(why) => Err(format!("can't read the secret from {self}: {why}")),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"***\"")
    }
}
