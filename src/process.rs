//! Process-level functions: output to stdout, stop signals, and the limit of open files.

/// Prints a line to stdout. Ignores errors: a closed stdout must not end the process.
pub fn print_line(line: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Returns a receiver that becomes true at SIGTERM or SIGINT. A second signal ends the process at once.
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

/// Returns the soft limit of open files of this process.
pub fn open_files_limit() -> u64 {
    rlimit::Resource::NOFILE.get_soft().unwrap_or(1024)
}

/// Raises the soft limit of open files to the hard limit, and returns it.
pub fn raise_open_files_limit() -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024)
}
