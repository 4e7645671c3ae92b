//! Redis servers for tests: standalone, Cluster and Sentinel, on free ports, killed on drop.

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
    pub(crate) folder: PathBuf,
    arguments: Vec<String>,
}

/// Returns a port that is currently free.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

const MAX_CLUSTER_PORT: u16 = 50_000;

/// Returns a free port for a node of a Cluster, whose bus uses the port plus 10,000.
pub(crate) fn free_cluster_port() -> u16 {
    let free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    let mut ports = std::iter::repeat_with(free_port).take(200).filter(|port| *port < MAX_CLUSTER_PORT);
    ports.find(|port| free(&(port + 10_000))).expect("a free port")
}

/// Creates a temporary folder with a unique name.
pub(crate) fn folder(name: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("sidecache-{name}-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("writable");
    folder
}

impl Redis {
    /// Starts a server with the default configuration and without persistence.
    pub(crate) fn start() -> Redis {
        Redis::with(&[])
    }

    /// Starts a server with additional arguments.
    pub(crate) fn with(arguments: &[&str]) -> Redis {
        let arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
        let folder = folder("redis");
        // Another process may bind the port first.
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

    /// Returns a `[redis]` table for a sidecar's configuration.
    pub(crate) fn table(&self) -> String {
        format!("[redis]\nurl = \"{}\"\n", self.url())
    }

    /// Returns a `[redis]` table with a command timeout of 5 s, for tests that do not depend on the latency of Redis.
    pub(crate) fn patient_table(&self) -> String {
        self.table() + "command_timeout = \"5s\"\n"
    }

    /// Connects with a client library other than the sidecar's.
    pub(crate) fn observer(&self) -> Connection {
        let client = redis::Client::open(self.url()).expect("a URL");
        client.get_connection().expect("a reply")
    }

    /// Returns all keys that match, sorted.
    pub(crate) fn keys(&self, pattern: &str) -> Vec<String> {
        let mut keys: Vec<String> = self.observer().keys(pattern).expect("a reply");
        keys.sort();
        keys
    }

    /// The ID of its process.
    #[allow(dead_code)] // a benchmark needs it
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(pid(&self.child), signal).expect("our own process");
    }

    /// Sends SIGKILL and waits until the process has exited.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts the server again on the same port.
    pub(crate) fn restart(&mut self) {
        self.child = launch(self.port, &self.folder, &self.arguments).expect("its port is still free");
    }

    /// Starts the server again without waiting until it has loaded its dataset.
    pub(crate) fn restart_loading(&mut self) {
        self.child = server(self.port, &self.folder, &self.arguments)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server starts");
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

/// Returns the command that starts a server.
fn server(port: u16, folder: &std::path::Path, arguments: &[String]) -> Command {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    command.args(["--dir", &folder.display().to_string(), "--logfile", "", "--daemonize", "no"]).args(arguments);
    command.stderr(Stdio::null());
    command
}

/// Starts a server and waits until it accepts connections. Returns `None` if it exits instead.
fn launch(port: u16, folder: &std::path::Path, arguments: &[String]) -> Option<Child> {
    use std::io::{BufRead, BufReader};
    let mut child = server(port, folder, arguments).stdout(Stdio::piped()).spawn().ok()?;
    let mut lines = BufReader::new(child.stdout.take()?).lines();
    let ready = lines.by_ref().map_while(Result::ok).any(|line| line.contains("eady to accept connections"));
    if !ready {
        let _ = child.wait();
        return None;
    }
    // Discard the later output, so that the pipe does not fill up.
    std::thread::spawn(move || lines.for_each(drop));
    Some(child)
}

/// Runs redis-cli and returns its output.
pub(crate) fn cli(arguments: &[&str]) -> String {
    let output = Command::new("redis-cli").args(arguments).output().expect("redis-cli is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "redis-cli {arguments:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A Redis Cluster: three masters with one replica each.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Redis>,
}

impl Cluster {
    pub(crate) fn start() -> Cluster {
        let nodes: Vec<Redis> = (0..6)
            .map(|_| Redis::cluster_node(&["--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"]))
            .collect();
        let addresses: Vec<String> = nodes.iter().map(|node| node.address().to_string()).collect();
        let mut arguments = vec!["--cluster", "create"];
        arguments.extend(addresses.iter().map(String::as_str));
        arguments.extend(["--cluster-replicas", "1", "--cluster-yes"]);
        cli(&arguments);
        let cluster = Cluster { nodes };
        while !cluster
            .nodes
            .iter()
            .all(|node| node.info("cluster").contains("cluster_enabled:1") && node.knows_all(6))
        {
            std::thread::yield_now();
        }
        cluster
    }

    pub(crate) fn table(&self) -> String {
        let nodes: Vec<String> = self.nodes.iter().map(|node| node.address().to_string()).collect();
        format!("[redis]\nurl = \"redis-cluster://{}\"\n", nodes.join(","))
    }

    /// Returns the index of the reachable master that owns the slot of a key.
    pub(crate) fn owner(&self, key: &str) -> usize {
        let masters = self.nodes.iter().position(|node| {
            let reply: Result<Option<Vec<u8>>, redis::RedisError> = match node.try_observer() {
                Some(mut observer) => redis::cmd("DUMP").arg(key).query(&mut observer),
                None => return false,
            };
            reply.is_ok() && node.info("replication").contains("role:master")
        });
        masters.expect("a master for each slot")
    }
}

/// A master, a replica, and three Sentinels that monitor them.
#[derive(Debug)]
pub(crate) struct Sentinels {
    pub(crate) servers: Vec<Redis>,
    pub(crate) sentinels: Vec<Redis>,
}

impl Sentinels {
    pub(crate) fn start() -> Sentinels {
        let master = Redis::start();
        let port = master.port.to_string();
        let replica = Redis::with(&["--replicaof", "127.0.0.1", &port, "--repl-diskless-sync-delay", "0"]);
        let sentinels = (0..3).map(|_| Redis::sentinel(&port)).collect();
        let all = Sentinels { servers: vec![master, replica], sentinels };
        let ready = |sentinel: &Redis| {
            let info = sentinel.info("sentinel");
            info.contains("slaves=1") && info.contains("sentinels=3")
        };
        while !all.sentinels.iter().all(ready) {
            std::thread::yield_now();
        }
        all
    }

    pub(crate) fn table(&self) -> String {
        let nodes: Vec<String> = self.sentinels.iter().map(|node| node.address().to_string()).collect();
        format!("[redis]\nurl = \"redis-sentinel://{}?service=main\"\n", nodes.join(","))
    }
}

impl Redis {
    /// Starts a server on a port below `port`.
    pub(crate) fn cluster_node(arguments: &[&str]) -> Redis {
        let mut arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
        arguments.extend(["--cluster-enabled".to_owned(), "yes".to_owned()]);
        // Another process may bind the port first.
        for _ in 0..10 {
            let (folder, port) = (folder("redis"), free_cluster_port());
            if let Some(child) = launch(port, &folder, &arguments) {
                return Redis { child, port, folder, arguments };
            }
            let _ = std::fs::remove_dir_all(folder);
        }
        panic!("redis-server does not start as a node of a cluster");
    }

    fn sentinel(master: &str) -> Redis {
        let folder = folder("sentinel");
        let port = free_port();
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor main 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 3000\n",
            folder.display()
        );
        let file = folder.join("sentinel.conf");
        std::fs::write(&file, text).expect("writable");
        let mut command = Command::new("redis-server");
        let child = command.arg(file).arg("--sentinel").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let sentinel = Redis { child: child.expect("redis-server starts"), port, folder, arguments: Vec::new() };
        while sentinel.try_observer().is_none() {
            std::thread::yield_now();
        }
        sentinel
    }

    pub(crate) fn try_observer(&self) -> Option<Connection> {
        redis::Client::open(self.url()).ok()?.get_connection().ok()
    }

    pub(crate) fn info(&self, section: &str) -> String {
        match self.try_observer() {
            Some(mut observer) => redis::cmd("INFO").arg(section).query(&mut observer).unwrap_or_default(),
            None => String::new(),
        }
    }

    fn knows_all(&self, nodes: usize) -> bool {
        let Some(mut observer) = self.try_observer() else { return false };
        let info: String = redis::cmd("CLUSTER").arg("INFO").query(&mut observer).unwrap_or_default();
        let links: String = redis::cmd("INFO").arg("replication").query(&mut observer).unwrap_or_default();
        info.contains("cluster_state:ok")
            && info.contains(&format!("cluster_known_nodes:{nodes}"))
            && (links.contains("master_link_status:up") || links.contains("connected_slaves:1"))
    }
}
