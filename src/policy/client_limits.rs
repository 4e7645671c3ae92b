//! Limits on client connections and requests.

use std::time::Duration;

/// Limits on what clients may do.
#[derive(Debug, Clone, Copy)]
pub struct ClientLimits {
    /// Bytes of a request body.
    pub request_body: u64,
    /// Bytes of all header lines.
    pub headers: u64,
    /// Bytes of the request target.
    pub url: u64,
    /// Open client connections per listener.
    pub connections: usize,
    /// From a request's first byte to the end of its head.
    pub header_time: Duration,
    /// An idle connection is closed after this.
    pub keep_alive: Duration,
    /// A client that takes nothing for so long is cut.
    pub write_stall: Duration,
    /// The same, for one that others wait for behind a full window.
    pub shared_write_stall: Duration,
}
