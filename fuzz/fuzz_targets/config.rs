//! Fuzzes the configuration parser: a configuration or errors, no panic.
#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(errors) = sidecache::config::from_text("fuzz.toml", text, Path::new("/nowhere")) {
        assert!(!errors.is_empty());
    }
});
