//! The Tokio runtime of the admin API, in a thread of its own and separate from the runtime that serves requests.
//! The admin API responds however busy the other event loops are, and even when they are stalled.

use std::thread;

use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// The admin API's Tokio runtime, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct AdminRuntime {
    /// `None` if the thread could not be started: the listeners then share the runtime that serves requests.
    handle: Option<Handle>,
    _end: oneshot::Sender<()>,
}

impl AdminRuntime {
    /// Starts the runtime in a new thread.
    pub(super) fn start() -> AdminRuntime {
        let (end, ended) = oneshot::channel::<()>();
        let handle = Builder::new_current_thread().enable_all().build().ok().and_then(|runtime| {
            let handle = runtime.handle().clone();
            let turn = move || drop(runtime.block_on(ended));
            thread::Builder::new().name("admin".into()).spawn(turn).ok().map(|_| handle)
        });
        AdminRuntime { handle, _end: end }
    }

    /// Serves a listener on this runtime.
    pub(super) fn serve<F>(
        &self,
        tasks: &mut JoinSet<()>,
        socket: TcpListener,
        serve: impl FnOnce(TcpListener) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(handle) = &self.handle else {
            tasks.spawn(serve(socket));
            return;
        };
        let socket = socket.into_std();
        let served = async move {
            match socket.and_then(TcpListener::from_std) {
                Ok(socket) => serve(socket).await,
                Err(error) => tracing::error!(%error, "a listener stopped"),
            }
        };
        tasks.spawn_on(served, handle);
    }
}
