//! Every credential that a test sends is looked for in everything that is written down: log lines of all crates at
//! TRACE, answers of the admin API, errors of our own, and what lies in Redis. There must be none.

use std::io;
use std::sync::{Mutex, Once, PoisonError};

use tracing_subscriber::fmt::MakeWriter;

static SECRETS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static FINDS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Shorter ones would be found by chance.
const LEAST: usize = 8;

/// A request is going out with this header: if it is a credential, it must not turn up anywhere.
pub(crate) fn learn(name: &str, value: &str) {
    let name = name.to_ascii_lowercase();
    let credential = ["authorization", "cookie", "token", "key", "secret"].iter().any(|word| name.contains(word));
    // What a scheme stands before may turn up without it.
    let secret = value.strip_prefix("Bearer ").unwrap_or(value);
    let mut secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    if credential && secret.len() >= LEAST && !secrets.iter().any(|known| known == secret) {
        secrets.push(secret.to_owned());
    }
}

/// The secrets that are in what was written there.
pub(crate) fn finds(place: &str, written: &[u8]) -> Vec<String> {
    let secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    let found = secrets.iter().filter(|secret| memchr::memmem::find(written, secret.as_bytes()).is_some());
    let shown = || String::from_utf8_lossy(written).chars().take(300).collect::<String>();
    found.map(|secret| format!("{secret:?} in {place}: {}", shown())).collect()
}

/// Notes them.
pub(crate) fn search(place: &str, written: &[u8]) {
    let found = finds(place, written);
    FINDS.lock().unwrap_or_else(PoisonError::into_inner).extend(found);
}

/// From now on all log lines of this process are searched.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let lines = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
        let _ = lines.with_writer(Search).try_init();
    });
}

/// Fails if anything was found so far.
pub(crate) fn assert_silent() {
    let finds = FINDS.lock().unwrap_or_else(PoisonError::into_inner);
    if !std::thread::panicking() {
        assert!(finds.is_empty(), "credentials were written down: {finds:#?}");
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
