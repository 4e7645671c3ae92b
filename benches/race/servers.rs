//! The compared servers: real programs, each on core 0, in front of the same origin.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running server.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        for process in descendants(self.child.id()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(process), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

/// The working folder and the origin.
pub(crate) struct Setup {
    folder: PathBuf,
    origin: Server,
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(crate) fn is_there(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/usr/local/sbin";
    path.split(':').any(|folder| Path::new(folder).join(program).exists())
}

/// Returns a one-line description of the machine.
pub(crate) fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown").to_owned();
    let cores = cpu.lines().filter(|line| line.starts_with("processor")).count();
    format!("{cores} cores of {model}; servers on core 0, load on core 1; {}", versions())
}

fn versions() -> String {
    let version = |program: &str, flag: &str| {
        let out = Command::new(program).arg(flag).output().ok();
        let text = out.map(|out| [out.stdout, out.stderr].concat()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let word = |word: &&str| {
            word.chars().filter(|c| *c == '.').count() >= 1 && word.contains(|c: char| c.is_ascii_digit())
        };
        text.split([' ', '\n', '/', '(', '-']).find(word).unwrap_or("?").to_owned()
    };
    format!(
        "nginx {}, HAProxy {}, Varnish {}",
        version("nginx", "-v"),
        version("haproxy", "-v"),
        version("varnishd", "-V")
    )
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

fn on_core(core: &str, program: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", core, program]).stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
    command
}

fn serve(name: &'static str, address: SocketAddr, command: &mut Command) -> Server {
    let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
    let server = Server { name, address, child };
    let begun = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{name} does not listen on {address}");
        std::thread::sleep(Duration::from_millis(1));
    }
    server
}

impl Setup {
    pub(crate) fn new() -> Setup {
        // In memory, because the other servers keep their caches in memory, too.
        let folder = PathBuf::from(format!("/dev/shm/sidecache-race-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("writable");
        let origin = bare("origin", "1");
        Setup { folder, origin }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.join(name);
        std::fs::write(&path, text).expect("writable");
        path
    }

    pub(crate) fn sidecar(&self, rules: &str) -> Server {
        self.sidecar_with(rules, "")
    }

    pub(crate) fn sidecar_with(&self, rules: &str, tables: &str) -> Server {
        let address = free();
        let text = format!(
            "[[upstream]]\nname = \"api\"\nurl = \"http://{}\"\nlisten = \"{address}\"\n{rules}\n\
             [admin]\nlisten = \"off\"\n[log]\nfilter = \"warn\"\n{tables}\n",
            self.origin.address
        );
        let config = self.write(&format!("sidecar-{}.toml", address.port()), &text);
        let mut command = on_core("0", env!("CARGO_BIN_EXE_sidecache"));
        serve("sidecache", address, command.arg("--config").arg(config))
    }

    pub(crate) fn nginx(&self) -> Server {
        let (address, folder) = (free(), self.folder.join(format!("nginx-{}", free().port())));
        std::fs::create_dir_all(&folder).expect("writable");
        let at = folder.display();
        let text = format!(
            "daemon off; worker_processes 1; pid {at}/pid; error_log {at}/error;\n\
             worker_rlimit_nofile 20000;\n\
             events {{ worker_connections 8192; }}\n\
             http {{ access_log off; keepalive_requests 100000000; sendfile on; tcp_nopush on;\n\
             client_body_temp_path {at}/a; proxy_temp_path {at}/b; fastcgi_temp_path {at}/c;\n\
             uwsgi_temp_path {at}/d; scgi_temp_path {at}/e;\n\
             proxy_cache_path {at}/cache keys_zone=c:64m max_size=1g;\n\
             upstream o {{ server {}; keepalive 64; }}\n\
             server {{ listen {address}; location / {{ proxy_pass http://o; proxy_http_version 1.1;\n\
             proxy_set_header Connection \"\"; proxy_cache c; proxy_cache_lock on;\n\
             add_header Cache-Status $upstream_cache_status; }}\n\
             location /pass {{ proxy_pass http://o; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }} }}\n",
            self.origin.address
        );
        let config = self.write(&format!("nginx-{}.conf", address.port()), &text);
        serve("nginx", address, on_core("0", "/usr/sbin/nginx").arg("-c").arg(config).arg("-p").arg(folder))
    }

    pub(crate) fn haproxy(&self) -> Server {
        let address = free();
        let text = format!(
            "global\n nbthread 1\n maxconn 8192\ndefaults\n mode http\n timeout client 75s\n timeout server 75s\n\
             timeout connect 5s\n timeout http-keep-alive 75s\ncache c\n total-max-size 256\n max-object-size 100000\n\
             max-age 36000\nfrontend f\n bind {address}\n default_backend b\n\
             backend b\n http-request cache-use c\n http-response cache-store c\n http-reuse always\n server s {}\n",
            self.origin.address
        );
        let text = text.replace("\n timeout", "\n  timeout");
        let config = self.write("haproxy.cfg", &text);
        serve("HAProxy", address, on_core("0", "/usr/sbin/haproxy").arg("-db").arg("-f").arg(config))
    }

    pub(crate) fn varnish(&self) -> Server {
        let address = free();
        let folder = self.folder.join("varnish");
        let mut command = on_core("0", "/usr/sbin/varnishd");
        command.args(["-F", "-j", "none", "-a", &address.to_string(), "-b", &self.origin.address.to_string()]);
        command.args(["-s", "malloc,1g", "-p", "thread_pools=1", "-p", "thread_pool_max=2000", "-n"]).arg(folder);
        serve("Varnish", address, &mut command)
    }
}

/// Starts the baseline server (`benches/bare.rs`).
pub(crate) fn bare_server() -> Server {
    bare("bare hyper", "0")
}

fn bare(name: &'static str, core: &str) -> Server {
    let address = free();
    let program = example();
    serve(name, address, on_core(core, &program.display().to_string()).arg(address.to_string()))
}

/// Returns the path of the `bare` example in the same target folder.
fn example() -> PathBuf {
    let bench = std::env::current_exe().expect("this program");
    let folder = bench.parent().and_then(Path::parent).expect("target/release");
    let path = folder.join("examples/bare");
    assert!(path.exists(), "{} is missing: cargo build --release --example bare", path.display());
    path
}

/// Returns a process and all its descendants.
fn descendants(process: u32) -> Vec<i32> {
    let mut found = vec![i32::try_from(process).expect("a pid")];
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
        found.extend(descendants(child));
    }
    found
}

impl Server {
    /// Returns the CPU time of the server and its descendants, in steps of 10 ms.
    pub(crate) fn cpu(&self) -> Duration {
        let ticks = |process: i32| -> u64 {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            let after = stat.rsplit(')').next().unwrap_or_default();
            after.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum()
        };
        Duration::from_millis(descendants(self.child.id()).into_iter().map(ticks).sum::<u64>() * 10)
    }

    /// Returns the resident memory in bytes.
    pub(crate) fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("the process runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") * 1024
    }

    /// Sends two requests, so that the response is cached if it is cacheable.
    pub(crate) fn warm(&self, path: &str) {
        for _ in 0..2 {
            let mut stream = TcpStream::connect(self.address).expect("a listener");
            write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("written");
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            let first = BufReader::new(&answer[..]).lines().next().and_then(Result::ok).unwrap_or_default();
            assert!(first.contains(" 200"), "{}: unexpected response {first:?} to {path}", self.name);
        }
    }
}
