//! Baseline server: a minimal hyper HTTP/1.1 server with a header timeout and preserved header case, like the sidecar.
//! Usage: `bare ADDRESS`. The first segment of the path is the size of the response body in bytes.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:0".to_owned());
    let listener = TcpListener::bind(&address).await.expect("a free address");
    println!("listening {}", listener.local_addr().expect("bound"));
    let bodies: Arc<Mutex<HashMap<usize, Bytes>>> = Arc::default();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let bodies = bodies.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let response = answer(&request, &bodies);
                async move { Ok::<_, Infallible>(response) }
            });
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(75))
                .preserve_header_case(true)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn answer(request: &Request<Incoming>, bodies: &Mutex<HashMap<usize, Bytes>>) -> Response<Full<Bytes>> {
    let digits = request.uri().path().split('/').nth(1).unwrap_or_default();
    let size = digits.parse().unwrap_or(1024);
    let body =
        bodies.lock().expect("unpoisoned").entry(size).or_insert_with(|| Bytes::from(vec![b'x'; size])).clone();
    let mut response = Response::new(Full::new(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let cached = if request.uri().path().starts_with("/pass") { "no-store" } else { "max-age=36000" };
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(cached));
    response
}
