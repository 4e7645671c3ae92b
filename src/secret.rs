//! Secrets, read from a file or an environment variable. Their `Debug` output is redacted.

use std::env::VarError;
use std::path::PathBuf;
use std::{fmt, fs};

use subtle::ConstantTimeEq;

/// A secret text.
#[derive(Clone)]
pub struct Secret(Box<str>);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<Box<str>>) -> Secret {
        Secret(text.into())
    }

    /// Returns the text, for the one place that must send or digest it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Returns true if the secret equals `other`. Compares in constant time.
    pub fn equals(&self, other: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(other).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"***\"")
    }
}

/// The source of a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A file.
    File(PathBuf),
    /// An environment variable.
    Env(String),
    /// The password in a URL, which is itself secret: `redis://user:password@host`.
    PasswordOfUrl(Box<SecretSource>),
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretSource::File(path) => write!(f, "file {}", path.display()),
            SecretSource::Env(name) => write!(f, "environment variable {name}"),
            SecretSource::PasswordOfUrl(url) => write!(f, "URL in the {url}"),
        }
    }
}

/// Returns the user name and the password of a URL, decoded (RFC 3986 §3.2.1). `None` if it has neither.
pub fn userinfo(url: &str) -> Option<(Option<String>, Option<String>)> {
    let authority = url.split_once("://")?.1.split(['/', '?']).next()?;
    let (userinfo, _) = authority.rsplit_once('@')?;
    let (user, password) =
        userinfo.split_once(':').map_or((userinfo, None), |(user, password)| (user, Some(password)));
    let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    Some(((!user.is_empty()).then(|| decoded(user)), password.map(decoded)))
}

impl SecretSource {
    /// Reads the present value of the secret, without surrounding white space. An empty secret is an error.
    pub fn read(&self) -> Result<Secret, String> {
        let text = match self {
            SecretSource::File(path) => fs::read_to_string(path).map_err(|e| e.to_string()),
            SecretSource::Env(name) => std::env::var(name).map_err(|e| match e {
                VarError::NotPresent => "it is not set".to_owned(),
                VarError::NotUnicode(_) => "it is not valid UTF-8".to_owned(),
            }),
            SecretSource::PasswordOfUrl(url) => {
                let url = url.read()?;
                let userinfo = userinfo(url.reveal()).and_then(|(_, password)| password);
                userinfo.ok_or_else(|| "it has no password".to_owned())
            }
        };
        match text.as_deref().map(str::trim) {
            Ok("") => Err(format!("the secret in {self} is empty")),
            Ok(text) => Ok(Secret::new(text)),
            Err(why) => Err(format!("can't read the secret from {self}: {why}")),
        }
    }
}
