//! `warm`: requests a list of URLs from a running sidecar, so that they are stored before clients request them.
//! The upstream's budget sets the pace: where the sidecar sends `Retry-After`, the request is retried after that time.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HOST, HeaderName, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use tokio::task::JoinSet;

use super::WarmArgs;
use super::explain::header;
use super::remote::{client, fetch_json};
use crate::body::Body;
use crate::clock::Clock;
use crate::process::print_line;
use crate::upstream::Timeouts;
use crate::upstream::UpstreamClient;
use crate::upstream::client::PooledClient;

/// Maximum number of attempts for one URL while the sidecar sends `Retry-After`.
const MAX_ATTEMPTS: u32 = 10;

/// Interval between progress messages.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Number of URLs by result.
type WarmResults = BTreeMap<String, u64>;

struct Sidecar {
    http: PooledClient,
    to: Uri,
    headers: HeaderMap,
}

pub(super) async fn warm(args: WarmArgs) -> Result<ExitCode, String> {
    let WarmArgs { remote, file, to, header: lines, jobs } = args;
    let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let urls = urls(&text).map_err(|e| format!("{}: {e}", file.display()))?;
    let to = match to {
        Some(to) => to,
        None => {
            let config = fetch_json(&client(&remote)?, "/config").await?;
            let first = &config["upstreams"][0];
            let scheme = if first["listen_tls"] == true { "https" } else { "http" };
            format!("{scheme}://{}", first["listen"].as_str().unwrap_or_default())
        }
    };
    let to: Uri = to.parse().map_err(|e| format!("--to {to:?}: {e}"))?;
    if to.authority().is_none_or(|authority| authority.port_u16() == Some(0)) {
        return Err("give the sidecar's address with --to http://127.0.0.1:18080".into());
    }
    let headers = lines.iter().map(|line| header(line)).collect::<Result<Vec<_>, _>>()?;
    let named = |(name, value): &(String, String)| {
        let name = HeaderName::try_from(name).map_err(|e| format!("-H {name}: {e}"))?;
        let value = HeaderValue::try_from(value).map_err(|e| format!("-H {name}: {e}"))?;
        Ok::<_, String>((name, value))
    };
    let headers = headers.iter().map(named).collect::<Result<HeaderMap, _>>()?;
    let limit = Duration::from_mins(5);
    let timeouts = Timeouts { connect: Duration::from_secs(2), first_byte: limit, idle: limit, fetch: limit };
    let http = PooledClient::plain(timeouts, Clock::start())?;
    let done = run(Sidecar { http, to, headers }, urls, jobs.max(1)).await;
    print_line(progress_text(&done));
    Ok(ExitCode::from(u8::from(done.keys().any(|result| result.starts_with("failed")))))
}

/// Parses one URL per line, absolute or beginning with a slash. Lines that begin with # are comments.
fn urls(text: &str) -> Result<Vec<Uri>, String> {
    let lines = text.lines().map(str::trim).enumerate();
    let urls = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).map(|(n, line)| {
        let uri: Uri = line.parse().map_err(|e| format!("line {}: {line:?} is no URL: {e}", n + 1))?;
        let rooted = uri.path().starts_with('/');
        if rooted {
            Ok(uri)
        } else {
            Err(format!("line {}: {line:?}: write the path, beginning with a slash", n + 1))
        }
    });
    urls.collect()
}

async fn run(sidecar: Sidecar, urls: Vec<Uri>, jobs: usize) -> WarmResults {
    let (all, sidecar) = (urls.len(), Arc::new(sidecar));
    let mut waiting = urls.into_iter();
    let (mut under_way, mut done) = (JoinSet::new(), WarmResults::new());
    let mut tell = tokio::time::interval(PROGRESS_INTERVAL);
    tell.tick().await;
    loop {
        while under_way.len() < jobs
            && let Some(url) = waiting.next()
        {
            let sidecar = sidecar.clone();
            under_way.spawn(async move { sidecar.ask(&url).await });
        }
        tokio::select! {
            ended = under_way.join_next() => match ended {
                Some(result) => *done.entry(result.unwrap_or_else(|e| format!("failed: {e}"))).or_default() += 1,
                None => return done,
            },
            _ = tell.tick() => {
                let _ = writeln!(std::io::stderr(), "{} of {all}: {}", done.values().sum::<u64>(), progress_text(&done));
            }
        }
    }
}

fn progress_text(done: &WarmResults) -> String {
    let results: Vec<String> = done.iter().map(|(result, count)| format!("{count} {result}")).collect();
    if results.is_empty() { "nothing yet".into() } else { results.join(", ") }
}

impl Sidecar {
    /// Requests one URL until the response is final, at most [`MAX_ATTEMPTS`] times. Returns the result as text.
    async fn ask(&self, url: &Uri) -> String {
        for _ in 0..MAX_ATTEMPTS {
            let response = match self.send(url).await {
                Ok(response) => response,
                Err(why) => return format!("failed: {why}"),
            };
            let later = matches!(response.status(), StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS);
            let wait = response.headers().get(RETRY_AFTER).filter(|_| later);
            let Some(seconds) = wait.and_then(|wait| wait.to_str().ok()?.parse::<f64>().ok()) else {
                return result_of(&response);
            };
            tokio::time::sleep(Duration::from_secs_f64(seconds.clamp(0.1, 60.0))).await;
        }
        "failed: not sent".into()
    }

    async fn send(&self, url: &Uri) -> Result<Response<()>, String> {
        let target = url.path_and_query().map_or("/", |target| target.as_str());
        let to = self.to.authority().map_or("", |to| to.as_str());
        let scheme = self.to.scheme_str().unwrap_or("http");
        let mut request = Request::builder().uri(format!("{scheme}://{to}{target}")).body(Body::Empty);
        if let Ok(request) = &mut request {
            request.headers_mut().extend(self.headers.clone());
            // On an upstream with several hosts, Host selects the host.
            let host = url.authority().map_or(to, |authority| authority.as_str());
            request.headers_mut().insert(HOST, HeaderValue::try_from(host).map_err(|e| e.to_string())?);
        }
        let response = self.http.send(request.map_err(|e| e.to_string())?).await.map_err(|e| e.to_string())?;
        let (parts, mut body) = response.into_parts();
        // Only complete responses are stored: read the body to its end.
        while let Some(chunk) = body.next().await {
            chunk.map_err(|e| e.to_string())?;
        }
        Ok(Response::from_parts(parts, ()))
    }
}

/// Returns the result as text, from the status and `Cache-Status`.
fn result_of(response: &Response<()>) -> String {
    let status = response.headers().get_all("cache-status").iter().filter_map(|value| value.to_str().ok());
    let ours = status.filter_map(|value| value.rsplit("sidecache;").next()).next_back().unwrap_or_default();
    let detail = ours.split("detail=").nth(1).and_then(|rest| rest.split(';').next());
    match (response.status(), detail) {
        (status, _) if status.is_client_error() || status.is_server_error() => format!("failed: {}", status.as_u16()),
        _ if ours.contains(" stored") => "stored".into(),
        _ if ours.contains("hit") => "stored before".into(),
        (_, Some(reason)) => format!("not stored: {}", reason.trim()),
        (_, None) => "not stored".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_list_is_parsed_and_responses_are_classified() {
        let list = urls("# all products\n/products/1?a=b\n\n  https://shop.example/products/2\n").expect("good");
        assert_eq!(list.len(), 2);
        assert!(urls("/a\nproducts\n").expect_err("no slash").starts_with("line 2"));
        let answer = |status: u16, text: &str| {
            let answer = Response::builder().status(status).header("cache-status", text).body(()).expect("an answer");
            result_of(&answer)
        };
        assert_eq!(answer(200, "cdn; hit, sidecache; fwd=uri-miss; stored"), "stored");
        assert_eq!(answer(200, "sidecache; hit; ttl=3"), "stored before");
        assert_eq!(answer(200, "sidecache; fwd=bypass; detail=rule-off"), "not stored: rule-off");
        assert_eq!(answer(404, "sidecache; fwd=uri-miss; stored"), "failed: 404");
    }
}
