//! What a configuration asks for, bound and built beside what runs: all that can fail, and nothing that shows.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::MakeUpstream;
use crate::config::{self, Config, Limits, Secret};
use crate::process;
use crate::proxy::face::Stage;
use crate::proxy::site::Site;
use crate::proxy::{Commons, Proxy};
use crate::server;

/// Ready to be shown.
pub(super) struct Next {
    pub(super) upstreams: Vec<NextUpstream>,
    pub(super) admin: Option<NextAsked>,
    pub(super) probes: Option<NextAsked>,
    pub(super) limits: Limits,
    pub(super) grace: Duration,
    /// What to tell at start, one line each.
    pub(super) lines: Vec<String>,
}

/// An upstream with its listener.
pub(super) struct NextUpstream {
    pub(super) listen: SocketAddr,
    /// The one that runs; none: it is new.
    pub(super) kept: Option<usize>,
    pub(super) opened: Option<TcpListener>,
    pub(super) address: SocketAddr,
    pub(super) proxy: Arc<Proxy>,
    pub(super) tls: Option<TlsAcceptor>,
}

/// The admin or the probes' listener.
pub(super) struct NextAsked {
    pub(super) listen: SocketAddr,
    /// None: it runs.
    pub(super) opened: Option<TcpListener>,
    pub(super) address: SocketAddr,
    pub(super) token: Option<Secret>,
}

/// A listener that runs: as configured, and where it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) listen: SocketAddr,
    pub(super) address: SocketAddr,
}

/// What runs now.
pub(super) struct Now<'s> {
    pub(super) stage: &'s Stage,
    pub(super) upstreams: Vec<Held>,
    pub(super) admin: Option<Held>,
    pub(super) probes: Option<Held>,
}

impl Now<'_> {
    /// Binds what is not bound yet, and builds every proxy. The error is one clear line.
    pub(super) fn prepare(
        &self,
        config: Config,
        commons: &Arc<Commons>,
        make: MakeUpstream<'_>,
    ) -> Result<Next, String> {
        let mut lines = Vec::new();
        let limits = within_open_files(config.limits, config.upstreams.len(), &mut lines);
        let mut free: Vec<usize> = (0..self.upstreams.len()).collect();
        let mut upstreams = Vec::new();
        for upstream in config.upstreams {
            let kept = free.iter().position(|at| self.upstreams[*at].listen == upstream.listen);
            let kept = kept.map(|at| free.remove(at));
            let running = kept.and_then(|at| self.upstreams.get(at)).map(|held| held.address);
            upstreams.push(self.upstream(upstream, kept, running, commons, make, &mut lines)?);
        }
        let admin = config.admin.map(|admin| (admin.listen, admin.token));
        let admin = admin.map(|(listen, token)| asked(self.admin, listen, token, "admin")).transpose()?;
        if let Some(NextAsked { address, token, .. }) = &admin {
            let token = if token.is_some() { "set" } else { "none" };
            lines.push(format!("listening admin addr={address} token={token}"));
        }
        let probes = config.probes.map(|listen| asked(self.probes, listen, None, "probes")).transpose()?;
        lines.extend(probes.iter().map(|probes| format!("listening probes addr={}", probes.address)));
        lines.extend(config.notes);
        Ok(Next { upstreams, admin, probes, limits, grace: config.grace, lines })
    }

    fn upstream(
        &self,
        upstream: config::Upstream,
        kept: Option<usize>,
        running: Option<SocketAddr>,
        commons: &Arc<Commons>,
        make: MakeUpstream<'_>,
        lines: &mut Vec<String>,
    ) -> Result<NextUpstream, String> {
        let listen = upstream.listen;
        let what = format!("upstream {}", upstream.name);
        let named = |error: String| format!("{what}: {error}");
        let (opened, address) = opened(running, listen, &what)?;
        lines.push(listening(&upstream, address));
        let tls = upstream.listen_tls.as_ref().map(server::acceptor).transpose().map_err(named)?;
        let real = make(&upstream, &commons.clock).map_err(named)?;
        let mut site = Site::new(upstream, real, address.port());
        if let Some(before) = self.stage.proxies().iter().find(|proxy| proxy.site.id == site.id) {
            site.inherit(&before.site);
        }
        let proxy = Arc::new(Proxy { commons: commons.clone(), site });
        Ok(NextUpstream { listen, kept, opened, address, proxy, tls })
    }
}

fn asked(running: Option<Held>, listen: SocketAddr, token: Option<Secret>, what: &str) -> Result<NextAsked, String> {
    let running = running.filter(|running| running.listen == listen).map(|running| running.address);
    let (opened, address) = opened(running, listen, what)?;
    Ok(NextAsked { listen, opened, address, token })
}

/// A socket, unless one runs; and where it is.
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

/// Clients may take three quarters of the files this process may open: the rest is for upstreams, Redis and us.
fn within_open_files(mut limits: Limits, listeners: usize, lines: &mut Vec<String>) -> Limits {
    let files = process::open_files();
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

fn listening(upstream: &config::Upstream, address: SocketAddr) -> String {
    let to = match &upstream.target {
        origin @ config::Target::Origin { .. } => origin.origin(),
        config::Target::Hosts(patterns) => format!("{} host patterns", patterns.len()),
    };
    let config::Upstream { name, profile, rules, .. } = upstream;
    format!("listening upstream={name} addr={address} -> {to} profile={profile} rules={rules}")
}
