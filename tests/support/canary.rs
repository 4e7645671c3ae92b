//! Credential leak detection: searches log lines of all crates (at TRACE), admin API responses, error responses and
//! Redis values for the credentials that tests send.

use std::io;
use std::sync::{Mutex, Once, PoisonError};

use tracing_subscriber::fmt::MakeWriter;

static SECRETS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static FINDS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Minimum length of a secret. A shorter one could match by coincidence.
const MIN_LENGTH: usize = 8;

/// Registers the value of a request header as a secret if the header name denotes a credential.
pub(crate) fn learn(name: &str, value: &str) {
    let name = name.to_ascii_lowercase();
    let credential = ["authorization", "cookie", "token", "key", "secret"].iter().any(|word| name.contains(word));
    // The token may be logged without its scheme.
    let secret = value.strip_prefix("Bearer ").unwrap_or(value);
    let mut secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    if credential && secret.len() >= MIN_LENGTH && !secrets.iter().any(|known| known == secret) {
        secrets.push(secret.to_owned());
    }
}

/// Returns a description of each registered secret that occurs in `written`.
pub(crate) fn finds(place: &str, written: &[u8]) -> Vec<String> {
    let secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    let found = secrets.iter().filter(|secret| memchr::memmem::find(written, secret.as_bytes()).is_some());
    let shown = || String::from_utf8_lossy(written).chars().take(300).collect::<String>();
    found.map(|secret| format!("{secret:?} in {place}: {}", shown())).collect()
}

/// Searches `written` and records the secrets found, for [`assert_silent`].
pub(crate) fn search(place: &str, written: &[u8]) {
    let found = finds(place, written);
    FINDS.lock().unwrap_or_else(PoisonError::into_inner).extend(found);
}

/// Installs a subscriber that searches all log lines of this process.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let lines = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
        let _ = lines.with_writer(Search).try_init();
    });
}

/// Panics if a secret has been found.
pub(crate) fn assert_silent() {
    let finds = FINDS.lock().unwrap_or_else(PoisonError::into_inner);
    if !std::thread::panicking() {
        assert!(finds.is_empty(), "credentials leaked: {finds:#?}");
    }
}

#[derive(Debug, Clone, Copy)]
struct Search;

impl io::Write for Search {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        search("a log line", line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Search {
    type Writer = Search;

    fn make_writer(&self) -> Search {
        *self
    }
}
