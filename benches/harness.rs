//! Shared benchmark support: sidecar processes, a plain HTTP client, a counting origin, and result rows.

#![allow(dead_code)] // each benchmark uses a part

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

/// Prints a result row: title, target value, measured value.
pub(crate) fn row(what: &str, target: &str, measured: &str) {
    println!("{what:<72}{target:>14}{measured:>24}");
}

pub(crate) fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

/// Returns the quantile `part` (0 to 1) of the durations.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(crate) fn quantile(times: impl IntoIterator<Item = Duration>, part: f64) -> Duration {
    let mut times: Vec<Duration> = times.into_iter().collect();
    times.sort_unstable();
    let index = ((times.len() as f64 * part) as usize).min(times.len().saturating_sub(1));
    times.get(index).copied().unwrap_or_default()
}

/// A `sidecache` process, killed on drop.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    /// The listeners' addresses, by the name in the startup lines.
    addresses: BTreeMap<String, SocketAddr>,
    /// The number of lines written to stderr.
    pub(crate) complaints: Arc<AtomicUsize>,
}

impl Program {
    /// Starts the program, and reads addresses up to the line that contains `last_line`.
    pub(crate) fn start(arguments: &[&str], last_line: &str) -> Program {
        Self::launch(Command::new(binary()).args(arguments), last_line)
    }

    /// Starts the program with a limit on open files.
    pub(crate) fn start_with_files(files: u32, arguments: &[&str], last_line: &str) -> Program {
        let limit = format!("ulimit -n {files}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &limit, env!("CARGO_BIN_EXE_sidecache")]).args(arguments);
        Self::launch(&mut command, last_line)
    }

    fn launch(command: &mut Command, last_line: &str) -> Program {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut addresses = BTreeMap::new();
        for line in lines.map_while(Result::ok) {
            if let Some((before, after)) = line.split_once(" addr=") {
                let name = before.rsplit(' ').next().unwrap_or_default().to_owned();
                let address = after.split(' ').next().and_then(|text| text.parse().ok()).expect("an address");
                addresses.insert(name, address);
            }
            if line.contains(last_line) {
                break;
            }
        }
        assert!(!addresses.is_empty(), "{command:?} printed no listen address");
        let complaints = Arc::new(AtomicUsize::new(0));
        let (counter, stderr) = (complaints.clone(), child.stderr.take().expect("piped"));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                counter.fetch_add(1, Ordering::Relaxed);
                if std::env::var_os("SIDECACHE_BENCH_LOG").is_some() {
                    eprintln!("{line}");
                }
            }
        });
        Program { child, addresses, complaints }
    }

    /// Starts a sidecar with an upstream named `api`, these rules, and tables after them.
    pub(crate) fn sidecar(upstream: SocketAddr, rules: &str, tables: &str) -> Program {
        let file = config_file(upstream, rules, tables);
        let program = Program::start(&["--config", &file.display().to_string()], "listening admin");
        std::fs::remove_file(file).expect("the file exists");
        program
    }

    /// Starts a sidecar as [`Program::sidecar`] does, with an additional environment variable.
    pub(crate) fn sidecar_with_env(
        upstream: SocketAddr,
        rules: &str,
        tables: &str,
        variable: (&str, &str),
    ) -> Program {
        let file = config_file(upstream, rules, tables);
        let mut command = Command::new(binary());
        command.args(["--config", &file.display().to_string()]).env(variable.0, variable.1);
        let program = Self::launch(&mut command, "listening admin");
        std::fs::remove_file(file).expect("the file exists");
        program
    }

    /// Starts a sidecar with a limit on open files.
    pub(crate) fn sidecar_with_files(files: u32, upstream: SocketAddr, tables: &str) -> Program {
        let file = std::env::temp_dir().join(format!("sidecache-bench-files-{}.toml", std::process::id()));
        let text = format!(
            "[[upstream]]\nname = \"api\"\nurl = \"http://{upstream}\"\nlisten = \"127.0.0.1:0\"\n\
             [admin]\nlisten = \"127.0.0.1:0\"\n[log]\nfilter = \"warn,sidecache::access=off\"\n{tables}\n"
        );
        std::fs::write(&file, text).expect("writable");
        let arguments = ["--config", &file.display().to_string()];
        let program = Program::start_with_files(files, &arguments, "listening admin");
        std::fs::remove_file(file).expect("the file exists");
        program
    }

    pub(crate) fn address(&self, name: &str) -> SocketAddr {
        self.addresses[name]
    }

    /// Returns the address of the upstream's listener.
    pub(crate) fn api(&self) -> SocketAddr {
        self.address("upstream=api")
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.address("admin")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")), signal).expect("our own process");
    }

    /// Pins all threads of the process to a core.
    pub(crate) fn pin(&self, core: u8) {
        pin(&self.child.id().to_string(), core);
    }

    /// Returns the resident memory in bytes.
    pub(crate) fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("the process runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") * 1024
    }

    /// Returns the number of open files.
    pub(crate) fn files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).map_or(0, Iterator::count)
    }

    /// Returns the CPU time used so far.
    pub(crate) fn cpu(&self) -> Duration {
        cpu_of(&self.child.id().to_string())
    }

    /// Returns true if the process has exited.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|ended| ended.is_some())
    }

    pub(crate) fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the program to measure: this build, or the one that `SIDECACHE_BIN` names, for a comparison.
fn binary() -> std::ffi::OsString {
    std::env::var_os("SIDECACHE_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_sidecache").into())
}

/// Writes the configuration of a sidecar with an upstream named `api`.
fn config_file(upstream: SocketAddr, rules: &str, tables: &str) -> std::path::PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = std::env::temp_dir().join(format!("sidecache-bench-{}-{number}.toml", std::process::id()));
    let text = format!(
        "[[upstream]]\nname = \"api\"\nurl = \"http://{upstream}\"\nlisten = \"127.0.0.1:0\"\n{rules}\n\
         [admin]\nlisten = \"127.0.0.1:0\"\n[log]\nfilter = \"warn,sidecache::access=off\"\n{tables}\n"
    );
    std::fs::write(&file, text).expect("writable");
    file
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pins all threads of a process to a core.
pub(crate) fn pin(process: &str, core: u8) {
    let pinned = Command::new("taskset").args(["-acp", &core.to_string(), process]).stdout(Stdio::null()).status();
    assert!(pinned.is_ok_and(|status| status.success()), "taskset is installed");
}

/// Returns the CPU time of a process, or of `self`, in steps of 10 ms.
pub(crate) fn cpu_of(process: &str) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("the process runs");
    let after = stat.rsplit(')').next().expect("fields");
    let ticks: u64 = after.split_whitespace().skip(11).take(2).map(|n| n.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

/// A client connection.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: TcpStream,
    buffer: Vec<u8>,
    address: SocketAddr,
}

/// A response and its duration.
#[derive(Debug, Clone)]
pub(crate) struct Got {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    pub(crate) took: Duration,
}

impl Got {
    pub(crate) fn is_hit(&self) -> bool {
        self.head.contains("sidecache; hit; ttl=") && !self.head.contains("detail=stale")
    }
}

impl Got {
    /// Returns the origin's sequence number of the response.
    pub(crate) fn number(&self) -> usize {
        self.head.split("x-number: ").nth(1).and_then(|rest| rest.split('\r').next()?.parse().ok()).expect("a number")
    }
}

impl Conn {
    pub(crate) async fn open(address: SocketAddr) -> Option<Conn> {
        let stream = TcpStream::connect(address).await.ok()?;
        stream.set_nodelay(true).ok()?;
        Some(Conn { stream, buffer: Vec::with_capacity(8192), address })
    }

    pub(crate) async fn get(&mut self, target: &str) -> Option<Got> {
        self.send("GET", target, "").await
    }

    /// Sends a GET with one more header line.
    pub(crate) async fn get_with(&mut self, target: &str, line: &str) -> Option<Got> {
        let request = format!("GET {target} HTTP/1.1\r\nHost: {}\r\n{line}\r\n\r\n", self.address);
        tokio::time::timeout(Duration::from_mins(1), self.exchange_bytes(&request)).await.ok()?
    }

    /// Sends a request and reads the response. Returns `None` if the connection ends, or after a timeout of one minute.
    pub(crate) async fn send(&mut self, method: &str, target: &str, body: &str) -> Option<Got> {
        tokio::time::timeout(Duration::from_mins(1), self.exchange(method, target, body)).await.ok()?
    }

    async fn exchange(&mut self, method: &str, target: &str, body: &str) -> Option<Got> {
        let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: {}\r\n{kind}Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        let request = if body.is_empty() { request.replace("Content-Length: 0\r\n", "") } else { request };
        self.exchange_bytes(&request).await
    }

    async fn exchange_bytes(&mut self, request: &str) -> Option<Got> {
        let begun = Instant::now();
        self.stream.write_all(request.as_bytes()).await.ok()?;
        let end = read_head(&mut self.stream, &mut self.buffer).await?;
        let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
        self.buffer.drain(..end);
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let length: usize = head.split("content-length: ").nth(1)?.split('\r').next()?.parse().ok()?;
        while self.buffer.len() < length {
            if self.stream.read_buf(&mut self.buffer).await.ok()? == 0 {
                return None;
            }
        }
        let body = self.buffer.drain(..length).collect();
        Some(Got { status, head, body, took: begun.elapsed() })
    }
}

/// Reads until the buffer has a whole head, and returns its length. `None` if the connection ends.
pub(crate) async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<usize> {
    loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            return Some(at + 4);
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// Starts an origin with a fixed delay and response size. Returns its address and its request count.
pub(crate) async fn origin(delay: Duration, head: &'static str, size: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (address, count) = (listener.local_addr().expect("an address"), Arc::new(AtomicUsize::new(0)));
    let counter = count.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let counter = counter.clone();
            let _ = stream.set_nodelay(true);
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                loop {
                    let Some(end) = read_head(&mut stream, &mut buffer).await else { return };
                    let target = String::from_utf8_lossy(&buffer[..end]).split(' ').nth(1).unwrap_or("/").to_owned();
                    buffer.drain(..end);
                    let size = if target.starts_with("/large") { 16 << 20 } else { size };
                    let number = counter.fetch_add(1, Ordering::SeqCst);
                    if !delay.is_zero() {
                        tokio::time::sleep(delay).await;
                    }
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {size}\r\nX-Number: {number}\r\n{head}\r\n{}",
                        body_of(&target, size)
                    );
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, count)
}

/// Returns the origin's body for a target: `size` bytes that are specific to the target.
pub(crate) fn body_of(target: &str, size: usize) -> String {
    let mut body = format!("{{\"target\":\"{target}\",\"text\":\"");
    while body.len() < size {
        body += "some text of a product ";
        body += target;
    }
    body.truncate(size);
    body
}
