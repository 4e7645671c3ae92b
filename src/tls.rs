//! TLS configuration of connections to upstreams and Redis, and of client connections.
//!
//! Uses rustls with ring, and the system's root certificates, or Mozilla's if the system has none.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WantsClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, ServerConfig};

/// Returns a client configuration for connections that never use TLS: it trusts no certificate, and reads no file.
pub fn unused_client_config() -> Result<ClientConfig, String> {
    with_roots(RootCertStore::empty()).map(ConfigBuilder::<ClientConfig, WantsClientCert>::with_no_client_auth)
}

fn with_roots(roots: RootCertStore) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(builder.map_err(|e| e.to_string())?.with_root_certificates(roots))
}

/// Returns a client configuration. The error is one line.
pub fn client_config(tls: &ClientTls) -> Result<ClientConfig, String> {
    let builder = with_roots(roots(tls.ca.as_deref())?)?;
    match &tls.identity {
        None => Ok(builder.with_no_client_auth()),
        Some((cert, key)) => {
            let key_der = PrivateKeyDer::from_pem_file(key).map_err(|e| format!("tls.key {}: {e}", key.display()))?;
            builder
                .with_client_auth_cert(certificates(cert)?, key_der)
                .map_err(|e| format!("tls.cert {}: {e}", cert.display()))
        }
    }
}

/// Returns a server configuration, with HTTP/2 and HTTP/1.1 by ALPN. The error is one line.
pub fn server_config(tls: &ServerTls) -> Result<ServerConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = match &tls.client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(Some(ca))?), provider).build();
            let fail = |e| format!("listen_tls.client_ca {}: {e}", ca.display());
            builder.with_client_cert_verifier(verifier.map_err(fail)?)
        }
    };
    let key =
        PrivateKeyDer::from_pem_file(&tls.key).map_err(|e| format!("listen_tls.key {}: {e}", tls.key.display()))?;
    let mut config = builder
        .with_single_cert(certificates(&tls.cert)?, key)
        .map_err(|e| format!("listen_tls.cert {}: {e}", tls.cert.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    if let Some(ca) = ca {
        for certificate in certificates(ca)? {
            roots.add(certificate).map_err(|e| format!("tls.ca {}: {e}", ca.display()))?;
        }
        return Ok(roots);
    }
    let native = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(native.certs);
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let fail = |e: rustls::pki_types::pem::Error| format!("certificate {}: {e}", path.display());
    let list: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(fail)?.collect();
    list.map_err(fail)
}

/// TLS settings of connections to an upstream or to Redis.
#[derive(Debug, Clone, Default)]
pub struct ClientTls {
    /// Root certificates (PEM) to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// Client certificate chain and key (PEM).
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// TLS settings of client connections.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// Certificate chain (PEM).
    pub cert: PathBuf,
    /// Private key (PEM).
    pub key: PathBuf,
    /// Root certificates (PEM) for client certificates, which are required if this is set.
    pub client_ca: Option<PathBuf>,
}
