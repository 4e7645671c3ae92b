//! A Shopify-style shop: REST Admin with cursor pages, a leaky bucket for each token, and faults on request.
//!
//! A token tells which shop is meant. `POST /__faults` sets faults, `GET /__stats` counts requests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, LINK, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::bucket::{Bucket, Poured};
use super::catalogue;
use crate::clock::Clock;

/// Tokens and their shops: two apps in the first shop, one in the second.
pub const TOKENS: [&str; 3] = ["shpat_shop0_app0", "shpat_shop0_app1", "shpat_shop1_app0"];
const SHOP_OF: [usize; 3] = [0, 0, 1];

const TOKEN: HeaderName = HeaderName::from_static("x-shopify-access-token");
const CALL_LIMIT: HeaderName = HeaderName::from_static("x-shopify-shop-api-call-limit");
const VERSION: HeaderName = HeaderName::from_static("x-shopify-api-version");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The largest page.
const MAX_LIMIT: usize = 250;

/// How a shop is set up.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Products in each shop.
    pub products: usize,
    /// Size of a bucket.
    pub bucket: u32,
    /// Calls that leak out of it per second.
    pub leak: f64,
    /// What goes wrong.
    pub faults: Faults,
}

/// What goes wrong, as parts of all answers.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Every answer takes so long, give or take half.
    #[serde(with = "duration_text")]
    pub latency: Duration,
    /// 503.
    pub errors: f64,
    /// No answer at all.
    pub hangs: f64,
    /// Broken off in the body.
    pub truncated: f64,
    /// Reset before the answer.
    pub resets: f64,
}

mod duration_text {
    //! `"2s"`.

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

/// Which fault a request meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Error,
    Hang,
    Truncate,
    Reset,
}

/// Both shops, their buckets and their faults.
#[derive(Debug)]
pub struct Shop {
    options: Options,
    clock: Clock,
    state: Mutex<State>,
    requests: AtomicU64,
    throttled: AtomicU64,
}

#[derive(Debug)]
struct State {
    products: [Vec<Value>; 2],
    buckets: HashMap<String, Bucket>,
    faults: Faults,
    next_id: u64,
}

type Answer = Response<UnsyncBoxBody<Bytes, Cut>>;

/// The connection ends here, on purpose.
#[derive(Debug)]
struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cut on purpose")
    }
}

impl std::error::Error for Cut {}

impl Shop {
    /// Two shops with full shelves.
    pub fn new(options: Options, clock: Clock) -> Shop {
        let products = [0, 1].map(|shop| catalogue::products(shop, options.products));
        let state = State { products, buckets: HashMap::new(), faults: options.faults, next_id: 0 };
        Shop { options, clock, state: Mutex::new(state), requests: AtomicU64::new(0), throttled: AtomicU64::new(0) }
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Empties all buckets.
    pub fn refill(&self) {
        self.lock().buckets.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Answer, Cut> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
        match parts.uri.path() {
            "/__stats" => return Ok(full(json(StatusCode::OK, &self.stats()))),
            "/__faults" => return Ok(full(self.set_faults(&body))),
            _ => {}
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let (fault, delay) = self.fate(number);
        let response = match self.admit(&parts.headers) {
            Err(refusal) => refusal,
            Ok((shop, used)) => {
                let mut response = self.serve(shop, &parts, &body);
                set(response.headers_mut(), CALL_LIMIT, &format!("{used}/{}", self.options.bucket));
                response
            }
        };
        // A full bucket answers at once; everything else takes its time.
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            return Ok(full(response));
        }
        tokio::time::sleep(delay).await;
        match fault {
            Fault::None => Ok(full(response)),
            Fault::Error => {
                Ok(full(json(StatusCode::SERVICE_UNAVAILABLE, &json!({"errors": "Service Unavailable"}))))
            }
            Fault::Hang => std::future::pending().await,
            Fault::Truncate => Ok(truncated(response)),
            Fault::Reset => Err(Cut),
        }
    }

    /// A request's fault and delay: the same sequence at every start.
    fn fate(&self, number: u64) -> (Fault, Duration) {
        let faults = self.lock().faults;
        let digest = blake3::hash(&number.to_be_bytes());
        let part =
            |i: usize| f64::from(u16::from_be_bytes([digest.as_bytes()[i], digest.as_bytes()[i + 1]])) / 65536.0;
        let roll = part(0);
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

    /// Which shop a request is for, and how full its bucket is; or 401, or 429.
    fn admit(&self, headers: &HeaderMap) -> Result<(usize, u32), Response<Bytes>> {
        let token = headers.get(TOKEN).and_then(|token| token.to_str().ok()).unwrap_or_default();
        let Some(app) = TOKENS.iter().position(|known| *known == token) else {
            let message = "[API] Invalid API key or access token (unrecognized login or wrong password)";
            return Err(json(StatusCode::UNAUTHORIZED, &json!({"errors": message})));
        };
        let (size, leak, now) = (self.options.bucket, self.options.leak, self.clock.instant());
        let mut state = self.lock();
        let bucket = state.buckets.entry(token.to_owned()).or_insert_with(|| Bucket::new(now));
        match bucket.pour(now, size, leak) {
            Poured::Fits(used) => Ok((SHOP_OF[app], used)),
            Poured::Full(seconds) => {
                self.throttled.fetch_add(1, Ordering::Relaxed);
                let message = format!(
                    "Exceeded {leak} calls per second for api client. Reduce request rates to resume uninterrupted service."
                );
                let mut response = json(StatusCode::TOO_MANY_REQUESTS, &json!({"errors": message}));
                set(response.headers_mut(), RETRY_AFTER, &format!("{seconds:.1}"));
                set(response.headers_mut(), CALL_LIMIT, &format!("{size}/{size}"));
                Err(response)
            }
        }
    }

    fn serve(&self, shop: usize, parts: &http::request::Parts, body: &[u8]) -> Response<Bytes> {
        let path: Vec<&str> = parts.uri.path().trim_matches('/').split('/').collect();
        let ["admin", "api", version, rest @ ..] = path.as_slice() else { return not_found() };
        let mut state = self.lock();
        let mut response = match (&parts.method, rest) {
            (&Method::GET, ["shop.json"]) => json(StatusCode::OK, &catalogue::shop(shop)),
            (&Method::GET, ["products.json"]) => list(&state.products[shop], parts),
            (&Method::GET, ["products", "count.json"]) => {
                json(StatusCode::OK, &json!({"count": state.products[shop].len()}))
            }
            (&Method::POST, ["products.json"]) => state.create(shop, body),
            (method, ["products", file]) => match file.strip_suffix(".json").and_then(|id| id.parse().ok()) {
                Some(id) => state.product(shop, method, id, body),
                None => not_found(),
            },
            (&Method::GET, [list]) => {
                let name = list.trim_end_matches(".json");
                let found = catalogue::others(shop, name);
                found.map_or_else(not_found, |items| json(StatusCode::OK, &json!({name: items})))
            }
            _ => not_found(),
        };
        drop(state);
        let headers = response.headers_mut();
        let id = format!("{:032x}", self.requests());
        set(headers, VERSION, version);
        set(headers, REQUEST_ID, &id);
        response
    }
}

impl State {
    fn create(&mut self, shop: usize, body: &[u8]) -> Response<Bytes> {
        let Some(Value::Object(fields)) = fields(body) else { return unprocessable() };
        let products = &mut self.products[shop];
        self.next_id += 1;
        let id = catalogue::FIRST_ID + 900_000_000_000 + self.next_id;
        let mut product = json!({
            "id": id, "admin_graphql_api_id": format!("gid://shopify/Product/{id}"), "title": null,
            "status": "active", "variants": [], "images": [], "options": [],
        });
        merge(&mut product, fields);
        product["id"] = id.into();
        products.push(product.clone());
        json(StatusCode::CREATED, &json!({"product": product}))
    }

    fn product(&mut self, shop: usize, method: &Method, id: u64, body: &[u8]) -> Response<Bytes> {
        let products = &mut self.products[shop];
        let Some(index) = products.iter().position(|product| product["id"] == id) else { return not_found() };
        match *method {
            Method::GET | Method::HEAD => json(StatusCode::OK, &json!({"product": products[index]})),
            Method::PUT => {
                let Some(Value::Object(fields)) = fields(body) else { return unprocessable() };
                merge(&mut products[index], fields);
                products[index]["id"] = id.into();
                json(StatusCode::OK, &json!({"product": products[index]}))
            }
            Method::DELETE => {
                products.remove(index);
                json(StatusCode::OK, &json!({}))
            }
            _ => json(StatusCode::NOT_ACCEPTABLE, &json!({"errors": "Not Acceptable"})),
        }
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn fields(body: &[u8]) -> Option<Value> {
    serde_json::from_slice::<Value>(body).ok().and_then(|mut json| json.get_mut("product").map(Value::take))
}

fn merge(product: &mut Value, fields: serde_json::Map<String, Value>) {
    for (name, value) in fields {
        product[name] = value;
    }
}

/// One page; the cursor is the offset, in a form that invites nobody to compute with it.
fn list(products: &[Value], parts: &http::request::Parts) -> Response<Bytes> {
    let parameters: HashMap<&str, &str> =
        parts.uri.query().into_iter().flat_map(|q| q.split('&')).filter_map(|pair| pair.split_once('=')).collect();
    let limit = parameters.get("limit").and_then(|n| n.parse().ok()).unwrap_or(50).clamp(1, MAX_LIMIT);
    let cursor = parameters.get("page_info").map_or(Some(0), |text| read_cursor(text));
    let Some(start) = cursor.filter(|start| *start <= products.len()) else {
        return json(StatusCode::BAD_REQUEST, &json!({"errors": {"page_info": "Invalid value."}}));
    };
    let page = &products[start..products.len().min(start + limit)];
    let mut response = json(StatusCode::OK, &json!({"products": page}));
    let host = parts.headers.get(http::header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
    let link = |start: usize, rel: &str| {
        let (path, cursor) = (parts.uri.path(), format!("eyJ{start:08x}"));
        format!("<http://{host}{path}?limit={limit}&page_info={cursor}>; rel=\"{rel}\"")
    };
    let previous = (start > 0).then(|| link(start.saturating_sub(limit), "previous"));
    let next = (start + limit < products.len()).then(|| link(start + limit, "next"));
    let links: Vec<String> = previous.into_iter().chain(next).collect();
    if !links.is_empty() {
        set(response.headers_mut(), LINK, &links.join(", "));
    }
    response
}

fn read_cursor(text: &str) -> Option<usize> {
    usize::from_str_radix(text.strip_prefix("eyJ")?, 16).ok()
}

fn not_found() -> Response<Bytes> {
    json(StatusCode::NOT_FOUND, &json!({"errors": "Not Found"}))
}

fn unprocessable() -> Response<Bytes> {
    json(StatusCode::UNPROCESSABLE_ENTITY, &json!({"errors": {"product": ["Required parameter missing or invalid"]}}))
}

fn json(status: StatusCode, body: &Value) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

fn full(response: Response<Bytes>) -> Answer {
    response.map(|body| Full::new(body).map_err(|never| match never {}).boxed_unsync())
}

/// Announces the whole body and sends half of it.
fn truncated(response: Response<Bytes>) -> Answer {
    let (mut parts, body) = response.into_parts();
    parts.headers.insert(http::header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    let half = body.slice(..body.len() / 2);
    let cut = Full::new(half).map_err(|never| match never {}).with_trailers(async { Some(Err(Cut)) });
    Response::from_parts(parts, cut.boxed_unsync())
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
                Ok(answer) => Ok::<_, Cut>(answer),
                Err(cut) => {
                    // Closing with nothing to linger for sends a reset.
                    let _ = socket2::SockRef::from(&*handle).set_linger(Some(Duration::ZERO));
                    Err(cut)
                }
            }
        }
    });
    let served = http1::Builder::new().title_case_headers(true).serve_connection(TokioIo::new(stream), service);
    let _: Result<(), hyper::Error> = served.await;
}
