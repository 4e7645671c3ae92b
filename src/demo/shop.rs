//! The mock shop: a Shopify-style REST Admin API with a leaky bucket for each token and fault injection.
//!
//! Lists have cursor pagination. The token selects the shop. `POST /__faults` sets the faults, `GET /__stats` returns
//! the request counts.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Request, Response, StatusCode};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::api::{Catalogue, json, set};
use super::bucket::{BucketResult, LeakyBucket};
use crate::clock::Clock;

/// Access tokens: two apps in the first shop, one in the second.
pub const TOKENS: [&str; 3] = ["shpat_shop0_app0", "shpat_shop0_app1", "shpat_shop1_app0"];
const SHOP_OF: [usize; 3] = [0, 0, 1];

const TOKEN: HeaderName = HeaderName::from_static("x-shopify-access-token");
const CALL_LIMIT: HeaderName = HeaderName::from_static("x-shopify-shop-api-call-limit");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Options of the mock shop.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Products in each shop.
    pub products: usize,
    /// Size of a bucket, in calls.
    pub bucket: u32,
    /// Calls that leak out of a bucket per second.
    pub leak: f64,
    /// The faults to inject.
    pub faults: Faults,
}

/// Injected faults, as fractions of all responses (0 to 1).
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Mean latency of a response; each one varies by up to half of it.
    #[serde(with = "duration_text")]
    pub latency: Duration,
    /// 503 responses.
    pub errors: f64,
    /// Requests that never get a response.
    pub hangs: f64,
    /// Responses that are truncated in the body.
    pub truncated: f64,
    /// Connections that are reset before the response.
    pub resets: f64,
}

mod duration_text {
    //! Serialization of a duration as text, such as `"2s"`.

    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*duration))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        crate::config::parse_duration(&text).map_err(serde::de::Error::custom)
    }
}

/// The fault injected into a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Error,
    Hang,
    Truncate,
    Reset,
}

/// Both shops, with their buckets and faults.
#[derive(Debug)]
pub struct Shop {
    options: Options,
    clock: Clock,
    state: Mutex<ShopState>,
    requests: AtomicU64,
    throttled: AtomicU64,
}

#[derive(Debug)]
struct ShopState {
    shelves: Catalogue,
    buckets: HashMap<String, LeakyBucket>,
    faults: Faults,
    /// Number of requests for each target.
    attempts: HashMap<String, u32>,
}

type ShopResponse = Response<UnsyncBoxBody<Bytes, ConnectionAborted>>;

/// Error: the connection is deliberately aborted.
#[derive(Debug)]
struct ConnectionAborted;

impl std::fmt::Display for ConnectionAborted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cut on purpose")
    }
}

impl std::error::Error for ConnectionAborted {}

impl Shop {
    /// Creates both shops with `options.products` products each.
    pub fn new(options: Options, clock: Clock) -> Shop {
        let shelves = Catalogue::new(options.products);
        let state = ShopState { shelves, buckets: HashMap::new(), faults: options.faults, attempts: HashMap::new() };
        Shop { options, clock, state: Mutex::new(state), requests: AtomicU64::new(0), throttled: AtomicU64::new(0) }
    }

    /// Returns the number of requests so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Empties all buckets.
    pub fn refill(&self) {
        self.lock().buckets.clear();
    }

    fn lock(&self) -> MutexGuard<'_, ShopState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<ShopResponse, ConnectionAborted> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| ConnectionAborted)?.to_bytes();
        match parts.uri.path() {
            "/__stats" => return Ok(full(json(StatusCode::OK, &self.stats()))),
            "/__faults" => return Ok(full(self.set_faults(&body))),
            _ => {}
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
        let response = match self.admit(&parts.headers) {
            Err(refusal) => *refusal,
            Ok((shop, used)) => {
                let mut response = self.lock().shelves.serve(shop, &parts, &body);
                set(response.headers_mut(), REQUEST_ID, &format!("{number:032x}"));
                set(response.headers_mut(), CALL_LIMIT, &format!("{used}/{}", self.options.bucket));
                response
            }
        };
        // A 429 is sent at once; all other responses are delayed.
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            return Ok(full(response));
        }
        let (fault, delay) = self.fate(number, target);
        tokio::time::sleep(delay).await;
        match fault {
            Fault::None => Ok(full(response)),
            Fault::Error => {
                Ok(full(json(StatusCode::SERVICE_UNAVAILABLE, &json!({"errors": "Service Unavailable"}))))
            }
            Fault::Hang => std::future::pending().await,
            Fault::Truncate => Ok(truncated(response)),
            Fault::Reset => Err(ConnectionAborted),
        }
    }

    /// Returns the fault and delay of a request. Faults are spread evenly over the requests for each target (multiples
    /// of the golden ratio), so that results do not depend on chance: at a rate of one half, half of the requests fail,
    /// and never more than two in a row.
    fn fate(&self, number: u64, target: String) -> (Fault, Duration) {
        const GOLDEN: f64 = 0.618_033_988_749_895;
        let mut state = self.lock();
        let faults = state.faults;
        let start = f64::from(blake3::hash(target.as_bytes()).as_bytes()[0]) / 256.0;
        let turn = state.attempts.entry(target).or_default();
        *turn = turn.wrapping_add(1);
        let roll = (start + f64::from(*turn) * GOLDEN).fract();
        drop(state);
        let digest = blake3::hash(&number.to_be_bytes());
        let part =
            |i: usize| f64::from(u16::from_be_bytes([digest.as_bytes()[i], digest.as_bytes()[i + 1]])) / 65536.0;
        let mut edge = 0.0;
        let kinds = [
            (faults.errors, Fault::Error),
            (faults.hangs, Fault::Hang),
            (faults.truncated, Fault::Truncate),
            (faults.resets, Fault::Reset),
        ];
        let hit = kinds.into_iter().find(|(share, _)| {
            edge += share;
            roll < edge
        });
        (hit.map_or(Fault::None, |(_, fault)| fault), faults.latency.mul_f64(0.5 + part(2)))
    }

    fn stats(&self) -> Value {
        json!({"requests": self.requests(), "throttled": self.throttled.load(Ordering::Relaxed)})
    }

    fn set_faults(&self, body: &[u8]) -> Response<Bytes> {
        match serde_json::from_slice::<Faults>(body) {
            Ok(faults) => {
                self.lock().faults = faults;
                json(StatusCode::OK, &json!({"faults": faults}))
            }
            Err(error) => json(StatusCode::BAD_REQUEST, &json!({"errors": error.to_string()})),
        }
    }

    /// Returns the shop that a request is for and the level of its bucket, or a 401 or 429 response.
    fn admit(&self, headers: &HeaderMap) -> Result<(usize, u32), Box<Response<Bytes>>> {
        let token = headers.get(TOKEN).and_then(|token| token.to_str().ok()).unwrap_or_default();
        let Some(app) = TOKENS.iter().position(|known| *known == token) else {
            let message = "[API] Invalid API key or access token (unrecognized login or wrong password)";
            return Err(json(StatusCode::UNAUTHORIZED, &json!({"errors": message})).into());
        };
        let (size, leak, now) = (self.options.bucket, self.options.leak, self.clock.instant());
        let mut state = self.lock();
        let bucket = state.buckets.entry(token.to_owned()).or_insert_with(|| LeakyBucket::new(now));
        match bucket.pour(now, size, leak) {
            BucketResult::Fits(used) => Ok((SHOP_OF[app], used)),
            BucketResult::Full(seconds) => {
                self.throttled.fetch_add(1, Ordering::Relaxed);
                let message = format!(
                    "Exceeded {leak} calls per second for api client. Reduce request rates to resume uninterrupted service."
                );
                let mut response = json(StatusCode::TOO_MANY_REQUESTS, &json!({"errors": message}));
                set(response.headers_mut(), RETRY_AFTER, &format!("{seconds:.1}"));
                set(response.headers_mut(), CALL_LIMIT, &format!("{size}/{size}"));
                Err(response.into())
            }
        }
    }
}

fn full(response: Response<Bytes>) -> ShopResponse {
    response.map(|body| Full::new(body).map_err(|never| match never {}).boxed_unsync())
}

/// Returns a response with the Content-Length of the complete body and half of its data.
fn truncated(response: Response<Bytes>) -> ShopResponse {
    let (mut parts, body) = response.into_parts();
    parts.headers.insert(http::header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    let half = body.slice(..body.len() / 2);
    Response::from_parts(parts, TruncatedBody { first: Some(half), paused: false }.boxed_unsync())
}

/// A body that ends in an error after its data has been sent.
struct TruncatedBody {
    first: Option<Bytes>,
    paused: bool,
}

impl HttpBody for TruncatedBody {
    type Data = Bytes;
    type Error = ConnectionAborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ConnectionAborted>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if std::mem::replace(&mut self.paused, true) {
            return Poll::Ready(Some(Err(ConnectionAborted)));
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Serves until `stop` turns true.
pub async fn serve(listener: TcpListener, shop: Arc<Shop>, mut stop: watch::Receiver<bool>) {
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    tokio::pin!(stopped);
    loop {
        let accepted = tokio::select! {
            () = &mut stopped => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else { continue };
        tokio::spawn(connection(stream, shop.clone()));
    }
}

async fn connection(stream: TcpStream, shop: Arc<Shop>) {
    let _ = stream.set_nodelay(true);
    let Ok(second) = stream.into_std().and_then(|stream| Ok((stream.try_clone()?, stream))) else { return };
    let (handle, stream) = second;
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    let handle = Arc::new(handle);
    let service = service_fn(move |request| {
        let (shop, handle) = (shop.clone(), handle.clone());
        async move {
            match shop.answer(request).await {
                Ok(answer) => Ok::<_, ConnectionAborted>(answer),
                Err(cut) => {
                    // Closing a socket with a linger time of zero sends a reset.
                    let _ = socket2::SockRef::from(&*handle).set_linger(Some(Duration::ZERO));
                    Err(cut)
                }
            }
        }
    });
    let served = http1::Builder::new().title_case_headers(true).serve_connection(TokioIo::new(stream), service);
    let _: Result<(), hyper::Error> = served.await;
}
