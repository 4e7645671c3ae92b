//! The demo and the mock shop. Used only by the command line and the tests.

mod api;
pub mod bucket;
pub mod catalogue;
mod load;
pub mod shop;
mod table;

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::sync::watch;

use super::config;
use crate::app::App;
use crate::clock::Clock;
use crate::config::parse_duration;
use crate::process::{print_line, stop_signal};
use load::{Load, Target};
use shop::{Faults, Options, Shop};

/// Arguments of `sidecache mock-shop`.
#[derive(Debug, Clone, Args)]
pub struct ShopArgs {
    /// Where to listen
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:18090")]
    listen: SocketAddr,
    /// Products in each shop
    #[arg(long, value_name = "N", default_value_t = 5000)]
    products: usize,
    /// Mean latency of a response; each one varies by up to half of it
    #[arg(long, value_name = "DUR", value_parser = parse_duration, default_value = "0ms")]
    latency: Duration,
    /// Fraction of responses that are a 503 (0 to 1)
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    errors: f64,
    /// Fraction of requests that never get a response
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    hangs: f64,
    /// Fraction of responses that are truncated in the body
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    truncated: f64,
    /// Fraction of connections that are reset before the response
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    resets: f64,
    /// Bucket size of a token, in calls
    #[arg(long, value_name = "N", default_value_t = 40)]
    bucket: u32,
    /// Leak rate of a bucket, in calls per second
    #[arg(long, value_name = "N", default_value_t = 2.0)]
    leak: f64,
}

/// Arguments of `sidecache demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Exit after printing the table
    #[arg(long)]
    once: bool,
    /// Duration of each of the two load runs
    #[arg(long, value_name = "DUR", value_parser = parse_duration, default_value = "20s")]
    each: Duration,
}

impl From<&ShopArgs> for Options {
    fn from(args: &ShopArgs) -> Options {
        let ShopArgs { products, latency, errors, hangs, truncated, resets, bucket, leak, .. } = args.clone();
        Options { products, bucket, leak, faults: Faults { latency, errors, hangs, truncated, resets } }
    }
}

/// Runs the mock shop alone until a stop signal.
pub async fn mock_shop(args: ShopArgs) -> Result<ExitCode, String> {
    let stop = stop_signal()?;
    let listener = crate::server::bind(args.listen, "mock-shop")?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let shop = Shop::new(Options::from(&args), Clock::start());
    print_line(format!(
        "listening mock-shop addr={address} products={} tokens={}",
        args.products,
        shop::TOKENS.join(",")
    ));
    print_line(format!(
        "try: curl -H 'X-Shopify-Access-Token: {}' http://{address}/admin/api/2026-07/products.json",
        shop::TOKENS[0]
    ));
    print_line(format!("faults: curl -X POST http://{address}/__faults -d '{{\"latency\":\"2s\",\"errors\":0.5}}'"));
    shop::serve(listener, Arc::new(shop), stop).await;
    Ok(ExitCode::SUCCESS)
}

/// Runs the demo: a slow, failing shop, load on it directly and then through the sidecar, and a table of the results.
pub async fn demo(args: DemoArgs) -> Result<ExitCode, String> {
    let stop = stop_signal()?;
    let (end, ended) = watch::channel(false);
    let clock = Clock::start();
    let faults = Faults { latency: Duration::from_secs(2), errors: 0.5, ..Faults::default() };
    let shop = Arc::new(Shop::new(Options { products: 5000, bucket: 40, leak: 2.0, faults }, clock.clone()));
    let listener = bind_near(18090, "mock-shop")?;
    let shop_address = listener.local_addr().map_err(|e| e.to_string())?;
    let serving = tokio::spawn(shop::serve(listener, shop.clone(), ended.clone()));
    let app = sidecar(shop_address)?;
    let sidecar = app.addresses().first().copied().ok_or("the sidecar has no listener")?;
    let admin = app.admin_address().ok_or("the sidecar has no admin listener")?;
    let running = tokio::spawn(app.run(ended));
    print_line(format!(
        "A slow mock shop is at http://{shop_address}: 1 to 3 s for each response, half of them 503,"
    ));
    print_line(format!(
        "a bucket of 40 calls that refills at 2 a second. The sidecar in front of it is at http://{sidecar}.\n"
    ));
    let direct = Target { name: "direct", base: shop_address, health: None };
    let through = Target { name: "through the sidecar", base: sidecar, health: Some(admin) };
    let load = Load { shop: &shop, clock: &clock, lasting: args.each, stop: stop.clone() };
    let before = load.drive(&direct).await?;
    shop.refill();
    let after = load.drive(&through).await?;
    if !*stop.borrow() {
        print_line(table::render(&before, &after));
        if !args.once {
            print_instructions(sidecar, admin);
            let mut stop = stop;
            let _ = stop.wait_for(|stop| *stop).await;
        }
    }
    end.send_replace(true);
    let _ = running.await;
    serving.abort();
    Ok(ExitCode::SUCCESS)
}

fn print_instructions(sidecar: SocketAddr, admin: SocketAddr) {
    let token = shop::TOKENS[0];
    print_line("Both keep running. Try, from another terminal:");
    print_line(format!(
        "  curl -i -H 'X-Shopify-Access-Token: {token}' 'http://{sidecar}/admin/api/2026-07/products.json?limit=50'"
    ));
    print_line(format!("  http://{admin}/ in a browser: the dashboard"));
    print_line(format!("  curl -s http://{admin}/health"));
    print_line(format!("  curl -s http://{admin}/stats"));
    print_line(format!(
        "  curl -s -X POST http://{admin}/purge -H 'Content-Type: application/json' -d '{{\"tags\":[\"products\"]}}'"
    ));
    print_line("Ctrl-C stops both.");
}

/// Binds the given port, or any free one if it is taken.
fn bind_near(port: u16, what: &str) -> Result<tokio::net::TcpListener, String> {
    match crate::server::bind(SocketAddr::from(([127, 0, 0, 1], port)), what) {
        Ok(listener) => Ok(listener),
        Err(_taken) => crate::server::bind(SocketAddr::from(([127, 0, 0, 1], 0)), what),
    }
}

/// Builds a sidecar with default settings in front of the shop, on its usual ports or any free ones.
fn sidecar(shop: SocketAddr) -> Result<App, String> {
    let with_ports = |listen: u16, admin: u16| {
        let text = format!(
            "[[upstream]]\nprofile = \"shopify\"\nurl = \"http://{shop}\"\nlisten = \"127.0.0.1:{listen}\"\n\
             [admin]\nlisten = \"127.0.0.1:{admin}\"\n"
        );
        config::from_text("demo", &text, Path::new("")).map_err(|e| format!("{e:?}"))
    };
    match App::bind(with_ports(18080, 18081)?) {
        Ok(app) => Ok(app),
        Err(_taken) => App::bind(with_ports(0, 0)?),
    }
}
