//! Graceful shutdown: running requests finish, new connections are refused, and the grace period is bounded.

use nix::sys::signal::Signal;

use crate::support::process::Process;
use crate::support::{Client, Gate, Origin, Reply, get, until};

async fn running(origin: &Origin, grace: &str) -> (Process, std::path::PathBuf) {
    let file = std::env::temp_dir().join(format!("sidecache-shutdown-{}.toml", origin.address.port()));
    let text = crate::support::sidecar::text(origin.address, "", &format!("[shutdown]\ngrace = \"{grace}\"\n"));
    std::fs::write(&file, text).expect("writable");
    let process = Process::start(&["--config", &file.display().to_string()], 3).await;
    (process, file)
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_and_sigint_let_requests_finish() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let gate = Gate::new();
        let held = gate.clone();
        let origin = Origin::start(move |_| Reply::new(200, "finished").after(&held)).await;
        let (process, file) = running(&origin, "20s").await;
        let (address, admin) = (process.address("upstream=api"), process.address("admin"));
        assert_eq!(get(admin, "/readyz", &[]).await.status, 200);
        let mut idle = Client::connect(address).await;
        let mut busy = Client::connect(address).await;
        busy.ask("GET", "/", &[], b"").await;
        origin.wait_for_requests(1).await;
        process.signal(signal);
        assert!(idle.closed().await, "an idle connection is closed at once");
        until("new connections are refused", || std::net::TcpStream::connect(address).is_err().then_some(())).await;
        assert_eq!(get(admin, "/readyz", &[]).await.status, 503, "not ready during the shutdown");
        gate.open();
        let answer = busy.answer_to("GET").await.expect("a response");
        assert_eq!(answer.text(), "finished");
        // `Connection: close` is not checked: the head may have been sent before the shutdown reached the connection.
        assert!(busy.closed().await, "the connection is closed after the response");
        assert_eq!(process.ended().await, Some(0));
        std::fs::remove_file(file).expect("the file exists");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_aborted_when_the_shutdown_grace_period_ends() {
    let origin = Origin::start(|_| Reply::hang()).await;
    let (process, file) = running(&origin, "100ms").await;
    let mut busy = Client::connect(process.address("upstream=api")).await;
    busy.ask("GET", "/", &[], b"").await;
    origin.wait_for_requests(1).await;
    process.signal(Signal::SIGTERM);
    assert!(busy.answer_to("GET").await.is_none());
    assert_eq!(process.ended().await, Some(0));
    std::fs::remove_file(file).expect("the file exists");
}
