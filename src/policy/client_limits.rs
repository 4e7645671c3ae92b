//! Limits on client connections and requests.

use std::time::Duration;

/// Limits on client connections and requests.
#[derive(Debug, Clone, Copy)]
pub struct ClientLimits {
    /// Maximum size of a request body, in bytes.
    pub request_body: u64,
    /// Maximum size of all header lines, in bytes.
    pub headers: u64,
    /// Maximum length of the request target, in bytes.
    pub url: u64,
    /// Maximum number of open client connections per listener.
    pub connections: usize,
    /// Maximum time from a request's first byte to the end of its head.
    pub header_time: Duration,
    /// Idle timeout, after which a keep-alive connection is closed.
    pub keep_alive: Duration,
    /// Write timeout: the connection of a client that reads nothing for this long is closed.
    pub write_stall: Duration,
    /// The same for a client that reads a shared body and, with its window full, holds up the other readers.
    pub shared_write_stall: Duration,
}
