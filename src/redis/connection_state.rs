//! Counters and state of a connection to Redis, as in `/stats` and `/health`.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::telemetry::Histogram;

/// Counters of a connection.
#[derive(Debug, Default)]
pub(super) struct ConnectionCounters {
    pub(super) ok: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) deadline_missed: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) unasked: AtomicU64,
    pub(super) connections: AtomicU64,
    pub(super) latencies: Histogram,
}

/// The state of a connection, as in `/stats` and `/health`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ConnectionState {
    /// Whether there is a connection.
    pub connected: bool,
    /// `closed` or `open`.
    pub breaker: &'static str,
    /// Commands that succeeded.
    pub ok: u64,
    /// Commands that got an error reply.
    pub refused: u64,
    /// Commands without a reply in time.
    pub missed: u64,
    /// Commands that failed because the connection was lost.
    pub lost: u64,
    /// Commands not sent: the breaker was open, there was no connection, or too many were in flight.
    pub unasked: u64,
    /// Connections made.
    pub connections: u64,
    /// Median (p50) and 99th percentile (p99) of command latency, in milliseconds. Not recorded for a connection whose
    /// commands wait at the server.
    pub p50_ms: f64,
    /// See `p50_ms`.
    pub p99_ms: f64,
}

impl ConnectionCounters {
    /// Returns the counts, and the state of the connection and of its circuit breaker.
    pub(super) fn state(&self, connected: bool, breaker_closed: bool) -> ConnectionState {
        ConnectionState {
            connected,
            breaker: if breaker_closed { "closed" } else { "open" },
            ok: self.ok.load(Relaxed),
            refused: self.refused.load(Relaxed),
            missed: self.deadline_missed.load(Relaxed),
            lost: self.lost.load(Relaxed),
            unasked: self.unasked.load(Relaxed),
            connections: self.connections.load(Relaxed),
            p50_ms: self.latencies.quantile_ms(0.5),
            p99_ms: self.latencies.quantile_ms(0.99),
        }
    }
}
