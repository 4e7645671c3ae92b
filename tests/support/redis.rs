//! A real Redis of the test's own: started on a free port, looked into by another client, stopped, killed, never left.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redis::{Commands, Connection};

/// A running `redis-server`.
#[derive(Debug)]
pub(crate) struct Redis {
    child: Child,
    pub(crate) port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
}

/// A port that nobody has now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// A folder of the test's own.
pub(crate) fn folder(name: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("sidecache-{name}-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("writable");
    folder
}

impl Redis {
    /// With its defaults, but for nothing on disk.
    pub(crate) fn start() -> Redis {
        Redis::with(&[])
    }

    /// With these arguments besides.
    pub(crate) fn with(arguments: &[&str]) -> Redis {
        let arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
        let folder = folder("redis");
        // Another may take the port before it does.
        for _ in 0..10 {
            let port = free_port();
            if let Some(child) = launch(port, &folder, &arguments) {
                return Redis { child, port, folder, arguments };
            }
        }
        panic!("redis-server does not start: is it installed? (apt-get install redis-server)");
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// A `[redis]` table for a sidecar's configuration.
    pub(crate) fn table(&self) -> String {
        format!("[redis]\nurl = \"{}\"\n", self.url())
    }

    /// An independent observer: another client library.
    pub(crate) fn observer(&self) -> Connection {
        let client = redis::Client::open(self.url()).expect("a URL");
        client.get_connection().expect("it answers")
    }

    /// All keys that match.
    pub(crate) fn keys(&self, pattern: &str) -> Vec<String> {
        let mut keys: Vec<String> = self.observer().keys(pattern).expect("it answers");
        keys.sort();
        keys
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(pid(&self.child), signal).expect("our own process");
    }

    /// SIGKILL, and waits for its end.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again, on its port.
    pub(crate) fn restart(&mut self) {
        self.child = launch(self.port, &self.folder, &self.arguments).expect("its port is still free");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a pid"))
}

/// Starts one, and waits until it listens; none if it ends instead.
fn launch(port: u16, folder: &std::path::Path, arguments: &[String]) -> Option<Child> {
    use std::io::{BufRead, BufReader};
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    command.args(["--dir", &folder.display().to_string(), "--logfile", "", "--daemonize", "no"]).args(arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let mut lines = BufReader::new(child.stdout.take()?).lines();
    let ready = lines.by_ref().map_while(Result::ok).any(|line| line.contains("eady to accept connections"));
    if !ready {
        let _ = child.wait();
        return None;
    }
    // What it says later must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    Some(child)
}
