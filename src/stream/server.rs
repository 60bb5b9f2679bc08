//! The server: URLs given, connections taken.

use crate::forward::{self, MAX_PORTS, Pod};
use crate::http::{
    Answer, accept_spdy, accept_ws, is_websocket, method_not_allowed, not_found, refuse,
};
use crate::peer::{Peer, Socket, Transport};
use crate::protocol::{Forwarding, SPDY_COMMAND, SPDY_FORWARD, WS_COMMAND, WS_FORWARD};
use crate::session::{self, Job};
use crate::tls::Certificate;
use crate::token::Tokens;
use crate::ws::{self, Tunnel};
use crate::{AttachRequest, Backend, Config, ExecRequest, StreamError};
use ::http::{Method, Request as HttpRequest, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

/// How long a client may take for its TLS handshake, and for the head of its request.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The largest head of a request.
const MAX_HEAD: usize = 32 * 1024;

/// Serves exec, attach and port-forward sessions to clients that hold a URL of it.
pub struct StreamServer<B> {
    shared: Arc<Shared<B>>,
    listener: TcpListener,
    address: SocketAddr,
    base_url: String,
}

struct Shared<B> {
    config: Config,
    backend: Arc<B>,
    tokens: Tokens<Request>,
    certificate: Option<Certificate>,
    /// The path of the base URL, without a slash at its end.
    prefix: String,
    /// Sessions and connections that may become some.
    tasks: TaskTracker,
}

/// What a token stands for.
enum Request {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward { pod_id: String, ports: Vec<u16> },
}

impl Request {
    fn method(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
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
        let certificate = config.tls.clone().map(Certificate::load).transpose()?;
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
        let prefix = match base_url.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("", |at| &rest[at..]).to_owned(),
            None => String::new(),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                tokens: Tokens::new(config.token_ttl, config.max_in_flight),
                config,
                backend: Arc::new(backend),
                certificate,
                prefix,
                tasks: TaskTracker::new(),
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
        if ports.len() > MAX_PORTS {
            let text = format!("at most {MAX_PORTS} ports can be forwarded by one request");
            return Err(StreamError::InvalidRequest(text));
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
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = shutdown.cancelled() => break,
            };
            match accepted {
                Ok((socket, _)) => {
                    let task = take(self.shared.clone(), socket, shutdown.clone());
                    self.shared.tasks.spawn(task);
                }
                Err(error) => {
                    // Out of descriptors, most likely: it passes.
                    warn!(%error, "cannot accept a streaming connection");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
        let tasks = &self.shared.tasks;
        tasks.close();
        let grace = self.shared.config.cancel_grace + Duration::from_secs(10);
        if timeout(grace, tasks.wait()).await.is_err() {
            warn!("streaming sessions did not end in time");
        }
    }
}

/// Serves a connection until it is refused or becomes a stream.
async fn take<B: Backend>(shared: Arc<Shared<B>>, socket: TcpStream, shutdown: CancellationToken) {
    let socket = Socket::new(socket);
    let peer = socket.peer();
    let transport = match &shared.certificate {
        None => Transport::Plain(socket),
        Some(certificate) => {
            let handshake = certificate.acceptor().accept(socket);
            match timeout(HANDSHAKE, handshake).await {
                Ok(Ok(stream)) => Transport::Tls(Box::new(stream)),
                Ok(Err(error)) => return debug!(%error, "a TLS handshake failed"),
                Err(_) => return debug!("a TLS handshake took too long"),
            }
        }
    };
    let service = service_fn(|request| {
        let answer = answer(&shared, request, &peer, &shutdown);
        async { Ok::<_, Infallible>(answer) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE)
        .max_buf_size(MAX_HEAD)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(transport), service)
        .with_upgrades();
    tokio::select! {
        result = connection => {
            if let Err(error) = result {
                debug!(%error, "a streaming connection failed before it became a stream");
            }
        }
        () = shutdown.cancelled() => {}
    }
}

/// Answers a request, and starts the session that it asks for.
fn answer<B: Backend>(
    shared: &Arc<Shared<B>>,
    mut http: HttpRequest<Incoming>,
    peer: &Peer,
    shutdown: &CancellationToken,
) -> Answer {
    let path = http.uri().path();
    // A proxy may serve us under a path, and may or may not take it away.
    let path = path.strip_prefix(&shared.prefix).unwrap_or(path);
    let Some((method, token)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
        return not_found();
    };
    if !["exec", "attach", "portforward"].contains(&method) {
        return not_found();
    }
    if http.method() != Method::GET && http.method() != Method::POST {
        return method_not_allowed();
    }
    // The token is used up whatever follows.
    let request = match shared.tokens.take(token) {
        Some(request) if request.method() == method => request,
        _ => return not_found(),
    };
    let result = match request {
        Request::Exec(request) => command(shared, &mut http, peer, shutdown, Job::Exec(request)),
        Request::Attach(request) => {
            command(shared, &mut http, peer, shutdown, Job::Attach(request))
        }
        Request::PortForward { pod_id, ports } => {
            port_forward(shared, &mut http, peer, shutdown, pod_id, ports)
        }
    };
    result.unwrap_or_else(|refusal| *refusal)
}

fn command<B: Backend>(
    shared: &Arc<Shared<B>>,
    http: &mut HttpRequest<Incoming>,
    peer: &Peer,
    shutdown: &CancellationToken,
    job: Job,
) -> Result<Answer, Box<Answer>> {
    let (peer, gone) = (peer.clone(), shutdown.child_token());
    let shared = shared.clone();
    if is_websocket(http.headers()) {
        let (protocol, answer) = accept_ws(http.method(), http.headers(), WS_COMMAND)?;
        spawn(&shared.clone(), http, async move |io| {
            let runtime = (&*shared.backend, &shared.config);
            session::serve_ws(io, peer, protocol, job, runtime, gone).await;
        });
        return Ok(answer);
    }
    let (version, answer) = accept_spdy(http.headers(), SPDY_COMMAND)?;
    spawn(&shared.clone(), http, async move |io| {
        let runtime = (&*shared.backend, &shared.config);
        session::serve_spdy(io, peer, version, job, runtime, gone).await;
    });
    Ok(answer)
}

fn port_forward<B: Backend>(
    shared: &Arc<Shared<B>>,
    http: &mut HttpRequest<Incoming>,
    peer: &Peer,
    shutdown: &CancellationToken,
    pod_id: String,
    ports: Vec<u16>,
) -> Result<Answer, Box<Answer>> {
    let (peer, gone) = (peer.clone(), shutdown.child_token());
    let shared = shared.clone();
    let pod = Pod {
        id: pod_id,
        backend: shared.backend.clone(),
    };
    if !is_websocket(http.headers()) {
        let ((), answer) = accept_spdy(http.headers(), SPDY_FORWARD)?;
        spawn(&shared.clone(), http, async move |io| {
            forward::serve_spdy(io, peer, pod, &shared.config, gone).await;
        });
        return Ok(answer);
    }
    let (forwarding, answer) = accept_ws(http.method(), http.headers(), WS_FORWARD)?;
    match forwarding {
        Forwarding::Tunnel => spawn(&shared.clone(), http, async move |io| {
            let tunnel = Tunnel::new(ws::start(io).await);
            forward::serve_spdy(tunnel, peer, pod, &shared.config, gone).await;
        }),
        Forwarding::Channels(_) if ports.is_empty() => {
            let text = "no ports were named when this URL was asked for, and this protocol has no other way to name them";
            return Err(Box::new(refuse(StatusCode::BAD_REQUEST, text)));
        }
        Forwarding::Channels(encoding) => spawn(&shared.clone(), http, async move |io| {
            forward::serve_ws(io, peer, encoding, ports, pod, &shared.config, gone).await;
        }),
    }
    Ok(answer)
}

type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// Serves a stream once the connection has become one.
fn spawn<B, F, S>(shared: &Arc<Shared<B>>, http: &mut HttpRequest<Incoming>, serve: F)
where
    F: FnOnce(Upgraded) -> S + Send + 'static,
    S: Future<Output = ()> + Send,
{
    let upgrade = hyper::upgrade::on(http);
    shared.tasks.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => serve(TokioIo::new(upgraded)).await,
            Err(error) => debug!(%error, "a connection did not become a stream"),
        }
    });
}
