//! The command-line interface. Exit codes: 0 success, 1 failure, 2 usage error.

mod completions;
mod dry_run;
mod explain;
mod init;
mod remote;
mod run;
mod suggest;
mod warm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::Flags;

/// A caching sidecar: point your application's upstream URL at it.
///
/// Without a command it runs: `sidecache --upstream https://your-api.example`.
#[derive(Debug, Parser)]
#[command(name = "sidecache", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sidecar (also the default).
    Run(RunArgs),
    /// Read a configuration and say what is wrong with it, with file, line and column.
    Check(CheckArgs),
    /// Write a first configuration file, short and commented.
    Init(InitArgs),
    /// Explain how a request would be handled: rule, key, what is stored, and why it would or would not be.
    Explain(ExplainArgs),
    /// Purge what is stored in a running sidecar.
    Purge(PurgeArgs),
    /// Print a running sidecar's counters.
    Stats(StatsArgs),
    /// Propose rules for repeated requests that were not served from the cache.
    Suggest(SuggestArgs),
    /// Have a running sidecar fetch a list of URLs, at the pace that the upstream's budget allows.
    Warm(WarmArgs),
    /// Print a running sidecar's health. Exit code 1 if it is not ok.
    Health(HealthArgs),
    /// The kill switch of a running sidecar: normal, bypass (pass all requests through), shadow (pass all requests
    /// through and compare), or configured (as environment or file say).
    Mode(ModeArgs),
    /// Print what a shell needs to complete commands and flags.
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for each command.
    Man(ManArgs),
    /// Run a slow shop with the sidecar in front of it, send traffic, and print a table of before and after.
    #[cfg(feature = "demo")]
    Demo(crate::demo::DemoArgs),
    /// The demo's shop alone: a Shopify-style REST Admin API, with faults on request.
    #[cfg(feature = "demo")]
    MockShop(crate::demo::ShopArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The configuration file [default: ./sidecache.toml, if it is there]
    #[arg(long, env = "SIDECACHE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// URL of the upstream; no configuration file is needed then
    #[arg(long, env = "SIDECACHE_UPSTREAM", value_name = "URL")]
    upstream: Option<String>,
    /// Where applications connect to [default: 127.0.0.1:18080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// generic or shopify [default: by the upstream's host]
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// Store every GET for so long, whatever the upstream's headers say
    #[arg(long, value_name = "DUR")]
    ttl: Option<String>,
    /// Share the cache with other sidecars through this Redis
    #[arg(long, value_name = "URL")]
    redis: Option<String>,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// The configuration file [default: ./sidecache.toml]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The configuration file, as an option
    #[arg(long, env = "SIDECACHE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct SuggestArgs {
    #[command(flatten)]
    remote: RemoteArgs,
    /// The ttl of the proposed rules
    #[arg(long, value_name = "DUR", default_value = "1m")]
    ttl: String,
}

#[derive(Debug, Args)]
struct WarmArgs {
    #[command(flatten)]
    remote: RemoteArgs,
    /// A file with one URL per line, absolute or beginning with a slash; lines that begin with # are comments
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The sidecar's address [default: its first upstream's listener, from the admin API]
    #[arg(long, value_name = "URL")]
    to: Option<String>,
    /// A request header, as in 'X-Shopify-Access-Token: …': stored responses are shared only by requests with the same value
    #[arg(short = 'H', long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// Number of concurrent requests
    #[arg(long, value_name = "N", default_value_t = 4)]
    jobs: usize,
}

#[derive(Debug, Args)]
struct CompletionsArgs {
    /// For which shell
    #[arg(value_name = "SHELL")]
    shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
struct ManArgs {
    /// Write one page for each command here
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct RemoteArgs {
    /// The running sidecar's admin API
    #[arg(long, env = "SIDECACHE_ADMIN", value_name = "URL", default_value = "http://127.0.0.1:18081")]
    admin: String,
    /// A file with its bearer token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ExplainArgs {
    #[command(flatten)]
    remote: RemoteArgs,
    /// GET, HEAD, POST …
    #[arg(value_name = "METHOD")]
    method: String,
    /// The URL, absolute or beginning with a slash
    #[arg(value_name = "URL")]
    url: String,
    /// A request header, as in 'Accept-Language: de'
    #[arg(short = 'H', long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// The request body
    #[arg(short, long, value_name = "BODY")]
    data: Option<String>,
    /// Which upstream, by name [default: the one that the URL names, else the first]
    #[arg(long, value_name = "NAME")]
    upstream: Option<String>,
    /// Read only the configuration: nothing has to run
    #[arg(long)]
    offline: bool,
    /// The configuration file, with --offline [default: ./sidecache.toml]
    #[arg(long, env = "SIDECACHE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct InitArgs {
    /// Where to write it; a file that exists is left alone
    #[arg(long, value_name = "FILE", default_value = "sidecache.toml")]
    config: PathBuf,
    /// URL of the upstream
    #[arg(long, value_name = "URL", default_value = "https://my-shop.myshopify.com")]
    upstream: String,
    /// generic or shopify [default: by the upstream's host]
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
}

#[derive(Debug, Args)]
struct StatsArgs {
    #[command(flatten)]
    remote: RemoteArgs,
    /// A line every two seconds, until Ctrl-C
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Args)]
struct ModeArgs {
    #[command(flatten)]
    remote: RemoteArgs,
    /// normal, bypass, shadow or configured
    #[arg(value_name = "MODE", value_parser = ["normal", "bypass", "shadow", "configured"])]
    mode: String,
    /// Only for this time; then the previous setting applies again
    #[arg(long = "for", value_name = "DUR")]
    time: Option<String>,
    /// All sidecars that share its Redis, also those that start later
    #[arg(long)]
    fleet: bool,
    /// Only estimate the requests that would reach each upstream, and compare with its budget
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct HealthArgs {
    #[command(flatten)]
    remote: RemoteArgs,
    /// Only whether it takes traffic
    #[arg(long)]
    ready: bool,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
struct PurgeArgs {
    #[command(flatten)]
    remote: RemoteArgs,
    /// Everything with this tag
    #[arg(long, value_name = "TAG", group = "what")]
    tag: Vec<String>,
    /// One URL, or path and query
    #[arg(long, value_name = "URL", group = "what")]
    url: Vec<String>,
    /// All URLs that begin with this prefix
    #[arg(long, value_name = "PREFIX", group = "what")]
    prefix: Vec<String>,
    /// All URLs whose path and query match this glob
    #[arg(long, value_name = "GLOB", group = "what")]
    pattern: Vec<String>,
    /// Everything
    #[arg(long, group = "what")]
    all: bool,
    /// Only in this upstream
    #[arg(long, value_name = "NAME")]
    upstream: Option<String>,
    /// Only for this host, on an upstream that has several
    #[arg(long, value_name = "HOST")]
    host: Vec<String>,
    /// Make entries stale instead of removing them: stale windows and fallbacks may still use them
    #[arg(long)]
    soft: bool,
}

impl From<RunArgs> for Flags {
    fn from(args: RunArgs) -> Flags {
        let RunArgs { config, upstream, listen, profile, ttl, redis } = args;
        Flags { config, upstream, listen, profile, ttl, redis }
    }
}

/// Parses the arguments and runs the command. Returns the exit code of the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return refused(&format!("can't start: {error}")),
    };
    let result = runtime.block_on(dispatch(cli));
    // Background fetches must not delay the exit.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(message) => refused(&message),
    }
}

async fn dispatch(cli: Cli) -> Result<ExitCode, String> {
    match cli.command {
        None => run::run(cli.run.into()).await,
        Some(Command::Run(args)) => run::run(args.into()).await,
        Some(Command::Check(args)) => run::check(args.file.or(args.config)).await,
        Some(Command::Init(args)) => init::init(&args),
        Some(Command::Explain(args)) => explain::explain(args).await,
        Some(Command::Purge(args)) => remote::purge(args).await,
        Some(Command::Stats(args)) => remote::stats(&args).await,
        Some(Command::Health(args)) => remote::health(&args).await,
        Some(Command::Mode(args)) if args.dry_run => dry_run::dry_run(args).await,
        Some(Command::Mode(args)) => remote::mode(args).await,
        Some(Command::Suggest(args)) => suggest::suggest(args).await,
        Some(Command::Warm(args)) => warm::warm(args).await,
        Some(Command::Completions(args)) => Ok(completions::completions(&args)),
        Some(Command::Man(args)) => completions::man(&args),
        #[cfg(feature = "demo")]
        Some(Command::Demo(args)) => crate::demo::demo(args).await,
        #[cfg(feature = "demo")]
        Some(Command::MockShop(args)) => crate::demo::mock_shop(args).await,
    }
}

fn refused(message: &str) -> ExitCode {
    eprintln!("sidecache: {message}");
    ExitCode::from(1)
}
