//! TLS of our own connections, to upstreams and to Redis, and of clients': rustls with ring; the system's roots, or
//! Mozilla's where the system has none.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WantsClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, ServerConfig};

use crate::config::{ListenTls, Tls};

/// The client's side of TLS, for connections that never use it: nobody is trusted, and no file is read.
pub fn unused_client_config() -> Result<ClientConfig, String> {
    with_roots(RootCertStore::empty()).map(ConfigBuilder::<ClientConfig, WantsClientCert>::with_no_client_auth)
}

fn with_roots(roots: RootCertStore) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(builder.map_err(|e| e.to_string())?.with_root_certificates(roots))
}

/// The client's side of TLS. The error is one clear line.
pub fn client_config(tls: &Tls) -> Result<ClientConfig, String> {
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

/// The server's side of TLS: HTTP/2 or HTTP/1.1, as the client likes (ALPN). The error is one clear line.
pub fn server_config(tls: &ListenTls) -> Result<ServerConfig, String> {
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
