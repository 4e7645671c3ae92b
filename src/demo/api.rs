//! REST Admin API of the mock shop: lists with cursor pagination, single resources, and writes to products.

use std::collections::HashMap;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, LINK};
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::catalogue;

const VERSION: HeaderName = HeaderName::from_static("x-shopify-api-version");

/// Maximum number of items on a page.
const MAX_LIMIT: usize = 250;

/// The resources of both shops.
#[derive(Debug)]
pub(super) struct Catalogue {
    products: [Vec<Value>; 2],
    /// Number of products created by requests.
    made: u64,
}

impl Catalogue {
    pub(super) fn new(products: usize) -> Catalogue {
        Catalogue { products: [0, 1].map(|shop| catalogue::products(shop, products)), made: 0 }
    }

    /// Returns the response to a request that the rate limit has admitted.
    pub(super) fn serve(&mut self, shop: usize, parts: &http::request::Parts, body: &[u8]) -> Response<Bytes> {
        let path: Vec<&str> = parts.uri.path().trim_matches('/').split('/').collect();
        let ["admin", "api", version, rest @ ..] = path.as_slice() else { return not_found() };
        let mut response = match (&parts.method, rest) {
            (&Method::GET, ["shop.json"]) => json(StatusCode::OK, &catalogue::shop(shop)),
            (&Method::GET, ["products.json"]) => list(&self.products[shop], parts),
            (&Method::GET, ["products", "count.json"]) => {
                json(StatusCode::OK, &json!({"count": self.products[shop].len()}))
            }
            (&Method::POST, ["products.json"]) => self.create(shop, body),
            (method, ["products", file]) => match file.strip_suffix(".json").and_then(|id| id.parse().ok()) {
                Some(id) => self.product(shop, method, id, body),
                None => not_found(),
            },
            (&Method::GET, [list]) => {
                let name = list.trim_end_matches(".json");
                let found = catalogue::others(shop, name);
                found.map_or_else(not_found, |items| json(StatusCode::OK, &json!({name: items})))
            }
            _ => not_found(),
        };
        set(response.headers_mut(), VERSION, version);
        response
    }

    fn create(&mut self, shop: usize, body: &[u8]) -> Response<Bytes> {
        let Some(Value::Object(fields)) = fields(body) else { return unprocessable() };
        let products = &mut self.products[shop];
        self.made += 1;
        let id = catalogue::FIRST_ID + 900_000_000_000 + self.made;
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

/// Sets a header field if `value` is a valid field value.
pub(super) fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
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

/// Returns one page. The cursor is the offset in an opaque form, so that clients do not compute with it.
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

/// Returns a JSON response.
pub(super) fn json(status: StatusCode, body: &Value) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}
