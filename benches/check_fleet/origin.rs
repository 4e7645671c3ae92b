//! An origin whose resources have versions.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::harness::read_head;

pub(crate) const RESOURCES: usize = 6;

/// Starts an origin: GET returns the version of a resource, after up to 10 ms, and PUT raises it.
pub(crate) async fn origin() -> (SocketAddr, Arc<[AtomicU64; RESOURCES]>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let versions: Arc<[AtomicU64; RESOURCES]> = Arc::default();
    let shared = versions.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let versions = shared.clone();
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                let mut number = 0u64;
                loop {
                    let Some(end) = read_head(&mut stream, &mut buffer).await else { return };
                    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
                    let is_write = head.starts_with("PUT");
                    // A PUT has a body of one byte.
                    while buffer.len() < end + usize::from(is_write) {
                        if !stream.read_buf(&mut buffer).await.is_ok_and(|read| read > 0) {
                            return;
                        }
                    }
                    buffer.drain(..end + usize::from(is_write));
                    let digits = head.split("/r/").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or("0");
                    let version = &versions[digits.parse::<usize>().expect("a resource")];
                    let version = if is_write {
                        version.fetch_add(1, Ordering::SeqCst) + 1
                    } else {
                        version.load(Ordering::SeqCst)
                    };
                    number += 1;
                    // Between reading the version and responding, others may write.
                    sleep(Duration::from_millis((version * 7 + number * 3) % 11)).await;
                    let body = version.to_string();
                    let response = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    if stream.write_all(response.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, versions)
}
