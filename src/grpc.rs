//! Serving gRPC on the daemon's socket: hyper for the connections, tonic for the services.
//!
//! Not tonic's own server, for one reason: it enforces a client's `grpc-timeout` itself, and answers
//! CANCELLED where the client, whose clock ends the call anyway, has to see DEADLINE_EXCEEDED. Which of the
//! two it saw was a race. So the header goes no further than here: a client that has given up resets its
//! stream, and the call is dropped.

use std::future::Future;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;
use tonic::service::Routes;
use tower::ServiceExt as _;

mod authority;

use authority::Lenient;

/// Bytes of one call that may be under way before the other side has taken them.
const STREAM_WINDOW: u32 = 1 << 20;
/// Likewise, of one connection.
const CONNECTION_WINDOW: u32 = 4 << 20;
/// A kubelet that gives up on many calls at once must not lose its connection.
const MOST_RESETS: usize = 1024;

/// Serves until `shutdown`, and then until the calls under way have been answered.
pub async fn serve(listener: UnixListener, routes: Routes, shutdown: impl Future<Output = ()>) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_pending_accept_reset_streams(MOST_RESETS)
        .max_concurrent_streams(None);
    let routes = routes.prepare();
    let connections = GracefulShutdown::new();
    tokio::pin!(shutdown);
    loop {
        let stream = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "can't accept a connection");
                    // Out of descriptors, or the like: to try again at once would be to spin.
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let service = routes.clone().map_request(without_timeout);
        let connection = builder.serve_connection(
            TokioIo::new(Lenient::new(stream)),
            TowerToHyperService::new(service),
        );
        let connection = connections.watch(connection.into_owned());
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error, "a connection ended badly");
            }
        });
    }
    drop(listener);
    connections.shutdown().await;
}

fn without_timeout<B>(mut request: http::Request<B>) -> http::Request<B> {
    request.headers_mut().remove("grpc-timeout");
    request
}
