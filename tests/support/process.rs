//! The `sidecache` binary as a child process: starts it, reads its output, sends signals, and kills it on drop.

use std::net::SocketAddr;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::soon;

/// A running `sidecache`.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// The first lines of its standard output.
    pub(crate) start: Vec<String>,
}

/// Returns a command that runs the binary with these arguments and an empty environment.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidecache"));
    command.args(arguments).env_clear().kill_on_drop(true).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the binary to its end. Returns the exit code, stdout and stderr.
pub(crate) async fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = soon("the process exits", command(arguments).output()).await.expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

impl Process {
    /// Starts the binary and waits for this number of output lines.
    pub(crate) async fn start(arguments: &[&str], lines: usize) -> Process {
        let mut child = command(arguments).stderr(Stdio::null()).spawn().expect("the program starts");
        let mut reader = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut start = Vec::new();
        for _ in 0..lines {
            let line = soon("a startup line", reader.next_line()).await.expect("readable");
            start.push(line.expect("another line"));
        }
        Process { child, lines: reader, start }
    }

    /// Returns the address in the startup line that contains this text.
    pub(crate) fn address(&self, of: &str) -> SocketAddr {
        let line = self.start.iter().find(|line| line.contains(of)).unwrap_or_else(|| panic!("no line {of}"));
        let after = line.split("addr=").nth(1).expect("an address").split(' ').next().expect("an address");
        after.parse().expect("an address")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id().expect("running")).expect("a pid");
        kill(Pid::from_raw(id), signal).expect("our own process");
    }

    /// Waits until the process exits. Returns its exit code.
    pub(crate) async fn ended(mut self) -> Option<i32> {
        let code = soon("the process exits", self.child.wait()).await.expect("our own process").code();
        // The pipe stays open until here, so that the process can write to it.
        drop(self.lines);
        code
    }
}
