//! What every command needs of its process: a line on stdout, and word of when to stop.

/// Prints a line. Whoever read our output may have left: that ends no sidecar.
pub fn say(line: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Turns true at SIGTERM or SIGINT; a second one ends the process at once.
pub fn stop_signal() -> Result<tokio::sync::watch::Receiver<bool>, String> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut int = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        for already in [false, true] {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            if already {
                std::process::exit(130);
            }
            stop.send_replace(true);
        }
    });
    Ok(stopped)
}

/// So many files this process may open.
pub fn open_files_limit() -> u64 {
    rlimit::Resource::NOFILE.get_soft().unwrap_or(1024)
}

/// Lets this process open as many files as it may, and says how many that are.
pub fn open_files() -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024)
}
