//! An event loop apart from the requests', in a thread of its own: who asks how the process is gets an answer however busy
//! the others are, and even when they stand still.

use std::thread;

use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Ends when it is dropped.
#[derive(Debug)]
pub(super) struct Apart {
    /// None: there was no thread to be had, and the loop is everybody's.
    handle: Option<Handle>,
    _end: oneshot::Sender<()>,
}

impl Apart {
    /// Begins to turn.
    pub(super) fn start() -> Apart {
        let (end, ended) = oneshot::channel::<()>();
        let handle = Builder::new_current_thread().enable_all().build().ok().and_then(|runtime| {
            let handle = runtime.handle().clone();
            let turn = move || drop(runtime.block_on(ended));
            thread::Builder::new().name("admin".into()).spawn(turn).ok().map(|_| handle)
        });
        Apart { handle, _end: end }
    }

    /// Has it serve a listener.
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
                Err(error) => tracing::error!(%error, "a listener can't be served"),
            }
        };
        tasks.spawn_on(served, handle);
    }
}
