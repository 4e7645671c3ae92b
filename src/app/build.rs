//! Preparation of a configuration: binds its listeners and builds its proxies, next to those that run.
//!
//! Every step that can fail is here, and none has an effect on requests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::MakeUpstream;
use crate::config;
use crate::config::Config;
use crate::policy::client_limits::ClientLimits;
use crate::policy::routing::origin::Origin;
use crate::process;
use crate::proxy::active::ActiveConfig;
use crate::proxy::upstream_state::UpstreamState;
use crate::proxy::{Proxy, SharedState};
use crate::secret::Secret;
use crate::server;

/// A configuration with its listeners bound and its proxies built, ready to take effect.
pub(super) struct PreparedConfig {
    pub(super) upstreams: Vec<PreparedUpstream>,
    pub(super) admin: Option<PreparedListener>,
    pub(super) probes: Option<PreparedListener>,
    pub(super) limits: ClientLimits,
    pub(super) grace: Duration,
    /// The lines to print at startup.
    pub(super) lines: Vec<String>,
}

/// A prepared upstream with its listener.
pub(super) struct PreparedUpstream {
    pub(super) listen: SocketAddr,
    /// Index of the running listener that is kept. `None` if the listener is new.
    pub(super) kept: Option<usize>,
    pub(super) opened: Option<TcpListener>,
    pub(super) address: SocketAddr,
    pub(super) proxy: Arc<Proxy>,
    pub(super) tls: Option<TlsAcceptor>,
}

/// The prepared admin or probes listener.
pub(super) struct PreparedListener {
    pub(super) listen: SocketAddr,
    /// `None` if the listener already runs.
    pub(super) opened: Option<TcpListener>,
    pub(super) address: SocketAddr,
    pub(super) token: Option<Secret>,
}

/// A running listener: its configured and its actual address.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunningListener {
    pub(super) listen: SocketAddr,
    pub(super) address: SocketAddr,
}

/// The proxies and listeners that run now.
pub(super) struct RunningState<'s> {
    pub(super) active: &'s ActiveConfig,
    pub(super) upstreams: Vec<RunningListener>,
    pub(super) admin: Option<RunningListener>,
    pub(super) probes: Option<RunningListener>,
}

impl RunningState<'_> {
    /// Binds the listeners that are not bound yet, and builds every proxy. The error is one line of text.
    pub(super) fn prepare(
        &self,
        config: Config,
        shared: &Arc<SharedState>,
        make: MakeUpstream<'_>,
    ) -> Result<PreparedConfig, String> {
        let mut lines = Vec::new();
        let limits = within_open_files(config.limits, config.upstreams.len(), &mut lines);
        let mut free: Vec<usize> = (0..self.upstreams.len()).collect();
        let mut upstreams = Vec::new();
        for upstream in config.upstreams {
            let kept = free.iter().position(|at| self.upstreams[*at].listen == upstream.listen);
            let kept = kept.map(|at| free.remove(at));
            upstreams.push(self.prepare_upstream(upstream, kept, shared, make, &mut lines)?);
        }
        let admin = config.admin.map(|admin| (admin.listen, admin.token));
        let admin = admin.map(|(listen, token)| prepare_listener(self.admin, listen, token, "admin")).transpose()?;
        if let Some(PreparedListener { address, token, .. }) = &admin {
            let token = if token.is_some() { "set" } else { "none" };
            lines.push(format!("listening admin addr={address} token={token}"));
        }
        let probes = config.probes.map(|listen| prepare_listener(self.probes, listen, None, "probes")).transpose()?;
        lines.extend(probes.iter().map(|probes| format!("listening probes addr={}", probes.address)));
        lines.extend(config.notes);
        Ok(PreparedConfig { upstreams, admin, probes, limits, grace: config.grace, lines })
    }

    /// `kept`: index of the running listener that the upstream takes over.
    fn prepare_upstream(
        &self,
        upstream: config::UpstreamConfig,
        kept: Option<usize>,
        shared: &Arc<SharedState>,
        make: MakeUpstream<'_>,
        lines: &mut Vec<String>,
    ) -> Result<PreparedUpstream, String> {
        let listen = upstream.listen;
        let what = format!("upstream {}", upstream.name);
        let named = |error: String| format!("{what}: {error}");
        let running = kept.map(|at| self.upstreams[at].address);
        let (opened, address) = opened(running, listen, &what)?;
        lines.push(listening_line(&upstream, address));
        let tls = upstream.listen_tls.as_ref().map(server::acceptor).transpose().map_err(named)?;
        let real = make(&upstream, &shared.clock).map_err(named)?;
        let mut upstream = UpstreamState::new(upstream.into_settings(), real, address.port());
        if let Some(before) = self.active.proxies().iter().find(|proxy| proxy.upstream.id == upstream.id) {
            upstream.inherit(&before.upstream);
        }
        let proxy = Arc::new(Proxy::new(shared, upstream));
        Ok(PreparedUpstream { listen, kept, opened, address, proxy, tls })
    }
}

fn prepare_listener(
    running: Option<RunningListener>,
    listen: SocketAddr,
    token: Option<Secret>,
    what: &str,
) -> Result<PreparedListener, String> {
    let running = running.filter(|running| running.listen == listen).map(|running| running.address);
    let (opened, address) = opened(running, listen, what)?;
    Ok(PreparedListener { listen, opened, address, token })
}

/// Returns a new socket, or `None` if the listener already runs, and the listener's address.
fn opened(
    running: Option<SocketAddr>,
    listen: SocketAddr,
    what: &str,
) -> Result<(Option<TcpListener>, SocketAddr), String> {
    if let Some(address) = running {
        return Ok((None, address));
    }
    let socket = server::bind(listen, what)?;
    let address = socket.local_addr().map_err(|e| format!("{what}: {e}"))?;
    Ok((Some(socket), address))
}

/// Limits client connections to three quarters of the files that this process may open, divided among the listeners.
/// The rest is for upstreams, Redis and the process itself.
fn within_open_files(mut limits: ClientLimits, listeners: usize, lines: &mut Vec<String>) -> ClientLimits {
    let files = process::raise_open_files_limit();
    let most = usize::try_from(files / 4 * 3).unwrap_or(usize::MAX) / listeners.max(1);
    if limits.connections > most {
        lines.push(format!(
            "limits.connections = {} is lowered to {most}: this process may open {files} files (ulimit -n)",
            limits.connections
        ));
        limits.connections = most;
    }
    limits
}

fn listening_line(upstream: &config::UpstreamConfig, address: SocketAddr) -> String {
    let to = match &upstream.origin {
        origin @ Origin::Fixed { .. } => origin.to_text(),
        Origin::Hosts(patterns) => format!("{} host patterns", patterns.len()),
    };
    let config::UpstreamConfig { name, profile, rules, .. } = upstream;
    format!("listening upstream={name} addr={address} -> {to} profile={profile} rules={rules}")
}
